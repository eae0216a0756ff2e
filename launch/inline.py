"""One rank, in the driver's own process."""

import tempfile
import threading

import torch.distributed as dist

from launch.run_folder import begin_attempt, logging_to
from launch.signals import StopRequest
from moetrain.observe import ProgressDisplay
from moetrain.settings import Resolved
from moetrain.train.control import Control, Outcome, RankPlace
from moetrain.train.rank import run_rank


def run_inline(config: Resolved, display: ProgressDisplay, stop: StopRequest) -> Outcome:
    """Trains as the only rank, in this process."""
    control, ended = Control(), threading.Event()

    def watch() -> None:
        while True:
            over = ended.wait(0.2)
            for kind, content in control.collect()["published"]:
                display.update(content) if kind == "record" else display.say(content)
            if stop() and not control.stop_requested:
                display.say("stopping: checkpointing after this step")
                control.request_stop()
            if over:
                return

    run_dir = config.run_dir
    attempt = begin_attempt(config)
    watcher = threading.Thread(target=watch, name="display", daemon=True)
    watcher.start()
    with (
        logging_to(run_dir, rank=0),
        tempfile.TemporaryDirectory(prefix="moetrain-", ignore_cleanup_errors=True) as folder,
    ):
        meeting_point = f"file://{folder}/rendezvous"
        place = RankPlace(rank=0, world_size=1, rendezvous=meeting_point, attempt=attempt)
        try:
            return run_rank(config, place, control)
        finally:
            ended.set()
            watcher.join()
            if dist.is_initialized():
                dist.destroy_process_group()
