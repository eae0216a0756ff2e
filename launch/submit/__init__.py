"""Submitting a run to a Ray cluster as a job, and standing in for it: its log, stop and exit code.

`__main__.py` is the command; `ray_jobs.py` speaks to the cluster; `job.py` waits for one job.
"""
