"""Every command that a message proposes runs as it is printed, whatever a run is called.

Commands are found in the source: one that is added has no example here, and fails the first test.
"""

import ast
import logging
import re
import runpy
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from data_pipeline import DataError
from data_pipeline.settings import CacheSettings
from data_pipeline.shards.index import read_index
from data_pipeline.storage import open_files
from launch.closing import TRIAL_VARIABLE, closing_lines
from launch.on_ray.access import real_address
from launch.submit.__main__ import waiting_command
from moetrain.checkpoint.chosen import _no_run
from moetrain.checkpoint.offline import write_checkpoint
from moetrain.checks import ConfigError
from moetrain.config import check, resolve
from moetrain.huggingface.run_folder import training_command
from moetrain.import_hf import shards_command
from moetrain.settings import Resolved
from moetrain.train.control import Outcome
from moetrain.train.prepare import require_vocabulary
from moetrain.train.resume import _require_restart, _ways_to_another_model
from tests.support.runs import tiny_config
from tests.test_command import Front, front

__all__ = ["front"]

ROOT = Path(__file__).parents[1]
ODD = "essai été, lr=1e-3"
NO_PROPOSAL = {
    ("moetrain/report/page.py", "moetrain.report"),  # says which command has written a page
    ("launch/external.py", "moetrain"),  # the beginning of a line of another launcher's
    ("data_pipeline/corpora/corpus.py", "data_pipeline.build"),  # of which settings it speaks
    ("moetrain/sweeping/plugins.py", "moetrain"),  # which command takes plugins
}


def said(function: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        function(*arguments, **named)
    return str(caught.value)


def examples(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yields a file, the module that it proposes, and a command as it is printed."""
    config = tiny_config(folder, shards=folder, run__name=ODD, schedule__restart_from=1)
    manifest = cast(Any, Namespace(step=2, config={}))
    write_checkpoint(
        folder / "runs" / ODD / "checkpoints", step=1, state={"step": 1}, config={}, mesh={},
        tensors={}, read=lambda *_: torch.empty(0),
    )  # fmt: skip
    (folder / ODD).mkdir()
    (folder / ODD / "config.json").touch()
    tokenizer = cast(Any, Namespace(vocab_size=10**6, name="large"))
    shards = open_files(str(folder), cache=CacheSettings())
    messages = {
        ("data_pipeline/shards/missing_shards.py", "data_pipeline.build"): said(read_index, shards),
        ("launch/on_ray/access.py", "launch.submit"): said(real_address, "http://a:1", named="x"),
        ("launch/submit/__main__.py", "launch.submit"): waiting_command("raysubmit_1", "http://a:1"),
        ("moetrain/checkpoint/chosen.py", "moetrain.import_hf"): _no_run(folder / ODD),
        ("moetrain/huggingface/run_folder.py", "moetrain"): training_command(folder / ODD),
        ("moetrain/import_hf.py", "data_pipeline.build"): shards_command(folder / ODD),
        ("moetrain/train/prepare.py", "data_pipeline.build"):
            said(require_vocabulary, config, tokenizer),
    }  # fmt: skip
    for (file, module), message in messages.items():
        yield file, module, command_in(message)
    hub = _no_run(Path("mistralai/Mixtral-8x7B-v0.1"))
    yield "moetrain/checkpoint/chosen.py", "moetrain.import_hf", command_in(hub)
    for message in (
        said(_require_restart, config, manifest),
        _ways_to_another_model(config, manifest, ["model.router.num_groups"]),
    ):
        yield "moetrain/train/resume.py", "moetrain.branch", command_in(message)


def command_in(message: str) -> str:
    """Returns the command of a message, up to what closes it."""
    text = message[message.index("python -m") :]
    before = message[: len(message) - len(text)][-1:]
    if before in ("'", "`"):
        text = text.partition(before)[0]
    return text.partition(" makes ")[0].removesuffix(")")


def proposed() -> Iterator[tuple[str, str]]:
    """Yields every file that proposes a command, and the module of that command."""
    for path in sorted(
        p for d in ("moetrain", "launch", "data_pipeline") for p in (ROOT / d).rglob("*.py")
    ):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.List | ast.Tuple):
                words = [e.value if isinstance(e, ast.Constant) else "" for e in node.elts]
                text = " ".join(map(str, words))
            elif isinstance(node, ast.Constant) and id(node) not in docstrings:
                text = str(node.value)
            else:
                continue
            for module in re.findall(r"python -m ([a-z][\w.]+)", text):
                yield str(path.relative_to(ROOT)), module


def test_every_command_of_a_message_has_an_example_here(tmp_path: Path) -> None:
    tried = {(file, module) for file, module, _ in examples(tmp_path)}
    assert tried == set(proposed()) - NO_PROPOSAL


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away the handlers that a command in another test has left, whose stream is closed."""
    for name in (None, "hydra"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])


def test_each_proposed_command_is_taken_as_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = {(module, command) for _, module, command in examples(tmp_path)}
    for module, command in sorted(commands):
        python, dash_m, name, *words = shlex.split(command)
        assert (python, dash_m, name) == ("python", "-m", module)
        if module == "moetrain":  # with the files that an import writes, and shards for it
            group = tmp_path / ODD / "model"
            group.mkdir()
            named = words[2].partition("=")[2]
            (group / f"{named}.yaml").write_text((ROOT / "conf/model/toy.yaml").read_text())
            words += ["experiment=toy"]
        shows = [] if "--help" in words else ["--cfg", "job"]
        monkeypatch.setattr(sys, "argv", [name, *words, *shows])
        GlobalHydra.instance().clear()
        code: object = 0
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=False)
        except SystemExit as ended:
            code = ended.code
        shown = capsys.readouterr()
        assert code in (0, None), (command, shown.err)
        assert ODD not in command or ODD in " ".join(shown.out.split()), command


@pytest.mark.parametrize("name", [ODD, "lr=1e-3,wd=[0.1]", "a,b", "1e5", "it's ${x}"])
def test_what_a_run_ends_with_goes_onto_the_command_just_given(
    name: str, front: Front, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For several models: what is proposed must be possible with the rest of the settings."""
    models = {
        "a,b": ["model=olmoe-1b-7b"],
        "1e5": ["model.num_experts=1", "model.top_k=1", "--config-dir", "."],
        ODD: ["model.top_k=8", "model.router.num_groups=2", "model.router.top_groups=2"],
    }
    typed = name.replace("${", "\\${")
    given = [f"run.name={typed}", *models.get(name, []), "data.tokenizer=bytes"]
    code, (one,), message = front(*given)
    assert (code, message) == (0, "")
    config = resolve(one.settings, num_workers=1, now=datetime.now())
    assert config.run.name == name
    run_dir = tmp_path / "runs" / name
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").touch()
    shards = cast(Any, Namespace(baselines={}))
    outcome = Outcome(finished=True, step=config.train.num_steps, last={})
    *_, line = closing_lines(config, outcome, shards, run_dir)
    opened, train_on, sweep = (part.strip() for part in line.removeprefix("next").split(";"))
    assert shlex.split(opened) == ["open", f"runs/{name}/report.html"]
    for text, count in ((train_on.removeprefix("train on with "), 1), (sweep[len("or try ") :], 2)):
        code, found, message = front(*given, *shlex.split(text))
        assert (code, message) == (0, ""), text
        assert [c.settings.run.name for c in found] == [name] * count
        for combination in found:
            check(combination.settings)
            resolve(combination.settings, num_workers=1, now=datetime.now())
    stopped = Outcome(finished=False, step=1, last={})
    *_, line = closing_lines(config, stopped, shards, run_dir)
    word = re.fullmatch(r"next +the same command with (.*) resumes from here", line)
    assert word
    code, (one,), message = front(*given, *shlex.split(word[1]))
    assert (code, message, one.settings.run.name) == (0, "", name)


def test_a_rank_is_not_told_to_start_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Resolved = tiny_config(tmp_path, shards=tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    outcome = Outcome(finished=True, step=8, last={})
    shards = cast(Any, Namespace(baselines={}))
    *_, line = closing_lines(config, outcome, shards, tmp_path)
    assert "or try -m" in line
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    *_, line = closing_lines(config, outcome, shards, tmp_path)
    assert "-m" not in line


def test_what_can_t_be_swept_or_is_a_trial_is_not_told_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    shards = cast(Any, Namespace(baselines={}))

    def last(finished: bool = True, **changes: Any) -> str:
        config: Resolved = tiny_config(tmp_path, shards=tmp_path, **changes)
        outcome = Outcome(finished=finished, step=6, last={})
        return list(closing_lines(config, outcome, shards, tmp_path))[-1]

    for group in ("schedule", "optim"):
        changes: dict[str, Any] = {f"{group}__restart_from": 4}
        line = last(**changes)
        assert "train on with" in line
        assert "or try" not in line
    monkeypatch.setenv(TRIAL_VARIABLE, "1")
    assert last() == f"next      open {tmp_path}/report.html"
    assert last(finished=False) == "next      the same sweep resumes from here"
