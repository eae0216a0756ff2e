"""Arrow tables: the text column of Parquet and Arrow files.

Owns the only import of pyarrow, which is an extra, and detecting damaged tables. Leaves which files
are tables to `text_files`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.corpora.json_documents import FIELD_WAY_OUT, missing_text
from data_pipeline.corpora.raw_documents import RawDocument, Reason, Text, Unread
from data_pipeline.settings import DataError

_ROWS_AT_ONCE = 256  # a row may hold a whole book
_BYTES_AT_ONCE = 2**20
# How files of both kinds begin; a stream of record batches begins differently.
_PARQUET = b"PAR1"
_ARROW_FILE = b"ARROW1"
# What ends a stream. pyarrow accepts a truncated one without it as complete.
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def table_texts(source: Path | bytes, *, where: str, field: str) -> Iterator[RawDocument]:
    """The texts of a table, given as a file or its bytes, row by row.

    `field` is the column, or `a.b` for one inside a struct. A row without text, and a place where
    the table is damaged, is yielded as an Unread that says so. Raises DataError if pyarrow isn't
    installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{where} is read with pyarrow, which is not installed: pip install 'moetrain[corpora]'"
        ) from error
    number = 0
    try:
        with _opened(source, pyarrow) as file:
            for column in _columns(file, field, pyarrow):
                for value in _binary(column, pyarrow).to_pylist():
                    number += 1
                    yield _document(value, f"{where}, row {number}", field)
    except _NoTextError as error:
        yield Unread(where, Reason.corrupt, str(error), FIELD_WAY_OUT)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error, not the file's
        yield Unread(where, Reason.corrupt, f"is damaged after row {number}: {error}")


class _NoTextError(Exception):
    pass


def _opened(source: Path | bytes, pyarrow: Any) -> Any:
    if isinstance(source, bytes):
        return pyarrow.BufferReader(source)
    return pyarrow.OSFile(str(source))


def _columns(file: Any, field: str, pyarrow: Any) -> Iterator[Any]:
    """The text column of a table in pieces; the content decides which kind of table it is."""
    beginning = file.read(len(_ARROW_FILE))
    file.seek(0)
    if beginning.startswith(_PARQUET):
        return _parquet(file, field, pyarrow)
    if beginning == _ARROW_FILE:
        return _arrow_file(file, field, pyarrow)
    return _arrow_stream(file, field, pyarrow)


def _parquet(file: Any, field: str, pyarrow: Any) -> Iterator[Any]:
    # pre_buffer would read all rows of a group at once, which may be the whole file.
    with pyarrow.parquet.ParquetFile(
        file, buffer_size=_BYTES_AT_ONCE, pre_buffer=False, page_checksum_verification=True
    ) as table:
        path = _text_column(table.schema_arrow, field, pyarrow)
        missing = table.metadata.num_rows
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[".".join(path)], use_threads=False):
            yield _column(batch, path, pyarrow)
            missing -= batch.num_rows
        # pyarrow reads the rows that the parts of a file declare, whatever the file's total is.
        if missing:
            raise pyarrow.ArrowInvalid(f"{missing} rows are missing")


def _arrow_file(file: Any, field: str, pyarrow: Any) -> Iterator[Any]:
    with pyarrow.ipc.open_file(file) as batches:
        path = _text_column(batches.schema, field, pyarrow)
        for number in range(batches.num_record_batches):
            yield _column(batches.get_batch(number), path, pyarrow)


def _arrow_stream(file: Any, field: str, pyarrow: Any) -> Iterator[Any]:
    with pyarrow.ipc.open_stream(file) as batches:
        path = _text_column(batches.schema, field, pyarrow)
        for batch in batches:
            yield _column(batch, path, pyarrow)
        end = file.tell()
    file.seek(max(file.size() - len(_END_OF_STREAM), 0))
    if file.read() != _END_OF_STREAM or end != file.size():
        raise pyarrow.ArrowInvalid("the stream doesn't end where the file does")


def _text_column(schema: Any, field: str, pyarrow: Any) -> list[str]:
    """The path of names to the text column; raises _NoTextError if there is none."""
    types = pyarrow.types
    path = [field] if field in schema.names else field.split(".")
    kind = pyarrow.struct(list(schema))
    for name in path:
        if not types.is_struct(kind) or kind.get_field_index(name) < 0:
            raise _NoTextError(
                missing_text(f"column {field!r} of strings", _fields(schema, pyarrow))
            )
        kind = kind.field(name).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise _NoTextError(missing_text(f"column {field!r} of strings", _fields(schema, pyarrow)))
    return path


def _fields(columns: Any, pyarrow: Any, inside: str = "") -> Iterator[str]:
    """The names of columns, with the type of those that hold no strings."""
    for column in columns:
        if pyarrow.types.is_struct(column.type):
            yield from _fields(column.type, pyarrow, f"{inside}{column.name}.")
        else:
            kind = "" if str(column.type).endswith("string") else f" ({column.type})"
            yield f"{inside}{column.name}{kind}"


def _column(batch: Any, path: list[str], pyarrow: Any) -> Any:
    column = batch.column(path[0])
    for name in path[1:]:
        # Not field(): it doesn't see that the whole object is null.
        column = pyarrow.compute.struct_field(column, name)
    return column


def _binary(column: Any, pyarrow: Any) -> Any:
    """The same column as bytes: pyarrow would raise for a whole batch if one text isn't UTF-8.

    Raises ArrowInvalid for offsets outside the column, which pyarrow would follow.
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


def _document(value: bytes | None, where: str, field: str) -> RawDocument:
    if value is None:
        return Unread(where, Reason.corrupt, f"has no text: its {field!r} is null")
    try:
        return Text(where, value.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unread(where, Reason.not_utf8, f"is not UTF-8: {error}")
