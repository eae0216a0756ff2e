"""The closing lines of a command: the result of the run, and what to type next."""

import os
import shlex
from array import array
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from data_pipeline import ShardFolder
from data_pipeline.commands.shell import as_typed, text_setting
from data_pipeline.quantities import duration
from launch.external import external_rank
from moetrain.observe import Account, FinalLoss, iterate_numbers, run_account
from moetrain.settings import Resolved
from moetrain.train.control import Outcome
from moetrain.train.resume import training_on

TRIAL_VARIABLE = "MOETRAIN_TRIAL"  # set for the command of a sweep's trial

WORTH_TELLING_SECONDS = 600.0  # runs at least this long print their effective time


def closing_lines(
    config: Resolved, outcome: Outcome, shards: ShardFolder, run_dir: Path
) -> Iterator[str]:
    known, training, speeds = dict[str, Any](), FinalLoss(), array("d")
    for record in iterate_numbers(run_dir / "metrics.jsonl"):
        known |= record
        training.add(record)
        if speed := record.get("perf/tokens_per_second"):
            speeds.append(speed)
    known |= outcome.last
    if not outcome.finished:
        yield f"stopped   at step {outcome.step} of {config.train.num_steps}, saved"
    if "validation/loss" in known:
        yield f"loss      {known['validation/loss']:.3f} nats/token on held-out text"
    elif (loss := training.value) is not None:
        yield f"loss      {loss:.3f} nats/token in training, over the last tenth of the steps"
    for source, baselines in shards.baselines.items():
        if bits := known.get(f"validation/{source}/bits_per_byte"):
            bigram, zlib = baselines.byte_bigram_bits_per_byte, baselines.zlib_bits_per_byte
            beside = [
                f"{name} {figure:.2f}"
                for name, figure in (("a byte-bigram model has", bigram), ("zlib level 9", zlib))
                if figure
            ]
            yield f"          {bits:.3f} bits per byte of {source}; {', '.join(beside)}"
    if speeds:
        yield f"speed     {median(speeds):,.0f} tokens/s (median)"
    if line := effective_line(run_account(run_dir)):
        yield line
    name = text_setting("run.name", config.run.name)
    if run_dir.is_relative_to(Path.cwd()):
        run_dir = run_dir.relative_to(Path.cwd())
    yield f"run       {run_dir}"
    opened = f"open {shlex.quote(str(run_dir / 'report.html'))}"
    if TRIAL_VARIABLE in os.environ:  # the user typed the sweep's command, not the trial's
        yield f"next      {opened if outcome.finished else 'the same sweep resumes from here'}"
    elif outcome.finished:
        more = training_on(config, step=outcome.step)
        line = f"next      {opened}; train on with {name} {more}"
        yield f"{line}; or try {sweep_to_try(config)}" if _may_be_swept(config) else line
    else:
        yield f"next      the same command with {name} resumes from here"


def _may_be_swept(config: Resolved) -> bool:
    """Returns whether a run's command can become a sweep: it starts a new run and isn't a
    launcher's rank."""
    begins_anew = config.schedule.restart_from or config.optim.restart_from
    return not begins_anew and external_rank(os.environ) is None


def sweep_to_try(config: Resolved) -> str:
    """Returns the arguments that turn a run's command into a sweep its other settings allow."""
    model, router = config.model, config.model.router
    half = model.num_experts // 2
    # Half as many must still fill the groups, allow top-k, and fit the same ranks.
    halves = (
        model.num_experts % (2 * router.num_groups) == 0
        and half // router.num_groups * router.top_groups >= model.top_k
        and half % config.parallel.expert_degree == 0
    )
    experts = (half if halves else 4 * model.num_experts, 2 * model.num_experts)
    rates = (config.optim.lr / 2, config.optim.lr * 2)
    key, values = ("model.num_experts", experts) if model.is_moe else ("optim.lr", rates)
    words = f"-m {key}={','.join(f'{value:g}' for value in sorted(values))}"
    name = config.run.name
    is_one = as_typed(name, swept=True) == as_typed(name)
    return words if is_one else f"{words} {text_setting('run.name', name, swept=True)}"


def effective_line(account: Account | None) -> str | None:
    """Returns the run's effective training time, if much time or any work was lost."""
    if account is None or account.effective is None:
        return None
    if account.wall < WORTH_TELLING_SECONDS and not account.interruptions:
        return None
    line = f"effective {account.effective:.1%} of {duration(account.wall)} in steps that count"
    if number := account.interruptions:
        many = "1 interruption" if number == 1 else f"{number} interruptions"
        line += f"; {many} cost {duration(account.lost)}"
    return line
