"""Ways to harm a folder of checkpoints, each drawn from a seeded generator.

A harm is told the folder and returns the steps that it has harmed, so that the newest of the
others must still be loaded. Files are replaced, never written in place: they are hard links.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

Harm = Callable[[Path, random.Random], set[int]]


class Kind(NamedTuple):
    """A way to harm, and whether an error that names it is as good as falling back."""

    name: str
    harm: Harm
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
    """Puts another file in a file's place."""
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
    """Flips a bit where a shard says which tensors it has: a small part, of a large file."""
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
    Kind("manifest", flip_manifest),
    Kind("latest", flip_latest),
    Kind("attempt", flip_attempt),
]


# Files cut, removed, swapped and added.


def of_a_file(act: Callable[[Path, random.Random], None], name: str) -> Harm:
    """Returns the harm that does something to one file of a checkpoint, or beside them."""

    def harm(directory: Path, draw: random.Random) -> set[int]:
        if name in ("latest", "attempt"):
            act(directory / name, draw)
            return set()
        folder = pick(directory, draw)
        act(shard(folder, draw) if name == "shard" else folder / name, draw)
        return {step(folder)}

    return harm


def truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    length = draw.choice((0, draw.randrange(len(content)), len(content) - 1))
    replace(path, content[:length])


def lengthen(path: Path, draw: random.Random) -> None:
    replace(path, path.read_bytes() + draw.randbytes(draw.randint(1, 5000)))


def zero_a_page(path: Path, draw: random.Random) -> None:
    """As file systems do that knew the length before a power cut, and not the content."""
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
    """What killed or cut-off attempts leave, and people."""
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


# Manifests that somebody wrote on purpose, with the right hash of themselves.


def sealed(edit: Callable[[dict[str, Any], Path, random.Random], None]) -> Harm:
    """Returns the harm that edits the newest manifest and gives it its proper hash."""

    def harm(directory: Path, draw: random.Random) -> set[int]:
        newest = checkpoints(directory)[0]
        path = newest / "manifest.json"
        fields = json.loads(path.read_text())
        del fields["xxh3_128"]
        edit(fields, newest, draw)
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        fields["xxh3_128"] = xxhash.xxh3_128_hexdigest(text.encode())
        replace(path, json.dumps(fields).encode())
        return {step(newest)}

    return harm


def describe(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def matrix(fields: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Returns the entry of a tensor that several files hold parts of."""
    split = [e for e in fields["tensors"].values() if len(e["blocks"]) > 1 and e["shape"][0] > 1]
    entry: dict[str, Any] = draw.choice(split)
    return entry


def set_field(name: str, *values: Any) -> Harm:
    """Returns the harm that puts one of some values in a field's place; without any, removes it."""

    def edit(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
        if values:
            fields[name] = draw.choice(values)
        else:
            del fields[name]

    return sealed(edit)


def list_a_file_elsewhere(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    """Lists the other step's file, by a path, with its right size and hash."""
    other = checkpoints(folder.parent)[1]
    name = f"../{other.name}/rank_00000.safetensors"
    if draw.random() < 0.5:
        name = str(other / "rank_00000.safetensors")
    fields["files"][name] = describe(other / "rank_00000.safetensors")
    del fields["files"]["rank_00000.safetensors"]
    (folder / "rank_00000.safetensors").unlink()
    for entry in fields["tensors"].values():
        entry["blocks"] = {
            name if file == "rank_00000.safetensors" else file: block
            for file, block in entry["blocks"].items()
        }


def read_a_file_elsewhere(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    """Has a block point at another step's file, and says nothing of that under files."""
    other = checkpoints(folder.parent)[1]
    for entry in fields["tensors"].values():
        entry["blocks"] = {
            f"../{other.name}/{file}": block for file, block in entry["blocks"].items()
        }


def hold_a_part_twice(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    """Two blocks with as many elements as the tensor, that hold one part of it twice."""
    entry = matrix(fields, draw)
    first, *others = entry["blocks"].values()
    for other in others:
        other[:] = [list(first[0]), list(first[1])]


def leave_a_part_out(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    blocks = matrix(fields, draw)["blocks"]
    del blocks[draw.choice(sorted(blocks))]


def move_a_block(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    offset, _ = draw.choice(list(matrix(fields, draw)["blocks"].values()))
    offset[0] += draw.choice((-1, 1, 10**6, -(10**6), 2**70))


def bend_a_block(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    """A block of other dimensions, or of none, or of no numbers."""
    blocks = matrix(fields, draw)["blocks"]
    file = draw.choice(sorted(blocks))
    offset, shape = blocks[file]
    blocks[file] = draw.choice(
        (
            [offset + [0], shape + [1]], [offset[1:], shape[1:]], [[], []], [offset, ["1"] * 9],
            [offset], [offset, [-n for n in shape]], [offset, shape[::-1]], None, "block",
            [offset, [float(n) for n in shape]],
        )
    )  # fmt: skip


def bend_a_shape(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    entry = matrix(fields, draw)
    entry["shape"] = draw.choice(
        ([*entry["shape"], 1], entry["shape"][::-1] + [1], [], None, [2**62] * 2, [-1])
    )


def change_a_dtype(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    names = ("bfloat16", "int32", "float64", "object", "load", "", None, 7)
    matrix(fields, draw)["dtype"] = draw.choice(names)


def forget_a_tensor(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    del fields["tensors"][draw.choice(sorted(fields["tensors"]))]


def add_a_tensor(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    fields["tensors"]["model.spare"] = matrix(fields, draw)


def pickle_in_a_shard(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    """A pickle that would leave a file, listed with its right hash."""
    path = shard(folder, draw)
    replace(path, f"cposix\nsystem\n(S'touch {folder.parent}/unpickled'\ntR.".encode())
    fields["files"][path.name] = describe(path)


def retype_a_shard(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    """A shard whose own header has another dtype or shape of as many bytes, and the right hash."""
    path = shard(folder, draw)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [n for n, e in header.items() if n in fields["tensors"] and len(e["shape"]) > 1]
    entry = header[draw.choice(names)]
    if draw.random() < 0.5:
        entry["dtype"] = "I32"
    else:
        entry["shape"] = [entry["shape"][0] * entry["shape"][1], 1, *entry["shape"][2:]]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    replace(path, len(text).to_bytes(8, "little") + text + content[8 + length :])
    fields["files"][path.name] = describe(path)


def nest_deeply(directory: Path, draw: random.Random) -> set[int]:
    newest = checkpoints(directory)[0]
    replace(newest / "manifest.json", draw.choice((b"[" * 10**5, b"9" * 10**5, b"{}", b"null")))
    return {step(newest)}


HOSTILE = [
    Kind("format of version 1", set_field("format_version", 1)),
    Kind("format of another version", set_field("format_version", 3, "2", None, [])),
    Kind("no format version", set_field("format_version")),
    Kind("attempt is no number", set_field("attempt", "3", None, 1.5, [], -1)),
    Kind("step is no number", set_field("step", "3", None, [], {})),
    Kind("state is no object", set_field("state", None, [], "x", 3), may_refuse=True),
    Kind("no files", set_field("files", {}, [], None)),
    Kind("no tensors", set_field("tensors", {}, [], None), may_refuse=True),
    Kind("unknown field", set_field("extra", 1)),
    Kind("field missing", set_field("config")),
    Kind("lists a file elsewhere", sealed(list_a_file_elsewhere)),
    Kind("reads a file elsewhere", sealed(read_a_file_elsewhere)),
    Kind("a part held twice", sealed(hold_a_part_twice)),
    Kind("a part left out", sealed(leave_a_part_out)),
    Kind("a block moved", sealed(move_a_block)),
    Kind("a block bent", sealed(bend_a_block)),
    Kind("another shape", sealed(bend_a_shape), may_refuse=True),
    Kind("another dtype", sealed(change_a_dtype), may_refuse=True),
    Kind("a tensor forgotten", sealed(forget_a_tensor), may_refuse=True),
    Kind("a tensor too many", sealed(add_a_tensor), may_refuse=True),
    Kind("a pickle in a shard", sealed(pickle_in_a_shard), may_refuse=True),
    Kind("a shard of another header", sealed(retype_a_shard), may_refuse=True),
    Kind("no manifest's JSON", nest_deeply),
]
