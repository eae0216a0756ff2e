"""A user's `launch.py`, or ROS's package `launch`, is not taken for ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOUND = """
import moetrain, launch, data_pipeline
from moetrain.own_packages import ROOT, are_shadowed
print(*(Path(m.__file__).relative_to(ROOT) for m in (launch, data_pipeline)), are_shadowed())
"""


def python(folder: Path, script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path\n{script}"],
        cwd=folder, env=os.environ | environ, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("where", ["folder", "PYTHONPATH", "nowhere"])
def test_a_users_launch_does_not_shadow_ours(tmp_path: Path, where: str) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "launch").mkdir(parents=True)
    (theirs / "launch/__init__.py").write_text("raise RuntimeError('the package of ROS')")
    (theirs / "data_pipeline.py").write_text("raise RuntimeError('a script of the user')")
    folder = theirs if where == "folder" else tmp_path
    environ = {"PYTHONPATH": str(theirs)} if where == "PYTHONPATH" else {}
    done = python(folder, FOUND, **environ)
    assert done.returncode == 0, done.stderr
    shadowed = where != "nowhere"
    assert done.stdout.split() == [
        "launch/__init__.py", "data_pipeline/__init__.py", str(shadowed),
    ]  # fmt: skip


def test_another_package_that_is_imported_already_is_named(tmp_path: Path) -> None:
    (tmp_path / "launch.py").touch()
    done = python(tmp_path, "import launch\nimport moetrain")
    assert done.returncode == 1
    assert f"has imported {tmp_path / 'launch.py'} under that name" in done.stderr
