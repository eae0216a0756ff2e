"""What a run needs of Ray: a cluster, places in it, ranks as actors, and their answers."""

import os

# Ray reads them as it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # ranks are the main job, not a background one
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave a CPU rank's CUDA alone
