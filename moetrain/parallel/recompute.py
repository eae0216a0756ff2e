"""Activation recomputation: a block keeps its input alone, and the experts that it chose.

A token whose two best experts nearly tie could fall the other way the second time; counts would
shift by one and the exchange would no longer match what the first pass sent. So the choice is
replayed, never made again.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

from moetrain.model import MoELayer
from moetrain.model.router import Router


def plain_name(name: str) -> str:
    """Returns a parameter's name as it is without the wrapper that recomputation puts in."""
    return name.replace("_checkpoint_wrapped_module.", "")


def recompute(block: nn.Module) -> nn.Module:
    """Returns the block so wrapped that its backward pass computes it again from its input."""
    routers = [m.router for m in block.modules() if isinstance(m, MoELayer)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        choices: list[Tensor] = []  # of one forward pass, a router after the other

        def record(router: Router) -> Callable[[Tensor], Tensor]:
            def select(scores: Tensor) -> Tensor:
                choices.append(original[router](scores))
                return choices[-1]

            return select

        def replay(router: Router) -> Callable[[Tensor], Tensor]:
            return lambda _: choices[routers.index(router)]

        original = {router: router.select for router in routers}
        return _selecting(routers, record), _selecting(routers, replay)

    return checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT, context_fn=contexts)


@contextmanager
def _selecting(
    routers: list[Router], selection: Callable[[Router], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    before = [router.select for router in routers]
    for router in routers:
        router.select = selection(router)
    try:
        yield
    finally:
        for router, select in zip(routers, before, strict=True):
            router.select = select
