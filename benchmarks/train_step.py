"""A whole training step, compared with transformers' model trained as its Trainer does it.

`python -m benchmarks.train_step` prints one JSON object per line on standard output and a table on
standard error. Both sides start from the same weights and take the same batches: tokens of the
standard library's sources. Ours is the trainer that `python -m moetrain` builds, including its
balance loss, z-loss, statistics and global norm.
"""

import argparse
import gc
import importlib.metadata
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.timing import machine, print_record, print_table, spread, time_in_turn
from data_pipeline import BuildSettings, build_shards
from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain.command import config_dir
from moetrain.config import resolve
from moetrain.model import Transformer
from moetrain.parallel import join_ranks
from moetrain.settings import Config, ModelSettings, Resolved
from moetrain.settings.validation import validated
from moetrain.train.build import build_trainer
from moetrain.train.control import Control, RankPlace
from moetrain.train.micro_batch import MicroBatch
from moetrain.train.rank import keep_freed_memory
from moetrain.train.step import train_step
from moetrain.train.trainer import Trainer

TOKENIZERS = {257: "bytes", 32000: "mixtral-v1"}  # by vocabulary size
EXPERTS = ("eager", "grouped_mm")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A preset, and how much of it fits a benchmark's time and memory."""

    model: str
    num_layers: int
    global_batch_size: int
    seq_len: int

    @staticmethod
    def parse(text: str) -> "Case":
        """Returns the case written as `model,layers,sequences,seq_len`."""
        model, *numbers = text.split(",")
        layers, sequences, seq_len = map(int, numbers)
        return Case(model=model, num_layers=layers, global_batch_size=sequences, seq_len=seq_len)


# The toy as it is trained; 8x160m with a third of its layers and one short sequence, so that two
# models with their optimizers fit into 16 GB and a step takes seconds on two cores.
CASES = ("toy,4,16,256", "8x160m,4,1,1024")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        type=Case.parse,
        default=[Case.parse(text) for text in CASES],
        metavar="MODEL,LAYERS,SEQUENCES,SEQ_LEN",
        help=f"({' '.join(CASES)})",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads on CPU (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
        keep_freed_memory()  # as run_rank does
    with tempfile.TemporaryDirectory() as folder:
        join_ranks(
            rank=0,
            world_size=1,
            rendezvous=f"file://{folder}/rendezvous",
            device=device,
            timeout_seconds=300,
        )
        for case in options.cases:
            records = measure(
                case,
                device=device,
                threads=options.threads,
                rounds=options.rounds,
                folder=Path(folder),
            )
            for record in records:
                print_record(record)
            show(records)
            gc.collect()


def measure(
    case: Case, *, device: torch.device, threads: int, rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """Returns a record for our step and for each of transformers', measured in turn."""
    config = configured(case, device=device, folder=folder)
    place = RankPlace(rank=0, world_size=1, rendezvous="joined", attempt=1)
    trainer = build_trainer(config, place, Control(), device=device)
    oracle = _same_in_transformers(trainer.model).to(device)
    batch = trainer.batches.read(0, rank=0, num_ranks=1)
    micro_batches = MicroBatch.cut(batch, len(batch.tokens), device=device)
    theirs = _TransformersStep(oracle, config, micro_batches[0])

    losses = {"moetrain": our_step(trainer, micro_batches)()}
    losses |= {name: theirs.loss_with(name) for name in EXPERTS}
    passes: dict[str, Callable[[], object]] = {"moetrain": our_step(trainer, micro_batches)}
    for name in EXPERTS:
        passes[name] = partial(theirs.step_with, name)
    taken = time_in_turn(passes, rounds=rounds, warmup=2, device=device)
    trainer.close(0)

    tokens = batch.tokens.size
    version = importlib.metadata.version("transformers")
    ours = median(taken["moetrain"])
    return [
        {
            "benchmark": "train_step",
            "case": {
                "model": case.model,
                "num_layers": case.num_layers,
                "parameters": sum(p.numel() for p in oracle.parameters()),
                "global_batch_size": case.global_batch_size,
                "seq_len": case.seq_len,
                "dtype": "float32",
                "device": device.type,
                **({"threads": threads} if device.type == "cpu" else {}),
                "machine": machine(device),
                "torch": torch.__version__,
            },
            "implementation": name if name == "moetrain" else f"transformers {version} {name}",
            "seconds": spread(taken[name]),
            # A whole step has no limit: the ratio is to ours, above 1 if it is faster.
            "ratio_to_limit": None,
            "ratio_to_moetrain": ours / median(taken[name]),
            "tokens_per_second": tokens / median(taken[name]),
            "cross_entropy_of_first_batch": losses[name],
            "rounds": rounds,
        }
        for name in passes
    ]


def our_step(trainer: Trainer, micro_batches: Sequence[MicroBatch]) -> Callable[[], float]:
    def step() -> float:
        report = train_step(
            micro_batches,
            model=trainer.model,
            optimizer=trainer.optimizer,
            gradients=trainer.gradients,
            meshes=trainer.meshes,
            learning_rate=trainer.config.optim.lr,
        )
        return report.cross_entropy

    return step


class _TransformersStep:
    """What Trainer does in a step: loss with the balance loss, clipping, fused AdamW."""

    def __init__(self, model: nn.Module, config: Resolved, batch: MicroBatch) -> None:
        optim = config.optim
        self.model: Any = model.train()  # transformers' own methods are not a Module's
        self.batch, self.max_norm = batch, optim.clip_grad_norm
        decays = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decays, "weight_decay": optim.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )
        self.labels = batch.targets.masked_fill(~batch.valid, -100)

    def _forward(self, experts: str) -> Any:
        self.model.set_experts_implementation(experts)
        return self.model(
            input_ids=self.batch.tokens,
            labels=self.labels,
            shift_labels=self.labels,  # ours are already shifted
            use_cache=False,
        )

    @torch.no_grad()
    def loss_with(self, experts: str) -> float:
        """Returns the cross-entropy, in nats, without the balance loss."""
        output = self._forward(experts)
        weight = self.model.config.router_aux_loss_coef
        loss: Tensor = output.loss - weight * output.aux_loss
        return loss.item()

    def step_with(self, experts: str) -> float:
        """Takes one step; returns the loss, which Trainer reads as well."""
        loss = self._forward(experts).loss
        loss.backward()
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())


def configured(case: Case, *, device: torch.device, folder: Path) -> Resolved:
    """Returns the resolved configuration of the preset and its experiment, reduced to the case."""
    files = config_dir()
    values = yaml.safe_load((files / "experiment" / f"{case.model}.yaml").read_text())
    model = yaml.safe_load((files / "model" / f"{case.model}.yaml").read_text())
    model |= values.pop("model", {}) | {"num_layers": case.num_layers}
    tokenizer = TOKENIZERS[model["vocab_size"]]
    shards = build_shards(
        BuildSettings(
            corpus=str(Path(yaml.__file__).parent),  # Python sources, a few hundred kilobytes
            tokenizer=tokenizer,
            to=str(folder / f"shards-{tokenizer}"),
        ),
        progress=False,
    )
    values |= {
        "model": model,
        "train": {
            "num_steps": 1000,
            "global_batch_size": case.global_batch_size,
            "micro_batch_size": case.global_batch_size,
            "seq_len": case.seq_len,
            "dtype": "float32",
        },
        "schedule": {"warmup_steps": 1},
        "run": {"name": case.model, "dir": str(folder / "runs"), "device": device.type},
        "data": {"dir": str(shards.path)},
        "observe": {"progress": "off", "wandb": {"mode": "disabled"}},
    }
    return resolve(validated(values, Config), num_workers=1, now=datetime(2026, 1, 1))


@torch.no_grad()
def _same_in_transformers(model: Transformer) -> nn.Module:
    """Returns transformers' model of the same shape with the same weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings: ModelSettings = model.settings
    oracle: nn.Module = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.dim,
            intermediate_size=settings.ffn_hidden_dim,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_kv_heads,
            head_dim=settings.head_dim,
            rms_norm_eps=settings.norm_eps,
            max_position_embeddings=settings.max_seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
            sliding_window=None,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            num_local_experts=settings.num_experts,
            num_experts_per_tok=settings.top_k,
            output_router_logits=True,  # as in training: with the balance loss
            router_aux_loss_coef=settings.router.load_balance_loss_weight,
        )
    )
    ours = {name: _whole(value) for name, value in model.state_dict().items()}
    named = {
        "model.embed_tokens.weight": ours.pop("embedding.weight"),
        "model.norm.weight": ours.pop("norm.weight"),
        "lm_head.weight": ours.pop("head.weight"),
    }
    for layer in range(settings.num_layers):
        here, there = f"layers.{layer}.", f"model.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            named[f"{there}self_attn.{part}.weight"] = ours.pop(f"{here}attention.{part}.weight")
        named[f"{there}input_layernorm.weight"] = ours.pop(f"{here}attention_norm.weight")
        named[f"{there}post_attention_layernorm.weight"] = ours.pop(
            f"{here}feed_forward_norm.weight"
        )
        moe = f"{here}feed_forward."
        named[f"{there}mlp.gate.weight"] = ours.pop(f"{moe}router.weight")
        experts = [ours.pop(f"{moe}experts.{name}") for name in ("gate", "up", "down")]
        named[f"{there}mlp.experts.gate_up_proj"] = torch.cat(experts[:2], 1)
        named[f"{there}mlp.experts.down_proj"] = experts[2].transpose(1, 2)
    assert all(name.endswith("router.bias") for name in ours), f"left over: {sorted(ours)}"
    oracle.load_state_dict(named)  # raises if a name is missing on either side
    return oracle


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def show(records: Sequence[dict[str, Any]]) -> None:
    """Prints a case's table."""
    case = records[0]["case"]
    print_table(
        f"{case['model']}, {case['num_layers']} layers, {case['parameters'] / 1e6:.1f} M "
        f"parameters · {case['global_batch_size']} × {case['seq_len']} tokens · float32 · "
        f"{case['device']} · {records[0]['rounds']} rounds",
        ("implementation", "ms", "min–max", "tokens/s", "of moetrain", "first loss"),
        [
            (
                record["implementation"],
                f"{1e3 * record['seconds'][1]:.0f}",
                f"{1e3 * record['seconds'][0]:.0f}–{1e3 * record['seconds'][2]:.0f}",
                f"{record['tokens_per_second']:.0f}",
                f"{record['ratio_to_moetrain']:.2f}",
                f"{record['cross_entropy_of_first_batch']:.5f}",
            )
            for record in records
        ],
    )


if __name__ == "__main__":
    ignore_broken_pipes()
    main()
