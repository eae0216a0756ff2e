"""Ways to corrupt a folder of checkpoints, each drawn from a seeded generator.

A corruption is given the folder and returns the steps that it has corrupted; the newest of the
others must still be loaded. Files are replaced, never written in place: they are hard links.
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Corruption = Callable[[Path, random.Random], set[int]]


class Kind(NamedTuple):
    """A way to corrupt, and whether an error that names it is as good as falling back."""

    name: str
    corrupt: Corruption
    may_refuse: bool = False


def checkpoints(directory: Path) -> list[Path]:
    """Returns the folders of the checkpoints, newest first."""
    return sorted(directory.glob("step_*"), reverse=True)


def flip(path: Path, draw: random.Random) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    bit = draw.randrange(len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    replace(path, bytes(content))


def replace(path: Path, content: bytes) -> None:
    """Replaces a file by another one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def step(folder: Path) -> int:
    """Returns the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def pick(directory: Path, draw: random.Random) -> Path:
    """Returns one of the checkpoints, mostly the newest."""
    newest, *others = checkpoints(directory)
    return newest if draw.random() < 0.8 else draw.choice(others)


def shard(folder: Path, draw: random.Random) -> Path:
    """Returns one of the files with tensors."""
    return draw.choice(sorted(folder.glob("*.safetensors")))


# Single flipped bits, by the kind of file.


def flip_shard(directory: Path, draw: random.Random) -> set[int]:
    folder = pick(directory, draw)
    flip(shard(folder, draw), draw)
    return {step(folder)}


def flip_header(directory: Path, draw: random.Random) -> set[int]:
    """Flips a bit in the header of a shard: a small part, of a large file."""
    folder = pick(directory, draw)
    path = shard(folder, draw)
    content = bytearray(path.read_bytes())
    bit = draw.randrange((8 + int.from_bytes(content[:8], "little")) * 8)
    content[bit // 8] ^= 1 << bit % 8
    replace(path, bytes(content))
    return {step(folder)}


def flip_manifest(directory: Path, draw: random.Random) -> set[int]:
    folder = pick(directory, draw)
    flip(folder / "manifest.json", draw)
    return {step(folder)}


def flip_state(directory: Path, draw: random.Random) -> set[int]:
    """Flips a bit of the counters: a small part of the manifest, and any value would load."""
    folder = pick(directory, draw)
    path = folder / "manifest.json"
    content = bytearray(path.read_bytes())
    begin = content.index(b'"state"')
    bit = draw.randrange(begin * 8, content.index(b"\n", begin) * 8)
    content[bit // 8] ^= 1 << bit % 8
    replace(path, bytes(content))
    return {step(folder)}


def flip_latest(directory: Path, draw: random.Random) -> set[int]:
    flip(directory / "latest", draw)
    return set()


def flip_attempt(directory: Path, draw: random.Random) -> set[int]:
    flip(directory / "attempt", draw)
    return set()


FLIPS = [
    Kind("shard", flip_shard),
    Kind("shard", flip_shard),
    Kind("shard's header", flip_header),
    Kind("manifest", flip_manifest),
    Kind("manifest's state", flip_state),
    Kind("latest", flip_latest),
    Kind("attempt", flip_attempt),
]


# Files that are truncated, removed, swapped and added.


def of_a_file(act: Callable[[Path, random.Random], None], name: str) -> Corruption:
    """Returns the corruption that changes one file of a checkpoint, or one next to them."""

    def corrupt(directory: Path, draw: random.Random) -> set[int]:
        if name in ("latest", "attempt"):
            act(directory / name, draw)
            return set()
        folder = pick(directory, draw)
        act(shard(folder, draw) if name == "shard" else folder / name, draw)
        return {step(folder)}

    return corrupt


def truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    length = draw.choice((0, draw.randrange(len(content)), len(content) - 1))
    replace(path, content[:length])


def lengthen(path: Path, draw: random.Random) -> None:
    replace(path, path.read_bytes() + draw.randbytes(draw.randint(1, 5000)))


def zero_a_page(path: Path, draw: random.Random) -> None:
    """As file systems do that recorded the length before a power failure, but not the content."""
    content = bytearray(path.read_bytes())
    page = draw.randrange(max(1, len(content) // 4096)) * 4096
    length = len(content[page : page + 4096])
    content[page : page + length] = bytes(length)
    replace(path, bytes(content))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def make_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def link_to_nothing(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def remove_step(directory: Path, draw: random.Random) -> set[int]:
    folder = pick(directory, draw)
    shutil.rmtree(folder)
    return {step(folder)}


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    os.rename(one, aside)
    os.rename(other, one)
    os.rename(aside, other)


def swap_ranks(directory: Path, draw: random.Random) -> set[int]:
    folder = pick(directory, draw)
    swap(*sorted(folder.glob("*.safetensors"))[:2])
    return {step(folder)}


def swap_between_steps(directory: Path, draw: random.Random) -> set[int]:
    one, other = draw.sample(checkpoints(directory), 2)
    name = draw.choice(("manifest.json", shard(one, draw).name))
    swap(one / name, other / name)
    return {step(one), step(other)}


def swap_steps(directory: Path, draw: random.Random) -> set[int]:
    one, other = draw.sample(checkpoints(directory), 2)
    swap(one, other)
    return {step(one), step(other)}


def copy_as_a_newer_step(directory: Path, draw: random.Random) -> set[int]:
    shutil.copytree(draw.choice(checkpoints(directory)), directory / "step_00099999")
    return set()


def rename_step(directory: Path, draw: random.Random) -> set[int]:
    folder = pick(directory, draw)
    folder.rename(directory / draw.choice(("step_00099999", "backup", f"{folder.name}.old")))
    return {step(folder)}


def add_a_file(directory: Path, draw: random.Random) -> set[int]:
    folder = pick(directory, draw)
    name = draw.choice(("rank_00002.safetensors", "notes.txt", "__0_0.distcp"))
    (folder / name).write_bytes(draw.randbytes(100))
    return {step(folder)}


def add_a_hidden_file(directory: Path, draw: random.Random) -> set[int]:
    (pick(directory, draw) / ".nfs000000012").write_bytes(draw.randbytes(100))
    return set()


def add_debris(directory: Path, draw: random.Random) -> set[int]:
    """Leftovers of attempts that were killed or cut off, and of people."""
    name = draw.choice(("staged_00000099_attempt_1", "deleted_step_00000001_attempt_1", "step_new"))
    shutil.copytree(pick(directory, draw), directory / name)
    return set()


def add_an_empty_step(directory: Path, draw: random.Random) -> set[int]:
    (directory / "step_00099999").mkdir()
    return set()


def add_a_file_named_as_a_step(directory: Path, draw: random.Random) -> set[int]:
    (directory / "step_00099999").write_bytes(draw.randbytes(10))
    return set()


def rewrite_latest(directory: Path, draw: random.Random) -> set[int]:
    text = draw.choice(
        (
            b"", b"\n", b"step_00099999", b"step_00000001\0", b"/etc", b"..", b"step_" + b"9" * 300,
            b"step_" + b"9" * 5000, draw.randbytes(20), checkpoints(directory)[-1].name.encode(),
            b"../checkpoints/" + checkpoints(directory)[0].name.encode(),
        )
    )  # fmt: skip
    replace(directory / "latest", text)
    return set()


def rewrite_attempt(directory: Path, draw: random.Random) -> set[int]:
    texts = (b"", b"-7", b"0", b"one", b"9" * 5000, draw.randbytes(9), b"1.5")
    replace(directory / "attempt", draw.choice(texts))
    return set()


STRUCTURE = [
    *(
        Kind(f"{name} {said}", of_a_file(act, name))
        for name in ("shard", "manifest.json", "latest", "attempt")
        for act, said in (
            (truncate, "truncated"), (truncate, "truncated"), (lengthen, "lengthened"),
            (zero_a_page, "zeroed in part"), (remove, "removed"), (make_folder, "made a folder"),
            (link_to_nothing, "made a dangling link"),
        )
    ),
    Kind("step removed", remove_step),
    Kind("ranks' files swapped", swap_ranks),
    Kind("files swapped between steps", swap_between_steps),
    Kind("files swapped between steps", swap_between_steps),
    Kind("steps swapped", swap_steps),
    Kind("step copied as a newer one", copy_as_a_newer_step),
    Kind("step renamed", rename_step),
    Kind("file added", add_a_file),
    Kind("hidden file added", add_a_hidden_file),
    Kind("debris added", add_debris),
    Kind("empty step added", add_an_empty_step),
    Kind("file named as a step", add_a_file_named_as_a_step),
    Kind("latest rewritten", rewrite_latest),
    Kind("latest rewritten", rewrite_latest),
    Kind("latest rewritten", rewrite_latest),
    Kind("attempt rewritten", rewrite_attempt),
]  # fmt: skip
