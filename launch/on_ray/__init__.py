"""What a run needs of Ray: a cluster, placement, ranks as actors, and their answers."""

import os

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # ranks are the main work, so no lower priority
os.environ.setdefault(
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
)  # don't change the CUDA variables of a CPU rank
