"""Checkpoints: complete or not there, and provably what was saved."""
