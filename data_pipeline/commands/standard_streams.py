"""What a command prints, where nobody reads it any more: `… | head`.

A reader that goes away is no reason to end the work, nor one for a traceback: what is printed from
then on is thrown away, and the command ends with the code that it would have had.
"""

import io
import os
import stat
import sys
from typing import Any


def outlive_readers() -> None:
    """Has standard output and standard error, where they are pipes, go on without a reader."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # A test or a notebook has put something of its own there.
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
    """A pipe that leads nowhere once its reader is gone."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for whoever else writes to the descriptor, too
            os.close(nowhere)
            return memoryview(data).nbytes


def _is_pipe(stream: Any) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # none, or closed
        return False
    return isinstance(stream, io.TextIOWrapper) and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))
