"""Why a rank failed, and whether a restart can help."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from data_pipeline import DataError, UnavailableError
from moetrain.checkpoint.folders import with_way_out
from moetrain.checkpoint.manifest import CheckpointError, StorageError, is_passing
from moetrain.checks import ConfigError
from moetrain.kinds import FailureKind
from moetrain.train.loop import TrainingError

_NO_MEMORY = "can't allocate memory"  # torch's allocator on the CPU, in a plain RuntimeError
# Another attempt may get another device; a bug fails at the same step again.
_DEVICE_SIGNS = (
    "CUDA error", "CUBLAS_STATUS", "cuDNN error", "CUDNN_STATUS", "HIP error",
    "Triton Error [CUDA]", "Cuda failure", "unhandled cuda error",
)  # fmt: skip
_NO_DEVICE_MEMORY = ("CUDA out of memory", "OutOfMemoryError")
_COLLECTIVE_SIGNS = ("gloo", "nccl", "connection", "peer", "timed out", "socket", "rendezvous")


class RunFailed(Exception):
    """A run that can't continue, with the cause."""


class ClusterError(Exception):
    """A cluster that can't be reached, or lacks what the run needs."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank, and with it an attempt, failed."""

    kind: FailureKind
    reason: str
    step: int | None = None
    """The step of the run; None: unknown, or before the first."""
    node: str | None = None
    """The address of the node that failed; None: not a node's failure."""
    silent_seconds: float | None = None
    """How long there was no progress before, if that is how it was detected."""
    is_sudden: bool = False
    """Whether the process ended without a word to its launcher."""

    @property
    def is_final(self) -> bool:
        """Whether another attempt would fail in the same way."""
        return self.kind == FailureKind.error


def device_failure(text: str) -> FailureKind | None:
    """Returns what a message says of the device of the process that writes it; None: nothing."""
    if any(sign in text for sign in _NO_DEVICE_MEMORY):
        return FailureKind.memory
    if any(sign in text for sign in _DEVICE_SIGNS):
        return FailureKind.memory if "out of memory" in text.lower() else FailureKind.died
    return None


def classify(error: BaseException) -> Failure:
    """Returns what an exception on a rank means for the run."""
    reason = with_way_out(f"{type(error).__name__}: {error}", error)
    # Another attempt need not fail in the same way.
    if isinstance(error, UnavailableError | StorageError):
        return Failure(kind=FailureKind.service, reason=str(error))
    if isinstance(error, ChildProcessError):
        return Failure(kind=FailureKind.died, reason=str(error))
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY in str(error):
        return Failure(kind=FailureKind.memory, reason=reason)
    if isinstance(error, DataError | CheckpointError | ConfigError | TrainingError):
        return Failure(kind=FailureKind.error, reason=str(error))
    if (kind := device_failure(str(error))) is not None:  # NCCL's errors have it, too
        return Failure(kind=kind, reason=reason)
    if isinstance(error, dist.DistError):
        return Failure(kind=FailureKind.peer, reason=reason)
    if isinstance(error, torch.AcceleratorError):
        return Failure(kind=FailureKind.died, reason=reason)
    if isinstance(error, ConnectionError | TimeoutError) or is_passing(error):
        return Failure(kind=FailureKind.service, reason=reason)
    if isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _COLLECTIVE_SIGNS):
        return Failure(kind=FailureKind.peer, reason=reason)
    return Failure(kind=FailureKind.error, reason=reason)
