import json
import os
from pathlib import Path

import numpy as np
import pytest

from moetrain.observe import MetricsFile, final_loss, read_metrics


def test_non_finite_values_become_null_and_keys_keep_their_order(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1, "b": float("nan"), "a": float("-inf"), "c": None, "d": 0.1})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "b": null, "a": null, "c": null, "d": 0.1}\n'


def test_numpy_scalars_are_numbers_too(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"step": np.int64(3), "x": np.float32(0.5), "y": np.float64("nan")})
    assert read_metrics(metrics.path) == [{"step": 3, "x": 0.5, "y": None}]


def test_a_record_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train/loss"):
        MetricsFile(tmp_path / "metrics.jsonl").write({"train/loss": 1.0})


def test_a_run_that_goes_on_leaves_the_same_bytes_as_one_never_stopped(tmp_path: Path) -> None:
    whole, stopped = MetricsFile(tmp_path / "whole"), MetricsFile(tmp_path / "stopped")
    records = [{"step": step, "train/loss": 1 / 3**step} for step in range(10)]
    for record in records:
        whole.write(record)
    for record in records[:8]:
        stopped.write(record)
    with stopped.path.open("ab") as file:
        file.write(b'{"step": 8, "train/lo')  # killed while writing
    stopped.rewind(4)
    for record in records[5:]:
        stopped.write(record)
    assert stopped.path.read_bytes() == whole.path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["stopped", "whole"]


def test_rewind_keeps_the_bytes_it_keeps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,  "x":1e-3}\n{"step": 2}\n{"step": 3}')
    MetricsFile(path).rewind(1)
    assert path.read_bytes() == b'{"step":1,  "x":1e-3}\n'
    MetricsFile(path).rewind(-1)
    assert path.read_bytes() == b""
    MetricsFile(tmp_path / "none").rewind(5)
    assert not (tmp_path / "none").exists()


def test_a_torn_last_line_is_not_read_and_doesn_t_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tr')
    assert read_metrics(path) == [{"step": 1}]
    MetricsFile(path).write({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    assert read_metrics(tmp_path / "none") == []


def test_a_full_disk_is_told_with_the_file_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:5]))
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        metrics.write({"step": 2})
    assert [json.loads(line) for line in metrics.path.read_text().splitlines()] == [{"step": 1}]


def test_the_final_loss_is_a_mean_over_the_tokens_of_the_last_tenth_of_the_steps() -> None:
    records = [
        {"step": step, "train/tokens": tokens, "train/cross_entropy": loss}
        for step, tokens, loss in (
            (80, 800, 9.0),
            (90, 900, 5.0),
            (95, 1000, 2.0),
            (100, 1300, 1.0),
        )
    ]
    assert final_loss(records) == pytest.approx((2.0 * 100 + 1.0 * 300) / 400)
    assert final_loss(records[:3]) == pytest.approx((5.0 + 2.0) / 2)
    assert final_loss(records[:1]) == 9.0, "the only one covers more than the last tenth"
    skipped = {"step": 110, "train/tokens": 1400, "train/cross_entropy": None}
    assert final_loss([*records, skipped]) == final_loss(records)
    assert final_loss([skipped, {"step": 120}]) is None
