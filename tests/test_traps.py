"""Every trap that is met so far is guarded by a named test, and docs/traps.md names it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAPS = (*range(1, 13), 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 33)


def guards() -> dict[int, set[str]]:
    """Returns the tests that are marked for each trap, as `tests/file.py::name`.

    Tests that a machine without a GPU skips don't count.
    """
    found: dict[int, set[str]] = {trap: set() for trap in TRAPS}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            marks = [ast.unparse(d).removeprefix("pytest.mark.") for d in node.decorator_list]
            if any(mark.startswith(("gpu", "skip", "xfail")) for mark in marks):
                continue
            for mark in marks:
                if mark.startswith("trap("):
                    for trap in re.findall(r"\d+", mark):
                        found[int(trap)].add(f"{path.relative_to(ROOT).as_posix()}::{node.name}")
    return found


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_guarded_by_a_test_that_the_docs_name(trap: int) -> None:
    tests = guards()[trap]
    assert tests, f"no test is marked @pytest.mark.trap({trap})"
    text = (ROOT / "docs/traps.md").read_text()
    (row,) = re.findall(rf"^\| {trap} \|.*$", text, re.MULTILINE)
    named = set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", row))
    assert named, f"docs/traps.md names no test for trap {trap}"
    assert named <= tests, f"named for trap {trap}, but not marked for it: {named - tests}"
