"""The training losses, as sums over tokens, so that no layout changes their scale.

A rank adds up its own tokens' part of each loss and divides by *global* counts; the sum over
ranks and micro-batches is then the loss of the global batch, exactly, however it was split.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy that computes gradients along with the logits, a chunk of tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        valid: Tensor,
        chunk: int,
        soft_cap: float | None,
        with_grad: bool,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if with_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
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
            total += torch.where(mask, nll, 0.0).sum()
            if grad_hidden is None or grad_head is None:
                continue
            grad = logits.sub_(normaliser).exp_()
            grad.scatter_add_(1, target, torch.full_like(nll, -1.0))
            if tanh is not None:
                grad.mul_(tanh.square_().neg_().add_(1.0))
                tanh = None  # its memory is used again
            grad = torch.where(mask, grad, 0.0).to(hidden.dtype)
            torch.mm(grad, head, out=grad_hidden[part])
            grad_head += grad.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        head = (grad_head * grad).to(ctx.head_dtype)
        return grad_hidden * grad, head, None, None, None, None, None


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
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, head, targets, valid, chunk_size, soft_cap, with_grad)  # type: ignore[no-any-return, no-untyped-call]


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
