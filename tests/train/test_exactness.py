"""What a checkpoint must keep of its tensors: their dtype, and the same values in any layout."""

from pathlib import Path

import numpy as np
import pytest

from moetrain.checkpoint.folders import candidates
from moetrain.checkpoint.manifest import read_manifest
from tests.support.ranks import run_ranks
from tests.support.runs import Changes, tiny_config, write_shards
from tests.train.test_runs import load, load_as_rank, run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.mark.trap(9)
def test_the_selection_bias_stays_float32_through_a_bfloat16_run_and_its_checkpoint(
    tmp_path: Path, shards: Path
) -> None:
    rate = 1 / 3  # bfloat16 would round it
    changes: Changes = {"train__dtype": "bfloat16", "model__router__bias_update_rate": rate}
    run(tmp_path, shards, stop_at=1, **changes)
    newest = candidates(tmp_path / "runs/tiny/checkpoints")[0]
    biases = {n: e for n, e in read_manifest(newest).tensors.items() if n.endswith("router.bias")}
    assert len(biases) == 2
    assert {entry.dtype for entry in biases.values()} == {"float32"}
    saved = load(newest)
    config = tiny_config(tmp_path, shards=shards, num_workers=2, **changes)
    for restored in run_ranks(load_as_rank, 2, config):
        for name in biases:
            bias = restored[name]
            assert bias.dtype == np.float32
            np.testing.assert_array_equal(bias, saved[name].numpy())
            assert set(np.abs(bias).tolist()) <= {0.0, float(np.float32(rate))}, "not even rounded"
            assert np.abs(bias).max() > 0


@pytest.mark.trap(11)
def test_a_checkpoint_says_the_same_whatever_layout_wrote_it(tmp_path: Path, shards: Path) -> None:
    """Counters, names, shapes and dtypes: nothing in it depends on one rank's sizes."""
    sgd: Changes = {"optim__name": "sgd", "optim__lr": 0.1, "optim__momentum": 0.9}
    layouts: dict[str, tuple[int, Changes]] = {
        "one": (1, {}),
        "spread": (4, {"parallel__expert_degree": 4}),
        "both": (4, {"parallel__expert_degree": 2, "parallel__data_replicate_degree": 2}),
    }
    said, tensors = {}, {}
    for name, (world, degrees) in layouts.items():
        folder = tmp_path / name
        run(folder, shards, world=world, stop_at=3, **sgd, **degrees)
        newest = candidates(folder / "runs/tiny/checkpoints")[0]
        manifest = read_manifest(newest)
        shapes = {n: (t.shape, t.dtype) for n, t in manifest.tensors.items()}
        said[name] = (manifest.step, manifest.state, shapes)
        tensors[name] = load(newest)
    assert said["spread"] == said["one"]
    assert said["both"] == said["one"]
    # By global expert id: row e of every stacked weight and momentum is the same expert's.
    for name in ("spread", "both"):
        for key, tensor in tensors["one"].items():
            ours = tensors[name][key]
            parts = zip(ours, tensor, strict=True) if tensor.ndim == 3 else [(ours, tensor)]
            for part, expected in parts:
                # Three SGD steps of sums over 256 tokens, as in tests/parallel/test_layouts.py.
                assert (part - expected).norm() <= 2e-5 * expected.norm() + 1e-7, key
