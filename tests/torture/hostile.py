"""Adversarial manifests, or those of a bug of ours: each has its correct hash.

Every edit is given the manifest's fields, its folder and a seeded generator.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from tests.torture.content import plain_manifest
from tests.torture.corruptions import Corruption, Kind, checkpoints, replace, shard, step


def sealed(edit: Callable[[dict[str, Any], Path, random.Random], None]) -> Corruption:
    """Returns the corruption that edits the newest manifest and gives it its correct hash."""

    def corrupt(directory: Path, draw: random.Random) -> set[int]:
        newest = checkpoints(directory)[0]
        fields = plain_manifest(newest)
        edit(fields, newest, draw)
        version = fields.get("format_version")
        text = in_parts(fields) if version == 3 and draw.random() < 0.7 else in_one(fields)
        replace(newest / "manifest.json", text.encode())
        return {step(newest)}

    return corrupt


def in_one(fields: dict[str, Any]) -> str:
    """Returns a manifest of version 2, which is one JSON object; other versions are kept."""
    if fields.get("format_version") == 3:
        fields["format_version"] = 2
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return json.dumps({**fields, "xxh3_128": xxhash.xxh3_128_hexdigest(text.encode())})


def in_parts(fields: dict[str, Any]) -> str:
    """Returns a manifest of version 3: a head of fields, and the blocks."""
    head, blocks = dict(fields), {}
    if isinstance(head.get("tensors"), dict):
        blocks = {name: entry["blocks"] for name, entry in head["tensors"].items()}
        head["tensors"] = {
            name: {key: value for key, value in entry.items() if key != "blocks"}
            for name, entry in head["tensors"].items()
        }
    lines = ",\n".join(f"{json.dumps(n)}: {json.dumps(b)}" for n, b in blocks.items())
    rest = f'"blocks": {{\n{lines}\n}}\n}}\n'
    head["blocks_size"] = len(rest.encode())
    head["blocks_xxh3_128"] = xxhash.xxh3_128_hexdigest(rest.encode())
    text = json.dumps(head, sort_keys=True, separators=(",", ":"))
    head["xxh3_128"] = xxhash.xxh3_128_hexdigest(text.encode())
    return "{\n" + "".join(f"{json.dumps(k)}: {json.dumps(v)},\n" for k, v in head.items()) + rest


def describe(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def matrix(fields: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Returns the entry of a tensor that several files hold parts of."""
    split = [e for e in fields["tensors"].values() if len(e["blocks"]) > 1 and e["shape"][0] > 1]
    entry: dict[str, Any] = draw.choice(split)
    return entry


def set_field(name: str, *values: Any) -> Corruption:
    """Returns the corruption that sets a field to one of some values; without any, removes it."""

    def edit(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
        if values:
            fields[name] = draw.choice(values)
        else:
            del fields[name]

    return sealed(edit)


def list_a_file_elsewhere(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    """Lists the other step's file, by a path, with its correct size and hash."""
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
    """Makes a block refer to another step's file, which isn't listed under files."""
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
    """A block with other dimensions, without any, or without numbers."""
    blocks = matrix(fields, draw)["blocks"]
    file = draw.choice(sorted(blocks))
    offset, shape = blocks[file]
    blocks[file] = draw.choice(
        (
            [[*offset, 0], [*shape, 1]], [offset[1:], shape[1:]], [[], []], [offset, ["1"] * 9],
            [offset], [offset, [-n for n in shape]], [offset, shape[::-1]], None, "block",
            [offset, [float(n) for n in shape]],
        )
    )  # fmt: skip


def bend_a_grid(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    """A grid with other cuts, files or cells, or none."""
    whole = json.loads((folder / "manifest.json").read_text())["blocks"]
    names = [n for n, b in whole.items() if isinstance(b, list) and len(b[1]) > 1]
    name = draw.choice(names)
    cuts, files = whole[name]
    dim = max(range(len(cuts)), key=lambda d: len(cuts[d]))
    cut = cuts[dim]
    bent = draw.choice(
        (
            [1, *cut[1:]], [*cut[:-1], cut[-1] + 1], cut[::-1], [0] * len(cut), cut[:-1], [],
            [*cut[:-1], -1], [*cut[:-1], 2**70], [*cut[:-1], 0.5], "01", None, [*cut[:-1], 10**9],
        )
    )  # fmt: skip
    others = [b if d == dim else a for d, (a, b) in enumerate(zip(cuts, [bent] * 9, strict=False))]
    fields["tensors"][name]["blocks"] = draw.choice(
        (
            [others, files], [cuts, files[:-1]], [cuts, [files[0]] * len(files)], [cuts], [[], []],
            [cuts, [*files[:-1], 10**6]], [cuts, [*files[:-1], -1]], [cuts, None],
            [cuts[1:], files], [[*cuts, [0]], files], [], None, 7, [cuts, [str(f) for f in files]],
        )
    )  # fmt: skip


def bend_a_shape(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    entry = matrix(fields, draw)
    entry["shape"] = draw.choice(
        ([*entry["shape"], 1], [*entry["shape"][::-1], 1], [], None, [2**62] * 2, [-1])
    )


def change_a_dtype(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    names = ("bfloat16", "int32", "float64", "object", "load", "", None, 7)
    matrix(fields, draw)["dtype"] = draw.choice(names)


def forget_a_tensor(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    del fields["tensors"][draw.choice(sorted(fields["tensors"]))]


def add_a_tensor(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    fields["tensors"]["model.spare"] = matrix(fields, draw)


def pickle_in_a_shard(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    """A pickle that would create a file, listed with its correct hash."""
    path = shard(folder, draw)
    replace(path, f"cposix\nsystem\n(S'touch {folder.parent}/unpickled'\ntR.".encode())
    fields["files"][path.name] = describe(path)


def retype_a_shard(fields: dict[str, Any], folder: Path, draw: random.Random) -> None:
    """A shard whose header has another dtype or shape of as many bytes, with the correct hash."""
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
    Kind("format of another version", set_field("format_version", 4, "3", None, [])),
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
    Kind("a grid bent", sealed(bend_a_grid)),
    Kind("another shape", sealed(bend_a_shape), may_refuse=True),
    Kind("another dtype", sealed(change_a_dtype), may_refuse=True),
    Kind("a tensor forgotten", sealed(forget_a_tensor), may_refuse=True),
    Kind("a tensor too many", sealed(add_a_tensor), may_refuse=True),
    Kind("a pickle in a shard", sealed(pickle_in_a_shard), may_refuse=True),
    Kind("a shard of another header", sealed(retype_a_shard), may_refuse=True),
    Kind("no manifest's JSON", nest_deeply),
]
