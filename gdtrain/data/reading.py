"""Read files that may come from anybody: what they claim is checked before anything is made of it.

Memory and time stay in proportion to a file's size, and nothing in a file is called or resolved.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

__all__ = [
    "PACKED",
    "check_unpacked",
    "existing",
    "lines",
    "printable",
    "read_array",
    "read_arrays",
    "read_json",
    "read_yaml",
    "unpacked",
    "unpacked_bytes",
]

MEGABYTE = 2**20
_TEXT_BYTES = 4 * MEGABYTE  # of a YAML or JSON file
_LINE = MEGABYTE  # characters of a line of a table
MOST_DEPTH = 32  # of containers in containers
_DIRECTORY = 64 * MEGABYTE  # bytes of the list of files in an archive
_PACKED = 100  # times: how much larger than itself a file may be when it is unpacked
MOST_ANYWAY = 64 * MEGABYTE  # bytes that it may be unpacked to in any case
_XZ_MEMORY = 128 * MEGABYTE
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = (*_OPENERS, ".zip")
_COLONS = 100  # in a value in YAML
_NUMBERS_HEADER = 10_000  # characters of what stands before an array
_NO_ARRAY = "could not be read as an array of numbers in NumPy's format"


def printable(text: Any) -> str:
    """A text of a file's for the screen: at most 300 characters, control characters written out."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[:300]
    )
    return shown[:300]


def _refused(path: str | Path, what: str) -> ValueError:
    return ValueError(f"{printable(path)} {what}")


def existing(path: str | Path, key: str = "data.path") -> Path:
    """The path of a file of examples, named by a key; raises where there is none."""
    if path is None:
        raise ValueError(f"{key} must name the file of examples. Received: null.")
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Set {key} to one that exists.")
    return path


def file_size(path: str | Path) -> int:
    """Bytes of an ordinary file; raises on pipes, devices and folders, which may never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise _refused(path, "is no ordinary file.")
    return status.st_size


# ---------------------------------------------------------------------- texts


def _text(path: str | Path) -> str:
    size = file_size(path)
    if size > _TEXT_BYTES:
        raise _refused(
            path, f"is too large: expected at most {_TEXT_BYTES:,} bytes. Received: {size:,}."
        )
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _refused(path, "is no text in UTF-8.") from None


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file: plain containers, at most 32 in each other, in at most 4 MB.

    Aliases, which can make a small file endless, are refused.
    """
    text = _text(path)
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=loader):
            value = event.value if isinstance(event, yaml.ScalarEvent) and event.implicit[0] else ""
            if value.count(":") > _COLONS:
                # 1:30 is 90 to YAML, and takes the square of the parts.
                raise _refused(path, f"has a value with more than {_COLONS} colons.")
            if isinstance(event, yaml.AliasEvent):
                raise _refused(path, f"has an alias (*{printable(event.anchor)}).")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            _check_depth(depth, path)
    except (yaml.YAMLError, RecursionError) as error:
        raise _refused(path, f"is no YAML: {type(error).__name__}.") from None
    try:
        return yaml.load(text, Loader=loader)
    except (ValueError, yaml.YAMLError, TypeError, OverflowError, RecursionError):
        raise _refused(path, "has a value that is none in YAML.") from None


def read_json(path: str | Path) -> Any:
    """The content of a JSON file: within the limits of `read_yaml`, whose errors it raises."""
    text = _text(path)
    try:
        found = json.loads(text)
    except RecursionError:
        raise _refused(path, "has too many containers in each other.") from None
    except json.JSONDecodeError as error:
        raise _refused(path, f"is no JSON, from line {error.lineno} on.") from None
    except ValueError:
        raise _refused(path, "has a number with too many digits.") from None
    left = [(found, 0)]
    while left:
        node, depth = left.pop()
        _check_depth(depth, path)
        if isinstance(node, dict | list):
            items = node.values() if isinstance(node, dict) else node
            left.extend((item, depth + 1) for item in items)
    return found


def _check_depth(depth: int, path: str | Path) -> None:
    if depth > MOST_DEPTH:
        raise _refused(path, f"has more than {MOST_DEPTH} containers in each other.")


def lines(path: str | Path) -> Iterator[str]:
    """The lines of a table, one at a time, with their ends; of at most a million characters."""
    file_size(path)
    with open(path, encoding="utf-8", newline="") as file:
        try:
            while line := file.readline(_LINE + 1):
                if len(line) > _LINE:
                    raise _refused(path, f"has a line of more than {_LINE:,} characters.")
                yield line
        except UnicodeDecodeError:
            raise _refused(path, "is no text in UTF-8.") from None


# ---------------------------------------------------------------------- packed files


def unpacked(path: Path) -> Any:
    """A file opened for its bytes, which `.gz`, `.bz2` or `.xz` have packed."""
    return _OPENERS.get(path.suffix.lower(), open)(path, "rb")


def check_unpacked(path: str | Path) -> None:
    """Raise where a packed file is damaged, or holds a hundred times its own size (and 64 MB)."""
    path = Path(path)
    size, suffix = file_size(path), path.suffix.lower()
    total = 0
    if suffix == ".zip":
        total = unpacked_bytes(path)
    if suffix in _OPENERS:
        try:
            if suffix == ".xz":  # the first block may ask for no more memory than xz's own settings
                with open(path, "rb") as file:
                    start = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
                    start.decompress(file.read(MEGABYTE), max_length=1)
            with unpacked(path) as file:
                while total <= _most(size) and (piece := file.read(MEGABYTE)):
                    total += len(piece)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise _refused(path, f"cannot be unpacked: {error}") from None
    _check_total(total, size, path)


def _most(size: int) -> int:
    """Bytes that a file of a size may be unpacked to."""
    return max(MOST_ANYWAY, _PACKED * size)


def _check_total(total: int, size: int, path: str | Path) -> None:
    if total > _most(size):
        raise _refused(
            path,
            f"has {size:,} bytes, and would be unpacked to more than {_most(size):,}. If it is "
            f"meant, unpack it first.",
        )


def archive_entries(path: str | Path) -> list[zipfile.ZipInfo]:
    """The files in an archive, none twice and none elsewhere than in it."""
    size = file_size(path)
    try:
        with open(path, "rb") as file:
            _check_directory(file, size, path)
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError) as error:
        raise _refused(path, f"is no archive: {error}") from None
    names = [info.filename for info in infos]
    if len(set(names)) < len(names):
        raise _refused(path, "has two files of one name.")
    for info in infos:
        parts = info.filename.split("/")
        if info.filename != info.orig_filename:  # others read the name that stands there
            raise _refused(path, "has a file of two names.")
        if info.filename.startswith("/") or "\\" in info.filename or ".." in parts:
            raise _refused(path, f"has a file {printable(info.filename)!r}.")
        if info.flag_bits & 1:
            raise _refused(path, "is encrypted.")
    return infos


def _check_directory(file: Any, size: int, path: str | Path) -> None:
    """The list of files comes last, and is of a size that may be read."""
    file.seek(max(0, size - 98))
    tail = file.read()
    if len(tail) < 22 or tail[-22:-18] != b"PK\x05\x06":
        raise _refused(path, "is no archive, or there is something behind it.")
    (length,) = struct.unpack("<I", tail[-10:-6])
    if tail[:4] == b"PK\x06\x06" and tail[-42:-38] == b"PK\x06\x07":  # zip64
        (length,) = struct.unpack("<Q", tail[40:48])
    if length > min(_DIRECTORY, size):
        raise _refused(path, "lists too many files.")
    file.seek(0)


# ---------------------------------------------------------------------- arrays


def read_array(path: Path, memory_map: bool = False) -> NDArray[Any]:
    """The array of an `.npy` file, or a map of it; it is as large as its header claims."""
    if zipfile.is_zipfile(path):
        raise ValueError(f"{path} must hold one array (.npy). Received: several (.npz).")
    size = file_size(path)
    with open(path, "rb") as file:
        _check_header(file, size, path)
    try:
        mode: Any = "r" if memory_map else None
        loaded: NDArray[Any] = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} {_NO_ARRAY} ({type(error).__name__}).") from None
    return loaded


def _check_header(file: Any, size: int, path: str | Path) -> None:
    formats = np.lib.format
    try:
        version = formats.read_magic(file)
        read = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
        shape, _, dtype = read[version](file, max_header_size=_NUMBERS_HEADER)
    except Exception as error:
        raise _refused(path, f"{_NO_ARRAY} ({type(error).__name__}).") from None
    if dtype.hasobject or dtype.names is not None or dtype.itemsize == 0:
        raise _refused(path, f"{_NO_ARRAY}: it holds {printable(dtype)}.")
    claimed, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if any(type(n) is not int or n < 0 for n in shape) or claimed > there:
        raise _refused(
            path,
            f"is damaged: its header claims an array of shape {printable(shape)}, {claimed:,} "
            f"bytes, and it has {there:,}.",
        )


def read_arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file, by name, within the limits of `check_unpacked`."""
    infos = archive_entries(path)
    _check_total(unpacked_bytes(path), file_size(path), path)
    try:
        with zipfile.ZipFile(path) as archive:
            for info in infos:
                with archive.open(info) as file:
                    _check_header(file, info.file_size, f"{path}: {info.filename}")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise _refused(path, f"is damaged ({type(error).__name__}).") from None


def unpacked_bytes(path: str | Path) -> int:
    """What an archive, an `.npz` or a checkpoint, takes when it is read."""
    return sum(info.file_size for info in archive_entries(path))
