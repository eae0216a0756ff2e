"""The page, the tables and the command."""

import csv
import json
import re
from pathlib import Path

import pyarrow.parquet
import pytest

from moetrain.compare.__main__ import CompareSettings, as_settings, main
from moetrain.compare.comparison import compare_runs
from moetrain.compare.page import page
from moetrain.compare.tables import record_rows, run_rows, write_tables
from tests.compare.written_runs import write_arms, write_run
from tests.support.commands import run_module

VALUES = {4: [1.0, 1.5, 2.0], 8: [1.05, 1.56, 2.04]}
HOSTILE = [
    "<script>alert(1)</script>",
    "=HYPERLINK(1)",
    'a"b,c',
    "$\\frac{",
    "line\nbreak",
    "ü – 🙂",
]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_tables_have_a_row_a_run_and_a_row_a_record(tmp_path: Path) -> None:
    write_arms(tmp_path, VALUES)
    comparison = compare_runs([str(tmp_path / "runs")])
    list(write_tables(comparison, tmp_path))
    runs = rows_of(tmp_path / "runs.csv")
    assert len(runs) == 6
    first = runs[0]
    assert (first["run"], first["arm"], first["seed"]) == ("e4-0", "num_experts=4", "0")
    assert (first["state"], first["model.dim"], first["optim.lr"]) == ("finished", "32", "0.01")
    assert float(first["value"]) == float(first["validation/loss"]) == 1.0
    assert float(first["reached_time"]) == 6.0
    assert float(first["reached_flops"]) == 3 * 256 * 3000
    assert float(first["parameters"]) == 4000
    records = rows_of(tmp_path / "records.csv")
    assert len(records) == 18
    metrics = (tmp_path / "runs/e4-0/metrics.jsonl").read_text().splitlines()
    for line, row in zip(metrics, records, strict=False):
        for name, value in json.loads(line).items():
            assert float(row[name]) == value
    for name, rows in (("runs", run_rows(comparison)), ("records", list(record_rows(comparison)))):
        table = pyarrow.parquet.read_table(tmp_path / f"{name}.parquet").to_pylist()
        assert len(table) == len(rows)
        for written, row in zip(table, rows, strict=True):
            same = {k: v for k, v in written.items() if v is not None}
            given = {k: v for k, v in row.items() if v is not None}
            assert same == given


def test_names_of_others_are_no_markup_no_formula_and_no_rows(tmp_path: Path) -> None:
    for number, name in enumerate(HOSTILE):
        write_run(
            tmp_path, f"r{number}", losses=[2, 1.0 + number], source=name.replace("\n", " "),
            extra={"objective": {"note": name}},
        )  # fmt: skip
        (tmp_path / "runs" / f"r{number}").rename(tmp_path / "runs" / name.replace("/", "|"))
    comparison = compare_runs([str(tmp_path / "runs")])
    html = page(comparison)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    list(write_tables(comparison, tmp_path))
    rows = rows_of(tmp_path / "runs.csv")
    assert {row["run"] for row in rows} == {name.replace("/", "|") for name in HOSTILE}
    assert {row["objective.note"] for row in rows} == set(HOSTILE)
    assert pyarrow.parquet.read_table(tmp_path / "runs.parquet").num_rows == len(HOSTILE)


def test_the_page_stands_alone_and_shows_each_axis(tmp_path: Path) -> None:
    write_arms(tmp_path, VALUES)
    html = page(compare_runs([str(tmp_path / "runs")], axis="tokens"))
    assert not re.findall(r"(?:src|href)=\"(?!#)", html.replace("xlink:", ""))
    links = set(re.findall(r"https?://[^\"' )]+", html))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert re.findall(r'id="x-(\w+)"( checked)?', html) == [
        ("step", ""), ("tokens", " checked"), ("flops", ""), ("time", ""),
    ]  # fmt: skip
    assert html.count('<figure class="by-') == 4
    ids = re.findall(r'<clipPath id="([^"]+)"', html)
    assert len(set(ids)) == len(ids), "no figure uses what a hidden one has"
    assert "outside noise" in html
    assert html.count("<circle ") == 1, "one difference with its interval"


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["runs/a", "at=common", "runs/lr=0.1"], ["at=common", 'runs=["runs/a","runs/lr=0.1"]']),
        (["runs/*"], ['runs=["runs/*"]']),
        (["--cfg", "job", "a b"], ["--cfg", "job", 'runs=["a b"]']),
        (["mesure=x"], ["mesure=x"]),
        (["runs=[a]"], ["runs=[a]"]),
        ([], []),
    ],
)
def test_words_without_a_setting_are_paths(words: list[str], settings: list[str]) -> None:
    assert as_settings(words) == settings


def test_the_command_prints_the_comparison_and_writes_its_files(tmp_path: Path) -> None:
    write_arms(tmp_path, VALUES)
    words = ["runs/e4-*", "runs/e8-0", "runs/e8-1", "out=found", "x=time"]
    done = run_module("moetrain.compare", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "compared  5 runs in 2 arms: validation/loss in nats/token, at the end" in done.stdout
    assert "2 pairs" in done.stdout
    written = {path.name for path in (tmp_path / "found").iterdir()}
    assert written == {
        "compare.html", "runs.csv", "runs.parquet", "records.csv", "records.parquet",
    }  # fmt: skip


def test_what_the_command_cannot_do_ends_with_the_code_that_says_whose_fault_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_arms(tmp_path, {4: [1.0], 8: [1.2]})
    runs = [str(tmp_path / "runs")]
    assert main(CompareSettings(runs=runs, measure="validation/los")) == 2
    assert "did you mean 'validation/loss'?" in capsys.readouterr().err
    (tmp_path / "taken").touch()
    assert main(CompareSettings(runs=runs, out=str(tmp_path / "taken"))) == 1
    assert "could not be written" in capsys.readouterr().err
