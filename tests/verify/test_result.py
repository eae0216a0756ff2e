"""What counts as a failure, and how the table and the JSON object say so."""

import json
from math import inf, nan

from moetrain.verify.comparison import Difference
from moetrain.verify.layouts import Layout
from moetrain.verify.result import Result, as_json, table
from moetrain.verify.trial import Measured


def measured(*, loss: float = 2.0, digest: str = "same", **off: float) -> Measured:
    differences = {
        column: Difference(relative=off.get(column, 0.0), allowed=1e-4, where=f"a {column}")
        for column in ("loss", "grad_norm", "dense", "experts", "weights")
    }
    return Measured(
        losses=[loss], grad_norms=[1.0], differences=differences, near_ties=0, digest=digest
    )


def test_a_difference_on_any_rank_fails_the_layout_and_is_marked() -> None:
    result = Result(layout=Layout(num_ranks=2), ranks=(measured(), measured(experts=0.5)))
    assert result.failures == [
        "experts: a experts is off by 5.0e-01, where rounding explains 1.0e-04"
    ]
    (row,) = [line for line in table([result]).splitlines() if "FAIL" in line]
    assert row.split()[-6:] == ["0.0e+00", "–", "5.0e-01", "!", "0.0e+00", "FAIL"]


def test_ranks_that_hold_other_bits_fail_though_rounding_would_explain_it() -> None:
    result = Result(layout=Layout(num_ranks=2), ranks=(measured(), measured(digest="other")))
    assert [f.split(":")[0] for f in result.failures] == ["weights"]


def test_what_is_not_finite_fails_and_is_null_in_json() -> None:
    result = Result(layout=Layout(), ranks=(measured(loss=nan, dense=inf),))
    found = json.loads(json.dumps(as_json(result), allow_nan=False))
    assert not found["passed"]
    assert found["losses"] == [None]
    assert found["differences"]["dense"]["relative"] is None
    assert {f.split(":")[0] for f in found["failures"]} == {"loss", "dense"}


def test_a_rank_that_failed_stands_in_the_table_and_tells_why() -> None:
    result = Result(layout=Layout(num_ranks=2), error="rank 1 of 2: died")
    assert result.failures == ["rank 1 of 2: died"]
    assert table([result]).splitlines()[2].endswith("FAIL: error")
