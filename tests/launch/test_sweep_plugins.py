"""Sweepers and launchers of others: Optuna's, submitit's and joblib's, as Hydra loads them."""

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from launch.sweeps.sweep import ExternalLauncher
from launch.sweeps.table import Result, Trial
from moetrain.command import config_dir, run_command
from moetrain.settings import Config
from moetrain.sweeping.plugins import SweepEnded
from tests.launch.test_sweeps import BARE, ROOT, trials_of
from tests.support.runs import metrics_of, write_shards

PLUGINS = ("hydra_optuna_sweeper", "hydra_submitit_launcher", "hydra_joblib_launcher")


def installed(*plugins: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec("hydra_plugins") is not None
    absent = [p for p in plugins if not there or not importlib.util.find_spec(f"hydra_plugins.{p}")]
    packages = " ".join(plugin.replace("_", "-") for plugin in absent)
    return pytest.mark.skipif(bool(absent), reason=f"needs pip install {packages}")


optuna = installed("hydra_optuna_sweeper")
OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1"]
RATE = "optim.lr=tag(log,interval(1e-4,1e-1))"


class Quadratic:
    """Trials whose loss is how far their rate is from 1e-2; nothing is trained."""

    def __init__(self, folder: Path, *, ends_after: int = 1000) -> None:
        self.folder, self._ends_after = folder, ends_after
        self.rates: list[float] = []
        self.varied: list[dict[str, str]] = []
        self.closed = False

    def __call__(self, folder: Path) -> "Quadratic":
        return self

    def run(
        self,
        combinations: Sequence[Any],
        *,
        varied: Sequence[dict[str, str]],
        elsewhere: ExternalLauncher | None,
    ) -> list[Result]:
        assert elsewhere is None
        self.varied += varied
        results = []
        for combination in combinations:
            if len(self.rates) == self._ends_after:
                raise SweepEnded(75)
            self.rates.append(combination.settings.optim.lr)
            loss = abs(math.log10(self.rates[-1]) + 2)
            trial = Trial(
                number=len(self.rates), varied={}, command=(), run_dir=self.folder, num_workers=1
            )
            results.append(Result(trial=trial, exit_code=0, validation_loss=loss))
        return results

    def close(self) -> int:
        self.closed = True
        return 0


def command(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str, batches: Any = None
) -> tuple[int, list[Any]]:
    """Returns the exit code of the command, and what it would have trained by itself."""
    monkeypatch.setattr(sys, "argv", ["moetrain", f"run.dir={folder}/runs", *words])
    GlobalHydra.instance().clear()
    got: list[Any] = []

    def train(config: Config) -> int:
        got.append(config)
        return 0

    with pytest.raises(SystemExit) as ended:
        run_command(
            train, tree=Config, module="moetrain",
            files=config_dir(), batches=batches,
        )  # fmt: skip
    return int(str(ended.value.code)), got


@optuna
class TestOptuna:
    def test_it_is_told_each_trial_s_loss_and_finds_the_best(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = Quadratic(tmp_path)
        words = ["-m", *OPTUNA, "hydra.sweeper.n_trials=5", RATE]
        assert command(monkeypatch, tmp_path, *words, batches=study) == (0, [])
        assert len(study.rates) == 5
        assert study.closed
        best = min(study.rates, key=lambda rate: abs(math.log10(rate) + 2))
        [written] = (tmp_path / "runs/sweeps").glob("*/optimization_results.yaml")
        assert f"optim.lr: {best}" in written.read_text()
        assert study.varied[0] == {"optim.lr": str(study.rates[0])}

    def test_the_same_command_suggests_the_same_and_more_trials_follow(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        studies = [Quadratic(tmp_path) for _ in range(3)]
        for study, number, seed in zip(studies, (3, 4, 3), (0, 0, 1), strict=True):
            words = ["-m", *OPTUNA, f"hydra.sweeper.n_trials={number}", RATE, f"seed={seed}"]
            assert command(monkeypatch, tmp_path, *words, batches=study)[0] == 0
        assert studies[1].rates[:3] == studies[0].rates
        assert studies[2].rates != studies[0].rates

    def test_a_stop_ends_the_study_with_75(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = Quadratic(tmp_path, ends_after=2)
        assert command(monkeypatch, tmp_path, "-m", *OPTUNA, RATE, batches=study)[0] == 75
        assert study.closed

    def test_a_study_that_is_kept_goes_on_with_the_trial_that_was_stopped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kept = [f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db", "run.name=s"]
        words = ["-m", *OPTUNA, RATE, "hydra.sweeper.study_name=s", *kept, "seed=0"]
        first = Quadratic(tmp_path, ends_after=1)
        code, _ = command(monkeypatch, tmp_path, *words, batches=first)
        if code == 2:  # Optuna 2 doesn't fit every SQLAlchemy: then it says so
            assert "pip install 'sqlalchemy<2' 'alembic<1.14'" in capsys.readouterr().err
            return
        import optuna

        study = optuna.load_study(study_name="s", storage=kept[0].partition("=")[2])
        stopped = study.trials[-1].params["optim.lr"]
        second = Quadratic(tmp_path)
        words[-1] = "hydra.sweeper.n_trials=2"
        assert command(monkeypatch, tmp_path, *words, batches=second)[0] == 0
        assert second.rates[0] == stopped
        third = Quadratic(tmp_path)
        assert command(monkeypatch, tmp_path, *words, batches=third)[0] == 0
        assert stopped not in third.rates, "it has a loss by now"

    @pytest.mark.parametrize(
        ("word", "reason"),
        [
            ("hydra.sweeper.direction=maximize", "use minimize"),
            ("hydra.sweeper.custom_search_space=os.getcwd", "nothing is run because"),
            ("hydra.sweeper.sampler._target_=os.getcwd", "nothing is run because"),
        ],
    )
    def test_what_would_mislead_or_run_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str], word: str, reason: str,
    ) -> None:  # fmt: skip
        study = Quadratic(tmp_path)
        words = ["-m", *OPTUNA, RATE, word]
        assert command(monkeypatch, tmp_path, *words, batches=study) == (2, [])
        said = capsys.readouterr().err
        assert reason in said
        assert len(said.splitlines()) == 1
        assert not study.rates

    def test_other_commands_say_where_it_belongs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert command(monkeypatch, tmp_path, "-m", *OPTUNA, RATE) == (2, [])
        assert "ray job submit --working-dir . -- python -m moetrain" in capsys.readouterr().err


@installed("hydra_submitit_launcher")
class TestSubmitit:
    @pytest.mark.parametrize(
        ("key", "value"), [("setup", "[touch made]"), ("additional_parameters", "{prolog: /x}")]
    )
    def test_a_command_of_a_file_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str], key: str, value: str,
    ) -> None:  # fmt: skip
        (tmp_path / "experiment").mkdir()
        text = f"# @package _global_\nhydra:\n  launcher:\n    {key}: {value}\n"
        (tmp_path / "experiment/theirs.yaml").write_text(text)
        words = ["--config-dir", str(tmp_path), "-m", "hydra/launcher=submitit_slurm", "seed=1,2"]
        study = Quadratic(tmp_path)
        code, _ = command(monkeypatch, tmp_path, *words, "experiment=theirs", batches=study)
        assert code == 2
        assert f"hydra.launcher.{key}" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("word", "reason"),
        [
            ("hydra.launcher.comment='a\ntouch made'", "must be one line"),
            ("hydra.launcher.tasks_per_node=8", "a trial is one task on one node"),
        ],
    )
    def test_what_slurm_should_not_be_told_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str], word: str, reason: str,
    ) -> None:  # fmt: skip
        words = ["-m", "hydra/launcher=submitit_slurm", "seed=1,2", word]
        assert command(monkeypatch, tmp_path, *words, batches=Quadratic(tmp_path))[0] == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("hydra/launcher=ray", "launch.address=auto"),
        ("hydra/launcher=rq", "submitit_slurm"),
        ("hydra/sweeper=ax", "use optuna"),
        ("hydra/sweeper=nevergrad", "use optuna"),
    ],
)
def test_what_can_t_be_used_says_what_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    choice: str, reason: str,
) -> None:  # fmt: skip
    assert command(monkeypatch, tmp_path, "-m", choice, "seed=1,2") == (2, [])
    said = capsys.readouterr().err
    assert said.startswith(f"moetrain: {choice}: ")
    assert reason in said


@pytest.mark.parametrize("choice", ["hydra/sweeper=optuna", "hydra/launcher=submitit_slurm"])
def test_what_is_not_installed_says_how_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], choice: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command(monkeypatch, tmp_path, "-m", choice, "seed=1,2") == (2, [])
    assert f"{choice}: is not installed: pip install hydra-" in capsys.readouterr().err


@optuna
def test_a_plugin_without_a_sweep_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, tmp_path, "hydra/sweeper=optuna", "seed=1") == (2, [])
    assert "add -m" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1200)
@installed(*PLUGINS)
def test_trials_by_plugins_are_the_runs_of_a_sweep(tmp_path: Path) -> None:
    """Optuna suggests; joblib, submitit and no launcher train; each finds the others' runs."""
    shards = write_shards(tmp_path)

    def sweep(*words: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "moetrain", "-m", *BARE, f"data.dir={shards}",
             "launch.mode=inline", "train.num_steps=6", "run.name=s", *words],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    sweep("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "optim.lr=1e-3,1e-2")
    first = {t["varied"]["optim.lr"]: t for t in trials_of(tmp_path)}
    assert {Path(t["run"]).name for t in first.values()} == {"s-1", "s-2"}
    for rate, name in (("0.001", "s-1"), ("0.01", "s-2")):
        assert first[rate]["validation_loss"] == metrics_of(tmp_path, name)[-1]["validation/loss"]
    newest = max((tmp_path / "runs/sweeps").iterdir())
    assert "nats a token" in (newest / "trial_1.log").read_text()

    output, errors = sweep("hydra/launcher=submitit_local", "optim.lr=3e-2,1e-2")
    assert "trial 2: optim.lr=0.01" in errors
    assert errors.count("done before") == 1
    assert "sweep     2 done" in output
    assert {t["varied"]["optim.lr"]: Path(t["run"]).name for t in trials_of(tmp_path)} == {
        "0.03": "s-3",
        "0.01": "s-2",
    }

    grid = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=3"]
    _, errors = sweep(*grid, "optim.lr=choice(1e-3,1e-2,3e-2)")
    assert errors.count("done before") == 3
    best = (max((tmp_path / "runs/sweeps").iterdir()) / "optimization_results.yaml").read_text()
    assert f"best_value: {min(t['validation_loss'] for t in trials_of(tmp_path))}" in best
