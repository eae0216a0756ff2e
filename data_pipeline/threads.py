"""How threads of this process wait for their next work: decided before any OpenMP is loaded.

OpenMP's threads wait in a loop before they sleep. GNU's, which torch brings, goes round 300,000
times: beside other work on the same cores, products of matrices then wait for threads that only
loop. `python -m benchmarks.thread_waiting` measures it (docs/performance.md).
"""

import os
from collections.abc import MutableMapping

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""The variables by which a user decides this: for GNU's OpenMP, any, Intel's and LLVM's."""

_SPINS = "10000"


def sleep_when_waiting(environ: MutableMapping[str, str] = os.environ) -> None:
    """Has threads that wait sleep soon, unless the environment says how they wait.

    OpenMP reads its environment when it is loaded: what is set after `import torch` is too late.
    """
    if not any(name in environ for name in WAITING):
        environ["GOMP_SPINCOUNT"] = _SPINS
