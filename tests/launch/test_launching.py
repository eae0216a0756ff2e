"""Whole commands as a user starts them: Ray, torchrun, signals, kills, hangs, bad input.

Every disturbed run must end with the metrics of an undisturbed one, bit for bit. More faults are
injected in tests/drills.
"""

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moetrain.checkpoint.folders import next_attempt
from moetrain.checkpoint.trained import newest_manifest
from tests.support.held_run import PASS_HOLD, Hold
from tests.support.runs import events_of, metrics_of, write_shards

TINY = [
    "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.head_dim=16", "model.ffn_hidden_dim=32", "model.num_experts=4",
    "train.num_steps=60", "train.global_batch_size=8", "train.seq_len=32",
    "checkpoint.every_steps=10", "schedule.warmup_steps=5", "observe.log_every_steps=1",
    "observe.wandb.mode=disabled", "run.device=cpu", "run.name=tiny",
]  # fmt: skip
RAY = ["launch.mode=ray", "launch.num_workers=2"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the metrics of a run on two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = moetrain(folder, shards, *RAY)
    assert done.returncode == 0, done.stderr
    for part in ("nats/token on held-out text", "tokens/s (median)", "runs/tiny", "next "):
        assert part in done.stdout
    assert (folder / "runs/tiny/report.html").is_file()
    metrics = metrics_of(folder)
    assert [record["step"] for record in metrics] == list(range(61))
    assert metrics[-1]["router/dead_experts"] == 0
    return metrics


def command(shards: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "moetrain", *TINY, f"data.dir={shards}", *overrides]


def moetrain(folder: Path, shards: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        command(shards, *overrides), cwd=folder, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip


@contextlib.contextmanager
def started(
    folder: Path, shards: Path, *overrides: str, hold: Hold | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Starts the command; whatever is left of it at the end is killed."""
    held = [PASS_HOLD] if hold else []
    process = subprocess.Popen(
        command(shards, *overrides, *held), cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | (hold.environment if hold else {}),
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], Any], what: str, *, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            if found := condition():
                return found
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {seconds} s")


@pytest.fixture
def hold(tmp_path_factory: pytest.TempPathFactory) -> Hold:
    """Holds a run of 60 steps at the 13th."""
    return Hold(tmp_path_factory.mktemp("hold"), step=13)


def stopping(process: "subprocess.Popen[str]", hold: Hold) -> str:
    """Releases a held run once it has heard that it is to stop; returns what it said."""
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if "stopping: checkpointing after this step" in line:
            break
    hold.release()
    return "".join(said)


def reached(folder: Path, step: int, *, name: str = "tiny") -> Callable[[], bool]:
    return lambda: metrics_of(folder, name)[-1]["step"] >= step


def rank_pids(folder: Path) -> list[int]:
    """Returns the processes of the newest attempt's ranks."""
    attempts = [e for e in events_of(folder) if e["event"] == "attempt"]
    return [rank["pid"] for rank in attempts[-1]["ranks"]]


def kinds(folder: Path, *, name: str = "tiny") -> list[str]:
    return [event["event"] for event in events_of(folder, name)]


def has_begun(folder: Path, attempt: int) -> bool:
    return kinds(folder).count("attempt") == attempt


def test_a_rank_killed_while_it_starts_is_replaced(
    tmp_path: Path, shards: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """Killed at the first sight of its process, before it has joined anything."""
    with started(tmp_path, shards, *RAY) as process:
        os.kill(wait_for(lambda: actor_of(process.pid), "process of a rank"), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "restart" in kinds(tmp_path)
    assert metrics_of(tmp_path) == undisturbed


def test_a_users_launch_beside_a_run_is_run_by_no_rank(
    tmp_path: Path,
    shards: Path,
    undisturbed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ros = tmp_path / "ros/launch/__init__.py"
    ros.parent.mkdir(parents=True)
    ros.write_text("raise RuntimeError('the package of ROS')")
    for name in ("launch.py", "data_pipeline.py"):
        (tmp_path / name).write_text("raise RuntimeError('a script of the user')")
    monkeypatch.setenv("PYTHONPATH", str(ros.parents[1]))
    done = moetrain(tmp_path, shards, *RAY)
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path) == undisturbed
    swept = moetrain(
        tmp_path, shards, "launch.mode=inline", "-m", "optim.lr=1e-3,2e-3", "train.num_steps=6"
    )
    assert swept.returncode == 0, swept.stderr


@pytest.mark.parametrize(
    ("mode", "stop"),
    [
        ("ray", signal.SIGTERM),
        ("ray", signal.SIGHUP),
        ("inline", signal.SIGINT),
        ("inline", signal.SIGUSR1),
    ],
)
def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(
    tmp_path: Path,
    shards: Path,
    undisturbed: list[dict[str, Any]],
    mode: str,
    stop: signal.Signals,
    hold: Hold,
) -> None:
    how = RAY if mode == "ray" else ["launch.mode=inline"]
    with started(tmp_path, shards, *how, hold=hold) as process:
        wait_for(hold.is_held, "step 13")
        process.send_signal(stop)
        said = stopping(process, hold)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, said + errors
    stopped = events_of(tmp_path)[-1]
    assert stopped["event"] == "stop"
    assert (tmp_path / "runs/tiny/checkpoints/latest").read_text() == f"step_{stopped['step']:08d}"
    assert "resumes from here" in output
    done = moetrain(tmp_path, shards, *how)
    assert done.returncode == 0, done.stderr
    if mode == "ray":
        assert metrics_of(tmp_path) == undisturbed


def test_a_clouds_warning_saves_and_exits_75_and_the_same_command_goes_on(
    tmp_path: Path,
    shards: Path,
    undisturbed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    hold: Hold,
) -> None:
    """The machine of the command itself will be preempted: there is nowhere to move to."""
    said = tmp_path / "cloud/computeMetadata/v1/instance/preempted"
    said.parent.mkdir(parents=True)
    said.write_text("FALSE")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "cloud"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{service.server_port}")
        with started(tmp_path, shards, *RAY, "cluster.spot_warnings=gcp", hold=hold) as process:
            wait_for(hold.is_held, "step 13")
            said.write_text("TRUE")
            assert process.stderr
            told = next(line for line in process.stderr if "will be preempted" in line)
            hold.release()
            output, errors = process.communicate(timeout=60)
        service.shutdown()
    assert process.returncode == 75, errors
    assert "Compute Engine will preempt this instance" in told
    assert "resumes from here" in output
    assert kinds(tmp_path)[-2:] == ["move", "stop"]
    done = moetrain(tmp_path, shards, *RAY)
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path) == undisturbed


@pytest.mark.parametrize("begun", [False, True])
def test_a_signal_before_the_first_step_exits_75_too(
    tmp_path: Path, shards: Path, begun: bool
) -> None:
    """Ray has a handler of its own, which would end the command with the signal's number."""
    with started(tmp_path, shards, *RAY) as process:
        if begun:
            wait_for(lambda: "start" in kinds(tmp_path), "start")
        else:
            # Signals are heard before it is written; the folder comes and goes while it is tried.
            wait_for((tmp_path / "runs/tiny/config.yaml").is_file, "configuration")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert kinds(tmp_path)[-1] == "stop"


def test_an_attempt_with_a_successor_ends_itself_and_writes_no_more(
    tmp_path: Path, shards: Path, undisturbed: list[dict[str, Any]], hold: Hold
) -> None:
    """As where a command on another machine, which can't reach this one, has taken the run over."""
    with started(tmp_path, shards, *RAY, hold=hold) as process:
        wait_for(hold.is_held, "step 13")
        ranks = rank_pids(tmp_path)
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        hold.release()
        written, saved = metrics_of(tmp_path), newest_manifest(tmp_path / "runs/tiny")
        next_attempt(tmp_path / "runs/tiny/checkpoints")
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "attempt 1 of the run of" in errors
    assert "attempt 2 has taken the run over" in errors
    assert metrics_of(tmp_path) == written
    assert newest_manifest(tmp_path / "runs/tiny") == saved
    done = moetrain(tmp_path, shards, *RAY)
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path) == undisturbed


def test_ctrl_c_of_a_whole_terminal_stops_after_saving(
    tmp_path: Path, shards: Path, hold: Hold
) -> None:
    """A terminal sends SIGINT to every process of the group, the ranks and Ray's own included."""
    with started(tmp_path, shards, *RAY, hold=hold) as process:
        wait_for(hold.is_held, "step 13")
        os.killpg(process.pid, signal.SIGINT)
        said = stopping(process, hold)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, said + errors
    assert "failure" not in kinds(tmp_path)


def test_a_second_signal_ends_at_once_and_loses_nothing(
    tmp_path: Path, shards: Path, undisturbed: list[dict[str, Any]], hold: Hold
) -> None:
    with started(tmp_path, shards, *RAY, hold=hold) as process:
        wait_for(hold.is_held, "step 13")  # so that the first signal alone would not end it
        ranks = rank_pids(tmp_path)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)  # so soon it is the same stop, passed on
        time.sleep(2.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 1
        wait_for(lambda: not any(map(alive, ranks)), "end of the ranks", seconds=30)
    done = moetrain(tmp_path, shards, *RAY)
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path) == undisturbed


def test_a_rank_lost_while_stopping_is_no_failure_of_the_run(
    tmp_path: Path, shards: Path, undisturbed: list[dict[str, Any]], hold: Hold
) -> None:
    with started(tmp_path, shards, *RAY, hold=hold) as process:
        wait_for(hold.is_held, "step 13")
        rank = rank_pids(tmp_path)[1]
        os.kill(rank, signal.SIGSTOP)  # so that it is still there when it is killed
        process.send_signal(signal.SIGTERM)
        said = stopping(process, hold)
        os.kill(rank, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, said + errors
    assert kinds(tmp_path).count("attempt") == 1
    done = moetrain(tmp_path, shards, *RAY)
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path) == undisturbed


def test_a_stop_that_comes_twice_within_a_second_is_one_stop() -> None:
    script = """
import os, signal, time
from launch.signals import StopRequest
stop = StopRequest()
with stop.on_signals():
    for signum in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), signum)
        time.sleep(0.1)
    print("asked" if stop() else "not asked", flush=True)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not ended", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (1, "asked\n"), done.stderr


def test_a_warning_stops_once_and_a_request_after_it_is_the_first() -> None:
    """SIGTERM comes after SIGUSR1 where the time is up before the run has saved."""
    script = """
import importlib, os, signal
signals = importlib.import_module("launch.signals")
signals.SAME_STOP_SECONDS = 0.0
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts it
stop = signals.StopRequest()
with stop.on_signals():
    os.kill(os.getpid(), signal.SIGHUP)
    print("asked" if stop() else "not asked", flush=True)
    for signum in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), signum)
    print("asked" if stop() else "not asked", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not ended", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (1, "not asked\nasked\n"), done.stderr


def test_a_closed_terminal_stops_the_run_after_saving(tmp_path: Path, shards: Path) -> None:
    """Its lines go nowhere from then on: a terminal that is closed refuses them."""
    overrides = ["launch.mode=inline", "train.num_steps=100000", "observe.progress=off"]
    arguments = command(shards, *overrides)
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execv(arguments[0], arguments)
    try:
        wait_for(reached(tmp_path, 13), "step 13")
        os.close(terminal)
        wait_for(lambda: kinds(tmp_path)[-1] == "stop", "stop")
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 75


def test_a_hung_rank_is_reported_and_replaced(
    tmp_path: Path, shards: Path, undisturbed: list[dict[str, Any]], hold: Hold
) -> None:
    overrides = [*RAY, "launch.hang_timeout_seconds=20"]
    with started(tmp_path, shards, *overrides, hold=hold) as process:
        wait_for(hold.is_held, "step 13")
        os.kill(rank_pids(tmp_path)[1], signal.SIGSTOP)
        hold.release()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (failure,) = [e for e in events_of(tmp_path) if e["event"] == "failure"]
    pid = next(e for e in events_of(tmp_path) if e["event"] == "attempt")["ranks"][1]["pid"]
    assert failure["failure"] == "hung"
    assert re.search(rf"hang: rank 1 on \S+ \(pid {pid}\) does not answer in", failure["reason"])
    assert failure["reason"].count("pid") == 1, "who only waits for it isn't blamed"
    (report,) = (tmp_path / "runs/tiny/logs").glob("hang_*.txt")
    # The other rank waits in whichever collective came next: of the step, or of its report.
    waiting, stopped = report.read_text().split("===== rank ")[1:]
    assert "in run_rank" in waiting
    assert re.search(r"in flight: gloo:\S+ \(number \d+ of group", waiting)
    assert "process state: T (stopped)" in stopped
    assert "run_rank" in stopped, "the stack of a stopped process, too"
    assert metrics_of(tmp_path) == undisturbed


def test_failures_without_progress_use_up_the_budget(tmp_path: Path, shards: Path) -> None:
    overrides = [*RAY, "launch.max_failures=1", "checkpoint.every_steps=1000"]
    with started(tmp_path, shards, *overrides, "train.num_steps=100000") as process:
        for attempt in (1, 2):
            wait_for(partial(has_begun, tmp_path, attempt), f"attempt {attempt}")
            wait_for(reached(tmp_path, 3), "step 3")
            time.sleep(0.5)
            os.kill(rank_pids(tmp_path)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "launch.max_failures=1" in errors


def test_torchrun_trains_the_same_and_goes_on(
    tmp_path: Path, shards: Path, undisturbed: list[dict[str, Any]]
) -> None:
    def torchrun(*overrides: str) -> subprocess.CompletedProcess[str]:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
        ]
        return subprocess.run(
            [*launcher, "-m", "moetrain", *TINY, f"data.dir={shards}", *overrides],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    done = torchrun()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s (median)") == 1
    assert metrics_of(tmp_path) == undisturbed
    before = (tmp_path / "runs/tiny/events.jsonl").read_text()
    again = torchrun()
    assert again.returncode == 0, again.stderr
    assert "complete  run tiny has all its 60 steps" in again.stdout
    assert metrics_of(tmp_path) == undisturbed
    assert (tmp_path / "runs/tiny/events.jsonl").read_text() == before
    other = torchrun("optim.lr=0.02")
    assert other.returncode != 0
    assert "this run has all its steps" in other.stderr
    more = torchrun("optim.lr=0.02", "train.num_steps=62")
    assert more.returncode == 0, more.stderr
    assert "from step 60 on: train.num_steps 60 → 62, optim.lr" in more.stderr


def test_a_warning_to_torchruns_ranks_saves_and_all_leave_together(
    tmp_path: Path, shards: Path
) -> None:
    """torchrun ends the others as soon as one has left with 75; its own code is then 1."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = ["-m", "moetrain", *TINY, f"data.dir={shards}", "train.num_steps=100000"]
    with subprocess.Popen(
        [sys.executable, *launcher, *run], cwd=tmp_path, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            wait_for(reached(tmp_path, 3), "step 3")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for rank in children:
                os.kill(int(rank), signal.SIGUSR1)
            output, errors = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert len(children) == 2
    assert len(re.findall(r"exitcode *: 75 ", errors)) == 2, errors
    assert output.count("next      the same command with run.name=tiny resumes from here") == 1
    assert kinds(tmp_path)[-1] == "stop"
    assert (tmp_path / "runs/tiny/report.html").is_file()


def test_inline_and_two_ranks_see_the_same_tokens(
    tmp_path: Path, shards: Path, undisturbed: list[dict[str, Any]]
) -> None:
    done = moetrain(tmp_path, shards, "launch.mode=inline")
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(metrics_of(tmp_path), undisturbed, strict=True):
        assert ours["train/tokens"] == theirs["train/tokens"]
        # AdamW turns rounding into steps of its own: equal at first, close for a while.
        if 1 <= ours["step"] <= 3:
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.dir=/nowhere", "/nowhere"),
        ("data.dir=null data.corpus=/no/corpus", "/no/corpus"),
        ("parallel.expert_degree=3", "parallel.expert_degree=3"),
        ("train.steps=4", "train.steps"),
        ("model.vocab_size=256", "vocabulary has 257: use that size or a larger one"),
    ],
)
def test_bad_input_exits_2_before_anything_is_written(
    tmp_path: Path, shards: Path, override: str, said: str
) -> None:
    done = moetrain(tmp_path, shards, *RAY, *override.split())
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_shard_exits_2_and_names_it(tmp_path: Path, shards: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    shard = next(copy.rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-700])
    done = moetrain(tmp_path, copy, *RAY)
    assert done.returncode == 2
    assert shard.name in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_model_exits_2_and_is_left_alone(tmp_path: Path, shards: Path) -> None:
    assert moetrain(tmp_path, shards, "launch.mode=inline", "train.num_steps=10").returncode == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    done = moetrain(tmp_path, shards, "launch.mode=inline", "model.num_experts=8")
    assert done.returncode == 2
    assert (
        "model.num_experts=8: run tiny is of another model, whose num_experts is 4" in done.stderr
    )
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_second_command_on_the_same_run_is_refused(tmp_path: Path, shards: Path) -> None:
    inline = ["launch.mode=inline", "train.num_steps=100000"]
    with started(tmp_path, shards, *inline) as process:
        wait_for(reached(tmp_path, 2), "step 2")
        done = moetrain(tmp_path, shards, *inline)
        assert done.returncode == 2
        assert f"run.name=tiny: process {process.pid} is training this run" in done.stderr


def actor_of(driver: int) -> int | None:
    """Returns a process of a rank of the driver's own Ray, as soon as there is one."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            is_rank = b"ray::RankActor" in (entry / "cmdline").read_bytes()
            if is_rank and descends_from(int(entry.name), driver):
                return int(entry.name)
    return None


def descends_from(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return False


def alive(pid: int) -> bool:
    """Returns whether a process runs; one that is dead and not yet waited for doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
