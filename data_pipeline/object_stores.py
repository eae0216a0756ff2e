"""Object stores and web servers: the library for each, which failures pass, how long to wait."""

import random
from typing import Any

_LONGEST_PAUSE_SECONDS = 60.0
# Of HTTP's answers that put the blame on who asks, those that say: ask again. 409 is a store's word
# for two requests for one object at once.
_RETRIED_STATUSES = (408, 409, 425, 429)


def new_filesystem(protocol: str, **options: Any) -> Any:
    """Returns fsspec's filesystem of its own for a protocol; ImportError where a package lacks."""
    options["skip_instance_cache"] = True
    if protocol == "gs":
        # The class that fsspec would take asks by gRPC for each bucket's kind first, with threads
        # that a fork breaks. Zonal buckets need it; they are neither read nor written here.
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem(**options)
    import fsspec

    return fsspec.filesystem(protocol, **options)


def is_final(error: Exception) -> bool:
    """Whether the same request would fail again."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    kind = type(error).__name__
    return (
        # ValueError: an address that can't be, and a certificate that isn't to be trusted.
        isinstance(error, (PermissionError, ValueError))
        or "Credentials" in kind
        or kind in ("ProfileNotFound", "ParamValidationError")  # botocore
        or str(error).startswith("Forbidden")  # gcsfs
        or (isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_STATUSES)
    )


def pause_before(retry: int, *, first_seconds: float) -> float:
    """Seconds to wait before a retry, counted from 1: anything up to a limit that doubles.

    Anything, so that many ranks don't come back together. Not of the program's own random numbers:
    a bad network must not change a run.
    """
    longest = min(first_seconds * 2 ** (retry - 1), _LONGEST_PAUSE_SECONDS)
    return random.SystemRandom().uniform(0.0, longest)
