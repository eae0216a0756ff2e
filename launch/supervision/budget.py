"""How many failures a run may have: pure counting, knows no ranks."""

import time
from collections.abc import Callable

from launch.failure import Failure
from moetrain.kinds import FailureKind
from moetrain.settings import LaunchSettings

REPEATS = 3  # equal failures at one step
NODES_OWN = (
    FailureKind.died,
    FailureKind.lost,
    FailureKind.hung,
)  # failures that a node may have caused
# After so many within so long a node is left out: before REPEATS, so that the next attempt, on
# other nodes, shows whether the node or the code is to blame.
NODE_FAILURES, NODE_MEMORY_SECONDS = 2, 86_400.0


class Budget:
    """Counts failures and preemptions separately, and decides when a run must not be restarted."""

    def __init__(
        self,
        settings: LaunchSettings,
        *,
        saved_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._saved = saved_step
        self._failures: list[Failure] = []  # since the last progress
        self._preemptions = 0
        self._on_node: dict[str, list[float]] = {}

    @property
    def node_failures(self) -> dict[str, int]:
        """Recent failures of each node, by address."""
        since = self._clock() - NODE_MEMORY_SECONDS
        counts = {node: sum(at > since for at in times) for node, times in self._on_node.items()}
        return {node: count for node, count in counts.items() if count}

    @property
    def left_out(self) -> set[str]:
        """Nodes that failed too often to be used while there are others."""
        return {node for node, count in self.node_failures.items() if count >= NODE_FAILURES}

    def count_preemption(self) -> str | None:
        """Counts a preemption; returns why the run must stop, if it must."""
        self._preemptions += 1
        most = self._settings.max_preemptions
        if self._preemptions <= most:
            return None
        return f"{self._preemptions} preemptions (launch.max_preemptions={most})"

    def count(self, failure: Failure, *, saved_step: int) -> str | None:
        """Counts a failure; returns why the run must not be restarted, None if it may."""
        if saved_step > self._saved:  # progress: older failures no longer count
            self._saved, self._failures = saved_step, []
        if failure.is_final:
            return failure.reason
        if failure.kind == FailureKind.preempted:
            reason = self.count_preemption()
            return reason and f"{reason}: {failure.reason}"
        self._failures.append(failure)
        if failure.node and failure.kind in NODES_OWN:
            self._on_node.setdefault(failure.node, []).append(self._clock())
        alike = [f for f in self._failures if (f.kind, f.step) == (failure.kind, failure.step)]
        if len(alike) >= REPEATS and failure.kind != FailureKind.lost:
            where = "before the first step" if failure.step is None else f"at step {failure.step}"
            return (
                f"failed {len(alike)} times in the same way {where}, without progress since "
                f"the checkpoint of step {self._saved}: {failure.reason}"
            )
        most = self._settings.max_failures
        if len(self._failures) > most:
            return (
                f"{len(self._failures)} failures since the checkpoint of step {self._saved} "
                f"(launch.max_failures={most}): {failure.reason}"
            )
        return None
