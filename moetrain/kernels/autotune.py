"""How long each expert backend takes on a shape, forward and backward.

Owns the timed work and the timing. Leaves to moetrain/parallel/kernel_choice.py which rank
measures, the broadcast, and the cache.
"""

import functools
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from statistics import median

import torch
from torch import Tensor

from moetrain.kernels.assignments import Assignments, HostCounts, group_assignments
from moetrain.kernels.expert_swiglu import Backend

REPEATS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The shape of what a rank's experts compute at once, with the same load for every expert."""

    rows: int
    choices: int
    """The number of these experts that each row goes to."""
    exchanged: bool
    """Whether rows come from other ranks: how many assignments a row has is in the data then."""
    dim: int
    hidden: int
    experts: int
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> str:
        """The key of the cache, with the number of assignments rounded up to a power of two."""
        num_assignments = 1 << max(self.rows * self.choices - 1, 0).bit_length()
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{machine(self.device)}, {dtype}, dim {self.dim}, hidden {self.hidden}, experts "
            f"{self.experts}, assignments {num_assignments}"
        )

    def outline(self) -> tuple[Tensor, Assignments, Tensor, Tensor, Tensor]:
        """Returns uninitialised rows, assignments and weights of this shape that take no memory."""
        number = torch.empty((), dtype=self.dtype, device=self.device)
        index = torch.empty((), dtype=torch.int64, device=self.device)
        row = index.expand(self.rows * self.choices)
        counts, offsets = index.expand(self.experts), index.expand(self.rows + 1)
        weight = number.expand(self.experts, self.hidden, self.dim)
        assignments = Assignments(
            row, counts, row, offsets, self.choices, row, HostCounts([0] * self.experts)
        )
        return number.expand(self.rows, self.dim), assignments, weight, weight, weight

    def problem(self) -> tuple[Tensor, Tensor, Assignments, Tensor, Tensor, Tensor]:
        """Returns rows, gates, assignments and weights of this shape, with values.

        It doesn't change the global random state.
        """
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)

        num_assignments = self.rows * self.choices
        choices = torch.arange(num_assignments, device=self.device) % self.experts
        assignments = group_assignments(
            choices.view(self.rows, self.choices),
            num_groups=self.experts,
            num_assignments=num_assignments if self.exchanged else None,
        )
        gates = torch.full((num_assignments,), 1 / self.choices, device=self.device)
        gate, up, down = (random(self.experts, self.hidden, self.dim) for _ in range(3))
        return random(self.rows, self.dim), gates, assignments, gate, up, down


@functools.cache
def machine(device: torch.device) -> str:
    """Returns the model of a device and the versions of its kernels."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    return f"{name}, torch {torch.__version__}, triton {triton}"


def seconds_of_backends(
    shape: ExpertShape,
    candidates: Mapping[str, Backend],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Returns the median seconds of each candidate that runs, forward and backward.

    It needs the memory of one more layer while it runs, doesn't change the global random state,
    doesn't communicate and leaves no gradients. Each candidate is called once to warm up, then all
    in turn, five times. One that raises is left out with a warning; if all do, raises RuntimeError
    with their reasons. Lack of memory says nothing about a candidate and is raised.
    """
    x, gates, assignments, *weights = shape.problem()
    inputs = [tensor.requires_grad_() for tensor in (x, gates, *weights)]

    def both_ways(backend: Backend) -> None:
        with torch.enable_grad():
            out = backend(inputs[0], inputs[1], assignments, *inputs[2:])
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    return measure(
        {name: functools.partial(both_ways, backend) for name, backend in candidates.items()},
        clock=clock,
        synchronise=torch.cuda.synchronize if shape.device.type == "cuda" else _nothing,
    )


def _nothing() -> None: ...


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    clock: Callable[[], float] = time.perf_counter,
    synchronise: Callable[[], None] = _nothing,
) -> dict[str, float]:
    """Returns the median seconds of each candidate that runs, as `seconds_of_backends` does.

    `synchronise` is called before each look at the clock.
    """

    def timed(call: Callable[[], object]) -> float:
        synchronise()
        start = clock()
        call()
        synchronise()
        return clock() - start

    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    failures: dict[str, str] = {}
    for turn in range(1 + REPEATS):
        for name, call in candidates.items():
            if name in failures:
                continue
            try:
                taken = timed(call)
            except torch.OutOfMemoryError:
                raise  # may be temporary: not a reason to exclude the backend from now on
            except Exception as error:  # a backend may refuse the shape
                failures[name] = f"{type(error).__name__}: {error}"
                logger.warning("backend %s is left out: %s", name, failures[name])
                continue
            if turn:  # the first call compiles
                seconds[name].append(taken)
    if len(failures) == len(candidates):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise RuntimeError(f"no expert backend runs on this shape: {reasons}")
    return {name: median(taken) for name, taken in seconds.items() if name not in failures}
