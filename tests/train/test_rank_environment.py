"""A rank's environment: complete when torch first reads it, in every way of starting."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.train import rank_environment
from moetrain.train.control import RankPlace, collective_timeout
from moetrain.train.rank_environment import set_environment
from tests.support.runs import tiny_config, write_shards

HANG_TIMEOUT = 50.0
TINY = [
    "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.head_dim=16", "model.ffn_hidden_dim=32", "model.num_experts=4", "train.num_steps=1",
    "schedule.warmup_steps=0", "train.global_batch_size=2", "train.seq_len=32",
    "observe.wandb.mode=disabled",
    "run.device=auto", f"launch.hang_timeout_seconds={HANG_TIMEOUT}", "extensions=[recorder]",
    "+cluster.env.GLOO_SOCKET_IFNAME=lo", "+cluster.env.TORCH_NCCL_NAN_CHECK=1",
]  # fmt: skip

# A module of the user's, which every rank imports before it joins the others. With GPUS it lets the
# process see that many, and ends it where the first of them would be used.
RECORDER = """
import json, os
import torch
import torch.distributed as dist

def record(**known):
    known["environ"] = dict(os.environ)
    with open(f"{os.environ['FI_RECORDS']}/{os.getpid()}.json", "w") as file:
        json.dump(known, file)

make = dist.init_process_group

def made(*given, **known):
    record(timeout=known["timeout"].total_seconds())
    return make(*given, **known)

dist.init_process_group = made

def used(device):
    record(device=str(device), allocator=torch._C._accelerator_getAllocatorSettings())
    os._exit(0)

if gpus := int(os.environ.get("FI_GPUS", "0")):
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: gpus
    torch.cuda.set_device = used
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


def started(
    folder: Path, shards: Path, *overrides: str, ranks: list[dict[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    """Starts the training command once for each rank's variables, and waits for all."""
    (folder / "recorder.py").write_text(RECORDER)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RAY_"))}
    shared = kept | {
        "FI_RECORDS": str(folder), "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "moetrain", *TINY, f"data.dir={shards}", *overrides],
            cwd=folder, env=shared | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for own in ranks
    ]  # fmt: skip
    try:
        return [
            subprocess.CompletedProcess(p.args, p.returncode, out, err)
            for p in processes
            for out, err in [p.communicate(timeout=120)]
        ]
    finally:
        for process in processes:
            process.kill()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]


def torchrun(size: int, *, local_rank: bool = True) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        place | {"RANK": str(rank)} | ({"LOCAL_RANK": str(rank)} if local_rank else {})
        for rank in range(size)
    ]


def srun(size: int) -> list[dict[str, str]]:
    return [
        {
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(size), "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": str(size),
        }
        for rank in range(size)
    ]  # fmt: skip


WAYS: dict[str, tuple[list[str], list[dict[str, str]]]] = {
    "inline": (["launch.mode=inline"], [{}]),
    "torchrun": ([], torchrun(2)),
    "srun": (["launch.address=local"], srun(2)),
    "ray": (["launch.mode=ray", "launch.address=local", "launch.num_workers=2"], [{}]),
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("way", [*list(WAYS)[:3], pytest.param("ray", marks=pytest.mark.slow)])
def test_the_groups_are_made_in_the_clusters_environment_and_with_one_timeout(
    tmp_path: Path, shards: Path, way: str
) -> None:
    overrides, ranks = WAYS[way]
    for done in started(tmp_path, shards, *overrides, ranks=ranks):
        assert done.returncode == 0, done.stderr
    found = records(tmp_path)
    assert len(found) == (1 if way == "inline" else 2)
    for record in found:
        assert record["environ"]["GLOO_SOCKET_IFNAME"] == "lo"
        assert record["environ"]["TORCH_NCCL_NAN_CHECK"] == "1"
        assert "NCCL_LAUNCH_ORDER_IMPLICIT" not in record["environ"], "without CUDA"
        # The one of the meshes, too: build_trainer gets it from the same function.
        assert record["timeout"] == collective_timeout(HANG_TIMEOUT)
        if way == "ray":
            assert record["environ"]["NCCL_SOCKET_IFNAME"] == "=lo"


@pytest.mark.parametrize(
    ("way", "gpus", "device"), [("srun", 8, "cuda:1"), ("torchrun", 1, "cuda:0")]
)
def test_with_cuda_all_is_set_before_the_first_use_of_the_device(
    tmp_path: Path, shards: Path, way: str, gpus: int, device: str
) -> None:
    """The second rank alone: the first one, which would wait for it, looks at the data before."""
    overrides, ranks = WAYS[way]
    [done] = started(
        tmp_path, shards, *overrides, "run.name=named", ranks=[ranks[1] | {"FI_GPUS": str(gpus)}]
    )
    assert done.returncode == 0, done.stderr
    [record] = records(tmp_path)
    assert record["device"] == device
    assert record["allocator"] == "expandable_segments:True", "torch's own word"
    assert record["environ"]["NCCL_LAUNCH_ORDER_IMPLICIT"] == "1"
    assert record["environ"]["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_rank_that_would_share_its_gpu_is_refused_with_exit_code_2(
    tmp_path: Path, shards: Path
) -> None:
    ranks = torchrun(2, local_rank=False)
    [done] = started(tmp_path, shards, ranks=[ranks[1] | {"FI_GPUS": "2"}])
    assert done.returncode == 2, done.stderr
    assert "LOCAL_RANK=(missing): each of 2 ranks sees 2 GPUs" in done.stderr


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "PYTORCH_ALLOC_CONF", "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "PYTORCH_ALLOC_CONF", None),
        ({"NCCL_LAUNCH_ORDER_IMPLICIT": "0"}, "NCCL_LAUNCH_ORDER_IMPLICIT", "0"),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "9"}, "TORCH_FR_BUFFER_SIZE", None),
        ({}, "PYTORCH_ALLOC_CONF", "expandable_segments:True"),
    ],
)
def test_what_the_user_has_set_under_any_name_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    given: dict[str, str], name: str, value: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(rank_environment, "rank_device", lambda _: torch.device("cuda"))
    config = tiny_config(tmp_path, shards="shards", cluster__env={"NCCL_NET": "IB"})
    environ = dict(given)
    place = RankPlace(rank=0, world_size=1, rendezvous="env://", attempt=0)
    set_environment(config, place, environ=environ)
    assert environ.get(name) == value
    assert environ["NCCL_NET"] == "IB"
    assert "TORCH_FR_DUMP_TEMP_FILE" not in environ, "before the run has a name"
    place = RankPlace(rank=0, world_size=1, rendezvous="env://", attempt=3)
    set_environment(config, place, environ=environ)
    dumps = tmp_path / "runs/tiny/logs/collectives_3_rank_"
    assert environ["TORCH_FR_DUMP_TEMP_FILE"] == str(dumps)
    assert environ.get(name) == value
