"""Sizes of rows in Arrow tables, so that rows that are too large are never converted to Python objects.

Arrow decodes a parquet page as a whole, which temporarily takes several times its size. A row group with a large page
is therefore read by a separate process, which runs this file and imports nothing else of the package. It sends back
the rows within the limit, and the sizes of the others.
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
BATCH_BYTES = 32 << 20  # approximate size of a batch
ELEMENT_BYTES = 64  # size of a list element as a Python object, even if it is empty
LARGEST_PAGE = 64 << 20  # decompressed bytes of a page that this process decodes
HEADER = 1 << 12  # bytes that are read first to parse a page header
BYTES = "bytes of the row"  # name of the column with the sizes

Rows = tuple[pa.RecordBatch, np.ndarray]
"""A batch of rows and [rows] int64, the size of each in bytes; rows over the limit are null."""


def row_bytes(array: pa.Array) -> np.ndarray:
    """[rows] int64: size of each value of an array in bytes, with everything nested in it."""
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
    """The rows of a batch, with null in place of those of more than ``bound`` bytes.

    Raises:
        pyarrow.ArrowInvalid: the batch is broken. Arrow does not check memory-mapped files and would read outside them.
    """
    batch.validate(full=True)
    sizes = sum((row_bytes(column) for column in batch.columns), np.zeros(len(batch), np.int64))
    if not (sizes > bound).any():
        return batch, sizes
    kept = pa.array(np.arange(len(batch)), mask=sizes > bound)
    return pa.RecordBatch.from_arrays([column.take(kept) for column in batch.columns], names=batch.schema.names), sizes


def batches_of(file: pq.ParquetFile, group: int, columns: Sequence[str], bound: int) -> Iterator[Rows]:
    """The rows of a row group, in batches of about ``BATCH_BYTES``."""
    leaves = chunks(file, group, columns)
    rows = file.metadata.row_group(group).num_rows
    mean = sum(leaf.total_uncompressed_size for leaf in leaves) // max(rows, 1)
    size = max(1, min(BATCH, BATCH_BYTES // max(mean, 1)))
    for batch in file.iter_batches(size, row_groups=[group], columns=list(columns), use_threads=False):
        yield within(batch, bound)


def chunks(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> list[pq.ColumnChunkMetaData]:
    """Metadata of the column chunks of a row group that belong to ``columns``."""
    metadata = file.metadata.row_group(group)
    leaves = [metadata.column(number) for number in range(metadata.num_columns)]
    return [leaf for leaf in leaves if leaf.path_in_schema.partition(".")[0] in columns]


def has_large_page(path: Path, file: pq.ParquetFile, group: int, columns: Sequence[str]) -> bool:
    """Whether a page of a row group is larger than ``LARGEST_PAGE``, according to the page headers."""
    for leaf in chunks(file, group, columns):
        if leaf.total_uncompressed_size <= LARGEST_PAGE:
            continue
        at = leaf.dictionary_page_offset if leaf.has_dictionary_page else leaf.data_page_offset
        stop = at + leaf.total_compressed_size
        with path.open("rb") as opened:
            while at < stop:
                try:
                    header, size, packed = _page_header(opened, at)
                except (IndexError, KeyError, RecursionError):  # unknown or broken format: Arrow reports it
                    return True
                if size > LARGEST_PAGE or packed < 0:
                    return True
                at += header + packed
    return False


def _page_header(file: BinaryIO, at: int) -> tuple[int, int, int]:
    """Sizes in bytes at offset ``at``: the page header, the page, and the compressed page."""
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
    """Parses a structure in Thrift's compact protocol, which parquet headers use, to its integers by field number.

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
    """Like :func:`batches_of`, in a separate process.

    Raises:
        OSError: the process failed; the message contains its error.
    """
    arguments = json.dumps([str(path), group, list(columns), bound])
    command = [sys.executable, "-P", __file__, arguments]  # -P: modules beside this file must not shadow others
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
            process.stdout.close()  # the process then ends at its next write


def _why_ended(process: subprocess.Popen[bytes], error: Exception) -> str:
    """Why the process that reads a row group failed."""
    assert process.stderr is not None
    lines = process.stderr.read().decode(errors="replace").strip().splitlines()
    if process.wait() < 0:
        return f"the process that reads it was killed by signal {-process.returncode}, perhaps because memory ran out"
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
