"""Where each matrix of a model is in a Hugging Face folder: names, shapes and orientation.

Owns the mapping for Mixtral (each expert by itself, as published, or fused, as transformers 5 has
it in memory) and for Mistral. Reads and writes nothing.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from moetrain.model import Transformer
from moetrain.settings import ModelSettings

Index = tuple[slice, ...]
Shape = tuple[int, ...]

WHOLE: Index = ()
"""The index of a whole tensor."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class ConversionError(Exception):
    """A folder or a checkpoint that can't be converted; the message names what is wrong in it."""


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """One tensor, or one expert's matrix of a stack, in a checkpoint of ours and in theirs."""

    ours: str
    ours_index: Index = WHOLE
    """Which part of the tensor it is; of a stack of experts, one expert."""
    theirs: str
    theirs_shape: Shape
    """Of the whole tensor."""
    theirs_index: Index = WHOLE
    transposed: bool = False
    """Whether theirs is [columns, rows] of ours."""


def places(
    settings: ModelSettings, *, fused: bool = False, tied: bool = False
) -> Iterator[TensorPlace]:
    """Yields every place of a model, first layer to last.

    `fused`: an expert's gate and up projections are the halves of one matrix, and the experts of a
    layer one tensor. `tied`: the head is the embedding.
    """
    embedding = (settings.vocab_size, settings.dim)
    yield _whole("embedding.weight", "model.embed_tokens.weight", embedding)
    for layer in range(settings.num_layers):
        yield from _layer(settings, layer, fused=fused)
    yield _whole("norm.weight", "model.norm.weight", (settings.dim,))
    yield _whole("head.weight", EMBEDDING if tied else HEAD, embedding)


def model_tensors(settings: ModelSettings) -> dict[str, Shape]:
    """Returns name and shape of every tensor that a checkpoint holds of a model."""
    with torch.device("meta"):
        model = Transformer(settings)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {f"model.{name}": tuple(tensor.shape) for name, tensor in named}


def is_selection_bias(name: str) -> bool:
    """Whether a tensor of ours is a router's selection bias, which theirs have not."""
    return name.endswith(".router.bias")


def require_complete(placed: Iterable[TensorPlace], tensors: Mapping[str, Shape]) -> None:
    """Raises ConversionError unless every tensor of ours has its place, without gaps.

    A selection bias has none, and a place has a tensor.
    """
    left = {n: math.prod(shape) for n, shape in tensors.items() if not is_selection_bias(n)}
    seen = set()
    for place in placed:
        part = (place.ours, str(place.ours_index))
        if place.ours not in left or part in seen:
            why = "comes twice" if part in seen else "is not in the checkpoint"
            raise ConversionError(f"{place.ours} {why}, and {place.theirs} is made of it")
        seen.add(part)
        left[place.ours] -= math.prod(part_shape(place, tensors[place.ours]))
    if over := sorted(name for name, count in left.items() if count):
        raise ConversionError(f"{over[0]} has no place in a Hugging Face model{_others(over)}")


def part_shape(place: TensorPlace, shape: Shape) -> Shape:
    """Returns the shape of a place's part of a tensor of ours."""
    cut = [len(range(size)[index]) for size, index in zip(shape, place.ours_index, strict=False)]
    return (*cut, *shape[len(cut) :])


def _others(names: list[str]) -> str:
    return f", nor have {len(names) - 1} others" if len(names) > 1 else ""


def _layer(settings: ModelSettings, layer: int, *, fused: bool) -> Iterator[TensorPlace]:
    ours, theirs, dim = f"layers.{layer}", f"model.layers.{layer}", settings.dim
    queries = settings.num_heads * settings.head_dim
    keys = settings.num_kv_heads * settings.head_dim
    yield _whole(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", (dim,))
    for name, shape in {
        "q_proj": (queries, dim),
        "k_proj": (keys, dim),
        "v_proj": (keys, dim),
        "o_proj": (dim, queries),
    }.items():
        yield _whole(f"{ours}.attention.{name}.weight", f"{theirs}.self_attn.{name}.weight", shape)
    norm = f"{theirs}.post_attention_layernorm.weight"
    yield _whole(f"{ours}.feed_forward_norm.weight", norm, (dim,))
    hidden, experts = settings.ffn_hidden_dim, settings.num_experts
    ours = f"{ours}.feed_forward"
    if not settings.is_moe:
        for name, shape in {
            "gate_proj": (hidden, dim),
            "up_proj": (hidden, dim),
            "down_proj": (dim, hidden),
        }.items():
            yield _whole(f"{ours}.{name}.weight", f"{theirs}.mlp.{name}.weight", shape)
        return
    theirs = f"{theirs}.mlp" if fused else f"{theirs}.block_sparse_moe"
    yield _whole(f"{ours}.router.weight", f"{theirs}.gate.weight", (experts, dim))
    for expert in range(experts):
        one = slice(expert, expert + 1)
        for matrix, published, half in (
            ("gate", "w1", slice(0, hidden)),
            ("down", "w2", None),
            ("up", "w3", slice(hidden, 2 * hidden)),
        ):
            name, index = f"{expert}.{published}.weight", WHOLE
            whole: Shape = (dim, hidden) if half is None else (hidden, dim)
            if fused and half is None:
                name, index, whole = "down_proj", (one,), (experts, *whole)
            elif fused and half:
                name, index, whole = "gate_up_proj", (one, half), (experts, 2 * hidden, dim)
            yield TensorPlace(
                ours=f"model.{ours}.experts.{matrix}",
                ours_index=(one,),
                theirs=f"{theirs}.experts.{name}",
                theirs_shape=whole,
                theirs_index=index,
                transposed=half is None,
            )


def _whole(ours: str, theirs: str, shape: Shape) -> TensorPlace:
    return TensorPlace(ours=f"model.{ours}", theirs=theirs, theirs_shape=shape)
