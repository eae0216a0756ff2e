"""The computation of experts, and rows grouped by expert; knows no model and no rank."""

from moetrain.kernels.copies import Copies, gather_copies, group_copies, sum_copies
from moetrain.kernels.expert_function import (
    ExpertFunction,
    compute_experts,
    expert_function,
)
from moetrain.kernels.expert_swiglu import expert_swiglu, refuses
from moetrain.kernels.megablocks_ops import unavailable_because

__all__ = [
    "Copies",
    "ExpertFunction",
    "compute_experts",
    "expert_function",
    "expert_swiglu",
    "gather_copies",
    "group_copies",
    "refuses",
    "sum_copies",
    "unavailable_because",
]
