"""What a run may change when it resumes: what is refused, what is accepted, what is reported."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.checkpoint.folders import candidates
from moetrain.checkpoint.manifest import Manifest, read_manifest
from moetrain.checks import ConfigError
from moetrain.config import check, refit
from moetrain.optim import learning_rate
from moetrain.settings import ScheduleSettings
from moetrain.train.changes import as_plain
from moetrain.train.prepare import prepare
from moetrain.train.resume import require_done_alike, require_same_model, told_changes
from tests.support.ranks import run_ranks
from tests.support.runs import (
    Changes,
    events_of,
    metrics_of,
    tiny_config,
    train_as_rank,
    write_shards,
)
from tests.train.test_runs import assert_same_tensors, load

STOP = 4
MODEL: Changes = {
    "model__num_experts": 8,
    "model__router__num_groups": 4,
    "model__router__top_groups": 2,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


RECIPE = {
    "model__router__load_balance_loss_weight": 0.02, "model__router__jitter_noise": 0.1,
    "model__router__bias_update_rate": 0.002, "optim__lr": 0.02, "train__global_batch_size": 4,
    "train__num_steps": 9, "data__mask_documents": True,
}  # fmt: skip
FUNCTION = {"model__router__normalize_gates": False, "train__num_steps": 6}
ACCEPT = {"checkpoint__accept_changes": ["model.router.normalize_gates"]}
LAYOUT = {
    "parallel__recompute": "full", "observe__log_every_steps": 2, "checkpoint__every_steps": 2,
    "data__num_workers": 0, "model__loss_chunk_size": 64, "run__threads_per_rank": 1,
}  # fmt: skip
FRESH = {"optim__restart_from": STOP}
RESTARTED = FRESH | {
    "optim__name": "sgd", "optim__momentum": 0.9, "optim__lr": 0.1, "train__num_steps": 10,
    "schedule__restart_from": STOP, "schedule__warmup_steps": 2,
}  # fmt: skip
GROUPED = FRESH | {  # Muon is two optimizers by itself, beside a third
    "optim__name": "muon", "optim__groups": {
        "embedding": {"frozen": True}, "router": {"lr_factor": 0.5, "optimizer": "sgd"},
    },
}  # fmt: skip
# The changes with which a copy of the stopped run resumes, and its last step, attempt by attempt.
GOING_ON: dict[str, list[tuple[int | None, dict[str, Any]]]] = {
    "recipe": [(None, RECIPE)],
    "function": [(None, FUNCTION | ACCEPT), (None, FUNCTION | {"train__num_steps": 8})],
    "layout": [(None, LAYOUT)],
    "fresh": [(None, FRESH)],
    "restarted": [(None, RESTARTED)],
    "restarted twice": [(7, RESTARTED), (None, RESTARTED)],
    "grouped": [(None, GROUPED)],
    "grouped twice": [(6, GROUPED), (None, GROUPED)],
}


def train_all(top: Path, shards: Path) -> None:
    """Trains as the only rank: a run up to its stop, and each copy of it on to its end."""

    def train(name: str, stop_at: int | None, attempt: int, **changes: Any) -> None:
        config = tiny_config(top / name, shards=shards, **MODEL | changes)
        train_as_rank(config, stop_at, attempt)

    train("stopped", STOP, 1)
    for name, attempts in GOING_ON.items():
        shutil.copytree(top / "stopped", top / name)
        for attempt, (stop_at, changes) in enumerate(attempts, start=2):
            train(name, stop_at, attempt, **changes)


@pytest.fixture(scope="module")
def gone_on(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the folders of GOING_ON."""
    top = tmp_path_factory.mktemp("gone_on")
    run_ranks(train_all, 1, top, shards)
    return top


@pytest.fixture
def manifest(gone_on: Path) -> Manifest:
    """The checkpoint of the run that was stopped at step 4 of 8."""
    return newest(gone_on / "stopped")


def newest(folder: Path) -> Manifest:
    return read_manifest(candidates(folder / "runs/tiny/checkpoints")[0])


def told(folder: Path) -> list[dict[str, Any]]:
    return [event for event in events_of(folder) if event["event"] == "settings_changed"]


def test_a_checkpoint_holds_with_what_its_run_went_on_otherwise(gone_on: Path) -> None:
    for name in GOING_ON:
        events = told(gone_on / name)
        held = [{"step": e["step"], "changes": e["changes"]} for e in events]
        assert newest(gone_on / name).state["changes"] == held
    assert any(told(gone_on / name) for name in GOING_ON)


@pytest.mark.parametrize(
    ("setting", "value", "before"),
    [
        ("router__score_function", "sigmoid", "softmax"),
        ("router__normalize_gates", False, "true"),
        ("router__routed_scaling_factor", 2.5, "1.0"),
        ("router__num_groups", 2, "4"),
        ("router__top_groups", 4, "2"),
        ("router__force_balance", True, "false"),
        ("top_k", 1, "2"),
        ("rope_theta", 1e6, "10000.0"),
        ("norm_eps", 1e-6, "1e-05"),
    ],
)
def test_a_setting_that_changes_what_the_weights_compute_has_to_be_accepted(
    tmp_path: Path, shards: Path, manifest: Manifest, setting: str, value: Any, before: str
) -> None:
    changed = MODEL | {"model__router__normalize_gates": True, f"model__{setting}": value}
    if setting == "top_k":  # which needs another setting beside it
        changed["model__router__normalize_gates"] = False
    config = tiny_config(tmp_path, shards=shards, **changed)
    name = f"model.{setting.replace('__', '.')}"
    with pytest.raises(ConfigError) as refused:
        require_same_model(config, manifest)
    said = str(refused.value)
    assert f"{setting.replace('__', '.')} is {before}" in said
    assert f"use {name}={before}" in said
    assert "another run.name" in said
    assert "checkpoint.accept_changes='[" in said
    assert f"python -m moetrain.branch run={tmp_path}/runs/tiny step=4" in said
    names = [name] if setting != "top_k" else [name, "model.router.normalize_gates"]
    accepted = replace(config.checkpoint, accept_changes=names)
    config = replace(config, checkpoint=accepted)
    check(config)
    require_same_model(config, manifest)
    assert [change.name for change in told_changes(config, manifest)] == names


def test_weights_of_another_shape_can_not_be_accepted(
    tmp_path: Path, shards: Path, manifest: Manifest
) -> None:
    accept: Changes = {"checkpoint__accept_changes": ["model.ffn_hidden_dim"]}
    wider = tiny_config(tmp_path, shards=shards, **MODEL, **accept, model__ffn_hidden_dim=64)
    with pytest.raises(ConfigError, match="its tensors have other shapes") as refused:
        require_same_model(wider, manifest)
    assert "accept_changes" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.router.normalise_gates", "did you mean 'model.router.normalize_gates'"),
        ("model.router", "is none of the settings"),
        ("model.router.z_loss_weight", "is none of the settings"),
        ("seed", "is none of the settings"),
    ],
)
def test_what_needs_no_leave_can_not_be_accepted(
    tmp_path: Path, shards: Path, name: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.accept_changes") as refused:
        tiny_config(tmp_path, shards=shards, checkpoint__accept_changes=[name])
    assert said in str(refused.value)


def test_another_order_of_samples_is_refused(
    tmp_path: Path, shards: Path, manifest: Manifest
) -> None:
    for setting, value in (("seed", 3), ("train__seq_len", 16), ("data__shuffle_window", 2)):
        config = tiny_config(tmp_path, shards=shards, **MODEL | {setting: value})
        with pytest.raises(ConfigError, match="some would come twice"):
            require_same_model(config, manifest)


def test_a_checkpoint_of_step_0_is_bound_to_no_recipe_but_to_its_model(
    tmp_path: Path, shards: Path, manifest: Manifest
) -> None:
    imported = replace(manifest, step=0, state={"step": 0, "samples": 0, "tokens": 0})
    free: Changes = {"seed": 3, "optim__lr": 1e-4, "optim__name": "sgd"}
    config = tiny_config(tmp_path, shards=shards, **MODEL, **free)
    require_same_model(config, imported)
    assert told_changes(config, imported) == []
    other = tiny_config(tmp_path, shards=shards, **MODEL, model__router__normalize_gates=False)
    with pytest.raises(ConfigError, match=r"normalize_gates is true"):
        require_same_model(other, imported)


def test_a_changed_recipe_is_told_in_one_line_and_is_an_event(gone_on: Path) -> None:
    (event,) = told(gone_on / "recipe")
    assert event["step"] == STOP
    assert event["changes"] == {
        "model.router.load_balance_loss_weight": [0.01, 0.02],
        "model.router.jitter_noise": [0.0, 0.1],
        "model.router.bias_update_rate": [0.001, 0.002],
        "train.num_steps": [8, 9],
        "train.global_batch_size": [8, 4],
        "optim.lr": [0.01, 0.02],
        "data.mask_documents": [False, True],
    }
    assert event["reason"].startswith("from step 4 on: ")
    assert "optim.lr 0.01 → 0.02" in event["reason"]
    assert "\n" not in event["reason"]
    assert metrics_of(gone_on / "recipe")[-1]["step"] == 9


def test_an_accepted_change_is_told_once_and_holds_from_then_on(gone_on: Path) -> None:
    first, second = told(gone_on / "function")
    assert first["changes"] == {
        "model.router.normalize_gates": [True, False],
        "train.num_steps": [8, 6],
    }
    assert second["changes"] == {"train.num_steps": [6, 8]}, "needs no leave any more"
    assert second["step"] == 6


def test_another_layout_is_nothing_to_be_told(
    gone_on: Path, manifest: Manifest, shards: Path
) -> None:
    assert told(gone_on / "layout") == []
    assert metrics_of(gone_on / "layout")[-1]["step"] == 8
    config = tiny_config(gone_on / "stopped", shards=shards, num_workers=4, **MODEL)
    for num_workers in (4, 2, 1):  # as an elastic run shrinks and grows
        fitting = refit(config, num_workers)
        assert fitting is not None
        require_same_model(fitting, manifest)
        assert told_changes(fitting, manifest) == []


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("optim__lr", 0.02, "was trained with optim.lr=0.01 (not 0.02)"),
        ("train__num_steps", 3, "was trained with train.num_steps=8 (not 3)"),
        ("model__router__z_loss_weight", 0.1, "model.router.z_loss_weight=0.001 (not 0.1)"),
    ],
)
def test_a_run_that_has_all_its_steps_is_refused_other_settings(
    tmp_path: Path, shards: Path, manifest: Manifest, setting: str, value: Any, said: str
) -> None:
    finished = replace(manifest, step=8)
    config = tiny_config(tmp_path, shards=shards, **MODEL | {"schedule__warmup_steps": 0})
    finished = replace(finished, config=as_plain(config))
    require_done_alike(config, finished)
    changed = MODEL | {"schedule__warmup_steps": 0, setting: value}
    with pytest.raises(ConfigError) as refused:
        require_done_alike(tiny_config(tmp_path, shards=shards, **changed), finished)
    said_all = str(refused.value)
    assert said in said_all
    assert "train on with the new ones: schedule.restart_from=8 train.num_steps=16" in said_all
    more = changed | {"train__num_steps": 9}
    require_done_alike(tiny_config(tmp_path, shards=shards, **more), finished)


# ── Another optimizer, and a new schedule ─────────────────────────────────────────────────────


def test_another_optimizer_is_refused_as_such_and_a_fresh_state_is_offered(
    tmp_path: Path, shards: Path, gone_on: Path, manifest: Manifest
) -> None:
    sgd = tiny_config(tmp_path, shards=shards, **MODEL, optim__name="sgd")
    with pytest.raises(ConfigError) as refused:
        require_same_model(sgd, manifest)
    assert str(refused.value).startswith(
        "optim.name=sgd: run tiny was trained with optim.name=adamw up to step 4, and another "
        "optimizer can't use the state of that one"
    )
    assert "use optim.name=adamw, add optim.restart_from=4 to resume" in str(refused.value)
    assert "another model" not in str(refused.value)
    faster = tiny_config(tmp_path, shards=shards, **MODEL, optim__name="sgd", optim__lr=0.5)
    with pytest.raises(ConfigError, match=r"use optim.name=adamw optim.lr=[0-9.e-]+, add"):
        require_same_model(faster, manifest)
    betas: Changes = {"optim__betas": (0.8, 0.99), "optim__eps": 1e-6, "optim__weight_decay": 0.0}
    require_same_model(tiny_config(tmp_path, shards=shards, **MODEL, **betas), manifest)
    still = MODEL | RESTARTED | {"optim__momentum": 0.0, "train__num_steps": 12}
    with pytest.raises(ConfigError, match=r"optim.momentum=0.9.*optim.restart_from=10 to resume"):
        require_same_model(
            tiny_config(tmp_path, shards=shards, **still), newest(gone_on / "restarted")
        )


def test_another_group_of_parameters_is_refused_and_a_fresh_state_is_offered(
    tmp_path: Path, shards: Path, gone_on: Path, manifest: Manifest
) -> None:
    grouped = newest(gone_on / "grouped")
    for before, name, router, key in (
        (manifest, "adamw", {"frozen": True}, "groups.router.frozen"),
        (manifest, "adamw", {"optimizer": "sgd"}, "groups.router.optimizer"),
        (grouped, "muon", {"optimizer": "sgd"}, "groups.embedding.frozen"),
    ):
        config = tiny_config(
            tmp_path, shards=shards, **MODEL, train__num_steps=20,
            optim__name=name, optim__groups={"router": router},
        )  # fmt: skip
        step = rf"add optim.restart_from={before.step} to resume with a fresh optimizer state"
        with pytest.raises(ConfigError, match=rf"^optim.{key}=.*{step}"):
            require_same_model(config, before)
    factors = {"router": {"lr_factor": 0.1, "weight_decay_factor": 0.0}}
    require_same_model(
        tiny_config(tmp_path, shards=shards, **MODEL, optim__groups=factors), manifest
    )


def test_a_frozen_group_stays_and_a_resume_with_groups_is_bit_equal(gone_on: Path) -> None:
    stopped, grouped = (
        load(candidates(gone_on / name / "runs/tiny/checkpoints")[0])
        for name in ("stopped", "grouped")
    )
    for name, before in stopped.items():
        if name.startswith("model.") and not name.endswith("router.bias"):
            is_frozen = name == "model.embedding.weight"
            assert torch.equal(grouped[name], before) == is_frozen, name
    kept = {name.split(".", 1)[1] for name in grouped if name.startswith("optimizer.")}
    assert not any(name.startswith("embedding") or "router" in name for name in kept)
    assert_same_tensors(gone_on / "grouped twice", gone_on / "grouped")


def test_a_fresh_optimizer_state_begins_at_its_step(gone_on: Path) -> None:
    steps = {
        name: {float(t) for n, t in load(candidates(folder)[0]).items() if n.endswith(".step")}
        for name in ("layout", "fresh")
        for folder in [gone_on / name / "runs/tiny/checkpoints"]
    }
    assert steps == {"layout": {8.0}, "fresh": {8.0 - STOP}}


def test_later_resumes_keep_the_state_and_the_schedule_of_a_restart(gone_on: Path) -> None:
    whole, twice = (gone_on / name for name in ("restarted", "restarted twice"))
    assert metrics_of(twice) == metrics_of(whole)
    assert_same_tensors(twice, whole)
    assert [e["step"] for e in events_of(twice) if e["event"] == "resume"] == [4, 7]
    (event,) = told(twice)
    assert event["changes"]["optim.name"] == ["adamw", "sgd"]
    assert event["changes"]["schedule.restart_from"] == [None, 4]
    assert event["reason"].endswith("; the learning rate goes from 0.0094 to 0.05")
    rates = [record["optim/lr"] for record in metrics_of(whole)][STOP:]
    schedule = ScheduleSettings(warmup_steps=2)
    assert rates == [
        learning_rate(step, peak=0.1, num_steps=6, settings=schedule) for step in range(6)
    ]


@pytest.mark.parametrize("group", ["schedule", "optim"])
def test_a_restart_is_of_the_step_that_the_run_stands_at(
    tmp_path: Path, shards: Path, gone_on: Path, manifest: Manifest, group: str
) -> None:
    def demand(step: int, found: Manifest, folder: Path = tmp_path, **changes: Any) -> None:
        settings = MODEL | {f"{group}__restart_from": step, "train__num_steps": 12} | changes
        require_same_model(tiny_config(folder, shards=shards, **settings), found)

    demand(4, manifest)
    with pytest.raises(
        ConfigError, match=rf"^{group}.restart_from=5: .* has not come so far: use 4"
    ):
        demand(5, manifest)
    with pytest.raises(ConfigError, match=r"use 4, or another run.name: .* kept \(there are: none"):
        demand(3, manifest)
    at_0 = replace(manifest, step=0, state={"step": 0, "samples": 0, "tokens": 0})
    with pytest.raises(ConfigError, match="leave it out"):
        demand(4, at_0)
    # The run had this restart when its newest checkpoint was saved; of others it must stand there.
    sgd: Changes = {"optim__name": "sgd", "optim__momentum": 0.9}
    demand(4, newest(gone_on / "restarted"), **sgd)
    demand(10, newest(gone_on / "restarted"), **sgd)
    there = gone_on / "restarted"
    with pytest.raises(ConfigError, match=r"7 on were .* use 10, .* \(there are: 6, 9, 10\)"):
        demand(7, newest(there), there, **sgd)
    (tmp_path / "runs/tiny-2").mkdir(parents=True)
    (tmp_path / "runs/tiny").symlink_to(there / "runs/tiny")
    with pytest.raises(ConfigError, match=r"moetrain.branch .* step=6 to=\S*/runs/tiny-3"):
        demand(6, newest(there), **sgd)


def test_a_new_run_has_nothing_to_restart_from(tmp_path: Path, shards: Path) -> None:
    for name in ("schedule", "optim"):
        config = tiny_config(tmp_path, shards=shards, **{f"{name}__restart_from": 4})
        with pytest.raises(ConfigError, match=rf"{name}\.restart_from=4: .*no checkpoint"):
            prepare(config, config.data, progress=False)
