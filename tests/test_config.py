"""The configuration: what composes, what resolves, and the errors for mistakes."""

import subprocess
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moetrain.checks import ConfigError
from moetrain.command import register
from moetrain.config import check, refit, resolve
from moetrain.settings import Config
from moetrain.settings.validation import validated
from tests.support.commands import run_module

ROOT = Path(__file__).parents[1]
NOW = datetime(2026, 1, 2, 3, 4, 5)


def moetrain(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_module("moetrain", *arguments, cwd=cwd)


def toy(**changes: Any) -> dict[str, Any]:
    """Returns the plain toy configuration with dotted keys changed."""
    values: dict[str, Any] = {
        "model": yaml.safe_load((ROOT / "conf/model/toy.yaml").read_text()),
        "train": {"num_steps": 600, "global_batch_size": 16, "seq_len": 256},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = values
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return values


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"train__num_stps": 3}, "train.num_stps", "did you mean 'num_steps'"),
        ({"trian": {}}, "trian", "did you mean 'train'"),
        ({"model__router__z_los_weight": 1}, "model.router.z_los_weight", "z_loss_weight"),
        ({"train__num_steps": "many"}, "train.num_steps", "valid integer"),
        ({"train__num_steps": 0}, "train.num_steps", "greater than 0"),
        ({"optim__name": "adam"}, "optim.name", "did you mean 'adamw'"),
        (
            {"schedule__name": "wsd", "schedule__warmup_steps": 481},
            "schedule.warmup_steps",
            "use at most 480",
        ),
        (
            {"schedule__restart_from": 550, "schedule__warmup_steps": 51},
            "schedule.warmup_steps",
            "the 50 steps from schedule.restart_from on",
        ),
        ({"schedule__restart_from": 600}, "schedule.restart_from", "use more steps"),
        ({"optim__restart_from": 600}, "optim.restart_from", "use more steps"),
        ({"model__num_kv_heads": 3}, "model.num_kv_heads", "use one of [1, 2, 4]"),
        ({"model__head_dim": 31}, "model.head_dim", "use 32"),
        ({"model__partial_rotary_factor": 0.01}, "model.partial_rotary_factor", "use 0.0625"),
        ({"model__qk_norm_scope": "head"}, "model.qk_norm_scope", "add model.qk_norm=true"),
        (
            {"model__tie_embeddings": True, "model__init__head_std": 0.1},
            "model.init.head_std",
            "use model.init.embedding_std",
        ),
        ({"model__init__std": 0.0}, "model.init.std", "greater than 0"),
        ({"model__init__residual_scale": "deep"}, "model.init.residual_scale", "'depth'"),
        ({"model__rope_scaling__factor": 4.0}, "model.rope_scaling.factor", "add a type"),
        (
            {"model__rope_scaling__type": "yarn"},
            "model.rope_scaling.original_max_seq_len",
            "such as 1024",
        ),
        (
            {
                "model__rope_scaling__type": "llama3",
                "model__rope_scaling__original_max_seq_len": 32,
                "model__rope_scaling__low_freq_factor": 4.0,
            },
            "model.rope_scaling.high_freq_factor",
            "more than model.rope_scaling.low_freq_factor=4",
        ),
        ({"model__top_k": 9}, "model.top_k", "model.num_experts=8"),
        ({"model__top_k": 1}, "model.router.normalize_gates", "learn nothing"),
        ({"model__router__score_function": "sigmoide"}, "model.router.score_function", "'sigmoid'"),
        ({"model__router__num_groups": 3}, "model.router.num_groups", "use one of [1, 2, 4, 8]"),
        ({"model__router__top_groups": 2}, "model.router.top_groups", "use at most"),
        (
            {"model__router__num_groups": 4, "model__top_k": 3},
            "model.router.top_groups",
            "fewer than model.top_k=3: use at least 2",
        ),
        ({"model__router__jitter_noise": 1.0}, "model.router.jitter_noise", "less than 1"),
        ({"model__num_dense_layers": 1}, "model.dense_ffn_hidden_dim", "such as 512"),
        ({"model__num_dense_layers": 4}, "model.num_dense_layers", "use at most 3"),
        ({"model__dense_ffn_hidden_dim": 64}, "model.dense_ffn_hidden_dim", "use null"),
        (
            {"model__num_experts": 1, "model__top_k": 1, "model__num_shared_experts": 1},
            "model.num_shared_experts",
            "every layer is dense",
        ),
        ({"train__seq_len": 2048}, "train.seq_len", "use at most 1024"),
        (
            {"model__experts__backend": "grouped_mm", "model__ffn_hidden_dim": 900},
            "model.ffn_hidden_dim",
            "use 904, or model.experts.backend=auto",
        ),
        ({"schedule__warmup_steps": 601}, "schedule.warmup_steps", "use at most 600"),
        ({"run__device": "cuda"}, "run.device", "use cpu or auto"),
        ({"run__name": "a/b"}, "run.name", "no slash"),
        ({"checkpoint__keep_last": 1}, "checkpoint.keep_last", "greater than or equal to 2"),
        ({"checkpoint__keep_every": 1200}, "checkpoint.keep_every", "use 1000 or 1500"),
        ({"parallel__expert_degree": 3}, "parallel.expert_degree", "use one of [1, 2, 4]"),
        ({"parallel__data_replicate_degree": 3}, "parallel.data_replicate_degree", "[1, 2, 4]"),
        ({"train__global_batch_size": 18}, "train.global_batch_size", "use 16 or 20"),
        ({"train__micro_batch_size": 3}, "train.micro_batch_size", "use one of [1, 2, 4]"),
    ],
)
def test_a_mistake_names_key_value_reason_and_a_way_out(
    changes: dict[str, Any], key: str, said: str
) -> None:
    if key == "run.device" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError) as caught:
        resolve(validated(toy(**changes), Config), num_workers=4, now=NOW)
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}=")
    assert said in str(caught.value)


def test_a_backend_that_cannot_run_here_is_refused_before_any_worker_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    values = toy(run__device="cpu", model__experts__backend="megablocks")
    with pytest.raises(ConfigError, match=r"model\.experts\.backend=megablocks: .*or use auto"):
        resolve(validated(values, Config), num_workers=1, now=NOW)


def test_resolving_fills_in_all_that_was_left_open(tmp_path: Path) -> None:
    config = validated(toy(run__dir=str(tmp_path)), Config)
    resolved = resolve(config, num_workers=4, now=NOW)
    assert resolved.parallel.expert_degree == 4
    assert resolved.parallel.data_shard_degree == 4
    assert resolved.train.micro_batch_size == 4
    assert resolved.launch.num_workers == 4
    assert resolved.run.name == "20260102-030405"
    assert Path(str(resolved.data.dir)).is_absolute()
    (tmp_path / "20260102-030405").mkdir()
    assert resolve(config, num_workers=4, now=NOW).run.name == "20260102-030405-2"


def test_an_open_micro_batch_is_bounded_in_tokens() -> None:
    config = validated(toy(train__global_batch_size=4096), Config)
    assert resolve(config, num_workers=4, now=NOW).train.micro_batch_size == 64


def test_plus_model_and_model_and_nothing_compose(tmp_path: Path) -> None:
    with_plus = moetrain("+model=8x7b", "--cfg", "job", cwd=tmp_path)
    without = moetrain("model=8x7b", "--cfg", "job", cwd=tmp_path)
    assert with_plus.stdout == without.stdout
    assert yaml.safe_load(without.stdout)["train"]["seq_len"] == 4096  # its experiment came along
    nothing = yaml.safe_load(moetrain("--cfg", "job", cwd=tmp_path).stdout)
    assert nothing["model"]["vocab_size"] == 257
    assert validated(nothing, Config).optim.lr == 3e-3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("moetrain", ["model.num_experts=0"],
         "moetrain: model.num_experts=0: there is at least one: use model.num_experts=1 "
         "model.top_k=1 for a dense model, whose layers have no router\n"),
        ("moetrain", ["model.top_k=99"], "moetrain: model.top_k=99: a token can't choose more"),
        ("data_pipeline.build", ["corpus=a", "to=b", "tokenizer=bytes", "shard_tokens=0"],
         "data_pipeline.build: shard_tokens=0 can't be"),
    ],
)  # fmt: skip
def test_settings_that_no_run_would_accept_are_printed_and_refused(
    module: str, words: list[str], said: str, tmp_path: Path
) -> None:
    ended = run_module(module, *words, "--cfg", "job", cwd=tmp_path)
    assert ended.returncode == 2
    key, value = words[-1].split("=")
    printed = yaml.safe_load(ended.stdout)
    for part in key.split("."):
        printed = printed[part]
    assert printed == int(value)
    assert ended.stderr.startswith(said)
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_one_expert_is_the_dense_one() -> None:
    dense = validated(toy(model__num_experts=1, model__top_k=1), Config)
    check(dense)
    assert not dense.model.is_moe


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["data.weights={en:0.5,fr:0.5}", "data.weights.x-y=2", "+data.epochs.en=3"],
            {"weights": {"en": 0.5, "fr": 0.5, "x-y": 2.0}, "epochs": {"en": 3.0}},
        ),
        (
            ["data.stages=[{from_step:400,weights:{en:1}}]", "data.packing=best_fit"],
            {"stages": [{"from_step": 400, "weights": {"en": 1.0}}], "packing": "best_fit"},
        ),
    ],
)
def test_mappings_and_lists_are_set_on_the_command_line(
    tmp_path: Path, overrides: list[str], expected: dict[str, Any]
) -> None:
    said = moetrain(*overrides, "--cfg", "job", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    composed = yaml.safe_load(said.stdout)["data"]
    assert {key: composed[key] for key in expected} == expected
    assert validated({"data": composed} | toy(), Config).data.weights == composed["weights"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.weights={en:much}", "data.weights.en=much: must be of type float"),
        ("data.stages=[{from_step:9,weight:{en:1}}]", "did you mean 'weights'?"),
        ("data.wieghts.en=1", "data.wieghts: there is no such setting (did you mean 'weights'?)"),
        ("data.stages=[{from_step:0,weights:{en:1}}]", "data.stages.0.from_step=0: "),
        ("data.weights={en:nan}", "data.weights.en=nan: "),
    ],
)
def test_a_mistake_in_a_mapping_is_named(tmp_path: Path, override: str, said: str) -> None:
    ended = moetrain(override, cwd=tmp_path)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_names_groups_and_settings(tmp_path: Path) -> None:
    said = moetrain("train", "--help", cwd=tmp_path)
    assert said.returncode == 0
    for part in ("8x22b", "num_experts", "--cfg job", "run.name"):
        assert part in said.stdout


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf/model").glob("*.yaml")))
def test_every_preset_composes_and_resolves_on_64_ranks(name: str) -> None:
    composed = compose_preset(f"model={name}")
    config = validated(composed, Config)
    if name == "toy":
        config = replace(config, train=replace(config.train, global_batch_size=64))
    resolved = resolve(config, num_workers=64, now=NOW)
    assert resolved.train.micro_batch_size
    assert (resolved.parallel.expert_degree or 0) > 1 or not config.model.is_moe


def compose_preset(*overrides: str) -> dict[str, Any]:
    """Returns what Hydra composes from conf/, without its own settings."""
    register(Config, name="schema")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", list(overrides))
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def layout(config: Config) -> tuple[int | None, ...]:
    parallel = config.parallel
    return (
        config.launch.num_workers,
        parallel.data_replicate_degree,
        parallel.data_shard_degree,
        parallel.expert_degree,
        config.train.micro_batch_size,
    )


@pytest.mark.parametrize(("given", "found", "degree"), [
    (None, 4, 4), (2, 4, 2), (None, None, 8),
])  # fmt: skip
def test_experts_stay_inside_a_machine_as_large_as_it_is(
    given: int | None, found: int | None, degree: int
) -> None:
    wished = toy(model__num_experts=8, train__global_batch_size=16, cluster__gpus_per_node=given)
    config = resolve(validated(wished, Config), num_workers=16, now=NOW, gpus_per_node=found)
    assert config.parallel.expert_degree == degree
    assert config.cluster.gpus_per_node == degree
    smaller = refit(config, 8)
    assert smaller is not None
    assert smaller.cluster == config.cluster


def test_fewer_ranks_keep_the_global_batch_and_the_expert_degree_where_it_divides() -> None:
    wished = toy(
        model__ffn_hidden_dim=192, parallel__expert_degree=4, train__global_batch_size=48,
        train__micro_batch_size=2, launch__num_workers=8,
    )  # fmt: skip
    full = resolve(validated(wished, Config), num_workers=8, now=NOW)
    assert layout(full) == (8, 1, 8, 4, 2)
    smaller = {n: refit(full, n) for n in range(7, 0, -1)}
    layouts = {n: c and layout(c) for n, c in smaller.items()}
    assert layouts == {
        7: None,  # 48 sequences don't divide by seven ranks
        6: (6, 1, 6, 2, 2),  # four doesn't divide six: folded to two
        5: None,
        4: (4, 1, 4, 4, 2),
        3: (3, 1, 3, 1, 2),
        2: (2, 1, 2, 2, 2),
        1: (1, 1, 1, 1, 2),
    }
    for config in smaller.values():
        if config is not None:
            assert config.train.global_batch_size == 48
            same = replace(
                config, parallel=full.parallel, train=full.train, launch=full.launch, run=full.run
            )
            assert same == full, "nothing else changes"
            assert config.run == full.run


@pytest.mark.parametrize(
    ("full", "fewer"),
    [
        ((8, 4, 2), (6, 3, 2)),
        ((16, 2, 8), (8, 1, 8)),
        ((32, 4, 8), (16, 2, 8)),
        ((32, 4, 8), (12, 1, 12)),
        ((16, 4, 4), (2, 1, 2)),  # each must hold more: as little more as possible
    ],
)
def test_replicas_go_before_shards(full: tuple[int, ...], fewer: tuple[int, ...]) -> None:
    """So that no rank has more of the weights than it had memory for."""
    wished = toy(
        parallel__data_replicate_degree=full[1], train__global_batch_size=96,
        model__ffn_hidden_dim=192, model__num_experts=8,
    )  # fmt: skip
    before = resolve(validated(wished, Config), num_workers=full[0], now=NOW)
    assert layout(before)[:3] == full
    after = refit(before, fewer[0])
    assert after is not None
    assert layout(after)[:3] == fewer


def test_fewer_ranks_have_more_replicas_only_where_nothing_else_is_valid() -> None:
    """Three ranks can't shard an expert of 128 hidden units."""
    wished = toy(model__ffn_hidden_dim=128, train__global_batch_size=48)
    full = resolve(validated(wished, Config), num_workers=8, now=NOW)
    six = refit(full, 6)
    assert six is not None
    assert layout(six)[:4] == (6, 3, 2, 2)


def test_a_worker_takes_micro_batches_no_larger_than_before() -> None:
    """What it had memory for in the full layout."""
    wished = toy(train__global_batch_size=24, train__micro_batch_size=3)
    full = resolve(validated(wished, Config), num_workers=8, now=NOW)
    four = refit(full, 4)
    assert four is not None
    assert four.train.micro_batch_size == 3
    six = refit(full, 6)
    assert six is not None
    assert six.train.micro_batch_size == 2
