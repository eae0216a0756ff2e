"""Registries, and the modules that a user names: what is loaded, what is refused, and by what."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data_pipeline import extensions
from data_pipeline.extensions import (
    Registry,
    load_extensions,
    load_installed,
    load_recorded,
    source_of,
)


@dataclass
class Options:
    """Settings of a thing."""

    needed: int
    rate: float = 0.5
    names: list[str] = field(default_factory=list)


def things() -> Registry[object]:
    return Registry("thing", setting="group.name", built_in={"own": "data_pipeline.threads"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Returns a folder on the path; what was imported from it is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    extensions._entry_points.cache_clear()
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]
    extensions._entry_points.cache_clear()


def test_what_is_registered_is_found_by_its_name() -> None:
    registry = things()

    @registry.register("mine", options=Options)
    def mine() -> None: ...

    assert registry.names() == ["own", "mine"]
    assert registry.known("mine") == "mine"
    assert registry.get("mine").made is mine
    assert registry.module_of("mine") == __name__
    assert registry.module_of("own") is None
    with pytest.raises(ValueError, match=r"one of own, mine \(did you mean 'mine'\?\); .*extens"):
        registry.known("mime")


def test_options_are_typed_and_have_their_defaults() -> None:
    registry = things()
    registry.register("mine", options=Options)(object())
    registry.register("bare")(object())
    checked = registry.checked_options("mine", {"needed": "3"})
    assert checked == {"needed": 3, "rate": 0.5, "names": []}
    assert registry.checked_options("mine", checked) == checked, "again changes nothing"
    assert registry.typed_options("mine", checked) == Options(needed=3)
    assert registry.default_options("mine") == {"rate": 0.5, "names": []}
    assert registry.checked_options("bare", {}) == registry.default_options("bare") == {}
    assert registry.typed_options("bare", {}) is None
    refused: list[tuple[str, dict[str, object], str]] = [
        (
            "mine",
            {"needed": 1, "rat": 2},
            r"no option 'rat' \(did you mean 'rate'\?\); it has need",
        ),
        ("mine", {"needed": "x"}, "option needed='x': must be a valid integer"),
        ("mine", {}, "option needed: "),
        ("bare", {"rate": 1}, "'bare' has no options, and was given rate"),
    ]
    for name, given, reason in refused:
        with pytest.raises(ValueError, match=reason):
            registry.checked_options(name, given)
    with pytest.raises(ValueError, match="must be a dataclass"):
        registry.register("other", options=dict)


def test_a_name_has_one_owner() -> None:
    registry = things()

    def first() -> None: ...

    def second() -> None: ...

    registry.register("mine")(first)
    registry.register("mine")(first)  # as where a notebook's cell runs again
    with pytest.raises(ValueError, match=r"'mine' is registered by tests.* already"):
        registry.register("mine")(second)
    with pytest.raises(ValueError, match="'own' is built in"):
        registry.register("own")(second)


def test_modules_are_found_by_name_by_entry_point_and_in_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "some_lab").mkdir()
    (folder / "some_lab/__init__.py").write_text("")
    (folder / "some_lab/parts.py").write_text("")
    info = folder / "some_lab-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-lab\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[moetrain.extensions]\nparts = some_lab.parts\n")
    (info / "top_level.txt").write_text("some_lab\n")
    assert load_extensions(["some_lab", "parts", "some_lab.parts"]) == [
        "some_lab",
        "some_lab.parts",
    ]
    assert load_installed() == ["some_lab.parts"]
    assert source_of("some_lab.parts").startswith("1.2 sha256:")

    (info / "entry_points.txt").write_text("[moetrain.extensions]\nparts = some_lab.gone\n")
    extensions._entry_points.cache_clear()
    with pytest.raises(ValueError, match=r"package offers the extension parts, and .*uninstall it"):
        load_installed()

    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "here_alone.py").write_text("")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert load_extensions(["here_alone"]) == ["here_alone"]
    assert source_of("here_alone").startswith("sha256:"), "of no installed package"


@pytest.mark.parametrize(
    ("source", "name", "reason"),
    [
        ("", "lab.no_such", r"no module lab\.no_such .*offered: none.*install it, or run where"),
        ("import torch_of_another", "lab", "importing lab failed: ModuleNotFoundError: .*another"),
        ("1 / 0", "lab", "importing lab failed: ZeroDivisionError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(
    folder: Path, source: str, name: str, reason: str
) -> None:
    (folder / "lab").mkdir()
    (folder / "lab/__init__.py").write_text(source)
    with pytest.raises(ValueError, match=reason):
        load_extensions([name])


def test_the_source_covers_what_a_module_imports_of_its_package(folder: Path) -> None:
    (folder / "lab").mkdir()
    for name, text in [("__init__", ""), ("a", "from lab import b"), ("b", ""), ("c", "")]:
        (folder / f"lab/{name}.py").write_text(text)
    load_extensions(["lab.a"])
    before = source_of("lab.a")
    (folder / "lab/c.py").write_text("# not imported")
    assert source_of("lab.a") == before
    load_recorded({"lab.a": before}, where="rank 1")
    (folder / "lab/b.py").write_text("# another")
    assert source_of("lab.a") != before
    with pytest.raises(ValueError, match=r"rank 1: the extension lab\.a has another source here"):
        load_recorded({"lab.a": before}, where="rank 1")
    with pytest.raises(ValueError, match="rank 1: there is no module lab_2"):
        load_recorded({"lab_2": "sha256:0"}, where="rank 1")
