"""Imported once by the server that forks the ranks, so that a rank starts at once."""

import torch._dynamo  # noqa: F401 – the first optimizer would, for a second or two

import tests.support.runs
import tests.torture.attempts  # noqa: F401
