"""The training losses, as sums over tokens, so that no layout changes their scale.

A rank adds up its own tokens' part of each loss and divides by *global* counts; the sum over
ranks and micro-batches is then the loss of the global batch, exactly, however it was split.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class HeadLosses(NamedTuple):
    """The losses of the head, sums over valid tokens; each []."""

    total: Tensor
    """Cross-entropy and weighted z-loss: only this has a gradient."""
    cross_entropy: Tensor
    """-log p(target), in nats."""
    z: Tensor
    """Squared log-sum-exp of the logits; 0 without a weight."""
    by_token: Tensor
    """-log p(target) of each token, 0 where it isn't valid; [tokens], without a gradient."""


class _ChunkedLosses(torch.autograd.Function):
    """Losses that compute gradients along with the logits, a chunk of tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        valid: Tensor,
        chunk: int,
        soft_cap: float | None,
        z_weight: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        trained = with_grad and ctx.needs_input_grad[1]
        grad_head = torch.zeros_like(head, dtype=torch.float32) if trained else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        z = torch.zeros_like(total)
        by_token = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ head.t()).float()  # [chunk, vocab]
            tanh = None
            if soft_cap is not None:
                tanh = logits.div_(soft_cap).tanh_()
                logits = tanh * soft_cap
            target, mask = targets[part].unsqueeze(1), valid[part].unsqueeze(1)
            normaliser = torch.logsumexp(logits, -1, keepdim=True)
            nll = normaliser - logits.gather(1, target)
            counted = torch.where(mask, nll, 0.0)
            total += counted.sum()
            by_token[part] = counted.squeeze(1)
            if z_weight:
                z += torch.where(mask, normaliser.square(), 0.0).sum()
            if grad_hidden is None:
                continue
            grad = logits.sub_(normaliser).exp_()
            if z_weight:
                grad.mul_(1.0 + 2.0 * z_weight * normaliser)
            grad.scatter_add_(1, target, torch.full_like(nll, -1.0))
            if tanh is not None:
                grad.mul_(tanh.square_().neg_().add_(1.0))
                tanh = None  # its memory is used again
            grad = torch.where(mask, grad, 0.0).to(hidden.dtype)
            torch.mm(grad, head, out=grad_hidden[part])
            if grad_head is not None:
                grad_head += grad.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(by_token)
        return (total + z_weight * z if z_weight else total), total.clone(), z, by_token

    @staticmethod
    def backward(
        ctx: Any,
        grad: Tensor | None,
        of_cross_entropy: Tensor | None,
        of_z: Tensor | None,
        of_tokens: None,
    ) -> tuple[Tensor | None, ...]:
        if grad is None or of_cross_entropy is not None or of_z is not None:
            raise RuntimeError(
                "with model.head_z_loss_weight only the sum of cross-entropy and z-loss has a "
                "gradient: an objective minimises output.token_loss, not output.cross_entropy"
            )
        grad_hidden, grad_head = ctx.saved_tensors
        head = None if grad_head is None else (grad_head * grad).to(ctx.head_dtype)
        return grad_hidden * grad, head, None, None, None, None, None, None


def chunked_cross_entropy(
    hidden: Float[Tensor, "tokens dim"],
    head: Float[Tensor, "vocab dim"],
    targets: Int64[Tensor, " tokens"],
    valid: Bool[Tensor, " tokens"],
    *,
    chunk_size: int,
    soft_cap: float | None = None,
) -> Float[Tensor, ""]:
    """Returns the sum over valid tokens of -log p(target), in nats; `soft_capped` logits decide.

    Only the logits of `chunk_size` tokens are in memory at once; the gradients are computed in the
    same pass, so that nothing is computed twice.
    """
    return chunked_losses(
        hidden, head, targets, valid, chunk_size=chunk_size, soft_cap=soft_cap, z_weight=0.0
    ).total


def chunked_losses(
    hidden: Float[Tensor, "tokens dim"],
    head: Float[Tensor, "vocab dim"],
    targets: Int64[Tensor, " tokens"],
    valid: Bool[Tensor, " tokens"],
    *,
    chunk_size: int,
    soft_cap: float | None,
    z_weight: float,
) -> HeadLosses:
    """Returns cross-entropy and z-loss (arXiv 2204.02311, section 5), as `chunked_cross_entropy`.

    `z_weight` multiplies the z-loss in the total.
    """
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    return HeadLosses(
        *_ChunkedLosses.apply(
            hidden, head, targets, valid, chunk_size, soft_cap, z_weight, with_grad
        )  # type: ignore[no-untyped-call]
    )


def soft_capped(
    logits: Float[Tensor, "*batch vocab"], cap: float | None
) -> Float[Tensor, "*batch vocab"]:
    """Returns cap · tanh(logits / cap), between ± cap (Gemma 2, arXiv 2408.00118, section 2)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def load_balance_loss(
    counts: Int64[Tensor, "layers experts"],
    probability_sums: Float[Tensor, "layers experts"],
    *,
    top_k: int,
    counted_tokens: Tensor | float | int,
    num_tokens: Tensor | float | int,
) -> Float[Tensor, " layers"]:
    """Returns each layer's balance loss (arXiv 2101.03961, equations 4-6): 1 when balanced.

    `num_experts * sum_e f_e * P_e`, with `f_e` the share of token–expert assignments that expert e
    got among `counted_tokens` tokens, and `P_e` its router probability, summed here and divided by
    `num_tokens`. With both global, the parts of all ranks add up to the global batch's loss.
    """
    shares = counts / (counted_tokens * top_k)
    return counts.shape[1] * (shares * probability_sums).sum(1) / num_tokens
