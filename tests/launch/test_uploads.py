"""Runs whose checkpoints are uploaded: resumed elsewhere, repaired, refused, uploaded late."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moetrain.checkpoint.folders import Save
from moetrain.checkpoint.remote.folder import RemoteUnavailableError
from moetrain.checkpoint.remote.of_run import is_newer_there, take_over
from moetrain.checks import ConfigError
from tests.support.commands import train_command
from tests.support.runs import Changes, events_of, metrics_of, tiny_config, write_shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def moetrain(folder: Path, shards: Path, bucket: Path | None, **changes: Any) -> tuple[int, str]:
    """Runs the training command in a process of its own; returns exit code and output."""
    changes = {"schedule__name": "constant"} | changes
    if bucket is not None:
        changes["checkpoint__upload_to"] = f"file://{bucket}"
    return train_command(folder, shards=shards, **changes)


def test_a_run_goes_on_where_there_is_nothing_but_its_upload(
    tmp_path: Path, shards: Path, bucket: Path
) -> None:
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    assert moetrain(whole, shards, None)[0] == 0
    keep = {"checkpoint__keep_last": 2}
    assert moetrain(first, shards, bucket, train__num_steps=5, **keep)[0] == 0
    remote = bucket / "tiny/checkpoints"
    assert (remote / "latest").read_text() == "step_00000005_attempt_1"

    code, output = moetrain(second, shards, bucket, **keep)
    assert code == 0, output
    assert "downloading a checkpoint" in output
    assert metrics_of(second) == metrics_of(whole)[5:]
    assert [e["step"] for e in events_of(second) if e["event"] == "resume"] == [5]
    assert (remote / "latest").read_text() == "step_00000008_attempt_2"
    assert len(list(remote.glob("step_*"))) == 2
    assert (second / "runs/tiny/checkpoints/attempt").read_text() == "2"


def test_a_damaged_newest_checkpoint_is_healed_from_its_upload(
    tmp_path: Path, shards: Path, bucket: Path
) -> None:
    moetrain(tmp_path, shards, bucket, train__num_steps=5)
    file = tmp_path / "runs/tiny/checkpoints/step_00000005/rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert moetrain(tmp_path, shards, bucket)[0] == 0
    assert [e["step"] for e in events_of(tmp_path) if e["event"] == "resume"] == [5]
    assert [e["checkpoint"] for e in events_of(tmp_path) if e["event"] == "download"] == [
        "step_00000005"
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint__resume": "never"}, "has checkpoints in file://"),
        ({"model__ffn_hidden_dim": 64}, "is of another model"),
        ({"model__router__normalize_gates": False}, "checkpoint.accept_changes="),
        ({"train__num_steps": 2, "schedule__warmup_steps": 1}, "has all its steps"),
    ],
)
def test_what_can_not_go_on_downloads_nothing(
    tmp_path: Path, shards: Path, bucket: Path, changes: dict[str, Any], says: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    moetrain(first, shards, bucket, train__num_steps=2, schedule__warmup_steps=0)
    code, output = moetrain(second, shards, bucket, **changes)
    assert code == 2
    assert says in output
    assert not list(second.rglob("*.safetensors"))
    assert not list(second.rglob("step_*"))


def test_a_finished_run_is_uploaded_late(tmp_path: Path, shards: Path, bucket: Path) -> None:
    few = {"train__num_steps": 2, "schedule__warmup_steps": 0}
    assert moetrain(tmp_path, shards, None, **few)[0] == 0
    code, output = moetrain(tmp_path, shards, bucket, **few)
    assert code == 0
    assert "uploaded  its last checkpoint" in output
    assert (bucket / "tiny/checkpoints/latest").read_text() == "step_00000002_attempt_1"
    shutil.rmtree(bucket)
    code, output = moetrain(tmp_path, shards, bucket, **few)
    assert code == 2
    assert f"checkpoint.upload_to=file://{bucket}: is no folder on this machine" in output


def test_a_run_at_its_beginning_is_not_replaced_by_another_ones_upload(
    tmp_path: Path, shards: Path, bucket: Path
) -> None:
    moetrain(tmp_path, shards, bucket, train__num_steps=2, schedule__warmup_steps=0)
    upload_to: Changes = {"checkpoint__upload_to": f"file://{bucket}"}
    settings = tiny_config(tmp_path, shards=shards, **upload_to).checkpoint
    with pytest.raises(ConfigError, match="the one here stands at its beginning"):
        is_newer_there(settings, run="tiny", good=Save(0, 1))
    assert is_newer_there(settings, run="tiny", good=None)
    assert not is_newer_there(settings, run="tiny", good=Save(2, 1))
    assert not is_newer_there(settings, run="other", good=Save(0, 1))


def test_an_outage_ends_a_start_but_not_a_restart(tmp_path: Path, shards: Path) -> None:
    gone: Changes = {"checkpoint__upload_to": f"file://{tmp_path}/bucket"}
    config = tiny_config(tmp_path, shards=shards, **gone)
    take = partial(take_over, config.checkpoint, run="tiny", directory=tmp_path / "checkpoints")
    with pytest.raises(RemoteUnavailableError, match="bucket is no folder on this machine"):
        take()
    assert [take(may_be_alone=True), take(may_be_alone=True)] == [2, 3]
    (tmp_path / "bucket").mkdir()
    assert take() == 4
