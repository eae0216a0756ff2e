"""One asynchronous all-to-all of rows, and the one that returns gradients in the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.parallel.activity import Activity


class Transfer:
    """An asynchronous all-to-all of rows, and the one that returns gradients in the backward pass.

    Both start as early and are waited for as late as autograd's order allows, so that the work
    between start and wait overlaps with them. In the backward pass, waiting is `_Start`'s and
    starting is `_Wait`'s. Row gradients need no reduction, because each row has one sender; an
    expert's weight gradient therefore covers the tokens of all ranks in the group.
    """

    def __init__(
        self,
        x: Tensor,
        send: list[int],
        receive: list[int],
        *,
        group: dist.ProcessGroup,
        activity: Activity,
        name: str,
    ) -> None:
        self.send, self.receive, self.group = send, receive, group
        self.activity = activity
        self.name = f"{name} on rank {dist.get_rank()}, sending {send} and receiving {receive} rows"
        self.sent: Tensor = _Start.apply(x, self)  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """Returns the rows that were received."""
        # Dropped here: the graph of `sent` refers to this object, so that keeping it would make a
        # reference cycle, which holds all rows until the backward pass.
        sent = self.__dict__.pop("sent")
        return _Wait.apply(sent, self)  # type: ignore[no-any-return, no-untyped-call]

    def start(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Starts the exchange and returns the buffer that it fills."""
        self.kept = x.contiguous()  # must live until it is sent
        out = x.new_empty(sum(receive), *x.shape[1:])
        with named(self.name):
            self.work = dist.all_to_all_single(
                out, self.kept, receive, send, group=self.group, async_op=True
            )
        self.coming = out
        return out

    def finish(self) -> Tensor:
        """Waits for what `start` began, and returns the rows that were received."""
        with named(self.name), self.activity.collective(self.name):
            self.work.wait()
        out = self.coming
        del self.kept, self.work, self.coming
        return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.start(x, transfer.send, transfer.receive)
        # Stands for the rows sent, so that `_Wait` has an input of the gradient's shape.
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.finish()
        return grad, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.finish()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer: Transfer = ctx.transfer
        # The buffer is returned before it is filled; autograd only passes it to `_Start.backward`,
        # which waits for it.
        return transfer.start(grad, transfer.receive, transfer.send), None


@contextmanager
def named(what: str) -> Iterator[None]:
    """Adds to a collective's error what it was for: the library names a port at best."""
    try:
        yield
    except RuntimeError as error:
        raise type(error)(f"{what} failed: {error}") from error
