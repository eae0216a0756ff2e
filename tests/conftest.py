"""Shape annotations of kernels and model are checked at run time, by jaxtyping and beartype.

In the test process, that is: ranks that a test forks run without the checks.
"""

import os

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    # Without a GPU MegaBlocks' kernels run in Triton's interpreter. Triton reads this when it is
    # first imported, so it stands here; nothing but those kernels looks at it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

install_import_hook(["moetrain.kernels", "moetrain.model"], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests of CUDA code where there is no device, and says so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
