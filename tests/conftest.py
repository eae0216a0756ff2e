"""Shape annotations of kernels and model are checked at run time, by jaxtyping and beartype.

In the test process, that is: ranks that a test forks run without the checks.
"""

import os
import signal

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    # Without a GPU MegaBlocks' kernels run in Triton's interpreter. Triton reads this when it is
    # first imported, so it stands here; nothing but those kernels looks at it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# If pytest was started by nohup, or in the background of a script, it ignores these signals, and
# the commands that tests start and stop would inherit that.
for _signal, _python_s_own in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _python_s_own)

install_import_hook(["moetrain.kernels", "moetrain.model"], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests of CUDA code where there is no device, and says so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
