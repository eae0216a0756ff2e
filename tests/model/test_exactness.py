"""What a MoE layer owes its router and its experts on a single device: values and gradients."""

import dataclasses

import pytest
import torch

from moetrain.checks import ConfigError
from moetrain.config import check
from moetrain.model import load_balance_loss
from moetrain.settings import Config, ExpertsSettings, RouterSettings
from moetrain.settings.validation import validated
from tests.model.test_transformer import SMALL, _initialised
from tests.support.tensors import grad_of
from tests.test_config import toy


@pytest.mark.trap(4)
def test_the_balance_loss_is_per_layer_and_not_pooled_over_layers() -> None:
    """Four layers that collapse on an expert each look balanced together, and must not."""
    collapsed = 100 * torch.eye(4)  # layer l sends all its tokens to expert l
    per_layer = load_balance_loss(
        collapsed.long(), collapsed, top_k=1, counted_tokens=100, num_tokens=100
    )
    torch.testing.assert_close(per_layer, torch.full((4,), 4.0))
    pooled = collapsed.sum(0, keepdim=True)
    as_one = load_balance_loss(pooled.long(), pooled, top_k=1, counted_tokens=400, num_tokens=400)
    torch.testing.assert_close(as_one, torch.ones(1))  # what pooling would have said


@pytest.mark.trap(5)
@pytest.mark.parametrize("normalize_gates", [True, False])
def test_the_routers_gradient_is_that_of_its_gates(normalize_gates: bool) -> None:
    """With no loss of its own: against gates and experts written out over a dense loop."""
    router = RouterSettings(
        load_balance_loss_weight=0.0, z_loss_weight=0.0, normalize_gates=normalize_gates
    )
    settings = dataclasses.replace(SMALL, dim=16, ffn_hidden_dim=16, router=router)
    layer = _initialised(settings).moe_layers()[0]
    x, grad = torch.randn(2, 30, 16)
    out, _ = layer(x, torch.ones(30, dtype=torch.bool))
    out.backward(grad)

    exact = {n: p.detach().double() for n, p in layer.named_parameters()}
    weight = exact["router.weight"].requires_grad_()
    logits = x.double() @ weight.t()
    chosen = logits.topk(settings.top_k).indices
    scores = torch.full_like(logits, -torch.inf).scatter(1, chosen, logits.gather(1, chosen))
    gates = scores.softmax(-1) if normalize_gates else logits.softmax(-1)
    expected = torch.zeros(30, 16, dtype=torch.float64)
    for expert in range(settings.num_experts):
        hidden = torch.nn.functional.silu(x.double() @ exact["experts.gate"][expert].t())
        hidden = hidden * (x.double() @ exact["experts.up"][expert].t())
        takes = (chosen == expert).any(-1, keepdim=True)
        expected = expected + takes * gates[:, [expert]] * (hidden @ exact["experts.down"][expert])
    expected.backward(grad.double())
    error = (grad_of(layer.router.weight) - grad_of(weight)).norm() / grad_of(weight).norm()
    # Reductions of 16, 16 and 16 there and back, and a sum over 30 tokens.
    assert error < 4 * torch.finfo(torch.float32).eps * (6 * 16 + 30) ** 0.5


@pytest.mark.trap(5)
def test_a_lone_normalised_gate_teaches_the_router_nothing_which_is_why_it_is_refused() -> None:
    layer = _initialised(dataclasses.replace(SMALL, top_k=1)).moe_layers()[0]
    out, _ = layer(torch.randn(30, SMALL.dim), torch.ones(30, dtype=torch.bool))
    out.sum().backward()
    assert grad_of(layer.router.weight).abs().max() == 0
    with pytest.raises(ConfigError, match=r"model\.router\.normalize_gates=True: .* learn nothing"):
        check(validated(toy(model__top_k=1), Config))
    router = {"normalize_gates": False}
    check(validated(toy(model__top_k=1, model__router=router), Config))


@pytest.mark.trap(17)
@pytest.mark.parametrize("backend", ["cpu", "grouped_mm"])
def test_a_whole_layer_takes_gradients_of_stride_zero(backend: str) -> None:
    """`sum()` hands the layer one number for all elements; `ones` spells them out."""
    # 32 and 48: grouped_mm wants rows of whole 16 bytes.
    settings = dataclasses.replace(
        SMALL, dim=32, ffn_hidden_dim=48, experts=ExpertsSettings(backend=backend)
    )

    def gradients(spelt_out: bool) -> list[torch.Tensor]:
        layer = _initialised(settings).moe_layers()[0]
        torch.manual_seed(2)
        x = torch.randn(30, settings.dim, requires_grad=True)
        out, _ = layer(x, torch.ones(30, dtype=torch.bool))
        if spelt_out:
            out.backward(torch.ones_like(out))
        else:
            out.sum().backward()
        return [grad_of(x), *map(grad_of, layer.parameters())]

    for ours, expected in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(ours, expected)
        assert ours.abs().sum() > 0
