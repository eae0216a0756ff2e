"""What a verification found, layout by layout: pass or fail, as a table and as one JSON object."""

import math
from dataclasses import dataclass
from typing import Any

from moetrain.verify.comparison import KINDS, Difference, worst
from moetrain.verify.layouts import Layout, as_plain
from moetrain.verify.passes import Pass
from moetrain.verify.trial import Measured

COLUMNS = ("loss", "grad_norm", *KINDS, "weights", "state")
HEADS = ("loss", "grad norm", *KINDS, "weights", "state")


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
        if again := sorted({layer for rank in self.ranks for layer in rank.chosen_again}):
            failures.append(
                "routing: the backward pass chose experts again, in layers "
                f"{', '.join(map(str, again))}"
            )
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


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """What one pass found, in all its layouts."""

    part: Pass
    results: tuple[Result, ...]
    exact: bool
    """Whether the first layout was compared with the float64 reference."""
    error: str | None = None
    """Why the float64 reference failed."""

    @property
    def passed(self) -> bool:
        """Whether everything agrees."""
        return self.error is None and all(result.passed for result in self.results)


def table(found: PassResult) -> str:
    """Returns a pass as one table; what fails is marked with an exclamation mark."""
    results = found.results
    limits = {c: [r.differences[c].allowed for r in results if c in r.differences] for c in COLUMNS}
    shown = [c for c in COLUMNS if c != "state" or limits[c]]
    head = [
        "ranks", "expert", "shard", "replicate", "micro-batches", "recompute", "exchange",
        *(HEADS[COLUMNS.index(c)] for c in shown), "",
    ]  # fmt: skip
    rows = [head, *(_row(r, shown, first=r is results[0], exact=found.exact) for r in results)]
    if any(limits.values()):
        cells = [f"{max(limits[c]):.1e}" if limits[c] else "–" for c in shown]
        rows.append(["allowed", *[""] * 6, *cells, ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    rule = "─" * len(lines[0])
    lines.insert(1, rule)
    if any(limits.values()):
        lines.insert(-1, rule)
    return "\n".join(line.rstrip() for line in lines)


def _row(result: Result, columns: list[str], *, first: bool, exact: bool) -> list[str]:
    layout, found = result.layout, result.differences
    degrees = [
        layout.num_ranks, layout.expert_degree, layout.data_shard_degree,
        layout.data_replicate_degree, layout.num_micro_batches,
    ]  # fmt: skip
    row = [*map(str, degrees), "yes" if layout.recompute == "full" else "no"]
    row.append("–" if layout.expert_degree == 1 else layout.exchange or "as set")
    if not result.ranks:
        return [*row, *["–"] * len(columns), "FAIL: error"]
    rank = result.ranks[0]
    figures = {"loss": f"{rank.losses[-1]:.7f}", "grad_norm": f"{rank.grad_norms[-1]:.7f}"}
    for column in columns:
        cell = figures.get(column, "–")
        if column in found:
            cell = figures.get(column, f"{found[column].relative:.1e}")
            cell += "" if found[column].passes else " !"
        row.append(cell)
    said = "pass"
    if first:
        said = "pass, reference" if exact else "reference"
    return [*row, said if result.passed else "FAIL"]


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


def pass_as_json(found: PassResult) -> dict[str, Any]:
    """Returns a pass as JSON values."""
    part = found.part
    return {
        "name": part.name,
        "passed": found.passed,
        "optimizer": part.config.optim.name,
        "dtype": part.dtype,
        "rates": list(part.rates),
        "skipped_step": part.skipped_step,
        "float64_reference": found.exact,
        "reference_error": found.error,
        "layouts": [as_json(result) for result in found.results],
        "left_out": [{"layout": str(la), "reason": str(error)} for la, error in part.left_out],
    }
