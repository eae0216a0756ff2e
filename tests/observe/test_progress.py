import re
import sys
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moetrain.observe import ProgressDisplay
from moetrain.observe.progress import load_bars, load_profile


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _display(
    *, mode: str, clock: Clock | None = None, terminal: bool = True, total_steps: int = 100
) -> tuple[ProgressDisplay, StringIO]:
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, _environ={"TERM": "xterm"})
    display = ProgressDisplay(
        mode=mode,
        total_steps=total_steps,
        run_name="toy",
        console=console,
        clock=clock or Clock(),
    )
    return display, file


def _shown(file: StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def _record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "train/cross_entropy": 2.3456,
        "perf/tokens_per_second": 14321.0,
        "router/max_violation": 0.31,
        "router/dead_experts": 0,
        "router/expert_load": [[0.75, 0.25]],
        **more,
    }


def test_the_bar_shows_loss_speed_time_left_and_balance() -> None:
    clock = Clock()
    display, file = _display(mode="auto", clock=clock)
    with display:
        display.phase("starting 2 ranks")
        for step in range(10, 60, 10):
            clock.now += 20
            display.update(_record(step))
        display.update({"step": 50, "validation/loss": 2.2, "validation/s/bits_per_byte": 3.17})
        display.say("saved [bold]step_00000050")
    shown = _shown(file)
    for text in (
        "50/100",
        "loss 2.346",
        "14.3 k tokens/s",
        "1 min 40 s left",
        "▆▂",
        "no dead experts",
    ):
        assert text in shown
    assert "validation 2.200, s 3.170 bits/byte" in shown
    assert "saved [bold]step_00000050" in shown  # a text, not markup


def test_time_left_follows_the_recent_pace_and_not_the_start() -> None:
    clock = Clock()
    display, file = _display(mode="lines", clock=clock, total_steps=1000)
    with display:
        for step in range(1, 21):
            clock.now += 100  # a slow beginning
            display.update(_record(step))
        for step in range(21, 101):
            clock.now += 1
            display.update(_record(step))
    assert "step 100/1000" in _shown(file).splitlines()[-1]
    assert "15 min 0 s left" in _shown(file).splitlines()[-1]


def test_a_restart_may_jump_back_and_repeat_records() -> None:
    clock = Clock()
    display, file = _display(mode="lines", clock=clock)
    with display:
        for step in (10, 20, 30, 30):
            clock.now += 10
            display.update(_record(step))
        display.phase("restarting: rank 1 died")
        for step in (20, 30):
            clock.now += 20
            display.update(_record(step))
    assert "restarting: rank 1 died" in _shown(file)
    assert "2 min 20 s left" in _shown(file).splitlines()[-1]  # 70 steps, 2 s each


@pytest.mark.parametrize("mode", ["bar", "lines", "off"])
def test_missing_and_null_values_are_no_trouble(mode: str) -> None:
    display, file = _display(mode=mode, total_steps=0)
    with display:
        display.update({})
        display.update({"step": None, "train/loss": None})
        display.update({"step": 5, "router/expert_load": [[None, 1.0]]})
    assert (file.getvalue() == "") == (mode == "off")


def test_lines_come_every_ten_seconds_and_at_validation() -> None:
    clock = Clock()
    display, file = _display(mode="auto", clock=clock, terminal=False)
    with display:
        for step in range(1, 31):
            clock.now += 1
            more = {"validation/loss": 2.0} if step == 15 else {}
            display.update(_record(step, **more))
    steps = [int(found) for found in re.findall(r"step (\d+)/100", file.getvalue())]
    assert steps == [1, 11, 15, 25, 30]
    assert "\x1b" not in file.getvalue()


def test_the_first_step_has_a_line_though_that_of_step_0_has_just_been_shown() -> None:
    display, file = _display(mode="lines")
    with display:
        display.update({"step": 0, "validation/loss": 5.5})
        for step in (1, 2, 3):
            display.update(_record(step))
    shown = [line.split("step ")[1].split()[0] for line in _shown(file).splitlines()]
    assert shown == ["0/100", "1/100", "3/100"], "and the last one when it ends"


def test_a_terminal_that_went_away_only_ends_the_display(
    caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    with ProgressDisplay(mode="lines", total_steps=9, run_name="toy") as display:
        for step in range(9):
            display.update(_record(step))
            display.say("hello")
    assert caplog.text.count("progress display ended") == 1


def test_collapsed_layers_don_t_average_into_balanced_ones() -> None:
    record = {"router/expert_load": np.eye(4).tolist()}
    assert load_profile(record) == (4.0, 0.0, 0.0, 0.0)
    assert load_bars(load_profile(record)) == "█▁▁▁"
    assert load_bars([1.0] * 128) == "▄" * 32
    assert load_bars([2.0, 1.0, 0.0], ascii_only=True) == "#=_"
    assert load_profile({"step": 1}) == ()
