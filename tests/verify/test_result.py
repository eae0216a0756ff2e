"""What counts as a failure, and how the table and the JSON object say so."""

import dataclasses
import json
from math import inf, nan

from moetrain.settings import Config
from moetrain.settings.validation import validated
from moetrain.verify.comparison import Difference
from moetrain.verify.layouts import Layout
from moetrain.verify.passes import plan_passes
from moetrain.verify.result import PassResult, Result, as_json, pass_as_json, table
from moetrain.verify.settings import VerifySettings
from moetrain.verify.trial import Measured
from tests.test_config import toy


def measured(*, loss: float = 2.0, digest: str = "same", **off: float) -> Measured:
    differences = {
        column: Difference(relative=off.get(column, 0.0), allowed=1e-4, where=f"a {column}")
        for column in ("loss", "grad_norm", "dense", "experts", "weights")
    }
    return Measured(
        losses=[loss], grad_norms=[1.0], differences=differences, near_ties=0, digest=digest
    )


def found(*results: Result, exact: bool = False) -> PassResult:
    part = plan_passes(validated(toy(), Config), VerifySettings(num_ranks=1)).passes[0]
    return PassResult(part=part, results=results, exact=exact)


def test_a_difference_on_any_rank_fails_the_layout_and_is_marked() -> None:
    result = Result(layout=Layout(num_ranks=2), ranks=(measured(), measured(experts=0.5)))
    assert result.failures == [
        "experts: a experts is off by 5.0e-01, where rounding explains 1.0e-04"
    ]
    (row,) = [line for line in table(found(result)).splitlines() if "FAIL" in line]
    assert row.split()[-6:] == ["0.0e+00", "–", "5.0e-01", "!", "0.0e+00", "FAIL"]


def test_ranks_that_hold_other_bits_fail_though_rounding_would_explain_it() -> None:
    result = Result(layout=Layout(num_ranks=2), ranks=(measured(), measured(digest="other")))
    assert [f.split(":")[0] for f in result.failures] == ["weights"]


def test_what_is_not_finite_fails_and_is_null_in_json() -> None:
    result = Result(layout=Layout(), ranks=(measured(loss=nan, dense=inf),))
    said = json.loads(json.dumps(as_json(result), allow_nan=False))
    assert not said["passed"]
    assert said["losses"] == [None]
    assert said["differences"]["dense"]["relative"] is None
    assert {f.split(":")[0] for f in said["failures"]} == {"loss", "dense"}


def test_a_rank_that_failed_stands_in_the_table_and_tells_why() -> None:
    result = Result(layout=Layout(num_ranks=2), error="rank 1 of 2: died")
    assert result.failures == ["rank 1 of 2: died"]
    assert table(found(result)).splitlines()[2].endswith("FAIL: error")


def test_a_backward_pass_that_chooses_experts_again_fails() -> None:
    again = dataclasses.replace(measured(), chosen_again=(2,))
    result = Result(layout=Layout(num_ranks=2), ranks=(measured(), again))
    assert result.failures == ["routing: the backward pass chose experts again, in layers 2"]


def test_only_what_was_compared_with_the_reference_says_so() -> None:
    one = Result(layout=Layout(), ranks=(measured(),))
    last = {e: table(found(one, exact=e)).splitlines()[2].split()[-2:] for e in (True, False)}
    assert last == {True: ["pass,", "reference"], False: ["0.0e+00", "reference"]}
    said = pass_as_json(found(one, exact=True))
    assert (said["name"], said["optimizer"], said["dtype"]) == ("layouts", "sgd", "float32")
    assert said["float64_reference"]
    failed = dataclasses.replace(found(one), error="float64 reference: died")
    assert not failed.passed
