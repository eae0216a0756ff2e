"""Keeps a run going on Ray: attempts, budgets, hangs, and requests to stop.

Owns the decision when to start again. Leaves Ray itself to `ray_cluster.py` and everything
that a rank does to `moetrain.train`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.failure import Failure
from launch.ray_cluster import RayCluster, Worker, WorkersLost, answer, answered
from moetrain.checkpoint.remote import take_over
from moetrain.observe import EventLog, ProgressDisplay
from moetrain.parallel import Doing
from moetrain.train import Outcome, Place, newest_manifest

if TYPE_CHECKING:
    from moetrain.config import Config

POLL_SECONDS = 0.5
CAUSE_GRACE_SECONDS = 3.0


class RunFailed(Exception):
    """A run that can't go on, with the cause."""


class Supervisor:
    """One run on a Ray cluster, over as many attempts as it takes."""

    def __init__(
        self,
        config: "Config",
        cluster: RayCluster,
        *,
        on_gpu: bool,
        display: ProgressDisplay,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._on_gpu = on_gpu
        self._display = display
        self._stop_requested = stop_requested
        self._run_dir = Path(config.run.dir, config.run.name or "")
        self._event = EventLog(self._run_dir / "events.jsonl").write

    def run(self) -> Outcome:
        """Returns how the run ended; raises RunFailed when it can't go on."""
        settings = self._config.launch
        self._cluster.place(settings.num_workers or 1, on_gpu=self._on_gpu)
        failures = preemptions = 0
        saved = self._saved_step()
        while True:
            ended = self._attempt(again=failures + preemptions > 0)
            if isinstance(ended, Outcome):
                return ended
            if self._saved_step() > saved:  # progress: older failures don't count any more
                saved, failures = self._saved_step(), 0
            preemptions += ended.kind == "preempted"
            failures += ended.kind != "preempted"
            self._event("failure", reason=ended.reason, failure=ended.kind, last_saved_step=saved)
            if ended.is_final:
                raise RunFailed(ended.reason)
            if self._stop_requested():
                raise RunFailed(f"failed while stopping: {ended.reason}")
            if failures > settings.max_failures or preemptions > settings.max_preemptions:
                raise RunFailed(
                    f"{failures} failures and {preemptions} preemptions since the checkpoint of "
                    f"step {saved} (launch.max_failures={settings.max_failures}): {ended.reason}"
                )
            self._event("restart", step=saved)
            self._display.say(f"{ended.reason}; starting again from step {saved}")

    def _attempt(self, *, again: bool) -> Outcome | Failure:
        """Runs all ranks once; returns the outcome, or the failure that ended it."""
        config = self._config
        attempt = take_over(
            config.checkpoint,
            run=config.run.name or "",
            directory=self._run_dir / "checkpoints",
            may_be_alone=again,
        )
        world_size = config.launch.num_workers or 1
        self._display.phase(f"starting {world_size} ranks")
        workers: list[Worker] = []
        try:
            workers = self._cluster.start_workers(
                world_size,
                on_gpu=self._on_gpu,
                log_dir=self._run_dir / "logs",
                env=config.cluster.env,
            )
            rendezvous = self._cluster.rendezvous(workers)
            self._event(
                "attempt",
                attempt=attempt,
                ranks=[{"rank": w.rank, "node": w.node, "pid": w.pid} for w in workers],
            )
            nodes = [w.node for w in workers]
            results = {
                w.actor.run.remote(
                    config,
                    Place(
                        rank=w.rank,
                        world_size=world_size,
                        local_world_size=nodes.count(w.node),
                        rendezvous=rendezvous,
                        attempt=attempt,
                    ),
                ): w
                for w in workers
            }
            return self._watch(results)
        except WorkersLost as error:
            return Failure(kind="died", reason=str(error))
        finally:
            self._cluster.end_workers(workers)

    def _watch(self, results: dict[Any, Worker]) -> Outcome | Failure:
        """Waits for the ranks' results while showing and checking what they do."""
        pulse = Pulse(list(results.values()))
        pending, stopping = dict(results), False
        outcomes: list[tuple[int, Outcome]] = []
        while pending:
            for reference in answered(list(pending), timeout=POLL_SECONDS):
                worker = pending.pop(reference)
                result = answer(reference)
                if isinstance(result, Failure):
                    return self._cause(worker, result, pending)
                outcomes.append((worker.rank, result))
            pulse.take(self._show)
            if self._stop_requested() and not stopping:
                stopping = True
                self._display.say("stopping: saving after this step")
                for worker in pending.values():
                    worker.actor.stop.remote()
            silent = pulse.silent_longer_than(self._config.launch.hang_timeout_seconds)
            # Ranks that are done wait for nobody; the first may still be uploading.
            at_work = {worker.rank for worker in pending.values()}
            if hung := {rank: what for rank, what in silent.items() if rank in at_work}:
                return self._report_hang(hung, list(pending.values()))
        pulse.take(self._show, wait=True)
        return min(outcomes, key=lambda pair: pair[0])[1]

    def _cause(self, worker: Worker, first: Failure, pending: dict[Any, Worker]) -> Failure:
        """Returns the failure behind the first one seen: a lost peer is only a symptom."""
        found = [(worker, first)]
        deadline = time.monotonic() + CAUSE_GRACE_SECONDS
        while first.kind == "peer" and pending and time.monotonic() < deadline:
            for reference in answered(list(pending), timeout=POLL_SECONDS):
                other, result = pending.pop(reference), answer(reference)
                if isinstance(result, Failure):
                    found.append((other, result))
            if found[-1][1].kind != "peer":
                break
        source, failure = min(found, key=lambda pair: pair[1].kind == "peer")
        return Failure(
            kind=failure.kind,
            reason=f"rank {source.rank} on {source.node} (pid {source.pid}): {failure.reason}",
        )

    def _report_hang(self, hung: dict[int, str], workers: list[Worker]) -> Failure:
        """Writes every rank's stacks into the run's logs, and names the silent ranks."""
        path = self._run_dir / "logs" / f"hang_{time.strftime('%Y%m%d-%H%M%S')}.txt"
        asked = {w.actor.stacks.remote(): w for w in workers}
        texts = [f"rank {rank}: {what}" for rank, what in sorted(hung.items())]
        for reference in answered(list(asked), timeout=5.0, wait_for_all=True):
            stacks = answer(reference)
            texts.append(f"\n===== rank {asked[reference].rank}\n{stacks}")
        path.write_text("\n".join(texts) + "\n")
        what = "; ".join(f"rank {rank} {state}" for rank, state in sorted(hung.items()))
        seconds = self._config.launch.hang_timeout_seconds
        return Failure(kind="died", reason=f"hang of over {seconds:.0f} s: {what}; see {path}")

    def _show(self, kind: str, content: Any) -> None:
        if kind == "record":
            self._display.update(content)
        else:
            self._display.say(content)

    def _saved_step(self) -> int:
        newest = newest_manifest(self._run_dir)
        return newest.step if newest else 0


class Pulse:
    """Asks every rank how it is, without ever waiting for one that doesn't answer."""

    def __init__(self, workers: list[Worker]) -> None:
        self._workers = {w.rank: w for w in workers}
        self._asked = {rank: w.actor.collect.remote() for rank, w in self._workers.items()}
        self._heard = {rank: time.monotonic() for rank in self._workers}
        self._state = {rank: (Doing(), 0.0) for rank in self._workers}

    def take(self, show: Callable[[str, Any], None], *, wait: bool = False) -> None:
        """Takes the answers that are there, shows what they publish, and asks again."""
        for rank in self._ready(timeout=POLL_SECONDS if wait else 0):
            status = answer(self._asked[rank])
            if isinstance(status, Failure):
                continue  # the rank's own result says more
            self._heard[rank] = time.monotonic()
            self._state[rank] = (status["doing"], status["silent_seconds"])
            for kind, content in status["published"]:
                show(kind, content)
            self._asked[rank] = self._workers[rank].actor.collect.remote()

    def silent_longer_than(self, seconds: float) -> dict[int, str]:
        """Returns the ranks without a sign of life for so long, with what they were doing."""
        now, silent = time.monotonic(), {}
        for rank, (doing, since) in self._state.items():
            unheard = now - self._heard[rank]
            if since + unheard > seconds:
                state = "does not answer" if unheard > seconds / 2 else "makes no progress"
                silent[rank] = f"{state} in {doing}"
        return silent

    def _ready(self, *, timeout: float) -> list[int]:
        by_reference = {reference: rank for rank, reference in self._asked.items()}
        ready = answered(list(by_reference), timeout=timeout, wait_for_all=True)
        return [by_reference[reference] for reference in ready]
