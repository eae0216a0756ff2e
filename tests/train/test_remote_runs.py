"""A run whose checkpoints are uploaded, and gone on with where there is nothing but the upload."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moetrain.checkpoint.remote import (
    RemoteUnavailableError,
    fetch_newer,
    is_newer_there,
    take_over,
)
from moetrain.config import Config
from tests.support.ranks import run_ranks
from tests.support.runs import events_of, metrics_of, tiny_config, train_as_rank, write_shards
from tests.train.test_runs import assert_same_tensors


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


def start(config: Config, *, attempt_is: int, stop_at: int | None = None) -> Any:
    """Starts a run as the driver does."""
    run, directory = "tiny", Path(config.run.dir, "tiny", "checkpoints")
    if is_newer_there(config.checkpoint, run=run, directory=directory):
        fetch_newer(
            config.checkpoint,
            run=run,
            directory=directory,
            event=lambda *_, **__: None,
            say=lambda _: None,
        )
    attempt = take_over(config.checkpoint, run=run, directory=directory)
    assert attempt == attempt_is
    return run_ranks(train_as_rank, 2, config, stop_at, attempt)[0]


def test_a_run_goes_on_where_there_is_nothing_but_its_upload(tmp_path: Path, shards: Path) -> None:
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    (tmp_path / "bucket").mkdir()
    there = {"checkpoint__upload_to": f"file://{tmp_path}/bucket", "checkpoint__keep_last": 2}
    run_ranks(train_as_rank, 2, tiny_config(whole, shards=shards, num_workers=2), None, 1)

    config = tiny_config(first, shards=shards, num_workers=2, **there)
    assert start(config, attempt_is=1, stop_at=5).step == 5
    remote = tmp_path / "bucket/tiny/checkpoints"
    assert (remote / "latest").read_text() == "step_00000005_attempt_1"
    shutil.rmtree(first)

    config = tiny_config(second, shards=shards, num_workers=2, **there)
    assert start(config, attempt_is=2).finished
    assert metrics_of(second) == metrics_of(whole)[5:]
    assert_same_tensors(second, whole)
    assert [e["step"] for e in events_of(second) if e["event"] == "resume"] == [5]
    assert {e["step"] for e in events_of(second) if e["event"] == "upload"} >= {5, 8}
    assert (remote / "latest").read_text() == "step_00000008_attempt_2"
    assert len(list(remote.glob("step_*"))) == 2


def test_a_folder_that_is_up_to_date_fetches_nothing(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "bucket").mkdir()
    config = tiny_config(
        tmp_path,
        shards=shards,
        train__num_steps=2,
        checkpoint__upload_to=f"file://{tmp_path}/bucket",
    )
    directory = tmp_path / "runs/tiny/checkpoints"
    assert not is_newer_there(config.checkpoint, run="tiny", directory=directory)
    run_ranks(train_as_rank, 1, config, None, 1)
    assert not is_newer_there(config.checkpoint, run="tiny", directory=directory)
    assert is_newer_there(config.checkpoint, run="tiny", directory=tmp_path / "elsewhere")


def test_an_outage_ends_a_start_but_not_a_restart(tmp_path: Path, shards: Path) -> None:
    gone = {"checkpoint__upload_to": f"file://{tmp_path}/bucket"}
    config = tiny_config(tmp_path, shards=shards, **gone)
    take = partial(take_over, config.checkpoint, run="tiny", directory=tmp_path / "checkpoints")
    with pytest.raises(RemoteUnavailableError, match="bucket is no folder on this machine"):
        take()
    assert [take(may_be_alone=True), take(may_be_alone=True)] == [2, 3]
    (tmp_path / "bucket").mkdir()
    assert take() == 4
