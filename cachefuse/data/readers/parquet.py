"""Parquet tables, read column by column in batches whose size is known before they are read."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cachefuse.data.column import TooLong
from cachefuse.data.readers.lines import TEXT_ERRORS
from cachefuse.data.readers.table_columns import Cell, TableColumns
from cachefuse.errors import DataError
from cachefuse.limits import limits
from cachefuse.printable import printable

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

ROWS = 8192  # of a batch
BATCH_BYTES = 1 << 27
SMALL_DICTIONARY, LARGE_DICTIONARY = BATCH_BYTES // ROWS, 1 << 24  # bytes
MOST_CHUNK_VALUES = 50_000_000  # of a column in a row group
MOST_PAGE = 208 << 20  # bytes; a page is held three times
MOST_EXPANSION = 64  # bytes of the cells for each byte of the file, beyond the next
FREE_BYTES = 1 << 29


def read_parquet(path: Path, wanted: Collection[str] | None) -> TableColumns:
    """Return the columns of a file. Raises DataError, naming it, if it is not readable, or too large when unpacked."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as opened:
            names = opened.schema_arrow.names
            n_rows = opened.metadata.num_rows
            if len(names) > limits().columns or n_rows > limits().rows:
                raise DataError(
                    f"{path.name}: has {len(names):,} columns and {n_rows:,} rows; the limits are "
                    f"{limits().columns:,} and {limits().rows:,}"
                )
            repeated = len(set(names)) < len(names)
            if repeated:
                raise DataError(f"{path.name}: a column occurs twice")
            reader = _Reader(path)
            columns = {name: reader.column(name) for name in names if wanted is None or name in wanted}
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not a readable parquet file: it has text that is not UTF-8") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name}: not a readable parquet file: {printable(str(error).strip())}") from error
    return TableColumns(columns, names, n_rows)


class _Reader:
    """Reads the columns of one file, and counts the bytes of their cells."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._left = MOST_EXPANSION * path.stat().st_size + FREE_BYTES

    def column(self, name: str) -> list[Cell]:
        """Return the cells of a column. A text over the limit is ``TooLong``."""
        import pyarrow.parquet

        cells: list[Cell] = []
        with pyarrow.parquet.ParquetFile(self._path, pre_buffer=False) as file:
            for group in range(file.metadata.num_row_groups):
                for batch in self._batches(file, group, name):
                    cells += self._cells(batch)
        return cells

    def _batches(self, file: "pyarrow.parquet.ParquetFile", group: int, name: str) -> Iterator["pyarrow.Array"]:
        """Yield a column of one row group, in pieces of a bounded size."""
        import pyarrow as pa
        import pyarrow.parquet

        is_plain = not pa.types.is_nested(file.schema_arrow.field(name).type)
        chunks = [
            chunk
            for i in range(file.metadata.num_columns)
            if (chunk := file.metadata.row_group(group).column(i)).path_in_schema.split(".")[0] == name
            or chunk.path_in_schema == name
        ]
        n_values = max((chunk.num_values for chunk in chunks), default=0)
        if n_values > MOST_CHUNK_VALUES:
            raise DataError(f"{self._path.name}: column {name!r} has {n_values:,} values in one row group")
        with self._path.open("rb") as raw:
            sizes = [_page_sizes(raw, chunk, self._path.name) for chunk in chunks]
        dictionary, page = max((size for size, _ in sizes), default=0), max((size for _, size in sizes), default=0)
        if max(page, dictionary) > MOST_PAGE:
            raise DataError(
                f"{self._path.name}: column {name!r} has a page of {max(page, dictionary):,} bytes, over the limit of "
                f"{MOST_PAGE:,}; shorten its texts"
            )
        per_row = -(-n_values // max(1, file.metadata.row_group(group).num_rows))
        longest = dictionary
        if is_plain and SMALL_DICTIONARY < dictionary <= LARGE_DICTIONARY:
            longest = self._longest(group, name)
        as_dictionary = is_plain and dictionary > LARGE_DICTIONARY
        n = ROWS if as_dictionary else max(1, min(ROWS, BATCH_BYTES // max(1, longest * per_row)))
        if as_dictionary:
            file = pa.parquet.ParquetFile(self._path, read_dictionary=[name], pre_buffer=False)
        for batch in file.iter_batches(n, row_groups=[group], columns=[name], use_threads=False):
            yield batch.column(0)

    def _longest(self, group: int, name: str) -> int:
        """Return the length of the longest text in a dictionary."""
        import pyarrow as pa
        import pyarrow.compute
        import pyarrow.parquet

        file = pa.parquet.ParquetFile(self._path, read_dictionary=[name], pre_buffer=False)
        for batch in file.iter_batches(1, row_groups=[group], columns=[name], use_threads=False):
            values = batch.column(0)
            if pa.types.is_dictionary(values.type) and len(values.dictionary):
                return int(pa.compute.max(pa.compute.binary_length(values.dictionary)).as_py() or 1)
            break
        return 1

    def _cells(self, values: "pyarrow.Array") -> list[Cell]:
        """Return a batch as Python values."""
        import pyarrow as pa

        if pa.types.is_dictionary(values.type):
            known = self._texts(values.dictionary)
            return [None if i is None else known[i] for i in values.indices.to_pylist()]
        if _is_text(values.type):
            return self._texts(values)
        n = len(values)
        if n > 1 and values.nbytes > BATCH_BYTES:
            return [*self._cells(values[: n // 2]), *self._cells(values[n // 2 :])]
        if pa.types.is_nested(values.type) and values.nbytes > 16 * limits().text_bytes:
            if n > 1:
                return [*self._cells(values[: n // 2]), *self._cells(values[n // 2 :])]
            return [TooLong(values.nbytes)]
        self._count(values.nbytes)
        return _listed(values)

    def _texts(self, values: "pyarrow.Array") -> list[Cell]:
        import pyarrow as pa
        import pyarrow.compute

        lengths = pa.compute.binary_length(values)
        total = int(pa.compute.sum(lengths).as_py() or 0)
        if int(pa.compute.max(lengths).as_py() or 0) <= limits().text_bytes:
            self._count(total)
            return _listed(values)
        cells: list[Cell] = []
        for i, n in enumerate(lengths.to_pylist()):
            if n is not None and n > limits().text_bytes:
                cells.append(TooLong(n))  # not even taken from the array: that copies it
            else:
                self._count(n or 0)
                cells += _listed(values[i : i + 1])
        return cells

    def _count(self, n_bytes: int) -> None:
        """Raise DataError when the cells take far more than the file, as in an archive made to fill a memory."""
        self._left -= n_bytes
        if self._left < 0:
            raise DataError(
                f"{self._path.name}: its cells take more than {MOST_EXPANSION} times its size and {FREE_BYTES:,} bytes"
            )


def _listed(values: "pyarrow.Array") -> list[Cell]:
    """Return an array as Python values, bytes as text."""
    import pyarrow as pa

    try:
        cells: list[Cell] = values.to_pylist()
    except UnicodeDecodeError:
        if not _is_text(values.type):
            raise
        values = values.cast(pa.large_binary())
        cells = values.to_pylist()
    return [_decoded(cell) for cell in cells] if "binary" in str(values.type) else cells


def _decoded(cell: Cell) -> Cell:
    """Return a cell with text in place of bytes; those that are not UTF-8 are read as in csv files."""
    if isinstance(cell, bytes):
        return cell.decode("utf-8", errors=TEXT_ERRORS)
    if isinstance(cell, list):
        return [_decoded(item) for item in cell]
    if isinstance(cell, dict):
        return {key: _decoded(value) for key, value in cell.items()}
    return cell


def _is_text(kind: "pyarrow.DataType") -> bool:
    import pyarrow.types as t

    return bool(t.is_string(kind) or t.is_large_string(kind) or t.is_binary(kind) or t.is_large_binary(kind))


def _page_sizes(file: BinaryIO, chunk: Any, name: str) -> tuple[int, int]:
    """Return the bytes of a column chunk's dictionary, 0 without one, and of its largest page, when unpacked.

    The pages' own headers say this, and the library believes them (parquet-format, PageHeader).
    """
    dictionary = largest = 0
    start = min(x for x in (chunk.dictionary_page_offset, chunk.data_page_offset) if x)
    at, end = start, start + chunk.total_compressed_size
    while at < end:
        file.seek(at)
        header = _Header(file.read(1 << 16))
        kind, unpacked, packed = header.read()
        if unpacked < 0 or packed < 0:
            raise DataError(f"{name}: not a readable parquet file: a page has a negative size")
        dictionary = max(dictionary, unpacked) if kind == DICTIONARY_PAGE else dictionary
        largest = max(largest, unpacked)
        at += header.at + packed
    return dictionary, largest


DICTIONARY_PAGE = 2
_STOP, _TRUE, _FALSE, _BYTE, _BINARY, _LIST, _SET, _STRUCT, _DOUBLE = 0, 1, 2, 3, 8, 9, 10, 12, 7


class _Header:
    """A page's header in Thrift's compact protocol. Raises OSError for other bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def read(self) -> tuple[int, int, int]:
        """Return the kind of the page, and its bytes unpacked and packed."""
        values = {1: -1, 2: -1, 3: -1}
        field = 0
        while (first := self._byte()) & 15 != _STOP:
            field = field + (first >> 4) if first >> 4 else self._number()
            if field in values and first & 15 == 5:
                values[field] = self._number()
            else:
                self._skip(first & 15, 0)
        return values[1], values[2], values[3]

    def _skip(self, kind: int, depth: int) -> None:
        if depth > 8:
            raise OSError("a page's header is damaged")
        if kind in (_TRUE, _FALSE):
            return
        if kind == _BYTE:
            self.at += 1
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            n = self._varint()  # first: it moves on
            self.at += n
        elif kind in (_LIST, _SET):
            first = self._byte()
            n = first >> 4 if first >> 4 < 15 else self._varint()
            for _ in range(min(n, len(self._data))):
                if first & 15 in (_TRUE, _FALSE):
                    self.at += 1
                else:
                    self._skip(first & 15, depth + 1)
        elif kind == _STRUCT:
            while (first := self._byte()) & 15 != _STOP:
                if not first >> 4:
                    self._varint()
                self._skip(first & 15, depth + 1)
        elif kind in (4, 5, 6):
            self._varint()
        else:
            raise OSError("a page's header is damaged")

    def _byte(self) -> int:
        if not 0 <= self.at < len(self._data):
            raise OSError("a page's header is damaged")
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 70:
                raise OSError("a page's header is damaged")

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
