"""The decoder on one sequence: plain products, a mask of seq × seq, a loop over the experts."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.settings import ModelSettings
from moetrain.verify.reference.weights import Weights, stream

Choose = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, scores [seq, experts], the reference's own choice [seq, top_k]) → choice."""
TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One sequence of a batch."""

    tokens: Tensor
    targets: Tensor
    valid: Tensor
    """Which targets count, as float64."""
    documents: Tensor | None
    """The number of each token's document, [seq]; None: attention crosses their ends."""
    noise_seed: int | None
    """The seed of the sample's jitter; None: no jitter."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Sums over one sequence's valid tokens in one layer."""

    counts: Tensor
    """Assignments of each expert, without a gradient."""
    probabilities: Tensor
    z: Tensor
    entropy: Tensor


def losses(
    weights: Weights, biases: Weights, model: ModelSettings, sequence: Sequence, choose: Choose
) -> tuple[Tensor, Tensor, list[Routed]]:
    """Returns sums over valid tokens: cross-entropy, the head's z, and those of each MoE layer."""
    length = len(sequence.tokens)
    positions, seen = _places(sequence, length)
    rotary = _rotary(model, positions)
    x = weights["embedding.weight"][sequence.tokens]
    routed = []
    for layer in range(model.num_layers):
        at = f"layers.{layer}"
        y = _rms_norm(x, weights[f"{at}.attention_norm.weight"], model.norm_eps)
        x = x + _attention(weights, f"{at}.attention", model, y, rotary, seen)
        y = _rms_norm(x, weights[f"{at}.feed_forward_norm.weight"], model.norm_eps)
        at += ".feed_forward"
        moe_layer = layer - (model.num_layers - model.num_moe_layers)
        if moe_layer < 0:
            x = x + _dense(weights, at, y)
            continue
        seed = sequence.noise_seed
        z, sums = _mixture(
            *(weights, biases[f"{at}.router.bias"], at, model, y, sequence.valid),
            noise_seed=None if seed is None else stream(seed, "jitter", moe_layer),
            choose=lambda scores, own, layer=layer: choose(layer, scores, own),  # type: ignore[misc]
        )
        x = x + z
        routed.append(sums)
    x = _rms_norm(x, weights["norm.weight"], model.norm_eps)
    head = weights["embedding.weight" if model.tie_embeddings else "head.weight"]
    logits = x @ head.T
    if model.logit_soft_cap is not None:
        logits = model.logit_soft_cap * (logits / model.logit_soft_cap).tanh()
    target = logits.gather(1, sequence.targets[:, None])[:, 0]
    normaliser = logits.logsumexp(1)
    cross_entropy = (sequence.valid * (normaliser - target)).sum()
    return cross_entropy, (sequence.valid * normaliser**2).sum(), routed


def _places(sequence: Sequence, length: int) -> tuple[Tensor, Tensor]:
    """Returns each token's position, from 0 in its document, and whom it attends to [seq, seq]."""
    places = torch.arange(length)
    seen = places[None, :] <= places[:, None]
    if sequence.documents is None:
        return places, seen
    same = sequence.documents[None, :] == sequence.documents[:, None]
    first = torch.stack([places[row].min() for row in same])
    return places - first, seen & same


def _rotary(model: ModelSettings, positions: Tensor) -> tuple[Tensor, Tensor]:
    # The angles are float32 by definition, as in transformers: at position 4096 the rounding of an
    # angle is more than the float32 sums lose.
    rotated = int(model.head_dim * model.partial_rotary_factor)
    pairs = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    frequencies = _scaled(1.0 / model.rope_theta**pairs, model)
    angles = (positions.float()[:, None] * frequencies).double()
    scale = 1.0
    if model.rope_scaling.type == "yarn":
        default = 0.1 * math.log(model.rope_scaling.factor) + 1
        scale = model.rope_scaling.attention_factor or default
    return angles.cos() * scale, angles.sin() * scale  # [seq, rotated / 2]


def _scaled(frequencies: Tensor, model: ModelSettings) -> Tensor:
    """Returns the frequencies of rotary positions, scaled one by one."""
    scaling = model.rope_scaling
    if scaling.type == "none":
        return frequencies
    length, scaled = float(scaling.original_max_seq_len or 0), []
    ends = [
        len(frequencies) * math.log(length / (2 * math.pi * turns)) / math.log(model.rope_theta)
        for turns in ((scaling.beta_fast, scaling.beta_slow) if scaling.type == "yarn" else ())
    ]
    for index, frequency in enumerate(frequencies.tolist()):
        kept = 0.0  # linear: all are divided
        if scaling.type == "llama3":
            turns = length * frequency / (2 * math.pi)
            kept = (turns - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
        elif scaling.type == "yarn":
            first = max(0, math.floor(ends[0]))
            last = min(2 * len(frequencies) - 1, math.ceil(ends[1]))
            kept = 1 - (index - first) / max(0.001, last - first)
        kept = min(1.0, max(0.0, kept))
        scaled.append(kept * frequency + (1 - kept) * frequency / scaling.factor)
    return torch.tensor(scaled)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + rotated / 2) of [heads, seq, head_dim]; the rest stays."""
    cos, sin = rotary
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _attention(
    weights: Weights,
    at: str,
    model: ModelSettings,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    seen: Tensor,
) -> Tensor:
    def heads(name: str, number: int) -> Tensor:
        y = x @ weights[f"{at}.{name}_proj.weight"].T
        if model.attention_bias:
            y = y + weights[f"{at}.{name}_proj.bias"]
        has_norm, whole = model.qk_norm and name != "v", model.qk_norm_scope == "whole"
        if has_norm and whole:
            y = _rms_norm(y, weights[f"{at}.{name}_norm.weight"], model.norm_eps)
        y = y.view(len(x), number, model.head_dim).transpose(0, 1)  # [heads, seq, head_dim]
        if has_norm and not whole:
            y = _rms_norm(y, weights[f"{at}.{name}_norm.weight"], model.norm_eps)
        if model.clip_qkv is not None:
            y = torch.where(y.abs() > model.clip_qkv, y.sign() * model.clip_qkv, y)
        return y

    q = _rotate(heads("q", model.num_heads), rotary)
    k = _rotate(heads("k", model.num_kv_heads), rotary)
    v = heads("v", model.num_kv_heads)
    out = []
    for head in range(model.num_heads):
        group = head * model.num_kv_heads // model.num_heads
        scores = q[head] @ k[group].T / math.sqrt(model.head_dim)
        out.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[group])
    y = torch.cat(out, 1) @ weights[f"{at}.o_proj.weight"].T
    return y + weights[f"{at}.o_proj.bias"] if model.attention_output_bias else y


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """All matrices [hidden, dim]."""
    g = x @ gate.T
    return (g * g.sigmoid() * (x @ up.T)) @ down


def _dense(weights: Weights, at: str, x: Tensor) -> Tensor:
    gate, up, down = (weights[f"{at}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return _swiglu(x, gate, up, down.T)


def _mixture(
    weights: Weights,
    bias: Tensor,
    at: str,
    model: ModelSettings,
    x: Tensor,
    valid: Tensor,
    *,
    noise_seed: int | None,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Routed]:
    router = model.router
    seen = x
    if noise_seed is not None:
        generator = torch.Generator().manual_seed(noise_seed)
        factors = torch.empty(x.shape, dtype=torch.float32)
        factors.uniform_(1 - router.jitter_noise, 1 + router.jitter_noise, generator=generator)
        seen = x * factors.double()
    logits = seen @ weights[f"{at}.router.weight"].T  # [seq, experts]
    if router.score_function == "softmax":
        scores = probabilities = logits.softmax(1)
        selection = logits if not bias.any() else scores + bias
    else:
        scores = logits.sigmoid()
        probabilities = scores / (scores.sum(1, keepdim=True) + TINY)
        selection = scores + bias
    selection = selection.detach()
    chosen = choose(selection, _best(selection, model))  # [seq, top_k]
    gates = scores.gather(1, chosen)
    if router.normalize_gates:
        gates = gates / (gates.sum(1, keepdim=True) + TINY)
    gates = gates * router.routed_scaling_factor
    y = torch.zeros_like(x)
    for expert in range(model.num_experts):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        matrices = (weights[f"{at}.experts.{part}"][expert] for part in ("gate", "up", "down"))
        part = _swiglu(x[token], *matrices) * gates[token, slot][:, None]
        y = y.index_add(0, token, part)
    if model.num_shared_experts:
        y = y + _dense(weights, f"{at}.shared_experts", x)
    counts = torch.zeros(model.num_experts, dtype=torch.float64)
    for choice in chosen.T:
        counts = counts.index_add(0, choice, valid)
    with torch.no_grad():
        entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(1)
    return y, Routed(
        counts=counts,
        probabilities=valid @ probabilities,
        z=valid @ logits.logsumexp(1).square(),
        entropy=valid @ entropy,
    )


def _best(scores: Tensor, model: ModelSettings) -> Tensor:
    """Returns the top k of the experts in each token's best groups."""
    groups, size = model.router.num_groups, model.num_experts // model.router.num_groups
    if groups == 1:
        return scores.topk(model.top_k).indices
    # DeepSeek-V2 (softmax): a group's best expert; V3 (sigmoid): the sum of its two best.
    taken = 1 if model.router.score_function == "softmax" else min(2, size)
    allowed = torch.full_like(scores, -math.inf)
    for token, row in enumerate(scores.view(len(scores), groups, size)):
        of_group = row.sort(1, descending=True).values[:, :taken].sum(1)
        for group in of_group.topk(model.router.top_groups).indices.tolist():
            part = slice(group * size, (group + 1) * size)
            allowed[token, part] = scores[token, part]
    return allowed.topk(model.top_k).indices
