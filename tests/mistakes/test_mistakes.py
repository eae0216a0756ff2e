"""The list of mistakes fits the code, and some of them are seen by verify."""

import ast
import re
from pathlib import Path

import pytest

from tests.mistakes import elsewhere, of_training
from tests.mistakes.judges import ask_verify, what_it_sees
from tests.mistakes.mistake import ROOT, Mistake, copy_sources

ALL = (*of_training.MISTAKES, *elsewhere.MISTAKES)


@pytest.mark.parametrize("mistake", ALL, ids=lambda mistake: mistake.name)
def test_each_mistake_still_has_its_place_in_the_code_and_its_test(mistake: Mistake) -> None:
    text = mistake.require_anchor()
    changed = text.replace(mistake.right, mistake.wrong)
    assert changed != text
    ast.parse(changed)
    file, _, name = mistake.test.partition("::")
    tests = ast.parse((ROOT / file).read_text())
    names = {node.name for node in ast.walk(tests) if isinstance(node, ast.FunctionDef)}
    assert not name or name in names


def test_no_mistake_is_there_twice() -> None:
    assert len({mistake.name for mistake in ALL}) == len(ALL)
    assert len({(m.file, m.right, m.wrong) for m in ALL}) == len(ALL)


def test_an_anchor_that_is_gone_or_there_twice_is_an_error() -> None:
    gone = Mistake(name="x", file="Makefile", right="no such line", wrong="", test="")
    with pytest.raises(ValueError, match="0 times, not once"):
        gone.require_anchor()


@pytest.mark.slow
@pytest.mark.trap(33)
def test_verify_sees_what_is_equally_wrong_in_every_layout(tmp_path: Path) -> None:
    """One rank is enough for these: the float64 reference differs."""
    code = copy_sources(tmp_path / "code")
    run = tmp_path / "run"
    run.mkdir()
    assert what_it_sees(ask_verify(code, "verify.num_ranks=1", folder=run)) == ""
    for name, column in (
        ("betas swapped", "optimizer: .*state"),
        ("bias moved on a skipped step", "optimizer: "),
        ("gates detached", "layouts: "),
        ("residual initialisation unscaled", "layouts: "),
    ):
        (mistake,) = [m for m in of_training.MISTAKES if m.name == name]
        mistake.make(code)
        try:
            seen = what_it_sees(ask_verify(code, "verify.num_ranks=1", folder=run))
            assert re.search(column, seen), (name, seen)
        finally:
            mistake.undo(code)
