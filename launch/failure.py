"""What went wrong with a rank, and whether starting again can help."""

from dataclasses import dataclass

import torch.distributed as dist

from data_pipeline import DataError, UnavailableError
from moetrain.checkpoint import CheckpointError
from moetrain.checks import ConfigError
from moetrain.train import TrainingError

_COLLECTIVE_SIGNS = ("gloo", "nccl", "connection", "peer", "timed out", "socket", "rendezvous")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank ended.

    `died` and `preempted`: its process or node is gone. `peer`: it lost another rank in a
    collective. Those are worth another attempt. `error`: an exception of its own, which another
    attempt would meet again.
    """

    kind: str
    reason: str

    @property
    def is_final(self) -> bool:
        """Whether another attempt would fail alike."""
        return self.kind == "error"


def classify(error: BaseException) -> Failure:
    """Returns what an exception on a rank means for the run."""
    reason = f"{type(error).__name__}: {error}"
    # A server, a disk or a helping process: nothing that another attempt must meet again.
    if isinstance(error, UnavailableError | ChildProcessError):
        return Failure(kind="died", reason=str(error))
    if isinstance(error, DataError | CheckpointError | ConfigError | TrainingError):
        return Failure(kind="error", reason=str(error))
    if isinstance(error, dist.DistError):
        return Failure(kind="peer", reason=reason)
    if isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _COLLECTIVE_SIGNS):
        return Failure(kind="peer", reason=reason)
    return Failure(kind="error", reason=reason)
