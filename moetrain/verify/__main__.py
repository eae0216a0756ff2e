"""`python -m moetrain.verify +model=toy`: do layouts of a model train alike? One table, or JSON.

Owns the command: progress, what is printed and exit codes. Leaves what is trained to `passes.py`,
what is compared to `trial.py` and the processes to `ranks.py`.
"""

import json
import sys
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from data_pipeline import DataError
from moetrain.checks import ConfigError
from moetrain.command import config_dir, run_command
from moetrain.config import check
from moetrain.exit_codes import BAD_CONFIGURATION, DONE, FAILED
from moetrain.settings import Config
from moetrain.verify.batches import global_batches
from moetrain.verify.execution import run_passes
from moetrain.verify.memory import require_memory
from moetrain.verify.passes import Plan, plan_passes
from moetrain.verify.result import PassResult, pass_as_json, table
from moetrain.verify.settings import VerifySettings


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class VerifyConfig(Config):
    """All settings of training, and those of the verification."""

    verify: VerifySettings = VerifySettings()


def verify(config: VerifyConfig) -> int:
    """Verifies a configuration and prints what was found; returns the exit code."""
    settings = config.verify
    try:
        plan = plan_passes(config, settings)
        plain = plan.passes[0].config
        check(plain)
        layouts = [layout for part in plan.passes for layout in part.layouts]
        require_memory(plain, num_ranks=max(layout.num_ranks for layout in layouts))
        batches, text = global_batches(plain, num_steps=settings.num_steps)
        say = _say if config.observe.progress != "off" else _say_nothing
        found = run_passes(plan, batches, settings=settings, say=say)
    except (ConfigError, DataError) as error:
        print(f"moetrain.verify: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    except OSError as error:
        print(f"moetrain.verify: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nmoetrain.verify: interrupted", file=sys.stderr)
        return FAILED
    passed = all(part.passed for part in found)
    tokens = [int(batch.loss_mask.sum()) for batch in batches]
    if settings.format == "json":
        print(json.dumps(_as_json(plan, found, text=text, tokens=tokens), allow_nan=False))
        return DONE if passed else FAILED
    print(
        f"{text}; {plain.train.global_batch_size} sequences of {plain.train.seq_len}, "
        f"{tokens[0]:,} of {batches[0].tokens.size:,} tokens valid; seed {plain.seed}"
    )
    for part in found:
        print(f"\n{part.part.name}: {part.part.title}\n\n{table(part)}")
    for line in _notes(plan, found):
        print(line)
    return DONE if passed else FAILED


def _as_json(plan: Plan, found: list[PassResult], *, text: str, tokens: list[int]) -> Any:
    passes = [pass_as_json(part) for part in found]
    layouts = passes[0]
    return {
        "passed": all(part.passed for part in found),
        "text": text,
        "tokens_a_step": tokens,
        "dtype": layouts["dtype"],
        "optimizer": layouts["optimizer"],
        "lr": found[0].part.config.optim.lr,
        "layouts": layouts["layouts"],
        "left_out": layouts["left_out"],
        "passes": passes,
        "covers": [_covered(part) for part in found],
        "not_covered": list(plan.not_covered),
    }


def _covered(found: PassResult) -> str:
    """Returns what a pass compared, as one line."""
    part, number = found.part, len(found.results)
    layouts = f"{number} layout{'s' if number > 1 else ''}"
    exact = ", and a float64 reference" if found.exact else ""
    return f"{part.name}: {part.title}; {layouts}{exact}"


def _notes(plan: Plan, found: list[PassResult]) -> list[str]:
    """Returns the notes below the tables: failures in full, near-ties, what isn't covered."""
    lines = ["", "Differences are relative; ! is more than rounding explains (docs/verify.md)."]
    if ties := sum(result.near_ties for part in found for result in part.results):
        lines.append(
            f"{ties} choices of experts were near-ties that rounding alone decides; they were "
            "decided as in the reference."
        )
    for part in found:
        for layout, error in part.part.left_out:
            lines.append(f"left out  {part.part.name}: {layout}: {error}")
    lines += [f"left out  {reason}" for reason in plan.not_covered]
    lines += [f"covered   {_covered(part)}" for part in found]
    for part in found:
        if part.error:
            lines.append(f"FAIL      {part.part.name}: {part.error}")
        for result in part.results:
            for failure in result.failures:
                lines.append(f"FAIL      {part.part.name}: {result.layout}: {failure}")
    results = [result for part in found for result in part.results]
    failed = sum(not result.passed for result in results)
    if all(part.passed for part in found):
        exact = ", and as the float64 reference" if all(part.exact for part in found) else ""
        lines.append(f"pass      all {len(results)} layouts train alike{exact}")
    else:
        lines.append(f"FAIL      {failed} of {len(results)} layouts")
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
