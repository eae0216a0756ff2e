"""Pretrains Mixture-of-Experts language models."""

import data_pipeline  # noqa: F401 - before torch: it decides how a process's threads wait
