"""`python -m tests.mistakes [WORD …] [--only verify|tests]`: who sees which mistake?

Puts each mistake into a copy of the code, asks `moetrain verify` and the test that is named for it,
and prints a Markdown table. With words, only the mistakes that have one of them in their names.
Exits with 1 if a mistake is seen by neither.
"""

import argparse
import platform
import sys
import tempfile
from pathlib import Path

from tests.mistakes import elsewhere, of_training
from tests.mistakes.judges import ask_verify, test_sees, what_it_sees
from tests.mistakes.mistake import Mistake, copy_sources


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--only", choices=("verify", "tests"))
    given = parser.parse_args()
    mistakes = [
        m
        for m in (*of_training.MISTAKES, *elsewhere.MISTAKES)
        if not given.words or any(word in m.name for word in given.words)
    ]
    for mistake in mistakes:
        mistake.require_anchor()
    print(f"{machine()}\n\n| mistake | verify sees it | the test that sees it |\n|---|---|---|")
    seen, unseen = 0, []
    with tempfile.TemporaryDirectory(prefix="moetrain-mistakes-") as folder:
        code, run = copy_sources(Path(folder, "code")), Path(folder, "run")
        run.mkdir()
        for mistake in mistakes:
            by_verify, by_test = judge(mistake, code, run, only=given.only)
            seen += bool(by_verify)
            if not (by_verify or by_test):
                unseen.append(mistake.name)
            test = "not asked" if by_test is None else f"`{mistake.test}`" if by_test else "**no**"
            print(f"| {mistake.name} | {by_verify or '–'} | {test} |", flush=True)
    asked = sum(m.verify for m in mistakes)
    if given.only != "tests" and asked:
        print(f"\nverify sees {seen} of {asked} that it was asked about")
    for name in unseen:
        print(f"seen by nobody: {name}", file=sys.stderr)
    return 1 if unseen else 0


def judge(
    mistake: Mistake, code: Path, run: Path, *, only: str | None = None
) -> tuple[str, bool | None]:
    """Returns where verify sees a mistake, and whether its test does; None: not asked."""
    mistake.make(code)
    try:
        by_verify, by_test = "", None
        if mistake.verify and only != "tests":
            by_verify = what_it_sees(ask_verify(code, folder=run))
        if only != "verify":
            by_test = test_sees(code, mistake.test)
    finally:
        mistake.undo(code)
    return by_verify, by_test


def machine() -> str:
    """Returns the processor's name and its cores, as lscpu gives them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    sys.exit(main())
