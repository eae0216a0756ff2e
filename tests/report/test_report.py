import json
import os
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import Baselines
from moetrain.observe import Span
from moetrain.report import figure_for_readme, render_report
from moetrain.report.__main__ import ReportSettings, main
from moetrain.report.drawing import MAX_POINTS, thinned
from moetrain.report.run_record import MAX_LOAD_RECORDS, read_run
from moetrain.report.time_line import joined
from tests.report.synthetic_run import write_run


@pytest.mark.parametrize("num_records", [0, 1, 2, 60])
def test_a_report_tells_whatever_there_is(tmp_path: Path, num_records: int) -> None:
    path = render_report(write_run(tmp_path / "run", num_records=num_records))
    html = path.read_text()
    assert path == tmp_path / "run" / "report.html"
    assert html.count("<svg") == (0 if num_records == 0 else 5)
    for text in ("toy-synthetic", "finished", "rank 1 was killed by SIGKILL", "num_experts: 8"):
        assert text in html
    if num_records:
        assert all(text in html for text in ("stdlib", "byte bigrams", "3.540", "1.830"))
    assert [file.name for file in path.parent.glob("report*")] == ["report.html"]


def test_a_report_of_an_empty_folder_is_a_report(tmp_path: Path) -> None:
    assert "No metrics have been logged yet" in render_report(tmp_path).read_text()


def test_a_report_of_names_that_are_not_utf8_escapes_them(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    html = render_report(write_run(tmp_path / name, num_records=3, name=name)).read_text()
    assert r"caf\udce9" in html


def test_each_source_stands_beside_what_simpler_models_make_of_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_records=3)
    for source, bits in (("code", 2.5), ("fr", 2.25)):
        with (run / "metrics.jsonl").open("a") as file:
            record = {"step": 40, f"validation/{source}/bits_per_byte": bits}
            file.write(json.dumps(record) + "\n")
        with (run / "events.jsonl").open("a") as file:
            zlib = None if source == "fr" else bits - 1
            of = Baselines(byte_bigram_bits_per_byte=bits + 1, zlib_bits_per_byte=zlib)
            event = {"event": "data", "source": source, "baselines": vars(of)}
            file.write(json.dumps(event) + "\n")
    html = render_report(run).read_text()
    rows = re.findall(r'<th scope="row">([^<]*)</th>.*?<td>([\d.]+)</td></tr>', html)
    assert rows[:5] == [
        ("code", "2.500"), ("byte bigrams on code", "3.500"), ("zlib, level 9, on code", "1.500"),
        ("fr", "2.250"), ("byte bigrams on fr", "3.250"),
    ]  # fmt: skip
    assert [label for label, _ in rows[5:8]] == [
        "stdlib", "byte bigrams on stdlib", "zlib, level 9, on stdlib",
    ]  # fmt: skip


def test_a_report_is_one_file_that_asks_the_network_for_nothing(tmp_path: Path) -> None:
    for num_layers, num_experts in ((2, 4), (3, 20)):
        run = write_run(
            tmp_path / "run", num_records=40, num_layers=num_layers, num_experts=num_experts
        )
        html = render_report(run).read_text()
        pointed_at = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)", html)
        assert all(target.startswith(("#", "data:image/png")) for target in pointed_at)
        links = re.findall(r"(\S*?)=?\"?https?://", re.sub(r"xmlns(:\w+)?=\"[^\"]*\"", "", html))
        assert links == []
        assert not re.search(r"@import|url\((?!#)|<script|<link", html)


def test_nothing_of_the_run_becomes_markup(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    run = write_run(tmp_path / "run", num_records=3, name=bad)
    record = {"step": 40, f"validation/{bad}/bits_per_byte": 2.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    with (run / "events.jsonl").open("a") as file:
        event = {"time": bad, "event": bad, "reason": bad, "step": bad, bad: bad}
        file.write(json.dumps(event) + "\n")
        data = {"event": "data", "source": bad, "baselines": {"zlib_bits_per_byte": 1.0}}
        file.write(json.dumps(data) + "\n")
    html = render_report(run).read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 8


def test_a_large_model_s_report_stays_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_records=200, num_layers=32, num_experts=64)
    assert render_report(run).stat().st_size < 2_000_000
    loads = read_run(run).expert_loads
    assert loads is not None
    assert loads.loads.shape == (MAX_LOAD_RECORDS, 32, 64)
    assert loads.loads.sum(axis=2) == pytest.approx(1.0, abs=1e-4)


def test_a_report_says_what_the_time_went_to(tmp_path: Path) -> None:
    """Half a minute lies between two events, of which two begin the steps and one saves them."""
    html = render_report(write_run(tmp_path / "run", num_records=3)).read_text()
    assert "<b>25.0%</b><span>effective time</span><small>of 4 min 0 s</small>" in html
    assert "Steps that count took 25.0% of 4 min 0 s. 1 interruption cost 1 min 30 s." in html
    assert "7 steps were lost." in html
    (line,) = re.findall(r'<div class="line">(.*?)</div>', html)
    pieces = re.findall(r'<i class="(\w+)" style="left:([\d.]+)%;width:([\d.]+)%"', line)
    assert [kind for kind, _, _ in pieces] == ["other", "kept", "lost", "lost", "kept", "other"]
    assert sum(float(width) for _, _, width in pieces) == pytest.approx(100, abs=0.01)
    (table,) = re.findall(r'<table class="time">(.*?)</table>', html)
    assert re.findall(r"</i>(\w+)</th><td>([^<]*)</td>", table) == [
        ("training", "1 min 0 s"), ("starting", "1 min 0 s"), ("ending", "30.0 s"),
        ("redone", "30.0 s"), ("restarting", "1 min 0 s"),
    ]  # fmt: skip


def test_a_run_whose_time_is_not_known_has_no_word_of_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_records=3)
    events = (run / "events.jsonl").read_text().splitlines()
    old = [line for line in events if '"training"' not in line]
    (run / "events.jsonl").write_text("\n".join(old) + "\n")
    assert "<h2>Time</h2>" not in render_report(run).read_text()


def test_a_long_run_s_line_of_time_stays_small() -> None:
    ends = list(range(1, 50_000))
    spans = [
        Span(kind="training" if end % 3 else "redone", begin=end - 1, end=end) for end in ends
    ] + [Span(kind="down", begin=50_000, end=60_000)]  # fmt: skip
    pieces = joined(spans, shortest=100)
    assert 400 < len(pieces) <= 600
    assert {piece.kind for piece in pieces[:-1]} == {"training"}
    assert (pieces[-1].kind, pieces[-1].begin) == ("down", 50_000), "a gap is left as it is"
    assert all(a.end <= b.begin for a, b in pairwise(pieces))


def test_a_long_curve_is_thinned_and_keeps_its_spike(tmp_path: Path) -> None:
    lines = [{"step": s, "optim/grad_norm": 900.0 if s == 7777 else 1.0} for s in range(20_000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = render_report(tmp_path).read_text()
    assert html.count("\nL ") < 4 * MAX_POINTS
    thin = read_run(tmp_path).get("optim/grad_norm")
    assert 900.0 in thinned(thin)[1]


def test_the_same_run_gives_the_same_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_records=40)
    first = render_report(run).read_bytes()
    assert render_report(run).read_bytes() == first


def test_a_gap_in_the_records_is_no_trouble(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "train/cross_entropy": None, "router/expert_load": [[0.25, None]]},
        {"step": 2, "train/cross_entropy": 2.0, "router/expert_load": [[0.5, 0.5], [1.0]]},
        {"step": 2, "train/cross_entropy": 2.0, "router/expert_load": None},
        {"step": 2, "validation/loss": 2.1},
        {"no step": 3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    assert run.get("train/cross_entropy").steps.tolist() == [2]
    assert run.expert_loads is not None
    assert run.expert_loads.loads.shape == (1, 1, 2)
    assert np.isnan(run.expert_loads.loads).tolist() == [[[False, True]]]
    assert "<svg" in render_report(tmp_path).read_text()


def test_the_state_is_that_of_the_last_telling_event(tmp_path: Path) -> None:
    states = []
    for kind in ("start", "save", "failure", "restart", "stop", "finish", "data"):
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write(json.dumps({"event": kind, "reason": f"for {kind}"}) + "\n")
        run = read_run(tmp_path)
        states.append((run.state, run.reason))
    assert [state for state, _ in states] == [
        *("running", "running", "failed", "running", "stopped", "finished", "finished")
    ]
    assert states[-1][1] == "for finish"


@pytest.mark.parametrize("ending", ["svg", "png"])
@pytest.mark.parametrize(("num_records", "num_experts"), [(0, 8), (1, 8), (30, 8), (30, 40)])
def test_the_readme_figure_is_drawn(
    tmp_path: Path, ending: str, num_records: int, num_experts: int
) -> None:
    run = write_run(tmp_path / "run", num_records=num_records, num_experts=num_experts)
    picture = figure_for_readme(run, to=tmp_path / f"figure.{ending}")
    beginning = b"\x89PNG" if ending == "png" else b"<?xml"
    assert picture.read_bytes().startswith(beginning)


def test_the_command_writes_the_report_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", num_records=3)
    assert main(ReportSettings(run=str(run))) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_a_missing_run_is_told_with_the_runs_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "toy-one", num_records=0)
    write_run(tmp_path / "other", num_records=0)
    assert main(ReportSettings(run=str(tmp_path / "toy-on"))) == 2
    message = capsys.readouterr().err
    assert all(text in message for text in ("toy-on:", "Did you mean toy-one?", "other"))
    assert main(ReportSettings(run=str(tmp_path))) == 2  # the folder that holds the runs
    assert "toy-one" in capsys.readouterr().err
