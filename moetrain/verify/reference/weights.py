"""The initial weights by the rule of docs/architecture.md: each is drawn from a seed of its name.

The numbers are float32, as the run's: what the reference adds in float64 starts from equal bits.
"""

import hashlib
import math

import torch
from torch import Tensor

from moetrain.settings import ModelSettings

Weights = dict[str, Tensor]


def stream(seed: int, *names: object) -> int:
    """Returns the 63-bit seed of a random stream: of the SHA-256 of its path."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") // 2


def initial_weights(model: ModelSettings, seed: int) -> Weights:
    """Returns all parameters in float64, of their float32 values."""
    weights = {}
    for name, shape in _shapes(model).items():
        if len(shape) == 1:
            start = 0.0 if name.endswith(".bias") else 1.0
            weights[name] = torch.full(shape, start, dtype=torch.float64)
        elif len(shape) == 3:
            experts = [
                _drawn(model, name, shape[1:], stream(seed, name, expert))
                for expert in range(shape[0])
            ]
            weights[name] = torch.stack(experts)
        else:
            weights[name] = _drawn(model, name, shape, stream(seed, name, None))
    return weights


def zero_biases(model: ModelSettings) -> Weights:
    """Returns the selection biases of the layers with a router."""
    first = model.num_layers - model.num_moe_layers
    return {
        f"layers.{layer}.feed_forward.router.bias": torch.zeros(
            model.num_experts, dtype=torch.float64
        )
        for layer in range(first, model.num_layers)
    }


def _drawn(model: ModelSettings, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal of std 1 / sqrt(dim), cut at three of them, or of what `model.init` says; what writes
    into the residual stream is divided by sqrt(2 · layers), because so many of them add up."""
    init, std = model.init, 1 / math.sqrt(model.dim)
    for ours in (
        init.std,
        init.embedding_std if name == "embedding.weight" else None,
        init.head_std if name == "head.weight" else None,
        init.router_std if name.endswith(".router.weight") else None,
    ):
        std = std if ours is None else ours
    if name.endswith(("attention.o_proj.weight", "down_proj.weight", "experts.down")):
        layer = int(name.removeprefix("layers.").partition(".")[0])
        factors = {"depth": 2 * model.num_layers, "layer": 2 * (1 + layer), "none": 1}
        std = std / math.sqrt(factors[init.residual_scale])
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(shape)
    if init.truncate_at is None:
        torch.nn.init.normal_(values, std=std, generator=generator)
    else:
        cut = init.truncate_at * std
        torch.nn.init.trunc_normal_(values, std=std, a=-cut, b=cut, generator=generator)
    return values.double()


def _shapes(model: ModelSettings) -> dict[str, tuple[int, ...]]:
    dim, hidden = model.dim, model.ffn_hidden_dim
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (model.vocab_size, dim)}
    for layer in range(model.num_layers):
        at = f"layers.{layer}"
        shapes |= {
            f"{at}.attention_norm.weight": (dim,),
            f"{at}.attention.q_proj.weight": (queries, dim),
            f"{at}.attention.k_proj.weight": (keys, dim),
            f"{at}.attention.v_proj.weight": (keys, dim),
            f"{at}.attention.o_proj.weight": (dim, queries),
            f"{at}.feed_forward_norm.weight": (dim,),
        }
        if model.attention_bias:
            shapes[f"{at}.attention.q_proj.bias"] = (queries,)
            shapes[f"{at}.attention.k_proj.bias"] = (keys,)
            shapes[f"{at}.attention.v_proj.bias"] = (keys,)
        if model.attention_output_bias:
            shapes[f"{at}.attention.o_proj.bias"] = (dim,)
        if model.qk_norm:
            each = model.qk_norm_scope == "head"
            shapes[f"{at}.attention.q_norm.weight"] = (model.head_dim if each else queries,)
            shapes[f"{at}.attention.k_norm.weight"] = (model.head_dim if each else keys,)
        at += ".feed_forward"
        if layer < model.num_layers - model.num_moe_layers:
            wide = model.dense_ffn_hidden_dim if model.num_experts > 1 else hidden
            assert wide is not None, "config.check demands it"
            shapes |= _dense(at, dim, wide)
            continue
        shapes[f"{at}.router.weight"] = (model.num_experts, dim)
        for part in ("gate", "up", "down"):
            shapes[f"{at}.experts.{part}"] = (model.num_experts, hidden, dim)
        if model.num_shared_experts:
            shapes |= _dense(f"{at}.shared_experts", dim, model.num_shared_experts * hidden)
    if not model.tie_embeddings:
        shapes["head.weight"] = (model.vocab_size, dim)
    return shapes | {"norm.weight": (dim,)}


def _dense(at: str, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}.gate_proj.weight": (hidden, dim),
        f"{at}.up_proj.weight": (hidden, dim),
        f"{at}.down_proj.weight": (dim, hidden),
    }
