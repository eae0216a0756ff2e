"""Ranks that raise, die, hang or outlive their parent: the error is reported, and none is left."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moetrain.checks import ConfigError
from moetrain.verify.ranks import RankFailed, run_ranks


def add_up(number: int, tell: Callable[[int], None]) -> tuple[int, int]:
    tell(7)
    total = torch.tensor(number + dist.get_rank())
    dist.all_reduce(total)
    print("said on standard output")
    return dist.get_rank(), int(total)


def fail_as(how: str, tell: Callable[[int], None]) -> None:
    """Fails on rank 1 while rank 0 waits for it in a collective."""
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("of an unlucky number")
        if how == "refuse":
            raise ConfigError("model.dim", 7, "must be even: use 8")
        if how == "die":
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(600)
    dist.barrier()


def wait_for_ever(folder: str, tell: Callable[[int], None]) -> None:
    Path(folder, f"pid_{dist.get_rank()}").write_text(str(os.getpid()))
    time.sleep(600)


def test_every_rank_answers_and_rank_0_says_its_steps(capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    found = run_ranks(add_up, 10, num_ranks=3, timeout_seconds=60, on_step=steps.append)
    assert found == [(0, 33), (1, 33), (2, 33)]
    assert steps == [7]
    assert capfd.readouterr().out == "", "standard output is for the table alone"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", r"(?s)^rank 1 of 2: .*Traceback.*in fail_as.*ValueError: of an unlucky number"),
        ("die", r"(?s)^rank 1 of 2: died without an answer \(killed by SIGKILL.*last words"),
    ],
)
def test_the_rank_that_failed_is_named_with_its_own_account(how: str, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match=said):
        run_ranks(fail_as, how, num_ranks=2, timeout_seconds=100)
    assert time.monotonic() - started < 50, "long before the peer's collective gives up"
    assert not multiprocessing.active_children()


def test_a_rank_that_hangs_ends_the_command_in_time() -> None:
    with pytest.raises(RankFailed, match=r"no answer from rank .*1 within 10 s"):
        run_ranks(fail_as, "hang", num_ranks=2, timeout_seconds=10)
    assert not multiprocessing.active_children()


def test_a_setting_that_a_rank_refuses_is_still_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.dim=7: must be even"):
        run_ranks(fail_as, "refuse", num_ranks=2, timeout_seconds=60)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_the_command(tmp_path: Path, how: signal.Signals) -> None:
    script = (
        # Whatever started the tests may ignore Ctrl-C, as a shell's background jobs do.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moetrain.verify.ranks import run_ranks\n"
        "from tests.verify.test_ranks import wait_for_ever\n"
        f"run_ranks(wait_for_ever, {str(tmp_path)!r}, num_ranks=2, timeout_seconds=100)\n"
    )
    command = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        files = [tmp_path / f"pid_{rank}" for rank in range(2)]
        _wait_until(lambda: all(f.exists() and f.read_text() for f in files), seconds=60)
        command.send_signal(how)
        command.wait(20)
    finally:
        command.kill()
    _wait_until(lambda: not any(_lives(int(f.read_text())) for f in files), seconds=20)


def _lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
