"""Verification: every byte of a shard folder against its index, its tables and its tokenizer.

Owns the definition of a damaged file. Leaves the index's own consistency to `index`, and the
output for people to `inspect`.
"""

import hashlib
import io
import re
import tarfile
import zlib

import numpy as np
from numpy.typing import NDArray

from data_pipeline.progress import ByteCounter
from data_pipeline.settings import DataError
from data_pipeline.shards.index import Index, ShardEntry, shards_of, table_size
from data_pipeline.storage import ShardFiles
from data_pipeline.tokenizers.named import tokenizer_from
from data_pipeline.tokenizers.tokenizer import Tokenizer, TokenizerEntry


def damaged_files(files: ShardFiles, index: Index, *, counter: ByteCounter) -> dict[str, str]:
    """What is wrong with each damaged file, by its name."""
    damaged: dict[str, str] = {}
    try:
        tokenizer_of(files, index.tokenizer)
    except (DataError, OSError) as error:
        damaged[index.tokenizer.file or f"tokenizer {index.tokenizer.name}"] = str(error)
    for shard in shards_of(index):
        size = table_size(shard)
        wrong = {
            shard.file: _wrong_bytes(files, shard.file, shard.size, shard.sha256),
            shard.documents: _wrong_bytes(files, shard.documents, size, shard.documents_sha256),
        }
        if not any(wrong.values()):
            try:
                _check_members(files, index, shard)
            except (ValueError, tarfile.TarError, EOFError) as error:
                wrong[shard.file] = str(error)
        damaged.update({name: reason for name, reason in wrong.items() if reason is not None})
        counter.advance(shard.size + size)
    return damaged


def tokenizer_of(files: ShardFiles, entry: TokenizerEntry) -> Tokenizer:
    """The tokenizer of a folder's tokens, from its own copy if it has one.

    Raises DataError if it isn't the one that the index names.
    """
    definition = None if entry.file is None else files.read_bytes(entry.file)
    return tokenizer_from(entry, definition=definition)


def _wrong_bytes(files: ShardFiles, name: str, size: int, sha256: str) -> str | None:
    try:
        with files.open(name, size=size, sha256=sha256) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except DataError as error:
        return str(error)
    return None if found == sha256 else "is not what was written: its hash differs"


def open_table(files: ShardFiles, shard: ShardEntry) -> NDArray[np.int64]:
    """The table of a shard's documents [num_documents, 3], unchecked."""
    with files.open(shard.documents, size=table_size(shard), sha256=shard.documents_sha256) as file:
        table: NDArray[np.int64] = np.load(io.BytesIO(file.read()), allow_pickle=False)
    return table


def _check_members(files: ShardFiles, index: Index, shard: ShardEntry) -> None:
    """Raises ValueError if the members of a tar don't match its table and the index."""
    table = open_table(files, shard)
    if table.shape != (shard.num_documents, 3) or table.dtype != np.dtype("<i8"):
        raise ValueError(f"its table of documents is {table.dtype}{list(table.shape)}")
    rows = iter(table.tolist())
    with (
        files.open(shard.file, size=shard.size, sha256=shard.sha256) as opened,
        tarfile.open(fileobj=opened, mode="r:") as tar,
    ):
        for member in tar:
            if not (member.isreg() and re.fullmatch(r"[0-9]{9,}\.npy", member.name)):
                raise ValueError(f"has a member {member.name!r}, which is no 000000000.npy")
            file = tar.extractfile(member)
            assert file is not None, "a regular file"
            content = file.read()
            payload, num_tokens = _payload(content, index, name=member.name)
            offset = member.offset_data + len(content) - len(payload)
            found = [offset, num_tokens, zlib.crc32(payload)]
            if next(rows, None) != found:
                raise ValueError(f"{member.name} isn't where and what its table of documents says")
    if next(rows, None) is not None:
        raise ValueError("has fewer members than its table of documents")
    if int(table[:, 1].sum()) != shard.num_tokens:
        raise ValueError(f"holds {table[:, 1].sum()} tokens, and the index says {shard.num_tokens}")


def _payload(content: bytes, index: Index, *, name: str) -> tuple[bytes, int]:
    """The bytes of a member's tokens, and their number."""
    file = io.BytesIO(content)
    tokens: NDArray[np.integer] = np.lib.format.read_array(file, allow_pickle=False)  # type: ignore[no-untyped-call]
    if tokens.ndim != 1 or tokens.dtype != np.dtype(index.dtype) or file.tell() != len(content):
        raise ValueError(
            f"{name} is {tokens.dtype}{list(tokens.shape)}, not {index.dtype} [tokens]"
        )
    entry = index.tokenizer
    if not tokens.size or tokens[-1] != entry.end_of_document or tokens.max() >= entry.vocab_size:
        raise ValueError(f"{name} doesn't end its document, or has ids that {entry.name} hasn't")
    return tokens.tobytes(), len(tokens)
