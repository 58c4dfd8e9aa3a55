"""Parquet files of a LeRobot data set: small tables, and rows of large ones a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from prismatic.vla.datasets.source import DataSetError, MissingFeatureError

_BATCH_ROWS = 32  # rows of a parquet file held at once: bounds memory
_MOST_EPISODES = 1 << 22
_MOST_TABLE_BYTES = 1 << 30  # of a table of metadata, decompressed
# A column whose pages are larger after decompression, by this factor and this size, is a bomb.
_MOST_RATIO, _MOST_COLUMN_BYTES = 500, 1 << 28


@contextmanager
def parquet(where: str | Path) -> Iterator[None]:
    """Whatever pyarrow raises on damaged content becomes a DataSetError that begins with `where`."""
    import pyarrow as pa

    try:
        yield
    except (DataSetError, MissingFeatureError):
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataSetError(f"{where}: cannot be read, expected a complete parquet file: {error}") from error


def _open_parquet(path: Path):
    import pyarrow.parquet as pq

    with parquet(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


def column_names(path: Path) -> list[str]:
    """Names of the columns of a file."""
    with _open_parquet(path) as file, parquet(path):
        return file.schema_arrow.names


def _require_columns(path: Path, columns: Sequence[str], found: Sequence[str]) -> None:
    missing = sorted(set(columns) - set(found))
    if missing:
        raise MissingFeatureError(f"{path}: no columns {missing}, found {sorted(found)}")


def table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict]:
    """Rows of a small table, with the optional columns that it has."""
    with _open_parquet(path) as file, parquet(path):
        found = file.schema_arrow.names
        _require_columns(path, columns, found)
        if file.metadata.num_rows > _MOST_EPISODES:
            raise DataSetError(f"{path}: {file.metadata.num_rows} rows, expected at most {_MOST_EPISODES}")
        columns = [*columns, *(name for name in optional if name in found)]
        _check_compression(file, columns, path)
        rows, size = [], 0
        for batch in file.iter_batches(1000, columns=columns, use_threads=False):
            size += batch.nbytes
            if size > _MOST_TABLE_BYTES:
                raise DataSetError(f"{path}: more than {_MOST_TABLE_BYTES} bytes in {columns}, expected a small table")
            rows += batch.to_pylist()
        return rows


def _check_compression(file, columns: Sequence[str], path: Path) -> None:
    """DataSetError for a column that a small file blows up to a large one."""
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            size, stored = column.total_uncompressed_size, max(1, column.total_compressed_size)
            if (
                column.path_in_schema.split(".")[0] in {name.split(".")[0] for name in columns}
                and size > _MOST_COLUMN_BYTES
                and size / stored > _MOST_RATIO
            ):
                raise DataSetError(
                    f"{path}: {column.path_in_schema} has {size} bytes compressed to {stored}, expected at most "
                    f"{_MOST_RATIO} times"
                )


class RowStream:
    """Rows of one parquet file in order, a few at a time: memory does not grow with the file.

    widths: values per row of number columns, which the file must not exceed: a row may hold any number of values in a
    few bytes.
    """

    def __init__(self, path: Path, columns: Sequence[str], optional: Sequence[str], widths: Mapping[str, int]) -> None:
        self.path = path
        self._file = _open_parquet(path)
        with parquet(path):
            found = self._file.schema_arrow.names
            _require_columns(path, columns, found)
            self.columns = [*columns, *(name for name in optional if name in found)]
            self.rows = self._file.metadata.num_rows
            _check_compression(self._file, self.columns, path)
            self._check_values(widths)
        self._start()

    def _check_values(self, widths: Mapping[str, int]) -> None:
        metadata = self._file.metadata
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group)
            for number in range(metadata.num_columns):
                column = rows.column(number)
                width = widths.get(column.path_in_schema.split(".")[0])
                # Twice: lists of another length than declared are reported with their place.
                if width is not None and column.num_values > max(2 * width, 1 << 10) * rows.num_rows:
                    raise DataSetError(
                        f"{self.path}: {column.path_in_schema} holds {column.num_values} values in {rows.num_rows} "
                        f"rows, expected {width} per row"
                    )

    def episodes(self) -> dict[int, tuple[int, int]]:
        """{episode number: (first row, rows)} by the column `episode_index`, -1 rows for one that lies in pieces."""
        found: dict[int, tuple[int, int]] = {}
        row, before = 0, None
        with parquet(self.path):
            for batch in self._file.iter_batches(1 << 14, columns=["episode_index"], use_threads=False):
                values = matrix(batch.column(0), 1, f"{self.path}: episode_index")[:, 0]
                starts = np.flatnonzero(np.diff(values, prepend=values[0] - 1 if before is None else before))
                if before is not None and (not len(starts) or starts[0] > 0):
                    grown = int(starts[0]) if len(starts) else len(values)
                    first, count = found[int(before)]
                    found[int(before)] = (first, count + grown if count > 0 else count)
                for start, stop in zip(starts, [*starts[1:], len(values)], strict=True):
                    number = int(values[start])
                    found[number] = (row, -1) if number in found else (row + int(start), int(stop - start))
                if len(found) > _MOST_EPISODES:
                    raise DataSetError(f"{self.path}: more than {_MOST_EPISODES} episodes")
                row, before = row + len(values), values[-1] if len(values) else before
        return found

    def _start(self) -> None:
        self._batches = self._file.iter_batches(_BATCH_ROWS, columns=self.columns, use_threads=False)
        self._rest, self._position = None, 0

    def read(self, start: int, stop: int) -> Iterator:
        """Record batches that together are the rows start to stop."""
        if start < self._position:
            self._start()
        while self._position < stop:
            if self._rest is None or self._rest.num_rows == 0:
                with parquet(self.path):
                    self._rest = next(self._batches, None)
            if self._rest is None:
                raise DataSetError(f"{self.path}: {self._position} rows, expected at least {stop}")
            skip = max(start - self._position, 0)
            take = min(self._rest.num_rows, stop - self._position)
            if skip < take:
                yield self._rest.slice(skip, take - skip)
            self._rest = self._rest.slice(take)
            self._position += take

    def close(self) -> None:
        self._file.close()


def matrix(column, width: int, where: str) -> np.ndarray:
    """Numbers, or lists (of lists) of them, as (rows, width)."""
    import pyarrow as pa

    with parquet(where):
        column.validate(full=True)  # offsets of a damaged file may point anywhere
        flat = column.storage if isinstance(column, pa.ExtensionArray) else column
        sizes, missing = np.ones(len(flat), dtype=np.int64), flat.null_count
        while isinstance(flat, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
            inner = flat.value_lengths().to_numpy(zero_copy_only=False)
            if missing:
                break
            ends = np.cumsum(inner)[np.cumsum(sizes) - 1] if len(inner) else inner
            sizes = np.diff(ends, prepend=0) if len(inner) else sizes
            flat = flat.flatten()
            missing = flat.null_count
        if missing:
            raise DataSetError(f"{where}: missing values")
        if pa.types.is_boolean(flat.type):
            flat = flat.cast(pa.int8())
        if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
            raise DataSetError(f"{where}: {column.type}, expected numbers or lists of numbers")
        if not np.all(sizes == width):
            raise DataSetError(f"{where}: {sorted(set(sizes.tolist()))[:5]} values per step, expected {width}")
        return flat.to_numpy(zero_copy_only=False).reshape(-1, width)


def strings(column) -> list[str] | None:
    """Texts of a column, None for one of another type; a missing text is an empty one."""
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return None
    column.validate(full=True)
    return [text or "" for text in column.to_pylist()]
