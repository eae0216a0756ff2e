"""moetrain from a script or a notebook: configurations, models, batches, steps, routing.

One process and one device. Everything here returns what the commands use themselves, so that a
notebook works with what a run trains. docs/api.md has an example of each.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor
from torch.optim import Optimizer

from data_pipeline import Batch, Tokenizer, open_or_build
from moetrain.checkpoint.chosen import chosen_checkpoint
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.command import composed, config_dir
from moetrain.compare.comparison import Comparison, compare_runs
from moetrain.config import check
from moetrain.config import resolve as resolve_for
from moetrain.huggingface.reading import read_model
from moetrain.huggingface.tokenizer import tokenizer_of_run
from moetrain.lengths import in_steps, steps_of
from moetrain.model import MoELayer, Transformer
from moetrain.model.router import Routing
from moetrain.optim import learning_rate
from moetrain.parallel import Gradients, Meshes, begin_micro_batch, join_ranks
from moetrain.parallel.parallelize import initialise
from moetrain.settings import Config, ModelSettings, Resolved
from moetrain.settings.validation import asking_for_extensions, validated, validated_run
from moetrain.train.build import build_model
from moetrain.train.micro_batch import MicroBatch, noise_seeds
from moetrain.train.objective import build_objective
from moetrain.train.prepare import global_batches, require_vocabulary
from moetrain.train.step import train_step
from moetrain.train.step_report import StepReport

__all__ = [
    "LayerRouting",
    "Training",
    "batches",
    "compare",
    "compose",
    "load_model",
    "load_tokenizer",
    "new_model",
    "resolve",
    "routing",
    "training",
]


def compose(*overrides: str) -> Config:
    """Returns the configuration of a command line: `compose("+model=toy", "optim.lr=1e-3")`.

    Raises ValueError for an unknown setting or an invalid value; its subclass ConfigError where
    settings contradict each other.
    """
    config = in_steps(composed(overrides, tree=Config, files=config_dir()))
    check(config)
    return config


def resolve(config: Config, *, num_ranks: int = 1) -> Resolved:
    """Returns a configuration for so many ranks, with all open settings decided.

    Raises ConfigError where so many ranks can't run it.
    """
    return resolve_for(config, num_workers=num_ranks, now=datetime.now())


def new_model(config: Config, *, device: str | torch.device = "cpu") -> Transformer:
    """Returns the model with the weights that a run of this configuration begins with, float32."""
    with torch.device("meta"):
        model = Transformer(config.model)
    model.to_empty(device=device)
    initialise(model, seed=config.seed, device=torch.device(device))
    return model


def load_model(
    source: str | Path,
    *,
    step: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Returns a run's model, or that of a Hugging Face folder, in evaluation mode.

    For a run (`runs/NAME`) it is the newest good checkpoint's, or that of a `step`; every file of
    it is verified first. A router's selection bias stays float32 whatever the `dtype`. Raises
    ConfigError where there is no such model, and CheckpointError or ConversionError where it can't
    be read.
    """
    folder = Path(source)
    if (folder / "config.json").is_file():
        settings, tensors = read_model(folder)
    else:
        with CheckpointReader(chosen_checkpoint(folder, step=step, key="source")) as reader:
            with asking_for_extensions(reader.manifest.config):
                settings = validated(reader.manifest.config["model"], ModelSettings)
            names = [name for name in reader.manifest.tensors if name.startswith("model.")]
            tensors = {name.removeprefix("model."): reader.read(name) for name in names}
    with torch.device("meta"):
        model = Transformer(settings)
    model.load_state_dict(tensors, assign=True)
    return model.to(device=device, dtype=dtype).eval()


def compare(
    *runs: str | Path,
    measure: str | None = None,
    at: str = "end",
    x: str = "step",
    baseline: str | None = None,
    by: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Comparison:
    """Returns the comparison of runs, as `moetrain compare` has it: folders, sweeps, patterns.

    `run_rows(comparison)` and `record_rows(comparison)` of `moetrain.compare.tables` are rows for
    pandas, and `as_text(comparison)` of `moetrain.compare.text` what the command prints. Raises
    ConfigError for runs that aren't there, and for an unknown metric, point or arm.
    """
    words = [str(run) for run in runs]
    return compare_runs(
        words, measure=measure, at=at, axis=x, baseline=baseline, by=by, names=names
    )


def load_tokenizer(run: str | Path) -> Tokenizer:
    """Returns the tokenizer that a run was trained with; `encode` and `decode` are its methods.

    Raises ConfigError where it isn't found.
    """
    folder = Path(run)
    with CheckpointReader(chosen_checkpoint(folder, key="run")) as reader:
        manifest = reader.manifest
    config = validated_run(manifest.config)
    return tokenizer_of_run(
        config, fingerprint=manifest.state.get("tokenizer") or None, run_dir=folder
    )


def batches(config: Config, *, start: int = 0) -> Iterator[Batch]:
    """Yields the global batches that a run of this configuration trains on, from a step on.

    Each has numpy arrays [sequences, seq_len]: tokens, targets, and a mask of those that count.
    Builds the shards where they aren't there yet. Raises DataError where they can't be read.
    """
    shards = open_or_build(config.data, progress=True)
    require_vocabulary(config, shards.tokenizer)
    source, size = global_batches(config, shards, position=None), config.train.global_batch_size
    for step in range(start, steps_of(config)):
        yield source.read(step * size, rank=0, num_ranks=1)


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """Where one layer sent the tokens of a text."""

    layer: int
    """Its number in the model."""
    experts: Int64[Tensor, "*sequences seq top_k"]
    """The chosen experts, the highest score first."""
    gates: Float[Tensor, "*sequences seq top_k"]
    """Their weights."""
    load: Float[Tensor, " experts"]
    """The share of the token–expert assignments that each expert received."""


@torch.no_grad()
def routing(model: Transformer, tokens: Int64[Tensor, "*sequences seq"]) -> list[LayerRouting]:
    """Returns how each MoE layer routes the tokens of some text, first layer first."""
    found: dict[int, Routing] = {}
    layers = {
        number: block.feed_forward
        for number, block in enumerate(model.layers)
        if isinstance(block.feed_forward, MoELayer)
    }

    def remember(number: int, _: object, __: object, output: Routing) -> None:
        found[number] = output

    hooks = [
        moe.router.register_forward_hook(partial(remember, number))
        for number, moe in layers.items()
    ]
    try:
        model(torch.atleast_2d(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    shape = (*tokens.shape, model.settings.top_k)
    return [
        LayerRouting(
            layer=number,
            experts=found[number].experts.view(shape),
            gates=found[number].gates.view(shape),
            load=(counts := found[number].statistics.counts.float()) / counts.sum(),
        )
        for number in layers
    ]


@dataclass(kw_only=True)
class Training:
    """A model that takes steps, as a run of its configuration on one rank does."""

    config: Resolved
    model: Transformer
    optimizer: Optimizer
    gradients: Gradients
    meshes: Meshes
    num_steps: int = 0
    """Steps taken so far."""

    def batches(self) -> Iterator[Batch]:
        """Yields the global batches of the remaining steps."""
        return batches(self.config, start=self.num_steps)

    def step(self, batch: Batch) -> StepReport:
        """Takes the next step: loss, gradients, clipping, learning rate and optimizer."""
        config, size = self.config, self.config.train.global_batch_size
        samples = range(self.num_steps * size, (self.num_steps + 1) * size)
        report = train_step(
            MicroBatch.cut(
                batch,
                config.train.micro_batch_size,
                device=next(self.model.parameters()).device,
                mask_documents=config.data.mask_documents,
                noise_seeds=noise_seeds(config, samples),
            ),
            model=self.model,
            objective=build_objective(config.train),
            optimizer=self.optimizer,
            gradients=self.gradients,
            meshes=self.meshes,
            learning_rate=learning_rate(
                self.num_steps,
                peak=config.optim.lr,
                num_steps=config.train.num_steps,
                settings=config.schedule,
            ),
            begin_micro_batch=partial(begin_micro_batch, self.model, config.parallel),
        )
        self.num_steps += 1
        return report


@contextmanager
def training(config: Config, *, device: str | torch.device = "cpu") -> Iterator[Training]:
    """Begins training in this process, without a run's folder, until the context ends.

    Builds the shards where they aren't there yet. It joins a process group of one rank: one at a
    time in a process.
    """
    open_or_build(config.data, progress=True)  # once resolved, a configuration names their folder
    resolved = resolve(config)
    with tempfile.TemporaryDirectory(prefix="moetrain-") as folder:
        join_ranks(
            rank=0,
            world_size=1,
            rendezvous=f"file://{folder}/rendezvous",
            device=torch.device(device),
            timeout_seconds=60.0,
        )
        try:
            model, optimizer, gradients, meshes = build_model(
                resolved, device=torch.device(device), timeout_seconds=60.0
            )
            yield Training(
                config=resolved,
                model=model,
                optimizer=optimizer,
                gradients=gradients,
                meshes=meshes,
            )
        finally:
            dist.destroy_process_group()
