"""Saved under any layout, loaded under any other: the same words, by global expert id.

No training: tensors are filled with numbers that say which element of which tensor they are.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.checkpoint.blocks import held
from moetrain.checkpoint.manifest import Manifest, read_manifest, verify_files
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.tensor_files import CheckpointReader
from moetrain.model import Transformer
from moetrain.optim import allocate_state, build_optimizer
from moetrain.parallel import build_meshes, parallelize, resolve_topology
from moetrain.settings import (
    CheckpointSettings,
    GroupSettings,
    GroupsSettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
)
from moetrain.train.parameter_groups import freeze, parameter_roles
from moetrain.train.state import checkpoint_tensors
from tests.checkpoint.layouts import DEEPSEEK, DENSE, MIXTRAL, Layout
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its optimizer, and the layouts that it is saved and loaded in."""

    model: ModelSettings
    optim: OptimSettings
    layouts: tuple[Layout, ...]


CASES = {
    "mixtral": Case(
        MIXTRAL,
        OptimSettings(),
        (
            Layout(1),
            Layout(2, expert=2),
            Layout(2, replicate=2),
            Layout(4, expert=4),
            Layout(4, expert=2, replicate=2),
            Layout(6, expert=1),  # more expert shards than experts, and ranks without a part
        ),
    ),
    "deepseek": Case(
        DEEPSEEK,
        OptimSettings(
            name="sgd",
            momentum=0.9,
            groups=GroupsSettings(
                embedding=GroupSettings(frozen=True),
                router=GroupSettings(optimizer="adamw"),
                experts=GroupSettings(optimizer="adamw", lr_factor=0.5),
            ),
        ),
        (
            Layout(1),
            Layout(2, expert=1),
            Layout(4, expert=2),
            Layout(6, expert=3, replicate=2),
        ),
    ),
    "dense": Case(
        DENSE, OptimSettings(name="muon"), (Layout(1), Layout(4, replicate=2), Layout(4))
    ),
}
WORLDS = (1, 2, 4, 6)


def value(name: str, shape: tuple[int, ...], *, salt: int = 0) -> Tensor:
    """Returns a tensor in which each element says where it belongs; no two are alike."""
    size = math.prod(shape)
    assert size < 2**22, "each has a float32 of its own"
    first = zlib.crc32(f"{salt} {name}".encode()) % 2**22
    return ((torch.arange(size) + first) % 2**22 + 1).float().reshape(shape)


def build(case: Case, layout: Layout) -> dict[str, Tensor]:
    """Returns the live tensors of a model and of its optimizer, on this rank of the layout."""
    parallel = ParallelSettings(expert_degree=layout.expert, data_replicate_degree=layout.replicate)
    topology = resolve_topology(
        parallel, world_size=layout.world, num_experts=case.model.num_experts,
        ffn_hidden_dim=case.model.ffn_hidden_dim, ranks_per_node=8,
    )  # fmt: skip
    meshes = build_meshes(topology, device=CPU)
    with torch.device("meta"):
        model = Transformer(case.model)
    freeze(model, case.optim)
    model = parallelize(model, meshes, parallel, seed=0, device=CPU, compute_dtype=torch.float32)
    roles = parameter_roles(model)
    optimizer = build_optimizer(model.parameters(), case.optim, roles=roles)
    allocate_state(optimizer)
    tensors = checkpoint_tensors(model, optimizer)
    if case.model.is_moe:  # a rank's experts are those that the exchange sends its tokens for
        ids = topology.of(dist.get_rank()).experts(case.model.num_experts)
        last = f"model.layers.{case.model.num_layers - 1}.feed_forward.experts.gate"
        part = held(tensors[last])
        assert range(part.offset[0], part.offset[0] + part.local.shape[0]) == ids
    return tensors


def fill(tensors: Mapping[str, Tensor], *, salt: int = 0) -> None:
    for name, tensor in tensors.items():
        part = held(tensor)
        index = tuple(slice(o, o + n) for o, n in zip(part.offset, part.local.shape, strict=True))
        part.local.copy_(value(name, tuple(tensor.shape), salt=salt)[index])


def wrong_on_this_rank(tensors: Mapping[str, Tensor]) -> list[str]:
    wrong = []
    for name, tensor in tensors.items():
        part = held(tensor)
        index = tuple(slice(o, o + n) for o, n in zip(part.offset, part.local.shape, strict=True))
        if not torch.equal(part.local, value(name, tuple(tensor.shape))[index]):
            wrong.append(name)
    return wrong


def wrong_when_gathered(tensors: Mapping[str, Tensor]) -> list[str]:
    """As before, but torch puts the tensors together: it knows nothing of our offsets."""
    return [
        name
        for name, tensor in tensors.items()
        if name.startswith("model.")  # an optimizer's are laid out as these
        and not torch.equal(
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor,
            value(name, tuple(tensor.shape)),
        )
    ]


def open_store(directory: Path, **settings: Any) -> CheckpointStore:
    return CheckpointStore(
        directory,
        CheckpointSettings(**settings),
        attempt=1,
        config={"model": "any"},
        mesh={"world_size": dist.get_world_size()},
        timeout=timedelta(seconds=60),
        event=lambda *a, **k: None,
    )


def folder_of(top: Path, name: str, layout: Layout) -> Path:
    return top / f"{name}-world{layout.world}-{layout}"


STATE = {"step": 7, "samples": 56, "tokens": 2**53 + 1, "position": {"units": {"a": 3}}, "x": 0.1}


def into(tensors: dict[str, Tensor]) -> Callable[[Manifest], dict[str, Tensor]]:
    """Returns what a store asks for the tensors to load, whatever the checkpoint."""
    return lambda _: tensors


def save_all(top: Path, world: int) -> list[str]:
    """Saves every case in every layout of this world; returns what was wrong before that."""
    wrong = []
    for name, case in CASES.items():
        for number, layout in enumerate(case.layouts):
            if layout.world == world:
                tensors = build(case, layout)
                fill(tensors)
                wrong += [f"{name} {layout} {n}" for n in wrong_when_gathered(tensors)]
                store = open_store(folder_of(top, name, layout), async_save=number % 2 == 0)
                store.save(tensors, step=7, state=STATE)
                store.wait()
    return wrong


def load_all(top: Path, world: int) -> tuple[int, list[str]]:
    """Loads every case from every layout in those of this world; returns how often, and what
    was wrong."""
    wrong, count = [], 0
    for name, case in CASES.items():
        for layout in case.layouts:
            if layout.world != world:
                continue
            tensors = build(case, layout)
            for saved in case.layouts:
                for tensor in tensors.values():
                    held(tensor).local.fill_(torch.nan)
                store = open_store(folder_of(top, name, saved))
                manifest = store.load_newest(into(tensors), same_model=lambda _: None)
                state = manifest and manifest.state
                told = f"{name}, saved in {saved}, loaded in {layout}: "
                if state != STATE:
                    wrong.append(f"{told}{state}")
                wrong += [told + n for n in wrong_on_this_rank(tensors)]
                count += 1
    return count, wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("layouts")
    for world in WORLDS:
        for wrong in run_ranks(save_all, world, top, world):
            assert wrong == []
    return top


@pytest.mark.trap(11)
@pytest.mark.parametrize("world", WORLDS)
def test_loaded_in_any_layout_is_what_any_layout_saved(saved: Path, world: int) -> None:
    """Parameters, AdamW's and SGD's state, selection biases and counters, bit for bit."""
    loads = sum(
        len(case.layouts) for case in CASES.values() for lay in case.layouts if lay.world == world
    )
    for count, wrong in run_ranks(load_all, world, saved, world):
        assert count == loads
        assert wrong == []


@pytest.mark.trap(11)
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_holds_the_same_whatever_layout_wrote_it(saved: Path, name: str) -> None:
    case, shapes = CASES[name], []
    for layout in case.layouts:
        folder = folder_of(saved, name, layout) / "step_00000007"
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        assert manifest.state == STATE
        assert len(manifest.files) == layout.world
        shapes.append({n: (e.shape, e.dtype) for n, e in manifest.tensors.items()})
        assert shapes[-1] == shapes[0]
        with CheckpointReader(folder) as reader:
            for tensor, entry in manifest.tensors.items():
                assert torch.equal(reader.read(tensor), value(tensor, entry.shape)), tensor
    kinds = {n.rsplit(".", 1)[1] for n in shapes[0] if n.startswith("optimizer.")}
    more = {"deepseek": {"momentum_buffer"}, "dense": {"momentum"}}.get(name, set())
    assert kinds == {"exp_avg", "exp_avg_sq", "step"} | more
    assert ("model.layers.1.feed_forward.router.bias" in shapes[0]) == case.model.is_moe


# ── Two saves in a row ────────────────────────────────────────────────────────────────────────


def save_twice(directory: Path, async_save: bool) -> list[bool]:
    """Trains on while a save is held up; returns whether save() came back before it was written."""
    import threading

    from moetrain.checkpoint import store as module

    go_on, write_file = {step: threading.Event() for step in (1, 2)}, module._write_file

    def held_up(staged: Path, *arguments: Any, **others: Any) -> Any:
        if async_save:
            assert go_on[int(staged.name.split("_")[1])].wait(60)
        return write_file(staged, *arguments, **others)

    module._write_file = held_up
    tensors = build(CASES["mixtral"], Layout(2, expert=2))
    # Large enough for many buffers; a view, as shards of larger memory are.
    tensors["large"] = torch.zeros(1_000_000, 2)[:, 0]
    store, early = open_store(directory, async_save=async_save, keep_last=2), []
    for step in (1, 2):
        fill(tensors, salt=step)
        store.save(tensors, step=step, state={"step": step})
        early.append(not (directory / f"step_{step:08d}").exists())
        for tensor in tensors.values():
            held(tensor).local.fill_(torch.nan)  # the next steps of training
        go_on[step].set()
    fill(tensors, salt=3)
    store.wait()
    return early


@pytest.mark.trap(23)
@pytest.mark.parametrize("async_save", [False, True])
def test_a_checkpoint_holds_what_was_there_when_its_save_began(
    tmp_path: Path, async_save: bool
) -> None:
    """Whatever training writes afterwards, and whatever the next save stages."""
    for early in run_ranks(save_twice, 2, tmp_path, async_save):
        assert early == [async_save, async_save]
    for step in (1, 2):
        folder = tmp_path / f"step_{step:08d}"
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        with CheckpointReader(folder) as reader:
            for name, entry in manifest.tensors.items():
                assert torch.equal(reader.read(name), value(name, entry.shape, salt=step)), name


def save_growing(directory: Path) -> None:
    """The first save comes before the optimizer has any state: all steps were skipped."""
    tensors = build(CASES["mixtral"], Layout(2))
    fill(tensors)
    store = open_store(directory)
    first = {name: t for name, t in tensors.items() if name.startswith("model.")}
    for step, some in enumerate((first, tensors, first), start=1):
        store.save(some, step=step, state={})
    store.wait()


def test_a_set_of_tensors_that_grows_or_shrinks_is_saved_whole(tmp_path: Path) -> None:
    run_ranks(save_growing, 2, tmp_path)
    held_there = []
    for step in (1, 2, 3):
        with CheckpointReader(tmp_path / f"step_{step:08d}") as reader:
            for name, entry in reader.manifest.tensors.items():
                assert torch.equal(reader.read(name), value(name, entry.shape)), name
            held_there.append(len(reader.manifest.tensors))
    assert held_there[0] == held_there[2]
    assert held_there[1] > 3 * held_there[0]
