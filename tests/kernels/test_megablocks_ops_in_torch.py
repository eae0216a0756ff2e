"""What the MegaBlocks backend does without MegaBlocks: reasons, block indices, its small module."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moetrain.kernels import Assignments, HostCounts
from moetrain.kernels import megablocks_ops_in_torch as in_torch
from moetrain.kernels.megablocks_ops import (
    _block_indices,
    _missing_packages,
    megablocks_swiglu,
    unavailable_because,
)


@pytest.fixture(autouse=True)
def _packages_are_looked_for_anew() -> Iterator[None]:
    _missing_packages.cache_clear()
    yield
    _missing_packages.cache_clear()


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_sort_is_stable_and_looks_at_the_lowest_bits_only() -> None:
    x = ints(5, 1, 4, 1, 8 + 1)
    values, came_from = torch.empty_like(x), torch.empty_like(x)
    in_torch.sort(x, 3, values, came_from)
    assert values.tolist() == [1, 1, 9, 4, 5]
    assert came_from.tolist() == [1, 3, 4, 2, 0]
    in_torch.sort(x, 32, values, came_from)
    assert values.tolist() == [1, 1, 4, 5, 9]


def test_histogram_counts_each_row() -> None:
    counts = in_torch.histogram(ints(0, 2, 2, 1, 2), 4)
    assert counts.tolist() == [1, 1, 3, 0]
    assert counts.dtype == torch.int32
    assert in_torch.histogram(torch.tensor([[0, 0], [1, 2]]), 3).tolist() == [[2, 0, 0], [0, 1, 1]]


def test_running_sums_with_and_without_the_own_element() -> None:
    x = ints(3, 0, 2, 1).view(1, -1)
    out = torch.empty_like(x)
    in_torch.inclusive_cumsum(x, 1, out)
    assert out.tolist() == [[3, 3, 5, 6]]
    in_torch.exclusive_cumsum(x, 1, out)
    assert out.tolist() == [[0, 3, 3, 5]]


def test_indices_give_each_block_row_its_experts_columns() -> None:
    out = torch.empty(6, dtype=torch.int16)
    in_torch.indices(ints(128, 128, 384), 128, 3, 2, out)  # the second expert has no rows
    assert out.tolist() == [0, 1, 4, 5, 4, 5]


def test_replicate_copies_forward_and_sums_backward() -> None:
    bins = ints(2, 2, 5)
    out = torch.empty(1, 5)
    in_torch.replicate_forward(torch.tensor([[1.0, 2.0, 3.0]]), bins, out)
    assert out.tolist() == [[1, 1, 3, 3, 3]]
    sums = torch.empty(1, 3)
    in_torch.replicate_backward(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), bins, sums)
    assert sums.tolist() == [[3, 0, 12]]


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values: whatever would look at one raises."""
    with FakeTensorMode():
        x = torch.empty(6, dtype=torch.int32)
        matrix, bins = x.view(1, 6), torch.empty(3, dtype=torch.int32)
        with pytest.raises(Exception, match=r"item|scalar"):
            x[0].item()
        in_torch.sort(x, 3, torch.empty_like(x), torch.empty_like(x))
        in_torch.histogram(x, 4)
        in_torch.inclusive_cumsum(matrix, 1, torch.empty_like(matrix))
        in_torch.exclusive_cumsum(matrix, 1, torch.empty_like(matrix))
        in_torch.indices(bins, 128, 3, 2, torch.empty(6, dtype=torch.int16))
        in_torch.replicate_forward(torch.empty(1, 3), bins, torch.empty(1, 5))
        in_torch.replicate_backward(torch.empty(1, 5), bins, torch.empty(1, 3))
        _block_indices(bins.long(), height=4, width=2)


@pytest.mark.trap(16)
@pytest.mark.parametrize("heights", [[1], [2, 0, 3], [0, 0, 1, 0], [0] * 299 + [1], [300, 0, 2]])
@pytest.mark.parametrize("width", [1, 3, 200])
def test_block_indices_equal_a_loop_over_blocks(heights: list[int], width: int) -> None:
    expert_of_row = [expert for expert, height in enumerate(heights) for _ in range(height)]
    blocks = [(row, e * width + c) for row, e in enumerate(expert_of_row) for c in range(width)]
    by_column = sorted(range(len(blocks)), key=lambda i: (blocks[i][1], blocks[i][0]))
    per_column = [0] * (len(heights) * width)
    for _, column in blocks:
        per_column[column] += 1
    expected = [
        torch.tensor([row for row, _ in blocks]),
        torch.tensor([column for _, column in blocks]),
        torch.arange(len(expert_of_row) + 1) * width,
        torch.tensor([blocks[i][0] for i in by_column]),
        torch.tensor([0, *per_column]).cumsum(0),
        torch.tensor(by_column),
    ]
    got = _block_indices(torch.tensor(heights).cumsum(0), height=len(expert_of_row), width=width)
    assert all(index.dtype == torch.int32 for index in got)
    for mine, reference in zip(got, expected, strict=True):
        assert torch.equal(mine.long(), reference)


def test_the_package_needs_none_of_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = unavailable_because("cuda")
    assert reason is not None
    assert reason.startswith("triton, stanford-stk, megablocks not installed: `make kernels`")
    first, weight = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 8, 8)
    host, offsets = HostCounts([1]), torch.tensor([0, 1])
    assignments = Assignments(first, first + 1, first, offsets, 1, first, host)
    with pytest.raises(ValueError, match="backend='megablocks' can't run here: triton"):
        megablocks_swiglu(torch.zeros(1, 8), torch.zeros(1), assignments, weight, weight, weight)


def test_a_cpu_without_the_interpreter_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if all were here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "set TRITON_INTERPRET=1 before Python starts" in str(unavailable_because("cpu"))
    assert "torch sees no CUDA device" in str(unavailable_because("cuda"))
