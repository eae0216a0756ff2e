"""Checkpoints: each is complete or absent, and verified by hashes."""
