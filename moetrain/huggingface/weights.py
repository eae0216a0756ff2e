"""The safetensors files of a Hugging Face folder: found, listed, and read a part at a time.

Owns reading, sharded or not. Leaves what the tensors are called to `names.py`, and writing to
`moetrain.checkpoint`, whose files are of the same format.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain.huggingface.names import WHOLE, ConversionError, Index, Shape, TensorPlace

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs"
_LISTED = 40
"""How many files a message names: those of the largest models there are, nearly."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A file's entry for a tensor in it."""

    file: str
    shape: Shape
    dtype: torch.dtype


class WeightFiles:
    """The tensors of a folder, mapped into memory and read when asked for.

    Raises ConversionError for a folder without safetensors, a file that isn't one or isn't as its
    index says, and for weights that are not float32, bfloat16 or float16.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._open = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "WeightFiles":
        weight_map = _weight_map(self.folder)
        files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        _require_there(self.folder, files)
        with ExitStack() as opening:
            for file in files:
                self._list(file, opening)
            if weight_map is not None:
                self._require_indexed(weight_map)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def read(self, name: str, index: Index = WHOLE) -> Tensor:
        """Returns a tensor, or a part of it, as it is stored."""
        part: Tensor = self._files[self.tensors[name].file].get_slice(name)[index or ...]
        return part

    def beyond(self, num_layers: int, number: int) -> list[str]:
        """Returns the names of so many layers after the model's own."""
        extra = tuple(f"model.layers.{num_layers + index}." for index in range(number))
        return [name for name in self.tensors if name.startswith(extra)]

    def _list(self, file: str, opening: ExitStack) -> None:
        path = self.folder / file
        try:
            opened = opening.enter_context(safe_open(path, framework="pt"))
            self._files[file] = opened
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                stored = opened.get_slice(name)
                if name in self.tensors:
                    raise ConversionError(f"{name} is in {self.tensors[name].file} and in {file}")
                dtype = stored.get_dtype()
                if dtype not in DTYPES:
                    raise ConversionError(
                        f"{path}: {name} is of dtype {dtype}: only {', '.join(DTYPES)} are "
                        "weights that this model is made of; quantised ones can't be imported"
                    )
                self.tensors[name] = StoredTensor(
                    file=file, shape=tuple(stored.get_shape()), dtype=DTYPES[dtype]
                )
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} can't be read: {error}") from None

    def _require_indexed(self, weight_map: dict[str, str]) -> None:
        for name, file in sorted(weight_map.items()):
            if name not in self.tensors or self.tensors[name].file != file:
                raise ConversionError(f"{INDEX} says that {name} is in {file}, and it isn't")
        if over := sorted(set(self.tensors) - set(weight_map)):
            raise ConversionError(
                f"{over[0]} is in {self.tensors[over[0]].file}, and not in {INDEX}"
            )


def match(files: WeightFiles, places: Iterable[TensorPlace]) -> list[TensorPlace]:
    """Returns the places of a model whose tensors a folder holds, all of them and no others.

    Raises ConversionError naming the first tensor that is missing, of another shape or left over.
    """
    found, wanted = [], set()
    for place in places:  # one by one: a config.json may claim a million layers
        stored = files.tensors.get(place.theirs)
        if stored is None:
            raise ConversionError(f"{files.folder} has no tensor {place.theirs}")
        if stored.shape != place.theirs_shape:
            raise ConversionError(
                f"{files.folder / stored.file}: {place.theirs} has the shape {list(stored.shape)}, "
                f"and config.json makes it {list(place.theirs_shape)}"
            )
        found.append(place)
        wanted.add(place.theirs)
    if over := sorted(set(files.tensors) - wanted):
        others = f" (and {len(over) - 1} others)" if len(over) > 1 else ""
        raise ConversionError(
            f"{files.folder / files.tensors[over[0]].file}: {over[0]}{others} has no place in this "
            "model: what it does would be lost"
        )
    return found


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Returns the file of each tensor, or None where one file has them all."""
    if (folder / SINGLE).is_file():  # transformers, too, takes it first
        return None
    path = folder / INDEX
    if not path.is_file():
        raise ConversionError(_no_weights(folder))
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path} can't be read: {error!r}") from None
    for file in pairs.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ConversionError(f"{path} names {file!r}, which is no safetensors file beside it")
    if not pairs:
        raise ConversionError(f"{path} lists no tensors")
    return pairs


def _require_there(folder: Path, files: Sequence[str]) -> None:
    """Raises ConversionError for files that are missing or are Git LFS pointers."""
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        there = [file for file in files if file not in missing]
        raise ConversionError(
            f"{folder} has {len(there)} of the {len(files)} files that {INDEX} lists"
            f"{_listed(there, 'there')}{_listed(missing, 'missing')}: fetch those, or all again"
        )
    for file in files:
        with (folder / file).open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ConversionError(
                    f"{folder / file} is a pointer of Git LFS and not the file that it stands for: "
                    "run git lfs pull in that folder"
                )


def _listed(files: Sequence[str], word: str) -> str:
    if not files:
        return ""
    more = f" and {len(files) - _LISTED} more" if len(files) > _LISTED else ""
    return f"; {word}: {', '.join(files[:_LISTED])}{more}"


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    if pickles:
        return (
            f"{folder} has {pickles[0]} and no safetensors: such files are pickles, which can run "
            "any code when they are read, and are not opened; save the model with transformers' "
            "save_pretrained, which writes safetensors"
        )
    if shards := sorted(p.name for p in folder.glob("*.safetensors")):
        return (
            f"{folder} has no {INDEX}, which says what is in which of its files"
            f"{_listed(shards, 'there')}: fetch it from where those are from, or all again"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}"


def read_as_ours(
    files: WeightFiles, placed: Sequence[TensorPlace], *, shape: Shape, index: Index
) -> Tensor:
    """Returns a tensor of ours, or the rows of it that `index` says, in float32.

    `placed` are its places: one, or one for each expert. float32 holds every bfloat16 and float16
    exactly. Raises ConversionError where a number is not finite.
    """
    if placed[0].ours_index == WHOLE:
        whole = files.read(placed[0].theirs, index).float()
        return _finite(whole, placed[0]) / placed[0].factor
    experts = range(shape[0])[index[0]] if index else range(shape[0])
    stack = torch.empty(len(experts), *shape[1:])
    for target, place in zip(stack, [placed[expert] for expert in experts], strict=True):
        part = files.read(place.theirs, place.theirs_index)
        part = part.reshape(part.shape[-2:])  # of a fused stack, one expert's matrix
        target.copy_(part.t() if place.transposed else part)
        _finite(target, place)
    return stack


def require_zeros(files: WeightFiles, placed: Iterable[TensorPlace]) -> None:
    """Raises ConversionError for tensors that ours have not, unless their numbers are all 0."""
    for place in placed:
        if not place.ours and files.read(place.theirs).any():
            raise ConversionError(
                f"{place.theirs} is not 0: a gate of the shared experts is not computed here: it "
                "can't be imported"
            )


def _finite(tensor: Tensor, place: TensorPlace) -> Tensor:
    if not tensor.isfinite().all():
        raise ConversionError(f"{place.theirs} has NaN or infinity in it: a model can't be of that")
    return tensor
