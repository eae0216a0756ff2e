"""A run whose ranks torchrun, srun or mpirun has started: this process is one of them."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from data_pipeline import DataSettings
from launch.external import ExternalRank, meeting_point, visible_device
from launch.failure import classify
from launch.plan import num_gpus
from launch.run_folder import (
    begin_attempt,
    close_run,
    complete_save,
    logging_to,
    open_run,
    prepared_run,
    report_complete,
)
from launch.run_lock import lock_run
from launch.signals import StopRequest, stops_at_once
from moetrain.exit_codes import DONE, FAILED, STOPPED
from moetrain.redaction import redacted_text
from moetrain.settings import Resolved
from moetrain.train.control import Control, RankPlace
from moetrain.train.rank import join, run_rank
from moetrain.train.rank_environment import set_environment


def run_external(
    config: Resolved,
    external: ExternalRank,
    *,
    data: DataSettings,
    report: Callable[[Path], object],
) -> NoReturn:
    """Trains as one of the ranks that another launcher has started, and ends the process."""
    rank, leads = external.rank, external.rank == 0
    place = RankPlace(
        rank=rank,
        world_size=external.world_size,
        device_index=visible_device(external, os.environ, num_devices=num_gpus(config.run.device)),
        local_world_size=external.local_world_size,
        rendezvous="env://",
        attempt=0,  # not known before the ranks meet
    )
    set_environment(config, place)
    # Only the first rank checks, builds shards and names the run. A mistake ends it with exit code
    # 2 before the others can meet it, and the launcher ends them.
    prepared = None
    if leads:
        with stops_at_once():
            prepared = prepared_run(config, data)
            config = prepared.config
    kept = ExitStack()  # until this process ends
    if leads:
        kept.enter_context(lock_run(config.run_dir))
    try:
        _meet(config, external, place)
    except (RuntimeError, OSError) as error:
        print(f"moetrain: {_no_meeting(external, error)}", file=sys.stderr)
        _leave(FAILED)
    agreed: list[Any] = [None] * 3
    if prepared and (good := complete_save(config)):
        report_complete(config, prepared, good, report=report)
    elif prepared:
        for line in prepared.lines():
            print(line, file=sys.stderr)
        open_run(config, prepared)
        agreed = [config.run.name, begin_attempt(config), config.data]
    dist.broadcast_object_list(agreed)
    name, attempt, shards = agreed
    if name is None:  # the run has all its steps
        dist.barrier()
        _leave(DONE)
    config = replace(config, run=replace(config.run, name=name), data=shards)
    kept.enter_context(logging_to(config.run_dir, rank=rank))
    control = Control()
    stop = StopRequest(on_stop=control.request_stop)
    place = replace(place, attempt=attempt)
    code = FAILED
    try:
        with stop.on_signals(), _saying(control):
            outcome = run_rank(config, place, control)
        code = DONE if outcome.finished else STOPPED
        if prepared:
            code = close_run(config, outcome, prepared.shards, report)
        dist.barrier()  # the launcher ends all of them once one exits with a code other than 0
    except Exception as error:
        print(f"moetrain: rank {rank}: {redacted_text(classify(error).reason)}", file=sys.stderr)
    _leave(code)


@contextmanager
def _saying(control: Control) -> Iterator[None]:
    """Prints a rank's messages during training; its records are in the run folder."""
    ended = threading.Event()

    def relay() -> None:
        over = False
        while not over:
            over = ended.wait(0.2)
            for kind, content in control.collect()["published"]:
                if kind == "say":
                    print(content, file=sys.stderr, flush=True)

    watcher = threading.Thread(target=relay, name="display", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _meet(config: Resolved, external: ExternalRank, place: RankPlace) -> None:
    """Joins the ranks of another launcher."""
    os.environ |= meeting_point(external, os.environ, arguments=sys.argv[1:])
    join(config, place)


def _no_meeting(external: ExternalRank, error: Exception) -> str:
    """Returns why the launcher's ranks didn't meet, and what to change."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    reason = " ".join(str(error).split("\nException raised", 1)[0].split())
    how = (
        "that port is taken: choose another MASTER_PORT (torchrun: --standalone)"
        if "address already in use" in reason.lower() or "EADDRINUSE" in reason
        else "see whether the first rank began, and whether MASTER_ADDR and MASTER_PORT reach it"
    )
    return (
        f"MASTER_ADDR={host} MASTER_PORT={port}: rank {external.rank} of {external.world_size} "
        f"({external.launcher.name}) can't meet the others there: {how} ({redacted_text(reason)})"
    )


def _leave(code: int) -> NoReturn:
    """Ends a rank's process without cleanup: tearing down a process group sometimes aborts after
    success."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
