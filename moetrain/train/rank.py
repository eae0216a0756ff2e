"""What a rank runs: join the others, build, train, and return the outcome."""

import ctypes
import os
import platform
import sys
import threading

import torch
import torch.distributed as dist

from data_pipeline.extensions import load_recorded
from moetrain.checkpoint.remote.uploader import Uploader
from moetrain.exit_codes import DONE, STOPPED
from moetrain.parallel import join_ranks
from moetrain.settings import Resolved
from moetrain.train.build import build_trainer
from moetrain.train.control import Control, Outcome, RankPlace, collective_timeout
from moetrain.train.loop import train
from moetrain.train.rank_environment import (
    compute_deterministically,
    rank_device,
    set_environment,
)

LAST_UPLOAD_SECONDS = 30.0  # for a last upload after the run has failed


def run_rank(config: Resolved, place: RankPlace, control: Control) -> Outcome:
    """Trains as one rank of a resolved configuration, to the end or until a stop is requested."""
    set_environment(config, place)
    if config.train.deterministic:
        compute_deterministically()
    load_recorded(config.run.extensions, where=f"rank {place.rank} on {platform.node()}")
    device = rank_device(config.run.device, index=place.device_index)
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        own = max(1, cores // place.local_world_size)
        torch.set_num_threads(config.run.threads_per_rank or own)
        keep_freed_memory()
    control.heartbeat("joining the other ranks", 0)
    if not dist.is_initialized():  # an external launcher may have joined the ranks already
        join(config, place)
    control.heartbeat("building the model", 0)
    trainer = build_trainer(config, place, control, device=device)
    try:
        outcome = train(trainer)
    except BaseException:
        trainer.close(1)
        if trainer.uploader is not None:
            trainer.uploader.close(LAST_UPLOAD_SECONDS)
        raise
    trainer.close(DONE if outcome.finished else STOPPED)
    dist.barrier()
    if trainer.uploader is not None:
        finish_upload(trainer.uploader, control, step=outcome.step)
    return outcome


def join(config: Resolved, place: RankPlace) -> None:
    """Joins the other ranks; the environment must be set before."""
    join_ranks(
        rank=place.rank,
        world_size=place.world_size,
        rendezvous=place.rendezvous,
        device=rank_device(config.run.device, index=place.device_index),
        timeout_seconds=collective_timeout(config.launch.hang_timeout_seconds),
    )


def finish_upload(uploader: Uploader, control: Control, *, step: int) -> None:
    """Waits until the last checkpoint is uploaded or has failed; a failure is only reported."""
    waiting = threading.Thread(target=uploader.close, name="last upload")
    waiting.start()
    waiting.join(1.0)
    if waiting.is_alive():
        control.publish("say", "uploading the last checkpoint")
    while waiting.is_alive():
        control.heartbeat("uploading", step)
        waiting.join(1.0)
    if failure := uploader.close():
        control.publish("say", f"warning: the last checkpoint is on this machine only: {failure}")


def leave_ranks() -> None:
    """Destroys the process group of training, so that the process can join another one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next large tensor, where torch runs on the CPU.

    By default it returns every tensor of some megabytes to the system, which zeroes it page by page
    when the next step allocates it: a tenth to a third of a step. `python -m benchmarks.moe_layer`
    measures with and without (`--keep-freed-memory no`). Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
