"""Accounts of histories whose truth is known: some written by hand, hundreds generated."""

import random
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest

from moetrain.observe import Account, account
from moetrain.observe.ledger import KINDS
from tests.observe.invented_history import InventedHistory

HOUR = 3600.0


def event(at: float, kind: str, *, date: float | None = None, boot: str | None = "a", **fields: Any
          ) -> dict[str, Any]:  # fmt: skip
    """Returns an event of a machine that was booted long before, and whose date may be off."""
    told = datetime.fromtimestamp(1.8e9 + (at if date is None else date), UTC).isoformat()
    clock = {} if boot is None else {"clock": [boot, 5000.0 + at]}
    return {"time": told, "event": kind, "reason": None} | fields | clock


def spent(training: float, saving: float = 0.0, validation: float = 0.0) -> dict[str, float]:
    return {"training": training, "saving": saving, "validation": validation}


def sign(at: float, attempt: int, step: int, seconds: float) -> dict[str, Any]:
    left = event(at, "") | {"attempt": attempt, "step": step, "spent": spent(seconds)}
    return {key: value for key, value in left.items() if key not in ("event", "reason")}


def redated(events: list[dict[str, Any]], jump: float) -> list[dict[str, Any]]:
    """Returns events as a machine would have written them whose date had been set."""
    return [
        e
        | {
            "time": datetime.fromtimestamp(
                datetime.fromisoformat(e["time"]).timestamp() + jump, UTC
            ).isoformat()
        }
        for e in events
    ]


def known(events: list[dict[str, Any]], **rest: Any) -> Account:
    found = account(events, **rest)
    assert found is not None
    assert sum(span.end - span.begin for span in found.spans) == pytest.approx(found.wall)
    return found


def times(events: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
    """Returns what there is of each kind of time, to compare with."""
    seconds = known(events, **rest).seconds
    return {kind: pytest.approx(value) for kind, value in seconds.items() if value}


# 10 s to the first step, 90 s of steps, one save of 2 s in their midst and one at the end.
BEGUN = [event(0, "start"), event(10, "training", step=0, attempt=1)]
SAVED = [*BEGUN, event(62, "save", step=50, spent=spent(50, 2))]
WHOLE = [*SAVED, event(104, "save", step=90, spent=spent(90, 4))]
AGAIN = [event(130, "training", step=50, attempt=2),
         event(170, "save", step=90, spent=spent(40)), event(170, "finish", step=90)]  # fmt: skip


def test_an_undisturbed_run_trains_all_the_time_but_for_start_saves_and_end() -> None:
    found = known([*WHOLE, event(110, "finish", step=90)])
    assert found.seconds == {
        "starting": 10, "training": 90, "saving": 4, "ending": 6,
        "validation": 0, "redone": 0, "detecting": 0, "restarting": 0, "down": 0,
    }  # fmt: skip
    assert found.effective == pytest.approx(90 / 110)
    assert (found.interruptions, found.redone_steps, found.lost) == (0, 0, 0)


def test_time_between_a_stop_and_the_next_start_is_not_the_run_s() -> None:
    found = known([
        *WHOLE, event(110, "stop", step=90), event(9000, "download"), event(9010, "start"),
        event(9030, "training", step=90, attempt=2), event(9040, "save", step=99, spent=spent(9)),
        event(9040, "finish"),
    ])  # fmt: skip
    assert found.wall == pytest.approx(110 + 30)
    assert found.seconds["starting"] == pytest.approx(10 + 20)
    assert found.interruptions == 0


def test_a_failure_costs_what_was_not_saved_the_notice_and_the_restart() -> None:
    died = event(100, "failure", step=81, silent_seconds=5.0)
    found = known([*SAVED, died, event(101, "restart", step=50), *AGAIN])
    assert times([*SAVED, died, *AGAIN]) == {
        "starting": 10, "training": 50 + 40, "saving": 2, "redone": 95 - 62, "detecting": 5,
        "restarting": 30,
    }  # fmt: skip
    assert (found.interruptions, found.redone_steps) == (1, 31)
    assert found.lost == pytest.approx(33 + 5 + 30)


def test_device_time_counts_the_ranks_of_each_attempt_and_only_steps_that_count() -> None:
    died = event(100, "failure", step=81, silent_seconds=5.0)
    events = [*SAVED, died, *AGAIN]
    assert known(events).device_seconds is None, "of a version that didn't record the ranks"
    ranks = iter((4, 2))
    events = [e | {"ranks": next(ranks)} if e["event"] == "training" else e for e in events]
    assert known(events).device_seconds == pytest.approx(50 * 4 + 40 * 2)


def test_silence_is_not_longer_than_since_the_last_sign_of_progress() -> None:
    """A rank that died while others still saved was silent before their save."""
    late = [*SAVED, event(66, "failure", step=50, silent_seconds=30.0), *AGAIN]
    assert times(late)["detecting"] == 4
    assert times([*SAVED, event(66, "failure", step=50), *AGAIN])["redone"] == 4, "silence unknown"


@pytest.mark.parametrize(
    ("events", "left", "truth"),
    [
        # before the first step; nothing but the process is known
        ([event(0, "start"), event(4, "attempt")], None, {"restarting": 30, "down": 96}),
        # in training before the first save, with and without a heartbeat
        (BEGUN, None, {"starting": 10, "down": 90, "restarting": 30}),
        (BEGUN, sign(30, 1, 20, 20), {"starting": 10, "redone": 20, "down": 70, "restarting": 30}),
        # after a save, before and after the next heartbeat
        (SAVED, sign(61, 1, 50, 51),
         {"starting": 10, "training": 50, "saving": 2, "down": 38, "restarting": 30}),
        (SAVED, sign(80, 1, 68, 70),
         {"starting": 10, "training": 50, "saving": 2, "redone": 18, "down": 20, "restarting": 30}),
        # the heartbeat is of an attempt before this one
        (SAVED, sign(0, 7, 40, 12),
         {"starting": 10, "training": 50, "saving": 2, "down": 38, "restarting": 30}),
        # while a failure was being mended
        ([*SAVED, event(80, "failure", step=60), event(82, "attempt")], sign(70, 1, 58, 60),
         {"starting": 10, "training": 50, "saving": 2, "redone": 18, "restarting": 2 + 30,
          "down": 18}),
    ],
)  # fmt: skip
def test_a_killed_driver_s_life_ends_with_the_last_thing_known_of_it(
    events: list[dict[str, Any]], left: dict[str, Any] | None, truth: dict[str, float]
) -> None:
    step = 50 if events[-1]["event"] != "training" and len(events) > 2 else 0
    truth = {"starting": 4, **truth} if "starting" not in truth else truth
    found = times([
        *events, event(99, "download"), event(100, "start", last_sign=left),
        event(130, "training", step=step, attempt=2),
        event(170, "save", step=90, spent=spent(40)), event(170, "finish", step=90),
    ])  # fmt: skip
    assert found == truth | {"training": truth.get("training", 0) + 40}


def test_a_failed_run_is_down_until_it_is_submitted_again_and_only_then() -> None:
    failed = [*SAVED, event(80, "failure", step=60, silent_seconds=2.0), event(81, "fail")]
    assert times(failed)["restarting"] == 1
    assert "down" not in times(failed)
    assert known(failed).redone_steps == 10, "lost, if nobody goes on"
    assert known(failed).interruptions == 0
    again = [event(100, "start"), *AGAIN]
    assert times([*failed, *again])["down"] == 19
    assert known([*failed, *again]).interruptions == 1
    alone = [*SAVED, event(80, "fail"), *again]  # a run in one process has no supervisor
    assert times(alone)["redone"] == 18
    assert known(alone).interruptions == 1


def test_failures_one_after_the_other_without_a_step_between_are_one_interruption() -> None:
    failures = [event(70, "failure", step=55), event(80, "failure"), event(90, "failure")]
    found = known([*SAVED, *failures, *AGAIN])
    assert found.interruptions == 1
    assert found.seconds["restarting"] == pytest.approx(60)


def test_a_move_loses_nothing_but_its_own_time() -> None:
    moved = [*SAVED, event(64, "move", step=50), *AGAIN]
    assert times(moved) == {
        "starting": 10, "training": 90, "saving": 2, "ending": 2, "restarting": 66,
    }  # fmt: skip
    assert known(moved).interruptions == 0


def test_a_damaged_checkpoint_takes_what_was_built_on_it_along() -> None:
    """The run goes back to step 50, although step 90 had been saved and the run stopped."""
    found = known([*WHOLE, event(106, "stop", step=90), event(120, "start"), *AGAIN])
    assert found.seconds["training"] == pytest.approx(50 + 40)
    assert found.seconds["redone"] == pytest.approx(106 - 62)
    assert found.redone_steps == 40
    twice = [event(130, "training", step=0, attempt=2), event(170, "finish", step=90)]
    assert known([*WHOLE, event(106, "stop"), event(120, "start"), *twice]).seconds["redone"] == 96


def test_a_commit_behind_the_training_counts_from_the_step_that_was_saved() -> None:
    """The save of step 50 began at 60; it was committed at 75, and the run failed at 80."""
    behind = [*BEGUN, event(75, "save", step=50, spent=spent(50, 0.5)),
              event(80, "failure", step=69), *AGAIN]  # fmt: skip
    assert times(behind)["redone"] == 80 - 60.5
    after = [*BEGUN, event(80, "failure", step=69),
             event(81, "save", step=50, spent=spent(50, 0.5)), *AGAIN]  # fmt: skip
    assert times(after)["redone"] == 80 - 60.5, "nor does it matter that the attempt had ended"


def test_a_run_that_is_going_on_counts_all_it_has_trained() -> None:
    assert times(SAVED) == {"starting": 10, "training": 50, "saving": 2}
    now = sign(80, 1, 66, 68) | {"spent": spent(66, 2, 2)}
    assert times(SAVED, sign=now) == {
        "starting": 10, "training": 66, "saving": 2, "validation": 2,
    }  # fmt: skip
    ended = [*WHOLE, event(110, "finish", step=90)]
    assert times(ended, sign=now) == times(ended)


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
@pytest.mark.parametrize("place", range(1, 8))
def test_setting_the_date_by_an_hour_changes_nothing(jump: float, place: int) -> None:
    story = [*SAVED, event(80, "failure", step=60, silent_seconds=3.0), event(95, "start"), *AGAIN]
    assert known([*story[:place], *redated(story[place:], jump)]) == known(story)


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_without_clocks_no_jump_makes_time_negative(jump: float) -> None:
    """A system that doesn't name its boots has dates only, which can't tell a jump from time."""
    whole = [*WHOLE, event(110, "finish", step=90)]
    bare = [{key: value for key, value in e.items() if key != "clock"} for e in whole]
    assert times(bare) == times(whole)
    found = known([*bare[:3], *redated(bare[3:], jump)])
    assert min(found.seconds.values()) >= 0
    assert 0 < (found.effective or 0) <= 1


@pytest.mark.parametrize("ahead", [0.0, HOUR, -HOUR])
def test_ranks_on_a_machine_with_another_date_share_the_driver_s_time(ahead: float) -> None:
    def elsewhere(at: float, kind: str, **fields: Any) -> dict[str, Any]:
        return event(at, kind, date=at + ahead, boot="b", **fields)

    story = [
        event(0, "start"), event(9, "attempt"), elsewhere(10, "training", step=0, attempt=1),
        elsewhere(62, "save", step=50, spent=spent(50, 2)),
        event(80, "failure", step=60, silent_seconds=3.0), event(95, "attempt"),
        elsewhere(100, "training", step=50, attempt=2),
        elsewhere(140, "save", step=90, spent=spent(40)), event(150, "finish"),
    ]  # fmt: skip
    found = known(story)
    assert found.wall == pytest.approx(150)
    assert found.seconds["training"] == pytest.approx(90)
    # The first sight of the other machine may be misplaced between its neighbours' events.
    assert found.seconds["starting"] == pytest.approx(10, abs=0 if not ahead else 18)


def test_another_machine_goes_on_where_the_first_was_lost() -> None:
    other = [{**e, "clock": ["z", e["clock"][1] - 4000]} for e in [event(100, "start"), *AGAIN]]
    assert times([*SAVED, *other])["down"] == 38


def test_runs_of_versions_that_did_not_say_when_training_began_have_no_account() -> None:
    old = [event(0, "start", boot=None), event(5, "attempt", boot=None),
           event(60, "save", step=50, boot=None), event(70, "finish", boot=None)]  # fmt: skip
    assert account(old) is None
    assert account([*old, event(80, "start"), *AGAIN]) is None, "nor when they go on"
    assert account([]) is None
    assert account([event(0, "import"), event(1, "upcycle")]) is None
    assert account([event(0, "start"), event(5, "fail")]) is None


def test_nonsense_is_survived() -> None:
    for broken in (
        {}, {"event": "start"}, {"event": "training", "step": "x"[:0], "clock": "5"},
        {"event": "save", "step": None}, {"event": "save", "step": 5, "time": "<script>"},
        {"event": "failure", "silent_seconds": 1e9}, {"event": "start", "last_sign": 5},
        {"event": "training", "clock": ["a", None], "step": None},
    ):  # fmt: skip
        for place in range(len(WHOLE) + 1):
            found = account([*WHOLE[:place], broken, *WHOLE[place:]])
            if found is not None:
                assert min(found.seconds.values()) >= 0
                assert 0 <= (found.effective or 0) <= 1


def test_a_run_without_a_start_begins_with_its_training() -> None:
    assert times(SAVED[1:]) == {"training": 50, "saving": 2}


@pytest.mark.parametrize("tens", range(30))
def test_invented_histories_are_accounted_for_exactly(tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        history = InventedHistory(random.Random(seed))
        found, truth = known(history.events), history.truth()
        # Dates, which place the first event of each boot, are written in microseconds.
        assert found.seconds == {k: pytest.approx(truth[k], abs=1e-4) for k in KINDS}, seed
        assert found.interruptions == history.interruptions, seed
        assert found.redone_steps == history.redone_steps, seed


def test_invented_histories_have_everything_in_them() -> None:
    endings: Counter[str] = Counter()
    for seed in range(300):
        endings += InventedHistory(random.Random(seed)).happened
    assert min(endings.values()) >= 20
    assert set(endings) == {
        "failure", "failure before a step", "failure in a save", "killed", "killed before a step",
        "fail", "stop", "move", "finish", "rollback", "jump", "reboot", "two machines",
    }  # fmt: skip
