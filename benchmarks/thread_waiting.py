"""How long waiting threads should spin before they sleep: alone, and next to busy processes.

`python -m benchmarks.thread_waiting` prints one JSON object per line on standard output and a table
on standard error. GNU's OpenMP reads its settings when it is loaded, so each setting has a process
of its own; a round runs all of them, one after the other.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import sleep
from typing import IO, Any

import torch

from benchmarks.timing import machine, print_record, print_table, spread, time_in_turn
from benchmarks.train_step import Case, configured, our_step
from data_pipeline.commands.standard_streams import ignore_broken_pipes
from data_pipeline.threads import WAITING
from moetrain.parallel import join_ranks
from moetrain.train.build import build_trainer
from moetrain.train.control import Control, RankPlace
from moetrain.train.micro_batch import MicroBatch
from moetrain.train.rank import keep_freed_memory

SETTINGS = ("GOMP_SPINCOUNT=300000", "GOMP_SPINCOUNT=10000", "GOMP_SPINCOUNT=1000",
            "GOMP_SPINCOUNT=0", "OMP_WAIT_POLICY=passive")  # fmt: skip
# The first is the default of GNU's OpenMP.
WORK = {"products": "20 products of 256 × 256", "step": "a step of the toy, 16 × 256 tokens"}
CPU = torch.device("cpu")
STILL_SECONDS = 0.1  # until no thread of the previous pass spins any more


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.thread_waiting", description=__doc__
    )
    parser.add_argument("--work", nargs="+", choices=WORK, default=[*WORK])
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], metavar="NAME=VALUE")
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2],
                        help="processes beside it that compute all the time (0 1 2)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", choices=WORK, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, threads=options.threads)
        return
    for work in options.work:
        records = measure(
            work,
            settings=options.settings,
            busy=options.busy,
            threads=options.threads,
            rounds=options.rounds,
        )
        for record in records:
            print_record(record)
        show(records)


def measure(
    work: str, *, settings: Sequence[str], busy: Sequence[int], threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Returns a record for each setting with each number of busy processes."""
    records = []
    with ExitStack() as servers:
        passes = {
            setting: servers.enter_context(_served(work, setting, threads=threads))
            for setting in settings
        }
        for others in busy:
            with _busy(others):
                taken = time_in_turn(
                    passes,
                    rounds=rounds,
                    warmup=2,
                    device=CPU,
                    prepare=partial(sleep, STILL_SECONDS),
                )
            records += [
                {
                    "benchmark": "thread_waiting",
                    "case": {
                        "work": WORK[work],
                        "busy_processes": others,
                        "threads": threads,
                        "machine": machine(CPU),
                        "torch": torch.__version__,
                    },
                    "implementation": setting,
                    "seconds": spread(taken[setting]),
                    # There is no limit: the ratio is to the first setting, above 1 if faster.
                    "ratio_to_limit": None,
                    "ratio_to_first": median(taken[settings[0]]) / median(taken[setting]),
                    "rounds": rounds,
                }
                for setting in settings
            ]
    return records


@contextmanager
def _served(work: str, setting: str, *, threads: int) -> Iterator[Callable[[], None]]:
    """Yields a pass of some work in a process that was started with a setting."""
    name, _, value = setting.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.thread_waiting", "--serve", work,
         "--threads", str(threads)],
        env={k: v for k, v in os.environ.items() if k not in WAITING} | {name: value},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    try:
        _answer(process.stdout)  # it is ready
        yield partial(_ask, process.stdin, process.stdout)
    finally:
        process.stdin.close()
        process.wait()


def _ask(requests: IO[str], answers: IO[str]) -> None:
    print(file=requests, flush=True)
    _answer(answers)


def _answer(answers: IO[str]) -> None:
    assert answers.readline(), "the process of a setting ended"


def serve(work: str, *, threads: int) -> None:
    """Runs a pass of the work for each line on standard input, and answers with a line."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as run_rank does
    with tempfile.TemporaryDirectory() as folder:
        run = _products() if work == "products" else _step(Path(folder))
        print(flush=True)
        for _ in sys.stdin:
            run()
            print(flush=True)


def _products() -> Callable[[], object]:
    left, right = torch.randn(256, 256), torch.randn(256, 256)

    def run() -> None:
        for _ in range(20):
            torch.mm(left, right)

    return run


def _step(folder: Path) -> Callable[[], object]:
    join_ranks(
        rank=0, world_size=1, rendezvous=f"file://{folder}/rendezvous", device=CPU,
        timeout_seconds=300,
    )  # fmt: skip
    config = configured(Case.parse("toy,4,16,256"), device=CPU, folder=folder)
    place = RankPlace(rank=0, world_size=1, rendezvous="joined", attempt=1)
    trainer = build_trainer(config, place, Control(), device=CPU)
    batch = trainer.batches.read(0, rank=0, num_ranks=1)
    return our_step(trainer, MicroBatch.cut(batch, len(batch.tokens), device=CPU))


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """Runs processes that compute all the time, within the context."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def show(records: Sequence[Mapping[str, Any]]) -> None:
    """Prints a table: a row for each setting, a column for each number of busy processes."""
    case = records[0]["case"]
    busy = sorted({record["case"]["busy_processes"] for record in records})
    rows: dict[str, list[str]] = {}
    for record in records:
        least, middle, most = (1e3 * seconds for seconds in record["seconds"])
        rows.setdefault(record["implementation"], []).append(
            f"{middle:.1f} ({least:.1f}–{most:.1f})"
        )
    print_table(
        f"{case['work']}, {case['threads']} threads · {case['machine']} · "
        f"{records[0]['rounds']} rounds · ms",
        ("setting", *(f"{count} busy" for count in busy)),
        [(setting, *cells) for setting, cells in rows.items()],
    )


if __name__ == "__main__":
    ignore_broken_pipes()
    main()
