"""Who sees a mistake: `moetrain verify` on a tiny model, or a test, both on a copy of the code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

# Everything that a mistake could be in is switched on, and all is as small as it can be.
SETTINGS = (
    "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.head_dim=16", "model.ffn_hidden_dim=32", "model.num_experts=4", "model.vocab_size=257",
    "model.router.bias_update_rate=0.01", "model.router.jitter_noise=0.1",
    "model.router.load_balance_loss_weight=0.1", "model.router.z_loss_weight=0.01",
    "model.head_z_loss_weight=0.01", "model.logit_soft_cap=5",
    "data.mask_documents=true", "train.global_batch_size=4", "train.seq_len=32",
    "schedule.warmup_steps=10", "verify.num_ranks=2", "verify.format=json", "observe.progress=off",
)  # fmt: skip


def ask_verify(code: Path, *overrides: str, folder: Path) -> dict[str, Any]:
    """Returns what verify prints as JSON, run on the code in a folder."""
    said = _run(code, "-m", "moetrain.verify", *SETTINGS, *overrides, cwd=folder, timeout=300)
    if said.returncode not in (0, 1) or not said.stdout.startswith("{"):
        raise RuntimeError(f"verify ended with {said.returncode}: {said.stdout}{said.stderr}")
    found: dict[str, Any] = json.loads(said.stdout)
    return found


def what_it_sees(found: dict[str, Any]) -> str:
    """Returns pass and columns in which verify sees a mistake; empty if it passes."""
    seen: dict[str, list[str]] = {}
    for part in found["passes"]:
        for layout in part["layouts"]:
            for failure in layout["failures"]:
                columns = seen.setdefault(part["name"], [])
                column = failure.split(":")[0].replace("_", " ")
                if len(column) > 12:
                    column = "error"  # a rank that raised
                if column not in columns:
                    columns.append(column)
    return "; ".join(f"{name}: {', '.join(columns)}" for name, columns in seen.items())


def failing_test(code: Path, *tests: str) -> str | None:
    """Returns the first of some tests that fails on the code in a folder; of a file, its fast ones.

    Raises RuntimeError for a test that isn't there, or where all are skipped.
    """
    named = [test for test in tests if "::" in test]
    for which, chosen in (("", named), ("not slow", [t for t in tests if t not in named])):
        if not chosen:
            continue
        said = _run(
            code, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", which, *chosen,
            cwd=code, timeout=1200,
        )  # fmt: skip
        if said.returncode not in (0, 1) or (said.returncode == 0 and " passed" not in said.stdout):
            raise RuntimeError(f"{chosen} ended with {said.returncode}: {said.stdout}{said.stderr}")
        if said.returncode == 1:
            found = re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+)", said.stdout, re.MULTILINE)
            return found[0] if found else chosen[0]
    return None


def _run(code: Path, *words: str, cwd: Path, timeout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
