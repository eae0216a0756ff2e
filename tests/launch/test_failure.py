"""What an exception on a rank means for the run."""

import errno
import os

import pytest
import torch
import torch.distributed as dist

from data_pipeline import DataError, UnavailableError
from launch.failure import classify
from moetrain.checkpoint.manifest import CheckpointError, StorageError
from moetrain.train.loop import TrainingError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("layer"), "error"),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), "error"),
        (DataError("no shards"), "error"),
        (TrainingError("not finite"), "error"),
        (CheckpointError("can't be written: No space left on device"), "error"),
        (OSError(errno.ENOSPC, "No space left on device"), "error"),
        (PermissionError(errno.EACCES, "metrics.jsonl"), "error"),
        (StorageError("can't be written: Stale file handle"), "service"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "service"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "service"),
        (UnavailableError("the server is away"), "service"),
        (OSError(errno.ESTALE, "Stale file handle"), "service"),
        (OSError(errno.EIO, "Input/output error"), "service"),
        (ConnectionResetError("peer"), "service"),
        (ChildProcessError("a reader was killed"), "died"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "died"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "died"),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"), "died"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "died"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "memory"),
        (dist.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 'ECC'"), "died"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (dist.DistBackendError("NCCL error"), "peer"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "peer"),
    ],
)
def test_an_error_is_tried_again_only_where_that_can_help(error: Exception, kind: str) -> None:
    failure = classify(error)
    assert failure.kind == kind
    assert failure.is_final == (kind == "error")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_settings_that_make_room(number: int) -> None:
    reason = classify(OSError(number, os.strerror(number), "runs/a/metrics.jsonl")).reason
    assert "runs/a/metrics.jsonl" in reason
    assert "checkpoint.keep_last" in reason
    assert "run.dir" in reason


def test_torch_says_no_memory_as_it_is_known_here() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert classify(refused.value).kind == "memory"
