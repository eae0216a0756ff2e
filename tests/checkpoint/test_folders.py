"""The line of a run's saves: attempts decide before steps."""

from moetrain.checkpoint.folders import Save, in_order


def test_what_an_older_attempt_saved_later_is_off_the_line() -> None:
    """Attempt 2 resumed from step 10, and attempt 3 from its step 15."""
    first = [Save(step=step, attempt=1) for step in (10, 20, 30)]
    second = [Save(step=step, attempt=2) for step in (15, 25)]
    third = [Save(step=20, attempt=3)]
    line, beside = in_order([*first, *second, *third])
    assert line == [third[0], second[0], first[0]]
    assert beside == [first[2], second[1], first[1]]


def test_an_older_attempts_worker_that_returns_never_gets_ahead() -> None:
    line, beside = in_order([Save(step=10, attempt=2), Save(step=40, attempt=1)])
    assert line[0] == Save(step=10, attempt=2)
    assert beside == [Save(step=40, attempt=1)]
