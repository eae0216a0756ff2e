"""Imported by every Python process that has this folder on its PYTHONPATH; arms a fault.

`MOETRAIN_DRILL` names the file that says which (tests/drills/faults.py). Without it, or without the
file, nothing is done.
"""

import os

if "MOETRAIN_DRILL" in os.environ:
    import ambush

    ambush.lie_in_wait(os.environ["MOETRAIN_DRILL"])
