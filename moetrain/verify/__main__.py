"""`python -m moetrain.verify +model=toy`: do layouts of a model train alike? One table, or JSON.

Owns the command: its settings, what is refused, progress and exit codes. Leaves what is compared
to `trial.py` and the processes to `ranks.py`.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from data_pipeline import DataError
from moetrain.checks import ConfigError
from moetrain.command import config_dir, run_command
from moetrain.config import check
from moetrain.exit_codes import BAD_CONFIGURATION, DONE, FAILED
from moetrain.settings import Config, OptimSettings
from moetrain.verify.batches import global_batches
from moetrain.verify.layouts import REFERENCE, Layout, layouts_for
from moetrain.verify.memory import require_memory
from moetrain.verify.ranks import RankFailed, run_ranks
from moetrain.verify.result import Result, as_json, table
from moetrain.verify.settings import VerifySettings
from moetrain.verify.tolerance import tolerances
from moetrain.verify.trial import Trial, run_trial, write_batches


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class VerifyConfig(Config):
    """All settings of training, and those of the verification."""

    verify: VerifySettings = VerifySettings()


def verify(config: VerifyConfig) -> int:
    """Verifies a configuration and prints what was found; returns the exit code."""
    settings = config.verify
    try:
        plain = _comparable(config)
        layouts, left_out = layouts_for(plain, num_ranks=settings.num_ranks)
        require_memory(plain, num_ranks=max(layout.num_ranks for layout in layouts))
        batches, text = global_batches(plain, num_steps=settings.num_steps)
        say = _say if config.observe.progress != "off" else _say_nothing
        with tempfile.TemporaryDirectory(
            prefix="moetrain-verify-", ignore_cleanup_errors=True
        ) as folder:
            write_batches(Path(folder), batches)
            results = _try_all(plain, settings, layouts, folder=Path(folder), say=say)
    except (ConfigError, DataError) as error:
        print(f"moetrain.verify: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    except OSError as error:
        print(f"moetrain.verify: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nmoetrain.verify: interrupted", file=sys.stderr)
        return FAILED
    passed = all(result.passed for result in results)
    tokens = [int(batch.loss_mask.sum()) for batch in batches]
    if settings.format == "json":
        found = {
            "passed": passed,
            "text": text,
            "tokens_a_step": tokens,
            "dtype": "float32",
            "optimizer": "sgd",
            "lr": settings.lr,
            "layouts": [as_json(result) for result in results],
            "left_out": [{"layout": str(la), "reason": str(error)} for la, error in left_out],
        }
        print(json.dumps(found, allow_nan=False))
        return DONE if passed else FAILED
    print(
        f"{settings.num_steps} steps of SGD in float32 on {text}; "
        f"{plain.train.global_batch_size} sequences of {plain.train.seq_len}, "
        f"{tokens[0]:,} of {batches[0].tokens.size:,} tokens valid; seed {plain.seed}\n"
    )
    print(table(results))
    for line in _notes(results, left_out):
        print(line)
    return DONE if passed else FAILED


def _comparable(config: VerifyConfig) -> Config:
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
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
    optim = OptimSettings(
        name="sgd",
        lr=config.verify.lr,
        weight_decay=0.0,
        clip_grad_norm=config.optim.clip_grad_norm,
    )
    plain = replace(
        Config(**values),
        optim=optim,
        train=replace(config.train, dtype="float32"),
        run=replace(config.run, device="cpu", name="verify"),
    )
    check(plain)
    return plain


def _try_all(
    config: Config,
    settings: VerifySettings,
    layouts: list[Layout],
    *,
    folder: Path,
    say: Callable[[str], None],
) -> list[Result]:
    """Tries the reference and then every other layout; without a reference there is no other."""
    results = []
    limits = tolerances(
        config.model,
        seq_len=config.train.seq_len,
        num_tokens=config.train.global_batch_size * config.train.seq_len,
    )
    # As many in every layout: with a thread for each core, one rank alone would spend its time
    # waiting for a core that something else is busy on.
    num_threads = max(1, len(os.sched_getaffinity(0)) // settings.num_ranks)
    for number, layout in enumerate(layouts, 1):
        head = f"[{number}/{len(layouts)}] {layout}"
        say(head)
        started = time.monotonic()
        trial = Trial(
            config=layout.of(config),
            folder=folder,
            num_steps=settings.num_steps,
            tolerances=limits,
            is_reference=layout == REFERENCE,
            timeout_seconds=settings.timeout_seconds,
        )
        try:
            ranks = run_ranks(
                run_trial,
                trial,
                num_ranks=layout.num_ranks,
                num_threads=num_threads,
                timeout_seconds=settings.timeout_seconds,
                on_step=lambda step, head=head: say(  # type: ignore[misc]
                    f"{head}: step {step + 1} of {settings.num_steps}"
                ),
            )
            result = Result(layout=layout, ranks=tuple(ranks))
        except RankFailed as error:
            result = Result(layout=layout, error=str(error))
        result = replace(result, seconds=time.monotonic() - started)
        say(f"{head}: {'agrees' if result.passed else 'FAILS'}, {result.seconds:.1f} s\n")
        results.append(result)
        if layout == REFERENCE and not result.passed:
            break
    return results


def _notes(results: list[Result], left_out: list[tuple[Layout, ConfigError]]) -> list[str]:
    """Returns the notes below the table: failures in full, near-ties, layouts left out."""
    lines = ["", "Differences are relative; ! is more than rounding explains (docs/verify.md)."]
    if ties := sum(result.near_ties for result in results):
        lines.append(
            f"{ties} choices of experts were near-ties that rounding alone decides; they were "
            "decided as in the reference."
        )
    for layout, error in left_out:
        lines.append(f"left out  {layout}: {error}")
    for result in results:
        for failure in result.failures:
            lines.append(f"FAIL      {result.layout}: {failure}")
    passed = sum(result.passed for result in results)
    if passed == len(results):
        lines.append(f"pass      all {passed} layouts train alike")
    else:
        lines.append(f"FAIL      {len(results) - passed} of {len(results)} layouts")
    return lines


def _say(text: str) -> None:
    """Shows progress: in place on a terminal, else a line for each layout."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
    elif text.endswith("\n"):
        print(text, end="", file=sys.stderr, flush=True)


def _say_nothing(_: str) -> None:
    pass


if __name__ == "__main__":
    run_command(
        verify,
        tree=VerifyConfig,
        module="moetrain.verify",
        files=config_dir(),
        config_name="verify",
        check=check,
    )
