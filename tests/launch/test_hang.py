"""Who hangs and who waits, from what ranks said and from real stacks."""

import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.on_ray.node_agent import NodeAgent
from launch.supervision.hang import Standing, culprits, innermost_frame, standing
from moetrain.parallel import Doing
from moetrain.parallel.flight_recorder import unfinished_collectives
from tests.support.ranks import run_ranks

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
        assert standing(HERE, stack) is Standing.in_own_code
    over.set()

    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    with in_thread(lambda: dist.init_process_group("gloo", store=store, rank=0, world_size=2)) as s:
        assert "torch/distributed/" in innermost_frame(s)
        assert standing(HERE, s) is Standing.in_collective


def test_who_says_what_it_waits_for_waits() -> None:
    doing = Doing(phase="forward", collective="token all-to-all of layer 1")
    assert standing(doing, "") is Standing.in_collective


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


# Stacks as ranks on CUDA report them, shortened: the rank's own thread, and autograd's.
TORCH = "/venv/lib/python3.11/site-packages/torch"
FSDP = f"{TORCH}/distributed/fsdp/_fully_shard"
MAIN = f"""thread MainThread:
  File "/moetrain/train/rank.py", line 40, in run_rank
    outcome = train(trainer)
  File "/moetrain/train/step.py", line 120, in step
    loss.backward()
  File "{TORCH}/autograd/graph.py", line 865, in _engine_run_backward
    return Variable._execution_engine.run_backward(  # Calls into the C++ engine
"""
POLL = """thread None:
  File "/venv/lib/python3.11/site-packages/ray/_private/function_manager.py", line 689, in actor
    return method(__ray_actor, *args, **kwargs)
  File "/launch/on_ray/rank_actor.py", line 90, in stacks
    for ident, frame in sys._current_frames().items()
"""
ENGINE = f"""thread None:
  File "{TORCH}/autograd/function.py", line 315, in apply
    return user_fn(self, *args)
"""
FSDP_HOOK = f"""  File "{FSDP}/_fsdp_state.py", line 310, in _pre_backward
    self._fsdp_param_group.pre_backward(default_prefetch)
  File "{FSDP}/_fsdp_param_group.py", line 350, in wait_for_unshard
    self._wait_all_gather_streams_on_event(event)
  File "{TORCH}/cuda/streams.py", line 66, in wait_event
    event.wait(self)
"""
REDUCE_SCATTER = f"""  File "{FSDP}/_fsdp_collectives.py", line 512, in foreach_reduce
    reduce_scatter_comm(output, input, group, op)
  File "{TORCH}/_ops.py", line 1243, in __call__
    return self._op(*args, **kwargs)
"""
EXPERTS = """  File "/moetrain/kernels/expert_function.py", line 88, in backward
    grad = slow(rows)
"""
COUNTS = """  File "/moetrain/kernels/megablocks_ops.py", line 60, in backward
    padded = bins[-1].{wait}
"""


def spied(stack: str) -> str:
    """Returns a stack as py-spy writes it: innermost frame first, without text, paths shortened."""
    threads = []
    for thread in re.split(r"\n(?=thread )", stack):
        frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', thread)
        named = [
            f"    {what} ({file.split('site-packages/')[-1]}:{line})" for file, line, what in frames
        ]
        threads.append("Thread 71 (idle)\n" + "\n".join(reversed(named)))
    return "\n".join(threads)


@pytest.mark.parametrize("read", [str, spied])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize(
    "waiting",
    ["", ENGINE + FSDP_HOOK, ENGINE + REDUCE_SCATTER, ENGINE + FSDP_HOOK + REDUCE_SCATTER],
)
def test_in_a_backward_pass_on_cuda_the_rank_whose_engine_runs_is_the_culprit(
    waiting: str, order: tuple[int, ...], read: Callable[[str], str]
) -> None:
    """Every rank's own thread stands in the same place."""
    parts = [MAIN, POLL, ENGINE + EXPERTS]
    guilty = read("\n".join(parts[index] for index in order))
    others = read("\n".join([*(part for part in (waiting,) if part), MAIN, POLL]))
    doing = Doing(phase="backward", step=3)
    stacks = {0: others, 1: others, 2: guilty, 3: others}
    assert culprits(dict.fromkeys(stacks, doing), stacks, unresponsive=set()) == [2]


@pytest.mark.parametrize("wait", ["item()", "tolist()", "cpu()", "to('cpu')", "to(device='cpu')"])
def test_who_waits_for_its_device_is_no_culprit_where_another_computes(wait: str) -> None:
    at_device = MAIN + "\n" + ENGINE + COUNTS.format(wait=wait)
    computes = MAIN + "\n" + ENGINE + EXPERTS
    assert standing(HERE, at_device) is Standing.at_device
    doing = dict.fromkeys(range(3), HERE)
    assert culprits(doing, {0: at_device, 1: computes, 2: MAIN}, unresponsive=set()) == [1]
    in_forward = MAIN.replace("_engine_run_backward", "synchronize").replace("autograd", "cuda")
    assert standing(HERE, in_forward) is Standing.at_device
    # Nobody computes: those at their device come before those in a collective.
    gathers = MAIN + "\n" + ENGINE + FSDP_HOOK
    assert culprits(doing, {0: gathers, 1: at_device, 2: gathers}, unresponsive=set()) == [1]


def test_all_are_named_where_all_only_wait() -> None:
    stacks = dict.fromkeys(range(3), MAIN + "\n" + POLL)
    assert culprits(dict.fromkeys(stacks, HERE), stacks, unresponsive=set()) == [0, 1, 2]


class Slow(torch.autograd.Function):
    """Holds its backward pass where the test wants it."""

    over = threading.Event()
    begun = threading.Event()

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        Slow.begun.set()
        Slow.over.wait(60)
        return grads[0]


def test_a_real_backward_pass_on_a_cpu_is_seen_where_it_stands() -> None:
    x = torch.ones(2, requires_grad=True)

    def run_rank() -> None:
        Slow.apply(x).sum().backward()  # type: ignore[no-untyped-call]  # torch has no types here

    thread = threading.Thread(target=run_rank, daemon=True)
    thread.start()
    assert Slow.begun.wait(60)
    assert thread.ident is not None
    stack = "".join(traceback.format_stack(sys._current_frames()[thread.ident]))
    Slow.over.set()
    thread.join()
    assert "_engine_run_backward" in stack, "torch's name for where a rank waits for its engine"
    assert standing(HERE, f"thread x:\n{stack}") is Standing.in_own_code


def begin_one_alone(rank: int) -> list[str]:
    """Begins a collective on rank 0 that rank 1 doesn't join, and returns what is in flight."""
    dist.all_reduce(torch.ones(3))
    if rank:
        dist.recv(torch.empty(1), src=0)
        return unfinished_collectives()
    while any("[[3]]" in line for line in unfinished_collectives()):
        time.sleep(0.01)  # gloo's thread has yet to say that it is done
    work = dist.all_reduce(torch.ones(7), async_op=True)
    lines = unfinished_collectives()
    dist.send(torch.zeros(1), dst=1)
    del work
    return lines


def ranks_in_flight() -> list[str]:
    rank = dist.get_rank()
    found = begin_one_alone(rank)
    if rank == 1:
        dist.all_reduce(torch.ones(7))
    return found


def test_the_report_has_the_collective_that_a_rank_begun_alone() -> None:
    """Real gloo ranks: torch's flight recorder is the same for NCCL."""
    first, second = run_ranks(ranks_in_flight, 2)
    assert any("gloo:all_reduce" in line and "[[7]]" in line for line in first), first
    assert not any("[[7]]" in line for line in second), second


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
        assert standing(HERE, text) is Standing.in_own_code
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
