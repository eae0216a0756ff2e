"""Checkpoints: how fast one is saved and loaded, and for how long that blocks training.

`python -m benchmarks.checkpoint` prints one JSON object per line on standard output and a table on
standard error. The model of a preset is sharded over gloo ranks, with AdamW's state. It is saved
and loaded in turn by moetrain (hashed, verified, committed), by plain torch.distributed.checkpoint
(no hash, no manifest, no commit), and, as the limit, by writing or reading as many bytes to or from
one file per rank. All of them sync to disk. For an asynchronous save, the time is that of the
`save` call; the previous save has ended before it.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.timing import machine, print_record, print_table, spread, time_in_turn
from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain.checkpoint.store import CheckpointStore
from moetrain.config import resolve
from moetrain.optim import allocate_state
from moetrain.settings import CheckpointSettings, Config, Resolved
from moetrain.settings.validation import validated
from moetrain.train.build import build_model
from moetrain.train.state import checkpoint_tensors
from moetrain.verify.ranks import run_ranks

CPU = torch.device("cpu")
SAVING = ("limit", "moetrain", "torch.distributed.checkpoint", "moetrain, in the background")
LOADING = ("limit", "moetrain", "torch.distributed.checkpoint")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8, help="of about 3 M parameters each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", help="where to write; a temporary folder unless given")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        config = _config(folder, num_layers=options.layers, num_ranks=options.ranks)
        of_ranks = run_ranks(
            _measure_as_rank,
            (config, folder, options.rounds),
            num_ranks=options.ranks,
            timeout_seconds=1800,
        )
    case = {
        "bytes": of_ranks[0]["bytes"],
        "ranks": options.ranks,
        "machine": machine(CPU),
        "torch": torch.__version__,
    }
    size = of_ranks[0]["bytes"] / 1e9
    for what, names in (("save", SAVING), ("load", LOADING)):
        # A round takes as long as its slowest rank.
        slowest = {
            name: [max(all_) for all_ in zip(*(r[what][name] for r in of_ranks), strict=True)]
            for name in names
        }
        limit = median(slowest["limit"])
        plain = median(slowest["torch.distributed.checkpoint"])
        for name in names:
            middle = median(slowest[name])
            record: dict[str, Any] = {
                "benchmark": "checkpoint",
                "case": case | {"what": what},
                "implementation": name,
                "rounds": options.rounds,
                "seconds": spread(slowest[name]),
                "ratio_to_limit": limit / middle,
                "ratio_to_plain": plain / middle,
            }
            if name.endswith("background"):
                record["share_of_blocking"] = middle / median(slowest["moetrain"])
            print_record(record)
        rows = [
            [
                name,
                f"{median(slowest[name]):.3f}",
                f"{size / median(slowest[name]):.2f}",
                f"{plain / median(slowest[name]):.2f}",
            ]
            for name in names
        ]
        title = (
            f"{what}: {size:.2f} GB by {options.ranks} ranks, medians of {options.rounds} rounds"
        )
        print_table(title, ["", "seconds", "GB/s", "times as fast as plain"], rows)


def _config(folder: str, *, num_layers: int, num_ranks: int) -> Resolved:
    """Returns a configuration whose model has 16 M parameters besides those of its layers."""
    values = {
        "model": {
            "dim": 256, "num_layers": num_layers, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
            "ffn_hidden_dim": 512, "num_experts": 8, "top_k": 2, "vocab_size": 32000,
            "max_seq_len": 1024, "rope_theta": 1e4,
        },
        "train": {"num_steps": 1, "global_batch_size": num_ranks, "seq_len": 16},
        "schedule": {"warmup_steps": 0},
        "run": {"name": "benchmark", "dir": folder, "device": "cpu"},
    }  # fmt: skip
    return resolve(validated(values, Config), num_workers=num_ranks, now=datetime.now())


def _measure_as_rank(job: tuple[Resolved, str, int], _: Any) -> dict[str, Any]:
    """Returns, on one of the ranks, the seconds of each round of each way to save and to load."""
    config, folder, rounds = job
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, optimizer, *_ = build_model(config, device=CPU, timeout_seconds=600)
    allocate_state(optimizer)
    tensors = checkpoint_tensors(model, optimizer)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    share = torch.ones(size // ranks // 4).view(torch.uint8).numpy()
    plain, bare = Path(folder, "plain"), Path(folder, f"bare_{rank}")
    stores = {
        name: CheckpointStore(
            Path(folder, name),
            CheckpointSettings(keep_last=2, async_save=name == "background"),
            attempt=1,
            config={},
            mesh={},
            timeout=timedelta(seconds=600),
            event=lambda *_, **__: None,
        )
        for name in ("blocking", "background")
    }
    step = 0

    def save(name: str) -> None:
        nonlocal step
        step += 1
        stores[name].save(tensors, step=step, state={})

    def write_bare() -> None:
        with open(bare, "wb") as file:
            file.write(share.data)
            file.flush()
            os.fsync(file.fileno())
        dist.barrier()

    def read_bare() -> None:
        with open(bare, "rb", buffering=0) as file:
            file.readinto(share.data)
        dist.barrier()

    def load() -> None:
        stores["blocking"].load_newest(lambda _: tensors, same_model=lambda _: None)

    def make_ready() -> None:
        for store in stores.values():
            store.wait()
        dist.barrier()
        if rank == 0:
            shutil.rmtree(plain, ignore_errors=True)
        dist.barrier()

    saved = time_in_turn(
        {
            "limit": write_bare,
            "moetrain": lambda: save("blocking"),
            "torch.distributed.checkpoint": lambda: dcp.save(
                tensors, storage_writer=dcp.FileSystemWriter(plain, sync_files=True)
            ),
            "moetrain, in the background": lambda: save("background"),
        },
        rounds=rounds,
        warmup=2,
        device=CPU,
        prepare=make_ready,
    )
    make_ready()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(plain, sync_files=True))
    loaded = time_in_turn(
        {
            "limit": read_bare,
            "moetrain": load,
            "torch.distributed.checkpoint": lambda: dcp.load(
                tensors, storage_reader=dcp.FileSystemReader(plain)
            ),
        },
        rounds=rounds,
        warmup=1,
        device=CPU,
        prepare=dist.barrier,
    )
    for store in stores.values():
        store.close(timeout_seconds=60)
    return {"bytes": size, "save": saved, "load": loaded}


if __name__ == "__main__":
    ignore_broken_pipes()
    main()
