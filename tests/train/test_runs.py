"""Whole small runs on real ranks: resume, other layouts, skipped steps, bad checkpoints."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moetrain.checkpoint.folders import candidates
from moetrain.checkpoint.manifest import read_manifest
from moetrain.checks import ConfigError
from moetrain.export import ExportSettings, export
from moetrain.model import active_parameters
from moetrain.report import render_report
from moetrain.settings import Resolved
from moetrain.settings.validation import validated
from moetrain.train import loop
from moetrain.train.control import Outcome
from moetrain.train.prepare import prepare
from moetrain.train.resume import require_same_model
from tests.support.huggingface_folders import (
    assert_bitwise_equal,
    imported,
    loaded,
    tensors_in,
)
from tests.support.ranks import replace_in_rank, run_ranks
from tests.support.runs import (
    Changes,
    events_of,
    metrics_of,
    tiny_config,
    train_as_rank,
    write_shards,
)
from tests.torture.content import read_plainly


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


def run(
    folder: Path, shards: Path, *, world: int = 2, stop_at: int | None = None, attempt: int = 1,
    **changes: Any,
) -> Outcome:  # fmt: skip
    config = tiny_config(folder, shards=shards, num_workers=world, **changes)
    return run_ranks(train_as_rank, world, config, stop_at, attempt)[0]


def test_a_run_learns_logs_and_saves(tmp_path: Path, shards: Path) -> None:
    outcome = run(tmp_path, shards, train__num_steps=40, train__validate_every_steps=20)
    assert outcome.finished
    records = metrics_of(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 41))
    assert records[-1]["train/cross_entropy"] < 0.6 * records[0]["train/cross_entropy"]
    assert records[-1]["train/tokens"] == 40 * 8 * 32
    last = records[-1]
    loads = np.array(last["router/expert_load"])
    assert loads.shape == (2, 4)
    assert loads.sum(1) == pytest.approx(1.0)
    bits = last["validation/corpus/bits_per_byte"]
    assert bits == pytest.approx(last["validation/loss"] / np.log(2), rel=0.01)
    assert [f.name for f in candidates(tmp_path / "runs/tiny/checkpoints")] == [
        "step_00000040", "step_00000039", "step_00000036",
    ]  # fmt: skip


@pytest.mark.trap(23)
@pytest.mark.parametrize("stop_at", [3, 5])  # at a checkpoint, and between two
@pytest.mark.parametrize("async_save", [False, True])
def test_stopped_and_gone_on_equals_never_stopped_bit_for_bit(
    tmp_path: Path, shards: Path, stop_at: int, async_save: bool
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, shards)
    outcome = run(parts, shards, stop_at=stop_at, checkpoint__async_save=async_save)
    assert (outcome.finished, outcome.step) == (False, stop_at)
    assert run(parts, shards, attempt=2, checkpoint__async_save=async_save).finished
    assert metrics_of(parts) == metrics_of(whole)
    assert_same_tensors(parts, whole)


DEEPSEEK: Changes = {
    "model__num_layers": 3, "model__num_dense_layers": 1, "model__dense_ffn_hidden_dim": 48,
    "model__num_shared_experts": 1, "model__router__score_function": "sigmoid",
    "model__router__num_groups": 2, "model__router__load_balance_scope": "sequence",
    "model__router__jitter_noise": 0.2,
}  # fmt: skip


def test_jitter_resumes_bit_for_bit_and_is_the_same_in_every_layout(
    tmp_path: Path, shards: Path
) -> None:
    whole, parts, moved = (tmp_path / name for name in ("whole", "parts", "moved"))
    sgd: Changes = {"optim__name": "sgd", "optim__lr": 0.1, "model__router__bias_update_rate": 0.0}
    run(whole, shards, **DEEPSEEK, **sgd)
    run(parts, shards, stop_at=5, **DEEPSEEK, **sgd)
    assert run(parts, shards, attempt=2, **DEEPSEEK, **sgd).finished
    assert metrics_of(parts) == metrics_of(whole)
    assert_same_tensors(parts, whole)
    assert np.shape(metrics_of(whole)[0]["router/expert_load"]) == (2, 4), "of the MoE layers"

    other: Changes = {"parallel__expert_degree": 2, "parallel__recompute": "full"}
    run(moved, shards, world=4, train__micro_batch_size=1, **DEEPSEEK, **sgd, **other)
    for ours, expected in zip(metrics_of(moved), metrics_of(whole), strict=True):
        assert ours["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
        assert ours["router/load_balance_loss"] == pytest.approx(
            expected["router/load_balance_loss"], rel=1e-5
        )

    still = tmp_path / "still"
    run(still, shards, **DEEPSEEK | {"model__router__jitter_noise": 0.0}, **sgd)
    pairs = zip(metrics_of(still), metrics_of(whole), strict=True)
    assert any(a["train/loss"] != b["train/loss"] for a, b in pairs), "the noise had an effect"


def test_forced_balance_is_even_and_leaves_a_warning(tmp_path: Path, shards: Path) -> None:
    run(tmp_path, shards, world=1, train__num_steps=2, model__router__force_balance=True)
    assert [r["router/max_violation"] for r in metrics_of(tmp_path)] == [0.0, 0.0]
    (warning,) = [e for e in events_of(tmp_path) if e["event"] == "warning"]
    assert "force_balance" in warning["reason"]


def test_a_padded_vocabulary_trains_and_comes_back_from_hugging_face_as_it_was(
    tmp_path: Path, shards: Path
) -> None:
    """The ids added are in no text: they win nothing, and the softmax learns to leave them out."""
    padded = {"model__pad_vocab_to_multiple_of": 64, "train__num_steps": 24}
    config = tiny_config(tmp_path, shards=shards, **padded)
    assert config.model.vocab_size == 320
    assert active_parameters(config.model) - active_parameters(
        tiny_config(tmp_path, shards=shards).model
    ) == 2 * 63 * config.model.dim  # fmt: skip
    told = list(prepare(config, config.data, progress=False).lines())
    assert "vocabulary 320: 257 ids of bytes, and 63 that are in no text" in told
    run(tmp_path, shards, world=1, stop_at=12, **padded)
    run(tmp_path, shards, world=1, attempt=2, **padded)
    first, last = metrics_of(tmp_path)[0], metrics_of(tmp_path)[-1]
    assert last["train/cross_entropy"] < 0.8 * first["train/cross_entropy"]
    checkpoint = tmp_path / "runs/tiny/checkpoints/step_00000024"
    model = loaded(checkpoint, config.model)
    assert model.head.weight.shape == (320, 32)
    text = torch.frombuffer(bytearray(b"def function_1(x):\n    return x"), dtype=torch.uint8)
    with torch.no_grad():
        probabilities = model(text.long()[None]).float().softmax(-1)
    # By chance they would have 63 / 320 of it.
    assert probabilities[..., 257:].sum(-1).mean() < 0.5 * 63 / 320
    assert probabilities.argmax(-1).max() < 257
    exported, again = tmp_path / "hf", tmp_path / "again"
    settings = ExportSettings(run=str(tmp_path / "runs/tiny"), to=str(exported))
    settings = dataclasses.replace(settings, drop_router_bias=True)
    assert export(settings) == 0
    back = validated(read_manifest(imported(exported, again)).config, Resolved)
    assert back.model.vocab_size == 320
    assert export(ExportSettings(run=str(again), to=str(tmp_path / "second"))) == 0
    assert_bitwise_equal(tensors_in(tmp_path / "second"), tensors_in(exported))
    # The padded size is what a run has: however it is written, the run resumes.
    manifest = read_manifest(checkpoint)
    require_same_model(tiny_config(tmp_path, shards=shards, model__vocab_size=320), manifest)
    with pytest.raises(ConfigError, match=r"model.vocab_size=257"):
        require_same_model(tiny_config(tmp_path, shards=shards), manifest)


def test_a_vocabulary_that_is_too_small_for_the_text_is_refused(
    tmp_path: Path, shards: Path
) -> None:
    config = tiny_config(tmp_path, shards=shards, model__vocab_size=256)
    with pytest.raises(ConfigError, match="has 257: use that size or a larger one"):
        prepare(config, config.data, progress=False)
    prepare(
        tiny_config(tmp_path, shards=shards, model__vocab_size=300), config.data, progress=False
    )


def train_with_odd_metrics(config: Resolved, attempt: int) -> Outcome:
    """Trains as a rank whose records have more than numbers in them, with the real W&B."""
    measured = loop.metric_record
    odd = {"odd/text": "fast", "odd/nested": {"a": [1]}, "odd/array": np.ones(2), "odd/call": print}

    def with_odd_ones(*arguments: Any) -> dict[str, Any]:
        return measured(*arguments) | odd | {"odd/tensor": torch.tensor(2.0), "odd/nan": np.nan}

    replace_in_rank(loop, "metric_record", with_odd_ones)
    os.environ["WANDB_MODE"] = "onlin"
    return train_as_rank(config, None, attempt)


def test_metrics_that_are_no_numbers_end_no_run(tmp_path: Path, shards: Path) -> None:
    config = tiny_config(tmp_path, shards=shards, train__num_steps=2, observe__wandb__mode="auto")
    outcome = run_ranks(train_with_odd_metrics, 1, config, 1)[0]
    assert outcome.finished
    assert outcome.last["odd/tensor"] == 2.0
    assert not {"odd/text", "odd/call"} & outcome.last.keys()
    first, second = metrics_of(tmp_path)
    assert (first["odd/text"], first["odd/array"], first["odd/nan"]) == ("fast", [1, 1], None)
    assert second["odd/tensor"] == 2.0
    folder = tmp_path / "runs/tiny"
    assert list((folder / "wandb").glob("offline-run-*"))
    told = [event["reason"] for event in events_of(tmp_path) if event["event"] == "wandb"]
    assert any("WANDB_MODE=onlin in the environment means nothing" in reason for reason in told)
    assert render_report(folder).is_file()


def test_a_checkpoint_from_before_a_setting_was_there_is_of_a_model_with_its_default(
    tmp_path: Path, shards: Path
) -> None:
    run(tmp_path, shards, world=1, train__num_steps=2)
    manifest = read_manifest(candidates(tmp_path / "runs/tiny/checkpoints")[0])
    del manifest.config["model"]["num_shared_experts"]
    require_same_model(tiny_config(tmp_path, shards=shards), manifest)
    changed = tiny_config(tmp_path, shards=shards, model__num_shared_experts=1)
    with pytest.raises(ConfigError, match=r"model\.num_shared_experts=1"):
        require_same_model(changed, manifest)


def test_a_finished_run_trains_on_as_if_it_had_not_finished(tmp_path: Path, shards: Path) -> None:
    """Between the two stands a validation, whose forward pass has no backward one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    constant: Changes = {"schedule__name": "constant"}
    run(whole, shards, train__validate_every_steps=4, **constant)
    assert run(parts, shards, train__num_steps=4, **constant).finished
    assert run(parts, shards, attempt=2, train__validate_every_steps=4, **constant).finished
    assert metrics_of(parts) == metrics_of(whole)
    assert_same_tensors(parts, whole)


def test_killed_between_checkpoints_metrics_are_rewound(tmp_path: Path, shards: Path) -> None:
    """As if killed at step 8 with nothing but the checkpoint of step 6 on disk."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, shards)
    run(killed, shards)
    checkpoints = killed / "runs/tiny/checkpoints"
    shutil.rmtree(checkpoints / "step_00000008")
    metrics = killed / "runs/tiny/metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-25])  # a torn last line
    assert run(killed, shards, attempt=2).finished
    assert metrics_of(killed) == metrics_of(whole)
    assert_same_tensors(killed, whole)


@pytest.mark.trap(11)
@pytest.mark.parametrize(
    ("world", "degrees"),
    [
        (1, {}),
        (4, {"parallel__expert_degree": 4}),
        (4, {"parallel__expert_degree": 2, "parallel__data_replicate_degree": 2}),
    ],
)
def test_going_on_in_another_layout_keeps_the_curve(
    tmp_path: Path, shards: Path, world: int, degrees: dict[str, Any]
) -> None:
    """SGD: the same tokens, and the same losses up to rounding, whatever the layout."""
    sgd: Changes = {"optim__name": "sgd", "optim__lr": 0.1, "model__router__bias_update_rate": 0.0}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run(whole, shards, **sgd)
    run(moved, shards, stop_at=4, **sgd)
    assert run(moved, shards, world=world, attempt=2, **sgd, **degrees).finished
    for ours, expected in zip(metrics_of(moved), metrics_of(whole), strict=True):
        assert ours["train/tokens"] == expected["train/tokens"]
        assert ours["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)


def load_as_rank(config: Resolved) -> dict[str, np.ndarray]:
    """Restores a run as a rank of any layout; returns every checkpointed tensor, gathered."""
    from moetrain.train import rank, state
    from moetrain.train.control import Outcome

    restored: dict[str, np.ndarray] = {}

    def gather(trainer: Any) -> Outcome:
        for name, tensor in state.checkpoint_tensors(trainer.model, trainer.optimizer).items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            restored[name] = full.detach().clone().numpy()
        return Outcome(finished=False, step=0, last={})

    replace_in_rank(rank, "train", gather)
    train_as_rank(config, None, 2)
    return restored


@pytest.mark.trap(11)
def test_weights_and_optimizer_state_are_equal_in_every_layout(
    tmp_path: Path, shards: Path
) -> None:
    run(tmp_path, shards, stop_at=4)
    saved = load(candidates(tmp_path / "runs/tiny/checkpoints")[0])
    assert sum(name.endswith("exp_avg_sq") for name in saved) > 20
    layouts: list[tuple[int, Changes]] = [
        (1, {}),
        (4, {"parallel__expert_degree": 4}),
        (4, {"parallel__expert_degree": 2, "parallel__data_replicate_degree": 2}),
    ]
    for world, degrees in layouts:
        config = tiny_config(tmp_path, shards=shards, num_workers=world, **degrees)
        for restored in run_ranks(load_as_rank, world, config):
            assert restored.keys() == saved.keys()
            for name, tensor in saved.items():
                np.testing.assert_array_equal(restored[name], tensor.numpy(), err_msg=name)


def train_in_own_folder(config: Any, folder: str) -> None:
    """Trains as a rank that sees another run folder than the other ranks do."""
    import dataclasses

    import torch.distributed as dist

    own = dataclasses.replace(config.run, dir=f"{folder}/host_{dist.get_rank()}")
    train_as_rank(dataclasses.replace(config, run=own), None, 1)


def test_a_run_folder_that_is_not_shared_is_refused_at_the_start(
    tmp_path: Path, shards: Path
) -> None:
    config = tiny_config(tmp_path, shards=shards, num_workers=2)
    with pytest.raises(AssertionError, match=r"rank 1 does not see .* all machines share"):
        run_ranks(train_in_own_folder, 2, config, str(tmp_path))


@pytest.mark.trap(22)
def test_a_corrupted_checkpoint_is_passed_over_with_an_event(tmp_path: Path, shards: Path) -> None:
    whole, corrupted = tmp_path / "whole", tmp_path / "corrupted"
    run(whole, shards)
    run(corrupted, shards)
    newest = corrupted / "runs/tiny/checkpoints/step_00000008"
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run(corrupted, shards, attempt=2)
    (rejected,) = [e for e in events_of(corrupted) if e["event"] == "checkpoint_rejected"]
    assert shard.name in rejected["reason"]
    assert [e["step"] for e in events_of(corrupted) if e["event"] == "resume"] == [6]
    assert metrics_of(corrupted) == metrics_of(whole)


def test_a_checkpoint_of_another_model_is_refused_and_left_alone(
    tmp_path: Path, shards: Path
) -> None:
    run(tmp_path, shards)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/tiny/checkpoints").rglob("*")}
    with pytest.raises(AssertionError, match=r"model\.ffn_hidden_dim=64.*another model"):
        run(tmp_path, shards, attempt=2, model__ffn_hidden_dim=64)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/tiny/checkpoints").rglob("*")}
    assert after == before


def spoil_gradients(config: Any, steps: list[int]) -> Any:
    """Trains as a rank; on rank 1 the loss of the given steps is not a number."""
    import torch.distributed as dist

    from moetrain.train import loop
    from moetrain.train.objective import Pretraining

    class Spoiled(Pretraining):
        def begin(self, *arguments: Any, **named: Any) -> Any:
            loss = super().begin(*arguments, **named)
            return lambda output, batch: loss(output, batch) * float("nan")

    take_step = loop.take_step

    def spoiled(trainer: Any, stopwatch: Any) -> Any:
        if trainer.state.step in steps and dist.get_rank() == 1:
            trainer = dataclasses.replace(trainer, objective=Spoiled())
        return take_step(trainer, stopwatch)

    loop.take_step = spoiled
    return train_as_rank(config, None, 1)


@pytest.mark.trap(20)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    tmp_path: Path, shards: Path
) -> None:
    config = tiny_config(tmp_path, shards=shards, num_workers=2)
    assert run_ranks(spoil_gradients, 2, config, [3])[0].finished
    records = metrics_of(tmp_path)
    assert [r["train/skipped_steps"] for r in records] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [r["step"] for r in records if r["train/loss"] is None] == [4]
    assert [e["step"] for e in events_of(tmp_path) if e["event"] == "step_skipped"] == [4]


@pytest.mark.trap(20)
def test_too_many_skipped_steps_stop_the_run_and_keep_the_last_checkpoint(
    tmp_path: Path, shards: Path
) -> None:
    config = tiny_config(tmp_path, shards=shards, num_workers=2, train__max_skipped_steps=3)
    with pytest.raises(AssertionError, match=r"3 steps in a row.*lower optim\.lr"):
        run_ranks(spoil_gradients, 2, config, [4, 5, 6, 7])
    newest = candidates(tmp_path / "runs/tiny/checkpoints")[0]
    assert read_manifest(newest).step <= 6
    assert_all_finite(newest)


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """Compares the newest checkpoints of two runs bit for bit."""
    left, right = (load(candidates(f / "runs/tiny/checkpoints")[0]) for f in (ours, theirs))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_all_finite(folder: Path) -> None:
    for name, tensor in load(folder).items():
        assert tensor.isfinite().all(), name


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Returns a checkpoint's tensors, put together without any of our code."""
    tensors, _ = read_plainly(folder)
    return tensors
