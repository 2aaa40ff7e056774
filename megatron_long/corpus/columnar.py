"""Rows of .parquet and .arrow files, some at a time, as dicts."""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

from megatron_long.corpus.inputs import InputFile, is_url, open_seekable, suffix_of
from megatron_long.errors import ConfigError

MAX_ROWS = 1024
BUFFER_BYTES = 1 << 20
ARROW_FILE_MAGIC = b"ARROW1"
"""Arrow's file format begins with it; its stream format, which `datasets` writes, does not."""


def read_rows(
    item: InputFile, columns: Set[str], batch_bytes: int
) -> Iterator[tuple[list[Any], int]]:
    """Yield rows with those columns that the file has, and the bytes of the file read so far, about.

    A row that is not UTF-8 is its UnicodeDecodeError.

    Raises: ConfigError: pyarrow is not installed. OSError, EOFError or an error of pyarrow: the file is
        damaged.
    """
    suffix = suffix_of(item.path)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ConfigError(f"{item.path}: reading {suffix} needs `pip install pyarrow`") from None
    if suffix == ".parquet":
        yield from _parquet_rows(item, columns)
    else:
        yield from _arrow_rows(item, columns, batch_bytes)


def _parquet_rows(item: InputFile, columns: Set[str]) -> Iterator[tuple[list[Any], int]]:
    from pyarrow import parquet

    number, skip, left = item.first_line - 1, item.skip_rows, item.num_rows
    # By default a whole column of a group of rows is read into memory.
    some = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}
    with open_seekable(item) as raw, parquet.ParquetFile(raw, **some) as file:
        wanted = sorted(columns & set(file.schema_arrow.names))
        for group in range(*(item.groups or (0, file.num_row_groups))):
            for table in file.iter_batches(MAX_ROWS, [group], wanted):
                found = table.slice(min(skip, table.num_rows), left)
                skip -= min(skip, table.num_rows)
                number += found.num_rows
                share = number / max(file.metadata.num_rows, 1)
                yield _records(found), round(item.size_bytes * share)
                if left is not None and not (left := left - found.num_rows):
                    return


def _arrow_rows(
    item: InputFile, columns: Set[str], batch_bytes: int
) -> Iterator[tuple[list[Any], int]]:
    with _open_arrow(item) as source:
        for batch in _arrow_batches(source):
            batch = batch.select(sorted(columns & set(batch.schema.names)))
            _check(batch)  # not slices: the children of a struct are checked from end to end
            # A batch may hold gigabytes; of a local file, only the pages in use are in memory.
            rows = batch.num_rows * batch_bytes // max(batch.nbytes, 1)
            rows = max(min(rows, MAX_ROWS), 1)
            for start in range(0, batch.num_rows, rows):
                yield _records(batch.slice(start, rows)), source.tell()


@contextmanager
def _open_arrow(item: InputFile) -> Iterator[Any]:
    import pyarrow

    if is_url(item.path):
        with open_seekable(item) as raw, pyarrow.PythonFile(raw, "r") as source:
            yield source
    else:
        with pyarrow.memory_map(item.path) as source:
            yield source


def _arrow_batches(source: Any) -> Iterator[Any]:
    from pyarrow import ipc

    head = source.read(len(ARROW_FILE_MAGIC))
    source.seek(0)
    if head == ARROW_FILE_MAGIC:
        reader = ipc.open_file(source)
        yield from map(reader.get_batch, range(reader.num_record_batches))
        return
    reader = ipc.open_stream(source)
    end = source.tell()
    for batch in reader:
        end = source.tell()
        yield batch
    # Without the mark of its end, a stream that was cut off between two batches would look whole.
    if source.tell() == end:
        raise EOFError("the mark at the end of the stream is missing")
    if left := source.size() - source.tell():
        raise EOFError(f"{left:,} bytes follow the end of the stream")


def _check(batch: Any) -> None:
    """Check offsets and types, which pyarrow trusts: it would read beyond the data."""
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error):  # which is found again row by row
                raise


def _records(table: Any) -> list[Any]:
    """Return the rows of a table; for one that is not UTF-8, the error."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        return [_record(table.slice(row, 1)) for row in range(table.num_rows)]


def _record(row: Any) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error
