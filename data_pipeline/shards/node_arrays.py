"""Large arrays of a shard folder, once on each machine: in files that its processes map.

Owns where the files are, who writes them, and when they are worth it. Leaves what is in them to
`documents` and `packing`. The kernel keeps one copy for all ranks of a machine, and may drop it
again when memory is short; a process's own memory doesn't grow with the arrays.

    data.cache.dir/index/KEY/NAME.npy

KEY is a hash of what the arrays are computed from. A folder appears complete or not at all.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.atomic_files import name_folder, sync_tree, unfinished_name
from data_pipeline.locks import locked
from data_pipeline.settings import CacheSettings, DataError
from data_pipeline.storage import cache_folder

Arrays = dict[str, NDArray[Any]]

_HEADER_BYTES = 128
_logger = logging.getLogger(__name__)


class ArrayWriter:
    """Appends to arrays, in files or in memory."""

    def __init__(self, dtypes: Mapping[str, str], folder: Path | None) -> None:
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._pieces: dict[str, list[NDArray[Any]]] = {name: [] for name in dtypes}
        self._stack = ExitStack()
        if folder is not None:
            for name in dtypes:
                file = self._stack.enter_context((folder / f"{name}.npy").open("wb"))
                file.write(bytes(_HEADER_BYTES))
                self._files[name] = file

    def append(self, **values: NDArray[Any]) -> None:
        """Appends values [n] to the arrays that are named."""
        for name, value in values.items():
            typed = np.ascontiguousarray(value, self._dtypes[name])
            if self._folder is None:
                self._pieces[name].append(typed)
            else:
                self._files[name].write(typed.tobytes())

    def arrays(self) -> Arrays:
        """The arrays in memory."""
        return {
            name: np.concatenate([np.zeros(0, dtype), *self._pieces[name]])
            for name, dtype in self._dtypes.items()
        }

    def close(self) -> None:
        """Completes the files: numpy can read them."""
        for name, file in self._files.items():
            number = (file.tell() - _HEADER_BYTES) // self._dtypes[name].itemsize
            fields = {"descr": self._dtypes[name].str, "fortran_order": False, "shape": (number,)}
            text = f"{fields!r}"
            file.seek(0)
            file.write(b"\x93NUMPY\x01\x00v\x00" + f"{text:<117}\n".encode())
        self._stack.close()


@dataclass(frozen=True, kw_only=True)
class NodeArrays:
    """Where arrays of this size or more are kept in files; smaller ones stay in memory."""

    cache: CacheSettings
    least_length: int = 2**20

    def arrays(
        self,
        dtypes: Mapping[str, str],
        *,
        length: int,
        made_of: Any,
        write: Callable[[ArrayWriter], None],
    ) -> Arrays:
        """The arrays that `write` appends, about `length` long; computed once on this machine.

        `made_of` is everything that they depend on, as plain JSON.
        """
        if length < self.least_length:
            return _in_memory(dtypes, write)
        key = hashlib.sha256(json.dumps([made_of, dict(dtypes)]).encode()).hexdigest()
        try:
            folder = cache_folder(self.cache) / "index" / key[:32]
            return _mapped(folder, dtypes, write)
        except (OSError, DataError) as error:
            if isinstance(error, DataError) and not isinstance(error.__cause__, OSError):
                raise
            _logger.warning(
                "each process holds the index of the documents in its own memory, because it can't "
                "be kept in data.cache.dir: %s",
                error,
            )
            return _in_memory(dtypes, write)


def _in_memory(dtypes: Mapping[str, str], write: Callable[[ArrayWriter], None]) -> Arrays:
    writer = ArrayWriter(dtypes, None)
    write(writer)
    return writer.arrays()


def _mapped(
    folder: Path, dtypes: Mapping[str, str], write: Callable[[ArrayWriter], None]
) -> Arrays:
    if not folder.is_dir():
        # One process of the machine writes, and the others wait.
        with locked(folder.with_name(f"{folder.name}.lock"), optional=True):
            if not folder.is_dir():
                _write(folder, dtypes, write)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in dtypes}
    return {name: np.asarray(array) for name, array in arrays.items()}


def _write(folder: Path, dtypes: Mapping[str, str], write: Callable[[ArrayWriter], None]) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.*.new"):  # its writer was killed
        shutil.rmtree(leftover, ignore_errors=True)
    unnamed = unfinished_name(folder)
    unnamed.mkdir(parents=True)
    writer = ArrayWriter(dtypes, unnamed)
    try:
        write(writer)
        writer.close()
        sync_tree(unnamed)
        with suppress(FileExistsError):  # another machine that shares the cache was first
            name_folder(unnamed, folder)
    finally:
        shutil.rmtree(unnamed, ignore_errors=True)
