import multiprocessing
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from moetrain.kinds import EventKind
from moetrain.observe import EventLog, read_events


def _append(path: Path, writer: int, count: int) -> None:
    log = EventLog(path)
    for index in range(count):
        log.write(EventKind.save, reason="x" * (index % 500), writer=writer, index=index)


def test_an_event_has_a_time_a_kind_a_reason_and_its_fields(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write(EventKind.restart, reason="rank 1 died", step=40, path=tmp_path, loss=float("nan"))
    log.write(EventKind.start)
    first, second = read_events(log.path)
    assert list(first) == ["time", "event", "reason", "step", "path", "loss", "clock"]
    assert first["path"] == str(tmp_path)
    assert first["loss"] is None
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first["time"])).total_seconds()) < 60
    assert (second["event"], second["reason"]) == ("start", None)
    (boot, then), (same_boot, now) = first["clock"], second["clock"]
    assert boot == same_boot
    assert then <= now <= time.monotonic() + 0.001


def test_events_of_several_processes_interleave_as_whole_lines(tmp_path: Path) -> None:
    path, count = tmp_path / "events.jsonl", 300
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=_append, args=(path, writer, count)) for writer in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    events = read_events(path)
    assert len(events) == 2 * count
    for writer in range(2):
        assert [e["index"] for e in events if e["writer"] == writer] == list(range(count))


def test_an_event_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    EventLog(tmp_path / "no folder" / "events.jsonl").write(EventKind.failure, reason="disk full")
    assert "'failure' not recorded" in caplog.text
