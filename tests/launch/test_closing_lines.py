"""What the closing lines say of the run's time, and of how it could train on."""

from pathlib import Path

import pytest

from launch.closing import effective_line
from moetrain.observe import Account
from moetrain.observe.ledger import KINDS
from moetrain.train.resume import training_on
from tests.support.runs import tiny_config


def account(interruptions: int = 0, **seconds: float) -> Account:
    return Account(
        seconds=dict.fromkeys(KINDS, 0.0) | seconds,
        spans=[],
        interruptions=interruptions,
        redone_steps=0,
    )


def test_the_effective_time_is_told_where_a_run_was_long_or_interrupted() -> None:
    long = account(training=2290.0, starting=170.0)
    assert effective_line(long) == "effective 93.1% of 41 min 0 s in steps that count"
    broken = account(2, training=90.0, redone=20.0, detecting=10.0, restarting=30.0, down=10.0)
    assert effective_line(broken) == (
        "effective 56.2% of 2 min 40 s in steps that count; 2 interruptions cost 1 min 10 s"
    )
    assert "; 1 interruption cost" in str(effective_line(account(1, training=1.0, down=1.0)))


def test_short_runs_and_unknown_times_are_passed_over() -> None:
    assert effective_line(account(training=300.0, starting=12.0)) is None
    assert effective_line(account()) is None
    assert effective_line(None) is None


@pytest.mark.parametrize(
    ("schedule", "settings"),
    [
        ("constant", "train.num_steps=16"),
        ("cosine", "schedule.restart_from=8 train.num_steps=16"),
        ("wsd", "schedule.restart_from=8 train.num_steps=16"),
    ],
)
def test_a_rate_that_has_fallen_is_not_told_to_train_on_without_a_new_schedule(
    tmp_path: Path, schedule: str, settings: str
) -> None:
    config = tiny_config(tmp_path, shards=tmp_path, schedule__name=schedule)
    assert training_on(config, step=8) == settings
    changes = dict(word.split("=") for word in settings.split())
    more = {key.replace(".", "__"): int(value) for key, value in changes.items()}
    tiny_config(tmp_path, shards=tmp_path, schedule__name=schedule, **more)  # fits its steps
