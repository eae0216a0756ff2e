"""The rules across settings, and how a configuration becomes a resolved one.

A configuration comes in as a plain dictionary (Hydra composes it, in the command entries) and
is validated twice: against the typed tree with unknown keys refused, then by the rules that
hold between settings. `resolve` fills in what was left open. Ranks get the resolved tree.
"""

import dataclasses
from dataclasses import replace
from datetime import datetime
from operator import attrgetter

import torch

from data_pipeline import resolved_dir, resolved_tokenizer
from data_pipeline.extensions import source_of
from launch.plan import cluster_address, persistent_folder
from moetrain.checkpoint.remote.folder import check_url
from moetrain.checks import ConfigError, nearest, require_no_secret_values
from moetrain.kernels import unavailable_because
from moetrain.lengths import in_steps, steps_of
from moetrain.model.roles import roles_of
from moetrain.model_rules import check_backend, check_model
from moetrain.optim import decay_steps, group_settings
from moetrain.parallel import degree_choices, divisors, resolve_topology
from moetrain.registries import (
    SELECTED,
)
from moetrain.settings import (
    Config,
    ModelSettings,
    ParallelSettings,
    Resolved,
    ResolvedCluster,
    ResolvedData,
    ResolvedLaunch,
    ResolvedParallel,
    ResolvedRun,
    ResolvedTrain,
)
from moetrain.train.changes import function_settings
from moetrain.train.memory import fitting_communication

SECRETS_MAY_BE_IN = ("cluster.env", "data.dir")  # removed where these are saved
GPUS_PER_NODE = 8  # where neither the settings nor the machines say
MICRO_BATCH_TOKENS = 16_384  # the most in a micro-batch of open size


def check(config: Config) -> None:
    """Raises ConfigError where settings contradict each other, whatever the number of ranks."""
    model = config.model
    check_model(model)
    config = in_steps(config)
    train, num_steps = config.train, steps_of(config)
    check_backend(model, dtype=train.dtype)
    if train.seq_len > model.max_seq_len:
        raise ConfigError(
            "train.seq_len",
            train.seq_len,
            f"is longer than model.max_seq_len: use at most {model.max_seq_len}",
        )
    if train.deterministic:
        _check_deterministic(model)
    _check_schedule(config)
    if not any(not group_settings(config.optim, role).frozen for role in roles_of(model)):
        raise ConfigError(
            "optim.groups", "frozen", "leaves nothing to train: train one group at least"
        )
    every, kept = config.checkpoint.every_steps, config.checkpoint.keep_every
    if kept is not None and kept % every:
        raise ConfigError(
            "checkpoint.keep_every",
            kept,
            f"is not a multiple of checkpoint.every_steps={every}, so that few of those steps "
            f"would be saved: use {max(1, kept // every) * every} or {-(-kept // every) * every}",
        )
    for name in config.checkpoint.accept_changes:
        known = function_settings()
        if name not in known and name.rpartition(".")[0] not in known:  # an option of an extension
            raise ConfigError(
                "checkpoint.accept_changes",
                name,
                f"is none of the settings that a run has to be asked for{nearest(name, known)}; "
                f"there are {', '.join(known)}",
            )
    if config.checkpoint.upload_to is not None:
        check_url(config.checkpoint.upload_to)
    for number, stage in enumerate(config.data.stages):
        if stage.from_step >= num_steps:
            raise ConfigError(
                f"data.stages[{number}].from_step",
                stage.from_step,
                f"would never begin, with train.num_steps={num_steps}: use at most "
                f"{num_steps - 1}, or more steps",
            )
    elsewhere = cluster_address(config.launch)
    if config.run.device == "cuda" and not elsewhere and not torch.cuda.is_available():
        raise ConfigError("run.device", "cuda", "this machine has no CUDA device: use cpu or auto")
    if model.is_moe and model.experts.backend == "megablocks" and not elsewhere:
        here = "cpu" if config.run.device == "cpu" else None
        if reason := unavailable_because(here):
            raise ConfigError("model.experts.backend", "megablocks", f"{reason}; or use auto")
    require_no_secret_values(dataclasses.asdict(config), but=SECRETS_MAY_BE_IN)


def _check_deterministic(model: ModelSettings) -> None:
    """Raises ConfigError for kernels that can't give the same bits each time."""
    if model.is_moe and model.experts.backend == "megablocks":
        raise ConfigError(
            "model.experts.backend", "megablocks",
            "is tuned by measuring at each start, so that train.deterministic=true can't promise "
            "the same bits: use auto",
        )  # fmt: skip
    if model.attention_kernel in ("cudnn", "flash3"):
        raise ConfigError(
            "model.attention_kernel", model.attention_kernel,
            "has no deterministic backward pass in torch (train.deterministic=true): use auto",
        )  # fmt: skip


def _check_schedule(config: Config) -> None:
    """Raises ConfigError for a schedule that doesn't fit into its steps."""
    schedule, num_steps = config.schedule, steps_of(config)
    for name, begin in (("schedule", schedule.restart_from), ("optim", config.optim.restart_from)):
        if begin is not None and begin >= num_steps:
            raise ConfigError(
                f"{name}.restart_from",
                begin,
                f"leaves no step of train.num_steps={num_steps}: use more steps",
            )
    length, warmup = num_steps - (schedule.restart_from or 0), schedule.warmup_steps
    steps = f"train.num_steps={num_steps}"
    if schedule.restart_from:
        steps = f"the {length} steps from schedule.restart_from on"
    if warmup > length:
        raise ConfigError(
            "schedule.warmup_steps",
            warmup,
            f"is more than {steps}, so that the rate would never be reached: use at most {length}",
        )
    stable = length - decay_steps(length, settings=schedule)
    if schedule.name == "wsd" and warmup > stable:
        raise ConfigError(
            "schedule.warmup_steps",
            warmup,
            f"runs into the decay of schedule.name=wsd, the last {length - stable} of "
            f"{steps} (schedule.decay_fraction={schedule.decay_fraction}): use at most {stable}, "
            "or a smaller schedule.decay_fraction",
        )


def resolve(
    config: Config, *, num_workers: int, now: datetime, gpus_per_node: int | None = None
) -> Resolved:
    """Returns the configuration with all open settings filled in.

    These are degrees, micro-batch size, run name, and absolute paths (ranks may run elsewhere).
    `gpus_per_node` is what the machines have, as far as it is known. Raises ConfigError where so
    many workers can't run it.
    """
    check(config)
    config = in_steps(config)
    ranks_per_node = config.cluster.gpus_per_node or gpus_per_node or GPUS_PER_NODE
    topology = resolve_topology(
        config.parallel,
        world_size=num_workers,
        num_experts=config.model.num_experts,
        ffn_hidden_dim=config.model.ffn_hidden_dim,
        ranks_per_node=ranks_per_node,
    )
    train = config.train
    parts = topology.num_batch_ranks
    if train.global_batch_size % parts:
        lower = max(1, train.global_batch_size // parts) * parts
        raise ConfigError(
            "train.global_batch_size",
            train.global_batch_size,
            f"does not divide by the {parts} workers: use {lower} or {lower + parts}",
        )
    share = train.global_batch_size // parts
    open_settings = [
        name
        for name in ("reduce_gradients", "gather_weights")
        if getattr(config.parallel, name) == "auto"
    ]
    micro = train.micro_batch_size or _fitting_micro_batch(share, seq_len=train.seq_len)
    if share % micro:
        raise ConfigError(
            "train.micro_batch_size",
            micro,
            f"does not divide a worker's {share} sequences (train.global_batch_size="
            f"{train.global_batch_size} over {parts} workers): use one of "
            f"{divisors(share)}",
        )
    resolved = Resolved(
        **vars(config)
        | {
            "train": ResolvedTrain(**vars(train) | {"micro_batch_size": micro}),
            "parallel": ResolvedParallel(
                **vars(config.parallel)
                | {"expert_degree": topology.expert, "data_shard_degree": topology.data_shard}
                | {name: "micro_batch" for name in open_settings}
            ),
            "run": ResolvedRun(
                **vars(config.run)
                | {
                    "dir": str(persistent_folder(config.run.dir)),
                    "name": config.run.name or _new_name(config, now),
                    "extensions": {name: source_of(name) for name in _extensions(config)},
                }
            ),
            "data": ResolvedData(
                **vars(config.data)
                | {
                    "dir": resolved_dir(config.data),
                    "tokenizer": resolved_tokenizer(config.data.tokenizer),
                }
            ),
            "launch": ResolvedLaunch(**vars(config.launch) | {"num_workers": num_workers}),
            "cluster": ResolvedCluster(**vars(config.cluster) | {"gpus_per_node": ranks_per_node}),
        }
    )
    if not open_settings:
        return resolved
    fitting = fitting_communication(resolved, undecided=open_settings)
    parallel = replace(resolved.parallel, **fitting)  # type: ignore[arg-type]  # two strings
    return replace(resolved, parallel=parallel)


def refit(resolved: Resolved, num_workers: int) -> Resolved | None:
    """Returns a resolved configuration for fewer workers, None where so many can't run it.

    The global batch stays the same. Where possible, a worker holds no more of the weights than
    before: replicas are given up before shards. The expert degree is kept, or reduced to the
    largest one that divides the shards. Micro-batches stay as large as possible.
    """
    before, batch = resolved.parallel, resolved.train.global_batch_size
    if batch % num_workers:
        return None
    share, micro = batch // num_workers, resolved.train.micro_batch_size

    def memory(replicate: int) -> tuple[bool, int]:
        shard = num_workers // replicate
        return shard < before.data_shard_degree, abs(shard - before.data_shard_degree)

    def order(degrees: tuple[int, int]) -> tuple[bool, int, int, int]:
        replicate, expert = degrees
        return *memory(replicate), replicate, -expert

    for replicate, expert in sorted(degree_choices(num_workers), key=order):
        if expert > before.expert_degree:
            continue
        degrees = {
            "expert_degree": expert,
            "data_shard_degree": None,
            "data_replicate_degree": replicate,
            # Each rank holds more than before.
            "gather_weights": "auto",
            "reduce_gradients": "auto",
        }
        train = replace(
            resolved.train, micro_batch_size=max(d for d in divisors(share) if d <= micro)
        )
        parallel = ParallelSettings(**vars(before) | degrees)
        fitting = Config(**vars(resolved) | {"train": train, "parallel": parallel})
        try:
            return resolve(fitting, num_workers=num_workers, now=datetime.now())
        except ConfigError:
            continue
    return None


def _extensions(config: Config) -> list[str]:
    """Returns the modules whose code a run uses: those that it names, and those of what it uses.

    An installed package may register things without being named in `extensions`.
    """
    modules = list(config.extensions)
    for registry, setting, _ in SELECTED:
        given = attrgetter(setting)(config)
        for name in [given] if isinstance(given, str) else given:
            if (module := registry.module_of(name)) is not None:
                modules.append(module)
    return list(dict.fromkeys(modules))


def _fitting_micro_batch(share: int, *, seq_len: int) -> int:
    return max((n for n in divisors(share) if n * seq_len <= MICRO_BATCH_TOKENS), default=1)


def _new_name(config: Config, now: datetime) -> str:
    """Returns a timestamped name that no run in the folder has yet."""
    base = f"{now:%Y%m%d-%H%M%S}"
    taken = (f"{base}-{n}" for n in range(2, 10_000))
    names = [base, *taken]
    return next(n for n in names if not (persistent_folder(config.run.dir) / n).exists())
