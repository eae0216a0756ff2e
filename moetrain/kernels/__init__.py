"""Grouped matrix products and permutations; knows no model and no rank."""

from moetrain.kernels.grouped_matmul import BACKENDS, grouped_matmul
from moetrain.kernels.permute import (
    combine_copies,
    gather_copies,
    invert,
    permute,
    sort_by_expert,
)

__all__ = [
    "BACKENDS",
    "combine_copies",
    "gather_copies",
    "grouped_matmul",
    "invert",
    "permute",
    "sort_by_expert",
]
