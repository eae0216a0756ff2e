"""Makes an arm of a comparison as large as another: an exact search over what a model costs.

Pure: settings in, a setting out. Where the target's settings come from is `composing`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from data_pipeline.quantities import count
from moetrain.checks import ConfigError
from moetrain.lengths import flops_per_token, in_steps, steps_of
from moetrain.model.cost import active_parameters, total_parameters
from moetrain.settings import Config

_NAMES = {
    "active_parameters": "active parameters",
    "total_parameters": "parameters",
    "flops_per_token": "FLOPs a token",
    "training_flops": "FLOPs of training",
}
_DEFAULT_MULTIPLES = {"ffn_hidden_dim": 8}  # whole 16 bytes in bfloat16


@dataclass(frozen=True, kw_only=True)
class Match:
    """What a match comes to."""

    setting: str | None
    """The setting that was worked out: `model.ffn_hidden_dim`; None: the arm is equal as it is."""
    value: int
    outcome: str
    """How near it comes, for people."""


def measure(config: Config, by: str) -> float:
    """Returns one of `MEASURES` of a configuration that is in steps."""
    if by == "active_parameters":
        return active_parameters(config.model)
    if by == "total_parameters":
        return total_parameters(config.model)
    if by == "flops_per_token":
        return flops_per_token(config)
    positions = steps_of(config) * config.train.global_batch_size * config.train.seq_len
    return flops_per_token(config) * positions


def matched(arm: Config, target: Config) -> Match:
    """Returns the setting with which an arm comes nearest to a target by `arm.match`.

    Raises ConfigError where none comes within the tolerance.
    """
    settings, arm, target = arm.match, in_steps(arm), in_steps(target)
    if settings.solve == "num_steps" and settings.by != "training_flops":
        raise ConfigError(
            "match.solve",
            "num_steps",
            f"changes nothing of match.by={settings.by}: use match.by=training_flops, or another "
            "match.solve",
        )
    wanted = measure(target, settings.by)
    if measure(arm, settings.by) == wanted:
        outcome = f"{count(wanted)} {_NAMES[settings.by]}, as {settings.to} has"
        return Match(setting=None, value=0, outcome=outcome)
    setting = f"{'train' if settings.solve == 'num_steps' else 'model'}.{settings.solve}"
    multiple = settings.multiple_of or _DEFAULT_MULTIPLES.get(settings.solve, 1)

    def of(number: int) -> float:
        return measure(_with(arm, setting, number * multiple), settings.by)

    least = 1
    if settings.solve == "num_layers" and arm.model.is_moe:
        least += arm.model.num_dense_layers // multiple
    lower = largest_below(of, wanted, least=least)
    near = sorted([lower, lower + 1], key=lambda number: abs(of(number) - wanted))
    told = [f"{setting}={n * multiple} gives {_told(of(n), wanted, settings.by)}" for n in near]
    if abs(of(near[0]) - wanted) > settings.tolerance * wanted:
        multiples = f" that is a multiple of {multiple}" if multiple > 1 else ""
        is_too_coarse = multiple > 1 and measure(_with(arm, setting, 1), settings.by) <= wanted
        finer = "a smaller match.multiple_of, " if is_too_coarse else ""
        raise ConfigError(
            "match.to",
            settings.to,
            f"has {count(wanted)} {_NAMES[settings.by]}, and no {setting}{multiples} "
            f"comes within match.tolerance={settings.tolerance:g} of that: {told[0]}, "
            f"and {told[1]}: use {finer}a larger match.tolerance, another match.solve, or change "
            "the arm's other sizes",
        )
    return Match(setting=setting, value=near[0] * multiple, outcome=f"{told[0]} {settings.to}'s")


def largest_below(of: Callable[[int], float], wanted: float, *, least: int) -> int:
    """Returns the largest number from `least` on at which an increasing function is not above.

    `least` itself where it is above already.
    """
    if of(least) > wanted:
        return least
    lower, upper = least, 2 * least
    while of(upper) <= wanted:
        lower, upper = upper, 2 * upper
    while upper - lower > 1:
        middle = (lower + upper) // 2
        lower, upper = (middle, upper) if of(middle) <= wanted else (lower, middle)
    return lower


def _with(config: Config, setting: str, value: int) -> Config:
    group, _, name = setting.partition(".")
    changed: Config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return changed


def _told(found: float, wanted: float, by: str) -> str:
    """Returns a figure and its distance: `1.05 M active parameters, 0.3% below the 1.05 M of`."""
    off = (found - wanted) / wanted
    side = f"{abs(off):.2%} {'above' if off > 0 else 'below'}" if off else "exactly"
    return f"{count(found)} {_NAMES[by]}, {side}"
