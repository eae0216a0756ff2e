"""Attention that stops at document ends, against each document by itself and transformers."""

import dataclasses
import resource

import pytest
import torch
from torch import Tensor

from moetrain.model import Documents, Transformer
from moetrain.settings import ModelSettings
from tests.model.test_transformer import SHAPES, SMALL, _initialised, tolerance
from tests.support.ranks import run_ranks
from tests.support.tensors import grad_of
from tests.support.transformers_oracle import copy_weights, oracle_for

CPU = torch.device("cpu")
LENGTHS = [[5, 1, 30, 2], [38], [1, 1, 36]]  # of the documents of three sequences
MOE_AND_DENSE = ["head_dim does not divide dim", "one expert: mistral"]


def documents_of(lengths: list[list[int]], device: torch.device = CPU) -> Documents:
    starts = torch.zeros(len(lengths), sum(lengths[0]), dtype=torch.bool)
    for row, row_lengths in zip(starts, lengths, strict=True):
        row[torch.tensor([0, *row_lengths[:-1]]).cumsum(0)] = True
    return Documents.of(starts, device=device)


def alone(batch: Tensor) -> list[Tensor]:
    """Returns each document of [batch, seq] as a batch of its own, [1, length]."""
    return [
        part.unsqueeze(0)
        for row, row_lengths in zip(batch, LENGTHS, strict=True)
        for part in row.split(row_lengths)
    ]


def test_documents_know_where_they_stand() -> None:
    documents = documents_of(LENGTHS)
    assert documents.runs == [(1, 5), (1, 1), (1, 30), (1, 2), (1, 38), (2, 1), (1, 36)]
    assert documents.cu_seqlens.tolist() == [0, 5, 6, 36, 38, 76, 77, 78, 114]
    expected = [[p for n in row for p in range(n)] for row in LENGTHS]
    assert documents.positions.tolist() == expected


def test_a_sequence_begins_a_document_whether_it_says_so_or_not() -> None:
    documents = Documents.of(torch.zeros(2, 3, dtype=torch.bool), device=CPU)
    assert documents.runs == [(2, 3)]


def test_sequences_of_one_document_are_to_the_bit_what_they_are_without() -> None:
    model = _initialised(SMALL)
    tokens = torch.randint(0, 101, (3, 38))
    assert torch.equal(model(tokens, documents=documents_of([[38]] * 3)), model(tokens))


@pytest.mark.parametrize("name", MOE_AND_DENSE)
@pytest.mark.trap(12)
def test_a_packed_sequence_is_its_documents_each_alone(name: str) -> None:
    """Logits, loss, what the routers count, and all gradients."""
    settings = SHAPES[name]
    packed, single = _initialised(settings), _initialised(settings)
    tokens, targets = torch.randint(0, 101, (2, 3, 38))
    valid = torch.rand(3, 38) > 0.2
    documents = documents_of(LENGTHS)

    logits = packed(tokens, documents=documents)
    expected = torch.cat([single(part)[0] for part in alone(tokens)])
    error = (logits.flatten(0, 1) - expected).norm() / expected.norm()
    assert error < tolerance(settings)

    ours = packed(tokens, targets, valid, documents=documents)
    theirs = [single(*parts) for parts in zip(*map(alone, (tokens, targets, valid)), strict=True)]
    loss = sum(sums.cross_entropy for sums in theirs)
    torch.testing.assert_close(ours.cross_entropy, loss, rtol=tolerance(settings), atol=0)
    if settings.is_moe:
        counts = sum(sums.routing.counts for sums in theirs)
        assert torch.equal(ours.routing.counts, counts)

    ours.cross_entropy.backward()
    loss.backward()
    for (key, p), q in zip(packed.named_parameters(), single.parameters(), strict=True):
        error = (grad_of(p) - grad_of(q)).norm() / grad_of(q).norm()
        assert error < 4 * tolerance(settings), key


def test_nothing_of_a_document_reaches_another() -> None:
    """To the bit: another token in the first document changes nothing behind its end."""
    model = _initialised(dataclasses.replace(SMALL, num_experts=1, top_k=1))
    tokens = torch.randint(0, 101, (1, 38))
    other = tokens.clone()
    other[0, 2] = (other[0, 2] + 1) % 101
    documents = documents_of([[5, 33]])
    before, after = model(tokens, documents=documents), model(other, documents=documents)
    assert torch.equal(before[0, 5:], after[0, 5:])
    assert not torch.equal(before[0, 2:5], after[0, 2:5])
    assert not torch.equal(model(tokens)[0, 5:], model(other)[0, 5:]), "without, it does"


def test_rotary_positions_begin_anew_at_each_document() -> None:
    """Relative positions hide a wrong offset from the logits, so the tables are looked at."""
    model, seen = _initialised(SMALL), []
    attention = model.get_submodule("layers.0.attention")
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    tokens = torch.randint(0, 101, (1, 38))
    model(tokens)
    model(tokens, documents=documents_of([[5, 33]]))
    for table, by_document in zip(*seen, strict=True):
        assert torch.equal(by_document[0, 0, :5], table[:5])
        assert torch.equal(by_document[0, 0, 5:], table[:33])


@pytest.mark.parametrize("name", MOE_AND_DENSE)
def test_loss_and_gradients_equal_transformers_with_a_block_diagonal_mask(name: str) -> None:
    settings = SHAPES[name]
    torch.manual_seed(0)
    oracle, model = oracle_for(settings), Transformer(settings)
    copy_weights(oracle, model)
    tokens, targets = torch.randint(0, settings.vocab_size, (2, 3, 38))
    documents = documents_of(LENGTHS)

    number = (documents.positions == 0).cumsum(1)  # of each token's document in its sequence
    visible = (number.unsqueeze(2) == number.unsqueeze(1)).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    logits = oracle(
        input_ids=tokens, attention_mask=mask.unsqueeze(1), position_ids=documents.positions
    ).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = model(tokens, targets, documents=documents).cross_entropy / targets.numel()
    torch.testing.assert_close(loss, expected, rtol=tolerance(settings), atol=0)

    expected.backward()
    loss.backward()
    gradients = oracle_for(settings)
    for target, source in zip(gradients.parameters(), oracle.parameters(), strict=True):
        target.data = grad_of(source)
    reference = Transformer(settings)
    copy_weights(gradients, reference)
    for (key, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        error = (grad_of(ours) - theirs).norm() / theirs.norm()
        assert error < 4 * tolerance(settings), key


def peak_gib_of_a_step(lengths: list[int]) -> tuple[float, float]:
    """Returns the most memory that this process has held, before and after a step."""
    settings = ModelSettings(
        dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_hidden_dim=16,
        num_experts=2, top_k=1, vocab_size=64, max_seq_len=sum(lengths), rope_theta=1e6,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = Transformer(settings)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    tokens, targets = torch.randint(0, 64, (2, 1, sum(lengths)))
    model(tokens, targets, documents=documents_of([lengths])).cross_entropy.backward()
    assert all(grad_of(p).isfinite().all() for p in model.parameters())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return before / 2**20, after / 2**20  # Linux counts KiB


def test_64k_tokens_need_no_memory_that_grows_with_the_square() -> None:
    """In a process that says how much it held at most; a mask of a byte a pair would be 4 GiB.

    A quarter of the tokens are one document, whose scores alone would be 2 GiB in float32.
    """
    lengths = [16_384, *[1, 7, 300, 716] * 48]
    ((before, after),) = run_ranks(peak_gib_of_a_step, 1, lengths)
    assert sum(lengths) == 65_536
    assert after - before < 0.5


@pytest.mark.gpu
def test_torchs_kernel_for_documents_of_any_lengths_equals_one_after_the_other() -> None:
    """On CUDA in bfloat16, whose rounding bounds the difference of outputs and gradients."""
    from moetrain.model.documents import attend_documents

    device = torch.device("cuda")
    documents = documents_of(LENGTHS, device)
    torch.manual_seed(0)
    exact = [torch.randn(3, heads, 38, 64, device=device) for heads in (4, 2, 2)]
    exact = [x.bfloat16().float().requires_grad_() for x in exact]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected, ours = (attend_documents(q, k, v, documents) for q, k, v in (exact, rounded))
    grad = torch.randn_like(expected)
    expected.backward(grad)
    ours.backward(grad.bfloat16())
    pairs = [(ours, expected), *zip(map(grad_of, rounded), map(grad_of, exact), strict=True)]
    for half, full in pairs:
        assert (half.float() - full).norm() < 4 * torch.finfo(torch.bfloat16).eps * full.norm()
