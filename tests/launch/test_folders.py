"""Folders for temporary files and for Ray's sockets are seen to before anything starts."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from ray._private.utils import validate_socket_filepath

from launch.folders import require_ray_folder, settle_temporary_folder
from launch.plan import choose_plan
from moetrain.checks import ConfigError
from moetrain.settings import LaunchSettings

RAY = LaunchSettings(mode="ray", num_workers=2, address="local")


@pytest.fixture(autouse=True)
def _forgets_the_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)  # Python looks for it once
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_too_long_for_rays_sockets_is_named_with_a_shorter_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / ("n" * 60)
    folder.mkdir()
    monkeypatch.setenv(name, str(folder))
    size = len(str(folder))
    with pytest.raises(ConfigError) as refused:
        choose_plan(RAY, device="cpu")
    text = str(refused.value)
    assert text.startswith(f"{name}={folder}: ")
    assert f"of {size} bytes" in text
    assert "at most 39, such as RAY_TMPDIR=/tmp" in text
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert choose_plan(RAY, device="cpu").mode == "ray"


def takes(check: Callable[[], None]) -> bool:
    try:
        check()
    except (ConfigError, OSError):
        return False
    return True


def test_the_longest_folder_that_ray_takes_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 4194304)
    session = "session_2026-12-31_23-59-59_999999_4194304"
    for size, is_taken in ((39, True), (40, False)):
        folder = "/tmp/" + "n" * (size - 5)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        socket = f"{folder}/ray/{session}/sockets/plasma_store"
        rays = takes(partial(validate_socket_filepath, socket))
        assert [takes(require_ray_folder), rays] == [is_taken, is_taken]
        assert not Path(folder).exists()


def test_a_folder_that_ray_cannot_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR=/proc/nowhere: .*RAY_TMPDIR=/tmp$"):
        choose_plan(RAY, device="cpu")


def test_a_temporary_folder_that_is_not_there_is_replaced_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    assert choose_plan(RAY, device="cpu").mode == "ray"
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == "/tmp"
    assert choose_plan(RAY, device="cpu").mode == "ray"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"moetrain: TMPDIR={tmp_path / 'gone'} isn't a folder")
    assert "temporary files go to /tmp" in said[0]


def test_a_temporary_folder_that_is_there_is_kept_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/")
    settle_temporary_folder()
    assert os.environ["TMPDIR"] == f"{tmp_path}/"
    assert capsys.readouterr().err == ""


def test_where_no_folder_takes_temporary_files_tmpdir_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/a", "/proc/b"])
    with pytest.raises(ConfigError, match=r"^TMPDIR=/nowhere: no folder .*set TMPDIR to"):
        settle_temporary_folder()


def test_the_command_ends_with_2_and_begins_nothing(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 60)
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "moetrain", "experiment=toy", "launch.mode=ray", "run.dir=runs"],
        cwd=tmp_path, env=os.environ | {"RAY_TMPDIR": str(folder)}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"moetrain: RAY_TMPDIR={folder}: Ray puts sockets below")
    assert sorted(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []
