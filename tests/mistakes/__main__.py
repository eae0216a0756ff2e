"""`python -m tests.mistakes [WORD …] [--part training|elsewhere] [--only verify|tests]`

Who sees which mistake?

Puts each mistake into a copy of the code, asks `moetrain verify` and the test that is named for it,
and prints a Markdown table. With words, only the mistakes that have one of them in their names.
Exits with 1 if a mistake is seen by neither.
"""

import argparse
import platform
import sys
import tempfile
from pathlib import Path

from data_pipeline.commands.standard_streams import ignore_broken_pipes
from tests.mistakes import elsewhere, of_training
from tests.mistakes.judges import ask_verify, failing_test, what_it_sees
from tests.mistakes.mistake import Mistake, copy_sources


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--only", choices=("verify", "tests"))
    parser.add_argument("--part", choices=("training", "elsewhere"))
    given = parser.parse_args()
    parts = {"training": of_training.MISTAKES, "elsewhere": elsewhere.MISTAKES}
    mistakes = [
        mistake
        for part in ([given.part] if given.part else parts)
        for mistake in parts[part]
        if not given.words or any(word in mistake.name for word in given.words)
    ]
    for mistake in mistakes:
        mistake.require_anchor()
    print(f"{machine()}\n\n| mistake | verify sees it | the test that sees it |\n|---|---|---|")
    seen, unseen = 0, []
    with tempfile.TemporaryDirectory(prefix="moetrain-mistakes-") as folder:
        code, run = copy_sources(Path(folder, "code")), Path(folder, "run")
        run.mkdir()
        if given.only != "verify":
            require_passing(code, mistakes)
        for mistake in mistakes:
            by_verify, by_test = judge(mistake, code, run, only=given.only)
            seen += bool(by_verify)
            if not (by_verify or by_test):
                unseen.append(mistake.name)
            print(f"| {mistake.name} | {by_verify or '–'} | {by_test or '–'} |", flush=True)
    asked = sum(m.verify for m in mistakes)
    if given.only != "tests" and asked:
        print(f"\nverify sees {seen} of {asked} that it was asked about")
    for name in unseen:
        print(f"seen by nobody: {name}", file=sys.stderr)
    return 1 if unseen else 0


def judge(mistake: Mistake, code: Path, run: Path, *, only: str | None) -> tuple[str, str]:
    """Returns where verify sees a mistake, and the test that does; empty for nowhere and none."""
    mistake.make(code)
    try:
        by_verify = by_test = ""
        if mistake.verify and only != "tests":
            by_verify = what_it_sees(ask_verify(code, folder=run))
        if only != "verify" and (failed := failing_test(code, mistake.test)):
            by_test = f"`{failed}`"
    finally:
        mistake.undo(code)
    return by_verify, by_test


def require_passing(code: Path, mistakes: list[Mistake]) -> None:
    """Raises RuntimeError where a test fails without any mistake: it would see all of them."""
    if failed := failing_test(code, *dict.fromkeys(mistake.test for mistake in mistakes)):
        raise RuntimeError(f"{failed} fails on the code as it is")


def machine() -> str:
    """Returns the processor's name and its cores, as lscpu gives them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    ignore_broken_pipes()
    sys.exit(main())
