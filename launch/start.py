"""Starts a resolved configuration where its plan says, and sees it to the end.

Owns the driver's side of a run: the run folder, signals, the progress display, the closing
lines and the exit code. Ranks do everything else.
"""

import fcntl
import logging
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist
import yaml

from data_pipeline import DataError, DataSettings, ShardFolder
from data_pipeline.commands.shell import as_typed, text_setting
from data_pipeline.commands.stops import INSISTENT, leave_terminal, stop_signals
from launch.dry_run import in_use
from launch.environment import for_ranks
from launch.external import ExternalRank, external_rank, meeting_point
from launch.failure import classify
from launch.folders import demand_folder, named_folder
from launch.plan import Plan, cluster_address, is_ray_copy
from launch.ray_cluster import ClusterError, RayCluster
from launch.supervisor import RunFailed, Supervisor
from moetrain.checkpoint import (
    CheckpointError,
    Manifest,
    Save,
    replace_text,
    with_way_out,
)
from moetrain.checkpoint.remote import (
    demand_mounted,
    fetch_newer,
    good_save,
    is_newer_there,
    take_over,
    upload_missing,
)
from moetrain.checks import ConfigError
from moetrain.kinds import EventKind
from moetrain.observe import (
    LIFE,
    Account,
    EventLog,
    ProgressDisplay,
    duration,
    final_loss,
    read_events,
    read_metrics,
    read_sign,
    run_account,
)
from moetrain.parallel import join_ranks
from moetrain.redaction import RedactingFormatter, redacted_arguments, redacted_text
from moetrain.settings import Resolved
from moetrain.train import (
    Control,
    Outcome,
    Place,
    Prepared,
    TrainingError,
    as_plain,
    demand_done_alike,
    demand_same_model,
    newest_manifest,
    prepare,
    rank_device,
    run_rank,
    training_on,
)

DONE, FAILED, STOPPED = 0, 1, 75
SAME_STOP_SECONDS = 1.0
TRIAL_VARIABLE = "MOETRAIN_TRIAL"  # set for the command of a sweep's trial

WORTH_TELLING_SECONDS = 600.0  # how long a run was at work for its losses to be told


def start(
    config: Resolved,
    plan: Plan,
    *,
    data: DataSettings,
    refit: Callable[[int], Resolved | None],
    report: Callable[[Path], object],
) -> int:
    """Runs a resolved configuration to its end; returns the exit code.

    `data` is the data part before it was resolved: it says whether shards may be built. `refit`
    returns the configuration for fewer ranks, None where so many can't run it. `report` is called
    with the run's folder at the end. Raises ConfigError or DataError for bad input, before
    anything of the run is written.
    """
    if plan.external:
        _run_external(config, plan.external, data=data, report=report)
    run_dir = config.run_dir
    if is_ray_copy(Path.cwd()):
        print(f"the run is kept in {run_dir}, not in Ray's copy of the job's folder", flush=True)
    stop = StopRequest()
    with _stops_at_once():
        prepared = _prepared(config, data)
        with _held(run_dir), stop.on_signals():
            return _run(config, plan, prepared, stop=stop, refit=refit, report=report)


@contextmanager
def _stops_at_once() -> Iterator[None]:
    """While it lasts, a signal ends the command as a stop: the same one begins where this did.

    All but Ctrl-C, which whoever called this tells of.
    """

    def handle(signum: int, _: object) -> NoReturn:
        leave_terminal(signum)
        print("moetrain: stopped, with nothing of a run begun", file=sys.stderr)
        raise SystemExit(STOPPED)

    heard = [s for s in stop_signals() if s != signal.SIGINT]
    before = {s: signal.signal(s, handle) for s in heard}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _run(
    config: Resolved,
    plan: Plan,
    prepared: Prepared,
    *,
    stop: "StopRequest",
    refit: Callable[[int], Resolved | None],
    report: Callable[[Path], object],
) -> int:
    if good := _complete(config):
        return _tell_complete(config, prepared, good, report=report)
    run_dir = _open_run(config, prepared)
    event = EventLog(run_dir / "events.jsonl").write
    display = ProgressDisplay(
        mode=config.observe.progress,
        total_steps=config.train.num_steps,
        run_name=config.run.name,
    )
    try:
        with display:
            for line in prepared.lines():
                display.say(line)
            if plan.mode == "inline":
                outcome = _run_inline(config, display, stop)
            else:
                outcome = _run_on_ray(config, display, stop, refit=refit)
    except (RunFailed, ClusterError, CheckpointError, DataError, TrainingError, OSError) as error:
        event(EventKind.fail, reason=str(error))
        print(f"moetrain: {redacted_text(with_way_out(str(error), error))}", file=sys.stderr)
        return FAILED
    return _close_run(config, outcome, prepared.shards, report)


def _prepared(config: Resolved, data: DataSettings) -> Prepared:
    """Returns what can be known before any rank starts; ConfigError or DataError where it fails."""
    demand_folder(config.run_dir)
    demand_mounted(config.checkpoint)
    _fetch(config)
    prepared = prepare(config, data, progress=True)
    if newest := newest_manifest(config.run_dir):
        demand_done_alike(config, newest)
    return prepared


def _fetch(config: Resolved) -> None:
    """Brings a newer checkpoint than the run's folder has from where it is uploaded to, if any."""
    if config.checkpoint.upload_to is None:
        return
    run_dir, name = config.run_dir, config.run.name
    directory = run_dir / "checkpoints"
    good = good_save(directory)
    if not is_newer_there(config.checkpoint, run=name, good=good):
        return
    if config.checkpoint.resume == "never":
        raise ConfigError(
            "checkpoint.resume",
            "never",
            f"run {name} has checkpoints in {config.checkpoint.upload_to}: use another run.name, "
            "or auto to go on from them",
        )

    def demand(manifest: Manifest) -> None:
        demand_same_model(config, manifest)
        demand_done_alike(config, manifest)

    with _held(run_dir):
        fetch_newer(
            config.checkpoint,
            run=name,
            directory=directory,
            good=good,
            demand=demand,
            event=EventLog(run_dir / "events.jsonl").write,
            say=lambda text: print(text, file=sys.stderr),
        )


def _take_over(config: Resolved) -> int:
    directory = config.run_dir / "checkpoints"
    return take_over(config.checkpoint, run=config.run.name, directory=directory)


def _complete(config: Resolved) -> Save | None:
    """Returns a run's good checkpoint of its last step; None where it has none, or isn't there."""
    run_dir = config.run_dir
    newest = newest_manifest(run_dir)
    if newest is None or newest.step < config.train.num_steps:
        return None  # without reading a checkpoint for it
    good = good_save(run_dir / "checkpoints")
    return good if good is not None and good.step >= config.train.num_steps else None


def _tell_complete(
    config: Resolved, prepared: Prepared, good: Save, *, report: Callable[[Path], object]
) -> int:
    """Says that a run has all its steps, and leaves its record alone unless it has no end yet."""
    run_dir = config.run_dir
    print(f"complete  run {config.run.name} has all its {config.train.num_steps} steps")
    outcome = Outcome(finished=True, step=good.step, last={})
    run_name, directory = config.run.name, run_dir / "checkpoints"
    if upload_missing(config.checkpoint, run=run_name, directory=directory, good=good):
        print(f"uploaded  its last checkpoint to {config.checkpoint.upload_to}")
    ends = [e["event"] for e in read_events(run_dir / "events.jsonl") if e.get("event") in LIFE]
    if ends[-1:] != [EventKind.finish]:  # killed between its last checkpoint and its end
        _tell_start(config, prepared)
        return _close_run(config, outcome, prepared.shards, report)
    for line in _closing_lines(config, outcome, prepared.shards, run_dir):
        print(line)
    return DONE


class StopRequest:
    """Signals: the first asks for a stop after saving, a second SIGTERM or Ctrl-C ends at once.

    What comes within a second is the same stop: Ray, Slurm and terminals signal every process of a
    job, and a parent among them passes on what it got. SIGUSR1 and SIGHUP warn and don't insist:
    the SIGTERM after one is the first.
    """

    def __init__(self, *, told: Callable[[], None] = lambda: None) -> None:
        self._event = threading.Event()
        self._told = told
        self._asked_at = math.inf

    def __call__(self) -> bool:
        """Returns whether a stop was asked for."""
        return self._event.is_set()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listens to them while the context lasts."""

        def handle(signum: int, _: FrameType | None) -> None:
            leave_terminal(signum)
            if signum in INSISTENT:
                if time.monotonic() - self._asked_at > SAME_STOP_SECONDS:
                    os._exit(FAILED)  # Ray's processes, if any, end with this one
                self._asked_at = min(self._asked_at, time.monotonic())
            if not self._event.is_set():
                self._event.set()
                self._told()

        before = {s: signal.signal(s, handle) for s in stop_signals()}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _run_inline(config: Resolved, display: ProgressDisplay, stop: StopRequest) -> Outcome:
    """Trains as the only rank, in this process."""
    control, ended = Control(), threading.Event()

    def watch() -> None:
        while True:
            over = ended.wait(0.2)
            for kind, content in control.collect()["published"]:
                display.update(content) if kind == "record" else display.say(content)
            if stop() and not control.stop_requested:
                display.say("stopping: saving after this step")
                control.request_stop()
            if over:
                return

    run_dir = config.run_dir
    attempt = _take_over(config)
    watcher = threading.Thread(target=watch, name="display", daemon=True)
    watcher.start()
    with (
        _logging_to(run_dir, rank=0),
        tempfile.TemporaryDirectory(prefix="moetrain-", ignore_cleanup_errors=True) as folder,
    ):
        meeting_point = f"file://{folder}/rendezvous"
        place = Place(rank=0, world_size=1, rendezvous=meeting_point, attempt=attempt)
        try:
            return run_rank(config, place, control)
        finally:
            ended.set()
            watcher.join()
            if dist.is_initialized():
                dist.destroy_process_group()


def _run_on_ray(
    config: Resolved,
    display: ProgressDisplay,
    stop: StopRequest,
    *,
    refit: Callable[[int], Resolved | None],
) -> Outcome:
    """Trains by supervised Ray actors, on the cluster in reach or on this machine."""
    address = cluster_address(config.launch)
    display.phase(f"joining the Ray cluster at {address}" if address else "starting Ray, here only")
    cluster = RayCluster.connect(
        address,
        num_workers=config.launch.num_workers,
        allow_unauthenticated=config.launch.allow_unauthenticated,
        environment=for_ranks(
            os.environ, cluster_env=config.cluster.env, pass_env=config.launch.pass_env
        ),
    )
    supervisor = Supervisor(config, cluster, refit=refit, display=display, stop_requested=stop)
    try:
        return supervisor.run()
    finally:
        cluster.disconnect()


def _run_external(
    config: Resolved,
    external: ExternalRank,
    *,
    data: DataSettings,
    report: Callable[[Path], object],
) -> NoReturn:
    """Trains as one of the ranks that torchrun or srun has started, and ends the process."""
    rank, leads = external.rank, external.rank == 0
    # The first rank alone looks for mistakes, builds shards and names the run; a mistake ends
    # it with exit code 2 before the others have anyone to meet, and their launcher ends them.
    prepared = None
    if leads:
        with _stops_at_once():
            prepared = _prepared(config, data)
    held = ExitStack()  # until this process ends
    if leads:
        held.enter_context(_held(config.run_dir))
    try:
        device_index = _meet(config, external)
    except (RuntimeError, OSError) as error:
        print(f"moetrain: {_no_meeting(external, error)}", file=sys.stderr)
        _leave(FAILED)
    agreed: list[object] = [None, None]
    if prepared and (good := _complete(config)):
        _tell_complete(config, prepared, good, report=report)
    elif prepared:
        for line in prepared.lines():
            print(line, file=sys.stderr)
        _open_run(config, prepared)
        agreed = [config.run.name, _take_over(config)]
    dist.broadcast_object_list(agreed)
    if agreed[0] is None:  # the run has all its steps
        dist.barrier()
        _leave(DONE)
    name, attempt = str(agreed[0]), int(str(agreed[1]))
    config = replace(config, run=replace(config.run, name=name))
    held.enter_context(_logging_to(Path(config.run.dir, name), rank=rank))
    control = Control()
    stop = StopRequest(told=control.request_stop)
    place = Place(
        rank=rank,
        world_size=external.world_size,
        device_index=device_index,
        local_world_size=external.local_world_size,
        rendezvous="env://",
        attempt=attempt,
    )
    code = FAILED
    try:
        with stop.on_signals(), _saying(control):
            outcome = run_rank(config, place, control)
        code = DONE if outcome.finished else STOPPED
        if prepared:
            code = _close_run(config, outcome, prepared.shards, report)
        dist.barrier()  # their launcher ends all of them once one has left with another code than 0
    except Exception as error:
        print(f"moetrain: rank {rank}: {redacted_text(classify(error).reason)}", file=sys.stderr)
    _leave(code)


@contextmanager
def _saying(control: Control) -> Iterator[None]:
    """Prints what a rank has to say while it trains; its records are in the run's folder."""
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


def _meet(config: Resolved, external: ExternalRank) -> int:
    """Joins the ranks of another launcher; returns the index of this one's device."""
    for name, value in config.cluster.env.items():
        os.environ.setdefault(name, value)  # gloo looks for its interface as it joins
    os.environ |= meeting_point(external, os.environ, arguments=sys.argv[1:])
    # Slurm may show a task its own GPU only.
    shown = torch.cuda.device_count() if config.run.device != "cpu" else 0
    index = 0 if shown == 1 else external.local_rank
    join_ranks(
        rank=external.rank,
        world_size=external.world_size,
        rendezvous="env://",
        device=rank_device(config.run.device, index=index),
        timeout_seconds=config.launch.hang_timeout_seconds,
    )
    return index


def _no_meeting(external: ExternalRank, error: Exception) -> str:
    """Returns why the ranks of another launcher didn't meet, and what to change."""
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
    """Ends a rank's process: tearing a process group down now and then aborts after success."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _open_run(config: Resolved, prepared: Prepared) -> Path:
    """Writes what a run will be into its folder; returns the folder."""
    run_dir = config.run_dir
    text = yaml.safe_dump(as_plain(config), sort_keys=False)
    replace_text(run_dir / "config.yaml", text)
    _tell_start(config, prepared)
    return run_dir


def _tell_start(config: Resolved, prepared: Prepared) -> None:
    run_dir = config.run_dir
    event = EventLog(run_dir / "events.jsonl").write
    event(
        EventKind.start,
        command=" ".join(redacted_arguments(sys.argv)),
        workers=config.launch.num_workers,
        pid=os.getpid(),
        last_sign=read_sign(run_dir),  # where a life was killed, this is all that tells of its end
    )
    event(EventKind.model, **prepared.preview.counts())
    shards = prepared.shards
    for source, baselines in shards.baselines.items():
        plan = prepared.plan.get(source)
        event(
            EventKind.data,
            source=source,
            path=shards.location,
            baselines=vars(baselines),
            **(vars(plan) if plan else {"weights": {}}),
        )


@contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """Makes a run's folder and keeps other commands on this machine off it, even past a kill.

    Raises ConfigError where another command holds it. On other machines the number of the attempt
    is the fence.
    """
    with named_folder(run_dir):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 20).decode() or "unknown"
        os.close(lock)
        raise in_use(run_dir, holder=holder) from None
    try:
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        os.close(lock)  # and with it the lock


def _close_run(
    config: Resolved, outcome: Outcome, shards: ShardFolder, report: Callable[[Path], object]
) -> int:
    """Writes how the run ended, prints the closing lines and returns the exit code."""
    run_dir = config.run_dir
    event = EventLog(run_dir / "events.jsonl").write
    event(EventKind.finish if outcome.finished else EventKind.stop, step=outcome.step)
    try:
        report(run_dir)
    except Exception as error:  # a page that can't be drawn is no reason to fail a run
        print(f"moetrain: no report: {error}", file=sys.stderr)
    for line in _closing_lines(config, outcome, shards, run_dir):
        print(line)
    return DONE if outcome.finished else STOPPED


def _closing_lines(
    config: Resolved, outcome: Outcome, shards: ShardFolder, run_dir: Path
) -> Iterator[str]:
    records = read_metrics(run_dir / "metrics.jsonl")
    known = {k: v for record in records for k, v in record.items()} | dict(outcome.last)
    if not outcome.finished:
        yield f"stopped   at step {outcome.step} of {config.train.num_steps}, saved"
    if "validation/loss" in known:
        yield f"loss      {known['validation/loss']:.3f} nats a token on held-out text"
    elif (loss := final_loss(records)) is not None:
        yield f"loss      {loss:.3f} nats a token in training, over the last tenth of the steps"
    for source, baselines in shards.baselines.items():
        if bits := known.get(f"validation/{source}/bits_per_byte"):
            bigram, zlib = baselines.byte_bigram_bits_per_byte, baselines.zlib_bits_per_byte
            beside = [
                f"{name} {figure:.2f}"
                for name, figure in (("a byte-bigram model has", bigram), ("zlib level 9", zlib))
                if figure
            ]
            yield f"          {bits:.3f} bits per byte of {source}; {', '.join(beside)}"
    speeds = [s for r in records if (s := r.get("perf/tokens_per_second"))]
    if speeds:
        yield f"speed     {median(speeds):,.0f} tokens/s (median)"
    if line := effective_line(run_account(run_dir)):
        yield line
    name = text_setting("run.name", config.run.name)
    if run_dir.is_relative_to(Path.cwd()):
        run_dir = run_dir.relative_to(Path.cwd())
    yield f"run       {run_dir}"
    opened = f"open {shlex.quote(str(run_dir / 'report.html'))}"
    if TRIAL_VARIABLE in os.environ:  # what the user typed is the sweep's command, not its own
        yield f"next      {opened if outcome.finished else 'the same sweep goes on from here'}"
    elif outcome.finished:
        more = training_on(config, step=outcome.step)
        line = f"next      {opened}; train on with {name} {more}"
        yield f"{line}; or try {sweep_to_try(config)}" if _may_be_swept(config) else line
    else:
        yield f"next      the same command with {name} goes on from here"


def _may_be_swept(config: Resolved) -> bool:
    """Returns whether a run's command can become a sweep: of new runs, by what is no rank."""
    begins_anew = config.schedule.restart_from or config.optim.restart_from
    return not begins_anew and external_rank(os.environ) is None


def sweep_to_try(config: Resolved) -> str:
    """Returns what makes a sweep of a run's command, by values that its other settings allow."""
    model, router = config.model, config.model.router
    half = model.num_experts // 2
    # Half as many must still make the groups, hold what a token takes, and go on the same ranks.
    halves = (
        model.num_experts % (2 * router.num_groups) == 0
        and half // router.num_groups * router.top_groups >= model.top_k
        and half % config.parallel.expert_degree == 0
    )
    experts = (half if halves else 4 * model.num_experts, 2 * model.num_experts)
    rates = (config.optim.lr / 2, config.optim.lr * 2)
    key, values = ("model.num_experts", experts) if model.is_moe else ("optim.lr", rates)
    words = f"-m {key}={','.join(f'{value:g}' for value in sorted(values))}"
    name = config.run.name
    is_one = as_typed(name, swept=True) == as_typed(name)
    return words if is_one else f"{words} {text_setting('run.name', name, swept=True)}"


def effective_line(account: Account | None) -> str | None:
    """Returns how much of the run's time counts, if much of it is gone or anything was lost."""
    if account is None or account.effective is None:
        return None
    if account.wall < WORTH_TELLING_SECONDS and not account.interruptions:
        return None
    line = f"effective {account.effective:.1%} of {duration(account.wall)} in steps that count"
    if number := account.interruptions:
        many = "1 interruption" if number == 1 else f"{number} interruptions"
        line += f"; {many} cost {duration(account.lost)}"
    return line


@contextmanager
def _logging_to(run_dir: Path, *, rank: int) -> Iterator[None]:
    """Sends this process's log records to the rank's own file while the context lasts."""
    handler = logging.FileHandler(
        run_dir / "logs" / f"rank_{rank:03d}.log", errors="backslashreplace"
    )
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
