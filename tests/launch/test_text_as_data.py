"""A run whose `data.dir` names a text: it trains on shards of it, and resumes on those alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline import ShardFolder, open_or_build, opened_or_planned
from moetrain.checks import ConfigError
from moetrain.command import Combination
from moetrain.settings import Config
from moetrain.settings.validation import validated
from moetrain.sweeping.trial_plan import resolved_as_trial, with_shards
from moetrain.train.prepare import Prepared, prepare
from moetrain.training import train
from moetrain.verify.batches import global_batches
from tests.support.ranks import run_ranks
from tests.support.runs import metrics_of, tiny_values, train_as_rank, write_shards

PROGRAM = (
    "import json, sys; from moetrain.settings import Config; "
    "from moetrain.settings.validation import validated; from moetrain.training import train; "
    "sys.exit(train(validated(json.loads(sys.argv[1]), Config)))"
)


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    given = {"data__cache__dir": str(folder / "cache"), "launch__mode": "inline"} | changes
    return tiny_values(folder, shards=folder / "corpus", **given)


def settings(folder: Path, **changes: Any) -> Config:
    return validated(values(folder, **changes), Config)


def prepared(folder: Path, **changes: Any) -> Prepared:
    given = settings(folder, **changes)
    return prepare(resolved_as_trial(given), given.data, progress=False)


def command(folder: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", PROGRAM, json.dumps(values(folder, **changes))]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder)


def places(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache" / "built").glob("*/*"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path)  # of the text in `corpus`
    return tmp_path


def test_a_run_trains_on_shards_of_the_text_and_resumes_on_them_only(folder: Path) -> None:
    begun = command(folder)
    assert begun.returncode == 0, begun.stderr
    (place,) = (folder / "cache" / "built").glob("*/1")
    assert f"building the shards of {folder}/corpus in {place}" in begun.stderr
    saved = yaml.safe_load((folder / "runs/tiny/config.yaml").read_text())["data"]
    assert (saved["dir"], saved["corpus"]) == (str(place), str(folder / "corpus"))

    more = command(folder, train__num_steps=10)
    assert more.returncode == 0, more.stderr
    assert f"are in {place}; nothing to build" in more.stderr
    assert [record["step"] for record in metrics_of(folder)] == list(range(1, 11))

    (folder / "corpus" / "new.txt").write_text("new")
    changed = command(folder, train__num_steps=12)
    assert changed.returncode == 2
    assert "the text has changed since (source corpus: 1 file added (new.txt))" in changed.stderr
    assert f"use data.dir={place}, or another run.name" in changed.stderr
    assert places(folder) == ["1"], "nothing is built for a run that can't use it"

    assert prepared(folder, run__name="other").config.data.dir == str(place.with_name("2"))
    with pytest.raises(ConfigError, match=rf"trained on other shards.*data\.dir={place}"):
        prepared(folder, train__num_steps=12)
    as_told = prepared(folder, train__num_steps=12, data__dir=str(place))
    assert as_told.config.data.dir == str(place)


def test_a_rank_that_does_not_see_the_shards_says_where_to_put_them(folder: Path) -> None:
    config = prepared(folder).config
    shards = Path(config.data.dir)
    shards.rename(folder / "elsewhere")
    with pytest.raises(AssertionError, match=r"rank 0, on .*doesn't see.*data\.cache\.dir=DIR"):
        run_ranks(train_as_rank, 1, config, None, 1)


def test_a_dry_run_says_what_would_be_built_and_where(folder: Path, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train(settings(folder, dry_run=True)) == 0
    said = capsys.readouterr().out
    assert f"its shards would be built first, in {folder}/cache/built/corpus-" in said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    shards = prepared(folder).shards
    (folder / "corpus" / "new.txt").write_text("new")
    assert train(settings(folder, dry_run=True)) == 0
    said = capsys.readouterr().out
    assert f"in {shards.path.with_name('2')}" in said
    assert "1 file added (new.txt)" in said
    assert places(folder) == ["1"]


def test_a_vocabulary_that_is_too_small_is_refused_before_anything_is_built(folder: Path) -> None:
    for changes in ({"model__vocab_size": 256}, {"data__tokenizer": "mixtral-v1"}):
        with pytest.raises(ConfigError, match=r"model\.vocab_size"):
            prepared(folder, **changes)
    assert not (folder / "cache").exists()


def test_trials_of_a_sweep_are_known_by_the_shards_of_their_texts(folder: Path) -> None:
    (folder / "corpus" / "00.py").rename(folder / "one.py")
    texts = (folder / "corpus", folder / "one.py", folder / "corpus")
    given = [settings(folder, data__dir=str(text)) for text in texts]
    given.append(settings(folder, data__tokenizer="mixtral-v1"))
    combinations = [Combination(overrides=(), settings=one) for one in given]
    resolved = [resolved_as_trial(one) for one in given]
    planned, unknown = with_shards(resolved, combinations, find=opened_or_planned)
    assert unknown == [None] * 4
    assert places(folder) == []
    built, texts_of = with_shards(resolved, combinations, find=open_or_build)
    assert [one.data.dir for one in built] == [one.data.dir for one in planned]
    assert built[0] == built[2]
    assert len({one.data.dir for one in built}) == len(set(texts_of)) == 3
    for one, fingerprint in zip(built, texts_of, strict=True):
        assert ShardFolder.open(one.data.dir).fingerprint == fingerprint


def test_verify_takes_the_text_itself(folder: Path) -> None:
    config = settings(folder)
    batches, what = global_batches(config, num_steps=2)
    assert what.startswith("text of")
    assert len(batches) == 2
    assert places(folder) == ["1"]
