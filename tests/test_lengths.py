"""A run's length and warm-up in tokens, FLOPs and shares: the steps that they are worked out to."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from moetrain.api import compose
from moetrain.checks import ConfigError
from moetrain.command import composed
from moetrain.config import check, resolve
from moetrain.model import training_flops_per_token
from moetrain.settings import Config, Resolved
from moetrain.settings.validation import validated
from moetrain.train.changes import Kind, as_plain, changes
from moetrain.train.preview import preview_of
from moetrain.train.resume import training_on
from moetrain.verify.passes import comparable
from tests.support.runs import tiny_config, tiny_values

A_STEP = 8 * 32  # positions of a tiny step


def lengthened(folder: Path, **given: Any) -> Resolved:
    """Returns a tiny configuration without a number of steps, and with other settings."""
    return tiny_config(folder, shards=folder, **{"train__num_steps": None, **given})


@pytest.mark.parametrize(
    ("given", "num_steps", "warmup"),
    [
        ({"train__num_tokens": 20 * A_STEP}, 20, 2),
        ({"train__num_tokens": 20 * A_STEP + 1}, 21, 2),
        ({"train__num_tokens": 512.0}, 2, 2),
        ({"train__num_tokens": 20 * A_STEP, "schedule__warmup_tokens": 3 * A_STEP - 1}, 20, 3),
        ({"train__num_tokens": 20 * A_STEP, "schedule__warmup_fraction": 0.25}, 20, 5),
        ({"train__num_steps": 20, "schedule__warmup_fraction": 0.0}, 20, 0),
        (
            {"train__num_steps": 20, "schedule__warmup_fraction": 0.5, "schedule__restart_from": 8},
            20,
            6,
        ),
    ],
)
def test_units_become_at_least_so_many_whole_steps(
    tmp_path: Path, given: dict[str, Any], num_steps: int, warmup: int
) -> None:
    config = lengthened(tmp_path, **given)
    assert (config.train.num_steps, config.schedule.warmup_steps) == (num_steps, warmup)
    again = resolve(config, num_workers=1, now=datetime(2026, 1, 1))
    assert again == config  # as at a resume, and for fewer ranks


def test_flops_are_those_of_all_positions_and_of_the_model_that_is_trained(tmp_path: Path) -> None:
    small = tiny_config(tmp_path, shards=tmp_path)
    a_step = A_STEP * training_flops_per_token(small.model, seq_len=32)
    assert lengthened(tmp_path, train__flops=11 * a_step).train.num_steps == 11
    assert lengthened(tmp_path, train__flops=11.001 * a_step).train.num_steps == 12
    wider = lengthened(tmp_path, train__flops=11 * a_step, model__ffn_hidden_dim=320)
    assert wider.train.num_steps < 11
    values = tiny_values(tmp_path, shards=tmp_path, train__num_steps=None, train__flops=11 * a_step)
    assert comparable(validated(values, Config), lr=0.1).train.num_steps == 11
    assert preview_of(wider).tokens * preview_of(wider).flops_per_token >= 11 * a_step


def test_a_length_in_tokens_changes_nothing_but_its_own_mention(tmp_path: Path) -> None:
    steps, tokens = (
        tiny_config(tmp_path, shards=tmp_path),
        lengthened(tmp_path, train__num_tokens=8 * A_STEP),
    )
    found = changes(as_plain(steps), as_plain(tokens))
    assert [(c.name, c.kind) for c in found] == [("train.num_tokens", Kind.incidental)]
    assert ", for train.num_tokens=2048; " in list(preview_of(tokens).lines())[1]
    assert " for " not in list(preview_of(steps).lines())[1].partition(";")[0]


@pytest.mark.parametrize(
    ("given", "proposed"),
    [
        ({"train__num_tokens": 8 * A_STEP}, "schedule.restart_from=8 train.num_tokens=4096"),
        ({"train__num_steps": 8}, "schedule.restart_from=8 train.num_steps=16"),
        ({"train__flops": 1e8}, "schedule.restart_from=8 train.flops=2e+08"),
    ],
)
def test_a_finished_run_is_trained_on_in_its_own_unit(
    tmp_path: Path, given: dict[str, Any], proposed: str
) -> None:
    assert training_on(lengthened(tmp_path, **given), step=8) == proposed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train__num_steps": None}, "train.num_steps=(missing): must be given, or"),
        (
            {"train__num_tokens": 1e3, "train__flops": 1e9},
            "train.num_tokens=1000.0: can't hold beside train.flops=1000000000.0",
        ),
        (
            {"schedule__warmup_tokens": 1e3, "schedule__warmup_fraction": 0.1},
            "can't hold beside schedule.warmup_fraction=0.1",
        ),
        ({"train__num_tokens": 3 * A_STEP, "schedule__warmup_steps": 4}, "use at most 3"),
        ({"train__num_tokens": 0}, "greater than 0"),
    ],
)
def test_lengths_that_contradict_each_other_are_refused(
    tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check(validated(tiny_values(tmp_path, shards=tmp_path, **given), Config))
    assert said in str(refused.value)


def test_the_command_lines_unit_takes_the_place_of_the_files(tmp_path: Path) -> None:
    toy = compose()  # 500 steps of 16 x 256, 50 of warm-up
    assert compose("train.num_tokens=1e6").train.num_steps == 245
    assert compose("train.num_tokens=1_000_000").train.num_steps == 245
    assert compose("schedule.warmup_fraction=0.2").schedule.warmup_steps == 100
    assert compose("train.num_steps=7", "schedule.warmup_steps=3").train.num_steps == 7
    with pytest.raises(ConfigError, match=r"can't hold beside train\.num_tokens: give one"):
        compose("train.num_steps=7", "train.num_tokens=1e6")
    files = tmp_path / "conf"
    (files / "experiment").mkdir(parents=True)
    root = Path(__file__).parents[1] / "conf"
    for part in ("config.yaml", "model", "data", "optim", "schedule", "parallel", "launch"):
        (files / part).symlink_to(root / part)
    (files / "cluster").symlink_to(root / "cluster")
    train = {"num_tokens": "1e6", "num_steps": 500, "global_batch_size": 16, "seq_len": 256}
    text = yaml.safe_dump({"train": train, "schedule": {"warmup_tokens": 4097}})
    (files / "experiment/toy.yaml").write_text(f"# @package _global_\n{text}")
    filed = resolve(composed([], tree=Config, files=files), num_workers=1, now=datetime(2026, 1, 1))
    assert (filed.train.num_steps, filed.schedule.warmup_steps) == (245, 2)
    typed = composed(["train.num_steps=9", "schedule.warmup_steps=4"], tree=Config, files=files)
    found = resolve(typed, num_workers=1, now=datetime(2026, 1, 1))
    assert (found.train.num_steps, found.train.num_tokens) == (9, None)
    assert (found.schedule.warmup_steps, found.schedule.warmup_tokens) == (4, None)
    assert toy.train.num_steps == 500
