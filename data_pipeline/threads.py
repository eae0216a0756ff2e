"""How this process's threads wait for work: decided before any OpenMP is loaded.

OpenMP's threads spin before they sleep. GNU's, which torch uses, spins 300,000 times: if other
processes use the same cores, matrix products then wait for threads that only spin. `python -m
benchmarks.thread_waiting` measures it (docs/performance.md).
"""

import os
from collections.abc import MutableMapping

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""The variables by which a user sets this: for GNU's OpenMP, any OpenMP, Intel's and LLVM's."""

_SPINS = "10000"


def sleep_when_waiting(environ: MutableMapping[str, str] = os.environ) -> None:
    """Makes waiting threads sleep soon, unless the environment says how they wait.

    OpenMP reads its environment when it is loaded: a variable set after `import torch` is too late.
    """
    if not any(name in environ for name in WAITING):
        environ["GOMP_SPINCOUNT"] = _SPINS
