"""Which attention kernels a GPU may take, and that a wrong one is seen."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels.attention import attention_choices, attention_is_wrong, fused_attention

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "dtype", "by_document", "has_flash3", "names"),
    [
        ((8, 0), BF16, False, False, ["flash"]),
        ((9, 0), BF16, False, False, ["flash", "cudnn"]),
        ((9, 0), BF16, False, True, ["flash", "cudnn", "flash3"]),
        ((9, 0), BF16, True, True, ["flash", "flash3"]),
        ((8, 0), BF16, False, True, ["flash"]),
        ((10, 0), BF16, False, True, ["flash", "cudnn"]),
        ((9, 0), torch.float32, False, True, ["efficient"]),
    ],
)
def test_the_candidates_follow_from_the_gpu(
    capability: tuple[int, int],
    dtype: torch.dtype,
    by_document: bool,
    has_flash3: bool,
    names: list[str],
) -> None:
    chosen = attention_choices(capability, dtype, by_document=by_document, has_flash3=has_flash3)
    assert chosen == names


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_is_causal_attention_with_grouped_queries(kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, 9, 8, dtype=torch.float64)
    whole = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    keys, values = whole
    scores = (q @ keys.transpose(-1, -2)) / 8**0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(fused_attention(q, k, v), scores.softmax(-1) @ values)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_kernel_that_is_right_is_told_from_one_that_is_not(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged() -> str | None:
        return attention_is_wrong(
            "flash", heads=4, kv_heads=2, head_dim=16, device=torch.device("cpu"), dtype=dtype
        )

    assert judged() is None
    right = F.scaled_dot_product_attention

    def sees_the_next(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        exact = q.dtype == torch.float64
        return right(q, k if exact else k.roll(-1, dims=2), v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sees_the_next)
    assert "its results are wrong" in str(judged())

    def fails(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if q.dtype == torch.float64:
            return right(q, k, v, **options)
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fails)
    assert judged() == "RuntimeError: no such instruction"
