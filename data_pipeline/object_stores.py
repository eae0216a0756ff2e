"""Object stores and web servers: the library for each, which errors are transient, and pauses."""

import random
from typing import Any

_LONGEST_PAUSE_SECONDS = 60.0
# HTTP's 4xx statuses for which a retry can succeed. 409 is how a store reports two concurrent
# requests for one object.
_RETRIED_STATUSES = (408, 409, 425, 429)


def new_filesystem(protocol: str, **options: Any) -> Any:
    """Returns a new fsspec filesystem for a protocol; ImportError if a package is missing."""
    options["skip_instance_cache"] = True
    if protocol == "gs":
        # fsspec's default class requests each bucket's kind by gRPC first, with threads that a fork
        # breaks. Zonal buckets need it; they are not supported here.
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem(**options)
    import fsspec

    return fsspec.filesystem(protocol, **options)


def is_final(error: Exception) -> bool:
    """Whether a retry of the same request would fail again."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    kind = type(error).__name__
    return (
        # ValueError: an invalid address, or a certificate that isn't trusted.
        isinstance(error, (PermissionError, ValueError))
        or "Credentials" in kind
        or kind in ("ProfileNotFound", "ParamValidationError")  # botocore
        or str(error).startswith("Forbidden")  # gcsfs
        or (isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_STATUSES)
    )


def pause_before(retry: int, *, first_seconds: float) -> float:
    """Returns the seconds to wait before a retry, counted from 1: random, up to a doubling limit.

    Random, so that many ranks don't retry at the same time. Doesn't use the program's random state:
    a bad network must not change a run.
    """
    longest = min(first_seconds * 2 ** (retry - 1), _LONGEST_PAUSE_SECONDS)
    return random.SystemRandom().uniform(0.0, longest)
