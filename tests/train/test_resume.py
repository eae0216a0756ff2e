"""What a resumed run must restore, on real ranks; and what a run does that can't save."""

import concurrent.futures
import importlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from moetrain.checkpoint.folders import candidates
from moetrain.checkpoint.manifest import CheckpointError, read_manifest
from moetrain.model import random_stream
from moetrain.optim import learning_rate
from moetrain.settings import Resolved
from moetrain.train import loop, micro_batch, rank
from moetrain.train.build import build_trainer
from tests.support.ranks import run_ranks
from tests.support.runs import events_of, metrics_of, tiny_config, train_as_rank, write_shards
from tests.train.test_runs import assert_same_tensors


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@contextmanager
def changed(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def each_trainer(change: Callable[[Any], None]) -> Iterator[None]:
    """Changes each trainer in this process after its checkpoint has been loaded."""

    def build_and_change(*arguments: Any, **options: Any) -> Any:
        trainer = build_trainer(*arguments, **options)
        change(trainer)
        return trainer

    with changed(rank, "build_trainer", build_and_change):
        yield


# ── What a checkpoint forgets ─────────────────────────────────────────────────────────────────

STOP = 3
SAMPLES = STOP * 8
# Everything that a step depends on has a part in the loss: a rate that changes, a bias that is
# large, noise, and Adam's moments.
TELLING = {"model__router__bias_update_rate": 0.5, "model__router__jitter_noise": 0.2}


def zero_optimizer(trainer: Any) -> None:
    for state in trainer.optimizer.state.values():
        for value in state.values():
            value.zero_()


def zero_balance(trainer: Any) -> None:
    for layer in trainer.model.moe_layers():
        layer.router.bias.zero_()


def read_from_the_start(trainer: Any) -> None:
    """Reads other samples, and nothing else: noise and counters continue where they were."""
    read = trainer.prefetcher.read
    trainer.prefetcher.read = lambda sample: read(sample - SAMPLES)


@contextmanager
def schedule_from_the_start() -> Iterator[None]:

    with changed(loop, "learning_rate", lambda step, **rest: learning_rate(step - STOP, **rest)):
        yield


@contextmanager
def noise_from_the_start() -> Iterator[None]:

    def restarted(seed: int, kind: str, sample: int) -> int:
        return random_stream(seed, kind, sample - SAMPLES)

    with changed(micro_batch, "random_stream", restarted):
        yield


FORGETTING: dict[str, Callable[[], Any]] = {
    "nothing": lambda: each_trainer(lambda _: None),
    "optimizer": lambda: each_trainer(zero_optimizer),
    "schedule": schedule_from_the_start,
    "data position": lambda: each_trainer(read_from_the_start),
    "random numbers": noise_from_the_start,
    "balance": lambda: each_trainer(zero_balance),
}


def train_whole_and_begin(whole: Resolved, begun: Resolved) -> None:
    train_as_rank(whole, None, 1)
    train_as_rank(begun, STOP, 1)


def go_on_forgetting(configs: dict[str, Resolved]) -> None:
    for part, config in configs.items():
        with FORGETTING[part]():
            train_as_rank(config, None, 2)


@pytest.fixture(scope="module")
def resumed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a stop in `whole`, and in the folders of FORGETTING those that had one."""
    top = tmp_path_factory.mktemp("resumed")

    def config(name: str) -> Resolved:
        return tiny_config(top / name, shards=shards, num_workers=2, **TELLING)

    run_ranks(train_whole_and_begin, 2, config("whole"), config("begun"))
    for part in FORGETTING:
        shutil.copytree(top / "begun", top / part)
    run_ranks(go_on_forgetting, 2, {part: config(part) for part in FORGETTING})
    return top


def losses(folder: Path) -> list[float]:
    return [record["train/loss"] for record in metrics_of(folder)]


def test_a_checkpoint_that_forgets_nothing_keeps_the_curve_bit_for_bit(resumed: Path) -> None:
    assert metrics_of(resumed / "nothing") == metrics_of(resumed / "whole")
    assert_same_tensors(resumed / "nothing", resumed / "whole")


@pytest.mark.parametrize("part", [part for part in FORGETTING if part != "nothing"])
def test_what_a_checkpoint_forgets_changes_the_curve(resumed: Path, part: str) -> None:
    """The test above can fail: leaving out any one part of the state shows in the losses."""
    ours, whole = losses(resumed / part), losses(resumed / "whole")
    assert len(ours) == len(whole)
    assert ours[:STOP] == whole[:STOP]
    assert ours[STOP:] != whole[STOP:]


# ── Other ranks ───────────────────────────────────────────────────────────────────────────────


def train_and_keep_tokens(config: Resolved, stop_at: int | None, attempt: int) -> dict[int, Any]:
    """Trains as a rank; returns tokens, targets and mask of its part of each step."""
    seen: dict[int, Any] = {}

    def watch(trainer: Any) -> None:
        read = trainer.prefetcher.read

        def kept(sample: int) -> Any:
            batch = read(sample)
            assert trainer.state.step not in seen
            parts = (batch.tokens, batch.targets, batch.loss_mask)
            seen[trainer.state.step] = np.stack([np.array(p, dtype=np.int64) for p in parts], 1)
            return batch

        trainer.prefetcher.read = kept

    with each_trainer(watch):
        train_as_rank(config, stop_at, attempt)
    return seen


def test_the_number_of_ranks_may_change_in_the_middle_and_no_token_comes_twice(
    tmp_path: Path, shards: Path
) -> None:
    """1, 2, 4 and 1 ranks, saving asynchronously at every step: one stream of tokens."""
    sgd = {
        "optim__name": "sgd", "optim__lr": 0.1, "model__router__jitter_noise": 0.2,
        "model__router__bias_update_rate": 0.0, "checkpoint__every_steps": 1,
    }  # fmt: skip

    def train(folder: Path, world: int, stop_at: int | None, attempt: int) -> dict[int, Any]:
        config = tiny_config(folder, shards=shards, num_workers=world, **sgd)
        parts = run_ranks(train_and_keep_tokens, world, config, stop_at, attempt)
        assert all(part.keys() == parts[0].keys() for part in parts)
        return {step: np.concatenate([part[step] for part in parts]) for step in parts[0]}

    whole = train(tmp_path / "whole", 1, None, 1)
    assert sorted(whole) == list(range(8))
    moved: dict[int, Any] = {}
    for attempt, (world, stop_at) in enumerate(((1, 2), (2, 4), (4, 6), (1, None)), start=1):
        part = train(tmp_path / "moved", world, stop_at, attempt)
        assert not part.keys() & moved.keys()
        moved |= part
    assert sorted(moved) == sorted(whole)
    for step, tokens in whole.items():
        np.testing.assert_array_equal(moved[step], tokens, err_msg=f"step {step}")
    for ours, expected in zip(
        metrics_of(tmp_path / "moved"), metrics_of(tmp_path / "whole"), strict=True
    ):
        assert ours["train/tokens"] == expected["train/tokens"]
        assert ours["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    worlds = {
        manifest.step: manifest.mesh["world_size"]
        for manifest in map(read_manifest, candidates(tmp_path / "moved/runs/tiny/checkpoints"))
    }
    assert worlds == {8: 1, 7: 1, 6: 4}


def train_and_resume(begun: Resolved, resumed: Resolved) -> list[int]:
    """Returns how many weights were initialised for a new run, and for its resume."""
    made: list[int] = []
    module = importlib.import_module("moetrain.parallel.parallelize")  # a function has its name
    values = module.initial_values

    def counted(*arguments: Any, **options: Any) -> Any:
        made[-1] += 1
        return values(*arguments, **options)

    with changed(module, "initial_values", counted):
        for attempt, (config, stop) in enumerate(((begun, STOP), (resumed, None)), start=1):
            made.append(0)
            train_as_rank(config, stop, attempt)
    return made


def test_a_resume_initialises_no_weight_that_its_checkpoint_has(
    tmp_path: Path, shards: Path
) -> None:
    config = tiny_config(tmp_path, shards=shards, num_workers=2)
    for begun, resumed in run_ranks(train_and_resume, 2, config, config):
        assert begun > 0
        assert resumed == 0


# ── Asynchronous saves ────────────────────────────────────────────────────────────────────────


def test_what_is_kept_of_a_run_and_where_its_stalls_are_told(tmp_path: Path, shards: Path) -> None:
    config = tiny_config(
        tmp_path, shards=shards, num_workers=2, train__num_steps=13, checkpoint__every_steps=2,
        checkpoint__keep_last=2, checkpoint__keep_every=6,
    )  # fmt: skip
    assert run_ranks(train_as_rank, 2, config, None, 1)[0].finished
    names = [folder.name for folder in candidates(tmp_path / "runs/tiny/checkpoints")]
    assert names == ["step_00000013", "step_00000012", "step_00000006"]
    assert [e["step"] for e in events_of(tmp_path) if e["event"] == "save"] == [
        2, 4, 6, 8, 10, 12, 13,
    ]  # fmt: skip
    lines = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    stalls = {
        record["step"]: record["checkpoint/stall_seconds"]
        for record in map(json.loads, lines)
        if "checkpoint/stall_seconds" in record
    }
    assert list(stalls) == [3, 5, 7, 9, 11, 13], "in the record that comes after the save"
    assert all(0 < seconds < 60 for seconds in stalls.values())


def train_until_a_save_fails(config: Resolved) -> tuple[str, tuple[str, int]]:
    """Trains as a rank; from the save of step 6 on rank 1 can't write a file of any size."""
    phases: list[tuple[str, int]] = []

    def watch(trainer: Any) -> None:
        beat = trainer.control.heartbeat

        def watched(phase: str, step: int) -> None:
            if (phase, step) == ("save", 6) and dist.get_rank() == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            if (phase, step) == ("between steps", 6):
                # The save is still being written while training continues.
                concurrent.futures.wait(trainer.checkpoints._running)
            phases.append((phase, step))
            beat(phase, step)

        trainer.control.heartbeat = watched

    with each_trainer(watch):
        try:
            train_as_rank(config, None, 1)
        except CheckpointError as error:
            return str(error), phases[-1]
    return "no error", phases[-1]


def test_a_save_that_fails_in_the_background_ends_the_run_at_its_next_step(
    tmp_path: Path, shards: Path
) -> None:
    config = tiny_config(tmp_path, shards=shards, num_workers=2, train__num_steps=20)
    first, second = run_ranks(train_until_a_save_fails, 2, config)
    assert first == second
    message, last = first
    assert "checkpoint of step 6 can't be written" in message
    assert "File too large" in message
    assert last == ("ending", 6), "no step was begun after it was known"
    assert [record["step"] for record in metrics_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    (kept,) = candidates(tmp_path / "runs/tiny/checkpoints")
    assert kept.name == "step_00000003"
