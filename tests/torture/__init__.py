"""Breaks checkpoints in every way that we know of, and counts what is lost: `make torture`."""
