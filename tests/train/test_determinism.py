"""`train.deterministic`: what it sets, what it refuses, and that a CPU run's bits stay."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.checks import ConfigError
from moetrain.observe import read_metrics
from moetrain.train import rank_environment
from moetrain.train.control import RankPlace
from moetrain.train.rank_environment import set_environment
from tests.support.ranks import run_ranks
from tests.support.runs import TIMING, tiny_config, train_as_rank, write_shards


def trained(folder: Path, shards: Path, deterministic: bool) -> bool:
    """Trains a tiny run; returns whether torch was asked for deterministic algorithms."""
    config = tiny_config(
        folder, shards=shards, num_workers=2, parallel__recompute="full",
        data__mask_documents=True, model__router__jitter_noise=0.1, model__num_shared_experts=1,
        train__micro_batch_size=2, train__deterministic=deterministic,
    )  # fmt: skip
    train_as_rank(config, None, 1)
    return torch.are_deterministic_algorithms_enabled()


def test_on_a_cpu_it_changes_no_bit_and_every_operator_has_a_deterministic_form(
    tmp_path: Path,
) -> None:
    shards, found = write_shards(tmp_path), {}
    for deterministic in (False, True):
        folder = tmp_path / str(deterministic)
        assert run_ranks(trained, 2, folder, shards, deterministic) == [deterministic] * 2
        found[deterministic] = [
            {name: value for name, value in record.items() if not name.startswith(TIMING)}
            for record in read_metrics(folder / "runs/tiny/metrics.jsonl")
        ]
    assert len(found[True]) == 8
    assert found[True] == found[False]


def test_a_ranks_environment_fixes_what_cublas_and_nccl_choose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rank_environment, "rank_device", lambda _: torch.device("cuda"))
    place = RankPlace(rank=0, world_size=1, rendezvous="env://", attempt=1)
    for deterministic in (False, True):
        config = tiny_config(tmp_path, shards="shards", train__deterministic=deterministic)
        environ = {"NCCL_PROTO": "LL128"}
        set_environment(config, place, environ=environ)
        assert ("CUBLAS_WORKSPACE_CONFIG" in environ) == deterministic
        assert environ.get("NCCL_ALGO") == ("Ring" if deterministic else None)
        assert environ["NCCL_PROTO"] == "LL128", "the user's own"


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"model__experts": {"backend": "megablocks"}}, "model.experts.backend=megablocks"),
        ({"model__attention_kernel": "cudnn"}, "model.attention_kernel=cudnn"),
        ({"model__attention_kernel": "flash3"}, "model.attention_kernel=flash3"),
    ],
)
def test_kernels_that_cannot_repeat_themselves_are_refused(
    changes: dict[str, Any], setting: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{setting}.*train.deterministic=true.*use auto"):
        tiny_config(tmp_path, shards="shards", train__deterministic=True, **changes)
    tiny_config(
        tmp_path, shards="shards", train__deterministic=True, model__attention_kernel="flash"
    )
