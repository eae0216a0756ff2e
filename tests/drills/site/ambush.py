"""A fault at an exact point of a rank's work, without a hook in the product.

Runs in the ranks, where nothing else of tests/ does. Once `moetrain.parallel.activity` is imported,
the activity that a rank reports is observed. At the fault's point, the fault is injected from
inside, in the thread that trains. It is injected once: a file records when, so that the next
attempt is spared.
"""

import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ACTIVITY = "moetrain.parallel.activity"
OOM_ROOM_BYTES = 64 * 2**20  # for what isn't torch: the error has to be reported


def lie_in_wait(path: str) -> None:
    """Injects a fault into this process, if it becomes the rank that the file names."""
    sys.meta_path.insert(0, _WhenImported(Path(path)))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Observes the activity from the moment its module is imported."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != ACTIVITY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_listen(module: ModuleType) -> None:
            execute(module)
            with suppress(FileNotFoundError):  # the drill has no fault of this kind
                _Ambush(json.loads(self._path.read_text())).listen(module.Activity)

        spec.loader.exec_module = execute_and_listen
        return spec


class _Ambush:
    """One fault: where it is injected, and how."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self._fault = fault
        self._saving = False

    def listen(self, activity: Any) -> None:
        """Wraps the functions that the training thread calls at each point of its work."""
        begin, layer, collective = activity.begin, activity.layer, activity.collective

        def begin_and_look(self_: Any, phase: str, *, step: int | None = None) -> None:
            before = self_.read()[0]
            if self._fault["at"] == "end" and phase != before.phase:
                self._look(before)
            begin(self_, phase, step=step)
            if self._fault["at"] == "begin":
                self._look(self_.read()[0])
            if self._fault["at"] == "file":
                self._saving |= self._is_there(self_.read()[0])

        def layer_and_look(self_: Any, number: int) -> None:
            layer(self_, number)
            if self._fault["at"] == "layer" and self._fault["layer"] == number:
                self._look(self_.read()[0])

        @contextmanager
        def look_and_wait(self_: Any, name: str) -> Iterator[None]:
            waits: AbstractContextManager[None] = collective(self_, name)
            with waits:
                # The tensors have been handed to gloo, and aren't waited for yet.
                if self._fault["at"] == "collective" and "sending" in name:
                    self._look(self_.read()[0])
                yield

        activity.begin, activity.layer = begin_and_look, layer_and_look
        activity.collective = look_and_wait
        if self._fault["at"] == "file":
            sys.addaudithook(self._before_operation)

    def _before_operation(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Injects the fault when the rank opens its file of a checkpoint for writing."""
        if self._saving and event == "open" and str(arguments[0]).endswith(".safetensors"):
            flags = arguments[2]
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
                self._saving = False
                self._inject(f"opening {Path(str(arguments[0])).name}")

    def _look(self, doing: Any) -> None:
        if self._is_there(doing):
            self._inject(str(doing))

    def _is_there(self, doing: Any) -> bool:
        import torch.distributed as dist

        return (
            doing.phase == self._fault["phase"]
            and doing.step == self._fault["step"]
            and dist.is_initialized()
            and dist.get_rank() == self._fault["rank"]
        )

    def _hold(self) -> None:
        """Waits until the test releases all runs that it holds."""
        mark = Path(self._fault["mark"])
        mark.with_name(f"{mark.name}.{os.getpid()}").touch()
        while not mark.with_name("released").exists():
            time.sleep(0.01)

    def _inject(self, where: str) -> None:
        if self._fault["action"] == "hold":
            self._hold()
            return
        mark = {"time": time.time(), "pid": os.getpid(), "where": where}
        try:
            with open(self._fault["mark"], "x") as file:
                json.dump(mark, file)
        except FileExistsError:
            return  # it was injected into an earlier attempt
        match self._fault["action"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "loop":
                while True:
                    pass
            case "raise":
                raise ArithmeticError("an error that the drill has put here")
            case "out of memory":
                run_out_of_memory()
            case action:
                raise AssertionError(f"no such action: {action}")


def run_out_of_memory() -> None:
    """Makes torch's allocator fail: this process has no memory left that it may use."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + OOM_ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    held = []
    while True:
        held.append(torch.ones(2**20))
