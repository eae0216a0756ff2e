"""Submits a run to a Ray cluster as a job, and relays its log, stop and exit code.

`__main__.py` is the command; `ray_jobs.py` talks to the cluster; `job.py` waits for one job.
"""
