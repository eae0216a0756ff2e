"""What import-linter can't say: which files may import a library."""

import ast
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for top in ("moetrain", "launch", "data_pipeline") for p in (ROOT / top).rglob("*.py")]


def imported_by(path: Path) -> set[str]:
    """Returns the dotted names of all modules that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers(library: str) -> set[str]:
    """Returns the source files that import a library or a part of it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name == library or name.startswith(f"{library}.") for name in imported_by(path))
    }


def module_of(path: Path) -> str:
    """Returns the dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Also not by an import inside a function."""
    modules = {module_of(path): path for path in SOURCES}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [part if part in modules else str(node.module) for part in parts]
            else:
                continue
            graph[name] |= modules.keys() & set(found)
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_nothing_is_imported_for_type_checking_alone() -> None:
    assert not importers("typing.TYPE_CHECKING")


def test_each_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {module_of(path.parent / "__init__.py") for path in SOURCES} == {
        name for name in listed if name != "moetrain.conf"
    }


def test_model_and_kernels_never_import_torch_distributed() -> None:
    assert not {
        p
        for p in importers("torch.distributed")
        if p.startswith(("moetrain/model", "moetrain/kernels"))
    }


@pytest.mark.parametrize(
    ("library", "files"),
    [
        # What a run does with a cluster, and whether it may; jobs are submitted by HTTP, also from
        # where no Ray runs.
        (
            "ray",
            {
                "launch/on_ray/answers.py",
                "launch/on_ray/cluster.py",
                "launch/on_ray/private.py",
                "launch/on_ray/rank_actor.py",
                "launch/submit/ray_jobs.py",
                "data_pipeline/building/ray_workers.py",
            },
        ),
        ("grpc", {"launch/on_ray/access.py"}),
        # Ours are written and read in one place; another reads Hugging Face's.
        (
            "safetensors",
            {"moetrain/checkpoint/tensor_files.py", "moetrain/huggingface/weights.py"},
        ),
        ("wandb", {"moetrain/observe/wandb_sink.py"}),
        # Shards are byte for byte its own, which a test compares.
        ("webdataset", set()),
        # Read as text, and written as tables of runs.
        ("pyarrow", {"data_pipeline/corpora/arrow_tables.py", "moetrain/compare/tables.py"}),
        ("zstandard", {"data_pipeline/corpora/compression.py"}),
        ("selectolax", {"data_pipeline/corpora/html_text.py"}),
        ("tokenizers", {"data_pipeline/tokenizers/json_tokenizer.py"}),
        ("sentencepiece", {"data_pipeline/tokenizers/mixtral_tokenizer.py"}),
        # Made in one place, for shards and for checkpoints.
        (
            "fsspec",
            {
                "data_pipeline/object_stores.py",
                "data_pipeline/storage.py",
                "moetrain/checkpoint/remote/object_folder.py",
            },
        ),
        ("gcsfs", {"data_pipeline/object_stores.py"}),
        ("aiohttp", {"data_pipeline/storage.py"}),
        # Each of the two packages that have commands has one entry of its own.
        # What both need of it stands in the data pipeline; one file serves sweepers and launchers.
        (
            "hydra",
            {
                "moetrain/command.py",
                # Sweepers and launchers of others.
                "moetrain/sweeping/combinations.py",
                "moetrain/sweeping/plugins.py",
                "moetrain/sweeping/trial_launcher.py",
                "data_pipeline/commands/hydra_private.py",
                "data_pipeline/commands/command.py",
                # What both entries do with words, files and errors before and after it.
                "data_pipeline/commands/command_line.py",
                "data_pipeline/commands/settings_files.py",
                "data_pipeline/commands/composition.py",
                "data_pipeline/commands/composition_errors.py",
            },
        ),
        # The look of figures, and what a report and a comparison draw.
        (
            "matplotlib",
            {
                "moetrain/report/drawing.py",
                "moetrain/report/figures.py",
                "moetrain/compare/figures.py",
            },
        ),
        ("mpmath", {"moetrain/compare/noise.py"}),
        ("huggingface_hub", {"moetrain/huggingface/hub.py"}),
        ("megablocks", {"moetrain/kernels/megablocks_ops.py"}),
        ("stk", {"moetrain/kernels/megablocks_ops.py"}),
        ("triton", {"moetrain/kernels/megablocks_ops.py"}),
    ],
)
def test_a_library_is_imported_in_one_place(library: str, files: set[str]) -> None:
    assert importers(library) == files


PRIVATE = {
    "ray._private": "launch/on_ray/private.py",
    "ray._raylet": "launch/on_ray/private.py",
    "hydra._internal": "data_pipeline/commands/hydra_private.py",
}


@pytest.mark.parametrize("part", PRIVATE)
def test_private_parts_of_a_library_are_used_in_one_file(part: str) -> None:
    users = {p.relative_to(ROOT).as_posix() for p in SOURCES if part in p.read_text()}
    assert users == {PRIVATE[part]}


@pytest.mark.parametrize(
    ("call", "file"),
    [
        ("fcntl.flock(", "data_pipeline/locks.py"),
        ("os.replace(", "data_pipeline/atomic_files.py"),
    ],
)
def test_locks_and_atomic_files_are_made_in_one_place(call: str, file: str) -> None:
    users = {p.relative_to(ROOT).as_posix() for p in SOURCES if call in p.read_text()}
    assert users == {file}
