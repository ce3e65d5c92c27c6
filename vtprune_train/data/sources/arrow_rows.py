"""Rows of Arrow tables by their bytes, so that a row of too many is never turned into Python objects.

Arrow decodes a page of a parquet file as a whole and holds it several times over meanwhile. A row group with a large
page is therefore read by a process of its own, which runs this file and imports nothing else of the package: it hands
over the rows within the bound, and the bytes of the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH = 256  # rows at a time
BATCH_BYTES = 32 << 20  # of the rows of a batch, where they are of about one size
ELEMENT_BYTES = 64  # of a list's element, which takes so much as a Python object even if it is empty
LARGEST_PAGE = 64 << 20  # bytes, decompressed, that are decoded in this process
HEADER = 1 << 12  # bytes in which a page's header is looked for first
BYTES = "bytes of the row"  # the column that says how many

Rows = tuple[pa.RecordBatch, np.ndarray]
"""A batch of rows and [rows] int64, the bytes of each; those of more than the bound are null."""


def row_bytes(array: pa.Array) -> np.ndarray:
    """[rows] int64: the bytes of an array's values, all levels of nesting together."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return row_bytes(array.storage)
    if isinstance(array, pa.DictionaryArray):
        sizes = row_bytes(array.dictionary)
        places = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return np.where(array.indices.is_null(), 0, sizes[places]) if len(sizes) else np.zeros(len(array), np.int64)
    if pa.types.is_struct(kind):
        return sum((row_bytes(field) for field in array.flatten()), np.zeros(len(array), np.int64))
    if pa.types.is_map(kind):
        array = array.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)])))
        kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        counts = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        ends = np.cumsum(counts)
        sums = np.concatenate([[0], np.cumsum(row_bytes(array.flatten()))])
        return sums[ends] - sums[ends - counts] + counts * ELEMENT_BYTES
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        array = array.cast(pa.large_binary())
        kind = array.type
    if kind in (pa.string(), pa.binary(), pa.large_string(), pa.large_binary()):
        return pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.full(len(array), 8, np.int64)


def within(batch: pa.RecordBatch, bound: int) -> Rows:
    """The rows of a batch, those of more than ``bound`` bytes as null.

    Raises:
        pyarrow.ArrowInvalid: the batch is broken. Arrow checks no file that it maps, and would read outside of it.
    """
    batch.validate(full=True)
    sizes = sum((row_bytes(column) for column in batch.columns), np.zeros(len(batch), np.int64))
    if not (sizes > bound).any():
        return batch, sizes
    kept = pa.array(np.arange(len(batch)), mask=sizes > bound)
    return pa.RecordBatch.from_arrays([column.take(kept) for column in batch.columns], names=batch.schema.names), sizes


def batches_of(file: pq.ParquetFile, group: int, columns: Sequence[str], bound: int) -> Iterator[Rows]:
    """The rows of a row group, as many at a time as take about ``BATCH_BYTES`` together."""
    leaves = chunks(file, group, columns)
    rows = file.metadata.row_group(group).num_rows
    mean = sum(leaf.total_uncompressed_size for leaf in leaves) // max(rows, 1)
    size = max(1, min(BATCH, BATCH_BYTES // max(mean, 1)))
    for batch in file.iter_batches(size, row_groups=[group], columns=list(columns), use_threads=False):
        yield within(batch, bound)


def chunks(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> list[pq.ColumnChunkMetaData]:
    """What the file says of the parts of a row group that belong to ``columns``."""
    metadata = file.metadata.row_group(group)
    leaves = [metadata.column(number) for number in range(metadata.num_columns)]
    return [leaf for leaf in leaves if leaf.path_in_schema.partition(".")[0] in columns]


def has_large_page(path: Path, file: pq.ParquetFile, group: int, columns: Sequence[str]) -> bool:
    """Whether a page of a row group is larger than ``LARGEST_PAGE``, as the pages' headers say."""
    for leaf in chunks(file, group, columns):
        if leaf.total_uncompressed_size <= LARGEST_PAGE:
            continue
        at = leaf.dictionary_page_offset if leaf.has_dictionary_page else leaf.data_page_offset
        stop = at + leaf.total_compressed_size
        with path.open("rb") as opened:
            while at < stop:
                try:
                    header, size, packed = _page_header(opened, at)
                except (IndexError, KeyError, RecursionError):  # not as we know it, or broken: Arrow will say
                    return True
                if size > LARGEST_PAGE or packed < 0:
                    return True
                at += header + packed
    return False


def _page_header(file: BinaryIO, at: int) -> tuple[int, int, int]:
    """Bytes of the page header at byte ``at``, of the page it announces, and of that as it is compressed."""
    window = HEADER
    while True:
        file.seek(at)
        content = file.read(window)
        try:
            header = _Thrift(content)
            fields = header.struct()
            return header.at, fields[2], fields[3]
        except IndexError:
            if len(content) < window:
                raise
            window *= 16


class _Thrift:
    """Reads a structure in Thrift's compact protocol, in which parquet writes its headers: its numbers by their field.

    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """

    def __init__(self, content: bytes):
        self._content, self.at = content, 0

    def struct(self) -> dict[int, int]:
        fields: dict[int, int] = {}
        number = 0
        while head := self._take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            fields[number] = self._value(head & 15, in_struct=True)
        return fields

    def _value(self, kind: int, in_struct: bool = False) -> int:
        if kind in (1, 2):  # true, false
            return 0 if in_struct else self._take(1)[0]
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind in (9, 10):  # list, set
            head = self._take(1)[0]
            for _ in range(head >> 4 if head >> 4 < 15 else self._varint()):
                self._value(head & 15)
        elif kind == 12:
            self.struct()
        else:
            self._take({3: lambda: 1, 7: lambda: 8, 8: self._varint}[kind]())
        return 0

    def _zigzag(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)

    def _varint(self) -> int:
        number = shift = 0
        while (byte := self._take(1)[0]) > 127:
            number |= (byte & 127) << shift
            shift += 7
        return number | byte << shift

    def _take(self, size: int) -> bytes:
        if self.at + size > len(self._content):
            raise IndexError(self.at)
        self.at += size
        return self._content[self.at - size : self.at]


def batches_apart(path: Path, group: int, columns: Sequence[str], bound: int) -> Iterator[Rows]:
    """:func:`batches_of`, read by a process of its own.

    Raises:
        OSError: it failed; with what it said.
    """
    asked = json.dumps([str(path), group, list(columns), bound])
    command = [sys.executable, "-P", __file__, asked]  # -P: no import finds the modules beside this file
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            with pa.ipc.open_stream(process.stdout) as stream:
                for batch in stream:
                    sizes = batch.column(BYTES).to_numpy()
                    yield batch.drop_columns([BYTES]), sizes
        except (pa.ArrowException, OSError) as error:
            raise OSError(_why_ended(process, error)) from error
        finally:
            process.stdout.close()  # it ends at its next write where nobody reads on


def _why_ended(process: subprocess.Popen[bytes], error: Exception) -> str:
    """Of a process that reads a row group and broke off."""
    assert process.stderr is not None
    lines = process.stderr.read().decode(errors="replace").strip().splitlines()
    if process.wait() < 0:
        return f"the process that reads it was ended by signal {-process.returncode}, perhaps for want of memory"
    return lines[-1] if lines else str(error)


def _write_rows(out: BinaryIO, path: str, group: int, columns: list[str], bound: int) -> None:
    writer = None
    for batch, sizes in batches_of(pq.ParquetFile(path), group, columns, bound):
        joined = batch.append_column(BYTES, pa.array(sizes))
        writer = writer or pa.ipc.new_stream(out, joined.schema)
        writer.write_batch(joined)
    if writer is not None:
        writer.close()


if __name__ == "__main__":
    _write_rows(sys.stdout.buffer, *json.loads(sys.argv[1]))
