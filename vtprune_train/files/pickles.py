"""Reads files of ``torch.save`` without running code in them.

A pickle names functions and calls them, so opening an untrusted one can run any code. The files read here contain only
tensors, numbers and containers: before a file is opened, every name in it is checked against an allow list; it is then
opened by PyTorch's restricted unpickler (``weights_only``), which has its own list. DeepSpeed's classes are read as
plain numbers, so that reading its files does not need DeepSpeed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pickle
import pickletools
import re
import struct
import tarfile
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # names in pickles of protocol 2
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

# Classes in DeepSpeed's files and their harmless replacements.
STAND_INS: dict[str, Callable[..., Any]] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": SimpleNamespace,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": SimpleNamespace,
    "deepspeed.utils.tensor_fragment.fragment_address": SimpleNamespace,
}
TENSORS = frozenset(
    {
        "builtins.set", "collections.OrderedDict", "torch.Size", "torch.device", "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
    }
)  # fmt: skip
SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
UNPICKLER = "WeightsUnpickler error:"  # PyTorch's prefix of the problem
UNKNOWN, UNREADABLE = "a name computed while unpickling", "unreadable instructions"
NAMING = ("GLOBAL", "INST", "EXT1", "EXT2", "EXT4")  # instructions of protocols before STACK_GLOBAL that name code
ADVICE = "In PyTorch 2.6, we changed"  # the start of PyTorch's advice to trust a file
LARGEST_PICKLE = 1 << 30  # most bytes read from an entry of a zip file
LARGEST_UNPACKED = 1 << 26  # most bytes unpacked from a compressed file
ZIP, NUMPY, TAR, TAR_AT = b"PK\x03\x04", b"\x93NUMPY", b"ustar", 257
COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
CONTAINERS = (ZIP, NUMPY, *COMPRESSED)  # first bytes of files that may contain pickles
OBJECTS = re.compile(rb"['\"][|<>=]?O\d*['\"]")  # dtype in the header of a NumPy array that contains a pickle
HUFFMAN = 1 << 10  # bytes; more than the Huffman tables before the first compressed byte
DEEPEST = 3  # nesting depth of containers
LEGACY_PICKLES = 5  # pickles per file in torch.save's format before zip files
MOST_PICKLES = 10_000  # in one file


class ForeignCodeError(ValueError):
    """Opening a file would run code; none was run."""


def read(path: str | Path, *, mmap: bool = False, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a dictionary that :func:`torch.save` wrote to a file.

    Args:
        path: the file.
        mmap: memory-map the tensors instead of reading them.
        map_location: as for :func:`torch.load`.

    Raises:
        ForeignCodeError: the file names something other than tensors, numbers and DeepSpeed's classes.
        ValueError: the file is damaged or does not contain a dictionary.
    """
    check(Path(path))
    stand_ins = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            content = _torch_load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as tensors and numbers ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a {type(content).__name__}, not a dictionary of tensors")
    return content


def first_line(error: Exception) -> str:
    """The first line of an error message, without PyTorch's advice to trust the file."""
    lines = [line.partition(ADVICE)[0].strip() for line in str(error).rpartition(UNPICKLER)[2].splitlines()]
    said = [line for line in lines if line and line != "Weights only load failed."]
    return said[0] if said else type(error).__name__


_torch_load = torch.load


@contextmanager
def for_torch_load(finish: Callable[[Any], Any]) -> Iterator[None]:
    """Context manager in which :func:`torch.load` is replaced by :func:`read` followed by ``finish``, for a library
    that opens its files with ``weights_only=False``."""

    def load(f: Any, map_location: Any = "cpu", *_: Any, mmap: bool | None = None, **__: Any) -> Any:
        return finish(read(f, mmap=bool(mmap), map_location=map_location))

    before = torch.load
    torch.load = load
    try:
        yield
    finally:
        torch.load = before


def check(path: Path) -> None:
    """Check the names in a file against the allow list.

    Raises:
        ForeignCodeError: with the file and the names that are not allowed.
    """
    names = foreign_names(path)
    if names == [UNREADABLE]:
        raise ForeignCodeError(f"{path} is damaged: a pickle in it cannot be parsed, so the file is not opened")
    if names:
        raise ForeignCodeError(
            f"{path} names {', '.join(names)}: loading it with torch.load would run that code. None of it was run. "
            "A checkpoint contains only tensors and numbers, so this file is something else or was changed; restore it "
            "from a copy that you trust"
        )


def check_folder(folder: Path) -> None:
    """Run :func:`check` on all files in a folder, recursively.

    Raises:
        ForeignCodeError: for the first file with names that are not allowed.
    """
    for path in pickled_files(folder):
        check(path)


def pickled_files(folder: Path) -> list[Path]:
    """Files in a folder, recursively, that are or may contain pickles, or have the suffix of one."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and may_hold_pickles(path)]


def may_hold_pickles(path: Path) -> bool:
    """Whether a file's content is a pickle or a container that may have some, or its suffix is that of a pickle."""
    with path.open("rb") as file:
        return _has_suffix(path) or _is_container(file) or _begins_as_pickle(file)


def foreign_names(path: Path) -> list[str]:
    """The functions and classes in a file that :func:`read` does not allow, as ``module.name``. Nothing is unpickled:
    only the instructions are parsed, also in archives, compressed files and NumPy files. A file that is not a pickle
    has none."""
    with path.open("rb") as file:
        # Other files (safetensors, DeepSpeed's swap files) may start like a pickle by chance.
        is_pickle = _has_suffix(path) and _is_pickle(file.read(2))
        return sorted(name for name in _names_in(file, is_pickle, 0) if not _is_allowed(name))


def _has_suffix(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _is_container(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(8).startswith(CONTAINERS) or zipfile.is_zipfile(file) or _is_tar(file)


def _is_tar(file: BinaryIO) -> bool:
    file.seek(TAR_AT)
    return file.read(len(TAR)) == TAR


def _names_in(file: BinaryIO, is_pickle: bool, depth: int) -> set[str]:
    """Names in a file or in a member of a container."""
    file.seek(0)
    begin = file.read(8)
    names = _names_in_zip(file, depth) if zipfile.is_zipfile(file) else set()
    if begin.startswith(ZIP):
        return names
    if not is_pickle:
        names.discard(UNREADABLE)  # not a zip file after all: the end looked like one by chance
    if _is_tar(file):
        names |= _names_in_tar(file, depth)
    file.seek(0)
    if begin.startswith(NUMPY):
        return names | _names_in_array(file)
    for magic, unpack in COMPRESSED.items():
        if begin.startswith(magic):
            return names | _names_in_packed(unpack(file), depth)
    return names | _names_in_stream(file, is_pickle)  # from the start, even if the end looks like a zip file


def _names_in_content(content: BytesIO, is_pickle: bool, depth: int) -> set[str]:
    """Names in a member of a container."""
    if not (is_pickle or _is_container(content) or _begins_as_pickle(content)):
        return set()
    return {UNREADABLE} if depth >= DEEPEST else _names_in(content, is_pickle, depth + 1)


def _names_in_packed(file: Any, depth: int) -> set[str]:
    content = BytesIO()
    try:
        while content.tell() < LARGEST_UNPACKED and (block := file.read(1 << 20)):
            content.write(block)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        pass  # truncated; the part before would be loaded
    content.seek(0)
    return _names_in_content(content, _is_pickle(content.read(2)), depth)


def _names_in_tar(file: BinaryIO, depth: int) -> set[str]:
    names: set[str] = set()
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                if entry.isfile() and (packed := archive.extractfile(entry)) is not None:
                    names |= _names_in_content(BytesIO(packed.read(LARGEST_UNPACKED)), False, depth)
    except tarfile.TarError:
        return names | {UNREADABLE}
    return names


def _names_in_array(file: BinaryIO) -> set[str]:
    """Names in an array of objects, which is a pickle; other arrays have none."""
    header = file.read(12)
    wide = header[6:7] > b"\x01"
    length = int.from_bytes(header[8:12] if wide else header[8:10], "little")
    file.seek(12 if wide else 10)
    if not OBJECTS.search(file.read(min(length, 1 << 16))):
        return set()
    return _names_in_stream(file, True)


def _begins_as_pickle(file: BinaryIO) -> bool:
    """Whether a file starts with a pickle: by its first bytes, or for the oldest protocols, which have no fixed start,
    by parsing all instructions."""
    file.seek(0)
    if _is_pickle(file.read(2)):
        return True
    file.seek(0)
    try:
        return any(operation.name in NAMING for operation, *_ in list(pickletools.genops(file)))
    except Exception:  # not a pickle: pickletools raises errors of any type
        return False


def _is_pickle(begin: bytes) -> bool:
    return len(begin) == 2 and begin[0] == pickle.PROTO[0] and begin[1] <= pickle.HIGHEST_PROTOCOL


def _is_allowed(name: str) -> bool:
    module, _, last = name.rpartition(".")
    if module == "torch" and isinstance(vars(torch).get(last), torch.dtype):
        return True
    return name in TENSORS or name in STAND_INS or (module in ("torch", "torch.storage") and last.endswith("Storage"))


def _names_in_zip(file: BinaryIO, depth: int) -> set[str]:
    """Names in all pickles of a zip file, including those that PyTorch ignores."""
    names: set[str] = set()
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                is_pickle = entry.filename.lower().endswith(".pkl")
                begin = _unpacked(file, entry, 8)
                if is_pickle or _is_pickle(begin[:2]) or begin.startswith(CONTAINERS):
                    content = BytesIO(_unpacked(file, entry, LARGEST_PICKLE))
                    names |= _names_in_content(content, is_pickle, depth)
                if entry.filename.endswith("/constants.pkl"):
                    names.add("torch.jit (a program)")
    except (zipfile.BadZipFile, NotImplementedError, struct.error, zlib.error):
        return names | {UNREADABLE}
    return names


def _unpacked(file: BinaryIO, entry: zipfile.ZipInfo, size: int) -> bytes:
    """The first bytes of an entry. Its checksum is ignored: PyTorch can write files without one."""
    file.seek(entry.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    if entry.compress_type == zipfile.ZIP_STORED:
        return file.read(min(entry.file_size, size))
    if entry.compress_type != zipfile.ZIP_DEFLATED:
        raise NotImplementedError(entry.compress_type)
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(min(entry.compress_size, size + HUFFMAN)), size)


def _names_in_stream(file: BinaryIO, is_pickle: bool) -> set[str]:
    """Names in a sequence of pickles that starts at the current position."""
    names: set[str] = set()
    for number in count():
        if number == MOST_PICKLES:
            return names | {UNREADABLE}
        begin = file.tell()
        in_pickle: set[str] = set()
        try:
            for name in _names_in_pickle(file):
                in_pickle.add(name)
        except Exception:  # not a pickle: pickletools raises errors of any type
            file.seek(begin)
            if number < LEGACY_PICKLES or _is_pickle(file.read(2)):  # otherwise data that follows torch.save's pickles
                names |= in_pickle
            return names | {UNREADABLE} if is_pickle and number == 0 else names
        names |= in_pickle
    return names


def _names_in_pickle(file: BinaryIO) -> Iterator[str]:
    """Names in one pickle, in order."""
    memo: dict[int, str | None] = {}
    pushed: list[str | None] = [None, None]  # what the last two instructions pushed, if strings
    instructions: Iterator[tuple[Any, Any, Any]] = pickletools.genops(file)
    for operation, argument, _ in instructions:
        name = operation.name
        if name in ("GLOBAL", "INST"):
            yield _named(*argument.split(" ", 1))
        elif name == "STACK_GLOBAL":
            module, attribute = pushed[-2:]
            yield UNKNOWN if module is None or attribute is None else _named(module, attribute)
        elif name.startswith("EXT"):
            yield UNKNOWN
        if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = pushed[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            pushed.append(memo.get(argument))
        elif name != "FRAME":
            pushed.append(argument if "UNICODE" in name else None)
        del pushed[:-2]


def _named(module: str, name: str) -> str:
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    else:
        module = IMPORT_MAPPING.get(module, module)
    return f"{module}.{name}"
