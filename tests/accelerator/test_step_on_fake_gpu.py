"""What a step does on a GPU, seen without one: reads that hold the host, copies, collectives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WORLD, LAYERS, MICRO_BATCHES = 8, 2, 2
MODEL: dict[str, Any] = {
    "dim": 256,
    "num_layers": LAYERS,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "ffn_hidden_dim": 512,
    "num_experts": 8,
    "top_k": 2,
    "vocab_size": 512,
    "max_seq_len": 4096,
    "rope_theta": 1e6,
    "experts": {"backend": "grouped_mm"},
}
OWN_BALANCE = {"router": {"load_balance_scope": "micro_batch", "bias_update_rate": 0.001}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "counts ahead": {"model": {"router": {"load_balance_scope": "global_batch"}}},
    "recomputed": {"parallel": {"recompute": "full"}},
    "three rounds, recomputed": {
        "parallel": {"recompute": "full", "exchange": {"num_rounds": 3, "send_once": False}}
    },
    "once a step": {"parallel": {"gather_weights": "step", "reduce_gradients": "step"}},
    "all experts here": {"parallel": {"expert_degree": 1}, "model": {"num_shared_experts": 1}},
    "all experts here, in a loop": {
        "parallel": {"expert_degree": 1, "recompute": "full"},
        "model": {"experts": {"backend": "cpu"}},
    },
    "experts in a loop": {
        "parallel": {"recompute": "full"},
        "model": {"experts": {"backend": "cpu"}},
    },
    "replicas": {"parallel": {"data_replicate_degree": 2, "expert_degree": 4}},
    "documents, float32": {
        "data": {"mask_documents": True},
        "train": {"dtype": "float32"},
        "model": {"experts": {"backend": "cpu"}},  # fake products of groups are bfloat16 alone
    },
}


def configuration(changes: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "data": {"dir": "/nowhere"},
        "model": MODEL | OWN_BALANCE,
        "train": {
            "num_steps": 1000,
            "global_batch_size": WORLD * MICRO_BATCHES,
            "seq_len": 1024,
            "micro_batch_size": 1,
            "dtype": "bfloat16",
        },
        "parallel": {"expert_degree": 4},
        "optim": {"lr": 0.001},
    }
    return {name: part | changes.get(name, {}) for name, part in base.items()}


def rewritten_sources(folder: Path) -> Path:
    """Copies the packages, for torch's extension device: CPU builds can't index CUDA tensors."""
    for package in ("moetrain", "launch", "data_pipeline"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text().replace('"cuda', '"gpu').replace("torch.cuda", "torch.gpu")
            copy = folder / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text.replace("is_cuda", 'device.type == "gpu"'))
    return folder


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Returns what a step of each case did; all of them in one process."""
    sources = rewritten_sources(tmp_path_factory.mktemp("sources"))
    asked = {"world": WORLD, "configs": [configuration(case) for case in CASES.values()]}
    script = Path(__file__).with_name("step_on_fake_gpu.py")
    ran = subprocess.run(
        [sys.executable, script, str(sources), json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": str(sources)},
        cwd=sources,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    return dict(zip(CASES, map(json.loads, ran.stdout.splitlines()), strict=True))


def total(counts: dict[str, int], word: str) -> int:
    return sum(n for name, n in counts.items() if word in name)


@pytest.mark.parametrize("case", CASES)
def test_everything_is_on_the_device_and_nothing_is_left_in_flight(
    case: str, steps: dict[str, Any]
) -> None:
    assert not steps[case]["skipped"]
    assert all(name.startswith("gpu ") for name in steps[case]["devices"])
    assert steps[case]["left in flight"] == []


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_once_for_each_layer_and_pass_and_once_at_the_end(
    case: str, steps: dict[str, Any]
) -> None:
    passes = MICRO_BATCHES * (2 if case == "counts ahead" else 1)
    # A grouped product needs no counts on the host where no token travels.
    waits = 0 if case == "all experts here" else LAYERS * passes
    reads = steps[case]["reads"]
    assert sum(reads.values()) == waits + 1, reads
    assert total(reads, "train/step.py:report") == 1


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_copied_without_holding_the_host(case: str, steps: dict[str, Any]) -> None:
    assert total(steps[case]["copies"], "pinned") == sum(steps[case]["copies"].values()) >= 4


@pytest.mark.parametrize("case", CASES)
def test_an_axis_of_one_rank_takes_no_collective_and_other_axes_one_group_each(
    case: str, steps: dict[str, Any]
) -> None:
    assert total(steps[case]["collectives"], "over 1 ") == 0
    # Beside the world's: the experts' two axes; with replicas, all ranks of a replica are one
    # group in both views, and the shard of an expert is one rank, of which FSDP asks the size.
    expected = [2, 4]
    if CASES[case].get("parallel", {}).get("expert_degree") == 1:
        expected = []
    if case == "replicas":
        expected = [1, 2, 4]
    assert sorted(steps[case]["groups"]) == expected


def test_grouped_queries_stay_grouped_where_a_fused_kernel_takes_them(
    steps: dict[str, Any],
) -> None:
    """In float32 a GPU's fused kernels take none, and the unfused one holds all scores."""
    assert steps["plain"]["attention"] == ["torch.bfloat16 grouped"]
    assert steps["documents, float32"]["attention"] == ["torch.float32 4 of 4"]


def test_weights_travel_once_a_step_where_settings_say_so(steps: dict[str, Any]) -> None:
    modules = 1 + 3 * LAYERS  # the root; blocks, routers and experts
    plain, once = (steps[case]["collectives"] for case in ("plain", "once a step"))
    assert total(plain, "reduce_scatter") == MICRO_BATCHES * modules
    assert total(once, "reduce_scatter") == modules
    counts = MICRO_BATCHES * LAYERS
    assert total(once, "all_gather") == modules + counts
    assert total(plain, "all_gather") > MICRO_BATCHES * modules + counts
