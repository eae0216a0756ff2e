"""Trials that share what is imported, and nothing else: each is as good as a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.sweeps.trial_server import ServedTrial, TrialServer
from tests.launch.test_launching import wait_for
from tests.support.runs import events_of, metrics_of, write_shards

TINY = [
    "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.head_dim=16", "model.ffn_hidden_dim=32", "model.num_experts=4", "train.seq_len=32",
    "train.global_batch_size=2", "schedule.warmup_steps=0", "observe.wandb.mode=disabled",
    "run.device=cpu", "run.name=tiny", "launch.mode=inline", "observe.log_every_steps=1",
]  # fmt: skip

# What a trial may do to its process; and what another one finds there.
SPOILER = """
import os, random, signal
import numpy, torch
os.environ["SPOILT"] = "1"
torch.set_num_threads(1)
torch.manual_seed(7)
torch.set_default_dtype(torch.float64)
random.seed(7)
numpy.random.seed(7)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
torch.ones(512, 512) @ torch.ones(512, 512)
os.abort()
"""
FINDER = """
import json, os, random, signal, sys, threading
import numpy, torch
found = {
    "threads": torch.get_num_threads(),
    "dtype": str(torch.get_default_dtype()), "spoilt": os.environ.get("SPOILT"),
    "own": os.environ.get("OWN"), "modules": "spoiler" in sys.modules,
    "handlers": [str(signal.getsignal(s)) for s in (1, 2, 10, 12, 15)],
    "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "python": threading.active_count(), "cuda": torch.cuda.is_initialized(),
    "argv": sys.argv[1:3], "main": sys.modules["__main__"].__spec__.name,
    "stdin": os.path.samestat(os.fstat(0), os.stat(os.devnull)), "path": sys.path[:2],
}
with open("found.json", "w") as file:
    seeds = [torch.initial_seed(), numpy.random.random(), random.random()]
    json.dump(found | {"parent": os.getppid(), "seeds": seeds}, file)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrialServer]:
    """Returns a server in a folder with the two extensions."""
    (tmp_path / "spoiler.py").write_text(SPOILER)
    (tmp_path / "finder.py").write_text(FINDER)
    monkeypatch.chdir(tmp_path)
    server = TrialServer()
    yield server
    server.close()


def served(server: TrialServer, *words: str, **environ: str) -> ServedTrial:
    return server.start(
        [*TINY, *words], environ={**os.environ, **environ}, output=None, group=os.getpgrp()
    )


def ended(trial: ServedTrial) -> int:
    wait_for(lambda: trial.poll() is not None, "end of the trial")
    assert trial.returncode is not None
    return trial.returncode


def found() -> dict[str, Any]:
    known: dict[str, Any] = json.loads(Path("found.json").read_text())
    return known


def result(folder: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    saved = sorted(folder.glob("runs/tiny/checkpoints/step_*/*.safetensors"))
    return metrics_of(folder), [path.read_bytes() for path in saved]


@pytest.mark.timeout(240)
def test_a_trial_after_one_that_spoilt_its_process_is_as_one_in_a_new_process(
    server: TrialServer, tmp_path: Path, shards: Path
) -> None:
    words = [f"data.dir={shards}", "train.num_steps=3", "extensions=[finder]"]
    assert ended(served(server, *words, "extensions=[spoiler]")) == -signal.SIGABRT
    assert ended(served(server, *words, "run.dir=first/runs", OWN="yes")) == 0
    first = found()
    seeds = first.pop("seeds")
    assert ended(served(server, *words, "run.dir=second/runs", OWN="yes")) == 0
    second = found()
    assert not set(seeds) & set(second.pop("seeds")), "each process draws its own"
    assert second == first, "of the same server"
    assert first.pop("parent") != os.getpid()
    subprocess.run(
        [sys.executable, "-m", "moetrain", *TINY, *words, "run.dir=alone/runs"],
        check=True, env=os.environ | {"OWN": "yes"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    alone = found()
    del alone["seeds"]
    assert alone.pop("parent") == os.getpid()
    assert first == alone
    metrics, tensors = result(tmp_path / "alone")
    assert [record["step"] for record in metrics] == [0, 1, 2, 3]
    assert tensors
    assert result(tmp_path / "first") == result(tmp_path / "second") == (metrics, tensors)


@pytest.mark.timeout(240)
def test_a_mistake_and_a_signal_that_comes_at_once_are_the_trials_own(
    server: TrialServer, shards: Path
) -> None:
    assert ended(served(server, "data.dir=nowhere")) == 2
    trial = served(server, f"data.dir={shards}", "train.num_steps=1000000")
    trial.send_signal(signal.SIGTERM)  # before it can listen
    assert ended(trial) in (-signal.SIGTERM, 1, 75)
    trial.send_signal(signal.SIGTERM)  # to nobody


SWEEP = """
import os, sys
from launch.sweeps.trial_server import TrialServer
trial = TrialServer().start(sys.argv[1:], environ=os.environ, output=None, group=os.getpgrp())
print(trial.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.timeout(240)
def test_a_trial_saves_and_stops_when_its_sweep_is_killed(
    server: TrialServer, tmp_path: Path, shards: Path
) -> None:
    words = [*TINY, f"data.dir={shards}", "train.num_steps=1000000"]
    sweep = subprocess.Popen(
        [sys.executable, "-c", SWEEP, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert sweep.stdout is not None
    pid = int(sweep.stdout.readline())
    wait_for(lambda: len(metrics_of(tmp_path)) >= 2, "step")
    sweep.kill()
    sweep.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "end of the trial")
    assert "stop" in [event["event"] for event in events_of(tmp_path)]


@pytest.mark.timeout(240)
def test_a_server_that_is_killed_fails_its_trial_and_is_replaced(
    server: TrialServer, shards: Path
) -> None:
    trial = served(server, f"data.dir={shards}", "train.num_steps=1000000")
    assert server._process is not None
    server._process.kill()
    server._process.wait()
    wait_for(lambda: not Path(f"/proc/{trial.pid}").exists(), "end of the trial")
    assert trial.poll() == 1
    assert ended(served(server, "data.dir=nowhere")) == 2


def test_output_goes_where_it_should_and_nowhere_else(server: TrialServer) -> None:
    read, write = os.pipe()
    trial = server.start(["data.dir=nowhere"], environ=os.environ, output=write, group=0)
    os.close(write)
    with os.fdopen(read) as lines:
        said = lines.read()  # ends, because the server keeps no end of the pipe
    assert "nowhere is not a shard folder (data.dir)" in said
    assert ended(trial) == 2
