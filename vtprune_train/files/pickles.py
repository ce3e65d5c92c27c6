"""Files of ``torch.save``, read without running what they name.

A pickle names functions and calls them, so opening a foreign one runs foreign code. What is read here holds tensors,
numbers and containers alone: every name in a file is compared with a list before the file is opened, and opened it is
by PyTorch's restricted unpickler (``weights_only``), which has a list of its own. Classes that DeepSpeed writes are
read as plain numbers, so DeepSpeed is not needed to look at its files.
"""

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
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # as pickles of protocol 2 name things
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

# What DeepSpeed's files name, and what is made of it: neither can do anything.
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
UNPICKLER = "WeightsUnpickler error:"  # what PyTorch writes before what is wrong
UNKNOWN, UNREADABLE = "a name made while it is read", "instructions that cannot be made out"
NAMING = ("GLOBAL", "INST", "EXT1", "EXT2", "EXT4")  # instructions of those that are older than STACK_GLOBAL
ADVICE = "In PyTorch 2.6, we changed"  # what its advice to trust a file begins with
LARGEST_PICKLE = 1 << 30  # bytes, in a zip file
LARGEST_UNPACKED = 1 << 26  # bytes, of a compressed file
ZIP, NUMPY, TAR, TAR_AT = b"PK\x03\x04", b"\x93NUMPY", b"ustar", 257
COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
CONTAINERS = (ZIP, NUMPY, *COMPRESSED)  # files that may hold pickles, by their first bytes
OBJECTS = re.compile(rb"['\"][|<>=]?O\d*['\"]")  # the dtype in the header of a NumPy array that is a pickle
HUFFMAN = 1 << 10  # bytes, more than the tables before the first compressed byte take
DEEPEST = 3  # containers in containers
LEGACY_PICKLES = 5  # that torch.save wrote one after the other before it wrote zip files
MOST_PICKLES = 10_000  # in one file


class ForeignCodeError(ValueError):
    """A file names code that opening it would run; nothing of it was run."""


def read(path: str | Path, *, mmap: bool = False, map_location: Any = "cpu") -> dict[str, Any]:
    """The dictionary that :func:`torch.save` wrote to a file.

    Args:
        path: of the file.
        mmap: map the tensors instead of reading them.
        map_location: as for :func:`torch.load`.

    Raises:
        ForeignCodeError: it names something else than tensors, numbers and what DeepSpeed's files hold.
        ValueError: it is damaged, or not such a file.
    """
    check(Path(path))
    stand_ins = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            content = _torch_load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as tensors and numbers ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the tensors that training writes, by name")
    return content


def first_line(error: Exception) -> str:
    """What an error says, in one line, without PyTorch's advice to trust the file."""
    lines = [line.partition(ADVICE)[0].strip() for line in str(error).rpartition(UNPICKLER)[2].splitlines()]
    said = [line for line in lines if line and line != "Weights only load failed."]
    return said[0] if said else type(error).__name__


_torch_load = torch.load


@contextmanager
def for_torch_load(finish: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, whatever calls :func:`torch.load` gets :func:`read`, followed by ``finish``: for a library that opens
    its files with ``weights_only=False``."""

    def load(f: Any, map_location: Any = "cpu", *_: Any, mmap: bool | None = None, **__: Any) -> Any:
        return finish(read(f, mmap=bool(mmap), map_location=map_location))

    before = torch.load
    torch.load = load
    try:
        yield
    finally:
        torch.load = before


def check(path: Path) -> None:
    """Look at what a file names.

    Raises:
        ForeignCodeError: naming the file and what is not taken.
    """
    names = foreign_names(path)
    if names == [UNREADABLE]:
        raise ForeignCodeError(f"{path} is damaged: a pickle in it cannot be made out, so it is not opened")
    if names:
        raise ForeignCodeError(
            f"{path} names {', '.join(names)}: reading it the usual way would run that code. Nothing of it was run. "
            "Weights and optimizer states are tensors and numbers alone, so this file was made for something else, or "
            "changed since: take it from a copy that you trust"
        )


def check_folder(folder: Path) -> None:
    """:func:`check` for all files in a folder and below.

    Raises:
        ForeignCodeError: for the first file with such names.
    """
    for path in pickled_files(folder):
        check(path)


def pickled_files(folder: Path) -> list[Path]:
    """Files in a folder and below that are pickles, may hold some, or are called like one."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and may_hold_pickles(path)]


def may_hold_pickles(path: Path) -> bool:
    """Whether a file is a pickle or a container of some by its content, or is called like a pickle."""
    with path.open("rb") as file:
        return _has_suffix(path) or _is_container(file) or _begins_as_pickle(file)


def foreign_names(path: Path) -> list[str]:
    """The functions and classes that a file names beyond those that :func:`read` takes, as ``module.name``. The file is
    not opened as a pickle, only its instructions are looked at, also in archives, compressed files and NumPy's; one
    that is no pickle names nothing."""
    with path.open("rb") as file:
        # Files of other kinds (safetensors, DeepSpeed's swap files) may begin as a pickle does, by chance.
        is_pickle = _has_suffix(path) and _is_pickle(file.read(2))
        return sorted(name for name in _names_in(file, is_pickle, 0) if not _is_taken(name))


def _has_suffix(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _is_container(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(8).startswith(CONTAINERS) or zipfile.is_zipfile(file) or _is_tar(file)


def _is_tar(file: BinaryIO) -> bool:
    file.seek(TAR_AT)
    return file.read(len(TAR)) == TAR


def _names_in(file: BinaryIO, is_pickle: bool, depth: int) -> set[str]:
    """Names in a file, or in one inside a container."""
    file.seek(0)
    begin = file.read(8)
    names = _names_in_zip(file, depth) if zipfile.is_zipfile(file) else set()
    if begin.startswith(ZIP):
        return names
    if not is_pickle:
        names.discard(UNREADABLE)  # the end of another file, which looks like a zip file's by chance
    if _is_tar(file):
        names |= _names_in_tar(file, depth)
    file.seek(0)
    if begin.startswith(NUMPY):
        return names | _names_in_array(file)
    for magic, unpack in COMPRESSED.items():
        if begin.startswith(magic):
            return names | _names_in_packed(unpack(file), depth)
    return names | _names_in_stream(file, is_pickle)  # from its beginning, whatever stands at its end


def _names_in_content(content: BytesIO, is_pickle: bool, depth: int) -> set[str]:
    """Names in what lay in a container."""
    if not (is_pickle or _is_container(content) or _begins_as_pickle(content)):
        return set()
    return {UNREADABLE} if depth >= DEEPEST else _names_in(content, is_pickle, depth + 1)


def _names_in_packed(file: Any, depth: int) -> set[str]:
    content = BytesIO()
    try:
        while content.tell() < LARGEST_UNPACKED and (block := file.read(1 << 20)):
            content.write(block)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        pass  # it ends early; what came before would have been read
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
    """Names in the pickle that an array of objects is; other arrays name nothing."""
    header = file.read(12)
    wide = header[6:7] > b"\x01"
    length = int.from_bytes(header[8:12] if wide else header[8:10], "little")
    file.seek(12 if wide else 10)
    if not OBJECTS.search(file.read(min(length, 1 << 16))):
        return set()
    return _names_in_stream(file, True)


def _begins_as_pickle(file: BinaryIO) -> bool:
    """By its first bytes; one of the oldest protocols, which begin with anything, by all of its instructions."""
    file.seek(0)
    if _is_pickle(file.read(2)):
        return True
    file.seek(0)
    try:
        return any(operation.name in NAMING for operation, *_ in list(pickletools.genops(file)))
    except Exception:  # no pickle: pickletools raises whatever bytes bring about
        return False


def _is_pickle(begin: bytes) -> bool:
    return len(begin) == 2 and begin[0] == pickle.PROTO[0] and begin[1] <= pickle.HIGHEST_PROTOCOL


def _is_taken(name: str) -> bool:
    module, _, last = name.rpartition(".")
    if module == "torch" and isinstance(vars(torch).get(last), torch.dtype):
        return True
    return name in TENSORS or name in STAND_INS or (module in ("torch", "torch.storage") and last.endswith("Storage"))


def _names_in_zip(file: BinaryIO, depth: int) -> set[str]:
    """Names in all pickles of a zip file, also in those that PyTorch would pass over."""
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
    """The first bytes of an entry. Its checksum is not looked at: PyTorch can write files without."""
    file.seek(entry.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    if entry.compress_type == zipfile.ZIP_STORED:
        return file.read(min(entry.file_size, size))
    if entry.compress_type != zipfile.ZIP_DEFLATED:
        raise NotImplementedError(entry.compress_type)
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(min(entry.compress_size, size + HUFFMAN)), size)


def _names_in_stream(file: BinaryIO, is_pickle: bool) -> set[str]:
    """Names in the pickles that stand one after the other, from here on."""
    names: set[str] = set()
    for number in count():
        if number == MOST_PICKLES:
            return names | {UNREADABLE}
        begin = file.tell()
        found: set[str] = set()
        try:
            for name in _names_in_pickle(file):
                found.add(name)
        except Exception:  # no pickle (any more): pickletools raises whatever bytes bring about
            file.seek(begin)
            if number < LEGACY_PICKLES or _is_pickle(file.read(2)):  # else the numbers after torch.save's pickles
                names |= found
            return names | {UNREADABLE} if is_pickle and number == 0 else names
        names |= found
    return names


def _names_in_pickle(file: BinaryIO) -> Iterator[str]:
    """Names in one pickle, as they come."""
    memo: dict[int, str | None] = {}
    pushed: list[str | None] = [None, None]  # what the last two instructions put on the stack, where it is a text
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
