"""Which of torch's fused attention kernels computes on a GPU, and that one of them does.

On Hopper torch's own choice is FlashAttention-2, at half the speed of cuDNN's kernel or
FlashAttention-3. On a CPU there is one kernel and nothing to choose.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moetrain.kernels.known_answer import largest_error, wrong_because

HALF = (torch.bfloat16, torch.float16)
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,  # once it is in FlashAttention-2's place
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def fused_attention(
    q: Float[Tensor, "batch heads length head_dim"],
    k: Float[Tensor, "batch kv_heads length head_dim"],
    v: Float[Tensor, "batch kv_heads length head_dim"],
    *,
    kernel: str | None = None,
) -> Float[Tensor, "batch heads length head_dim"]:
    """Returns causal attention, by `kernel` where it serves the shape.

    It never holds the scores of a whole sequence: raises ValueError where no fused kernel of a GPU
    serves the shape.
    """
    grouped = k.shape[1] != q.shape[1]
    if grouped and not (q.is_cuda and q.dtype in HALF):
        # Neither a CPU's kernel nor a GPU's for float32 has grouped queries: with enable_gqa torch
        # would take the unfused one and its full score matrix.
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        grouped = False
    compute = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=grouped)
    if not q.is_cuda:
        return compute()
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    preferred = [] if kernel is None else [KERNELS[kernel]]
    order = list(dict.fromkeys([*preferred, *others, SDPBackend.EFFICIENT_ATTENTION]))
    try:
        with sdpa_kernel(order, set_priority=True):
            return compute()
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        dtype, gpu = str(q.dtype).removeprefix("torch."), torch.cuda.get_device_name(q.device)
        raise ValueError(
            f"no fused attention of torch serves {dtype} with head_dim={q.shape[-1]} on {gpu}, and "
            "the unfused one holds the scores of whole sequences: use another model.head_dim or "
            "train.dtype"
        ) from error


def attention_choices(
    capability: tuple[int, int], dtype: torch.dtype, *, by_document: bool, has_flash3: bool
) -> list[str]:
    """Returns the kernels that may be the fastest on a GPU; the first is torch's own choice.

    `by_document`: whether attention stops at the ends of documents, for which cuDNN has no kernel.
    """
    if dtype not in HALF:
        return ["efficient"]
    names = ["flash"]
    if capability >= (9, 0) and not by_document:
        names.append("cudnn")
    if capability == (9, 0) and has_flash3:
        names.append("flash3")
    return names


def has_flash3() -> bool:
    """Returns whether FlashAttention-3 is installed, and torch can put it in its own's place."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False
    return "FA3" in getattr(torch.nn.attention, "list_flash_attention_impls", list)()


def use_flash3(wanted: bool) -> None:
    """Puts FlashAttention-3 in the place of torch's FlashAttention-2 in this process, or back."""
    if wanted:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    elif has_flash3():
        torch.nn.attention.restore_flash_attention_impl()


def attention_pass(
    kernel: str,
    *,
    shape: tuple[int, int, int],
    kv_heads: int,
    head_dim: int,
    rounded: torch.dtype,
    **like: Any,
) -> Callable[[], list[Tensor]]:
    """Returns a forward and backward pass of a kernel: output and gradients of q, k and v.

    `shape` is (batch, heads, length); values are `rounded` to a dtype, and then `like` a device
    and dtype.
    """
    batch, heads, length = shape
    generator = torch.Generator().manual_seed(0)

    def random(num_heads: int) -> Tensor:
        values = torch.randn(batch, num_heads, length, head_dim, generator=generator)
        return values.to(rounded).to(**like).requires_grad_()

    inputs = [random(heads), random(kv_heads), random(kv_heads)]

    def run() -> list[Tensor]:
        use_flash3(kernel == "flash3")
        with torch.enable_grad():
            out = fused_attention(*inputs, kernel=kernel)
            return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    return run


def attention_is_wrong(
    kernel: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """Returns how a kernel differs from the CPU's float64, or fails; None where it is right."""
    small: dict[str, Any] = {"shape": (2, heads, 64), "kv_heads": kv_heads, "head_dim": head_dim}
    small["rounded"] = dtype
    exact = attention_pass("flash", **small, device="cpu", dtype=torch.float64)()
    try:
        ours = attention_pass(kernel, **small, device=device, dtype=dtype)()
    except Exception as raised:  # a kernel may raise anything
        return f"{type(raised).__name__}: {raised}"
    # Each of the five products from an input to a gradient sums in float32 and rounds to dtype.
    eps = torch.finfo(torch.float32).eps
    tolerance = 5 * (torch.finfo(dtype).eps + eps * math.sqrt(64 * head_dim))
    return wrong_because(largest_error(ours, exact), tolerance)
