"""Where each tensor of a model is in a Hugging Face folder: names, shapes and orientation.

Owns the mapping for each class of `families.py`, with each expert by itself, as published, or the
experts of a layer fused, as transformers 5 has them in memory. Reads and writes nothing.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from moetrain.huggingface.families import Family, family_of
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
    """Empty where only theirs has it, and its numbers are all 0."""
    ours_index: Index = WHOLE
    """Which part of the tensor it is; of a stack of experts, one expert."""
    theirs: str
    theirs_shape: Shape
    """Of the whole tensor."""
    theirs_index: Index = WHOLE
    transposed: bool = False
    """Whether theirs is [columns, rows] of ours."""
    factor: float = 1.0
    """Theirs is ours times this power of two, so that no bit is lost."""
    routes: bool = False
    """Whether it decides which experts are chosen, so that no bit may be lost."""


def places(
    settings: ModelSettings, family: Family | None = None, *, fused: bool = False
) -> Iterator[TensorPlace]:
    """Yields every place of a model in a family (none given: its own), first layer to last.

    `fused`: an expert's gate and up projections are the halves of one matrix, and the experts of a
    layer one tensor. Raises ConfigError for a model that no family computes.
    """
    family = family or family_of(settings)
    embedding = (settings.vocab_size, settings.dim)
    yield _whole("embedding.weight", EMBEDDING, embedding)
    for layer in range(settings.num_layers):
        yield from _attention(settings, layer)
        yield from _feed_forward(settings, layer, family, fused=fused)
    yield _whole("norm.weight", "model.norm.weight", (settings.dim,))
    if not settings.tie_embeddings:
        yield _whole("head.weight", HEAD, embedding)


def model_tensors(settings: ModelSettings) -> dict[str, Shape]:
    """Returns name and shape of every tensor that a checkpoint holds of a model."""
    with torch.device("meta"):
        model = Transformer(settings)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {f"model.{name}": tuple(tensor.shape) for name, tensor in named}


def is_selection_bias(name: str) -> bool:
    """Whether a tensor of ours is a router's selection bias, which few of theirs have."""
    return name.endswith(".router.bias")


def require_complete(placed: Iterable[TensorPlace], tensors: Mapping[str, Shape]) -> None:
    """Raises ConversionError unless every tensor of ours has its place, without gaps.

    A selection bias may have none, and a place has a tensor.
    """
    placed = [place for place in placed if place.ours]
    with_bias = any(is_selection_bias(place.ours) for place in placed)
    left = {
        n: math.prod(shape) for n, shape in tensors.items() if with_bias or not is_selection_bias(n)
    }
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


def _attention(settings: ModelSettings, layer: int) -> Iterator[TensorPlace]:
    """Yields a layer's norms and its attention, which all families name alike."""
    ours, theirs, dim = f"layers.{layer}", f"model.layers.{layer}", settings.dim
    queries = settings.num_heads * settings.head_dim
    keys = settings.num_kv_heads * settings.head_dim
    yield _whole(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", (dim,))
    norm = f"{theirs}.post_attention_layernorm.weight"
    yield _whole(f"{ours}.feed_forward_norm.weight", norm, (dim,))
    ours, theirs = f"{ours}.attention", f"{theirs}.self_attn"
    shapes: dict[str, Shape] = {
        "q_proj.weight": (queries, dim),
        "k_proj.weight": (keys, dim),
        "v_proj.weight": (keys, dim),
        "o_proj.weight": (dim, queries),
    }
    if settings.attention_bias:
        shapes |= {"q_proj.bias": (queries,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)}
    if settings.attention_output_bias:
        shapes["o_proj.bias"] = (dim,)
    if settings.qk_norm:
        per_head = settings.qk_norm_scope == "head"
        shapes["q_norm.weight"] = (settings.head_dim if per_head else queries,)
        shapes["k_norm.weight"] = (settings.head_dim if per_head else keys,)
    for name, shape in shapes.items():
        yield _whole(f"{ours}.{name}", f"{theirs}.{name}", shape)


def _feed_forward(
    settings: ModelSettings, layer: int, family: Family, *, fused: bool
) -> Iterator[TensorPlace]:
    ours, theirs = f"layers.{layer}.feed_forward", f"model.layers.{layer}"
    hidden = settings.dense_hidden_dim(layer)
    if hidden is not None:
        yield from _dense(ours, f"{theirs}.mlp", hidden, settings.dim)
        return
    theirs = f"{theirs}.mlp" if fused else f"{theirs}.{family.published_layer}"
    experts, dim = settings.num_experts, settings.dim
    router = _whole(f"{ours}.router.weight", f"{theirs}.gate.weight", (experts, dim))
    yield replace(router, routes=True)
    if family.has_selection_bias:
        bias = f"{theirs}.gate.e_score_correction_bias"
        yield replace(_whole(f"{ours}.router.bias", bias, (experts,)), routes=True)
    yield from _experts(settings, f"model.{ours}.experts", f"{theirs}.experts", family, fused=fused)
    if not family.shared_experts:
        return
    # Without shared experts these are empty: transformers makes a layer without a dimension.
    hidden = settings.num_shared_experts * settings.ffn_hidden_dim
    shared = f"{theirs}.{family.shared_experts}"
    if hidden:
        # A gate of zeros halves the output, which the doubled down projection makes up for.
        factor = 2.0 if family.gates_shared_experts else 1.0
        yield from _dense(f"{ours}.shared_experts", shared, hidden, dim, factor=factor)
    else:
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (dim, 0) if name == "down_proj" else (0, dim)
            yield TensorPlace(ours="", theirs=f"{shared}.{name}.weight", theirs_shape=shape)
    if family.gates_shared_experts:
        yield TensorPlace(ours="", theirs=f"{shared}_gate.weight", theirs_shape=(1, dim))


def _dense(
    ours: str, theirs: str, hidden: int, dim: int, *, factor: float = 1.0
) -> Iterator[TensorPlace]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        shape = (dim, hidden) if name == "down_proj" else (hidden, dim)
        place = _whole(f"{ours}.{name}.weight", f"{theirs}.{name}.weight", shape)
        yield replace(place, factor=factor if name == "down_proj" else 1.0)


def _experts(
    settings: ModelSettings, ours: str, theirs: str, family: Family, *, fused: bool
) -> Iterator[TensorPlace]:
    hidden, dim, experts = settings.ffn_hidden_dim, settings.dim, settings.num_experts
    halves = (slice(0, hidden), slice(hidden, 2 * hidden), None)
    for expert in range(experts):
        one = slice(expert, expert + 1)
        for matrix, published, half in zip(
            ("gate", "up", "down"), family.expert_names, halves, strict=True
        ):
            name, index = f"{expert}.{published}.weight", WHOLE
            whole: Shape = (dim, hidden) if half is None else (hidden, dim)
            if fused and half is None:
                name, index, whole = "down_proj", (one,), (experts, *whole)
            elif fused and half:
                name, index, whole = "gate_up_proj", (one, half), (experts, 2 * hidden, dim)
            yield TensorPlace(
                ours=f"{ours}.{matrix}",
                ours_index=(one,),
                theirs=f"{theirs}.{name}",
                theirs_shape=whole,
                theirs_index=index,
                transposed=half is None,
            )


def _whole(ours: str, theirs: str, shape: Shape) -> TensorPlace:
    return TensorPlace(ours=f"model.{ours}", theirs=theirs, theirs_shape=shape)
