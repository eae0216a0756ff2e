"""A rank's failure, in the form in which it is sent to the other ranks."""

from typing import NamedTuple

from moetrain.checkpoint.folders import with_way_out
from moetrain.checkpoint.manifest import CheckpointError, StorageError, is_passing


class RankFailure(NamedTuple):
    """A rank's failure, as it is sent to the others. Permanent failures sort first."""

    passes: bool
    reason: str

    def error(self, what: str = "") -> CheckpointError:
        kind = StorageError if self.passes else CheckpointError
        return kind(f"{what}: {self.reason}" if what else self.reason)


def rank_failure(failure: Exception | None) -> RankFailure | None:
    if failure is None:
        return None
    reason = with_way_out(f"{type(failure).__name__}: {failure}", failure)
    return RankFailure(passes=is_passing(failure), reason=reason)
