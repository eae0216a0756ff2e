"""Output after its reader is gone: `… | head`.

A reader that exits is no reason to end the work or to print a traceback: further output is
discarded, and the command ends with its usual exit code.
"""

import io
import os
import stat
import sys
from typing import Any


def ignore_broken_pipes() -> None:
    """Makes standard output and standard error, if they are pipes, survive their reader."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # A test or a notebook has replaced the stream.
        if stream is getattr(sys, f"__{name}__") and _is_pipe(stream):
            setattr(sys, name, persistent_stream(stream))


def persistent_stream(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Returns a text stream to the same descriptor that doesn't fail when its reader is gone."""
    stream.flush()
    pipe: Any = _Pipe(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        pipe if stream.write_through else io.BufferedWriter(pipe),
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Pipe(io.FileIO):
    """A pipe that discards output once its reader is gone."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # also for others that write to the descriptor
            os.close(nowhere)
            return memoryview(data).nbytes


def _is_pipe(stream: Any) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no such stream, or a closed one
        return False
    return isinstance(stream, io.TextIOWrapper) and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))
