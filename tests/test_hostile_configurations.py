"""Nothing is run because a configuration names it: hostile files and command lines do nothing."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

import data_pipeline.commands.command
from moetrain.command import config_dir, run_command
from moetrain.settings import Config


def outcome(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, list[Config]]:
    """Returns the exit code of the training command's front, and what it would have trained."""
    monkeypatch.setattr(sys, "argv", ["moetrain", *words])
    got: list[Config] = []

    def main(config: Config) -> int:
        got.append(config)
        return 0

    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        run_command(main, tree=Config, module="moetrain", files=config_dir())
    return int(str(ended.value.code)), got


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Returns a folder that isn't there, and that hostile configurations would make."""
    return tmp_path / "made"


CALL = "{{_target_: os.mkdir, path: {mark}}}"
# Without a root logger, as Hydra's own choices here have none, Hydra leaves the rest alone.
LOGGED = "handlers: {{x: {{'()': os.mkdir, path: {mark}}}}}, root: {{handlers: [x]}}"


@pytest.mark.parametrize(
    "word",
    [
        "+model._target_=os.mkdir",
        f"+evil={CALL}",
        f"+hydra.callbacks.evil={CALL}",
        f"hydra.launcher={CALL}",
        "hydra.launcher._target_=os.mkdir",
        f"+hydra.launcher.inner={CALL}",
        f"hydra.sweeper={CALL}",
        "hydra.sweeper._target_=hydra_plugins.other.Sweeper",
        "+hydra.job_logging.handlers={{x: {{class: logging.handlers.SocketHandler}}}}",
        "+hydra.job_logging.handlers={{x: {{class: logging.StreamHandler, stream: 'ext://os.x'}}}}",
        "+hydra.job.env_set={{PYTHONSTARTUP: {mark}}}",
    ],
)
def test_a_command_line_that_names_what_is_to_be_run(
    word: str, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    word = word.format(mark=mark) if "{{" in word or "{mark}" in word else word
    for sweep in ((), ("-m", "seed=1,2")):
        assert outcome(monkeypatch, *sweep, f"run.dir={mark.parent}/runs", word) == (2, [])
        said = capsys.readouterr().err
        assert said.startswith("moetrain: "), said
        assert len(said.splitlines()) == 1
        assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("# @package _global_\nhydra:\n  callbacks:\n    evil: " + CALL, "nothing is run because"),
        ("# @package _global_\nhydra:\n  job_logging:\n    filters:\n      x: {{'()': os.getcwd}}",
         "nothing is run because"),
        ("# @package _global_\nhydra:\n  job:\n    env_set: {{LD_PRELOAD: evil.so}}",
         "doesn't set this process's environment"),
        ("# @package _global_\nmodel:\n  _target_: os.getcwd", "experiment/theirs.yaml, line 3"),
        ("# @package _global_\nseed: !!python/object/apply:os.mkdir [{mark}]", "python/object"),
    ],
)  # fmt: skip
def test_somebody_elses_experiment(
    text: str,
    reason: str,
    mark: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/theirs.yaml").write_text(text.format(mark=mark))
    words = ["--config-dir", str(tmp_path), "experiment=theirs", f"run.dir={tmp_path}/runs"]
    for sweep in ((), ("-m",)):
        assert outcome(monkeypatch, *sweep, *words) == (2, [])
        assert reason in capsys.readouterr().err
        assert not mark.exists()


def test_a_trial_of_a_sweep_is_looked_through_as_well(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment").mkdir()
    logged = LOGGED.format(mark=mark)
    (tmp_path / "experiment/theirs.yaml").write_text(
        f"# @package _global_\nhydra:\n  job_logging: {{version: 1, {logged}}}"
    )
    words = ["-m", "--config-dir", str(tmp_path), "experiment=toy,theirs"]
    assert outcome(monkeypatch, *words, f"run.dir={tmp_path}/runs")[0] == 2
    assert not mark.exists()


def test_what_is_harmless_still_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (("hydra/job_logging=default",), ("-m", "hydra/job_logging=stdout", "seed=1,2")):
        code, got = outcome(monkeypatch, *words, f"run.dir={tmp_path}", f"hydra.run.dir={tmp_path}")
        assert code == 0
        assert [config.seed for config in got] == ([0] if len(words) == 1 else [1, 2])


def test_a_pickle_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(monkeypatch, "--experimental-rerun", f"{tmp_path}/config.pickle") == (2, [])
    assert "would load a pickle" in capsys.readouterr().err
    assert outcome(monkeypatch, f"--ex={tmp_path}/config.pickle") == (2, [])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a command of the data pipeline."""

    seed: int = 0


def test_commands_of_the_data_pipeline_look_as_well(
    mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    word = "+hydra.callbacks.evil=" + CALL.format(mark=mark)
    monkeypatch.setattr(sys, "argv", ["build", word])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        data_pipeline.commands.command.run_command(
            lambda _: None, settings_type=Settings, module="data_pipeline.build", about=""
        )
    assert ended.value.code == 2
    assert "nothing is run because a configuration names it" in capsys.readouterr().err
    assert not mark.exists()
