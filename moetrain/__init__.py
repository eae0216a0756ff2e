"""Pretrains Mixture-of-Experts language models."""

from moetrain.own_packages import find_own_packages

find_own_packages()

import data_pipeline  # noqa: E402, F401 - before torch: it decides how a process's threads wait
