"""Drills on this machine alone: two ranks under a Ray of their own, with every kind of fault."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.drills.clock import Clock, no_clock_because
from tests.drills.drill import (
    HANG_MARGIN,
    KILL_NOTICE,
    KILL_TARGET,
    SAVE_EVERY,
    TIMEOUT_SECONDS,
    Result,
    Run,
    Site,
    is_as_if_undisturbed,
    time_of,
)
from tests.drills.faults import POINTS, VARIABLE, Fault, on, variables
from tests.support.held_run import Hold
from tests.support.runs import write_shards

HANG_SECONDS = 10


def this_machine(folder: Path, *, hang_seconds: int = HANG_SECONDS) -> Site:
    """Returns a site on two of this machine's cores, so that each rank computes with one thread."""
    root = str(Path(__file__).parents[2])
    cores = sorted(os.sched_getaffinity(0))[:2]
    return Site(
        folder=folder,
        shards=write_shards(folder),
        environment=os.environ | variables(folder, python_path=root),
        prefix=["taskset", "-c", ",".join(map(str, cores))],
        overrides=["launch.num_workers=2", f"launch.hang_timeout_seconds={hang_seconds}"],
    )


def replaced(
    site: Site, name: str, fault: Fault, *, failure: str, said: str = "",
    notice: float | None = None, target: float,
) -> Result:  # fmt: skip
    """A fault is injected into a rank from inside; all ranks restart and the run resumes."""
    whole = site.undisturbed()
    result = Result(drill=name, detection_target=notice, target=target)
    run = Run(site, slug(name))
    with run.started(fault=fault) as process:
        fault_time = run.wait_for_fault()
        result.next_step = run.next_step_after(fault_time)
        process.wait(timeout=TIMEOUT_SECONDS)
    ended_well(run, process, result)
    check_report(run, result, fault_time, failures={failure}, said=said)
    is_as_if_undisturbed(run, whole, result)
    return result


def error_of_the_code(site: Site) -> Result:
    """An exception on one rank: no automatic restart; the same command, run again, resumes."""
    whole, result = site.undisturbed(), Result(drill="an exception on one rank (ends the run)")
    run = Run(site, "exception")
    with run.started(fault=on("forward", "raise")) as process:
        fault_time = run.wait_for_fault()
        process.wait(timeout=TIMEOUT_SECONDS)
    if process.returncode != 1:
        result.problems.append(f"exit code {process.returncode}, not 1")
    if len(run.events("attempt")) != 1:
        result.problems.append("an error of the code was tried again")
    check_report(run, result, fault_time, failures={"error"}, said="ArithmeticError")
    result.problems += run.leaves_no_process()
    with run.started() as process:
        process.wait(timeout=TIMEOUT_SECONDS)
    ended_well(run, process, result)
    is_as_if_undisturbed(run, whole, result)
    return result


def driver_killed(site: Site) -> Result:
    """The command itself is killed; its ranks end, and the same command resumes the run."""
    whole, result = site.undisturbed(), Result(drill="driver killed", target=KILL_TARGET)
    run, hold = Run(site, "driver"), Hold(site.folder / "held", step=25)
    with run.started(environment=hold.environment) as process:
        run.wait_for("step 25", hold.is_held)
        ranks = run.ranks()
        fault_time = time.time()
        process.kill()
        process.wait()
        # Not before its ranks are gone: the killed command's process group is theirs, too.
        result.problems += run.leaves_no_process()
    assert ranks
    result.detected = time.time() - fault_time
    with run.started() as process:
        result.next_step = run.next_step_after(fault_time)
        process.wait(timeout=TIMEOUT_SECONDS)
    result.said = "the same command again"
    ended_well(run, process, result)
    is_as_if_undisturbed(run, whole, result)
    return result


def disk_full(site: Site) -> Result:
    """The run's disk fills up; what was saved stays, and with more room the command resumes."""
    whole, result = site.undisturbed(), Result(drill="disk full (ends the run)")
    disk = site.folder / "disk"
    with small_disk(disk) as problem:
        if problem:
            result.skipped = problem
            return result
        run = Run(site, "disk", at=disk)
        with run.started() as process:
            process.wait(timeout=TIMEOUT_SECONDS)
        text = run.log.read_text()
        if process.returncode != 1 or "No space left" not in text:
            result.problems.append(f"exit code {process.returncode}, or no word of the disk")
        result.said = next((line for line in text.splitlines() if "No space left" in line), "")
        kept = run.checkpoint().name
        files = [run.folder / "checkpoints/latest", run.folder / "config.yaml"]
        before = [file.read_text() for file in files]
        with run.started() as process:  # on the full disk
            process.wait(timeout=TIMEOUT_SECONDS)
        said = run.log.read_text()[len(text) :]
        if process.returncode != 1 or "No space left" not in said:
            result.problems.append(f"again on the full disk: {process.returncode}, {said[-500:]}")
        if [f.read_text() for f in files] != before or list(run.folder.glob("*/staged_*")):
            result.problems.append("the second command corrupted what the first had left")
        shutil.copytree(disk, site.folder / "more_room")
    run = Run(site, "disk", at=site.folder / "more_room")
    with run.started() as process:
        process.wait(timeout=TIMEOUT_SECONDS)
    ended_well(run, process, result)
    if {event["step"] for event in run.events("resume")} != {int(kept.split("_")[1])}:
        result.problems.append(f"{run.events('resume')}: didn't go on from {kept}")
    is_as_if_undisturbed(run, whole, result)
    return result


def clock_jump(site: Site, *, seconds: int) -> Result:
    """The wall clock jumps for Ray, driver and ranks; nothing else may happen."""
    way = "forward" if seconds > 0 else "back"
    result = Result(drill=f"clock jumps {way} by {abs(seconds) // 3600} h")
    if reason := no_clock_because():
        result.skipped = reason
        return result
    whole, clock = site.undisturbed(), Clock.right(site.folder / f"clock_{way}")
    names = [VARIABLE, *clock.environment]
    run = Run(site, slug(result.drill), f"launch.pass_env=[{','.join(names)}]")
    hold = Hold(site.folder / f"held_{way}", step=25)
    with run.started(environment=hold.environment | clock.environment) as process:
        run.wait_for("step 25", hold.is_held)
        clock.jump(seconds)
        hold.release()
        process.wait(timeout=TIMEOUT_SECONDS)
    ended_well(run, process, result)
    for kind in ("save", "finish"):  # of a rank, of the driver
        last = run.events(kind)[-1:]
        if not last or abs(time_of(last[0]) - run.began - seconds) > abs(seconds) / 2:
            result.problems.append(f"the clock didn't jump where {kind!r} is told")
    if "failure" in run.kinds():
        result.problems.append(f"failed: {run.events('failure')[0]['reason']}")
    result.said = "nothing, and nothing happened"
    is_as_if_undisturbed(run, whole, result)
    return result


def kill_in(point: str) -> Callable[[Site], Result]:
    """Returns the drill that kills a rank at a point."""
    rank = sorted(POINTS).index(point) % 2
    return lambda site: replaced(
        site, f"kill -9 of rank {rank}: {point}", on(point, "kill", rank=rank),
        failure="died", notice=KILL_NOTICE, target=KILL_TARGET,
    )  # fmt: skip


def hangs(name: str, fault: Fault) -> Callable[[Site], Result]:
    """Returns a drill of a rank that hangs without ending."""
    return lambda site: replaced(
        site, name, fault, failure="hung", said="rank 1",
        notice=HANG_SECONDS, target=HANG_SECONDS + HANG_MARGIN,
    )  # fmt: skip


def out_of_memory(site: Site) -> Result:
    """The allocator of one rank fails."""
    return replaced(
        site, "out of memory", on("forward", "out of memory"),
        failure="memory", said="rank 1", target=KILL_TARGET,
    )  # fmt: skip


DRILLS: dict[str, Callable[[Site], Result]] = {
    **{point: kill_in(point) for point in POINTS},
    "sigstop": hangs("SIGSTOP of a rank", on("forward", "stop")),
    "loop": hangs("a rank in an endless Python loop", on("backward", "loop")),
    "exception": error_of_the_code,
    "memory": out_of_memory,
    "driver": driver_killed,
    "disk": disk_full,
    "clock+": lambda site: clock_jump(site, seconds=7200),
    "clock-": lambda site: clock_jump(site, seconds=-7200),
}


def ended_well(run: Run, process: "subprocess.Popen[bytes]", result: Result) -> None:
    """Records a wrong exit of a command, and ranks that it has left behind."""
    if process.returncode:
        tail = " / ".join(run.log.read_text().splitlines()[-3:])
        result.problems.append(f"exit code {process.returncode}: {tail}")
    result.problems += run.leaves_no_process()


def check_report(
    run: Run, result: Result, fault_time: float, *, failures: set[str], said: str
) -> None:
    """Records when the run detected the fault, whether it reported its cause, where it resumed."""
    told = [e for e in run.events("failure") if time_of(e) > fault_time]
    if not told:
        result.problems.append("no failure was reported")
        return
    result.detected = time_of(told[0]) - fault_time
    result.said = told[0]["reason"]
    if told[0]["failure"] not in failures:
        result.problems.append(f"reported as {told[0]['failure']}, not as {' or '.join(failures)}")
    if said not in result.said:
        result.problems.append(f"no word of {said!r}")
    if len(told) > 1:
        result.problems.append(f"{len(told)} failures for one fault")
    saved = told[0]["last_saved_step"]
    again = [e["step"] for e in run.events("training") if time_of(e) > fault_time]
    if saved < SAVE_EVERY or (again and again[0] < saved):
        result.problems.append(f"resumed from {again[:1]}, and step {saved} was saved")


@contextlib.contextmanager
def small_disk(at: Path, *, kilobytes: int = 1200) -> Iterator[str | None]:
    """Mounts a small disk within the context; yields the reason if that isn't possible."""
    if os.geteuid():
        yield "mounting a small disk needs root"
        return
    at.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(at)], check=False
    )
    if mounted.returncode:
        yield "this machine does not let root mount a tmpfs"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", str(at)], check=True)


def slug(text: str) -> str:
    """Returns a text as a run's name."""
    return "".join(c if c.isalnum() else "_" for c in text)
