"""The passes of a verification: what each trains, in which layouts, and within which bounds.

- layouts: SGD in float32. It sees a wrong scale, which Adam would divide out.
- optimizer: the user's own optimizer, step by step, one of them skipped.
- compute dtype: one step in the dtype that weights are gathered in on a GPU.

The first layout of each is one rank. It is compared with the float64 reference, the others with it.
"""

from dataclasses import dataclass, replace

import torch

from data_pipeline.quantities import binary_size
from moetrain.checks import ConfigError
from moetrain.lengths import in_steps, steps_of
from moetrain.optim import learning_rate
from moetrain.settings import Config, GroupsSettings, OptimSettings
from moetrain.verify.absolute import reference_rates
from moetrain.verify.layouts import REFERENCE, Layout, all_at_once, layouts_for, those_possible
from moetrain.verify.memory import GIB, available_gib, reference_gib
from moetrain.verify.reference.scope import unknown_settings
from moetrain.verify.settings import VerifySettings
from moetrain.verify.tolerance import (
    Tolerances,
    rounded_tolerances,
    summed_tolerances,
    tolerances,
)

LAYOUTS, OPTIMIZER, DTYPE = "layouts", "optimizer", "compute dtype"
NAMES = {"sgd": "SGD", "adamw": "AdamW"}


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One way to train the batches; the first of its layouts is what the others compare with."""

    name: str
    config: Config
    layouts: tuple[Layout, ...]
    left_out: tuple[tuple[Layout, ConfigError], ...]
    rates: tuple[float, ...]
    reference_rates: tuple[float, ...]
    """Those of the float64 reference: its own, unless the schedule is of an extension."""
    tolerances: Tolerances
    of_equal_terms: tuple[Layout, ...] = ()
    """Layouts that add up the first layout's numbers in another order, and round nothing else."""
    step_by_step: bool = False
    """Whether every step begins from the reference's weights and is compared by itself."""
    skipped_step: int | None = None

    @property
    def title(self) -> str:
        """What it trains, for the line above its table."""
        steps = f"{len(self.rates)} step{'s' if len(self.rates) > 1 else ''}"
        said = f"{steps} of {self.optimizer} in {self.dtype}"
        if self.skipped_step is not None:
            said += f"; the gradient of step {self.skipped_step + 1} is made infinite"
        return said

    @property
    def optimizer(self) -> str:
        """The optimizer's name for people."""
        return NAMES[self.config.optim.name]

    @property
    def dtype(self) -> str:
        """The name of the compute dtype."""
        return self.config.train.dtype

    def tolerances_of(self, layout: Layout) -> Tolerances:
        """Returns the bounds within which a layout must agree."""
        if layout in self.of_equal_terms:
            return summed_tolerances(self.config.model, num_terms=layout.num_ranks)
        return self.tolerances


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All passes of a verification, and what it doesn't cover, with the reason."""

    passes: tuple[Pass, ...]
    reference_refuses: tuple[str, ...]
    """The settings that the float64 reference can't compute; empty: it is compared with."""
    not_covered: tuple[str, ...]


def plan_passes(config: Config, settings: VerifySettings) -> Plan:
    """Returns the passes for a configuration; ConfigError where layouts can't be compared."""
    plain = comparable(config, lr=settings.lr)
    passes = [_layouts_pass(plain, settings)]
    not_covered = []
    name = config.optim.name
    known = name in NAMES and config.optim.groups == GroupsSettings()
    if known:
        passes.append(_optimizer_pass(plain, config.optim, settings))
    elif name in NAMES:
        not_covered.append(
            "optimizer pass: optim.groups is not the default, and the passes train all parameters "
            "alike (tests/parallel/test_layouts.py compares layouts with groups)"
        )
    else:
        not_covered.append(
            f"optimizer pass: optim.name={name}: how it passes rounding on is unknown"
        )
    if config.train.dtype == "float32":
        not_covered.append("compute-dtype pass: train.dtype=float32 is that of the other passes")
    else:
        passes.append(_dtype_pass(plain, settings))
    refused = tuple(unknown_settings(config if known else plain))
    if refused:
        not_covered.append(f"float64 reference: it can't compute {', '.join(refused)}")
    elif (needed := reference_gib(config)) > available_gib():
        refused = (f"train.seq_len={config.train.seq_len}",)
        not_covered.append(
            f"float64 reference: {refused[0]} needs {binary_size(needed * GIB)} of memory, for "
            "attention's whole matrix: lower it, or the model's size"
        )
    if config.schedule.name not in ("cosine", "wsd", "constant"):
        not_covered.append(f"schedule.name={config.schedule.name}: its rates are taken as they are")
    return Plan(passes=tuple(passes), reference_refuses=refused, not_covered=tuple(not_covered))


def comparable(config: Config, *, lr: float) -> Config:
    """Returns the user's model with settings that make layouts comparable: SGD, float32, CPU.

    Adam would hide a wrong scale, and bfloat16 any error below its rounding. Raises ConfigError for
    settings whose results differ between layouts by definition.
    """
    router = config.model.router
    if config.dry_run:
        raise ConfigError("dry_run", "true", "this command trains no run: leave it out")
    if router.load_balance_scope == "micro_batch" and router.load_balance_loss_weight > 0:
        raise ConfigError(
            "model.router.load_balance_scope",
            "micro_batch",
            "a balance loss over each micro-batch depends on the layout by its definition, so "
            "that layouts can't agree: verify with global_batch",
        )
    config = in_steps(config)
    values = {name: getattr(config, name) for name in Config.__dataclass_fields__}
    return replace(
        Config(**values),
        optim=OptimSettings(
            name="sgd",
            lr=lr,
            weight_decay=config.optim.weight_decay,
            clip_grad_norm=config.optim.clip_grad_norm,
        ),
        train=replace(config.train, dtype="float32"),
        run=replace(config.run, device="cpu", name="verify"),
    )


def schedule_steps(config: Config, count: int) -> tuple[int, ...]:
    """Returns steps of the run whose rates the passes take: from warm-up, middle and decay.

    They are in the middles of equal parts of the run, but the first one is in the warm-up's middle.
    """
    begin = config.schedule.restart_from or 0
    length = steps_of(config) - begin
    steps = [begin + (2 * part + 1) * length // (2 * count) for part in range(count)]
    if warmup := config.schedule.warmup_steps:
        steps[0] = begin + min(warmup // 2, steps[0] - begin)
    return tuple(steps)


def _rates(config: Config, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the rates of some steps by training's schedule, and by the reference's."""
    steps, num_steps = schedule_steps(config, count), steps_of(config)
    peak, schedule = config.optim.lr, config.schedule
    rates = tuple(
        learning_rate(step, peak=peak, num_steps=num_steps, settings=schedule) for step in steps
    )
    own = reference_rates(steps, optim=config.optim, schedule=schedule, num_steps=num_steps)
    return rates, own or rates


def _layouts_pass(plain: Config, settings: VerifySettings) -> Pass:
    layouts, left_out = layouts_for(plain, num_ranks=settings.num_ranks)
    rates, reference = _rates(plain, settings.num_steps)
    return Pass(
        name=LAYOUTS,
        config=plain,
        layouts=tuple(layouts),
        left_out=tuple(left_out),
        rates=rates,
        reference_rates=reference,
        tolerances=_tolerances(plain),
    )


def _optimizer_pass(plain: Config, optim: OptimSettings, settings: VerifySettings) -> Pass:
    config = replace(plain, optim=optim)
    wide = all_at_once(config, num_ranks=settings.num_ranks)
    layouts, left_out = those_possible(config, [REFERENCE, wide])
    rates, reference = _rates(config, settings.num_steps)
    return Pass(
        name=OPTIMIZER,
        config=config,
        layouts=tuple(layouts),
        left_out=tuple(left_out),
        rates=rates,
        reference_rates=reference,
        tolerances=_tolerances(config),
        step_by_step=True,
        skipped_step=1 if len(rates) > 1 else None,
    )


def _dtype_pass(plain: Config, settings: VerifySettings) -> Pass:
    config = replace(plain, train=replace(plain.train, dtype="bfloat16"))
    ranks = min(2, settings.num_ranks)
    # As many micro-batches on one rank as ranks with one each: the same sequences together, hence
    # the same bits, until they are added up.
    first, spread = Layout(num_micro_batches=ranks), Layout(num_ranks=ranks)
    wanted = [first]
    if ranks > 1:
        wanted.append(spread)
        if config.model.is_moe:
            wanted.append(Layout(num_ranks=ranks, expert_degree=ranks))
    layouts, left_out = those_possible(config, wanted)
    if first not in layouts:
        layouts = [REFERENCE, *layouts]
    rates, reference = _rates(config, settings.num_steps)
    return Pass(
        name=DTYPE,
        config=config,
        layouts=tuple(layouts),
        left_out=tuple(left_out),
        rates=rates[:1],
        reference_rates=reference[:1],
        tolerances=rounded_tolerances(config.model, torch.bfloat16),
        of_equal_terms=(spread,) if first in layouts else (),
    )


def _tolerances(config: Config) -> Tolerances:
    train = config.train
    return tolerances(
        config.model, seq_len=train.seq_len, num_tokens=train.global_batch_size * train.seq_len
    )
