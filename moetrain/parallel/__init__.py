"""Everything that knows ranks: layouts, meshes, the token exchange, sharding, gradients."""

from moetrain.parallel.activity import BETWEEN_STEPS, COMPUTING_PHASES, STEP_PHASES, Activity, Doing
from moetrain.parallel.all_to_all_exchange import AllToAllExchange
from moetrain.parallel.gradients import Gradients
from moetrain.parallel.mesh import Meshes, build_meshes, join_ranks
from moetrain.parallel.parallelize import parallelize, reshard
from moetrain.parallel.recompute import plain_name
from moetrain.parallel.reduce import any_rank, gather_objects, gather_over_ranks, sum_over_ranks
from moetrain.parallel.topology import Topology, divisors, resolve_topology

__all__ = [
    "BETWEEN_STEPS",
    "COMPUTING_PHASES",
    "STEP_PHASES",
    "Activity",
    "AllToAllExchange",
    "Doing",
    "Gradients",
    "Meshes",
    "Topology",
    "any_rank",
    "build_meshes",
    "divisors",
    "gather_objects",
    "gather_over_ranks",
    "join_ranks",
    "parallelize",
    "plain_name",
    "reshard",
    "resolve_topology",
    "sum_over_ranks",
]
