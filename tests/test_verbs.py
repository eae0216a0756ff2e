"""One command for all of it: `moetrain VERB`."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.completion import script
from moetrain.verbs import VERBS, overview, verb_of

ROOT = Path(__file__).parents[1]
SOURCES = [p for top in ("moetrain", "launch", "data_pipeline") for p in (ROOT / top).rglob("*.py")]


def moetrain(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moetrain", *words], capture_output=True, text=True, check=False
    )


def test_each_command_is_a_verb() -> None:
    """What can be run by `python -m` has a verb, and each verb's module is there."""
    commands = set()
    for path in SOURCES:
        if '\nif __name__ == "__main__":' in path.read_text():
            parts = path.relative_to(ROOT).with_suffix("").parts
            commands.add(".".join(parts[:-1] if parts[-1] == "__main__" else parts))
    assert commands == {verb.module for verb in VERBS.values()} | {"moetrain"}
    assert all(importlib.util.find_spec(verb.module) for verb in VERBS.values())


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        (["data", "build", "to=x"], ("data build", ["to=x"])),
        (["report", "run=x"], ("report", ["run=x"])),
        (["+model=toy"], None),
        (["data"], None),
        (["data.dir=x"], None),
        ([], None),
    ],
)
def test_a_verb_is_the_first_words(words: list[str], verb: tuple[str, list[str]] | None) -> None:
    assert verb_of(words) == verb


def test_help_has_a_line_for_each_verb_and_a_verb_its_own() -> None:
    said = moetrain("--help")
    assert (said.returncode, said.stdout) == (0, f"{overview()}\n")
    assert all(verb in said.stdout and of.does in said.stdout for verb, of in VERBS.items())
    said = moetrain("data", "inspect", "--help")
    assert said.returncode == 0
    assert "dir=" in said.stdout
    said = moetrain("verfy", "+model=toy")
    assert said.returncode == 2
    assert said.stderr.startswith("moetrain: verfy: there is no such verb (did you mean 'verify'?)")
    said = moetrain("simulate", "nodes=[0]")
    assert said.returncode == 2
    assert "nodes" in said.stderr


def test_commands_that_need_no_torch_do_not_load_it() -> None:
    """It takes seconds; so does Ray."""
    light = ("train_command", "command", "verbs", "checkpoint.__main__", "report.__main__")
    modules = [f"moetrain.{name}" for name in light]
    modules += ["moetrain.compare.__main__", "moetrain.compare.page", "moetrain.compare.tables"]
    modules += ["launch.simulate.__main__", "data_pipeline.build", "data_pipeline.inspect"]
    source = f"import sys, {', '.join(modules)}\nprint(*{{'torch', 'ray'}} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["moetrain", "ver"], ["verify"]),
        (["moetrain", "data", ""], ["build", "inspect"]),
        (["moetrain", "train", "model.num_e"], ["model.num_experts="]),
        (["moetrain", "+mo"], ["+model="]),
        (["moetrain", "+model", "=", "8x2"], ["8x22b"]),
        (["moetrain", "+model", "="], sorted(p.stem for p in (ROOT / "conf/model").glob("*"))),
    ],
)
def test_bash_completes_verbs_settings_and_presets(typed: list[str], expected: list[str]) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    given = """
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _moetrain; printf '%s\\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        [bash, "-c", script("bash") + given, "bash", *typed],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert sorted(done.stdout.split()) == sorted(expected), done.stderr


def test_another_shell_is_refused() -> None:
    done = moetrain("completion", "tcsh")
    assert done.returncode == 2
    assert re.search("bash or zsh, not tcsh", done.stderr)
