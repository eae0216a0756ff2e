"""The decoder against transformers' models, and its losses against plain torch."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.model import Transformer, chunked_cross_entropy, load_balance_loss, total_parameters
from moetrain.model.losses import chunked_losses
from moetrain.settings import ModelSettings, RopeScalingSettings, RouterSettings
from tests.support.tensors import grad_of
from tests.support.transformers_oracle import copy_weights, oracle_for

SMALL = ModelSettings(
    dim=48, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10, ffn_hidden_dim=80,
    num_experts=5, top_k=2, vocab_size=101, max_seq_len=64, rope_theta=1e4,
)  # fmt: skip
SHAPES = {
    "head_dim does not divide dim": SMALL,
    "one kv head, top-1": dataclasses.replace(SMALL, num_kv_heads=1, top_k=1),
    "as many kv heads, all experts": dataclasses.replace(SMALL, num_kv_heads=6, top_k=5),
    "mixtral's theta and eps, 8 experts": dataclasses.replace(
        SMALL, dim=64, head_dim=16, num_heads=4, num_experts=8, rope_theta=1e6, norm_eps=1e-6
    ),
    "one expert: mistral": dataclasses.replace(SMALL, num_experts=1, top_k=1),
    "query and key norms, gates of the full softmax: olmoe": dataclasses.replace(
        SMALL, dim=60, qk_norm=True, router=RouterSettings(normalize_gates=False)
    ),
    "sigmoid, bias, groups, shared experts, a dense layer: deepseek-v3": dataclasses.replace(
        SMALL,
        num_experts=8,
        top_k=3,
        ffn_hidden_dim=40,
        num_shared_experts=2,
        num_dense_layers=1,
        dense_ffn_hidden_dim=72,
        router=RouterSettings(
            score_function="sigmoid", num_groups=4, top_groups=2, routed_scaling_factor=2.5
        ),
    ),
    "query and key norms over each head, tied embeddings: qwen3": dataclasses.replace(
        SMALL, num_experts=1, top_k=1, qk_norm=True, qk_norm_scope="head", tie_embeddings=True
    ),
    "biases of queries, keys and values: qwen2": dataclasses.replace(
        SMALL, num_experts=1, top_k=1, attention_bias=True
    ),
    "biases of all of attention: llama": dataclasses.replace(
        SMALL, num_experts=1, top_k=1, attention_bias=True, attention_output_bias=True
    ),
    "norms over each head, a dense layer: qwen3-moe": dataclasses.replace(
        SMALL,
        qk_norm=True,
        qk_norm_scope="head",
        num_dense_layers=1,
        dense_ffn_hidden_dim=72,
        rope_scaling=RopeScalingSettings(type="yarn", factor=4.0, original_max_seq_len=16),
    ),
    "clipped queries, keys and values: olmoe": dataclasses.replace(
        SMALL, dim=60, qk_norm=True, clip_qkv=0.8
    ),
    "gates of the full softmax, shared experts, a dense layer: qwen2-moe": dataclasses.replace(
        SMALL,
        num_shared_experts=2,
        num_dense_layers=1,
        dense_ffn_hidden_dim=72,
        attention_bias=True,
        router=RouterSettings(normalize_gates=False),
    ),
    "gates of the full softmax, top-1, nothing else: qwen2-moe": dataclasses.replace(
        SMALL, top_k=1, router=RouterSettings(normalize_gates=False)
    ),
    "sigmoid without shared experts, norms, biases, half a head rotated: glm-4.5": (
        dataclasses.replace(
            SMALL,
            head_dim=12,
            qk_norm=True,
            qk_norm_scope="head",
            attention_bias=True,
            partial_rotary_factor=0.5,
            router=RouterSettings(score_function="sigmoid", normalize_gates=False),
        )
    ),
    "positions scaled linearly, tied embeddings": dataclasses.replace(
        SMALL, rope_scaling=RopeScalingSettings(type="linear", factor=4.0), tie_embeddings=True
    ),
    "positions scaled as in llama 3": dataclasses.replace(
        SMALL,
        head_dim=16,
        rope_scaling=RopeScalingSettings(type="llama3", factor=8.0, original_max_seq_len=32),
    ),
    "positions scaled by yarn, with its own factors": dataclasses.replace(
        SMALL,
        head_dim=16,
        num_experts=1,
        top_k=1,
        rope_scaling=RopeScalingSettings(
            type="yarn",
            factor=2.0,
            original_max_seq_len=40,
            beta_fast=4.0,
            beta_slow=0.5,
            attention_factor=1.3,
        ),
    ),
}


def tolerance(settings: ModelSettings) -> float:
    """Bounds the relative error of a logit in float32.

    Rounding grows with the square root of the additions that a value has behind it: for each
    layer about four products with reductions no longer than `ffn_hidden_dim`, and the head.
    """
    additions = (4 * settings.num_layers + 1) * max(settings.ffn_hidden_dim, settings.dim)
    return torch.finfo(torch.float32).eps * math.sqrt(additions)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_loss_and_gradients_equal_transformers(name: str) -> None:
    settings = SHAPES[name]
    torch.manual_seed(0)
    oracle, model = oracle_for(settings), Transformer(settings)
    copy_weights(oracle, model)
    named = dict(oracle.named_parameters())
    counted = sum(p.numel() for n, p in named.items() if "shared_expert_gate" not in n)
    assert counted == total_parameters(settings)
    tokens = torch.randint(0, settings.vocab_size, (3, 37))

    expected = oracle(input_ids=tokens, labels=tokens, output_router_logits=False)
    logits = model(tokens)
    relative = (logits - expected.logits).norm() / expected.logits.norm()
    assert relative < tolerance(settings)

    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = model(inputs, targets).cross_entropy / targets.numel()
    torch.testing.assert_close(loss, expected.loss, rtol=tolerance(settings), atol=0)

    expected.loss.backward()
    loss.backward()
    gradients = oracle_for(settings)
    for target, source in zip(gradients.parameters(), oracle.parameters(), strict=True):
        target.data = grad_of(source)
    reference = Transformer(settings)
    copy_weights(gradients, reference, gradients=True)
    for (key, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if settings.top_k == 1 and "router" in key:
            continue  # the only gate is 1 whatever the logits: both gradients are rounding
        error = (grad_of(ours) - theirs).norm() / theirs.norm().clamp_min(1e-12)
        assert error < 4 * tolerance(settings), key  # the way back and the way there


@pytest.mark.trap(12)
def test_masked_tokens_count_in_no_loss_and_no_statistic() -> None:
    torch.manual_seed(0)
    model = _initialised(SMALL)
    tokens, targets = torch.randint(0, 101, (2, 2, 20))
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[:, 12:] = False  # causal: what stands behind a position can't change it
    masked = model(tokens, targets, valid)
    short = model(tokens[:, :12], targets[:, :12])
    torch.testing.assert_close(masked.cross_entropy, short.cross_entropy)
    logits, by_sequence = model(tokens[:, :12]), masked.by_sequence
    for sequence, nats in enumerate(by_sequence):
        expected = F.cross_entropy(logits[sequence], targets[sequence, :12], reduction="sum")
        torch.testing.assert_close(nats.float(), expected)
    assert not by_sequence.requires_grad
    for ours, expected in zip(masked.routing, short.routing, strict=True):
        torch.testing.assert_close(ours, expected)
    assert masked.routing.counts.sum() == 24 * SMALL.top_k * SMALL.num_layers


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunked_cross_entropy_equals_torch_with_gradients(chunk_size: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(33, 16, dtype=torch.float64).float().requires_grad_()
    head = torch.randn(29, 16).requires_grad_()
    targets, valid = torch.randint(0, 29, (33,)), torch.rand(33) > 0.3
    ours = chunked_cross_entropy(hidden, head, targets, valid, chunk_size=chunk_size)
    (ours / 7).backward()
    gradients = grad_of(hidden), grad_of(head)
    hidden.grad = head.grad = None
    expected = F.cross_entropy((hidden @ head.t())[valid], targets[valid], reduction="sum")
    (expected / 7).backward()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients, (grad_of(hidden), grad_of(head)))


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.trap(12)
@pytest.mark.parametrize("chunk_size", [5, 1000])
@pytest.mark.parametrize(
    ("soft_cap", "z_weight"), [(0.7, 0.0), (4.0, 0.0), (None, 0.3), (4.0, 0.3)]
)
def test_soft_cap_and_z_loss_of_the_head_have_the_gradients_of_autograd_in_float64(
    soft_cap: float | None, z_weight: float, chunk_size: int
) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(33, 16).requires_grad_(), torch.randn(29, 16).requires_grad_()
    targets, valid = torch.randint(0, 29, (33,)), torch.rand(33) > 0.3
    ours = chunked_losses(
        hidden, head, targets, valid,
        chunk_size=chunk_size, soft_cap=soft_cap, z_weight=z_weight,
    )  # fmt: skip
    (ours.total / 7).backward()
    exact = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    logits = capped(exact[0] @ exact[1].t(), soft_cap)
    cross_entropy = F.cross_entropy(logits[valid], targets[valid], reduction="sum")
    z = logits[valid].logsumexp(1).square().sum()
    total = cross_entropy + z_weight * z
    (total / 7).backward()
    # Sums of 16, 29 and 33 terms one after the other, and the tanh: in float32.
    limit = 8 * torch.finfo(torch.float32).eps * math.sqrt(16 + 29 + 33)
    pairs = [(ours.total, total), (ours.cross_entropy, cross_entropy)]
    for mine, theirs in pairs + ([(ours.z, z)] if z_weight else []):
        assert (mine - theirs).abs() < limit * theirs
    for mine, theirs in zip((hidden, head), exact, strict=True):
        error = (grad_of(mine) - grad_of(theirs)).norm() / grad_of(theirs).norm()
        assert error < limit


def test_with_a_z_loss_of_the_head_the_cross_entropy_alone_has_no_gradient_and_says_so() -> None:
    model = _initialised(dataclasses.replace(SMALL, head_z_loss_weight=0.1))
    tokens, targets = torch.randint(0, 101, (2, 2, 20))
    output = model(tokens, targets)
    torch.testing.assert_close(output.token_loss, output.cross_entropy + 0.1 * output.head_z_sum)
    with pytest.raises(RuntimeError, match=r"minimises output\.token_loss"):
        output.cross_entropy.backward()
    with torch.no_grad():
        assert torch.equal(model(tokens, targets).cross_entropy, output.cross_entropy)


def test_the_cap_bounds_the_logits_of_inference_too_and_both_are_the_same() -> None:
    model = _initialised(dataclasses.replace(SMALL, logit_soft_cap=1.5))
    free = Transformer(SMALL)
    free.load_state_dict(model.state_dict())
    tokens, targets = torch.randint(0, 101, (2, 2, 20))
    logits = model(tokens)
    assert logits.abs().max() <= 1.5 < free(tokens).abs().max()
    torch.testing.assert_close(logits, capped(free(tokens), 1.5))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, targets).cross_entropy, expected)


class _RowsOfLogits(TorchDispatchMode):
    """Records the most rows of a product as wide as the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # it has no annotations
        self.most, self._vocab_size = 0, vocab_size

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        found = function(*arguments, **(options or {}))
        if isinstance(found, torch.Tensor) and found.shape[1:] == (self._vocab_size,):
            self.most = max(self.most, found.shape[0])
        return found


@pytest.mark.parametrize(("given", "expected"), [(None, 256), (500, 500)])
def test_a_chunk_of_the_loss_is_a_number_of_bytes_unless_it_is_set(
    given: int | None, expected: int
) -> None:
    settings = dataclasses.replace(
        SMALL, dim=8, num_layers=1, num_experts=1, top_k=1, vocab_size=2**18, max_seq_len=600,
        loss_chunk_size=given,
    )  # fmt: skip
    model, tokens = _initialised(settings), torch.zeros(1, 600, dtype=torch.int64)
    with _RowsOfLogits(2**18) as seen, torch.no_grad():
        model(tokens, tokens)
    assert seen.most == expected


@pytest.mark.parametrize(
    ("vocab_size", "tokens"),
    [(257, 2048), (32_000, 2048), (32_768, 2048), (50_304, 1280), (151_936, 384), (256_000, 256),
     (2**24, 128)],
)  # fmt: skip
def test_the_default_chunk_is_what_256_mib_hold_and_as_before_for_small_vocabularies(
    vocab_size: int, tokens: int
) -> None:
    settings = dataclasses.replace(SMALL, vocab_size=vocab_size)
    assert settings.loss_chunk == tokens
    assert tokens == 128 or 4 * tokens * vocab_size <= 2**28


def test_balance_loss_is_one_when_balanced_and_rises_when_an_expert_takes_all() -> None:
    uniform = torch.full((2, 4), 50)
    even = load_balance_loss(
        uniform, torch.full((2, 4), 25.0), top_k=2, counted_tokens=100, num_tokens=100
    )
    torch.testing.assert_close(even, torch.ones(2))
    collapsed = load_balance_loss(
        torch.tensor([[100, 0, 0, 0]]), torch.tensor([[100.0, 0, 0, 0]]),
        top_k=1, counted_tokens=100, num_tokens=100,
    )  # fmt: skip
    torch.testing.assert_close(collapsed, torch.tensor([4.0]))


@pytest.mark.trap(5)
def test_router_learns_from_the_main_loss_alone() -> None:
    model = _initialised(
        dataclasses.replace(
            SMALL, router=RouterSettings(load_balance_loss_weight=0.0, z_loss_weight=0.0)
        )
    )
    tokens, targets = torch.randint(0, 101, (2, 2, 20))
    model(tokens, targets).cross_entropy.backward()
    for layer in model.moe_layers():
        assert grad_of(layer.router.weight).abs().sum() > 0


def test_gates_without_normalisation_are_the_full_softmax() -> None:
    settings = dataclasses.replace(SMALL, top_k=1, router=RouterSettings(normalize_gates=False))
    router = _initialised(settings).moe_layers()[0].router
    x = torch.randn(30, SMALL.dim)
    routing = router(x, torch.ones(30, dtype=torch.bool))
    expected = (x @ router.weight.t()).softmax(-1).max(-1)
    assert torch.equal(routing.experts.squeeze(1), expected.indices)
    torch.testing.assert_close(routing.gates.squeeze(1), expected.values)


@pytest.mark.trap(9)
def test_routing_is_float32_in_a_bfloat16_model() -> None:
    settings = dataclasses.replace(SMALL, dim=64)
    torch.manual_seed(0)
    router = _initialised(settings).moe_layers()[0].router
    router.bias.fill_(1 / 3)
    router = router.bfloat16()
    assert torch.equal(router.bias, torch.full((SMALL.num_experts,), 1 / 3)), "not even rounded"
    x = torch.randn(200, 64).bfloat16()
    routing = router(x, torch.ones(200, dtype=torch.bool))
    logits = x.float() @ router.weight.float().t()
    assert routing.gates.dtype == routing.statistics.z_sum.dtype == torch.float32
    assert torch.equal(routing.experts, logits.topk(2).indices)


def test_the_selection_bias_moves_the_choice_but_not_the_gates() -> None:
    biased = dataclasses.replace(SMALL, router=RouterSettings(bias_update_rate=0.1))
    router = _initialised(biased).moe_layers()[0].router
    x, valid = torch.randn(64, SMALL.dim), torch.ones(64, dtype=torch.bool)
    before = router(x, valid)
    router.update_bias(before.statistics.counts, rate=100.0)
    after = router(x, valid)
    most = before.statistics.counts.argmax()
    assert after.statistics.counts[most] < before.statistics.counts[most]
    logits = x @ router.weight.t()
    expected = logits.gather(1, after.experts).softmax(-1)
    torch.testing.assert_close(after.gates, expected)


def _initialised(settings: ModelSettings) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(settings)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else torch.nn.init.ones_(weight)
    return model
