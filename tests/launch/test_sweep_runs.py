"""Which run is a trial's: by what it was trained with, whatever it is called."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline import ShardFolder
from launch.sweeps.runs import differences
from launch.sweeps.sweep import run_sweep
from launch.sweeps.table import Trial
from moetrain.branch import BranchSettings, branch
from moetrain.checkpoint.offline import write_checkpoint
from moetrain.checkpoint.trained import trained
from moetrain.checks import ConfigError
from moetrain.command import Combination
from moetrain.config import resolve
from moetrain.settings import Config
from moetrain.settings.validation import validated
from moetrain.sweeping.sweep import dry_sweep, planned
from moetrain.train.changes import as_plain
from tests.support.runs import Changes, tiny_values, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


class Sweeps:
    """Sweeps of tiny runs in a folder, of which nothing is trained."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards

    def combinations(self, name: str | None = "s", **values: Any) -> list[Combination[Config]]:
        """Returns every combination of values; those that aren't in a list are common to all."""
        lists = {k: v if isinstance(v, list) else [v] for k, v in values.items()}
        found = []
        for chosen in itertools.product(*lists.values()):
            changes = dict(zip(lists, chosen, strict=True))
            given = {} if name is None else {"run__name": name.format(**changes)}
            raw = "run.name=" + (name or "").replace("{", "${")
            plain = {"run__name": None, "launch__mode": "inline"} | changes | given
            found.append(
                Combination(
                    overrides=(*(f"{k.replace('__', '.')}={v}" for k, v in changes.items()), raw),
                    settings=validated(
                        tiny_values(self.folder, shards=self.shards, **plain), Config
                    ),
                )
            )
        return found

    def trials(self, name: str | None = "s", **values: Any) -> list[Trial]:
        with planned(self.combinations(name, **values)) as trials:
            return trials

    def names(self, name: str | None = "s", **values: Any) -> list[str]:
        """Returns which run each combination's is."""
        return [trial.run_dir.name for trial in self.trials(name, **values)]

    def begin(self, run: str, **values: Any) -> None:
        """Writes what a run leaves that was killed before its first checkpoint."""
        self._write(run, self._resolved(run, **values))

    def train(
        self,
        run: str,
        step: int = 8,
        text: str = "",
        state: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> None:
        """Writes what a run leaves that has come to a step."""
        config = self._resolved(run, **values)
        self._write(run, config)
        text = text or ShardFolder.open(str(self.shards)).fingerprint
        write_checkpoint(
            self.folder / "runs" / run / "checkpoints",
            step=step, state={"step": step, "data": text, **(state or {})},
            config=as_plain(config), mesh={}, tensors={}, read=lambda *_: torch.empty(0),
        )  # fmt: skip
        last = {"event": "finish" if step == 8 else "stop"}
        lines = "".join(json.dumps(line) + "\n" for line in ({"event": "start"}, last))
        (self.folder / "runs" / run / "events.jsonl").write_text(lines)
        record = {"step": step, "train/cross_entropy": 2.0, "validation/loss": 1.5}
        (self.folder / "runs" / run / "metrics.jsonl").write_text(json.dumps(record) + "\n")

    def _resolved(self, run: str, **values: Any) -> Config:
        [combination] = self.combinations(run, **values)
        return resolve(combination.settings, num_workers=1, now=datetime(2026, 1, 1))

    def _write(self, run: str, config: Config) -> None:
        folder = self.folder / "runs" / run
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(as_plain(config)))


@pytest.fixture
def sweeps(tmp_path: Path, shards: Path) -> Sweeps:
    return Sweeps(tmp_path, shards)


@pytest.mark.parametrize(
    ("rates", "names"),
    [
        ([3e-2, 1e-3, 3e-3], ["s-3", "s-1", "s-2"]),
        ([1e-3, 3e-2, 3e-3], ["s-1", "s-3", "s-2"]),
        ([1e-3, 3e-3, 3e-2], ["s-1", "s-2", "s-3"]),
        ([3e-3, 1e-3], ["s-2", "s-1"]),
        ([3e-3], ["s-2"]),
        ([3e-2], ["s"]),
        ([3e-2, 9e-2], ["s-3", "s-4"]),
    ],
)
def test_an_extended_or_reordered_grid_finds_its_runs_whatever_their_number(
    sweeps: Sweeps, rates: list[float], names: list[str]
) -> None:
    sweeps.train("s-1", optim__lr=1e-3)
    sweeps.begin("s-2", optim__lr=3e-3)
    assert sweeps.names(optim__lr=rates) == names


def test_a_new_sweep_numbers_its_runs_in_order(sweeps: Sweeps) -> None:
    assert sweeps.names(optim__lr=[1e-3, 3e-3], seed=[0, 1]) == ["s-1", "s-2", "s-3", "s-4"]
    (sweeps.folder / "runs/s-2/logs").mkdir(parents=True)  # left by a start that was refused
    assert sweeps.names(optim__lr=[1e-3, 3e-3]) == ["s-1", "s-2"]
    assert sweeps.names(optim__lr=1e-3) == ["s"]


def test_another_varied_setting_finds_the_runs_that_have_its_default(sweeps: Sweeps) -> None:
    sweeps.train("s-1", optim__lr=1e-3)
    sweeps.train("s-2", optim__lr=3e-3)
    found = sweeps.names(optim__lr=[1e-3, 3e-3], seed=[1, 0])
    assert found == ["s-3", "s-1", "s-4", "s-2"]


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"train__num_steps": 16},
        {"train__global_batch_size": 4},
        {"schedule__warmup_steps": 1},
        {"model__router__score_function": "sigmoid"},
        {"data__mask_documents": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_decides_the_result_makes_another_trial_and_is_told(
    sweeps: Sweeps, capsys: pytest.CaptureFixture[str], changed: dict[str, Any]
) -> None:
    sweeps.train("s-1", optim__lr=1e-3)
    sweeps.train("s-2", optim__lr=3e-3, step=3)
    assert sweeps.names(optim__lr=[1e-3, 3e-3], **changed) == ["s-3", "s-4"]
    told = capsys.readouterr().err
    name = next(iter(changed)).replace("__", ".")
    assert f"s-1 was trained with other settings ({name} " in told
    assert told.splitlines()[1].endswith("s-4 is a new run")


def test_what_decides_nothing_may_change(sweeps: Sweeps) -> None:
    sweeps.train("s-1", optim__lr=1e-3)
    sweeps.begin("s-2", optim__lr=3e-3)
    free: Changes = {"checkpoint__every_steps": 2, "observe__log_every_steps": 4}
    layout: Changes = {"train__micro_batch_size": 2, "model__experts__backend": "cpu"}
    assert sweeps.names(optim__lr=[1e-3, 3e-3], **free, **layout) == ["s-1", "s-2"]


def test_a_layout_that_is_varied_is_its_trials_own(sweeps: Sweeps) -> None:
    sweeps.train("s-1", train__micro_batch_size=2)
    assert sweeps.names(train__micro_batch_size=[4, 2]) == ["s-2", "s-1"]
    sweeps.train("s-2", train__micro_batch_size=4)
    assert sweeps.names(train__micro_batch_size=4) == ["s-2"], "the nearest of both"


def test_the_same_settings_twice_are_one_trial(
    sweeps: Sweeps, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweeps.names(optim__lr=[1e-3, 0.001, 3e-3]) == ["s-1", "s-2"]
    assert "given twice, and trained once: optim.lr=0.001" in capsys.readouterr().err


def test_a_run_is_what_its_checkpoint_says_and_not_a_file_that_was_rewritten(
    sweeps: Sweeps,
) -> None:
    """As versions did that matched trials by number."""
    sweeps.train("s-1", optim__lr=1e-3)
    sweeps.begin("s-1", optim__lr=3e-2)
    assert sweeps.names(optim__lr=[3e-2, 1e-3]) == ["s-2", "s-1"]


def test_a_checkpoint_holds_with_what_its_run_went_on_otherwise(
    sweeps: Sweeps, tmp_path: Path
) -> None:
    """So that a run without its events, of which only a checkpoint was uploaded, has it too."""
    held = {"changes": [{"step": 3, "changes": {"optim.lr": [1e-3, 3e-2]}}]}
    sweeps.train("s-1", optim__lr=3e-2, state=held)
    assert sweeps.names(optim__lr=[3e-2, 1e-3]) == ["s-2", "s-3"]
    to = tmp_path / "branches/b"
    assert branch(BranchSettings(run=str(tmp_path / "runs/s-1"), to=str(to))) == 0
    run = trained(to)
    assert run is not None
    assert run.earlier == {"optim.lr": 1e-3}


def test_another_text_makes_another_trial(sweeps: Sweeps) -> None:
    sweeps.train("s-1", optim__lr=1e-3, text="f" * 64)
    assert sweeps.names(optim__lr=[1e-3, 3e-3]) == ["s-2", "s-3"]


def test_a_run_of_which_nothing_can_be_said_is_nobodys(sweeps: Sweeps) -> None:
    sweeps.begin("s-1")
    (sweeps.folder / "runs/s-1/config.yaml").write_bytes(b"a: [\xff")
    sweeps.begin("s-2")
    (sweeps.folder / "runs/s-2/config.yaml").write_text("just a text")
    assert sweeps.names(optim__lr=[1e-3, 3e-3]) == ["s-3", "s-4"]


def test_a_name_by_values_is_the_run_of_these_values(sweeps: Sweeps) -> None:
    by_rate = "lr{optim__lr}"
    assert sweeps.names(by_rate, optim__lr=[0.1, 0.2]) == ["lr0.1", "lr0.2"]
    sweeps.train("lr0.1", optim__lr=0.1)
    assert sweeps.names(by_rate, optim__lr=[0.3, 0.1]) == ["lr0.3", "lr0.1"]
    assert sweeps.names(by_rate, optim__lr=[0.1], seed=[0]) == ["lr0.1"]
    for rates in ([0.1], [0.1, 0.2]):
        with pytest.raises(ConfigError, match=r"run.name=lr0.1: there is a run .*seed 0 → 1"):
            sweeps.names(by_rate, optim__lr=rates, seed=1)


def test_a_name_by_some_values_gets_numbers(sweeps: Sweeps) -> None:
    by_experts = "e{model__num_experts}"
    values = {"model__num_experts": [2, 4], "optim__lr": [0.1, 0.2]}
    assert sweeps.names(by_experts, **values) == ["e2-1", "e2-2", "e4-1", "e4-2"]
    # Versions before called them all after the first.
    sweeps.train("e2-3", model__num_experts=4, optim__lr=0.1)
    assert sweeps.names(by_experts, **values) == ["e2-1", "e2-2", "e2-3", "e4-1"]


def test_sweeps_without_a_name_never_share_one(sweeps: Sweeps) -> None:
    with (
        planned(sweeps.combinations(None, optim__lr=[0.1, 0.2])) as first,
        planned(sweeps.combinations(None, optim__lr=[0.3, 0.4])) as second,
    ):
        names = [trial.run_dir.name for trial in (*first, *second)]
    assert len(set(names)) == 4
    assert [name[-2:] for name in names] == ["-1", "-2"] * 2


def test_two_sweeps_of_one_name_at_once_are_refused(sweeps: Sweeps) -> None:
    by_rate = "lr{optim__lr}"
    with planned(sweeps.combinations(by_rate, optim__lr=[0.1, 0.2])):
        assert sweeps.names(by_rate, optim__lr=[0.3]) == ["lr0.3"], "another name"
        with pytest.raises(ConfigError, match=r"run.name=lr0.2: process \d+ runs a sweep"):
            sweeps.names(by_rate, optim__lr=[0.2, 0.3])
    assert sweeps.names(by_rate, optim__lr=[0.2, 0.3]) == ["lr0.2", "lr0.3"]


def test_imported_weights_are_a_trials_beginning(sweeps: Sweeps) -> None:
    sweeps.train("up-a", step=0)
    assert sweeps.names("up-{seed}".replace("{seed}", "a"), seed=3) == ["up-a"]


def test_trials_of_several_folders_are_each_found_in_their_own(sweeps: Sweeps) -> None:
    sweeps.train("s-1", seed=1)
    other = str(sweeps.folder / "other")
    trials = sweeps.trials(run__dir=[other, str(sweeps.folder / "runs")], seed=[0, 1])
    found = [trial.run_dir.relative_to(sweeps.folder).as_posix() for trial in trials]
    assert found == ["other/s-1", "other/s-2", "runs/s-2", "runs/s-1"]


def test_a_trial_is_found_where_its_checkpoints_are_uploaded_to(
    sweeps: Sweeps, tmp_path: Path
) -> None:
    there: Changes = {"checkpoint__upload_to": f"file://{tmp_path}/away"}
    sweeps.train("s-1", optim__lr=1e-3, **there)
    name = f"{next((tmp_path / 'runs/s-1/checkpoints').glob('step_*')).name}_attempt_1"
    (tmp_path / "away/s-1/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/s-1/checkpoints/step_00000008").rename(
        tmp_path / "away/s-1/checkpoints" / name
    )
    (tmp_path / "runs/s-1").rename(tmp_path / "elsewhere")
    assert sweeps.names(optim__lr=[3e-2, 1e-3], **there) == ["s-2", "s-1"]


def test_done_trials_are_shown_and_another_run_never_is(
    sweeps: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command is started: both have all their steps, the second's of somebody else by now."""
    sweeps.train("s-1", optim__lr=1e-3)
    sweeps.train("s-2", optim__lr=3e-3)
    with planned(sweeps.combinations(optim__lr=[1e-3, 3e-3])) as trials:
        sweeps.train("s-2", step=9, optim__lr=0.7)
        code = run_sweep(trials, folder=tmp_path / "table", places=None)
    assert code == 2
    table = (tmp_path / "table/table.txt").read_text().splitlines()
    assert table[0].startswith("sweep     1 done, 1 other settings; ")
    assert table[2].split()[:6] == ["1", "0.001", "done", "8", "2.000", "1.500"]
    assert table[3].split() == ["2", "0.003", "other", "settings", "–", "–", "–", "s-2"]
    assert table[4] == "s-2 is another run than trial 2: optim.lr 0.7 → 0.003"
    assert "trial 1 of 2: optim.lr=0.001" in capsys.readouterr().err


def test_a_trial_s_settings_are_compared_as_its_run_was_resolved(sweeps: Sweeps) -> None:
    [trial] = sweeps.trials(seed=5)
    assert trial.wanted is not None
    assert trial.wanted.settings["train"]["micro_batch_size"] == 8
    assert asdict(trial)["varied"] == {}


def test_a_sweep_reduced_to_one_value_calls_its_trial_by_it(
    sweeps: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps.train("s-1", optim__lr=1e-3)
    sweeps.train("s-2", optim__lr=3e-3)
    with planned(sweeps.combinations(optim__lr=[3e-3], seed=0)) as trials:
        assert [trial.varied for trial in trials] == [{"optim.lr": "0.003"}]
        assert run_sweep(trials, folder=tmp_path / "table", places=None) == 0
    assert "trial 1 of 1: optim.lr=0.003 → " in capsys.readouterr().err


@pytest.mark.parametrize("group", ["schedule", "optim"])
def test_a_restart_of_new_runs_is_refused_before_any_begins(sweeps: Sweeps, group: str) -> None:
    sweeps.train("s-1", optim__lr=1e-3)
    again: Changes = {f"{group}__restart_from": 4}
    with pytest.raises(ConfigError, match=rf"{group}.restart_from=4: run s-2 has no checkpoint"):
        sweeps.trials(optim__lr=[1e-3, 3e-3], **again)
    sweeps.train("s-1", optim__lr=1e-3, **again)
    assert sweeps.names(optim__lr=1e-3, **again) == ["s-1"]


def test_a_dry_sweep_tells_how_far_its_runs_are(sweeps: Sweeps) -> None:
    sweeps.train("s-1", optim__lr=1e-3)
    lines = dry_sweep(sweeps.combinations(optim__lr=[1e-3, 3e-3])).splitlines()
    assert "run is" in lines[0]
    assert [line.split()[2] for line in lines[1:3]] == ["done", "new"]
    assert lines[3] == "dry run: 1 of 2 could start; nothing was written"


def test_a_text_that_is_yet_to_be_built_is_not_that_of_another_folder(sweeps: Sweeps) -> None:
    sweeps.train("s-1", optim__lr=1e-3)
    [trial] = sweeps.trials(optim__lr=1e-3)
    run = trained(trial.run_dir)
    assert run is not None
    assert trial.wanted is not None
    unbuilt = replace(trial.wanted, text=None)
    assert not differences(run, unbuilt)
    other = {**unbuilt.settings, "data": {**unbuilt.settings["data"], "dir": "cache/other"}}
    assert [c.name for c in differences(run, replace(unbuilt, settings=other))] == ["data.dir"]
