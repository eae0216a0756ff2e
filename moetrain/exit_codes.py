"""How commands end: the exit codes of the public interface."""

DONE = 0
FAILED = 1
BAD_CONFIGURATION = 2
"""Bad settings or bad input; nothing was written."""
STOPPED = 75
"""Stopped on request, after saving: the same command resumes."""
