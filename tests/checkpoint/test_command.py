"""`python -m moetrain.checkpoint verify=DIR`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint.__main__ import VerifySettings, main
from moetrain.checkpoint.manifest import TensorEntry
from moetrain.checkpoint.offline import write_checkpoint


def write(directory: Path, step: int) -> Path:
    return write_checkpoint(
        directory,
        step=step,
        state={"step": step},
        config={},
        mesh={},
        tensors={"a": TensorEntry(shape=(4, 2), dtype="float32")},
        read=lambda name, index: torch.arange(8.0).view(4, 2)[index],
    )


def verify(folder: Path) -> int:
    return main(VerifySettings(verify=str(folder)))


def test_good_checkpoints_are_listed_newest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        folder = write(tmp_path / "checkpoints", step)
    for given, names in (
        (tmp_path, ["step_00000002", "step_00000001"]),
        (tmp_path / "checkpoints", ["step_00000002", "step_00000001"]),
        (folder, ["step_00000002"]),
    ):
        assert verify(given) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines] == [["good", name] for name in names]
        assert lines[0].endswith("in 1 files, 1 tensors, attempt 2")


@pytest.mark.parametrize("harm", ["shard", "manifest", "latest"])
def test_what_is_damaged_is_named_and_the_command_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    for step in (1, 2):
        folder = write(tmp_path, step)
    if harm == "latest":
        (tmp_path / "latest").write_text("step_00000009")
    else:
        path = folder / ("manifest.json" if harm == "manifest" else "rank_00000.safetensors")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    assert verify(tmp_path) == 1
    out = capsys.readouterr().out
    assert "good      step_00000001" in out
    (line,) = [line for line in out.splitlines() if line.startswith("damaged")]
    assert {"shard": "rank_00000", "manifest": "manifest.json", "latest": "step_00000009"}[
        harm
    ] in line


def test_a_damaged_checkpoint_by_its_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, 1)
    (folder / "manifest.json").unlink()
    assert verify(folder) == 1
    assert "manifest.json can't be read" in capsys.readouterr().out


def test_a_folder_without_checkpoints_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(tmp_path) == 2
    assert "it has no checkpoints" in capsys.readouterr().err
    assert verify(tmp_path / "nowhere") == 2
    assert "it is not a folder" in capsys.readouterr().err


def test_the_command_line(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", 3)
    command = [sys.executable, "-m", "moetrain.checkpoint"]
    done = subprocess.run(
        [*command, f"verify={tmp_path}"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("good      step_00000003")
    wrong = subprocess.run([*command, "verfy=x"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "verify" in wrong.stderr
