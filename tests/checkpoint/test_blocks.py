"""Parts of tensors: where they meet, how files hold them, and who is to write which."""

import itertools
import math
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.checkpoint.blocks import as_block, held, parts_at, places_to_write
from moetrain.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    TensorEntry,
    describe_file,
    manifest_text,
    read_manifest,
    verify_files,
)
from moetrain.checkpoint.offline import write_checkpoint
from moetrain.checkpoint.stored_blocks import Block
from moetrain.checkpoint.tensor_files import CheckpointReader, TensorFileWriter, overlap
from moetrain.model import Transformer
from moetrain.optim import allocate_state, build_optimizer
from moetrain.parallel import build_meshes, parallelize, resolve_topology
from moetrain.settings import OptimSettings, ParallelSettings
from moetrain.train.state import checkpoint_tensors
from tests.checkpoint.layouts import DEEPSEEK, DENSE, MIXTRAL, Layout

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
SHAPES = [(), (1,), (7,), (5, 3), (1, 9), (4, 3, 5), (2, 3, 4, 5), (3, 1, 1, 2)]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, rng: np.random.Generator) -> Tensor:
    """Returns arbitrary bytes as numbers: nan, -0.0 and denormals too."""
    content = rng.integers(0, 2 if dtype == torch.bool else 256, math.prod(shape) * dtype.itemsize)
    tensor = torch.empty(math.prod(shape), dtype=dtype)
    tensor.view(torch.uint8).copy_(torch.from_numpy(content))
    return tensor.reshape(shape)


def same_bytes(ours: Tensor, theirs: Tensor) -> bool:
    def words(t: Tensor) -> Tensor:
        return t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    alike = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    return alike and torch.equal(words(ours), words(theirs))


def random_tiles(block: Block, rng: np.random.Generator, *, depth: int = 4) -> list[Block]:
    """Cuts a block at random places, again and again."""
    wide = [d for d, n in enumerate(block.shape) if n > 1]
    if not wide or not depth or rng.random() < 0.1:
        return [block]
    dim = int(rng.choice(wide))
    at = int(rng.integers(1, block.shape[dim]))
    low, high = list(block.shape), list(block.shape)
    low[dim], high[dim] = at, block.shape[dim] - at
    offset = list(block.offset)
    offset[dim] += at
    return [
        *random_tiles(Block(block.offset, tuple(low)), rng, depth=depth - 1),
        *random_tiles(Block(tuple(offset), tuple(high)), rng, depth=depth - 1),
    ]


def random_block(shape: tuple[int, ...], rng: np.random.Generator) -> Block:
    """Returns any block of a shape; it may be empty."""
    ends = [sorted(rng.integers(0, n + 1, 2).tolist()) for n in shape]
    return Block(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def index_of(block: Block) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))


def write_tiles(
    folder: Path, tensors: dict[str, Tensor], tiles: dict[str, list[Block]], *, lost: int = -1
) -> Path:
    """Writes a checkpoint by hand: the n-th tile of each tensor is in the n-th file.

    All tiles except the `lost` one.
    """
    folder.mkdir()
    manifest = Manifest(
        step=1,
        attempt=1,
        state={},
        config={},
        tensors={
            name: TensorEntry(shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
            for name, t in tensors.items()
        },
        files={},
    )
    for number in range(max(map(len, tiles.values()))):
        if number == lost:
            continue
        file = f"rank_{number:05d}.safetensors"
        here = {name: cut[number] for name, cut in tiles.items() if number < len(cut)}
        entries = {n: (tensors[n].dtype, block.shape) for n, block in here.items()}
        with TensorFileWriter(folder / file, entries) as writer:
            for name, block in here.items():
                writer.write(name, tensors[name][index_of(block)])
                whole = manifest.tensors[name]
                manifest.tensors[name] = replace(whole, blocks={**whole.blocks, file: block})
        manifest.files[file] = writer.entry
    (folder / MANIFEST).write_text(manifest_text(manifest))
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_two_blocks_meet_where_both_have_the_same_elements(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    whole = torch.arange(math.prod(shape)).reshape(shape)
    met = apart = 0
    for _ in range(200):
        a, b = random_block(shape, rng), random_block(shape, rng)
        ours, theirs = whole[index_of(a)], whole[index_of(b)]
        both = set(ours.flatten().tolist()) & set(theirs.flatten().tolist())
        if (found := overlap(a, b)) is None:
            assert not both
            apart += 1
        else:
            assert torch.equal(ours[found[0]], theirs[found[1]])
            assert set(ours[found[0]].flatten().tolist()) == both
            met += 1
    assert met
    assert apart or not shape


@pytest.mark.parametrize("seed", range(6))
def test_any_part_is_read_from_any_tiling_in_every_dtype(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {
        f"{number}.{dtype}": random_tensor(shape, dtype, rng)
        for number, shape in enumerate(SHAPES)
        for dtype in DTYPES
    }
    tiles = {
        name: random_tiles(Block((0,) * t.ndim, tuple(t.shape)), rng) for name, t in tensors.items()
    }
    folder = write_tiles(tmp_path / "tiled", tensors, tiles)
    verify_files(folder, read_manifest(folder))
    with CheckpointReader(folder) as reader:
        read = {name: reader.read(name) for name in tensors}
        for name, tensor in tensors.items():
            for _ in range(3):
                block = random_block(tuple(tensor.shape), rng)
                index = index_of(block)
                assert same_bytes(reader.read(name, index), tensor[index]), (name, block)
                # As a rank reads: into memory of its own that needn't be contiguous.
                room = random_tensor((*block.shape, 2), tensor.dtype, rng)
                reader.read_into(name, room[..., 0], offset=block.offset)
                assert same_bytes(room[..., 0], tensor[index]), (name, block)
    for name, tensor in tensors.items():  # the files are closed: nothing lives in them
        assert same_bytes(read[name], tensor), name


def test_slices_mean_what_they_mean_in_torch(tmp_path: Path) -> None:
    tensor = torch.arange(60).reshape(5, 4, 3)
    tiles = random_tiles(Block((0, 0, 0), (5, 4, 3)), np.random.default_rng(1))
    folder = write_tiles(tmp_path / "tiled", {"x": tensor}, {"x": tiles})
    bounds = [slice(None), slice(-2, None), slice(1, 99), slice(3, 1), slice(None, -1, 1)]
    with CheckpointReader(folder) as reader:
        for count in range(4):
            for index in itertools.product(bounds, repeat=count):
                assert torch.equal(reader.read("x", index), tensor[index]), index
        for wrong in ((slice(None),) * 4, (slice(0, 4, 2),), (slice(None, None, -1),)):
            with pytest.raises(ValueError, match=r"no part of x, which is \[5, 4, 3\]"):
                reader.read("x", wrong)
        with pytest.raises(CheckpointError, match="no tensor y"):
            reader.read("y")


def test_a_part_that_no_file_holds_is_an_error_and_all_others_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(), (6,), (5, 7), (4, 3, 2)]):
        tensor = random_tensor(shape, torch.float32, rng)
        tiles = random_tiles(Block((0,) * len(shape), shape), rng)
        for lost, hole in enumerate(tiles):
            folder = tmp_path / f"{number}_{lost}"
            write_tiles(folder, {"x": tensor}, {"x": tiles}, lost=lost)
            held_there = tensor.numel() - math.prod(hole.shape)
            with CheckpointReader(folder) as reader:
                with pytest.raises(
                    CheckpointError, match=rf"{held_there} of the {tensor.numel()} elements of x"
                ):
                    reader.read("x")
                for tile in tiles:
                    if tile != hole:
                        index = index_of(tile)
                        assert same_bytes(reader.read("x", index), tensor[index])


def test_only_files_with_a_part_of_what_is_asked_for_are_opened(tmp_path: Path) -> None:
    tensor = torch.arange(8.0)
    tiles = [Block((start,), (2,)) for start in range(0, 8, 2)]
    folder = write_tiles(tmp_path / "tiled", {"x": tensor}, {"x": tiles})
    (folder / "rank_00003.safetensors").unlink()
    with CheckpointReader(folder) as reader:
        assert torch.equal(reader.read("x", (slice(1, 6),)), tensor[1:6])
        with pytest.raises(CheckpointError, match="rank_00003"):
            reader.read("x")


# ── Files ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "ä": "“"}])
def test_a_file_is_what_safetensors_itself_reads(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    """Odd sizes before wide words, tensors without elements and of no dimension among them."""
    rng = np.random.default_rng(0)
    shapes = [(3,), *SHAPES, (0,), (4, 0, 2)]
    tensors = {
        f"ü.{number}.{dtype}": random_tensor(shape, dtype, rng)
        for number, shape in enumerate(shapes)
        for dtype in reversed(DTYPES)
    }
    path = tmp_path / "a.safetensors"
    entries = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    with TensorFileWriter(path, entries, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            rows = tensor.split(int(rng.integers(1, 4))) if tensor.ndim else [tensor]
            for piece in rows:
                writer.write(name, piece)
    assert writer.entry == describe_file(path)
    assert writer.entry.size == path.stat().st_size
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bytes(loaded[name], tensor), name
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == metadata


def test_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    views = {"x": x.t(), "y": x[:, 1:5:3].requires_grad_(), "z": x[2:3, 1], "0": x[3, 3]}
    entries = {name: (view.dtype, tuple(view.shape)) for name, view in views.items()}
    with TensorFileWriter(tmp_path / "a", entries) as file:
        for name, view in views.items():
            file.write(name, view)
    loaded = load_file(tmp_path / "a")
    for name, view in views.items():
        assert same_bytes(loaded[name], view.detach()), name


def test_what_was_not_said_of_a_file_is_refused(tmp_path: Path) -> None:
    f32 = torch.float32
    entries = {"a": (f32, (2, 3)), "b": (f32, ()), "c": (torch.int32, (0, 2))}
    rows = torch.zeros(2, 3)

    def attempt(*writes: tuple[str, Tensor]) -> None:
        path = tmp_path / "a"
        path.unlink(missing_ok=True)
        with TensorFileWriter(path, entries) as writer:
            for name, tensor in writes:
                writer.write(name, tensor)

    attempt(("a", rows[:1]), ("a", rows[1:]), ("b", torch.tensor(1.0)))
    for match, writes in {
        "b is written, but a is due": [("b", torch.tensor(1.0))],
        "z is written, but a is due": [("z", rows)],
        "24 bytes of a, but 0 are due": [("a", rows), ("a", rows)],
        "c is written, but b is due": [("a", rows), ("c", rows[:0, :2].int())],
        "b was not written whole": [("a", rows)],
        "a was not written whole": [("a", rows[:1])],
        "36 bytes of a, but 24 are due": [("a", torch.zeros(3, 3))],
        "24 bytes of a, but 12 are due": [("a", rows[:1]), ("a", rows)],
        r"a is torch.int32 \[2, 3\], but torch.float32": [("a", rows.int())],
        r"a is torch.float32 \[3, 2\], but torch.float32 \[2, 3\]": [("a", torch.zeros(3, 2))],
        r"a is torch.float32 \[6\], but": [("a", torch.zeros(6))],
        r"b is torch.float32 \[1\], but torch.float32 \[\]": [("a", rows), ("b", torch.zeros(1))],
    }.items():
        with pytest.raises(ValueError, match=match):
            attempt(*writes)
    with pytest.raises(ValueError, match="x is written, but nothing is due"):  # noqa: SIM117
        with TensorFileWriter(tmp_path / "none", {}) as writer:
            writer.write("x", rows)


def steps_of_writing(path: Path, num_tensors: int) -> int:
    """Returns how many instructions of the writer's own code writing many tensors takes."""
    entries = {f"t{n}": (torch.int8, (0 if n % 3 else 2,)) for n in range(num_tensors)}
    rows = {size: torch.zeros(size, dtype=torch.int8) for size in (0, 2)}
    steps = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal steps
        if not frame.f_code.co_filename.endswith("tensor_files.py"):
            return None
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return trace

    with TensorFileWriter(path, entries) as writer:
        sys.settrace(trace)
        try:
            for name, (_, shape) in entries.items():
                writer.write(name, rows[shape[0]])
        finally:
            sys.settrace(None)
    return steps


def test_writing_a_tensor_takes_as_much_however_many_there_are(tmp_path: Path) -> None:
    few, many = (steps_of_writing(tmp_path / str(n), n) for n in (50, 500))
    assert many < 1.1 * 10 * few


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"something of value")
    with pytest.raises(FileExistsError):
        TensorFileWriter(tmp_path / "a", {})
    assert (tmp_path / "a").read_bytes() == b"something of value"


def test_one_process_writes_a_checkpoint_in_files_and_pieces_of_bounded_size(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    shapes = {"small": (3,), "tall": (50, 4), "wide": (2, 100), "number": (), "none": (0, 5)}
    saved = {n: random_tensor(s, torch.float32, rng) for n, s in shapes.items()}
    saved["exact"] = random_tensor((7, 5, 2), torch.int16, rng)
    entries = {
        n: TensorEntry(shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
        for n, t in saved.items()
    }
    asked: list[tuple[str, tuple[slice, ...]]] = []

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        asked.append((name, index))
        return saved[name][index]

    for step, (file_bytes, piece_bytes) in enumerate([(10**9, 10**9), (900, 100), (1, 1)]):
        asked.clear()
        folder = write_checkpoint(
            tmp_path, step=step, state={"step": step}, config={}, mesh={}, tensors=entries,
            read=read, max_file_bytes=file_bytes, max_piece_bytes=piece_bytes,
        )  # fmt: skip
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        with CheckpointReader(folder) as reader:
            for name, tensor in saved.items():
                assert same_bytes(reader.read(name), tensor)
        for name, index in asked:
            row = saved[name][:1] if saved[name].ndim else saved[name]
            assert saved[name][index].nbytes <= max(piece_bytes, row.nbytes)
        for file in manifest.files:
            own = [saved[n].nbytes for n, e in manifest.tensors.items() if file in e.blocks]
            assert len(own) == 1 or sum(own) <= file_bytes
        assert len(manifest.files) == (1, 3, 6)[step]
        assert len(asked) == (6, 1 + 9 + 2 + 1 + 1 + 2, 3 + 50 + 2 + 1 + 1 + 7)[step]
    assert not any(entry.blocks for entry in entries.values()), "the caller's are left alone"


def test_a_checkpoint_whose_source_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="broke"):
        write_checkpoint(
            tmp_path, step=1, state={}, config={}, mesh={}, read=read,
            tensors={"x": TensorEntry(shape=(2,), dtype="float32")},
        )  # fmt: skip
    assert not [p.name for p in tmp_path.iterdir() if "attempt" not in p.name or p.is_dir()]


# ── Who writes what ───────────────────────────────────────────────────────────────────────────


def on_each_rank(world: int, function: Callable[[], Any]) -> list[Any]:
    """Returns what a function returns as each rank, one after the other in this process.

    Collectives do nothing: building and sharding a model need none. Each rank has a thread of its
    own, all of which live to the end, because torch keeps meshes by thread.
    """
    results: list[Any] = []
    end = threading.Event()

    def as_rank(rank: int, finished: threading.Event) -> None:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            results.append(function())
        finally:
            dist.destroy_process_group()
            finished.set()
        end.wait()

    threads = []
    for rank in range(world):
        finished = threading.Event()
        threads.append(threading.Thread(target=as_rank, args=(rank, finished)))
        threads[-1].start()
        finished.wait()
    end.set()
    for thread in threads:
        thread.join()
    assert len(results) == world, "a rank failed: see its thread's error"
    return results


class Share(NamedTuple):
    """What one rank holds of each tensor, in which dtype and whole shape, and what it writes."""

    holds: dict[str, Block]
    writes: dict[str, Block]
    whole: dict[str, tuple[int, ...]]
    width: dict[str, int]


def share_of(layout: Layout, model: Any, optim: OptimSettings) -> Share:
    device = torch.device("cpu")
    parallel = ParallelSettings(expert_degree=layout.expert, data_replicate_degree=layout.replicate)
    topology = resolve_topology(
        parallel, world_size=layout.world, num_experts=model.num_experts,
        ffn_hidden_dim=model.ffn_hidden_dim, ranks_per_node=8,
    )  # fmt: skip
    with torch.device("meta"):
        built = Transformer(model)
    built = parallelize(
        built, build_meshes(topology, device=device), parallel,
        seed=0, device=device, compute_dtype=torch.float32,
    )  # fmt: skip
    optimizer = build_optimizer(built.parameters(), optim)
    allocate_state(optimizer)
    tensors = checkpoint_tensors(built, optimizer)
    parts = parts_at(tensors, places_to_write(tensors))
    return Share(
        holds={name: as_block(held(tensor)) for name, tensor in tensors.items()},
        writes={name: as_block(part) for name, part in parts.items()},
        whole={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        width={name: tensor.element_size() for name, tensor in tensors.items()},
    )


SPREADS = [
    (MIXTRAL, Layout(1), OptimSettings()),
    (MIXTRAL, Layout(4, expert=4), OptimSettings()),
    (MIXTRAL, Layout(6, expert=1), OptimSettings()),  # more shards than experts
    (MIXTRAL, Layout(12, expert=2, replicate=3), OptimSettings()),
    (MIXTRAL, Layout(8, expert=1, replicate=8), OptimSettings(name="sgd", momentum=0.9)),
    (DEEPSEEK, Layout(9, expert=3, replicate=3), OptimSettings()),
    (DENSE, Layout(6, replicate=2), OptimSettings()),
]


@pytest.mark.parametrize(
    ("model", "layout", "optim"), SPREADS, ids=[f"{i}-{s[1]}" for i, s in enumerate(SPREADS)]
)
def test_all_ranks_together_write_each_element_once_and_share_the_work(
    model: Any, layout: Layout, optim: OptimSettings
) -> None:
    """Ranks that hold the same parts take turns at them, the largest first.

    In each round of turns the first rank's part is at most as large as the last one's of the round
    before; so the sums of two ranks differ by at most the largest part, and none is above the mean
    by more.
    """
    shares = on_each_rank(layout.world, lambda: share_of(layout, model, optim))
    whole, width = shares[0].whole, shares[0].width
    for name, shape in whole.items():
        count = np.zeros(shape, dtype=int)
        for share in shares:
            if name in share.writes:
                count[index_of(share.writes[name])] += 1
        assert (count == 1).all(), name

    # Ranks that hold the same part, and what each of them writes of such parts.
    holders: dict[tuple[str, Block], list[int]] = defaultdict(list)
    for rank, share in enumerate(shares):
        for name, block in share.holds.items():
            if math.prod(block.shape):
                holders[name, block].append(rank)
    loads: dict[tuple[int, ...], dict[int, int]] = {}
    largest: dict[tuple[int, ...], int] = defaultdict(int)
    for (name, block), ranks in holders.items():
        size = math.prod(block.shape) * width[name]
        (writer,) = [rank for rank in ranks if shares[rank].writes.get(name) == block]
        loads.setdefault(tuple(ranks), dict.fromkeys(ranks, 0))[writer] += size
        largest[tuple(ranks)] = max(largest[tuple(ranks)], size)
    for same, load in loads.items():
        assert max(load.values()) - min(load.values()) <= largest[same]
