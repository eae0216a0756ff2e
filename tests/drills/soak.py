"""`python -m tests.drills.soak [minutes=30] [mean_seconds=60] [seed=0]`

Trains with faults at random times, `mean_seconds` apart on average, and stops after `minutes`; then
trains as many steps without faults. Prints the faults and their cost, and exits with 1 unless
metrics and weights are equal, bit for bit.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain.observe import run_account
from tests.drills.drill import Run, alive, time_of
from tests.drills.faults import disarm
from tests.drills.single_host import this_machine
from tests.torture.content import digest

NUMBERS = {"minutes": 30, "mean_seconds": 60, "seed": 0}

# Steps of about a tenth of a second, saved every few seconds. The learning rate is constant, so
# that weights don't depend on the planned length of the run.
LONG = [
    "model.dim=64", "model.ffn_hidden_dim=128", "model.max_seq_len=128", "train.seq_len=128",
    "train.global_batch_size=16", "schedule.name=constant", "checkpoint.every_steps=50",
    "observe.log_every_steps=10", "launch.max_failures=20", "launch.hang_timeout_seconds=15",
]  # fmt: skip
ENDLESS = 10**6
SHARES = {"kill of a rank": 0.7, "SIGSTOP of a rank": 0.15, "kill of the driver": 0.15}
STOP_SECONDS, STOPPED = 120.0, 75


@dataclass
class Soak:
    """A run with injected faults, and their record."""

    run: Run
    draw: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    injected_at: float = 0.0
    next_kind: str | None = None
    """Drawn, and deferred until there is a rank."""
    commands: int = 1

    def train(self, *, minutes: float, mean_seconds: float) -> None:
        """Trains with injected faults for that long, and stops after saving."""
        end = time.monotonic() + 60 * minutes
        fault_at = time.monotonic() + self.draw.expovariate(1 / mean_seconds)
        while True:
            with self.run.started() as process:
                while process.poll() is None:
                    time.sleep(0.2)
                    if time.monotonic() > end:
                        if self._has_recovered():
                            process.terminate()
                            process.wait(timeout=STOP_SECONDS)
                    elif time.monotonic() > fault_at and (kind := self._inject(process)):
                        self.faults[kind] += 1
                        self.next_kind = None
                        print(f"{datetime.now(UTC):%H:%M:%S} {kind}", file=sys.stderr, flush=True)
                        fault_at = time.monotonic() + self.draw.expovariate(1 / mean_seconds)
                assert not self.run.leaves_no_process(seconds=60)
            if process.returncode == STOPPED:
                return
            assert process.returncode == -signal.SIGKILL, self.run.log.read_text()[-3000:]
            self.commands += 1

    def _has_recovered(self) -> bool:
        """Returns whether the run trains, and no injected fault is still to be detected."""
        told = self.run.events("training", "failure", "save", "start")
        if not told or told[-1]["event"] != "save":
            return False
        return time_of(told[-1]) > self.injected_at

    def _inject(self, process: "subprocess.Popen[bytes]") -> str | None:
        """Kills or stops the driver or a rank; returns which, None if there is no rank yet."""
        kind = self.next_kind or self.draw.choices(list(SHARES), list(SHARES.values()))[0]
        self.next_kind = kind
        self.injected_at = time.time()
        if kind == "kill of the driver":
            process.kill()
            process.wait()
            return kind
        attempts = self.run.events("attempt")
        ranks = [rank["pid"] for rank in attempts[-1]["ranks"]] if attempts else []
        present = [pid for pid in ranks if is_rank(pid)]
        if not present:
            return None
        number = signal.SIGSTOP if kind.startswith("SIGSTOP") else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.draw.choice(present), number)
        return kind


def is_rank(pid: int) -> bool:
    """Returns whether a process lives and is a rank's: process ids are reused after a while."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False
    return alive(pid) and b"RankActor" in command


def main(arguments: list[str]) -> int:
    """Soaks; returns the exit code."""
    numbers = dict(NUMBERS)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in numbers or not value.isdigit():
            print(f"{argument}: {__doc__}", file=sys.stderr)
            return 2
        numbers[name] = int(value)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    folder = Path(tempfile.mkdtemp(prefix="soak_")).resolve()
    text, problems = soak(folder, **numbers)
    command = " ".join(f"{name}={number}" for name, number in numbers.items())
    print(f"`python -m tests.drills.soak {command}`\n\n{text}")
    for problem in problems:
        print(f"- **{problem}**")
    if problems:
        print(f"\nwhat it left is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def soak(folder: Path, *, minutes: int, mean_seconds: int, seed: int) -> tuple[str, list[str]]:
    """Trains with faults and again without; returns the report and what is wrong."""
    site = this_machine(folder)
    disarm(folder)
    disturbed = Soak(
        Run(site, "disturbed", *LONG, f"train.num_steps={ENDLESS}"), random.Random(f"soak {seed}")
    )
    start = time.monotonic()
    disturbed.train(minutes=minutes, mean_seconds=mean_seconds)
    seconds = time.monotonic() - start
    step = int(disturbed.run.checkpoint().name.removeprefix("step_"))
    calm = Run(site, "calm", *LONG, f"train.num_steps={step}")
    start = time.monotonic()
    with calm.started() as process:
        process.wait()
    calm_seconds = time.monotonic() - start
    assert process.returncode == 0, calm.log.read_text()[-3000:]

    problems = []
    ours, theirs = disturbed.run.metrics(), calm.metrics()
    both = [a.keys() & b.keys() for a, b in zip(ours, theirs, strict=False)]
    if [r["step"] for r in ours] != [r["step"] for r in theirs if r["step"] % 10 == 0]:
        problems.append("other steps")
    elif any(
        a[key] != b[key] for a, b, keys in zip(ours, theirs, both, strict=False) for key in keys
    ):
        problems.append("other metrics")
    if digest(disturbed.run.checkpoint()) != digest(calm.checkpoint()):
        problems.append("other weights")
    account = run_account(disturbed.run.folder)
    assert account
    attempts = len(disturbed.run.events("attempt"))
    failures = Counter(event["failure"] for event in disturbed.run.events("failure"))
    lines = [
        f"- {sum(disturbed.faults.values())} faults in {seconds / 60:.1f} minutes: "
        + ", ".join(f"{kind} {number}" for kind, number in disturbed.faults.most_common()),
        f"- {disturbed.commands} commands, {attempts} attempts; reported as "
        + ", ".join(f"{kind} {number}" for kind, number in failures.most_common()),
        f"- {step} steps, and {account.redone_steps} that were lost and trained again",
        f"- effective training time by the run's own account: {account.effective or 0:.1%}",
        f"- undisturbed the same steps took {calm_seconds / 60:.1f} minutes: "
        f"{calm_seconds / seconds:.0%} of the time under faults",
        f"- metrics and weights: {'equal bit for bit' if not problems else 'NOT EQUAL'}",
    ]
    return "\n".join(lines), problems


if __name__ == "__main__":
    ignore_broken_pipes()
    sys.exit(main(sys.argv[1:]))
