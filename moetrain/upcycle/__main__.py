"""`python -m moetrain.upcycle from=DIR to=DIR num_experts=8 top_k=2`: a dense run becomes an MoE's.

Owns the command: what is refused, its order of work and its messages. Leaves the tensors to
`experts.py` and the run's folder to `moetrain.huggingface.run_folder`.
"""

import os
import shutil
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval
from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from data_pipeline.commands.shell import text_setting
from data_pipeline.progress import byte_progress
from data_pipeline.settings import PathText
from moetrain.checkpoint.chosen import chosen_checkpoint
from moetrain.checkpoint.manifest import CheckpointError, Manifest
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.checks import ConfigError
from moetrain.command import run_command
from moetrain.huggingface.names import model_tensors
from moetrain.huggingface.new_folder import exit_code, new_folder, require_new
from moetrain.huggingface.run_folder import starting_config, training_command, write_run
from moetrain.huggingface.tokenizer import IMPORTED
from moetrain.kinds import EventKind
from moetrain.model import active_parameters, total_parameters
from moetrain.observe import EventLog
from moetrain.settings import ModelSettings
from moetrain.settings.validation import validated_run
from moetrain.upcycle.experts import Changes, Index, Upcycled, dense_name


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class UpcycleSettings:
    """Which dense run becomes an MoE, of how many experts, and how they initially differ."""

    from_: PathText
    """The own folder of a dense run, trained or imported."""
    to: PathText
    """The run's folder to make."""
    num_experts: int
    top_k: PositiveInt
    noise: NonNegativeFloat = 0.0
    """Normal noise on each expert, in standard deviations of each matrix."""
    reinitialize: Annotated[float, Interval(ge=0.0, le=1.0)] = 0.0
    """The share of each expert's hidden units to reinitialise (arXiv 2502.19261: 0.5)."""
    seed: NonNegativeInt = 0
    """The seed of the routers, the noise and the choice of units."""
    normalize_gates: bool = True
    """Whether a token's gates sum to one; only then does the model begin as the dense one."""
    extensions: list[str] = field(default_factory=list)
    """Extensions that the run was trained with; a checkpoint alone can't cause an import."""


def upcycle(settings: UpcycleSettings) -> int:
    """Upcycles a run; returns the exit code."""
    source, to = Path(settings.from_), Path(os.path.abspath(settings.to))
    return exit_code(lambda: _upcycle(settings, source, to), command="moetrain.upcycle")


def _upcycle(settings: UpcycleSettings, source: Path, to: Path) -> None:
    with CheckpointReader(chosen_checkpoint(source, key="from")) as reader:
        manifest = reader.manifest
        dense = validated_run(manifest.config)
        model = _model(settings, dense.model, source)
        tokenizer = source / IMPORTED
        has_tokenizer = (tokenizer / "tokenizer.json").is_file()
        config = starting_config(model, to=to, has_tokenizer=has_tokenizer)
        state: dict[str, Any] = {}
        if token_ids := manifest.state.get("imported_token_ids"):
            state["imported_token_ids"] = token_ids
        if fingerprint := manifest.state.get("tokenizer"):
            # Its embeddings mean these tokens; where they are, an export will look for them.
            state["tokenizer"] = fingerprint
            config = replace(config, data=dense.data)
        _require_whole(manifest, dense.model, model)
        size = 4 * total_parameters(model)
        require_new(to, num_bytes=size)
        changes = Changes(
            noise=settings.noise, reinitialize=settings.reinitialize, seed=settings.seed
        )
        upcycled = Upcycled(reader.read, settings=model, changes=changes)
        with (
            new_folder(to) as staged,
            byte_progress("upcycling", num_bytes=size, shown=True) as progress,
        ):

            def read(name: str, index: Index) -> Tensor:
                part = upcycled.read(name, index)
                progress.advance(part.numel() * part.element_size())
                return part

            if tokenizer.is_dir():
                shutil.copytree(tokenizer, staged / IMPORTED)
            write_run(staged, config, to=to, has_tokenizer=has_tokenizer, state=state, read=read)
            EventLog(staged / "events.jsonl").write(
                EventKind.upcycle,
                source=str(source.absolute()),
                source_step=manifest.step,
                **{
                    key: value
                    for key, value in asdict(settings).items()
                    if key not in ("from_", "to")
                },
            )
    _tell(
        settings,
        source,
        to,
        manifest=manifest,
        model=model,
        data=dense.data.dir if fingerprint else None,
    )


def _model(settings: UpcycleSettings, dense: ModelSettings, source: Path) -> ModelSettings:
    if dense.is_moe:
        raise ConfigError(
            "from",
            source,
            f"its model has {dense.num_experts} experts already: use a dense run, with "
            "model.num_experts=1",
        )
    if settings.num_experts < 2:
        reason = "that is the dense model: use 2 or more"
        if settings.num_experts < 1:
            reason = "an MoE has several: use 2 or more"
        raise ConfigError("num_experts", settings.num_experts, reason)
    if settings.top_k > settings.num_experts:
        raise ConfigError(
            "top_k",
            settings.top_k,
            "a token can't choose more experts than there are: use at most "
            f"num_experts={settings.num_experts}",
        )
    if settings.top_k == 1 and settings.normalize_gates:
        raise ConfigError(
            "top_k",
            1,
            "the only gate would always be 1, so that the router would learn nothing from the "
            "loss: use 2 or more, or normalize_gates=false",
        )
    return replace(
        dense,
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        router=replace(dense.router, normalize_gates=settings.normalize_gates),
    )


def _require_whole(manifest: Manifest, dense: ModelSettings, model: ModelSettings) -> None:
    """Raises CheckpointError unless every tensor of the dense model is there, and is used."""
    wanted = model_tensors(dense)
    found = {n: e.shape for n, e in manifest.tensors.items() if n.startswith("model.")}
    used = {dense_name(name) for name in model_tensors(model)} - {None}
    for what, names in (
        ("is missing, or of another shape", [n for n in wanted if found.get(n) != wanted[n]]),
        ("is no tensor of the dense model", sorted(found.keys() - wanted)),
        ("has no place in the upcycled model", sorted(wanted.keys() - used)),
    ):
        if names:
            raise CheckpointError(f"the checkpoint of step {manifest.step}: {names[0]} {what}")


def _tell(
    settings: UpcycleSettings,
    source: Path,
    to: Path,
    *,
    manifest: Manifest,
    model: ModelSettings,
    data: str | None,
) -> None:
    if not settings.normalize_gates:
        print(
            "note      with normalize_gates=false a token's gates don't sum to one: the model "
            "doesn't begin as the dense one"
        )
    print(
        f"upcycled  {source} of step {manifest.step}: {total_parameters(model):,} parameters, "
        f"{active_parameters(model):,} active\n"
        f"to        {to}, as step 0 of a run\n"
        f"next      {training_command(to)} {text_setting('data.dir', str(data or 'SHARDS'))}"
    )


if __name__ == "__main__":
    run_command(upcycle, tree=UpcycleSettings, module="moetrain.upcycle")
