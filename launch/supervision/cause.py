"""Which of the ranks that ended was the cause, and which only followed: pure rules over reports.

Where a rank dies, the others' collectives break. On gloo that raises an error there, which names
the peer. Under NCCL torch's watchdog ends the process by SIGABRT, which looks like any other death
from outside, and may be seen before that of the rank behind it. What a rank wrote last tells the
two apart. Leaves waiting for more deaths to `attempt.py`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import takewhile
from pathlib import Path

from launch.failure import Failure, device_failure
from moetrain.kinds import FailureKind
from moetrain.redaction import redacted_text

TAIL_BYTES = 64 * 2**10
SAID_LENGTH = 300

# As torch's NCCL process group, NCCL, gloo and torch's store write it.
_CONSEQUENCES = re.compile(
    r"watchdog caught collective operation timeout|collective timeout from another rank"
    r"|dump signal from another rank|remote process exited|ncclremoteerror|nccl.*remote error"
    r"|connection closed by (?:remote )?peer|connection reset by peer|connection was likely closed"
    r"|did the remote server shutdown|broken pipe|connection refused|nccl communicator was aborted"
    r"|token all-to-all of layer \S+ on rank \S+ failed|distbackenderror|distnetworkerror"
    r"|diststoreerror",
    re.IGNORECASE,
)
_CRASHES = re.compile(
    r"Fatal Python error: (?!Aborted)|\bXid\b|\bECC\b|Bus error|Segmentation fault"
    r"|Illegal instruction",
)
_TRACEBACK = "Traceback (most recent call last)"


class Role(IntEnum):
    """A rank's part in the end of an attempt, by what is known of it; the smallest is the cause."""

    caused = 0
    """Its own error or its log says so."""
    silent = 1
    """Its process ended and left no word, as by SIGKILL."""
    followed = 2
    """It lost a peer."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A rank that ended without an outcome, and what is known of it."""

    rank: int
    address: str
    """Of its node."""
    name: str
    """The rank for messages, with its node and process."""
    failure: Failure
    log: str = ""
    """The end of what it wrote in this attempt."""


def cause_of(ended: Sequence[Ended]) -> Failure:
    """Returns the failure behind the ends of some ranks, in whatever order they were seen.

    Blames a node only where there is evidence: a rank's own device or process failed there, or its
    process ended without a word while nothing else explains the others. Ranks that only followed,
    and processes that ended so on several nodes, blame none.
    """
    judged = [(judge(one), one) for one in ended]
    least = min(role for (role, _), _ in judged)
    (role, failure), first = min(judged, key=lambda pair: pair[0][0])
    failure = replace(failure, reason=f"{first.name}: {failure.reason}")
    if role is Role.followed:
        if failure.kind is FailureKind.died:  # the watchdog's doing
            failure = replace(failure, kind=FailureKind.peer)
        return replace(failure, node=None)
    suspects = {one.address for (other, _), one in judged if other is least}
    if failure.kind is FailureKind.error or (role is Role.silent and len(suspects) > 1):
        return replace(failure, node=None)
    return replace(failure, node=first.address)


def is_explained(ended: Iterable[Ended]) -> bool:
    """Returns whether one of the ranks didn't only follow another."""
    return any(judge(one)[0] is not Role.followed for one in ended)


def judge(one: Ended) -> tuple[Role, Failure]:
    """Returns a rank's part, and its failure with what its log adds."""
    failure = one.failure
    if failure.kind not in (FailureKind.died, FailureKind.peer):
        return Role.caused, failure
    if failure.kind is FailureKind.died and not failure.is_sudden:  # its own exception
        return Role.caused, failure
    own = _own_error(one.log)
    if own is not None:
        kind, line = own
        reason = f"{failure.reason} ({redacted_text(line.strip())[:SAID_LENGTH]})"
        return Role.caused, replace(failure, kind=kind, reason=reason)
    if failure.kind is FailureKind.peer:
        return Role.followed, failure
    told = next((line for line in reversed(one.log.splitlines()) if _follows(line)), None)
    if told is None:
        return Role.silent, failure
    reason = f"it lost another rank ({redacted_text(told.strip())[:SAID_LENGTH]})"
    return Role.followed, replace(failure, reason=reason)


def _own_error(log: str) -> tuple[FailureKind, str] | None:
    """Returns the first line that only the rank at fault writes, and the kind of its failure.

    What comes after the loss of a peer may be its doing. A traceback counts where it is the last
    word, because handled errors are logged as well.
    """
    lines = list(takewhile(lambda line: not _follows(line), log.splitlines()))
    for line in lines:
        if (kind := device_failure(line)) is not None:
            return kind, line
        if _CRASHES.search(line):
            return FailureKind.died, line
    said = list(takewhile(lambda line: not line.startswith("Fatal Python error"), lines))
    told = [line for line in said if line.strip()]
    began = max((n for n, line in enumerate(told) if _TRACEBACK in line), default=None)
    if began is None or len(lines) < len(log.splitlines()):
        return None
    raised = [n for n, line in enumerate(told) if n > began and not line[0].isspace()]
    return (FailureKind.died, told[-1]) if raised == [len(told) - 1] else None


def _follows(line: str) -> bool:
    return device_failure(line) is None and _CONSEQUENCES.search(line) is not None


class LogTails:
    """What ranks write into their logs in one attempt; earlier attempts wrote there as well."""

    def __init__(self, paths: dict[int, Path]) -> None:
        """Made before the attempt's ranks run; `paths` are by rank."""
        self._paths = paths
        self._begun = {rank: _size(path) for rank, path in paths.items()}

    def of(self, rank: int) -> str:
        """Returns the end of a rank's log; "" where nothing was written or it can't be read."""
        try:
            with self._paths[rank].open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(self._begun[rank], size - TAIL_BYTES))
                return file.read().decode(errors="replace")
        except (OSError, KeyError):
            return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
