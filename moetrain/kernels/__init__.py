"""The computation of experts, and rows grouped by expert; knows no model and no rank."""

from moetrain.kernels.assignments import (
    Assignments,
    HostCounts,
    gather_rows,
    group_assignments,
    sum_assignments,
)
from moetrain.kernels.expert_function import (
    ExpertFunction,
    compute_experts,
    expert_function,
)
from moetrain.kernels.expert_swiglu import expert_swiglu, refuses, slow_because
from moetrain.kernels.megablocks_ops import unavailable_because

__all__ = [
    "Assignments",
    "ExpertFunction",
    "HostCounts",
    "compute_experts",
    "expert_function",
    "expert_swiglu",
    "gather_rows",
    "group_assignments",
    "refuses",
    "slow_because",
    "sum_assignments",
    "unavailable_because",
]
