"""A drill: a real command, an injected fault, the measurements, and the comparison of results.

Owns commands and watching them from outside, by the files that every run writes. The faults are in
single_host.py and cluster.py.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from moetrain.checkpoint.folders import candidates
from moetrain.observe import read_events, read_metrics
from tests.drills.faults import VARIABLE, Armed, Fault, arm, disarm
from tests.support.runs import TIMING
from tests.torture.content import digest

NUM_STEPS, SAVE_EVERY = 60, 10
TINY = [
    "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.head_dim=16", "model.ffn_hidden_dim=32", "model.num_experts=4",
    f"train.num_steps={NUM_STEPS}", "train.global_batch_size=8", "train.seq_len=32",
    f"checkpoint.every_steps={SAVE_EVERY}", "schedule.warmup_steps=5",
    "observe.log_every_steps=1", "observe.wandb.mode=disabled", "run.device=cpu",
    "train.validate_at_start=false",
    "launch.mode=ray", f"launch.pass_env=[{VARIABLE}]",
]  # fmt: skip
# Seconds to detection, and to the next step.
KILL_NOTICE, NODE_DETECTION = 2.0, 15.0
KILL_TARGET, NODE_TARGET, HANG_MARGIN = 15.0, 30.0, 15.0
TIMEOUT_SECONDS = 180.0  # seconds: what hasn't happened by then counts as failed


@dataclass(kw_only=True)
class Result:
    """The result of one drill."""

    drill: str
    detected: float | None = None
    """Seconds from the fault to the event that reports it."""
    next_step: float | None = None
    """Seconds from the fault until another step was done."""
    target: float | None = None
    """The limit of `next_step`."""
    detection_target: float | None = None
    """The limit of `detected`."""
    curve: str = "–"
    """How the metrics and the weights compare with the undisturbed run's."""
    said: str = ""
    """The cause, as the run reported it."""
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None
    """Why it could not be tested here."""

    @property
    def is_late(self) -> bool:
        """Whether a target was missed."""
        pairs = [(self.detected, self.detection_target), (self.next_step, self.target)]
        return not self.skipped and any(
            target is not None and (seconds is None or seconds > target)
            for seconds, target in pairs
        )

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        if self.skipped:
            return "skipped"
        if self.problems:
            return "FAILED"
        return "late" if self.is_late else "passes"


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where commands run: this machine, or a host of a cluster."""

    folder: Path
    shards: Path
    environment: Mapping[str, str]
    prefix: Sequence[str]
    """The prefix of each command."""
    overrides: Sequence[str]
    """How the ranks are launched here."""
    _whole: dict[tuple[str, ...], "Run"] = field(default_factory=dict)

    def undisturbed(self, *overrides: str) -> "Run":
        """Returns a run without any fault; trained once and shared."""
        if overrides not in self._whole:
            disarm(self.folder)
            run = Run(self, f"undisturbed_{len(self._whole)}", *overrides)
            with run.started() as process:
                process.wait(timeout=TIMEOUT_SECONDS)
            assert process.returncode == 0, run.log.read_text()
            steps = [record["step"] for record in run.metrics()]
            assert steps == list(range(1, steps[-1] + 1)), steps
            assert "failure" not in run.kinds(), run.events()
            self._whole[overrides] = run
        return self._whole[overrides]


class Run:
    """A run of the tiny model, by one command or by several that each resume it."""

    def __init__(self, site: Site, name: str, *overrides: str, at: Path | None = None) -> None:
        self.site, self.name, self.overrides = site, name, overrides
        self.folder = (at or site.folder / "runs") / name
        self.log = site.folder / f"{name}.log"
        self.armed: Armed | None = None
        self.began = 0.0
        """When the newest command was started."""
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def started(
        self, *, fault: Fault | None = None, environment: Mapping[str, str] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Starts the command; whatever is left of it at the end is killed."""
        disarm(self.site.folder)
        if fault:
            self.armed = arm(fault, self.site.folder)
        self.began = time.time()
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [
                    *self.site.prefix, sys.executable, "-m", "moetrain", *TINY,
                    *self.site.overrides, *self.overrides, f"data.dir={self.site.shards}",
                    f"run.name={self.name}", f"run.dir={self.folder.parent}",
                ],
                cwd=self.site.folder, env={**self.site.environment, **(environment or {})},
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._process = process
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Returns the run's events so far, of some kinds or of all."""
        events = read_events(self.folder / "events.jsonl")
        return [e for e in events if not kinds or e["event"] in kinds]

    def kinds(self) -> list[str]:
        """Returns what events there are, in order."""
        return [event["event"] for event in self.events()]

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the metric records so far, without their timings."""
        return [
            {k: v for k, v in record.items() if not k.startswith(TIMING)}
            for record in read_metrics(self.folder / "metrics.jsonl")
        ]

    def step(self) -> int:
        """Returns the last step that is done."""
        records = read_metrics(self.folder / "metrics.jsonl")
        return int(records[-1]["step"]) if records else 0

    def ranks(self) -> list[dict[str, Any]]:
        """Returns rank, node and process of all ranks of the newest attempt."""
        ranks: list[dict[str, Any]] = self.events("attempt")[-1]["ranks"]
        return ranks

    def checkpoint(self) -> Path:
        """Returns the folder of the newest checkpoint."""
        return candidates(self.folder / "checkpoints")[0]

    def wait_for(
        self, what: str, there: Callable[[], Any], *, seconds: float = TIMEOUT_SECONDS
    ) -> Any:
        """Returns what `there` returns once that is true.

        Raises AssertionError where the command ends before, or after a while.
        """
        assert self._process
        until = time.monotonic() + seconds
        while True:
            ended = self._process.poll()
            if found := there():
                return found
            if ended is not None:
                raise AssertionError(f"no {what}: ended with {ended}\n{self._tail()}")
            if time.monotonic() > until:
                raise AssertionError(f"no {what} within {seconds:.0f} s\n{self._tail()}")
            time.sleep(0.03)

    def wait_for_fault(self) -> float:
        """Returns the time at which the armed fault was injected."""
        assert self.armed
        armed = self.armed
        return float(self.wait_for("fault", armed.injected)[0])

    def wait_for_step(self, step: int) -> None:
        """Waits until a step is done."""
        self.wait_for(f"step {step}", lambda: self.step() >= step)

    def next_step_after(self, fault_time: float) -> float:
        """Returns the seconds from a fault until an attempt after it has done a step."""

        def training() -> list[int]:
            return [e["step"] for e in self.events("training") if time_of(e) > fault_time]

        start = self.wait_for("training after the fault", training)[0]
        self.wait_for(f"step {start + 1}", lambda: self.step() > start)
        return time.time() - fault_time

    def leaves_no_process(self, *, seconds: float = 20.0) -> list[str]:
        """Returns a problem for each rank of any attempt whose process doesn't end in time."""
        pids = {rank["pid"] for event in self.events("attempt") for rank in event["ranks"]}
        until = time.monotonic() + seconds
        while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < until:
            time.sleep(0.1)
        return [f"rank process {pid} is still there" for pid in left]

    def _tail(self) -> str:
        return f"{self.kinds()}\n{self.log.read_text()[-3000:]}"


def time_of(event: Mapping[str, Any]) -> float:
    """Returns when an event was, in seconds since the epoch."""
    return datetime.fromisoformat(event["time"]).timestamp()


def alive(pid: int) -> bool:
    """Returns whether a process exists and isn't a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def is_as_if_undisturbed(run: Run, whole: Run, result: Result) -> None:
    """Compares a finished run with an undisturbed one of the same layout, bit for bit."""
    ours, theirs = run.metrics(), whole.metrics()
    steps = [record["step"] for record in ours]
    if steps != [record["step"] for record in theirs]:
        result.problems.append(f"steps {steps}")
    elif ours != theirs:
        first = next(a["step"] for a, b in zip(ours, theirs, strict=True) if a != b)
        result.problems.append(f"other metrics from step {first} on")
    elif digest(run.checkpoint()) != digest(whole.checkpoint()):
        result.problems.append("other weights at the end")
    else:
        result.curve = "equal bit for bit"


def table(results: Sequence[Result]) -> str:
    """Returns the results as Markdown, with what the runs reported about them below."""
    lines = [
        "| drill | detected after | target | next step after | target | in the end | verdict |",
        "|---|--:|--:|--:|--:|---|---|",
    ]
    for result in results:
        times = " | ".join(
            f"{_seconds(found, 1)} | {_seconds(target, 0)}"
            for found, target in (
                (result.detected, result.detection_target), (result.next_step, result.target)
            )
        )  # fmt: skip
        lines.append(f"| {result.drill} | {times} | {result.curve} | {result.verdict} |")
    lines.append("\nWhat the runs said:\n")
    for result in results:
        said = result.skipped or result.said or "nothing"
        lines.append(f"- {result.drill}: {said}")
        lines += [f"  - **{problem}**" for problem in result.problems]
    return "\n".join(lines)


def _seconds(number: float | None, digits: int) -> str:
    return "–" if number is None else f"{number:.{digits}f} s"
