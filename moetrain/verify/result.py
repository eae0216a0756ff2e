"""What a verification found, layout by layout: pass or fail, as a table and as one JSON object."""

import math
from dataclasses import dataclass
from typing import Any

from moetrain.verify.comparison import KINDS, Difference, worst
from moetrain.verify.layouts import Layout, as_plain
from moetrain.verify.trial import Measured

COLUMNS = ("loss", "grad_norm", *KINDS, "weights")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One layout: what its ranks measured, or the error that ended them."""

    layout: Layout
    ranks: tuple[Measured, ...] = ()
    error: str | None = None
    seconds: float = 0.0

    @property
    def differences(self) -> dict[str, Difference]:
        """The worst of all ranks by column, without columns that the model doesn't have."""
        found: dict[str, Difference] = {}
        for column in COLUMNS:
            of_ranks = [m.differences[column] for m in self.ranks if column in m.differences]
            if largest := worst(of_ranks):
                found[column] = largest
        return found

    @property
    def failures(self) -> list[str]:
        """The disagreements with the reference, one sentence each; empty if it passes."""
        if self.error:
            return [self.error]
        failures = [
            f"{column}: {found.where} is off by {found.relative:.1e}, where rounding explains "
            f"{found.allowed:.1e}"
            for column, found in self.differences.items()
            if not found.passes
        ]
        if len({rank.digest for rank in self.ranks}) > 1:
            failures.append("weights: they differ between ranks after the last step")
        figures = [f for rank in self.ranks for f in (*rank.losses, *rank.grad_norms)]
        if not all(math.isfinite(figure) for figure in figures):
            failures.append("loss: it or the gradient norm is not finite: lower verify.lr")
        return failures

    @property
    def passed(self) -> bool:
        """Whether everything agrees with the reference."""
        return not self.failures

    @property
    def near_ties(self) -> int:
        """Choices that differ by rounding alone, over all ranks."""
        return sum(rank.near_ties for rank in self.ranks)


def table(results: list[Result]) -> str:
    """Returns the results as one table; what fails is marked with an exclamation mark."""
    head = [
        "ranks", "expert", "shard", "replicate", "micro-batches", "recompute",
        "loss", "grad norm", "dense", "router", "experts", "weights", "",
    ]  # fmt: skip
    rows = [head, *(_row(result) for result in results)]
    limits = {c: [r.differences[c].allowed for r in results if c in r.differences] for c in COLUMNS}
    if any(limits.values()):
        shown = [f"{max(limits[c]):.1e}" if limits[c] else "–" for c in COLUMNS]
        rows.append(["allowed", *[""] * 5, *shown, ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    rule = "─" * len(lines[0])
    lines.insert(1, rule)
    if any(limits.values()):
        lines.insert(-1, rule)
    return "\n".join(line.rstrip() for line in lines)


def _row(result: Result) -> list[str]:
    layout, found = result.layout, result.differences
    degrees = [
        layout.num_ranks, layout.expert_degree, layout.data_shard_degree,
        layout.data_replicate_degree, layout.num_micro_batches,
    ]  # fmt: skip
    row = [*map(str, degrees), "yes" if layout.recompute == "full" else "no"]
    if not result.ranks:
        return [*row, *["–"] * len(COLUMNS), "FAIL: error"]
    first = result.ranks[0]
    figures = {"loss": f"{first.losses[-1]:.7f}", "grad_norm": f"{first.grad_norms[-1]:.7f}"}
    for column in COLUMNS:
        cell = figures.get(column, "–")
        if column in found:
            cell = figures.get(column, f"{found[column].relative:.1e}")
            cell += "" if found[column].passes else " !"
        row.append(cell)
    if not found:
        return [*row, "reference" if result.passed else "FAIL"]
    return [*row, "pass" if result.passed else "FAIL"]


def as_json(result: Result) -> dict[str, Any]:
    """Returns a result as JSON values; what is not finite is null."""
    first = result.ranks[0] if result.ranks else None
    return {
        "layout": as_plain(result.layout),
        "passed": result.passed,
        "failures": result.failures,
        "losses": [_finite(x) for x in first.losses] if first else [],
        "grad_norms": [_finite(x) for x in first.grad_norms] if first else [],
        "differences": {
            column: {
                "relative": _finite(found.relative),
                "allowed": found.allowed,
                "where": found.where,
            }
            for column, found in result.differences.items()
        },
        "near_ties": result.near_ties,
        "seconds": round(result.seconds, 2),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
