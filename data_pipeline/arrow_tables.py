"""Arrow tables: the `text` column of Parquet files, and of the Arrow files that `datasets` saves.

Owns the only import of pyarrow, which is an extra, and what a damaged table looks like. Leaves
which files are tables to `text_files`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.raw_documents import RawDocument, Reason, Text, Unread
from data_pipeline.settings import DataError

_ROWS_AT_ONCE = 256  # rows may hold a book each
_BYTES_AT_ONCE = 2**20
# What ends a stream of record batches. pyarrow takes a stream without it for a whole one.
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def table_texts(path: Path, *, where: str) -> Iterator[RawDocument]:
    """The texts of a `.parquet` file or of an `.arrow` stream, row by row.

    A row without text, and the place where the file is damaged, is given as what says so. Raises
    DataError where pyarrow isn't installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path} is read with pyarrow, which is not installed: pip install 'moetrain[corpora]'"
        ) from error
    number = 0
    try:
        batches = _parquet if path.suffix.lower() == ".parquet" else _arrow_stream
        for column in batches(path, pyarrow):
            for value in _binary(column, pyarrow).to_pylist():
                number += 1
                yield _document(value, f"{where}, row {number}")
    except _NoTextError as error:
        yield Unread(where, Reason.corrupt, f"has no column 'text' of strings, but {error}")
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error, not the file's
        yield Unread(where, Reason.corrupt, f"is damaged after row {number}: {error}")


class _NoTextError(Exception):
    pass


def _parquet(path: Path, pyarrow: Any) -> Iterator[Any]:
    # pre_buffer would read all rows of a group at once, which may be all of the file.
    with pyarrow.parquet.ParquetFile(
        path, buffer_size=_BYTES_AT_ONCE, pre_buffer=False, page_checksum_verification=True
    ) as file:
        _check_column(file.schema_arrow, pyarrow)
        missing = file.metadata.num_rows
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["text"], use_threads=False):
            yield batch.column("text")
            missing -= batch.num_rows
        # pyarrow reads what the parts of a file say that they hold, whatever the whole says.
        if missing:
            raise pyarrow.ArrowInvalid(f"{missing} rows are missing")


def _arrow_stream(path: Path, pyarrow: Any) -> Iterator[Any]:
    with pyarrow.OSFile(str(path)) as file:
        with pyarrow.ipc.open_stream(file) as batches:
            _check_column(batches.schema, pyarrow)
            for batch in batches:
                yield batch.column("text")
            end = file.tell()
        file.seek(max(file.size() - len(_END_OF_STREAM), 0))
        if file.read() != _END_OF_STREAM or end != file.size():
            raise pyarrow.ArrowInvalid("the stream doesn't end where the file does")


def _check_column(schema: Any, pyarrow: Any) -> None:
    types = pyarrow.types
    if "text" not in schema.names:
        raise _NoTextError(f"the columns {', '.join(schema.names)}")
    kind = schema.field("text").type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise _NoTextError(f"one of {kind}")


def _binary(column: Any, pyarrow: Any) -> Any:
    """The same column as bytes: pyarrow would raise for a whole batch where one isn't UTF-8.

    Raises ArrowInvalid where its offsets lead out of it: pyarrow would follow them.
    """
    if pyarrow.types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    kinds = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    column = column.view(kinds[column.type])
    column.validate(full=True)
    return column


def _document(value: bytes | None, where: str) -> RawDocument:
    if value is None:
        return Unread(where, Reason.corrupt, "has no text: its 'text' is null")
    try:
        return Text(where, value.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unread(where, Reason.not_utf8, f"is not UTF-8: {error}")
