"""Who hangs and who waits, from what ranks said and from real stacks."""

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.on_ray.node_agent import NodeAgent
from launch.supervision.hang import culprits, innermost_frame, waits
from moetrain.parallel import Doing

HERE = Doing(phase="forward", step=3)


@contextmanager
def in_thread(work: Callable[[], object]) -> Iterator[str]:
    """Runs work() in a thread under a function of the training function's name; gives its stack."""

    def run_rank() -> None:
        work()

    thread = threading.Thread(target=run_rank, daemon=True)
    thread.start()
    time.sleep(0.3)
    assert thread.ident is not None
    frame = sys._current_frames()[thread.ident]
    yield f"thread {thread.name}:\n{''.join(traceback.format_stack(frame))}"


def test_a_python_loop_is_told_from_a_collective() -> None:
    over = threading.Event()
    with in_thread(over.wait) as stack:
        assert innermost_frame(stack).endswith("threading.py")
        assert not waits(HERE, stack)
    over.set()

    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    with in_thread(lambda: dist.init_process_group("gloo", store=store, rank=0, world_size=2)) as s:
        assert "torch/distributed/" in innermost_frame(s)
        assert waits(HERE, s)


def test_who_says_what_it_waits_for_waits() -> None:
    assert waits(Doing(phase="forward", collective="token all-to-all of layer 1"), "")


def test_the_culprit_is_who_does_not_wait() -> None:
    waiting = Doing(phase="forward", collective="token all-to-all of layer 1")
    assert culprits({0: waiting, 1: HERE, 2: waiting}, {}, unresponsive=set()) == [1]
    nobody = culprits({0: waiting, 2: waiting}, {}, unresponsive=set())
    assert nobody == [0, 2], "nobody stands out: all are named"


def test_a_stopped_rank_is_the_culprit_wherever_it_was_stopped() -> None:
    waiting = Doing(phase="forward", collective="token all-to-all of layer 1")
    assert culprits({0: waiting, 1: waiting, 2: HERE}, {}, unresponsive={1, 7}) == [1]


def test_of_ranks_that_wait_in_no_collective_the_last_is_the_culprit() -> None:
    """As on a GPU, where a rank waits for its device in the middle of the model's code."""
    later = Doing(phase="backward", step=3)
    assert culprits({0: later, 1: HERE, 2: later}, {}, unresponsive=set()) == [1]


@pytest.mark.parametrize("stopped", [False, True])
def test_stacks_are_read_from_outside_also_of_a_stopped_process(
    tmp_path: Path, stopped: bool
) -> None:
    program = tmp_path / "stuck.py"
    program.write_text("def run_rank():\n    while True:\n        pass\n\nrun_rank()\n")
    process = subprocess.Popen([sys.executable, str(program)])
    try:
        time.sleep(1.0)
        if stopped:
            os.kill(process.pid, 19)
            time.sleep(0.2)
        text = NodeAgent().stacks([process.pid])[process.pid]
        assert ("T (stopped)" in text) == stopped
        assert innermost_frame(text).endswith("stuck.py")
        assert not waits(HERE, text)
    finally:
        process.kill()
        process.wait()
    assert "gone" in NodeAgent().stacks([process.pid])[process.pid]


def test_torch_is_not_needed_to_look_at_a_node() -> None:
    """The agent must start fast: its module may import the standard library only."""
    code = (
        "import importlib.util, sys; "
        "spec = importlib.util.spec_from_file_location('agent', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "sys.exit('torch' in sys.modules or 'launch' in sys.modules)"
    )
    source = Path(__file__).parents[2] / "launch/on_ray/node_agent.py"
    assert subprocess.run([sys.executable, "-c", code, str(source)], check=False).returncode == 0
