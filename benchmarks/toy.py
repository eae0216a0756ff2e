"""Checks a finished toy run against its targets: `python -m benchmarks.toy runs/toy`.

Prints one JSON object and exits with 1 if a target is missed.
"""

import json
import os
import platform
import sys
from datetime import datetime
from pathlib import Path
from statistics import median

from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain.observe import read_events, read_metrics

MAX_BITS_PER_BYTE = 2.4
MAX_TRAINING_SECONDS = 300.0
MAX_VIOLATION = 1.0


def main() -> int:
    """Returns the exit code."""
    run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/toy")
    records, events = read_metrics(run_dir / "metrics.jsonl"), read_events(run_dir / "events.jsonl")
    last, records = records[-1], [r for r in records if "train/loss" in r]  # not that of step 0
    at = {e["event"]: datetime.fromisoformat(e["time"]) for e in events}
    # From the start of the ranks' processes to the end: building, training, validation, saving.
    seconds = (at["finish"] - at["attempt"]).total_seconds()
    baselines = next(e["baselines"] for e in events if e["event"] == "data")
    figures = {
        "benchmark": "toy",
        "steps": last["step"],
        "bits_per_byte": last["validation/stdlib/bits_per_byte"],
        **baselines,
        "seconds": seconds,
        "tokens_per_second": median(r["perf/tokens_per_second"] for r in records),
        "data_wait_share": median(
            r["perf/data_wait_seconds"] / r["perf/step_seconds"] for r in records
        ),
        "dead_experts": last["router/dead_experts"],
        "max_violation": last["router/max_violation"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(figures))
    missed = [
        text
        for text, held in {
            "bits per byte": figures["bits_per_byte"] <= MAX_BITS_PER_BYTE,
            "training time": seconds <= MAX_TRAINING_SECONDS,
            "dead experts": figures["dead_experts"] == 0,
            "balance": figures["max_violation"] < MAX_VIOLATION,
        }.items()
        if not held
    ]
    for text in missed:
        print(f"target missed: {text}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    ignore_broken_pipes()
    raise SystemExit(main())
