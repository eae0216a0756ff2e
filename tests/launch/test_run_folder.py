"""A run folder that can't be used is reported before anything is built, with a way out."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.folders import require_folder
from moetrain.checks import ConfigError


def test_a_folder_that_can_be_had_is_left_as_it_was(tmp_path: Path) -> None:
    require_folder(tmp_path / "runs/mine")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs/mine").mkdir(parents=True)
    require_folder(tmp_path / "runs/mine")
    assert list((tmp_path / "runs/mine").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which is full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=20", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a disk, where it is let")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_and_a_read_only_disk_are_named_with_a_way_out(small_disk: Path) -> None:
    for number in range(30):
        try:
            (small_disk / str(number)).touch()
        except OSError:
            break
    full = rf"^run\.dir={small_disk}/runs: the run's folder mine there: no space left .* make room"
    with pytest.raises(ConfigError, match=full):
        require_folder(small_disk / "runs/mine")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    read_only = rf"^run\.dir={small_disk}/runs: .* read-only file system; use .* run\.dir=~/runs"
    with pytest.raises(ConfigError, match=read_only):
        require_folder(small_disk / "runs/mine")


@pytest.mark.parametrize(
    ("run_dir", "said"),
    [
        ("/proc/x/mine", r"^run\.dir=/proc/x: the run's folder mine there: .*; use a folder that"),
        ("/dev/null/mine", r"^run\.dir=/dev/null: the run's folder mine there: "),
        (f"runs/{'n' * 300}", r"^run\.name=n+: file name too long: use a shorter one"),
    ],
)
def test_a_folder_that_cannot_be_is_the_settings_mistake(run_dir: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        require_folder(Path(run_dir))
