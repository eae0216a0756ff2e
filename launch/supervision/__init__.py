"""Seeing a run through failures: attempts, heartbeats, budgets, nodes."""
