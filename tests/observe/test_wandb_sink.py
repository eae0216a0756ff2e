import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from moetrain.observe import WandbSettings, WandbSink, wandb_sink


def _sink(run_dir: Path, *, mode: str = "offline", resume_step: int | None = None) -> WandbSink:
    return WandbSink(
        WandbSettings(mode=mode),
        run_name="toy",
        run_dir=run_dir,
        config={"model": {"dim": 8}},
        resume_step=resume_step,
    )


def _logs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
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


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_online_without_key_or_network_falls_back_to_offline_in_bounded_time(
    tmp_path: Path, key: str | None, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(wandb_sink, "ONLINE_START_SECONDS", 2.0)
    # A port that nobody listens on, so that the test is the same on a machine with a network.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        sink = _sink(tmp_path, mode="online")
    assert time.monotonic() - began < 10
    assert caplog.text.count("W&B is not reachable") == 1
    sink.write({"step": 1, "train/loss": 1.0})
    sink.close(0)
    assert len(_logs(tmp_path)) == 1


def test_a_wandb_that_raises_is_warned_of_once_and_then_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    calls: list[str] = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append("log")
        raise OSError(28, "No space left on device")

    run = SimpleNamespace(log=fail, finish=fail, define_metric=lambda *_, **__: None)
    fake = SimpleNamespace(
        init=lambda **_: run, Settings=type("Settings", (SimpleNamespace,), {"model_fields": {}})
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = _sink(tmp_path)
    for step in range(5):
        sink.write({"step": step})
    sink.close(1)
    assert calls == ["log"]
    assert caplog.text.count("going on without it") == 1


def test_no_wandb_installed_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of it then raises
    sink = _sink(tmp_path)
    sink.write({"step": 1})
    sink.close()
    assert caplog.text.count("W&B could not start; going on without it") == 1


def test_disabled_touches_nothing(tmp_path: Path) -> None:
    sink = _sink(tmp_path / "run", mode="disabled")
    sink.write({"step": 1})
    sink.close()
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_folder_stops_nothing(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "run").write_text("a file where a folder should be")
    sink = _sink(tmp_path / "run")
    sink.write({"step": 1})
    sink.close()
    assert caplog.text.count("W&B could not start") == 1
