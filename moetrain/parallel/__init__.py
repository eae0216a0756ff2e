"""Everything that knows ranks: layouts, meshes, the token exchange, sharding, gradients."""

from moetrain.parallel.activity import BETWEEN_STEPS, COMPUTING_PHASES, STEP_PHASES, Activity, Doing
from moetrain.parallel.all_to_all_exchange import AllToAllExchange
from moetrain.parallel.gradients import Gradients, SumsByRole
from moetrain.parallel.kernel_choice import settle_attention, settle_backend
from moetrain.parallel.mesh import Meshes, build_meshes, join_ranks
from moetrain.parallel.parallelize import parallelize
from moetrain.parallel.recompute import plain_name
from moetrain.parallel.reduce import any_rank, any_rank_each, gather_objects, gather_over_ranks
from moetrain.parallel.sharding import begin_micro_batch, reshard
from moetrain.parallel.topology import (
    TOKEN_AXES,
    WEIGHT_AXES,
    RankShare,
    Topology,
    degree_choices,
    divisors,
    resolve_topology,
)

__all__ = [
    "BETWEEN_STEPS",
    "COMPUTING_PHASES",
    "STEP_PHASES",
    "TOKEN_AXES",
    "WEIGHT_AXES",
    "Activity",
    "AllToAllExchange",
    "Doing",
    "Gradients",
    "Meshes",
    "RankShare",
    "SumsByRole",
    "Topology",
    "any_rank",
    "any_rank_each",
    "begin_micro_batch",
    "build_meshes",
    "degree_choices",
    "divisors",
    "gather_objects",
    "gather_over_ranks",
    "join_ranks",
    "parallelize",
    "plain_name",
    "reshard",
    "resolve_topology",
    "settle_attention",
    "settle_backend",
]
