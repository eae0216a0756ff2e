"""Progress shows bytes a second and the time that is left, on a terminal and in a log."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.progress import byte_progress

WORK = """
import time
from data_pipeline.progress import byte_progress
with byte_progress("building", num_bytes=4_000_000, shown=True) as counter:
    for _ in range(10):
        counter.advance(200_000)
        time.sleep(0.1)
"""


def test_terminal_shows_a_live_bar_with_speed_and_time_left() -> None:
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            [sys.executable, "-c", WORK],
            stderr=theirs,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)
        shown = b""
        try:
            while part := terminal.read(4096):
                shown += part
        except OSError:  # the other side of a terminal is closed
            pass
        assert process.wait(timeout=30) == 0
    text = shown.decode()
    assert "building" in text
    assert "MB/s" in text
    assert "0:00:0" in text


def test_log_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with byte_progress("building", num_bytes=60_000_000, shown=True) as counter:
        for _ in range(5):
            now[0] += 4.0
            counter.advance(8_000_000)
    assert capsys.readouterr().err == "building: 24.0 MB of 60.0 MB, 2.0 MB/s, 18 s left\n"


def test_nothing_is_shown_where_nothing_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with byte_progress("building", num_bytes=10, shown=False) as counter:
        counter.advance(10)
    assert capsys.readouterr().err == ""
