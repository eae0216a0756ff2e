"""How threads wait is decided before torch is loaded, and the user's choice is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.threads import WAITING, sleep_when_waiting

ROOT = Path(__file__).parents[2]
# Says what the environment is when torch is first asked for, and ends there.
AT_TORCH = """
import importlib, os, sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            print(*(os.environ.get(v) for v in sys.argv[2].split(",")), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Torch())
importlib.import_module(sys.argv[1])
"""


def environment_at_torch(module: str, **environ: str) -> list[str]:
    """Returns the variables of waiting threads, as they are when a module first asks for torch."""
    clean = {k: v for k, v in os.environ.items() if k not in WAITING}
    done = subprocess.run(
        [sys.executable, "-c", AT_TORCH, module, ",".join(WAITING)],
        cwd=ROOT, env=clean | environ, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "module",
    [
        "moetrain.training",
        "moetrain.train.rank",  # of whatever launcher
        "launch.on_ray.cluster",  # what a Ray worker loads for a rank
        "webdataset_after_data_pipeline",
        "benchmarks.train_step",
        "tests.conftest",
        "tests.support.ranks",  # what a test's ranks are forked from
    ],
)
def test_commands_ranks_and_tests_say_how_threads_wait_before_torch_is_loaded(
    module: str, tmp_path: Path
) -> None:
    source = "import data_pipeline\nimport webdataset"  # as its commands do, later
    (tmp_path / "webdataset_after_data_pipeline.py").write_text(source)
    assert environment_at_torch(module, PYTHONPATH=str(tmp_path))[0] == "10000"


def test_what_the_user_says_of_it_stays() -> None:
    own = environment_at_torch("moetrain.training", OMP_WAIT_POLICY="active")
    assert own == ["None", "active", "None", "None"]
    for name in WAITING:
        given = {name: "1"}
        sleep_when_waiting(given)
        assert given == {name: "1"}
