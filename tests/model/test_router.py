"""Routers and their balance: against transformers' DeepSeek routers, and written out by hand."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moetrain.model import Choice, Transformer
from moetrain.model.router import Router
from moetrain.settings import ModelSettings, RouterSettings

DIM, EXPERTS, TOP_K, TOKENS = 24, 16, 4, 300
EPS = torch.finfo(torch.float32).eps
# A token's logit adds DIM products; a score, a sum over experts and a division follow. Rounding
# grows with the square root of that.
RTOL = 4 * EPS * (DIM + EXPERTS) ** 0.5


def router(**settings: Any) -> Router:
    """Returns a router with weights that make the choice of experts matter."""
    model = ModelSettings(
        dim=DIM, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=DIM, ffn_hidden_dim=8,
        num_experts=EXPERTS, top_k=TOP_K, vocab_size=8, max_seq_len=64, rope_theta=1e4,
        router=RouterSettings(**settings),
    )  # fmt: skip
    made = Router(model)
    generator = torch.Generator().manual_seed(3)
    torch.nn.init.normal_(made.weight, std=DIM**-0.5, generator=generator)
    return made


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(7))


def all_valid(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def assert_same_choice(ours: Router, oracle: torch.nn.Module, oracle_bias: bool) -> None:
    """Compares chosen experts and their gates; the order of a token's experts is free."""
    with torch.no_grad():
        oracle.get_parameter("weight").copy_(ours.weight)
        if oracle_bias:
            ours.bias.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
            oracle.get_buffer("e_score_correction_bias").copy_(ours.bias)
    routing = ours(tokens(), all_valid(TOKENS))
    _, gates, experts = oracle(tokens())
    for gate, expert, our_gate, our_expert in zip(
        gates, experts, routing.gates, routing.experts, strict=True
    ):
        order, our_order = expert.argsort(), our_expert.argsort()
        assert torch.equal(expert[order], our_expert[our_order])
        torch.testing.assert_close(our_gate[our_order], gate[order], rtol=RTOL, atol=0)


@pytest.mark.parametrize(("groups", "top"), [(1, 1), (4, 2), (8, 2), (2, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_with_bias_and_groups_chooses_as_deepseek_v3(
    groups: int, top: int, normalize: bool
) -> None:
    oracle = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=DIM, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=groups,
            topk_group=top, norm_topk_prob=normalize, routed_scaling_factor=2.5,
        )
    )  # fmt: skip
    ours = router(
        score_function="sigmoid", num_groups=groups, top_groups=top, normalize_gates=normalize,
        routed_scaling_factor=2.5, bias_update_rate=0.001,
    )  # fmt: skip
    assert_same_choice(ours, oracle, oracle_bias=True)


@pytest.mark.parametrize(("groups", "top"), [(4, 2), (8, 3), (2, 1)])
def test_softmax_with_groups_chooses_as_deepseek_v2(groups: int, top: int) -> None:
    oracle = DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=DIM, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=groups,
            topk_group=top, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
            num_attention_heads=1,
        )
    )  # fmt: skip
    ours = router(
        num_groups=groups, top_groups=top, normalize_gates=False, routed_scaling_factor=16.0
    )
    assert_same_choice(ours, oracle, oracle_bias=False)


def test_a_token_stays_within_its_groups_and_groups_change_the_choice() -> None:
    free, limited = router(), router(num_groups=8, top_groups=2)
    chosen = limited(tokens(), all_valid(TOKENS)).experts
    assert all(len(set((row // 2).tolist())) <= 2 for row in chosen)
    assert not torch.equal(free(tokens(), all_valid(TOKENS)).experts, chosen)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_gates_of_a_normalised_router_sum_to_the_scaling_factor(score_function: str) -> None:
    made = router(score_function=score_function, routed_scaling_factor=2.5)
    sums = made(tokens(), all_valid(TOKENS)).gates.sum(-1)
    torch.testing.assert_close(sums, torch.full((TOKENS,), 2.5), rtol=RTOL, atol=0)


def test_scores_that_underflow_leave_gates_and_gradients_finite() -> None:
    made = router(score_function="sigmoid", load_balance_scope="sequence")
    routing = made(-1e4 * made.weight.detach().sum(0).expand(5, DIM), all_valid(5))
    (routing.gates.sum() + routing.statistics.probability_sums.square().sum()).backward()
    assert routing.gates.isfinite().all()
    assert made.weight.grad is not None
    assert made.weight.grad.isfinite().all()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_the_bias_evens_out_the_choice_and_stays_in_use_when_no_longer_updated(
    score_function: str,
) -> None:
    made = router(score_function=score_function, bias_update_rate=0.01)
    x, valid = tokens() + 0.5, all_valid(TOKENS)
    before = made(x, valid)
    for _ in range(200):
        made.update_bias(made(x, valid).statistics.counts, rate=0.01)
    after = made(x, valid)
    assert after.statistics.counts.max() < before.statistics.counts.max()
    assert after.statistics.counts.float().std() < 0.25 * before.statistics.counts.float().std()
    scores = (x @ made.weight.t()).sigmoid() if score_function == "sigmoid" else (
        (x @ made.weight.t()).softmax(-1)
    )  # fmt: skip
    chosen = scores.gather(1, after.experts)
    expected = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(after.gates, expected, rtol=RTOL, atol=0)

    frozen = router(score_function=score_function, bias_update_rate=0.0)
    frozen.load_state_dict(made.state_dict())
    assert torch.equal(frozen(x, valid).experts, after.experts)


def balance_by_hand(probabilities: Tensor, experts: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each sequence's balance loss (arXiv 2412.19437, equations 17-20) and its tokens."""
    losses, counted = [], []
    for p, chosen, mask in zip(probabilities, experts, valid, strict=True):
        num = int(mask.sum())
        loss = p.sum() * 0
        for expert in range(EXPERTS) if num else []:
            f = EXPERTS / (TOP_K * num) * (chosen[mask] == expert).sum()
            loss = loss + f * p[mask][:, expert].mean()
        losses.append(loss)
        counted.append(num)
    return torch.stack(losses), torch.tensor(counted)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_the_sequence_balance_loss_is_a_mean_over_sequences_by_tokens(score_function: str) -> None:
    made = router(score_function=score_function, load_balance_scope="sequence")
    x, valid = tokens(100), all_valid(4, 25)
    valid[1, 10:], valid[2] = False, False
    routing = made(x, valid)
    logits = x @ made.weight.t()
    scores = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    probabilities = (scores / scores.sum(-1, keepdim=True)).view(4, 25, -1)
    losses, counted = balance_by_hand(probabilities, routing.experts.view(4, 25, -1), valid)
    expected = (losses * counted).sum()
    ours = routing.statistics.sequence_balance_sum
    torch.testing.assert_close(ours, expected, rtol=RTOL * 10, atol=0)  # sums over 60 tokens

    (gradient,) = torch.autograd.grad(ours, made.weight)
    (by_hand,) = torch.autograd.grad(expected, made.weight)
    assert (gradient - by_hand).norm() < 20 * RTOL * by_hand.norm()

    parts = [made(x[i : i + 25], valid[i // 25]).statistics for i in range(0, 100, 25)]
    alone = torch.stack([part.sequence_balance_sum for part in parts]).sum()
    torch.testing.assert_close(alone, ours, rtol=RTOL, atol=0)
    torch.testing.assert_close(
        sum(part.probability_sums for part in parts),
        (probabilities * valid.unsqueeze(-1)).sum((0, 1)),
        rtol=RTOL, atol=RTOL,
    )  # fmt: skip


def test_jitter_is_a_function_of_each_sequences_seed_within_its_bounds() -> None:
    made = router(jitter_noise=0.1)
    seen: list[Tensor] = []
    original = made.select

    def remember(scores: Tensor) -> Tensor:
        seen.append(scores)
        return original(scores)

    made.select = remember
    with torch.no_grad():
        made.weight.zero_()
        made.weight[:, :EXPERTS] = torch.eye(EXPERTS)  # logits are the input's first numbers
    x, valid = torch.ones(60, DIM), all_valid(2, 30)

    def scores(seeds: list[int] | None) -> Tensor:
        made(x, valid, Choice(0, noise_seeds=seeds))
        return seen[-1].view(2, 30, EXPERTS)

    assert torch.equal(scores(None), torch.ones(2, 30, EXPERTS)), "no seeds, no noise"
    first = scores([11, 12])
    assert 0.9 <= first.min() < 0.91
    assert 1.09 < first.max() <= 1.1
    assert not torch.equal(first[0], first[1])
    assert torch.equal(scores([12, 11]), first.flip(0)), "whatever stands beside it in the batch"
    assert torch.equal(scores([11, 12]), first), "recomputation sees the same"


def test_each_layer_draws_its_own_jitter() -> None:
    settings = ModelSettings(
        dim=8, num_layers=3, num_heads=1, num_kv_heads=1, head_dim=8, ffn_hidden_dim=8,
        num_experts=4, top_k=2, vocab_size=8, max_seq_len=64, rope_theta=1e4,
        router=RouterSettings(jitter_noise=0.1),
    )  # fmt: skip
    model = Transformer(settings)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    choices: list[Choice] = []
    for moe in model.moe_layers():
        moe.router.register_forward_pre_hook(lambda _, given: choices.append(given[2]))
    batch = torch.zeros(2, 5, dtype=torch.int64)
    model(batch, batch, all_valid(2, 5), [1, 2])
    assert len({seed for choice in choices for seed in choice.noise_seeds or []}) == 6
    choices.clear()
    model(batch, batch)
    assert [choice.noise_seeds for choice in choices] == [None] * 3


@pytest.mark.parametrize("top_k", [1, 3, 4, 16])
def test_forced_balance_is_even_whatever_the_logits_and_keeps_the_routers_gates(
    top_k: int,
) -> None:
    settings = dataclasses.replace(router().settings, force_balance=True, num_groups=4)
    made = router()
    made.settings, made.top_k = settings, top_k
    x, valid = tokens(4 * EXPERTS) + 2.0, all_valid(2, 2 * EXPERTS)
    routing = made(x, valid)
    assert torch.equal(routing.statistics.counts, torch.full((EXPERTS,), 4 * top_k))
    assert all(len(set(row.tolist())) == top_k for row in routing.experts)
    assert torch.equal(made(-x, valid).experts, routing.experts)
    expected = (x @ made.weight.t()).gather(1, routing.experts).softmax(-1)
    torch.testing.assert_close(routing.gates, expected, rtol=RTOL, atol=0)
    if top_k == 3:  # a token's experts are spread, not neighbours
        gaps = (routing.experts - routing.experts[:, :1]).abs().max(-1).values
        assert gaps.float().mean() > EXPERTS / 4
