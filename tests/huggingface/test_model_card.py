"""A model card says what the run's files say, and that the rest is unknown."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline import BuildSettings, ShardFolder, build_shards
from data_pipeline.settings import SourceSettings
from launch.run_folder import open_run
from moetrain.checkpoint.manifest import Manifest, read_manifest
from moetrain.huggingface.model_card import write_model_card
from moetrain.model import active_parameters, total_parameters
from moetrain.settings import Resolved
from moetrain.settings.validation import validated
from moetrain.train.prepare import prepare
from tests.support.ranks import run_ranks
from tests.support.runs import events_of, metrics_of, tiny_config, train_as_rank

STEPS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as a command starts it, on two sources, validated and saved at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    for source in ("code", "prose"):
        (folder / source).mkdir()
        for number in range(40):
            text = f"{source} {number}: " + f"the line {number * 7 % 13} is here\n" * 25
            (folder / source / f"{number}.txt").write_text(text)
    settings = BuildSettings(
        tokenizer="bytes",
        to=str(folder / "shards"),
        validation_fraction=0.2,
        sources={
            "code": SourceSettings(corpus=str(folder / "code"), licence="PSF-2.0"),
            "prose": SourceSettings(corpus=str(folder / "prose"), licence="CC0-1.0", language="en"),
        },
    )
    build_shards(settings, progress=False)
    config = tiny_config(
        folder,
        shards=folder / "shards",
        train__num_steps=STEPS,
        train__validate_every_steps=3,
        data__weights={"code": 0.25, "prose": 0.75},
    )
    (folder / "runs/tiny").mkdir(parents=True)
    open_run(config, prepare(config, config.data, progress=False))
    assert run_ranks(train_as_rank, 1, config, None, 1)[0].finished
    return folder


def card_of(to: Path, run_dir: Path, *, step: int = STEPS, **changes: Any) -> str:
    """The card of a checkpoint, its manifest changed."""
    manifest = read_manifest(run_dir / f"checkpoints/step_{step:08d}")
    return written(to, run_dir, replace(manifest, **changes))


def written(to: Path, run_dir: Path, manifest: Manifest, **what: bool) -> str:
    config = validated(manifest.config, Resolved)
    write_model_card(
        to, run_dir=run_dir, manifest=manifest, config=config, dtype="bfloat16", **what
    )
    return (to / "README.md").read_text()


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    fields: dict[str, Any] = yaml.safe_load(head)
    return fields


def rows_of(card: str, first: str) -> list[list[str]]:
    """The rows of all tables that begin with a cell."""
    tables = (line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| "))
    return [cells for cells in tables if cells[0] == first]


def test_figures_are_those_of_the_runs_files(trained: Path, tmp_path: Path) -> None:
    run_dir = trained / "runs/tiny"
    card, last = card_of(tmp_path, run_dir), metrics_of(trained)[-1]
    manifest = read_manifest(run_dir / "checkpoints/step_00000006")
    model = validated(manifest.config, Resolved).model
    loads = last["router/expert_load"][1]
    for first, second in {
        "parameters": f"{total_parameters(model):,}",
        "active parameters a token": f"{active_parameters(model):,}",
        "steps": "6 of 6",
        "tokens": f"{STEPS * 8 * 32:,}",
        "optimizer": "adamw, betas 0.9 and 0.95, eps 1e-08, weight decay 0.1",
        "seed": "0",
        "experts that no token of the batch took": f"{last['router/dead_experts']:.4g}",
        "loads in layer 1": f"{min(loads):.1%} to {max(loads):.1%} of the tokens",
        "balance loss (1 is balanced)": f"{last['router/load_balance_loss']:.4g}",
    }.items():
        assert rows_of(card, first) == [[first, second]]
    baselines = {e["source"]: e["baselines"] for e in events_of(trained) if e["event"] == "data"}
    for source, licence in (("code", "PSF-2.0"), ("prose", "CC0-1.0")):
        tokens = manifest.state["source_tokens"][source]
        assert rows_of(card, source) == [
            [
                *(source, source, licence, f"{tokens:,}", f"{tokens / (STEPS * 8 * 32):.1%}"),
                f"{last[f'data/{source}/epochs']:.3g}",
            ],
            [
                source,
                f"{last[f'validation/{source}/loss']:.4f}",
                f"{last[f'validation/{source}/bits_per_byte']:.4f}",
                f"{baselines[source]['byte_bigram_bits_per_byte']:.4f}",
                f"{baselines[source]['zlib_bits_per_byte']:.4f}",
            ],
        ]
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == manifest.config
    assert "unknown" not in card


def test_figures_of_later_steps_are_left_out(trained: Path, tmp_path: Path) -> None:
    card = card_of(tmp_path, trained / "runs/tiny", step=3)
    early = metrics_of(trained)[2]
    assert rows_of(card, "steps") == [["steps", "3 of 6"]]
    assert rows_of(card, "code")[1][1] == f"{early['validation/code/loss']:.4f}"
    assert "At step 3." in card
    assert "batch of step 3." in card


def test_the_head_names_what_is_known(trained: Path, tmp_path: Path) -> None:
    head = front_matter(card_of(tmp_path, trained / "runs/tiny"))
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "tags": ["mixtral", "moe", "moetrain"],
    }


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (("CC0-1.0", "CC0-1.0"), {"license": "cc0-1.0"}),
        (("PSF-2.0", "PSF-2.0"), {"license": "other", "license_name": "psf-2.0"}),
        (("PSF-2.0", "CC0-1.0"), {}),
        (("CC0-1.0", None), {}),
        ((None, None), {}),
    ],
)
def test_a_licence_is_named_if_all_text_has_it(
    trained: Path, tmp_path: Path, licences: tuple[str | None, ...], expected: dict[str, str]
) -> None:
    run_dir = moved(trained, tmp_path)
    path = tmp_path / "shards/index.json"
    index = json.loads(path.read_text())
    for source, licence in zip(index["sources"], licences, strict=True):
        source["licence"] = licence
    path.write_text(json.dumps(index))
    head = front_matter(written(tmp_path, run_dir, manifest_there(run_dir, tmp_path / "shards")))
    assert {key: head[key] for key in head if key.startswith("license")} == expected


def test_other_shards_in_their_place_say_nothing_of_the_text(trained: Path, tmp_path: Path) -> None:
    run_dir = moved(trained, tmp_path)
    manifest = manifest_there(run_dir, tmp_path / "shards")
    other = replace(manifest, state=manifest.state | {"data": "0" * 64})
    card = written(tmp_path, run_dir, other)
    assert "those in their place now are others" in card
    assert [row[1:3] for row in rows_of(card, "code")[:1]] == [["unknown", "unknown"]]
    shutil.rmtree(tmp_path / "shards")
    card = written(tmp_path, run_dir, manifest)
    assert "they are not where the run had them" in card
    assert rows_of(card, "code")[0][1:3] == ["unknown", "unknown"]
    assert rows_of(card, "code")[0][3] == f"{manifest.state['source_tokens']['code']:,}"


def test_the_beginning_of_a_text_is_said(trained: Path, tmp_path: Path) -> None:
    run_dir = moved(trained, tmp_path)
    manifest = manifest_there(run_dir, tmp_path / "shards")
    said = "the end-of-document token, and no other, stood before each document"
    card = written(tmp_path, run_dir, manifest, begins_texts=True)
    assert f"{said}, and the tokenizer puts it before each text." in card
    card = written(tmp_path, run_dir, manifest)
    assert f"{said}. The tokenizer, which is the imported model's, begins texts as that" in card


def test_a_run_with_nothing_but_a_checkpoint_has_a_card(trained: Path, tmp_path: Path) -> None:
    """Such as one that was imported: no metrics, no events, no counters."""
    run_dir = tmp_path / "bare"
    shutil.copytree(trained / "runs/tiny/checkpoints", run_dir / "checkpoints")
    card = card_of(tmp_path, run_dir, state={"step": 0, "tokens": 0}, mesh={})
    assert "not trained in this run yet" in card
    assert "Which text the model was trained on is not recorded" in card
    assert "No validation is recorded" in card
    assert "Balance of the experts" not in card
    assert not re.search(r"\b(nan|None|null)\b", card.split("<details>")[0])
    (run_dir / "events.jsonl").write_text(
        json.dumps({"event": "import", "source": "/home/somebody/mistral-7b"}) + "\n"
    )
    assert "It was imported from mistral-7b." in card_of(tmp_path, run_dir, state={})


def test_text_of_others_is_neither_markup_nor_a_secret(trained: Path, tmp_path: Path) -> None:
    run_dir = moved(trained, tmp_path)
    path = tmp_path / "shards/index.json"
    index = json.loads(path.read_text())
    index["sources"][0]["description"] = (
        "a | b\n## c <script> `d` https://me:s3cr3t@host/x?key=s3cr3t"
    )
    path.write_text(json.dumps(index))
    manifest = manifest_there(run_dir, tmp_path / "shards")
    config = manifest.config | {"run": manifest.config["run"] | {"dir": "s3://me:s3cr3t@host/x```"}}
    card = written(tmp_path, run_dir, replace(manifest, config=config))
    assert "s3cr3t" not in card
    shown = "a \\| b ## c \\<script\\> \\`d\\` https://host/x"
    assert f"| code | {shown} (code) | PSF-2.0 |" in card
    assert card.count("````") == 2  # a fence longer than any in it


def moved(trained: Path, to: Path) -> Path:
    """Copies a run and its shards; returns the run's folder."""
    shutil.copytree(trained / "shards", to / "shards")
    shutil.copytree(trained / "runs/tiny", to / "run")
    return to / "run"


def manifest_there(run_dir: Path, shards: Path) -> Manifest:
    """A run's last manifest, as if it had been trained on the shards of another folder."""
    manifest = read_manifest(run_dir / f"checkpoints/step_{STEPS:08d}")
    data = manifest.config["data"] | {"dir": str(shards)}
    assert ShardFolder.open(shards).fingerprint == manifest.state["data"]
    return replace(manifest, config=manifest.config | {"data": data})
