"""Hugging Face folders that transformers writes, and run folders that hold a model of ours."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moetrain.checkpoint.manifest import TensorEntry
from moetrain.checkpoint.offline import write_checkpoint
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.huggingface.model_files import export_dtype, exportable_places, write_model
from moetrain.huggingface.run_folder import starting_config
from moetrain.import_hf import ImportSettings, import_folder
from moetrain.model import Transformer
from moetrain.settings import ModelSettings, RopeScalingSettings, RouterSettings
from moetrain.train.changes import as_plain
from tests.support.transformers_oracle import oracle_for

TINY = ModelSettings(
    dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=10, ffn_hidden_dim=16,
    num_experts=3, top_k=2, vocab_size=31, max_seq_len=64, rope_theta=1e4,
)  # fmt: skip
_DENSE = replace(TINY, num_experts=1, top_k=1)
_FIRST_DENSE = replace(TINY, num_dense_layers=1, dense_ffn_hidden_dim=20)
FAMILIES = {
    "mixtral": TINY,
    "mistral": _DENSE,
    "qwen2": replace(
        _DENSE,
        attention_bias=True,
        tie_embeddings=True,
        rope_scaling=RopeScalingSettings(type="yarn", factor=2.0, original_max_seq_len=32),
    ),
    "llama": replace(_DENSE, attention_bias=True, attention_output_bias=True),
    "qwen3": replace(_DENSE, qk_norm=True, qk_norm_scope="head", norm_eps=1e-6),
    "olmoe": replace(
        TINY,
        head_dim=6,
        qk_norm=True,
        clip_qkv=0.5,
        router=RouterSettings(normalize_gates=False, load_balance_loss_weight=0.000625),
    ),
    "qwen3_moe": replace(
        _FIRST_DENSE,
        qk_norm=True,
        qk_norm_scope="head",
        rope_scaling=RopeScalingSettings(type="linear", factor=4.0),
    ),
    "qwen2_moe": replace(
        _FIRST_DENSE,
        num_shared_experts=2,
        attention_bias=True,
        router=RouterSettings(normalize_gates=False),
    ),
    "qwen2_moe without shared experts": replace(
        TINY, top_k=1, router=RouterSettings(normalize_gates=False)
    ),
    "glm4_moe": replace(
        _FIRST_DENSE,
        num_experts=8,
        num_shared_experts=1,
        attention_bias=True,
        qk_norm=True,
        qk_norm_scope="head",
        head_dim=12,
        partial_rotary_factor=0.5,
        tie_embeddings=True,
        router=RouterSettings(
            score_function="sigmoid", num_groups=4, top_groups=2, routed_scaling_factor=2.5
        ),
    ),
    "glm4_moe without shared experts": replace(
        TINY,
        rope_scaling=RopeScalingSettings(type="llama3", factor=8.0, original_max_seq_len=16),
        router=RouterSettings(score_function="sigmoid", normalize_gates=False),
    ),
}
"""A small model of each class of transformers, by the class's `model_type`."""


def save_oracle(
    folder: Path, settings: ModelSettings, *, dtype: torch.dtype = torch.float32, **how: Any
) -> Any:
    """Has transformers save a random model of these settings, and returns the model."""
    model: Any = oracle_for(settings).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # as they are published
            buffer.data = buffer.float()
    model.save_pretrained(folder, **how)
    return model


def imported(source: Path, to: Path) -> Path:
    """Imports a folder, and returns the one checkpoint of the run that it became."""
    assert import_folder(ImportSettings(from_=str(source), to=str(to))) == 0
    return to / "checkpoints" / "step_00000000"


def exported(checkpoint: Path, to: Path, settings: ModelSettings, **how: Any) -> list[str]:
    """Writes a checkpoint's model as Hugging Face files; returns the names of its weights'."""
    to.mkdir()
    with CheckpointReader(checkpoint) as reader:
        return write_model(
            to,
            reader,
            model=settings,
            placed=exportable_places(reader, settings, drop_router_bias=False),
            dtype=export_dtype(how.pop("dtype", "auto"), reader.manifest),
            advance=lambda _: None,
            **{"bos_token_id": None, "eos_token_id": None, "max_shard_bytes": 1 << 40} | how,
        )


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors in a folder's safetensors files, each of which is in one of them."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def assert_bitwise_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Asserts equal names, dtypes, shapes and bits: -0.0 is not 0.0."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.shape == theirs[name].shape, name
        bits = torch.int32 if tensor.itemsize == 4 else torch.int16
        assert torch.equal(tensor.view(bits), theirs[name].view(bits)), name


def loaded(checkpoint: Path, settings: ModelSettings) -> Transformer:
    """Returns our decoder with the weights of a checkpoint, all of them and no others."""
    model = Transformer(settings)
    with CheckpointReader(checkpoint) as reader:
        names = [n for n in reader.manifest.tensors if n.startswith("model.")]
        model.load_state_dict({n.removeprefix("model."): reader.read(n) for n in names})
    return model.eval()


def write_run(
    run_dir: Path,
    model: Transformer,
    *,
    state: Mapping[str, Any] | None = None,
    mesh: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a run's folder with one checkpoint, of this model; returns the checkpoint."""
    tensors = {f"model.{n}": t.detach() for n, t in model.state_dict().items()} | dict(extra or {})
    config = starting_config(model.settings, to=run_dir, has_tokenizer=False)
    return write_checkpoint(
        run_dir / "checkpoints",
        step=7,
        state={"step": 7, **(state or {})},
        config=as_plain(config),
        mesh=mesh or {},
        tensors={
            n: TensorEntry(shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
            for n, t in tensors.items()
        },
        read=lambda name, index: tensors[name][index],
    )
