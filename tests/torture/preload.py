"""Imported once by the server that forks the ranks, so that a rank starts at once."""

import torch._dynamo  # the first optimizer would import it, for a second or two
import torch.distributed.fsdp
import torch.distributed.tensor

import moetrain.config
import moetrain.train.rank
import tests.support.runs
import tests.torture.attempts  # noqa: F401
