"""Printed commands: what a shell and the command line make of them is what was meant."""

import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from data_pipeline.commands.shell import quoted, quoted_as_is, shell_command, text_setting, unquoted

ODD_TEXTS = [
    "plain", "essai été", "lr=1e-3,wd=[0.1]", "83e2010", "1.10", "true", "a b  c ", "it's", '"a"',
    'say "a"', "<EOT>", "~", "~/runs", "a\\", 'a\\"', "\\\\", "$HOME", "${run.dir}", "\\${x", "${",
    "*", "a;b", "a\nb", "a\n", "#1", "null", "{a}", "", "!x", "`ls`", "choice(a,b)", "日本",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_printed_setting_comes_out_of_a_shell_as_one_word(text: str) -> None:
    line = text_setting("run.name", text)
    said = subprocess.run(
        ["bash", "-c", f"printf '%s|' {line}"], capture_output=True, text=True, check=True
    ).stdout
    assert said == "|".join(shlex.split(line)) + "|"
    assert said.startswith("run.name=")


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_hydra_reads_a_quoted_text_as_it_was(text: str) -> None:
    parsed = OverridesParser.create().parse_override(f"x={quoted(text)}")
    assert not parsed.is_sweep_override()
    config = OmegaConf.create({"x": ""})
    config.x = parsed.value()
    assert config.x == text
    assert OverridesParser.create().parse_override(f"x={quoted_as_is(text)}").value() == text
    assert unquoted(quoted_as_is(text)) == text


def test_only_what_needs_quotes_stands_in_them() -> None:
    words = ["python", "-m", "moetrain", "run.name=a", "optim.betas=[0.9, 0.99]", "to=", "a b"]
    assert shell_command(words) == (
        "python -m moetrain run.name=a optim.betas='[0.9, 0.99]' to= 'a b'"
    )
    assert text_setting("run.name", "1e5") == "run.name=1e5"
    assert text_setting("run.name", "a,b") == "run.name=a,b"
    assert text_setting("run.name", "a,b", swept=True) == "run.name='\"a,b\"'"
    assert text_setting("run.name", "null") == "run.name='\"null\"'"
