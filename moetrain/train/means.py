"""Means over the steps since the last record; a checkpoint can hold them.

Owns which figures of a step are averaged, and with which weights. Everything else in a record is a
total, a figure of the step at which it is written, or a mean over the time since the last record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moetrain.train.step_report import StepReport


@dataclass
class RunningMeans:
    """Means over the steps since the last record, by the metrics' names; plain JSON.

    A figure that is a mean over tokens is weighted by the step's tokens, so that the result is a
    mean over the tokens of all the steps; other figures count once per step. Skipped steps don't
    count. The mean over a single step is bit-equal to the step's value.
    """

    steps: int = 0
    tokens: int = 0
    over_tokens: dict[str, float] = field(default_factory=dict)
    over_steps: dict[str, float] = field(default_factory=dict)
    source_tokens: dict[str, int] = field(default_factory=dict)
    over_sources: dict[str, float] = field(default_factory=dict)
    """Means over the tokens of each source."""

    def add(self, report: StepReport, *, source_tokens: Mapping[str, int] | None = None) -> None:
        """Adds a step's figures, unless it was skipped.

        `source_tokens` are its tokens by source, in the order of the report's sums.
        """
        if report.skipped:
            return
        for (source, tokens), nats in zip(
            (source_tokens or {}).items(), report.source_nats, strict=True
        ):
            if tokens:
                self.source_tokens[source] = self.source_tokens.get(source, 0) + tokens
                share = tokens / self.source_tokens[source]
                own = {f"train/{source}/cross_entropy": nats / tokens}
                _move(self.over_sources, own, share=share)
        self.steps += 1
        self.tokens += report.num_tokens
        _move(self.over_tokens, _of_tokens(report), share=report.num_tokens / self.tokens)
        _move(self.over_steps, _of_step(report), share=1 / self.steps)

    def values(self, last: StepReport) -> dict[str, float]:
        """Returns the means; those of the last step alone where all steps were skipped.

        A source without a token in a step that counts has none.
        """
        alone = {**_of_tokens(last), **_of_step(last)}
        return {**alone, **self.over_tokens, **self.over_steps, **self.over_sources}


def _of_tokens(report: StepReport) -> dict[str, float]:
    """Returns the figures that are means over a step's tokens."""
    figures = {"train/loss": report.loss, "train/cross_entropy": report.cross_entropy}
    if report.head_z_loss is not None:
        figures["train/z_loss"] = report.head_z_loss
    if _has_routers(report):
        figures |= {
            "router/load_balance_loss": report.load_balance_loss,
            "router/z_loss": report.z_loss,
            "router/entropy": report.entropy,
        }
    return figures


def _of_step(report: StepReport) -> dict[str, float]:
    """Returns the figures that count once per step."""
    figures = {"optim/grad_norm": report.grad_norm}
    figures |= {f"optim/grad_norm/{role}": norm for role, norm in report.grad_norms.items()}
    if report.clip_factor is not None:
        figures["optim/clip_factor"] = report.clip_factor
        figures["optim/clipped_share"] = float(report.clip_factor < 1)
    if _has_routers(report):
        figures["router/max_violation"] = max_violation(report.expert_counts)
        figures["router/dead_experts_mean"] = float(dead_experts(report.expert_counts))
    return figures


def _has_routers(report: StepReport) -> bool:
    return len(report.expert_counts) > 0


def max_violation(expert_counts: Tensor) -> float:
    """Returns (max - mean) / mean of the experts' loads, of the layer in which it is largest."""
    total = expert_counts.sum(1).clamp_min(1)  # none where no token counted
    mean = total / expert_counts.shape[1]
    return float(((expert_counts.amax(1) - mean) / mean).max().item())


def dead_experts(expert_counts: Tensor) -> int:
    """Returns how many experts, over all layers, have no assignment."""
    return int((expert_counts == 0).sum().item())


def _move(means: dict[str, float], values: Mapping[str, float], *, share: float) -> None:
    """Updates means with the values of another step, whose weight is `share`."""
    for name, value in values.items():
        # A figure that a resumed run has not had before begins with its first value.
        before = means.get(name)
        means[name] = value if before is None else before + share * (value - before)
