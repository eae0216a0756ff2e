"""Path settings of every command: an empty one is refused, and `~` is the home folder."""

import dataclasses
import json
import pwd
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hydra.core.global_hydra import GlobalHydra
from pydantic import TypeAdapter, ValidationError

from data_pipeline import BuildSettings, DataError, ShardFolder
from data_pipeline.commands import command
from data_pipeline.inspect import InspectSettings
from data_pipeline.settings import CacheSettings, PathText
from data_pipeline.storage import open_files
from launch.plan import persistent_folder
from launch.submit.__main__ import SubmitConfig
from launch.submit.job import entrypoint
from moetrain.checkpoint.__main__ import VerifySettings
from moetrain.checks import ConfigError
from moetrain.command import config_dir, run_command
from moetrain.export import ExportSettings
from moetrain.import_hf import ImportSettings
from moetrain.parallel.kernel_choice import default_cache, fastest
from moetrain.report.__main__ import ReportSettings
from moetrain.settings import Config
from moetrain.upcycle.__main__ import UpcycleSettings
from tests.data_pipeline.conftest import build, write_corpus

# Each command's module, its settings, and overrides that it must be given beside a path.
COMMANDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "data_pipeline.build": (BuildSettings, ("tokenizer=bytes", "to=shards")),
    "data_pipeline.inspect": (InspectSettings, ("dir=shards",)),
    "moetrain": (Config, ()),
    "moetrain.checkpoint": (VerifySettings, ()),
    "moetrain.export": (ExportSettings, ("run=runs/a", "to=hf")),
    "moetrain.import_hf": (ImportSettings, ("from=hf", "to=runs/a")),
    "moetrain.report": (ReportSettings, ()),
    "moetrain.upcycle": (UpcycleSettings, ("from=a", "to=b", "num_experts=2", "top_k=1")),
    "launch.submit": (SubmitConfig, ()),
}
PATHS = [
    ("data_pipeline.build", "corpus"),
    ("data_pipeline.build", "sources.a.corpus"),
    ("data_pipeline.build", "tokenizer"),
    ("data_pipeline.build", "to"),
    ("data_pipeline.inspect", "dir"),
    ("data_pipeline.inspect", "cache.dir"),
    ("moetrain", "data.dir"),
    ("moetrain", "data.corpus"),
    ("moetrain", "data.tokenizer"),
    ("moetrain", "data.cache.dir"),
    ("moetrain", "run.dir"),
    ("moetrain", "checkpoint.upload_to"),
    ("moetrain.checkpoint", "verify"),
    ("moetrain.export", "run"),
    ("moetrain.export", "to"),
    ("moetrain.export", "tokenizer"),
    ("moetrain.import_hf", "from"),
    ("moetrain.import_hf", "to"),
    ("moetrain.report", "run"),
    ("moetrain.upcycle", "from"),
    ("moetrain.upcycle", "to"),
    ("launch.submit", "submit.working_dir"),
]
NAMES = {name.rpartition(".")[2].replace("from", "from_") for _, name in PATHS}


def outcome(module: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[Any]]:
    """Returns a command's exit code, and the settings that its work would have been given."""
    tree, needed = COMMANDS[module]
    keys = {word.partition("=")[0] for word in words}
    given = [word for word in needed if word.partition("=")[0] not in keys]
    monkeypatch.setattr(sys, "argv", [module, *given, *words])
    GlobalHydra.instance().clear()
    got: list[Any] = []

    def work(settings: Any) -> int:
        got.append(settings)
        return 0

    if module.startswith("data_pipeline."):
        try:
            command.run_command(got.append, settings_type=tree, module=module, about="")
        except SystemExit as exited:
            return int(str(exited.code)), got
        return 0, got
    files = config_dir() if issubclass(tree, Config) else None
    with pytest.raises(SystemExit) as ended:
        run_command(work, tree=tree, module=module, files=files)
    return int(str(ended.value.code)), got


def value_of(settings: Any, key: str) -> Any:
    for part in key.replace("from", "from_").split("."):
        settings = settings[part] if isinstance(settings, dict) else getattr(settings, part)
    return settings


@pytest.mark.parametrize(("module", "key"), PATHS)
def test_an_empty_path_is_refused(
    module: str, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, got = outcome(module, f"{key}=", monkeypatch=monkeypatch)
    assert (code, got) == (2, [])
    error = capsys.readouterr().err
    assert f"{key}=" in error
    assert "is empty, as from a shell's variable that isn't set" in error


@pytest.mark.parametrize(("module", "key"), PATHS)
def test_a_tilde_is_the_home_folder(
    module: str, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    code, got = outcome(module, f"{key}='~/some where'", monkeypatch=monkeypatch)
    assert code == 0
    assert value_of(got[0], key) == f"{tmp_path}/some where"


def test_a_tilde_in_a_file_of_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [toy]\nrun: {dir: ~/runs}\ndata: {corpus: ~/text}\n"
    )
    monkeypatch.setenv("HOME", "/home/somebody")
    words = ("--config-dir", str(tmp_path / "conf"), "experiment=mine")
    code, got = outcome("moetrain", *words, monkeypatch=monkeypatch)
    assert code == 0
    assert got[0].run.dir == "/home/somebody/runs"
    assert got[0].data.corpus == "/home/somebody/text"


def path_settings(kind: Any) -> Iterator[tuple[type, str, Any]]:
    """The fields of a tree of settings that have the name of a path, with their types."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if name in NAMES and hint is not bool and not dataclasses.is_dataclass(hint):
                yield kind, name, hint
            yield from path_settings(hint)
    for inner in get_args(kind):
        yield from path_settings(inner)


@pytest.mark.parametrize("module", COMMANDS)
def test_every_setting_with_the_name_of_a_path_is_one(module: str) -> None:
    for kind, name, hint in path_settings(COMMANDS[module][0]):
        is_path = PathText in (hint, *get_args(hint))
        assert is_path, f"{kind.__name__}.{name} is a path: give it the type PathText"


@pytest.mark.parametrize(
    ("home", "path", "reason"),
    [
        ("", "~/runs", "HOME isn't set, so that ~ means no folder"),
        ("/root", "~nobody-of-that-name/runs", "there is no user 'nobody-of-that-name'"),
        ("/root", "  ", "is empty"),
    ],
)
def test_a_home_that_there_is_not(
    home: str, path: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    with pytest.raises(ValidationError, match=reason):
        TypeAdapter(PathText).validate_python(path)


@pytest.mark.parametrize("path", ["runs", "/runs", "./~/runs", "a~b", "s3://b/~x", "."])
def test_other_paths_stay_as_they_are(path: str) -> None:
    assert TypeAdapter(PathText).validate_python(path) == path


@pytest.mark.parametrize("recorded", ["", "~/text", "~nobody-of-that-name/text"])
def test_a_folder_built_from_such_a_path_before_can_still_be_read(
    recorded: str, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "text")
    build(tmp_path / "text", tmp_path / "shards")
    path = tmp_path / "shards" / "index.json"
    index = json.loads(path.read_text())
    next(iter(index["build"]["sources"].values()))["corpus"] = recorded
    path.write_text(json.dumps(index))
    opened = ShardFolder.open(tmp_path / "shards")
    (source,) = opened.index.build.sources.values()
    assert source.corpus == recorded


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, and a user without an entry in the passwd file, as in many a container."""

    def no_entry(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_entry)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_cache_of_shards_must_be_given(tmp_path: Path) -> None:
    url = "http://127.0.0.1:1/shards"
    with pytest.raises(DataError, match=r"no home folder.*give data\.cache\.dir=DIR"):
        open_files(url, cache=CacheSettings())
    open_files(url, cache=CacheSettings(dir=str(tmp_path)))


def _told(seconds: Mapping[str, float], names: Sequence[str]) -> Mapping[str, float]:
    return {name: seconds[name] for name in names}


@pytest.mark.usefixtures("homeless")
def test_without_a_home_backends_are_measured_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() is None
    for best, other in ("ab", "ba"):
        seconds = {best: 1.0, other: 2.0}
        assert fastest("ab", key="x", measured=partial(_told, seconds), cache=None) == best


@pytest.mark.usefixtures("homeless")
def test_without_a_home_a_ray_job_needs_an_absolute_run_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match=r"run\.dir=runs: .* absolute one"):
        persistent_folder("runs")
    assert persistent_folder("/mnt/runs") == Path("/mnt/runs")


@pytest.mark.usefixtures("homeless")
def test_without_a_home_a_tilde_is_refused() -> None:
    with pytest.raises(ValidationError, match="HOME isn't set"):
        TypeAdapter(PathText).validate_python("~/runs")


def test_a_job_python_may_lie_in_the_home_of_the_head_node() -> None:
    assert "; ~/'my env/bin/python' -m moetrain a=1;" in entrypoint(
        ["a=1"], python="~/my env/bin/python", folder=None
    )
