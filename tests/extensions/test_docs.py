"""The examples of docs/extending.md train together, in a sweep, from the folder they are in."""

import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests.support.ranks import CONTEXT

ROOT = Path(__file__).parents[2]
SMALL = [
    "+model=toy", "model.num_layers=2", "model.dim=32", "model.num_heads=2", "model.num_kv_heads=2",
    "model.head_dim=16", "model.ffn_hidden_dim=32", "train.num_steps=4", "train.seq_len=16",
    "train.global_batch_size=4", "schedule.warmup_steps=1", "observe.log_every_steps=1",
    "observe.wandb.mode=disabled", "launch.mode=inline", "train.validate_at_start=false",
]  # fmt: skip
EVERYTHING = [
    "extensions=[things]", "model.router.name=scaled", "model.experts.function=squared_relu",
    "optim.name=sign", "optim.lr=1e-3", "schedule.name=to_zero", "train.objective=smoothed",
    "observe.metrics=[layer_entropy]", "train.callbacks=[say_best]", "observe.sinks=[csv]",
    "data.corpus=numbers", "data.corpus_options.count=60", "data.tokenizer=few_words",
]  # fmt: skip


def write_things(folder: Path) -> None:
    """Writes the examples of the documentation into one module."""
    text = (ROOT / "docs/extending.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (folder / "things.py").write_text("\n\n".join(blocks))


def run(folder: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_every_example_of_the_documentation_trains_in_a_sweep(tmp_path: Path) -> None:
    write_things(tmp_path)
    sweep = ["-m", "optim.options.beta=0.8,0.9", "run.name=s"]
    said = run(tmp_path, "moetrain", *SMALL, *EVERYTHING, *sweep)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "best so far: " in said.stdout + said.stderr
    losses = []
    for name in ("s-1", "s-2"):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert all(len(record["my_lab/entropy"]) == 2 for record in records), "one a layer"
        assert [record["optim/lr"] for record in records[1:]] == [0.75e-3, 0.5e-3, 0.25e-3]
        assert len((tmp_path / "runs" / name / "loss.csv").read_text().splitlines()) == 4
        losses.append(records[-1]["train/loss"])
    assert losses[0] != losses[1], "the option counts"

    said = run(
        tmp_path, "data_pipeline.build", "corpus=numbers", "corpus_options.count=60",
        "tokenizer=few_words", "to=built", "extensions=[things]",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "60 documents" not in said.stdout, "some are held out"
    assert "data source numbers" in said.stdout


def test_options_of_extensions_are_shown_with_their_defaults(tmp_path: Path) -> None:
    write_things(tmp_path)
    said = run(
        tmp_path, "moetrain", *SMALL, "extensions=[things]", "optim.name=sign",
        "train.callbacks=[say_best]", "model.router.name=scaled", "--cfg", "job",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "options:\n    beta: 0.9" in said.stdout or "options:\n  beta: 0.9" in said.stdout
    assert "temperature: 1.0" in said.stdout
    said = run(tmp_path, "moetrain", *SMALL, "optim.name=sign", "dry_run=true")
    assert said.returncode == 2
    assert "optim.name=sign: must be one of adamw, sgd" in said.stderr


def run_scripts(names: list[str], words: list[str], folder: Path) -> dict[str, list[str]]:
    """Runs scripts of examples/ one after the other in this process; returns what each printed."""
    os.chdir(folder)
    sys.argv[1:] = words
    printed = {}
    for name in names:
        with redirect_stdout(StringIO()) as output:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        printed[name] = output.getvalue().splitlines()
    return printed


def test_the_examples_of_extensions_run_as_scripts(tmp_path: Path) -> None:
    names = ["squares_data_source.py", "cosine_router.py", "signum_and_inverse_sqrt.py"]
    small = [*SMALL[1:], "data.corpus_options.count=60", "train.num_steps=2", "data.corpus=squares"]
    with CONTEXT.Pool(1) as pool:
        printed = pool.apply(run_scripts, (names, small, tmp_path))
    for name in names:
        steps = [line.split("  ")[0] for line in printed[name] if line.startswith("step ")]
        assert len(steps) == 2, printed
    assert printed["cosine_router.py"][2].startswith("layer 0: scale ")
    assert all(len((ROOT / "examples" / name).read_text().splitlines()) < 60 for name in names)


@pytest.mark.slow
def test_the_example_of_a_metric_and_a_callback_is_named_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "conf/variant").mkdir(parents=True)
    (tmp_path / "conf/variant/mine.yaml").write_text(
        "# @package _global_\n"
        "extensions: [examples.layer_entropy_and_best_loss]\n"
        "observe: {metrics: [entropy]}\n"
        "train: {callbacks: [best_loss], callback_options: {best_loss: {margin: 0.01}}}\n"
    )
    (tmp_path / "text").mkdir()
    for number in range(200):
        (tmp_path / f"text/{number}.txt").write_text(f"{number} is followed by {number + 1}. " * 20)
    words = [*SMALL, "data.corpus=text", "train.validation_sequences=8", "run.name=m"]
    said = run(tmp_path, "moetrain", "--config-dir", "conf", *words, "+variant=mine")
    assert said.returncode == 0, said.stderr
    assert "best validation loss so far: " in said.stdout + said.stderr
    record = json.loads((tmp_path / "runs/m/metrics.jsonl").read_text().splitlines()[-1])
    assert sum(record["lab/entropy"]) / 2 == pytest.approx(record["router/entropy"], rel=2**-22)
