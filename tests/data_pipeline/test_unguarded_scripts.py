"""A script that builds shards without `if __name__ == "__main__"` gets an error, and ends."""

import os
import subprocess
import sys
from pathlib import Path

from tests.data_pipeline.conftest import write_corpus

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
from data_pipeline import BuildSettings, build_shards
{guard}build_shards(
    BuildSettings(corpus="corpus", to="{to}", tokenizer="mixtral-v1", num_processes=2),
    progress=False,
)
"""


def run(folder: Path, *, guard: str, to: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT.format(guard=guard, to=to))
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_script_without_a_guard_is_told_what_is_missing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    failed = run(tmp_path, guard="", to="unguarded")
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("ChildProcessError: no process that tokenises could begin")
    assert 'below `if __name__ == "__main__":`' in last
    assert "memory" not in last
    assert not (tmp_path / "unguarded").exists()
    guarded = run(tmp_path, guard='if __name__ == "__main__":\n    ', to="guarded")
    assert (guarded.returncode, guarded.stderr) == (0, "")
