"""What a real run reports about its time: in its events, its metrics and its heartbeat."""

import json
import time
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

import pytest

from moetrain.kinds import EventKind
from moetrain.observe import EventLog, Tally, events, read_sign, run_account, tally
from moetrain.settings import Resolved
from tests.support.ranks import replace_in_rank, run_ranks
from tests.support.runs import events_of, tiny_config, train_as_rank, write_shards

HOUR = 3600.0


class SetDates(datetime):
    """A machine's date, set forward by an hour and later back by two while a run is under way."""

    asked = 0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        cls.asked += 1
        jump = HOUR if cls.asked < 9 else -HOUR
        return super().now(tz) + timedelta(seconds=jump * (cls.asked > 2))


def train_with_set_dates(config: Resolved) -> float:
    """Starts and trains a run twice, the first time to step 5; returns how long it all took."""
    replace_in_rank(events, "datetime", SetDates)
    replace_in_rank(tally, "SIGN_EVERY_SECONDS", 0.0)
    run_dir = config.run_dir
    run_dir.mkdir(parents=True)
    began = time.monotonic()
    write = EventLog(run_dir / "events.jsonl").write
    write(EventKind.start)
    train_as_rank(config, 5, 1)
    write(EventKind.start, last_sign=read_sign(run_dir))  # with no word of the end, as after a kill
    train_as_rank(config, None, 2)
    write(EventKind.finish)
    return time.monotonic() - began


def test_a_run_whose_date_is_set_while_it_trains_accounts_for_its_time(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, shards=write_shards(tmp_path), train__validate_every_steps=4)
    (took,) = run_ranks(train_with_set_dates, 1, config)
    dates = [datetime.fromisoformat(event["time"]) for event in events_of(tmp_path)]
    assert max(dates) - min(dates) > timedelta(hours=1.9), "the date was set"
    assert dates != sorted(dates)

    found = run_account(tmp_path / "runs" / "tiny")
    assert found is not None
    assert found.wall == pytest.approx(took, abs=0.1)
    assert found.interruptions == 1
    assert found.redone_steps == 0
    for kind in ("training", "saving", "validation", "starting", "restarting"):
        assert found.seconds[kind] > 0

    saves = [event for event in events_of(tmp_path) if event["event"] == "save"]
    assert [event["step"] for event in saves] == [3, 5, 6, 8]
    spent = [event["spent"] for event in saves]
    assert spent[0]["training"] < spent[1]["training"]
    assert spent[2]["training"] < spent[3]["training"]
    assert found.seconds["training"] == pytest.approx(
        spent[1]["training"] + spent[3]["training"], abs=0.01
    )
    # The last record is written before the last save and the end, which the account has, too.
    records = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    shares = [json.loads(record)["perf/effective_training_time"] for record in records]
    assert len(shares) == 8
    assert all(0 < share < 1 for share in shares)
    assert shares[-1] == pytest.approx(found.effective, rel=0.5)
    # One rank's seconds of training, those of the killed attempt among them.
    used = [json.loads(record)["perf/gpu_seconds"] for record in records]
    assert used == sorted(used)
    assert spent[1]["training"] < used[5] < used[-1] <= found.seconds["training"]
    assert found.device_seconds == found.seconds["training"]


def test_a_sign_of_life_is_left_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally, "SIGN_EVERY_SECONDS", 0.2)
    kept = Tally(tmp_path)
    kept.begin(3)
    for step in range(5):
        kept.sign(step)
    first = read_sign(tmp_path)
    assert first is not None
    assert (first["attempt"], first["step"]) == (3, 0)
    time.sleep(0.2)
    kept.sign(7)
    later = read_sign(tmp_path)
    assert later is not None
    assert later["step"] == 7
    assert later["spent"]["training"] == pytest.approx(0.2, abs=0.15)
    assert [path.name for path in tmp_path.iterdir()] == ["last_sign.json"]


def test_no_sign_of_life_stops_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Tally(tmp_path / "gone")
    kept.begin(1)
    kept.sign(1)
    assert "no heartbeat" in caplog.text
    assert read_sign(tmp_path / "gone") is None
    (tmp_path / "last_sign.json").write_text('{"torn')
    assert read_sign(tmp_path) is None
    Tally().sign(1)  # a rank that keeps no records


def test_a_save_behind_the_training_tells_what_went_before_its_step() -> None:
    told: list[dict[str, Any]] = []
    kept = Tally()
    kept.begin(1)
    write = kept.on_save(lambda kind, **fields: told.append({"event": kind} | fields))
    time.sleep(0.1)
    with kept.validating():
        time.sleep(0.1)
    with kept.saving(7):
        time.sleep(0.1)
        write("save", step=7)
    time.sleep(0.1)
    write("save", step=7)
    write("save", step=8)
    write("failure", step=7)
    for event in told[:2]:
        assert event["spent"] == {
            "training": pytest.approx(0.1, abs=0.05), "validation": pytest.approx(0.1, abs=0.05),
            "saving": pytest.approx(0.1, abs=0.05),
        }  # fmt: skip
    assert [sorted(event) for event in told[2:]] == [["event", "step"]] * 2
    assert kept.read()["training"] == pytest.approx(0.2, abs=0.08)
