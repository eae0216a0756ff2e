"""`moetrain compare RUN … [key=value …]`: which arms differ by more than the noise of their seeds.

Owns the command's settings and its messages. Leaves composing the settings to `command.py`.
"""

import sys
from dataclasses import field, fields
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from data_pipeline.commands.shell import quoted_as_is
from data_pipeline.settings import PathText
from moetrain.checks import ConfigError
from moetrain.command import run_command
from moetrain.compare.comparison import compare_runs
from moetrain.compare.measuring import END
from moetrain.compare.text import as_text
from moetrain.exit_codes import BAD_CONFIGURATION, DONE, FAILED
from moetrain.redaction import redacted_text

_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn",
               "--config-dir", "-cd")  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class CompareSettings:
    """Which runs to compare, and by what."""

    runs: list[PathText] = field(default_factory=list)
    """Run folders, a sweep's folder, folders of runs, patterns. Words without `=` are added."""
    measure: str | None = None
    """A metric; None: the loss on held-out text, or in training if there is none."""
    at: str = END
    """Where: `end`, `common` (as far as all runs are), or `step:500`, `tokens:1e6`, `flops:1e12`,
    `time:600`."""
    x: str = "step"
    """What curves are drawn over, and `common` is measured in: step, tokens, flops or time."""
    baseline: str | None = None
    """The arm that others are compared with: its name, settings, or one of its runs; None: the one
    that the others were matched to, or the first of the table."""
    by: list[str] = field(default_factory=list)
    """The settings that name the arms."""
    names: list[str] = field(default_factory=list)
    """A name for each arm, in the table's order."""
    out: PathText | None = None
    """A folder for the page and the tables: compare.html, runs and records as CSV and Parquet."""


def main(settings: CompareSettings) -> int:
    """Prints the comparison, and writes its page and tables if asked to; returns the exit code."""
    try:
        comparison = compare_runs(
            settings.runs,
            measure=settings.measure,
            at=settings.at,
            axis=settings.x,
            baseline=settings.baseline,
            by=settings.by,
            names=settings.names,
        )
    except ConfigError as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    print(redacted_text(as_text(comparison)))
    if settings.out is None:
        return DONE
    # matplotlib takes a second to import.
    from moetrain.compare.page import write_page
    from moetrain.compare.tables import write_tables

    try:
        folder = Path(settings.out)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"\nwritten   {write_page(comparison, folder)}")
        for line in write_tables(comparison, folder):
            print(f"          {line}")
    except OSError as error:
        print(f"moetrain: the comparison could not be written: {error}", file=sys.stderr)
        return FAILED
    return DONE


def as_settings(words: list[str]) -> list[str]:
    """Returns a command line whose paths are the setting `runs`.

    A path may hold an equals sign, as runs named after their values do: it is one unless what is
    before the sign is a setting of this command.
    """
    known = {setting.name for setting in fields(CompareSettings)}
    paths: list[str] = []
    rest: list[str] = []
    for place, word in enumerate(words):
        key, is_set, _ = word.partition("=")
        is_setting = bool(is_set) and (
            key.lstrip("+~") in known or not (set("/*?[") & set(word) or Path(word).exists())
        )
        is_flag = word.startswith("-") or (place > 0 and words[place - 1] in _WITH_VALUE)
        (rest if is_setting or is_flag else paths).append(word)
    return [*rest, f"runs=[{','.join(map(quoted_as_is, paths))}]"] if paths else rest


if __name__ == "__main__":
    sys.argv[1:] = as_settings(sys.argv[1:])
    run_command(main, tree=CompareSettings, module="moetrain.compare")
