"""Where runs begin and end: the validation of step 0, and a length in seconds, on two ranks."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import BuildSettings, build_shards
from moetrain.checkpoint.folders import candidates
from moetrain.checkpoint.manifest import Manifest, read_manifest
from moetrain.checks import ConfigError
from moetrain.settings import Resolved
from moetrain.train.deadline import Deadline
from moetrain.train.preview import preview_of
from moetrain.train.resume import (
    is_complete,
    require_done_alike,
    training_on,
    what_is_complete,
)
from tests.support.ranks import run_ranks
from tests.support.runs import metrics_of, tiny_config, train_as_rank, write_shards
from tests.train.test_runs import assert_same_tensors

START: dict[str, Any] = {"train__validate_at_start": True}
AT_ONCE = START | {"train__max_seconds": 1e-9}  # over before the first step
LATER = START | {"train__max_seconds": 1e6}


def settings(folder: Path, shards: Path, **changes: Any) -> Resolved:
    return tiny_config(folder, shards=shards, num_workers=2, **changes)


def test_the_time_of_a_checkpoint_counts_and_one_ranks_clock(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, shards=tmp_path, train__max_seconds=1e6)
    assert Deadline(config.train, seconds=1e6, leads=True).is_over
    assert not Deadline(config.train, seconds=1e6, leads=False).is_over
    fresh = Deadline(config.train, seconds=5e5, leads=True)
    fresh.begin()
    assert not fresh.is_over
    assert 5e5 <= fresh.seconds < 1e6
    fresh.end_with(20)
    assert fresh.seconds == fresh.seconds, "the last step's time doesn't count"
    assert fresh.last_step == 8, "time adds no steps"


def train_all(top: Path, shards: Path, bare: Path) -> dict[str, tuple[bool, int]]:
    """Trains as one of two ranks; returns which runs finished, and at which step."""
    import torch.distributed as dist

    ends: dict[str, tuple[bool, int]] = {}

    def train(
        name: str, shards: Path, *, stop: int | None = None, attempt: int = 1, **of: Any
    ) -> None:
        outcome = train_as_rank(settings(top / name, shards, **of), stop, attempt)
        ends[f"{name} {attempt}"] = (outcome.finished, outcome.step)

    train("plain", shards)
    train("whole", shards, **START)
    train("bare", bare, train__num_steps=2, **START)
    train("parts", shards, stop=2, **START)
    dist.barrier()
    if dist.get_rank() == 0:  # as if killed before its first checkpoint
        shutil.rmtree(top / "parts/runs/tiny/checkpoints")
    dist.barrier()
    train("parts", shards, stop=4, attempt=2, **START)
    train("parts", shards, attempt=3, **START)
    train("timed", shards, **AT_ONCE)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(top / "timed", top / "more")
    dist.barrier()
    train("more", shards, attempt=2, **LATER)
    return ends


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with the runs of `train_all`, and how they ended on each rank."""
    top = tmp_path_factory.mktemp("lengths")
    bare = BuildSettings(
        corpus=str(shards.parent / "corpus"), tokenizer="bytes", to=str(top / "bare-shards"),
        validation_fraction=0.0,
    )  # fmt: skip
    build_shards(bare, progress=False)
    first, second = run_ranks(train_all, 2, top, shards, top / "bare-shards")
    assert first == second
    return top, first


def manifest(folder: Path) -> Manifest:
    return read_manifest(candidates(folder / "runs/tiny/checkpoints")[0])


def test_the_weights_that_a_run_begins_with_are_validated_and_stay_the_same(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    top, _ = trained
    first, *others = metrics_of(top / "whole")
    assert others == metrics_of(top / "plain")
    assert_same_tensors(top / "whole", top / "plain")
    assert (first["step"], first["train/tokens"]) == (0, 0)
    last = {name for name in others[-1] if name.startswith("validation/")}
    assert first.keys() == {"step", "train/tokens"} | last
    assert first["validation/loss"] > math.log(257), "nothing is learned yet"
    assert [record["step"] for record in metrics_of(top / "bare")] == [1, 2]  # nothing held out


def test_step_0_is_recorded_once_also_where_a_run_began_twice(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    top, ends = trained
    assert (ends["parts 2"], ends["parts 3"]) == ((False, 4), (True, 8))
    assert metrics_of(top / "parts") == metrics_of(top / "whole")
    assert_same_tensors(top / "parts", top / "whole")


def test_the_step_after_the_time_is_the_last_recorded_validated_and_saved(
    trained: tuple[Path, dict[str, Any]], shards: Path
) -> None:
    top, ends = trained
    assert ends["timed 1"] == (True, 1)
    assert metrics_of(top / "timed")[0] == metrics_of(top / "whole")[0]
    begun, whole = metrics_of(top / "timed")[1], metrics_of(top / "whole")[1]
    assert {k: v for k, v in begun.items() if not k.startswith("validation/")} == whole
    assert begun["validation/loss"] > 0
    saved = manifest(top / "timed")
    assert (saved.step, saved.state["seconds"] > 0) == (1, True)
    assert manifest(top / "whole").state["seconds"] == 0, "the same bits on any machine"

    config = settings(top / "timed", shards, **AT_ONCE)
    assert is_complete(config, saved)
    require_done_alike(config, saved)
    assert what_is_complete(config, step=1) == "has had its train.max_seconds=1e-09, up to step 1"
    assert training_on(config, step=1) == "train.max_seconds=2e-09"
    assert ", at most train.max_seconds=1e-09; " in list(preview_of(config).lines())[1]
    other = settings(top / "timed", shards, **AT_ONCE, optim__lr=0.5)
    with pytest.raises(ConfigError, match=r"has had its time, \S+ s, up to 1, and was trained"):
        require_done_alike(other, saved)


def test_with_more_time_a_run_trains_on_as_if_it_had_had_it(
    trained: tuple[Path, dict[str, Any]], shards: Path
) -> None:
    top, ends = trained
    assert ends["more 2"] == (True, 8)
    assert not is_complete(settings(top / "timed", shards, **LATER), manifest(top / "timed"))
    assert_same_tensors(top / "more", top / "whole")
    steps = [record["step"] for record in metrics_of(top / "more")]
    assert steps == list(range(9))
