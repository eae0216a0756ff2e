"""The MoE layers that are compared: ours, other libraries', and the limit, on the same weights.

Each builder returns a `Layer` that computes the same function: a softmax router with renormalised
gates of the chosen experts, and SwiGLU experts. `Unavailable` says why one can't run here.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.torchtitan_package import TORCHTITAN, Unavailable, import_peer
from moetrain.model import MoELayer
from moetrain.settings import ExpertsSettings, ModelSettings


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of one layer and of its batch."""

    dim: int
    hidden: int
    experts: int
    top_k: int
    tokens: int

    @staticmethod
    def parse(text: str) -> "Shape":
        """Returns the shape written as `dim,hidden,experts,top_k,tokens`."""
        numbers = [int(part) for part in text.split(",")]
        names = [field.name for field in fields(Shape)]
        if len(numbers) != len(names) or min(numbers) < 1:
            raise ValueError(f"{text!r}: give {','.join(names)}, all positive")
        shape = Shape(**dict(zip(names, numbers, strict=True)))
        if shape.top_k > shape.experts:
            raise ValueError(f"{text!r}: a token can't choose {shape.top_k} of {shape.experts}")
        return shape

    def __str__(self) -> str:
        return ",".join(str(getattr(self, field.name)) for field in fields(self))

    @property
    def rows(self) -> int:
        """Token–expert assignments: the rows that the experts compute."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """FLOPs of the seven matrix products; a multiplication and an addition count as two.

        The first and the fifth compute gate and up together and count double: nine times
        2 · rows · dim · hidden.
        """
        return 18 * self.rows * self.dim * self.hidden


class Weights(NamedTuple):
    """The values that every layer starts from."""

    router: Tensor
    """[experts, dim]"""
    gate: Tensor
    """[experts, hidden, dim]"""
    up: Tensor
    """[experts, hidden, dim]"""
    down: Tensor
    """[experts, hidden, dim]"""

    @staticmethod
    def random(shape: Shape, *, dtype: torch.dtype, device: torch.device) -> "Weights":
        """Returns normal weights that keep the size of the activations."""
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(*size: int, std: float) -> Tensor:
            values = torch.randn(size, generator=generator, device=device)
            return (values * std).to(dtype)

        matrices = (shape.experts, shape.hidden, shape.dim)
        return Weights(
            normal(shape.experts, shape.dim, std=shape.dim**-0.5),
            normal(*matrices, std=shape.dim**-0.5),
            normal(*matrices, std=shape.dim**-0.5),
            normal(*matrices, std=shape.hidden**-0.5),
        )


class Layer(NamedTuple):
    """A layer to time."""

    forward: Callable[[Tensor], Tensor]
    """[tokens, dim] to [tokens, dim]."""
    parameters: list[nn.Parameter]
    router: nn.Parameter
    """The router's weight, [experts, dim]: its gradient shows whether the gates are the same."""
    name: str


def balanced_choice(shape: Shape, device: torch.device) -> Tensor:
    """Returns the forced choice: experts in turn, so that all get equally many; [tokens, top_k].

    torchtitan's own forced balance makes the same choice.
    """
    assignments = torch.arange(shape.rows, device=device) % shape.experts
    return assignments.view(shape.tokens, shape.top_k)


def model_settings(shape: Shape, *, experts: ExpertsSettings | None = None) -> ModelSettings:
    """Returns a model of one such layer; everything outside the MoE layer doesn't matter."""
    return ModelSettings(
        dim=shape.dim,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        ffn_hidden_dim=shape.hidden,
        num_experts=shape.experts,
        top_k=shape.top_k,
        vocab_size=2,
        max_seq_len=shape.tokens,
        rope_theta=1e4,
        experts=experts or ExpertsSettings(),
    )


@torch.no_grad()
def moetrain(
    shape: Shape, weights: Weights, choice: Tensor | None, *, experts: ExpertsSettings | None = None
) -> Layer:
    """Returns this project's layer; it also computes the router's statistics, as in training."""
    device, dtype = weights.gate.device, weights.gate.dtype
    layer = MoELayer(model_settings(shape, experts=experts)).to(device, dtype)
    layer.router.weight.copy_(weights.router)
    layer.experts.get_parameter("gate").copy_(weights.gate)
    layer.experts.up.copy_(weights.up)
    layer.experts.down.copy_(weights.down)
    if choice is not None:
        layer.router.select = lambda scores: choice
    valid = torch.ones(shape.tokens, dtype=torch.bool, device=device)
    return Layer(
        lambda x: layer(x, valid)[0], list(layer.parameters()), layer.router.weight, "moetrain"
    )


def moetrain_recompute(shape: Shape, weights: Weights, choice: Tensor | None) -> Layer:
    """Returns this project's layer with the intermediate values of the experts recomputed."""
    layer = moetrain(shape, weights, choice, experts=ExpertsSettings(recompute=True))
    return layer._replace(name="moetrain experts.recompute")


def transformers_eager(shape: Shape, weights: Weights, choice: Tensor | None) -> Layer:
    """Returns transformers' Mixtral block with its own loop over the experts."""
    return _transformers(shape, weights, choice, implementation="eager")


def transformers_grouped_mm(shape: Shape, weights: Weights, choice: Tensor | None) -> Layer:
    """Returns transformers' Mixtral block over torch's grouped product."""
    return _transformers(shape, weights, choice, implementation="grouped_mm")


@torch.no_grad()
def _transformers(
    shape: Shape, weights: Weights, choice: Tensor | None, *, implementation: str
) -> Layer:
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral import modeling_mixtral
    except ImportError as error:
        raise Unavailable(f"{error}; it comes with pip install 'moetrain[dev]'") from None
    config = MixtralConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation=implementation,
    )
    assert config._experts_implementation == implementation
    with weights.gate.device:
        block = modeling_mixtral.MixtralSparseMoeBlock(config).to(weights.gate.dtype)
    block.gate.weight.copy_(weights.router)
    block.experts.gate_up_proj.copy_(torch.cat((weights.gate, weights.up), 1))
    block.experts.down_proj.copy_(weights.down.transpose(1, 2))
    if choice is not None:
        router = block.gate

        def forced(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # MixtralTopKRouter's forward, with the choice in place of its topk.
            logits = F.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
            top = logits.float().softmax(-1).gather(1, choice)
            return logits, top / top.sum(-1, keepdim=True), choice

        router.forward = forced
    version = importlib.metadata.version("transformers")
    return Layer(
        lambda x: block(x.unsqueeze(0)).squeeze(0),
        list(block.parameters()),
        block.gate.weight,
        f"transformers {version} {implementation}",
    )


def torchtitan(shape: Shape, weights: Weights, choice: Tensor | None) -> Layer:
    """Returns torchtitan's MoE as it is published: its experts always compute in bfloat16."""
    return _torchtitan(shape, weights, choice, as_published=True)


def torchtitan_float32(shape: Shape, weights: Weights, choice: Tensor | None) -> Layer:
    """Returns torchtitan's MoE without the casts of its experts to bfloat16."""
    if weights.gate.dtype != torch.float32:
        raise Unavailable(f"the same as torchtitan in {weights.gate.dtype}")
    return _torchtitan(shape, weights, choice, as_published=False)


@torch.no_grad()
def _torchtitan(
    shape: Shape, weights: Weights, choice: Tensor | None, *, as_published: bool
) -> Layer:
    moe = import_peer("torchtitan.models.common.moe")
    linear = import_peer("torchtitan.models.common.linear")
    dispatcher = import_peer("torchtitan.models.common.token_dispatcher")
    experts = moe.GroupedExperts.Config(
        dim=shape.dim, hidden_dim=shape.hidden, num_experts=shape.experts
    )
    local = dispatcher.LocalTokenDispatcher.Config(num_experts=shape.experts, top_k=shape.top_k)
    router = moe.TokenChoiceTopKRouter.Config(
        num_experts=shape.experts,
        gate=linear.Linear.Config(in_features=shape.dim, out_features=shape.experts),
        top_k=shape.top_k,
        score_func="softmax",
        route_norm=True,
        _debug_force_load_balance=choice is not None,  # the same as `balanced_choice`
    )
    config = moe.MoE.Config(
        num_experts=shape.experts,
        load_balance_coeff=None,
        routed_experts=moe.RoutedExperts.Config(inner_experts=experts, token_dispatcher=local),
        router=router,
    )
    layer = config.build().to(weights.gate.device, weights.gate.dtype)
    inner = layer.routed_experts.inner_experts
    layer.router.gate.weight.copy_(weights.router)
    inner.w1_EFD.copy_(weights.gate)
    inner.w3_EFD.copy_(weights.up)
    inner.w2_EDF.copy_(weights.down.transpose(1, 2))
    if not as_published:

        def forward(rows: Tensor, counts: Tensor) -> Tensor:
            # GroupedExperts' forward without `.bfloat16()`.
            offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)

            def product(a: Tensor, weight: Tensor) -> Tensor:
                out: Tensor = inner._grouped_mm(A=a, B_t=weight.transpose(-2, -1), offs=offsets)
                return out

            hidden = F.silu(product(rows, inner.w1_EFD)) * product(rows, inner.w3_EFD)
            return product(hidden, inner.w2_EDF)

        inner.forward = forward
    own = "" if as_published else " float32"
    return Layer(
        lambda x: layer(x.unsqueeze(0)).squeeze(0),
        list(layer.parameters()),
        layer.router.gate.weight,
        f"torchtitan {TORCHTITAN}{own}",
    )


def megablocks(shape: Shape, weights: Weights, choice: Tensor | None) -> Layer:
    """Returns MegaBlocks' dMoE, on a GPU with MegaBlocks and its compiled module installed."""
    if weights.gate.device.type != "cuda":
        raise Unavailable("its kernels need a GPU")
    if choice is not None:
        raise Unavailable("its forced balance is a setting of its environment, and another choice")
    try:
        arguments = importlib.import_module("megablocks.layers.arguments")
        dmoe = importlib.import_module("megablocks.layers.dmoe")
        moe = importlib.import_module("megablocks.layers.moe")
    except ImportError as error:
        raise Unavailable(f"MegaBlocks can't be imported: {error}") from None
    has_grouped_gemm = importlib.util.find_spec("grouped_gemm") is not None
    dtype = weights.gate.dtype
    try:
        layer = dmoe.dMoE(
            arguments.Arguments(
                hidden_size=shape.dim,
                ffn_hidden_size=shape.hidden,
                num_layers=1,
                bias=False,
                return_bias=False,
                activation_fn=F.silu,
                moe_num_experts=shape.experts,
                moe_top_k=shape.top_k,
                moe_normalize_expert_weights=1,
                mlp_type="glu",
                mlp_impl="grouped" if has_grouped_gemm else "sparse",
                fp16=dtype == torch.float16,
                bf16=dtype == torch.bfloat16,
                device=weights.gate.device,
            )
        )
    except (ValueError, RuntimeError) as error:
        raise Unavailable(f"MegaBlocks refuses: {error}") from None
    layer = layer.to(weights.gate.device, dtype)
    mlp = layer.experts.mlp
    with torch.no_grad():
        layer.router.layer.weight.copy_(weights.router)
        mlp.w1.copy_(weights.gate.flatten(0, 1))
        mlp.v1.copy_(weights.up.flatten(0, 1))
        mlp.w2.copy_(weights.down.flatten(0, 1))

    def forward(x: Tensor) -> Tensor:
        out: Tensor = layer(x.unsqueeze(1)).squeeze(1)
        moe.clear_load_balancing_loss()  # a list in the module, which would grow without bound
        return out

    version = importlib.metadata.version("megablocks")
    parameters, router = list(layer.parameters()), layer.router.layer.weight
    return Layer(forward, parameters, router, f"megablocks {version} dMoE {layer.args.mlp_impl}")


BUILDERS: dict[str, Callable[[Shape, Weights, Tensor | None], Layer]] = {
    "moetrain": moetrain,
    "moetrain-recompute": moetrain_recompute,
    "transformers-eager": transformers_eager,
    "transformers-grouped_mm": transformers_grouped_mm,
    "torchtitan": torchtitan,
    "torchtitan-float32": torchtitan_float32,
    "megablocks": megablocks,
}


class Limit:
    """The seven matrix products of the experts alone, as one dense chain of the same FLOPs.

    All rows are multiplied with one expert's matrices, every output is preallocated, and there are
    no elementwise operations: with the same FLOPs, only faster products make a layer faster.
    `product` computes them, by default like torch.mm.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        dtype: torch.dtype,
        device: torch.device,
        product: Callable[..., object] = torch.mm,
    ) -> None:
        self.product = product
        rows, dim, hidden = shape.rows, shape.dim, shape.hidden

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device).to(dtype)

        def room(*size: int) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        x, h, dy = normal(rows, dim), normal(rows, hidden), normal(rows, dim)
        d_gate_up = normal(rows, 2 * hidden)
        gate_up, down = normal(2 * hidden, dim), normal(hidden, dim)
        gradient = room(2 * hidden, dim)
        d_gate, d_up = d_gate_up[:, :hidden], d_gate_up[:, hidden:]
        self.products = [
            (x, gate_up.t(), room(rows, 2 * hidden)),  # gate and up
            (h, down, room(rows, dim)),  # y
            (dy, down.t(), room(rows, hidden)),  # dh
            (h.t(), dy, room(hidden, dim)),  # of down
            (d_gate_up, gate_up, room(rows, dim)),  # dx
            (d_gate.t(), x, gradient[:hidden]),  # of gate
            (d_up.t(), x, gradient[hidden:]),  # of up
        ]

    def __call__(self) -> None:
        """Computes the products, in the order of a forward and a backward pass."""
        for a, b, out in self.products:
            self.product(a, b, out=out)
