"""Text columns of parquet files. Only these files need pyarrow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import Source
from sleeptrain.prepare.unpack import CHUNK_BYTES

BATCH_ROWS = 16  # held at once; few, since each may have max_document_bytes


def row_group_bytes(source: Source, text_field: str) -> list[int]:
    """The unpacked size of the text column in each row group, in bytes.

    Raises DataError if pyarrow is not installed, the file is no parquet file, or it has no such column of strings.
    """
    with _opened(source) as file:
        column = _column(file, source, text_field)
        groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
        return [group.column(column).total_uncompressed_size for group in groups]


def rows(source: Source, text_field: str, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """(row number in the file, from 1; text) of each row in the row groups [start, stop). Raises DataError.

    A text is a pyarrow.Buffer of UTF-8 (a view of the batch, with its size), or None for null.
    """
    with _opened(source) as file:
        number = sum(file.metadata.row_group(index).num_rows for index in range(start))
        groups = list(range(start, stop))
        for batch in file.iter_batches(BATCH_ROWS, groups, columns=[text_field], use_threads=False):
            for value in batch.column(0):
                number += 1
                yield number, value.as_buffer()


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{source.name}: pyarrow is not installed: pip install 'sleeptrain[data]'") from error
    try:
        # These two make pyarrow read page by page; else it loads whole row groups.
        with pyarrow.parquet.ParquetFile(source.path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.name}: not a sound parquet file: {error}") from error


def _column(file: Any, source: Source, text_field: str) -> int:
    """The index of the text column among the columns of the file."""
    import pyarrow

    schema = file.schema_arrow
    count = schema.names.count(text_field)
    if count != 1:
        raise DataError(
            f"{source.name} has {count or 'no'} column {text_field!r} (--text-field); its columns: "
            f"{', '.join(schema.names)}"
        )
    kind = schema.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{source.name}: column {text_field!r} holds {kind}, no strings; set another --text-field")
    paths = [file.schema.column(index).path for index in range(len(file.schema))]
    return paths.index(text_field)
