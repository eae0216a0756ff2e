"""Runs over several sources on real ranks: the same tokens on any layout, and after any restart."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import BuildSettings, DataError, ShardFolder, build_shards
from data_pipeline.settings import SourceSettings
from moetrain.checkpoint.folders import candidates
from moetrain.checkpoint.manifest import read_manifest
from moetrain.checks import ConfigError
from moetrain.config import resolve
from moetrain.settings import Config, Resolved
from moetrain.settings.validation import validated
from moetrain.train.control import Outcome
from moetrain.train.prepare import global_batches, prepare
from tests.support.ranks import run_ranks
from tests.support.runs import (
    Changes,
    events_of,
    metrics_of,
    tiny_config,
    tiny_values,
    train_as_rank,
)
from tests.train.test_runs import assert_same_tensors

MIXTURE: dict[str, Any] = {
    "data__weights": {"prose": 3.0, "code": 1.0},
    "data__stages": [{"from_step": 5, "weights": {"code": 1.0}}],
    "data__packing": "best_fit",
    "data__mask_documents": True,
    # SGD, so that rounding stays rounding from layout to layout.
    "optim__name": "sgd",
    "optim__lr": 0.1,
    "model__router__bias_update_rate": 0.0,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    sources = {}
    for name, words in (("prose", "a quick brown fox"), ("code", "def return import x")):
        (folder / name).mkdir()
        for number in range(240):
            chosen = random.choice(words.split(), size=random.integers(1, 8))
            (folder / name / f"{number:03d}.txt").write_text(f"{number} " + " ".join(chosen))
        sources[name] = SourceSettings(corpus=str(folder / name))
    to = folder / "shards"
    settings = BuildSettings(
        sources=sources, tokenizer="bytes", to=str(to), validation_fraction=0.2
    )
    build_shards(settings, progress=False)
    return to


def run(
    folder: Path,
    shards: Path,
    *,
    world: int = 2,
    stop_at: int | None = None,
    attempt: int = 1,
    **changes: Any,
) -> Outcome:
    config = tiny_config(folder, shards=shards, num_workers=world, **MIXTURE | changes)
    return run_ranks(train_as_rank, world, config, stop_at, attempt)[0]


def of_data(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k.startswith("data/")} for r in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, shards, train__validate_every_steps=8).finished
    return folder


def test_tokens_of_each_source_are_counted_as_they_are_drawn(whole: Path, shards: Path) -> None:
    """By hand, from the batches themselves; they add up, and follow the stages."""
    records = metrics_of(whole)
    config = tiny_config(whole, shards=shards, num_workers=2, **MIXTURE)
    prepared = prepare(replace(config, run=replace(config.run, name="other")), config.data,
                       progress=False)  # fmt: skip
    batches = global_batches(config, prepared.shards, position=None)
    expected = dict.fromkeys(prepared.shards.sources, 0)
    for step, record in enumerate(records):
        batch = batches.read(8 * step, rank=0, num_ranks=1)
        for number, source in enumerate(prepared.shards.sources):
            expected[source] += int(batch.loss_mask[batch.sources == number].sum())
            assert record[f"data/{source}/tokens"] == expected[source]
        assert record["train/tokens"] == sum(expected.values())
        assert set(batch.sources.tolist()) == ({0, 1} if step < 5 else {1})
    drawn = batches.drawn(64)
    assert drawn == {"prose": 30, "code": 34}
    for source, number in drawn.items():
        epochs = records[-1][f"data/{source}/epochs"]
        assert epochs == pytest.approx(number / batches.num_sequences[source])
        assert prepared.plan[source].epochs == pytest.approx(epochs)
    assert prepared.plan["prose"].weights == {0: 0.75, 5: 0.0}
    assert "data/corrupt_sequences" not in records[-1]


def test_each_source_is_validated_by_itself(whole: Path, shards: Path) -> None:
    last = metrics_of(whole)[-1]
    folder = ShardFolder.open(shards)
    # At the last step all samples are of one source, and so is the pooled loss.
    assert last["validation/loss"] == last["validation/code/loss"]
    for source in folder.sources:
        bits = last[f"validation/{source}/loss"] / np.log(2)
        num_bytes = folder.num_bytes("validation", source=source)
        bits *= folder.num_tokens("validation", source=source) / num_bytes
        assert last[f"validation/{source}/bits_per_byte"] == pytest.approx(bits)


@pytest.mark.parametrize(
    ("world", "degrees"),
    [(1, {"train__micro_batch_size": 2, "parallel__recompute": "full"}),
     (2, {"parallel__expert_degree": 2})],
)  # fmt: skip
def test_another_layout_reads_the_same_tokens_and_finds_the_same_losses(
    tmp_path: Path, shards: Path, whole: Path, world: int, degrees: dict[str, Any]
) -> None:
    run(tmp_path, shards, world=world, **degrees)
    assert_alike(metrics_of(tmp_path), metrics_of(whole))


def test_documents_are_masked_in_training_and_validation_where_that_is_set(
    tmp_path: Path, shards: Path
) -> None:
    one_step: Changes = {"train__num_steps": 1, "data__stages": [], "optim__lr": 1e-30}
    one_step |= {"schedule__warmup_steps": 0}
    records = []
    for masked in (True, False):
        folder = tmp_path / str(masked)
        run(folder, shards, world=1, data__mask_documents=masked, **one_step)
        records += metrics_of(folder)
    ours, across = records
    assert of_data([ours]) == of_data([across])
    for name in ("train/cross_entropy", "validation/prose/loss", "validation/code/loss"):
        assert ours[name] != pytest.approx(across[name], rel=1e-5)


def test_stopped_and_gone_on_equals_never_stopped_bit_for_bit(
    tmp_path: Path, shards: Path, whole: Path
) -> None:
    """In the first stage, with other threads reading and another window to read ahead."""
    validated_at: Changes = {"train__validate_every_steps": 8}
    run(tmp_path, shards, stop_at=3, data__num_workers=0, **validated_at)
    reading: Changes = {"data__num_workers": 3, "data__prefetch_batches": 5}
    assert run(tmp_path, shards, attempt=2, **reading, **validated_at).finished
    assert metrics_of(tmp_path) == metrics_of(whole)
    assert_same_tensors(tmp_path, whole)
    assert "data_order" not in [e["event"] for e in events_of(tmp_path)]


def test_going_on_with_other_ranks_keeps_tokens_and_losses(
    tmp_path: Path, shards: Path, whole: Path
) -> None:
    run(tmp_path, shards, world=2, stop_at=6)  # in the second stage
    assert run(tmp_path, shards, world=1, attempt=2).finished
    assert_alike(metrics_of(tmp_path), metrics_of(whole))


def test_weights_changed_between_restarts_neither_repeat_nor_skip_a_sample(
    tmp_path: Path, shards: Path
) -> None:
    stop = run(tmp_path, shards, world=1, stop_at=3, data__stages=[])
    assert not stop.finished
    changed: Changes = {"data__weights": {"code": 1.0, "prose": 1.0}, "data__stages": []}
    changed |= {"train__global_batch_size": 4, "train__num_steps": 9}
    assert run(tmp_path, shards, world=1, attempt=2, **changed).finished
    (event,) = [e for e in events_of(tmp_path) if e["event"] == "data_order"]
    assert event["step"] == 3
    assert "mixed prose 0.5, code 0.5, not prose 0.75, code 0.25" in event["reason"]
    newest, *_, first = candidates(tmp_path / "runs/tiny/checkpoints")
    assert read_manifest(first).state["position"]["drawn"] == {"prose": 18, "code": 6}
    # Six more steps of four samples, half of them of each source, on top of what was drawn.
    assert read_manifest(newest).state["position"]["drawn"] == {"prose": 30, "code": 18}


@pytest.mark.parametrize(
    ("change", "key"),
    [({"data__packing": "stream"}, "data.packing=stream"),
     ({"data__shuffle_window": 1}, "data.shuffle_window=1"),
     ({"seed": 1}, "seed=1"),
     ({"train__seq_len": 64}, "train.seq_len=64")],
)  # fmt: skip
def test_what_decides_the_order_of_samples_cannot_change(
    whole: Path, shards: Path, change: dict[str, Any], key: str
) -> None:
    config = tiny_config(whole, shards=shards, **MIXTURE | change)
    with pytest.raises(ConfigError, match=f"{key}: .*some would come twice"):
        prepare(config, config.data, progress=False)


def test_what_does_not_decide_it_can(whole: Path, shards: Path) -> None:
    free: Changes = {
        "data__mask_documents": False,
        "data__num_workers": 0,
        "train__global_batch_size": 4,
    }
    free |= {"data__weights": {"prose": 1.0}, "data__stages": [], "train__num_steps": 20}
    config = tiny_config(whole, shards=shards, **MIXTURE | free)
    prepared = prepare(config, config.data, progress=False)
    # 30 sequences were drawn in 8 steps of 8, and 12 steps of 4 follow.
    packing = prepared.plan["prose"].packing
    assert packing is not None
    num_sequences = packing["num_sequences"]
    assert prepared.plan["prose"].epochs == pytest.approx((30 + 48) / num_sequences)


def test_a_run_cannot_go_on_in_other_tokens(whole: Path, shards: Path, tmp_path: Path) -> None:
    """Told apart from other text: the vocabulary alone would not show it."""
    other = tmp_path / "shards"
    other.mkdir()
    for file in shards.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    index = json.loads((other / "index.json").read_text())
    index["tokenizer"]["fingerprint"] = "f" * 64
    (other / "index.json").write_text(json.dumps(index))
    config = tiny_config(whole, shards=other, **MIXTURE)
    with pytest.raises(ConfigError, match="trained with a tokenizer of fingerprint"):
        prepare(config, config.data, progress=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"data__weights": {"prose": 1.0, "cod": 1.0}}, "did you mean 'code'"),
     ({"data__weights": {"prose": 0.0, "code": 1.0}}, r"data\.weights\.prose=0.* above zero"),
     ({"data__weights": {"prose": -1.0}}, r"data\.weights\.prose=-1.* above zero"),
     ({"data__max_epochs": 0.1}, "is over at step"),
     ({"train__seq_len": 64, "data__stages": [{"from_step": 2, "weights": {}}]}, "no source")],
)  # fmt: skip
def test_a_mixture_that_cannot_be_is_refused_before_any_rank_starts(
    tmp_path: Path, shards: Path, change: dict[str, Any], said: str
) -> None:
    config = tiny_config(tmp_path, shards=shards, **MIXTURE | change)
    with pytest.raises(DataError, match=said):
        prepare(config, config.data, progress=False)
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_never_begins_and_a_weight_that_is_no_number_are_refused(
    tmp_path: Path, shards: Path
) -> None:
    late = {"data__stages": [{"from_step": 8, "weights": {"code": 1.0}}]}
    with pytest.raises(ConfigError, match=r"data\.stages\[0\]\.from_step=8: .*at most 7"):
        tiny_config(tmp_path, shards=shards, **MIXTURE | late)
    values = tiny_values(tmp_path, shards=shards, data__weights={"code": float("nan")})
    with pytest.raises(ConfigError, match=r"data\.weights\.code=nan: .*finite"):
        validated(values, Config)


def test_shards_at_a_url_are_left_where_they_are(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, shards="s3://bucket/shards")
    assert config.data.dir == "s3://bucket/shards"
    here = replace(config, data=replace(config.data, dir="here"))
    config = resolve(here, num_workers=1, now=datetime(2026, 1, 1))
    assert config.data.dir == str(Path("here").absolute())


def damage(shards: Path, to: Path) -> Path:
    """Returns a copy of shards in which a byte of every fourth document of prose is flipped."""
    to.mkdir()
    for file in shards.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tar = to / "prose-train-00000.tar"
    table = np.load(to / "prose-train-00000.documents.npy")
    content = bytearray(tar.read_bytes())
    for offset in table[::4, 0]:
        content[int(offset)] ^= 1
    tar.write_bytes(content)
    return to


def test_damaged_sequences_are_skipped_and_counted_over_ranks_and_restarts(
    tmp_path: Path, shards: Path
) -> None:
    corrupted = damage(shards, tmp_path / "corrupted")
    prose: Changes = {"data__weights": {"prose": 1.0}, "data__stages": [], "train__num_steps": 12}
    skip = prose | {"data__on_corrupt": "skip"}
    run(tmp_path, corrupted, **skip)
    counts = [r.get("data/corrupt_sequences", 0) for r in metrics_of(tmp_path)]
    tokens = [r["data/prose/tokens"] for r in metrics_of(tmp_path)]
    assert counts[-1] > counts[0]
    padded = 12 * 8 * 32 - tokens[-1]
    assert padded >= 32 * counts[-1]

    run(tmp_path / "parts", corrupted, world=1, stop_at=6, **skip)
    run(tmp_path / "parts", corrupted, world=2, attempt=2, **skip)
    assert of_data(metrics_of(tmp_path / "parts")) == of_data(metrics_of(tmp_path))


def forget_position(config: Resolved) -> dict[str, Any]:
    """Saves as a version without mixtures did, and resumes from there."""
    from moetrain.train import state

    as_json = state.TrainState.as_json
    new = ("position", "source_tokens", "corrupt_sequences", "tokenizer")
    state.TrainState.as_json = lambda self: {k: v for k, v in as_json(self).items() if k not in new}
    train_as_rank(config, 3, 1)
    state.TrainState.as_json = as_json
    return {}


def test_a_checkpoint_that_does_not_say_where_it_stands_is_refused(
    tmp_path: Path, shards: Path
) -> None:
    """Those of versions before there were mixtures: their samples came in another order."""
    config = tiny_config(tmp_path, shards=shards, **MIXTURE)
    run_ranks(forget_position, 1, config)
    with pytest.raises(ConfigError, match=r"run\.name=tiny: .*step 3 is of a version before 0\.1"):
        prepare(config, config.data, progress=False)


def assert_alike(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same data exactly, the same losses up to rounding."""
    assert of_data(ours) == of_data(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["train/tokens"] == other["train/tokens"]
        for name in ("train/loss", "router/load_balance_loss"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5)


def test_batches_of_which_no_token_counts_are_passed_over(tmp_path: Path, shards: Path) -> None:
    """Whole batches of a lost shard: the run continues, and never takes them for divergence."""
    corpora = ShardFolder.open(shards).index.build.sources
    settings = BuildSettings(
        sources={"prose": corpora["prose"]}, tokenizer="bytes", to=str(tmp_path / "shards"),
        validation_fraction=0.2, shard_tokens=1500,
    )  # fmt: skip
    folder = build_shards(settings, progress=False)
    lost, *_ = folder.source("prose").splits["train"].shards
    (folder.path / lost.file).unlink()
    outcome = run(
        tmp_path, folder.path, data__weights={}, data__stages=[], data__packing="stream",
        data__on_corrupt="skip", data__shuffle_window=1, train__num_steps=60,
        train__global_batch_size=2, train__max_skipped_steps=2,
    )  # fmt: skip
    assert outcome.finished
    records = metrics_of(tmp_path)
    reasons = [e["reason"] for e in events_of(tmp_path) if e["event"] == "step_skipped"]
    assert len(reasons) > 2
    assert set(reasons) == {"none of its tokens counts: all of its documents are damaged"}
    assert records[-1]["train/skipped_steps"] == len(reasons)
    assert records[-1]["data/corrupt_sequences"] >= 2 * len(reasons)
    assert all(np.isfinite(value).all() for record in records for value in record.values())
