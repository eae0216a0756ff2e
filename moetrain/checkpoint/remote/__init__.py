"""Copies of checkpoints elsewhere: an object store, or another disk."""
