"""The answers of ranks: the result of a call to an actor, or the failure if there is none."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from launch.failure import Failure, classify
from moetrain.kinds import FailureKind

START_TIMEOUT_SECONDS = 120.0
SUDDENLY = "died unexpectedly before finishing this task"  # Ray's message for a lost process


class WorkersLost(Exception):
    """Ranks that ended, or didn't answer, before they started training."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def ask(
    references: Sequence[Any], nodes: Sequence[str], interrupted: Callable[[], Failure | None]
) -> list[Any]:
    """Returns the answers of starting ranks; `nodes` are their addresses."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    where = dict(zip(references, nodes, strict=True))
    answers: dict[Any, Any] = {}
    while len(answers) < len(where):
        left = [reference for reference in references if reference not in answers]
        for reference in answered(left, timeout=0.2, wait_for_all=True):
            what = answers[reference] = answer(reference)
            if isinstance(what, Failure):
                reason = f"a rank was lost while it started: {what.reason}"
                raise WorkersLost(replace(what, reason=reason, node=where[reference]))
        if failure := interrupted():
            raise WorkersLost(failure)
        if len(answers) < len(where) and time.monotonic() > deadline:
            late = sorted({where[r] for r in references if r not in answers})
            seconds = f"{START_TIMEOUT_SECONDS:.0f} s"
            reason = f"no rank process within {seconds} on {', '.join(late)}"
            raise WorkersLost(Failure(kind=FailureKind.died, reason=reason, node=late[0]))
    return [answers[reference] for reference in references]


def answered(references: list[Any], *, timeout: float, wait_for_all: bool = False) -> list[Any]:
    """Returns the references that have an answer or an error.

    Waits for the first of them, or for all, at most `timeout` seconds.
    """
    if not references:
        return []
    ray.wait(references, num_returns=len(references) if wait_for_all else 1, timeout=timeout)
    return list(ray.wait(references, num_returns=len(references), timeout=0)[0])


def answer(reference: Any) -> Any:
    """Returns an answer, or a Failure if the rank's process is gone."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError as error:
        preempted = bool(getattr(error, "preempted", False))
        if SUDDENLY in str(error) and not preempted:
            reason = "its process ended suddenly: it was killed or crashed"
            return Failure(kind=FailureKind.died, reason=reason, is_sudden=True)
        if "ModuleNotFoundError" in str(error):
            reason = str(error).strip().splitlines()[-1]
            return Failure(
                kind=FailureKind.error, reason=f"a node has another Python than this: {reason}"
            )
        return Failure(
            kind=FailureKind.preempted if preempted else FailureKind.died, reason=_first_line(error)
        )
    except ray.exceptions.OutOfMemoryError as error:
        return Failure(kind=FailureKind.memory, reason=_first_line(error))
    except ray.exceptions.RuntimeEnvSetupError as error:
        return Failure(kind=FailureKind.error, reason=_first_line(error))
    except ray.exceptions.RayTaskError as error:  # an exception raised by our code on the rank
        return classify(error.cause if isinstance(error.cause, Exception) else error)
    except ray.exceptions.RayError as error:
        return Failure(kind=FailureKind.died, reason=_first_line(error))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
