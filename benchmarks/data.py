"""Data: how fast text becomes shards and shards become batches, and how long training waits.

`python -m benchmarks.data` prints one JSON object per line on standard output and a table on
standard error. Reading: batches of 4096-token sequences, by one process from the page cache,
compared in turn with plain WebDataset streaming and torchdata over the same shards, and with a copy
of as many tokens from one flat array, which is the limit. Building: `python -m data_pipeline.build`
with Mixtral's tokenizer. Waiting: the toy, trained by its own command.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.timing import machine, print_record, print_table, spread, time_in_turn
from data_pipeline import BuildSettings, DataSettings, GlobalBatches, ShardFolder, build_shards
from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain.observe import read_metrics

SEQ_LEN = 4096
BATCH_SIZE = 32
PARTS = ("read", "build", "wait")
CPU = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--document-tokens", nargs="+", type=int, default=[300, 1000, 5000], help="mean lengths"
    )
    parser.add_argument("--megatokens", type=float, default=32, help="to read (%(default)s)")
    parser.add_argument("--megabytes", type=float, default=120, help="to build (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of the toy (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "read" in options.parts:
            for mean in options.document_tokens:
                show(
                    f"reading 4096-token sequences of documents of {mean} tokens",
                    measure_reading(
                        folder / f"tokens-{mean}",
                        mean_tokens=mean,
                        num_tokens=int(options.megatokens * 1e6),
                        rounds=options.rounds,
                    ),
                )
        if "build" in options.parts:
            records = measure_building(
                folder, num_bytes=int(options.megabytes * 1e6), rounds=min(options.rounds, 3)
            )
            show("building", records)
        if "wait" in options.parts:
            show("waiting", [measure_waiting(folder, num_steps=options.steps)])


def measure_reading(
    folder: Path, *, mean_tokens: int, num_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Returns a record for each way to read about `num_tokens`, measured in turn."""
    shards = _random_shards(folder, mean_tokens=mean_tokens, num_tokens=num_tokens)
    batches = GlobalBatches(
        shards, seq_len=SEQ_LEN, global_batch_size=BATCH_SIZE, seed=0, data=DataSettings()
    )
    num_batches = batches.num_sequences["random"] // BATCH_SIZE
    documents = shards.documents("train", source="random")
    flat = np.concatenate([documents.tokens(n) for n in range(documents.num_documents)])
    tars = [str(folder / s.file) for s in shards.source("random").splits["train"].shards]
    passes: dict[str, Callable[[], int]] = {
        "limit": lambda: _read_flat(flat, num_batches),
        "moetrain": lambda: _read_ours(batches, num_batches),
        f"webdataset {importlib.metadata.version('webdataset')}": lambda: _consume(
            _batched(_streamed(tars)), num_batches
        ),
        f"torchdata {importlib.metadata.version('torchdata')} nodes": lambda: _consume(
            _torchdata(tars), num_batches
        ),
    }
    seconds = time_in_turn(passes, rounds=rounds, warmup=1, device=CPU)
    limit = median(seconds["limit"])
    case = {
        "seq_len": SEQ_LEN,
        "batch_size": BATCH_SIZE,
        "mean_document_tokens": mean_tokens,
        "dtype": "uint16",
        "order": "random (moetrain), stored (others)",
        "machine": machine(CPU),
    }
    return [
        {
            "benchmark": "data.read",
            "case": case,
            "implementation": name,
            "seconds": spread(taken),
            "ratio_to_limit": limit / median(taken),
            "tokens_per_second": num_batches * BATCH_SIZE * SEQ_LEN / median(taken),
            "rounds": rounds,
        }
        for name, taken in seconds.items()
    ]


def measure_building(folder: Path, *, num_bytes: int, rounds: int) -> list[dict[str, Any]]:
    """Returns a record for building shards of Python sources with Mixtral's tokenizer.

    It is compared with the tokenizer alone, mistral-common's in one process: the size of the text
    divided by its speed and by the number of cores.
    """
    corpus, num_bytes = _python_sources(folder / "sources.jsonl", num_bytes=num_bytes)
    numbers = iter(range(1000))

    def build() -> None:
        to = folder / f"built-{next(numbers)}"
        command = [sys.executable, "-m", "data_pipeline.build", f"corpus={corpus}"]
        command += ["tokenizer=mixtral-v1", f"to={to}"]
        subprocess.run(command, check=True, capture_output=True)

    sample = [json.loads(line)["text"] for _, line in zip(range(200), corpus.open(), strict=False)]
    sample_bytes = sum(len(text.encode()) for text in sample)
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    plain = MistralTokenizer.v1().instruct_tokenizer.tokenizer
    passes = {
        "moetrain": build,
        "mistral-common encode": lambda: [plain.encode(t, bos=False, eos=False) for t in sample],
    }
    seconds = time_in_turn(passes, rounds=rounds, warmup=0, device=CPU)
    cores = os.cpu_count() or 1
    scaled = {
        "moetrain": seconds["moetrain"],
        f"mistral-common {importlib.metadata.version('mistral_common')} encode, ÷ cores": [
            s * num_bytes / sample_bytes / cores for s in seconds["mistral-common encode"]
        ],
    }
    return [
        {
            "benchmark": "data.build",
            "case": {
                "tokenizer": "mixtral-v1",
                "text": "Python sources",
                "bytes": num_bytes,
                "cores": cores,
                "machine": machine(CPU),
            },
            "implementation": name,
            "seconds": spread(taken),
            "ratio_to_limit": None,
            "megabytes_per_second": num_bytes / median(taken) / 1e6,
            "rounds": rounds,
        }
        for name, taken in scaled.items()
    ]


def measure_waiting(folder: Path, *, num_steps: int) -> dict[str, Any]:
    """Returns a record of how long the toy's steps waited for data, by its own metrics."""
    command = [sys.executable, "-m", "moetrain", "+model=toy", "run.name=wait"]
    command += [f"run.dir={folder / 'runs'}", "launch.mode=inline", "observe.wandb.mode=disabled"]
    command += [f"train.num_steps={num_steps}", "schedule.warmup_steps=5"]
    command += ["observe.log_every_steps=1", "observe.progress=off"]
    subprocess.run(command, check=True, capture_output=True)
    records = read_metrics(folder / "runs" / "wait" / "metrics.jsonl")[3:]  # without the start
    waits = [record["perf/data_wait_seconds"] for record in records]
    steps = [record["perf/step_seconds"] for record in records]
    return {
        "benchmark": "data.wait",
        "case": {"model": "toy", "ranks": 1, "machine": machine(CPU)},
        "implementation": "moetrain",
        "seconds": spread(waits),
        "ratio_to_limit": None,
        "step_seconds": spread(steps),
        "share_of_step": sum(waits) / sum(steps),
        "rounds": len(records),
    }


def show(title: str, records: list[dict[str, Any]]) -> None:
    """Prints the records, and a table of them for people."""
    for record in records:
        print_record(record)
    rows = [
        [
            record["implementation"],
            f"{record['seconds'][1] * 1e3:,.2f} ms",
            f"{record['tokens_per_second'] / 1e6:,.0f} M tokens/s"
            if "tokens_per_second" in record
            else f"{record['megabytes_per_second']:.1f} MB/s"
            if "megabytes_per_second" in record
            else f"{record['share_of_step']:.3%} of a step",
        ]
        for record in records
    ]
    print_table(f"{title} ({records[0]['case']['machine']})", ["", "median", ""], rows)


def _read_ours(batches: GlobalBatches, num_batches: int) -> int:
    tokens = 0
    for number in range(num_batches):
        batch = batches.read(number * BATCH_SIZE, rank=0, num_ranks=1)
        tokens += batch.tokens.size
    return tokens


def _read_flat(flat: np.ndarray, num_batches: int) -> int:
    """Reads inputs and targets as int64, like a batch's, without any lookup."""
    size = BATCH_SIZE * SEQ_LEN
    for number in range(num_batches):
        rows = flat[number * size : (number + 1) * size].astype(np.int64)
        np.roll(rows, 1)
    return num_batches * size


def _streamed(tars: list[str]) -> Iterator[np.ndarray]:
    """Yields documents from plain WebDataset, tar after tar."""
    import webdataset

    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    return (document for (document,) in dataset.decode().to_tuple("npy"))


def _batched(documents: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields inputs and targets [sequences, seq_len] of concatenated documents."""
    size, waiting, num_waiting = BATCH_SIZE * SEQ_LEN + 1, list[np.ndarray](), 0
    for document in documents:
        waiting.append(document)
        num_waiting += len(document)
        while num_waiting >= size:
            joined = np.concatenate(waiting)
            rows = joined[:size].astype(np.int64)
            yield rows[:-1].reshape(-1, SEQ_LEN), rows[1:].reshape(-1, SEQ_LEN)
            waiting, num_waiting = [joined[size - 1 :]], num_waiting - size + 1


def _torchdata(tars: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the same from a graph of torchdata's nodes, with state, prefetched by a thread."""
    from torchdata.nodes import IterableWrapper, Loader, Prefetcher

    graph = Prefetcher(IterableWrapper(_batched(_streamed(tars))), prefetch_factor=2)
    return iter(Loader(graph))


def _consume(batches: Iterator[tuple[np.ndarray, np.ndarray]], num_batches: int) -> int:
    return sum(tokens.size for _, (tokens, _) in zip(range(num_batches), batches, strict=False))


def _random_shards(folder: Path, *, mean_tokens: int, num_tokens: int) -> ShardFolder:
    """Builds shards of random bytes in documents whose lengths are log-normal, like web pages'."""
    random = np.random.default_rng(0)
    corpus = folder.with_suffix(".jsonl")
    lengths = random.lognormal(sigma=1.0, size=int(num_tokens / mean_tokens))
    lengths = np.maximum(1, lengths / lengths.mean() * mean_tokens).astype(int)
    with corpus.open("w") as file:
        for number, length in enumerate(lengths.tolist()):
            letters = random.integers(97, 123, size=length, dtype=np.uint8).tobytes().decode()
            file.write(json.dumps({"text": f"{number} {letters}"}) + "\n")
    settings = BuildSettings(
        corpus=str(corpus), name="random", tokenizer="bytes", to=str(folder), validation_fraction=0
    )
    return build_shards(settings, progress=False)


def _python_sources(path: Path, *, num_bytes: int) -> tuple[Path, int]:
    """Writes installed Python sources as JSON lines; returns the path and the bytes of text."""
    written = 0
    with path.open("w") as file:
        for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
            for source in sorted(Path(root).rglob("*.py")):
                try:
                    text = source.read_text("utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                if written >= num_bytes:
                    return path, written
    return path, written


if __name__ == "__main__":
    ignore_broken_pipes()
    main()
