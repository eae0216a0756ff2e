"""Arms of a comparison: what they set, and the size at which one matches another."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from moetrain.checks import ConfigError
from moetrain.command import composed, config_dir, run_command
from moetrain.config import check
from moetrain.lengths import in_steps
from moetrain.matching import matched, measure
from moetrain.settings import Config, MatchSettings
from moetrain.settings.match import MEASURES
from moetrain.settings.validation import validated
from moetrain.train_command import sweep, train
from tests.support.runs import tiny_values, write_shards

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": 1, "top_k": 1},
    "top 1 of 16": {"num_experts": 16, "top_k": 1, "router": {"normalize_gates": False}},
    "shared": {"num_shared_experts": 2},
    "first layer dense": {"num_dense_layers": 1, "dense_ffn_hidden_dim": 48},
    "wider": {"dim": 40, "head_dim": 20},
}


def tiny(folder: Path, *, model: dict[str, Any] | None = None, **match: Any) -> Config:
    values = tiny_values(folder, shards=folder)
    values["model"] |= {"num_layers": 3, "ffn_hidden_dim": 200} | (model or {})
    config = in_steps(validated(values, Config))
    check(config)
    return replace(config, match=MatchSettings(to="target", tolerance=0.5, **match))


def sized(arm: Config, **sizes: Any) -> Config:
    return replace(arm, model=replace(arm.model, **sizes))


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_found_is_the_nearest_of_all(tmp_path: Path, shape: str, by: str) -> None:
    target = tiny(tmp_path)
    for solve, multiple in (("ffn_hidden_dim", 8), ("ffn_hidden_dim", 50), ("num_layers", 1)):
        arm = tiny(tmp_path, model=SHAPES[shape], by=by, solve=solve, multiple_of=multiple)
        least = arm.model.num_dense_layers + 1 if solve == "num_layers" else 1
        distances = {
            size: abs(measure(sized(arm, **{solve: size}), by) - wanted)
            for wanted in [measure(target, by)]
            for size in range(multiple, 1200 if solve == "ffn_hidden_dim" else 40, multiple)
            if size >= least
        }
        found = matched(arm, target)
        assert found.setting == f"model.{solve}"
        assert found.value == min(distances, key=distances.__getitem__), (solve, multiple)


def test_fewer_or_more_steps_match_the_flops_of_training(tmp_path: Path) -> None:
    target, dense = tiny(tmp_path), tiny(tmp_path, model=SHAPES["dense"], by="training_flops")
    arm = replace(dense, match=replace(dense.match, solve="num_steps"))
    found = matched(arm, target)
    assert found.setting == "train.num_steps"
    a_step = measure(arm, "training_flops") / 8
    assert found.value == round(measure(target, "training_flops") / a_step)
    nothing = replace(arm, match=replace(arm.match, by="flops_per_token"))
    with pytest.raises(ConfigError, match=r"match\.by=training_flops, or another"):
        matched(nothing, target)


def test_an_arm_that_is_equal_already_is_left_as_it_is(tmp_path: Path) -> None:
    arm = tiny(tmp_path, model={"router": {"score_function": "sigmoid"}}, multiple_of=7)
    assert matched(arm, tiny(tmp_path)).setting is None


def test_arms_that_cannot_match_are_refused_with_the_nearest_two(tmp_path: Path) -> None:
    arm = tiny(tmp_path, model=SHAPES["dense"], multiple_of=300)
    with pytest.raises(ConfigError) as refused:
        matched(replace(arm, match=replace(arm.match, tolerance=0.01)), tiny(tmp_path))
    said = str(refused.value)
    assert "that is a multiple of 300 comes within match.tolerance=0.01 of that: " in said
    for candidate in ("model.ffn_hidden_dim=300 gives ", "and model.ffn_hidden_dim=600 gives "):
        assert candidate in said
    for way in ("match.multiple_of", "match.tolerance", "match.solve"):
        assert way in said

    arm = tiny(tmp_path, model={"dim": 320, "head_dim": 160})
    with pytest.raises(ConfigError) as refused:
        matched(replace(arm, match=replace(arm.match, tolerance=0.01)), tiny(tmp_path))
    assert "multiple_of" not in str(refused.value), "no smaller one would do"


ARMS = """# @package _global_
defaults: [toy]
arms:
  moe:
  dense: {model.num_experts: 1, model: {top_k: 1}}
  shared: {model.num_shared_experts: 1, optim.lr: 1e-4, data.weights: {en: 1, fr: 2}}
  short: {train.num_steps: 7, schedule.warmup_steps: 1}
  mistaken: {model.num_expert: 8}
  grouped: {optim: sgd}
  worded: {train.num_steps: many}
train: {num_tokens: 1e6}
match: {multiple_of: 1}
run: {name: "five-${arm}-${seed}"}
"""


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the project's groups, and a file of arms among its experiments."""
    folder = tmp_path_factory.mktemp("arms") / "conf"
    (folder / "experiment").mkdir(parents=True)
    for part in (ROOT / "conf").iterdir():
        if part.name != "experiment":
            (folder / part.name).symlink_to(part)
    (folder / "experiment/toy.yaml").symlink_to(ROOT / "conf/experiment/toy.yaml")
    (folder / "experiment/arms.yaml").write_text(ARMS)
    return folder


def arm(conf: Path, *words: str) -> Config:
    return composed(["experiment=arms", *words], tree=Config, files=conf)


def test_an_arms_settings_take_the_place_of_the_files_and_not_of_the_command_lines(
    conf: Path,
) -> None:
    dense = arm(conf, "arm=dense")
    assert (dense.model.num_experts, dense.model.top_k, dense.run.name) == (1, 1, "five-dense-0")
    shared = arm(conf, "arm=shared", "seed=3")
    assert (shared.optim.lr, shared.data.weights, shared.run.name) == (
        1e-4, {"en": 1, "fr": 2}, "five-shared-3",
    )  # fmt: skip
    typed = arm(conf, "arm=shared", "optim.lr=2e-4", "optim=sgd", "data.weights.en=3")
    assert (typed.optim.lr, typed.optim.name) == (2e-4, "sgd")
    assert arm(conf, "arm=shared", "optim=sgd").optim.lr == 1e-4, "a file's rate is replaced"
    short = in_steps(arm(conf, "arm=short"))
    assert (short.train.num_steps, short.train.num_tokens) == (7, None)
    assert in_steps(arm(conf, "arm=short", "train.num_tokens=8192")).train.num_steps == 2
    assert arm(conf).arm is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["arm=dens"], "arm=dens: there is no such arm (did you mean 'dense'?); in arms there are"),
        (["arm=mistaken"], "arms.mistaken.model.num_expert=8: there is no such setting (did you"),
        (["arm=grouped"], "arms.grouped.optim=sgd: has settings of its own, and an arm sets"),
        (["arm=worded"], "arms.worded.train.num_steps=many: "),
        (["match.to=nobody"], "match.to=nobody: is neither an arm (in arms there are moe, dense"),
        (["arm=dense", "match.to=moe", "match.multiple_of=4096"], "a multiple of 4096 comes"),
        (["match.to=moe", "match.by=weights"], "must be one of active_parameters"),
    ],
)
def test_arms_that_are_not_there_are_named(conf: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        arm(conf, *words)
    assert said in str(refused.value)


def test_an_arm_matches_another_arm_a_model_and_a_run(conf: Path, tmp_path: Path) -> None:
    moe = arm(conf, "arm=moe", "match.to=moe", "model.num_layers=2")
    assert moe.model.ffn_hidden_dim == 256
    dense = arm(conf, "arm=dense", "match.to=moe", "model.num_layers=2")
    wanted, found = (measure(in_steps(c), "active_parameters") for c in (moe, dense))
    assert abs(found - wanted) <= 2 * 3 * 128 / 2, "half a column of each layer's matrices"
    assert dense.match.outcome is not None
    assert dense.match.outcome.startswith(f"model.ffn_hidden_dim={dense.model.ffn_hidden_dim} ")
    again = arm(conf, "arm=dense", "match.to=moe", "model.num_layers=2")
    assert again == dense

    # As the file of the model says, with two of eight layers here.
    file = arm(conf, "arm=dense", "match.to=toy", "model.num_layers=8", "match.tolerance=0.1")
    toy = arm(conf, "arm=moe")
    near = measure(in_steps(file), "active_parameters") / measure(
        in_steps(toy), "active_parameters"
    )
    assert near == pytest.approx(1, abs=0.01)
    # With this text's vocabulary.
    assert arm(conf, "arm=moe", "match.to=toy", "model.vocab_size=512").model.ffn_hidden_dim == 256

    run = tmp_path / "runs/other"
    run.mkdir(parents=True)
    values = tiny_values(tmp_path, shards=tmp_path, model__ffn_hidden_dim=999)
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    theirs = arm(
        conf, "arm=dense", f"match.to={run}", "match.by=flops_per_token", "model.dim=32",
        "model.num_layers=1",
    )  # fmt: skip
    assert theirs.match.outcome is not None
    wanted = measure(in_steps(validated(values, Config)), "flops_per_token")
    assert measure(in_steps(theirs), "flops_per_token") == pytest.approx(wanted, rel=0.01)
    (run / "config.yaml").write_text("model: 3\n")
    with pytest.raises(ConfigError, match=r"match\.to"):
        arm(conf, f"match.to={run}")


def test_fewer_steps_of_the_same_tokens_are_worked_out_when_it_is_composed(conf: Path) -> None:
    words = ["match.to=moe", "match.by=training_flops", "match.solve=num_steps"]
    moe, dense = arm(conf, "arm=moe", *words), arm(conf, "arm=dense", "model.dim=64", *words)
    assert in_steps(moe).train.num_steps == 245
    assert dense.train.num_tokens is None
    fewer = in_steps(dense).train.num_steps
    assert fewer is not None
    assert fewer > 245, "the dense arm has no router, and is as wide as one expert"


@pytest.fixture
def swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., tuple[list[list[str]], str]]:
    """Makes the dry run of a sweep of the example's arms; returns the table's rows, and all."""
    shards = write_shards(tmp_path)

    def dry_run(*given: str) -> tuple[list[list[str]], str]:
        words = ["--config-dir", str(ROOT / "examples/conf"), "-m", "experiment=five-arms", *given]
        words += [f"data.dir={shards}", "run.device=cpu", "launch.mode=inline", "dry_run=true"]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["moetrain", *words])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as ended:
            run_command(
                train, tree=Config, module="moetrain", files=config_dir(), sweep=sweep, check=check
            )
        assert ended.value.code == 0
        assert not (tmp_path / "runs").exists()
        said: str = capsys.readouterr().out
        return [line.split() for line in said.splitlines() if line[:1].isdecimal()], said

    return dry_run


def test_five_arms_by_three_seeds_are_one_file_and_one_command(
    swept: Callable[..., tuple[list[list[str]], str]],
) -> None:
    file = ROOT / "examples/conf/experiment/five-arms.yaml"
    assert len(file.read_text().splitlines()) < 25
    assert file.read_text() in (ROOT / "docs/configuration.md").read_text()
    rows, said = swept()
    assert [row[1:3] for row in rows] == [
        [name, seed]
        for name in ("dense", "moe", "sigmoid", "shared", "no-balance")
        for seed in "012"
    ]
    assert {(row[5], row[6]) for row in rows} == {("1.05", "M")}, "active parameters"
    assert [row[-1] for row in rows][3:6] == ["five-moe-0", "five-moe-1", "five-moe-2"]
    assert "match of trials 1, 2, 3: model.ffn_hidden_dim=514 gives " in said
    assert "match of trials 10, 11, 12: model.ffn_hidden_dim=170 gives " in said


def test_each_combination_of_a_sweep_is_matched_anew(
    swept: Callable[..., tuple[list[list[str]], str]],
) -> None:
    """Also where they differ in values alone, and are not composed of files anew."""
    rows, said = swept("arm=dense", "seed=0", "match.to=toy", "model.num_layers=2,8")
    assert {(row[4], row[5]) for row in rows} == {("1.05", "M")}, rows
    assert said.count("match of trials ") == 2
