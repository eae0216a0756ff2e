"""How many failures a run may have before it is given up."""

from launch.failure import Failure
from launch.supervision.budget import NODE_FAILURES, NODE_MEMORY_SECONDS, Budget
from moetrain.kinds import FailureKind
from moetrain.settings import LaunchSettings


def died(
    step: int | None, *, kind: FailureKind = FailureKind.died, node: str | None = None
) -> Failure:
    return Failure(kind=kind, reason="gone", step=step, node=node)


def budget(*, failures: int = 3, preemptions: int = 2) -> Budget:
    settings = LaunchSettings(max_failures=failures, max_preemptions=preemptions)
    return Budget(settings, saved_step=0)


def test_failures_without_progress_end_the_run() -> None:
    count = budget(failures=2)
    assert count.count(died(1), saved_step=0) is None
    assert count.count(died(2), saved_step=0) is None
    assert "launch.max_failures=2" in str(count.count(died(3), saved_step=0))


def test_progress_forgives_failures() -> None:
    count = budget(failures=1)
    for step in range(1, 20):
        assert count.count(died(step), saved_step=step) is None


def test_preemptions_are_counted_apart_and_not_forgiven() -> None:
    count = budget(failures=0, preemptions=2)
    assert count.count(died(1, kind=FailureKind.preempted), saved_step=1) is None
    assert count.count_preemption() is None
    reason = count.count(died(9, kind=FailureKind.preempted), saved_step=9)
    assert "launch.max_preemptions=2" in str(reason)


def test_an_error_of_the_code_is_final() -> None:
    assert budget().count(died(1, kind=FailureKind.error), saved_step=0) == "gone"


def test_the_same_failure_at_the_same_step_ends_the_run_early() -> None:
    count = budget(failures=100)
    assert count.count(died(7, kind=FailureKind.memory), saved_step=5) is None
    assert count.count(died(7, kind=FailureKind.memory), saved_step=5) is None
    reason = str(count.count(died(7, kind=FailureKind.memory), saved_step=5))
    assert "3 times in the same way at step 7" in reason
    assert "gone" in reason


def test_failures_at_the_same_step_that_differ_are_chance() -> None:
    count = budget(failures=100)
    for kind in map(FailureKind, ("died", "memory", "hung", "died", "hung")):
        assert count.count(died(7, kind=kind), saved_step=5) is None
    for _ in range(10):
        assert count.count(died(7, kind=FailureKind.lost), saved_step=5) is None, (
            "nodes that go are chance"
        )


def test_a_node_that_failed_repeatedly_is_left_out() -> None:
    count = budget(failures=100)
    for step, node in ((1, "a"), (2, "b")):
        count.count(died(step, node=node), saved_step=step)
    assert count.node_failures == {"a": 1, "b": 1}
    for kind in map(FailureKind, ("memory", "service", "peer")):
        count.count(died(4, kind=kind, node="a"), saved_step=4)
    assert count.left_out == set(), "what isn't the node's fault"
    count.count(died(5, node="a"), saved_step=5)
    assert count.left_out == {"a"}


def test_a_bad_node_is_left_out_before_its_failures_end_the_run() -> None:
    """As when a node with a broken device comes back: every attempt there dies before a step."""
    count = budget()
    for _ in range(NODE_FAILURES):
        assert count.count(died(None, node="c"), saved_step=0) is None
    assert count.left_out == {"c"}
    assert "in the same way before the first step" in str(
        count.count(died(None, node="a"), saved_step=0)
    ), "elsewhere it is the same: it wasn't the node"


def test_what_a_node_did_days_ago_is_forgotten() -> None:
    now = 0.0
    count = Budget(LaunchSettings(), saved_step=0, clock=lambda: now)
    for step in (1, 2, 3):
        assert count.left_out == set()
        count.count(died(step, node="a"), saved_step=step)
        now += NODE_MEMORY_SECONDS
    count.count(died(4, node="a"), saved_step=4)
    now += 60.0
    count.count(died(5, node="a"), saved_step=5)
    assert count.left_out == {"a"}
