"""The checks of a commit are those of `make check`, and no finding is ignored without a reason."""

import io
import re
import tokenize
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_pre_commit_runs_what_make_check_runs() -> None:
    recipe = re.search(r"^check:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == commands
    for hook in local["hooks"]:
        assert hook["pass_filenames"] is False, "else it would see fewer files"
        assert hook["types_or"] == ["python", "toml"]


def test_tests_and_benchmarks_ignore_a_finding_only_by_its_code_and_with_a_reason() -> None:
    bare = []
    for top in ("tests", "benchmarks", "examples"):
        for path in ROOT.glob(f"{top}/**/*.py"):
            for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
                ignores = token.type == tokenize.COMMENT and "type: ignore" in token.string
                if ignores and not re.fullmatch(
                    r"# type: ignore\[[a-z, -]+\]  # \S.*", token.string
                ):
                    bare.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}")
    assert not bare, "\n".join(bare)
