"""Arms, their figures, and what is said of runs that can't be compared."""

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from moetrain import api
from moetrain.checks import ConfigError
from moetrain.compare.comparison import OUTSIDE, UNKNOWN, WITHIN, Comparison, compare_runs
from moetrain.compare.of_sweep import compare_sweep
from moetrain.compare.run_results import is_seed
from moetrain.compare.tables import run_rows
from moetrain.compare.text import as_text
from tests.compare.written_runs import TOKENS, write_arms, write_run, write_sweep

# The seeds' noise is ten times the difference of 4 and 8 experts, and the same for both.
VALUES = {4: [1.0, 1.5, 2.0], 8: [1.05, 1.56, 2.04], 16: [1.3, 1.1, 2.4]}


def compared(*words: Path | str, **options: Any) -> Comparison:
    return compare_runs([str(word) for word in words], **options)


def refusal(*words: Path | str, **options: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        compared(*words, **options)
    return str(refused.value)


def test_seeds_make_an_arm_and_pairs_tell_more_than_their_spread(tmp_path: Path) -> None:
    write_arms(tmp_path, VALUES)
    found = compared(tmp_path / "runs")
    assert [arm.name for arm in found.arms] == [f"num_experts={n}" for n in VALUES]
    means = {r.arm.name: r.estimate for r in found.main.results}
    assert means["num_experts=4"].mean == pytest.approx(1.5)
    assert means["num_experts=4"].deviation == pytest.approx(0.5)
    assert {e.n for e in means.values()} == {3}
    eight, sixteen = found.main.differences
    # Differences 0.05, 0.06 and 0.04: mean 0.05, deviation 0.01, half 4.303 * 0.01 / sqrt(3).
    assert (eight.difference.method, eight.difference.n) == ("paired", 3)
    assert eight.difference.value == pytest.approx(0.05)
    assert (eight.difference.low, eight.difference.high) == pytest.approx(
        (0.05 - 0.024841, 0.05 + 0.024841), abs=1e-6
    )
    assert (eight.verdict, sixteen.verdict) == (OUTSIDE, WITHIN)
    assert eight.corrected_p == pytest.approx(2 * (eight.difference.p or 0)), "of two"
    text = as_text(found)
    assert "9 runs in 3 arms, 3 seeds each: validation/loss in nats/token, at the end" in text
    assert "differ in model.num_experts (4, 8, 16)" in text
    assert "not equal parameters (4 k to 16 k)" in text
    assert "equal     steps, tokens, training FLOPs, active parameters, FLOPs a token, text" in text
    (source,) = found.sources
    assert (source.source, source.measure) == ("code", "validation/code/bits_per_byte")
    assert source.results[0].estimate.mean == pytest.approx(3.0)


def test_the_order_in_which_runs_are_given_changes_nothing(tmp_path: Path) -> None:
    runs = write_arms(tmp_path, VALUES)
    expected = as_text(compared(*runs))
    for seed in range(3):
        shuffled = runs + runs[:2]  # and what is given twice counts once
        random.Random(seed).shuffle(shuffled)
        assert as_text(compared(*shuffled)) == expected
    assert as_text(compared(f"{tmp_path}/runs/e*")) == expected


def test_arms_are_called_as_the_file_of_their_settings_calls_them(tmp_path: Path) -> None:
    for arm, top_k in (("narrow", 1), ("wide", 3)):
        router: dict[str, Any] = {"model__router__normalize_gates": False, "model__top_k": top_k}
        for seed in (0, 1):
            write_run(tmp_path, f"{arm}-{seed}", losses=[2, seed], seed=seed, arm=arm, **router)
    runs = str(tmp_path / "runs")
    assert [arm.name for arm in compare_runs([runs]).arms] == ["narrow", "wide"]
    rows = run_rows(compare_runs([runs]))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("narrow", 0), ("narrow", 1), ("wide", 0), ("wide", 1),
    ]  # fmt: skip


def test_whatever_is_called_a_seed_makes_no_arm_and_layouts_are_only_named(tmp_path: Path) -> None:
    assert is_seed("seed")
    assert is_seed("seeds.data_order")
    assert is_seed("data.shuffle_seed")
    assert not is_seed("model.seeded")
    for number in range(3):
        write_run(
            tmp_path, f"a{number}", losses=[2, 1.0 + number], run__threads_per_rank=number + 1,
            checkpoint__every_steps=number + 1, extra={"seeds": {"noise": number}},
        )  # fmt: skip
    found = compared(tmp_path / "runs")
    assert [(len(arm.runs), arm.name) for arm in found.arms] == [(3, "all runs")]
    assert dict(found.layout) == {"run.threads_per_rank": ["1", "2", "3"]}
    assert "run.threads_per_rank (1, 2, 3)" in as_text(found)


def test_runs_of_other_data_are_no_pairs_and_it_is_said(tmp_path: Path) -> None:
    write_arms(tmp_path, {4: [1.0, 1.5]})
    for seed, value in enumerate([1.2, 1.6]):
        write_run(tmp_path, f"other-{seed}", losses=[1, 1, value], seed=seed, text="ab" * 16)
    found = compared(tmp_path / "runs")
    assert [d.difference.method for d in found.main.differences] == ["welch"]
    assert list(found.differing) == ["data (its text)"]
    text = as_text(found)
    assert "not equal text, order of the text for a seed, evaluation" in text
    assert "warning   the arms read other text, or have another tokenizer" in text
    assert "Welch's interval" in text


def test_arms_of_other_lengths_are_named_and_can_be_compared_where_all_are(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, f"short-{seed}", losses=[3, 2.0 + seed], seed=seed)
        write_run(tmp_path, f"long-{seed}", losses=[3, 2.5 + seed, 1.0], seed=seed)
    text = as_text(compared(tmp_path / "runs"))
    assert "arms were trained for different numbers of tokens (512 to 768)" in text
    assert f"at=tokens:{2 * TOKENS}" in text
    for at in (f"tokens:{2 * TOKENS}", "common", "step:2", "time:4", "flops:1536000"):
        found = compared(tmp_path / "runs", at=at)
        assert [r.estimate.mean for r in found.main.results] == [2.5, 3.0], at
        assert found.counts["tokens"] == [512, 512]
    assert "short-0: has not come to step 3: 2 only" in as_text(
        compared(tmp_path / "runs", at="step:3")
    )


def test_one_seed_alone_says_that_noise_is_unknown_and_how_to_know_it(tmp_path: Path) -> None:
    write_arms(tmp_path, {4: [1.0], 8: [1.2]})
    found = compared(tmp_path / "runs")
    assert [d.verdict for d in found.main.differences] == [UNKNOWN]
    text = as_text(found)
    assert "each arm has one seed, which tells nothing of the noise" in text
    assert "seed=0,1,2" in text
    assert "outside noise: p <" not in text


def test_runs_that_are_running_damaged_or_empty_are_taken_and_named(tmp_path: Path) -> None:
    runs = write_arms(tmp_path, {4: [1.0, 1.2], 8: [1.1, 1.4]})
    expected = as_text(compared(*runs)).partition("\n\n")[2]
    write_run(tmp_path, "going", losses=[9, 8], finished=False, seed=7, train__num_steps=3)
    with (runs[0] / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "valid\n\xff\xfe\x00\n{"step": 4, "validation/loss": 0.0')
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("model: [")
    (tmp_path / "runs" / "notes").mkdir()
    text = as_text(compared(f"{tmp_path}/runs/*"))
    assert text.partition("\n\n")[2] == expected
    assert "going: running, or killed, at step 2 of 3: left out of the means" in text
    assert "e4-0: 2 lines of its metrics.jsonl are damaged, and skipped" in text
    assert "broken: has settings that can't be read" in text
    assert "notes: is no run's folder, and has none" in text
    as_far = compared(f"{tmp_path}/runs/*", at="common")
    assert (as_far.point.value, as_far.main.results[0].estimate.n) == (2.0, 3)
    only = refusal(tmp_path / "runs" / "going")
    assert "no run has finished: going: running, or killed, at step 2 of 3" in only
    assert "at=common" in only


def test_a_repeated_seed_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path, "a", losses=[2, 1.0])
    write_run(tmp_path, "b", losses=[2, 1.0])
    found = compared(tmp_path / "runs")
    assert found.main.results[0].estimate.n == 1
    assert found.left_out == ("b: repeats a, with its settings and seed",)


def test_a_setting_that_a_resume_changed_makes_another_arm(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_run(tmp_path, name, losses=[2, 1.0], seed=seed)
    run = write_run(tmp_path, "changed", losses=[2, 1.0], seed=2)
    (manifest,) = run.glob("checkpoints/*/manifest.json")
    from moetrain.checkpoint.manifest import manifest_text, read_manifest

    old = read_manifest(manifest.parent)
    old.state["changes"] = [{"step": 1, "changes": {"optim.lr": [0.5, 0.01]}}]
    manifest.write_text(manifest_text(old))
    found = compared(tmp_path / "runs")
    assert [(arm.name, len(arm.runs)) for arm in found.arms] == [
        ("lr=0.01", 2), ("lr=0.5 → 0.01", 1),
    ]  # fmt: skip


def test_a_moved_or_copied_sweep_has_the_runs_beside_it(tmp_path: Path) -> None:
    runs = write_arms(tmp_path / "old", {4: [1.0, 1.2], 8: [1.1, 1.4]})
    sweep = write_sweep(tmp_path / "old", runs)
    expected = as_text(compared(sweep))
    (tmp_path / "old").rename(tmp_path / "new")
    moved = tmp_path / "new/runs/sweeps" / sweep.name
    found = compared(moved)
    assert as_text(found) == expected
    assert as_text(compared(moved.parent)) == expected, "of all sweeps in a folder"
    assert {run.path.parent for run in found.runs} == {tmp_path / "new/runs"}
    # What an older version left says where they were, not where they are from it.
    rows = (moved / "trials.jsonl").read_text().splitlines()
    older = [{k: v for k, v in json.loads(row).items() if k != "relative"} for row in rows]
    older.append({"run": "/gone/e4-9", "end": "not begun", "varied": {}})
    (moved / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in older))
    assert as_text(compared(moved)).replace(
        "left out  e4-9: its trial has not begun, or its folder is gone\n", ""
    ) == expected  # fmt: skip


def test_arms_have_the_names_of_their_sweep_or_of_what_few_have(tmp_path: Path) -> None:
    for number, (experts, rate) in enumerate([(4, 0.01), (8, 0.01), (4, 0.02)]):
        write_run(
            tmp_path, f"r{number}", losses=[2, 1.0 + number], model__num_experts=experts,
            optim__lr=rate,
        )  # fmt: skip
    runs = [tmp_path / "runs" / f"r{number}" for number in range(3)]
    found = compared(*runs)
    names = ["common settings", "lr=0.02", "num_experts=8"]
    assert [arm.name for arm in found.arms] == names
    assert "model.num_experts=4, optim.lr=0.01" in as_text(found)
    sweep = write_sweep(tmp_path, runs)
    assert [arm.name for arm in compared(sweep).arms] == names, "two have the same number"
    assert [arm.name for arm in compared(write_sweep(tmp_path / "two", runs[:2])).arms] == [
        "num_experts=4", "num_experts=8",
    ]  # fmt: skip
    by = compared(*runs, by=["optim.lr", "model.num_experts"])
    assert by.arms[1].name == "optim.lr=0.02 model.num_experts=4"
    given = compared(*runs, names=["base", "faster", "more"], baseline="optim.lr=2e-2")
    assert (given.baseline.name, given.arms[2].name) == ("faster", "more")
    assert compared(*runs, baseline="r1").baseline.name == "num_experts=8"
    assert "add model.num_experts" in refusal(*runs, by=["optim.lr"])
    assert "did you mean 'optim.lr'?" in refusal(*runs, by=["optim.rl"])
    assert "2 arms have this" in refusal(*runs, baseline="model.num_experts=4")
    assert "is no arm (did you mean 'num_experts=8'?)" in refusal(*runs, baseline="num_expert=8")
    assert "name each of the 3 arms once, in this order: common" in refusal(*runs, names=["a"])


def test_the_arm_that_others_were_matched_to_is_the_baseline(tmp_path: Path) -> None:
    for experts in (2, 4, 8):
        named = {"arm": f"e{experts}", "match": {"to": "e4", "by": "active_parameters"}}
        losses, name = [2, 1.0], f"r{experts}"
        write_run(tmp_path, name, losses=losses, extra=named, model__num_experts=experts)
    assert compared(tmp_path / "runs").baseline.name == "e4"
    assert compared(tmp_path / "runs", baseline="e8").baseline.name == "e8"


def test_figures_have_the_digits_that_pairs_make_known(tmp_path: Path) -> None:
    write_arms(tmp_path, {4: [1.0, 2.0, 3.0], 8: [1.00011, 2.00012, 3.00013]})
    assert "+0.000120  +0.000095 to +0.000145" in as_text(compared(tmp_path / "runs"))


def test_bad_input_is_answered_by_what_is_missing(tmp_path: Path) -> None:
    runs = write_arms(tmp_path, {4: [1.0]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "name what to compare" in refusal()
    beside = refusal(tmp_path / "runs/e4-1")
    assert "does not exist (did you mean 'e4-0'?)" in beside
    assert f"Runs in {tmp_path / 'runs'}: e4-0" in beside
    assert "has neither config.yaml nor metrics.jsonl" in refusal(tmp_path / "empty")
    assert "is a file" in refusal(tmp_path / "file")
    assert "nothing has such a name" in refusal(f"{tmp_path}/runs/x*")
    assert "did you mean 'validation/code/loss'?" in refusal(*runs, measure="validation/coda/loss")
    assert "must be end, common, or one of step:NUMBER" in refusal(*runs, at="steps:1")
    assert "did you mean 'tokens'?" in refusal(*runs, axis="token")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "multirun.yaml").touch()
    assert "a sweep that has no list of its trials" in refusal(tmp_path / "killed")


def test_other_measures_and_training_alone(tmp_path: Path) -> None:
    runs = write_arms(tmp_path, {4: [1.0, 1.2], 8: [1.1, 1.4]})
    found = compared(*runs, measure="train/cross_entropy")
    # The mean over the last tenth of the steps: of three, the last.
    assert found.main.results[0].estimate.mean == pytest.approx(1.6)
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if "validation" not in k} for line in lines]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert as_text(compared(*runs)) == as_text(found), "without held-out text"


def test_a_large_record_is_streamed(tmp_path: Path) -> None:
    loads = [[1 / 256] * 256 for _ in range(61)]
    losses = [3 - 0.01 * step for step in range(40)]
    run = write_run(tmp_path, "large", losses=losses, record={"router/expert_load": loads})
    assert (run / "metrics.jsonl").stat().st_size > 4_000_000
    compared(run)  # imports
    tracemalloc.start()
    compared(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Buffered reading holds a megabyte, and one record a hundred kilobytes.
    assert peak < 2_500_000


def test_the_comparison_can_be_had_from_python(tmp_path: Path) -> None:
    runs = write_arms(tmp_path, VALUES)
    found = api.compare(*runs, baseline="num_experts=8", x="tokens", at="common")
    assert found.baseline.name == "num_experts=8"
    assert found.main.differences[0].difference.value == pytest.approx(-0.05)


def test_a_sweep_ends_with_it_and_never_because_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = write_arms(tmp_path, VALUES)
    sweep = write_sweep(tmp_path, runs)
    text = compare_sweep(sweep)
    assert text == f"{as_text(compared(sweep))}\n\ncompared  {sweep / 'compare.html'}"
    assert {"compare.html", "runs.csv"} <= {path.name for path in sweep.iterdir()}
    alone = compare_sweep(write_sweep(tmp_path / "alone", runs[::3]))
    assert alone is not None
    assert alone.startswith("compared  each arm has one seed")
    (sweep / "compare.html").unlink()
    (sweep / "compare.html").mkdir()
    assert compare_sweep(sweep) is None
    assert "moetrain: no comparison: IsADirectoryError" in capsys.readouterr().err
    (runs[0] / "events.jsonl").unlink()
    assert compare_sweep(write_sweep(tmp_path / "none", runs[:1])) is None
    assert capsys.readouterr().err == ""
