"""Effective training time of a run on a cluster that fails: expected, and simulated."""
