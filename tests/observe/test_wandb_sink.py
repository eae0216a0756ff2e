import asyncio
import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb

from moetrain.observe import MetricsFile, WandbSink, read_metrics, wandb_sink
from moetrain.observe.wandb_identity import wandb_run_id
from moetrain.settings import WandbSettings


def _sink(
    run_dir: Path,
    *,
    mode: str = "offline",
    resume_step: int | None = None,
    told: list[str] | None = None,
) -> WandbSink:
    return WandbSink(
        WandbSettings(mode=mode),
        run_name="toy",
        run_dir=run_dir,
        config={"model": {"dim": 8}},
        resume_step=resume_step,
        tell=(told if told is not None else []).append,
    )


def _fake(monkeypatch: pytest.MonkeyPatch, *, log: Any = None, init: Any = None) -> list[Any]:
    """Stands in for the package, whose service can't be made to fail on request.

    Returns the arguments that it is started with.
    """
    started: list[Any] = []

    def nothing(*_: Any, **__: Any) -> None:
        pass

    run = SimpleNamespace(log=log or nothing, finish=nothing, define_metric=nothing)

    def start(**arguments: Any) -> Any:
        started.append(arguments)
        return init() if init else run

    settings = type("Settings", (SimpleNamespace,), {"model_fields": {}})
    fake = SimpleNamespace(init=start, Settings=settings, teardown=nothing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return started


def _logs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # it reads the environment once


def test_offline_writes_files_and_a_second_start_goes_on_with_the_same_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sink = _sink(tmp_path)
    sink.write({"step": 10, "train/tokens": 100, "train/loss": 2.5, "router/entropy": None})
    sink.write({"step": 20, "train/tokens": 200, "train/loss": float("inf")})
    sink.close(75)
    identity = (tmp_path / "wandb" / "run_id").read_text().strip()
    time.sleep(1.1)  # W&B names its folders by the second
    again = _sink(tmp_path, resume_step=10)
    again.write({"step": 20, "train/tokens": 200, "train/loss": 2.4})
    again.close(0)
    assert [log.name for log in _logs(tmp_path)] == [f"run-{identity}.wandb"] * 2
    # W&B's service may still be writing when finish() returns.
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if all(b"train/loss" in log.read_bytes() for log in _logs(tmp_path)):
            break
        time.sleep(0.05)
    first, second = (log.read_bytes() for log in _logs(tmp_path))
    assert b"train/loss" in first
    assert b"train/loss" in second
    output = capfd.readouterr()
    assert output.out == output.err == ""


def test_loads_become_a_histogram_of_fair_shares_for_all_layers_and_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, Any]] = []
    _fake(monkeypatch, log=lambda values, step: logged.append(values))
    monkeypatch.setattr(sys.modules["wandb"], "Histogram", wandb.Histogram, raising=False)
    sink = WandbSink(
        WandbSettings(mode="offline"),
        run_name="toy",
        run_dir=tmp_path,
        config={"model": {"num_dense_layers": 3}},
    )
    sink.write({"step": 1, "router/expert_load": [[0.5, 0.25, 0.25, 0.0], [0.75, 0.25, 0.0, None]]})
    sink.write({"step": 2, "router/expert_load": [[None] * 4]})
    first, second = logged
    counted = {name: sum(of.histogram) for name, of in first.items() if name != "step"}
    assert counted == {
        "router/expert_load": 7,
        "router/expert_load/layer_03": 4,
        "router/expert_load/layer_04": 3,
    }
    assert first["router/expert_load"].bins[-1] == 3.0, "of the fair share of a quarter"
    assert second == {"step": 2}


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_online_without_key_or_network_falls_back_to_offline_in_bounded_time(
    tmp_path: Path,
    key: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(wandb_sink, "ONLINE_START_SECONDS", 2.0)
    # A port that nobody listens on, so that the test is the same on a machine with a network.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    began = time.monotonic()
    told: list[str] = []
    with caplog.at_level(logging.WARNING):
        sink = _sink(tmp_path, mode="online", told=told)
    assert time.monotonic() - began < 10
    assert caplog.text.count("W&B is not reachable") == 1
    (text,) = told  # for the terminal and events.jsonl, not for the log alone
    assert f"its files stay in {tmp_path / 'wandb'}" in text
    sink.write({"step": 1, "train/loss": 1.0})
    sink.close(0)
    assert len(_logs(tmp_path)) == 1


class _ServiceGone(BaseException):
    """What isn't even an Exception."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SystemExit(1),
        asyncio.CancelledError(),
        _ServiceGone("the service went away"),
        RecursionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_wandb_that_raises_anything_is_told_of_once_and_then_left_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    calls: list[str] = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append("log")
        raise error

    _fake(monkeypatch, log=fail)
    told: list[str] = []
    sink = _sink(tmp_path, told=told)
    for step in range(5):
        sink.write({"step": step})
    sink.close(1)
    assert calls == ["log"]
    assert caplog.text.count("continuing without it") == 1
    (text,) = told
    assert text.startswith(f"W&B could not log; continuing without it: {type(error).__name__}")

    def refuse() -> None:
        raise error

    _fake(monkeypatch, init=refuse)
    told.clear()
    sink = _sink(tmp_path, told=told)
    sink.write({"step": 1})
    sink.close(1)
    assert [text.split(";")[0] for text in told] == ["W&B could not start"]


class _Odd:
    def __str__(self) -> str:
        raise RuntimeError("has no text")

    item = tolist = None


ODD: dict[str, Any] = {
    "nothing": None, "nan": math.nan, "infinity": math.inf, "text": "fast", "bytes": b"x",
    "half a character": "\udcff", "nested": {"a": {"b": 1}}, "list": [1, "x"], "odd": _Odd(),
    "function": print, "complex": 1j, "huge": 10**5000, "array": np.arange(3),
    "two elements": torch.ones(2), "lots": 10**400,
}  # fmt: skip
NUMBERS: dict[str, Any] = {
    "true": True, "int64": np.int64(3), "float32": np.float32(0.5), "yes": np.bool_(True),
    "tensor": torch.tensor(2.5), "0-d": np.array(7),
}  # fmt: skip


def test_metrics_that_are_no_numbers_stop_no_sink_and_the_numbers_beside_them_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    _fake(monkeypatch, log=lambda values, step: logged.append((step, values)))
    told: list[str] = []
    sink, file = _sink(tmp_path, told=told), MetricsFile(tmp_path / "metrics.jsonl")
    record: dict[Any, Any] = {"step": 1, **ODD, **NUMBERS, 3: 4}
    cyclic: dict[str, Any] = {}
    record["itself"] = cyclic
    cyclic["itself"] = cyclic
    for write in (file.write, sink.write):
        write(record)
        write({"step": np.int64(2), "train/loss": 1.0})
    for step in ("three", math.nan, None, [3]):
        sink.write({"step": step, "train/loss": 1.0})
    expected = {"true": 1, "int64": 3, "float32": 0.5, "yes": 1, "tensor": 2.5, "0-d": 7, "3": 4}
    assert logged == [(1, {"step": 1, **expected}), (2, {"step": 2, "train/loss": 1.0})]
    assert told == []
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["nan"] is first["infinity"] is first["nothing"] is None
    assert (first["text"], first["nested"], first["list"]) == ("fast", {"a": {"b": 1}}, [1, "x"])
    assert (first["array"], first["tensor"], first["odd"]) == ([0, 1, 2], 2.5, "<_Odd>")
    assert second == {"step": 2, "train/loss": 1.0}


@pytest.mark.parametrize(
    ("mode", "environ", "expected", "said"),
    [
        ("auto", {}, "offline", []),
        ("auto", {"WANDB_MODE": "online"}, "online", []),
        ("auto", {"WANDB_MODE": "run"}, "online", []),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline", []),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled", []),
        ("auto", {"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "disabled", []),
        ("auto", {"WANDB_DISABLED": "false", "WANDB_MODE": ""}, "offline", []),
        ("auto", {"WANDB_MODE": "onlin"}, "offline", ["WANDB_MODE=onlin in the environment means"]),
        ("online", {"WANDB_MODE": "online"}, "online", []),
        (
            "online",
            {"WANDB_MODE": "disabled"},
            "online",
            ["observe.wandb.mode=online counts, and not WANDB_MODE=disabled"],
        ),
        ("auto", {"WANDB_NAME": "x"}, "offline", ["WANDB_NAME in the environment is ignored"]),
        ("disabled", {"WANDB_NAME": "x"}, "disabled", []),
    ],
)
def test_the_environments_mode_is_honoured_or_spoken_of(
    mode: str, environ: dict[str, str], expected: str, said: list[str]
) -> None:
    told: list[str] = []
    assert wandb_sink.wandb_mode(WandbSettings(mode=mode), environ, tell=told.append) == expected
    assert len(told) == len(said)
    assert all(text.startswith(start) for text, start in zip(told, said, strict=True))


def test_the_environments_folder_and_project_are_honoured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("WANDB_PROJECT", "lab")
    sink = _sink(tmp_path / "run", mode="auto")
    sink.write({"step": 1, "train/loss": 1.0})
    sink.close(0)
    assert len(_logs(tmp_path / "scratch")) == 1
    # What the run depends on stays with it.
    assert sorted(p.name for p in (tmp_path / "run/wandb").iterdir()) == ["run_folder", "run_id"]
    started = _fake(monkeypatch)
    _sink(tmp_path / "run")
    assert started[0]["project"] == "lab"
    WandbSink(WandbSettings(project="mine"), run_name="x", run_dir=tmp_path / "run", config={})
    assert started[1]["project"] == "mine"


def _id_of(run_dir: Path) -> str:
    (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
    return wandb_run_id(run_dir)[0]


def test_a_copied_run_folder_gets_a_wandb_run_of_its_own(tmp_path: Path) -> None:
    run, copy = tmp_path / "a", tmp_path / "b"
    first = _id_of(run)
    shutil.copytree(run, copy)
    second, told = wandb_run_id(copy)
    assert second != first
    assert told == f"this folder is a copy of {run}: it gets its own W&B run"
    # Both keep what they have from then on.
    assert wandb_run_id(copy) == (second, None)
    assert wandb_run_id(run) == (first, None)


def test_a_moved_run_folder_keeps_its_wandb_run(tmp_path: Path) -> None:
    run, moved = tmp_path / "a", tmp_path / "b"
    first = _id_of(run)
    shutil.copytree(run, moved)  # as to another file system, where nothing of it stays the same
    shutil.rmtree(run)
    kept, told = wandb_run_id(moved)
    assert kept == first
    assert told is not None
    assert f"was {run}" in told
    assert f"delete {moved / 'wandb/run_id'}" in told
    assert wandb_run_id(moved) == (first, None)
    # Its old place is another run's now.
    assert _id_of(run) != first
    (moved / "wandb/run_folder").write_text(str(run))
    assert wandb_run_id(moved)[0] == first


def test_one_run_folder_under_two_names_keeps_its_wandb_run(tmp_path: Path) -> None:
    run = tmp_path / "disk" / "a"
    first = _id_of(run)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert wandb_run_id(tmp_path / "link/a")[0] == first
    assert wandb_run_id(run)[0] == first
    assert sorted(p.name for p in (run / "wandb").iterdir()) == ["run_folder", "run_id"]


def test_no_wandb_installed_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of it then raises
    sink = _sink(tmp_path)
    sink.write({"step": 1})
    sink.close()
    assert caplog.text.count("W&B could not start; continuing without it") == 1


def test_disabled_touches_nothing(tmp_path: Path) -> None:
    sink = _sink(tmp_path / "run", mode="disabled")
    sink.write({"step": 1})
    sink.close()
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_folder_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("a file where a folder should be")
    sink = _sink(tmp_path / "run")
    sink.write({"step": 1})
    sink.close()
    assert caplog.text.count("W&B could not start") == 1
