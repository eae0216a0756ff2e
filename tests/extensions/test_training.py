"""Things of a package outside the repository train on real ranks, resume, and are recorded."""

import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import extensions
from data_pipeline.extensions import load_extensions
from moetrain import api
from moetrain.branch import BranchSettings, branch
from moetrain.checks import ConfigError
from moetrain.export import ExportSettings, export
from moetrain.registries import SELECTED
from moetrain.settings import Config, Resolved
from moetrain.settings.validation import validated
from moetrain.train.changes import as_plain
from moetrain.train.control import Outcome
from tests.extensions.lab import write_lab
from tests.support.ranks import CONTEXT, run_ranks
from tests.support.runs import (
    events_of,
    metrics_of,
    tiny_config,
    tiny_values,
    train_as_rank,
    write_shards,
)

ALL: dict[str, Any] = {
    "extensions": ["my_lab"],
    "model__router__name": "lab_noisy",
    "model__router__options": {"temperature": 2.0},
    "model__experts__function": "lab_relu2",
    "model__num_shared_experts": 1,
    "optim__name": "lab_lion",
    "optim__options": {"beta1": 0.8},
    "optim__lr": 0.001,
    "schedule__name": "lab_linear",
    "train__objective": "lab_plain",
    "train__callbacks": ["lab_count"],
    "train__callback_options": {"lab_count": {"start": 100}},
    "train__validate_every_steps": 4,
    "observe__metrics": ["lab_metric"],
    "observe__sinks": ["lab_lines"],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yields a folder with the package `my_lab`, on this process's path, and `shards`."""
    folder = write_lab(tmp_path_factory.mktemp("lab"))
    sys.path.insert(0, str(folder))
    extensions._entry_points.cache_clear()
    load_extensions(["my_lab"])
    write_shards(folder)
    yield folder
    # Messages of other tests list the names that there are, and its entry point.
    sys.path.remove(str(folder))
    extensions._entry_points.cache_clear()
    for registry, _, _ in SELECTED:
        for name in [name for name in registry.names() if name.startswith("lab_")]:
            del registry._found[name]
    for module in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[module]


def train(lab: Path, config: Resolved, stop_at: int | None, attempt: int) -> Outcome:
    """Trains as a rank that finds the package, and hasn't imported it yet."""
    assert "my_lab" not in sys.modules
    sys.path.insert(0, str(lab))
    return train_as_rank(config, stop_at, attempt)


def configuration(folder: Path, lab: Path, **changes: Any) -> Resolved:
    return tiny_config(folder, shards=lab / "shards", num_workers=2, **(ALL | changes))


def test_a_stopped_run_resumes_to_the_same_records(lab: Path, tmp_path: Path) -> None:
    whole = configuration(tmp_path / "whole", lab)
    parts = configuration(tmp_path / "parts", lab)
    assert run_ranks(train, 2, lab, whole, None, 1)[0].finished
    assert run_ranks(train, 2, lab, parts, 4, 1)[0].step == 4
    assert run_ranks(train, 2, lab, parts, None, 2)[1].finished
    records = metrics_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "parts") == records

    entropies = [record["lab/entropy"] for record in records]
    # The record's own adds a rank's two layers in float32.
    own = [record["router/entropy"] for record in records]
    assert entropies == pytest.approx(own, rel=2**-23)
    assert records[-1]["train/tokens"] == sum(record["lab/tokens"] for record in records)
    rates = [record["optim/lr"] for record in records]
    warm_up, falls = [0.5, 1.0], [1 - 0.9 * step / 7 for step in range(2, 8)]
    assert rates == pytest.approx([0.001 * share for share in warm_up + falls], rel=1e-12)

    for rank in range(2):
        said = (tmp_path / f"parts/runs/tiny/lab_{rank}.txt").read_text().splitlines()
        assert said == [
            "start 0 100", "checkpoint 3 103", "validation 4 104", "checkpoint 4 104",
            "end finished=False 4 104", "start 4 104", "checkpoint 6 106", "validation 8 108",
            "checkpoint 8 108", "end finished=True 8 108",
        ]  # fmt: skip
    lines = (tmp_path / "parts/runs/tiny/lab_lines.txt").read_text().splitlines()
    assert lines == [
        "resumes None seed 0", *(f"step {n}" for n in range(1, 5)), "closed 75",
        "resumes 4 seed 0", *(f"step {n}" for n in range(5, 9)), "closed 0",
    ]  # fmt: skip


def test_the_record_has_module_version_and_hash_and_a_rank_with_another_source_is_refused(
    lab: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path, lab)
    sources = config.run.extensions
    assert list(sources) == ["my_lab", "my_lab.things"], "what is named, and where the things are"
    assert all(source.startswith("0.3 sha256:") for source in sources.values())
    assert as_plain(config)["run"]["extensions"] == sources
    assert config.model.router.options == {"temperature": 2.0, "own_loss": 0.1}, "with defaults"
    other = replace(config, run=replace(config.run, extensions={"my_lab": "0.2 sha256:0"}))
    with pytest.raises(AssertionError, match="extension my_lab has another source here"):
        run_ranks(train, 2, lab, other, None, 1)


def test_a_sink_that_fails_is_given_up_and_told_once(lab: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, lab, observe__sink_options={"lab_lines": {"fails_at": 3}})
    assert run_ranks(train, 2, lab, config, None, 1)[0].finished
    (warning,) = [e["reason"] for e in events_of(tmp_path) if e["event"] == "warning"]
    assert "sink lab_lines failed and gets no more records: OSError: no space" in warning
    lines = (tmp_path / "runs/tiny/lab_lines.txt").read_text().splitlines()
    assert lines == ["resumes None seed 0", "step 1", "step 2"]


def _plain(lab: Path, values: dict[str, Any]) -> str:
    """Returns what a process says of a plain configuration that has not imported the package."""
    sys.path.insert(0, str(lab))
    try:
        validated(values, Config)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_nothing_is_imported_because_a_configuration_names_it(lab: Path, tmp_path: Path) -> None:
    values = tiny_values(tmp_path, shards=lab / "shards", **ALL)
    with CONTEXT.Pool(1) as pool:
        said = pool.apply(_plain, (lab, values))
    assert said.startswith("model.router.name=lab_noisy: must be one of top_k; one of your own")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__router__name": "lab_noise"}, r"name=lab_noise: .*did you mean 'lab_noisy'"),
        ({"optim__options": {"beta3": 1}}, r"optim\.options=.*no option 'beta3' \(did you mean"),
        ({"train__callbacks": ["lab_count", "lab_count"]}, r"train\.callbacks=.*named twice"),
        ({"observe__metric_options": {"x": {}}}, r"'x' is not in observe\.metrics"),
        ({"model__experts__backend": "megablocks"}, "compute swiglu, not lab_relu2: use auto"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(
    lab: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration(tmp_path, lab, **changes)


def test_another_option_of_a_router_is_another_model_unless_it_is_accepted(
    lab: Path, tmp_path: Path
) -> None:
    few = {"train__num_steps": 3, "train__validate_every_steps": 3}
    run_ranks(train, 2, lab, configuration(tmp_path, lab, **few), None, 1)
    more = {"train__num_steps": 4, "model__router__options": {"temperature": 3.0}}
    with pytest.raises(
        AssertionError, match=r"temperature is 2\.0.*accept_changes='.model\.router"
    ) as told:
        run_ranks(train, 2, lab, configuration(tmp_path, lab, **more), None, 2)
    assert "extensions='[my_lab]'" in str(told.value), "the proposed branch needs it, too"
    accepted = {"checkpoint__accept_changes": ["model.router.options.temperature"]}
    config = configuration(tmp_path, lab, **more, **accepted)
    assert run_ranks(train, 2, lab, config, None, 3)[0].finished


def _commands(lab: Path, run: Path, folder: Path) -> dict[str, str]:
    """Returns what commands and the library say of a run whose package was not imported."""
    sys.path.insert(0, str(lab))
    said = {}
    try:
        api.load_model(run)
    except ConfigError as error:
        said["api"] = str(error)
    commands: list[tuple[str, Callable[[], int]]] = [
        ("export", lambda: export(ExportSettings(run=str(run), to=str(folder / "hf")))),
        ("branch", lambda: branch(BranchSettings(run=str(run), to=str(folder / "b")))),
    ]
    for name, command in commands:
        with redirect_stderr(StringIO()) as errors:
            assert command() == 2
        said[name] = errors.getvalue()
    assert "my_lab" not in sys.modules
    import my_lab  # type: ignore[import-not-found]  # noqa: F401 - written by the test

    said["router"] = type(api.load_model(run).moe_layers()[0].router).__name__
    return said


def test_a_checkpoint_asks_for_its_extensions_by_name(lab: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, lab, train__num_steps=3, train__validate_every_steps=3)
    run_ranks(train, 2, lab, config, None, 1)
    with CONTEXT.Pool(1) as pool:
        said = pool.apply(_commands, (lab, tmp_path / "runs/tiny", tmp_path))
    for command in ("api", "export", "branch"):
        assert "trained with extensions=[my_lab,my_lab.things]: give that" in said[command]
    assert said["router"] == "Noisy"
