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
    "check_array_file",
    "check_unpacked",
    "lines",
    "printable",
    "read_arrays",
    "read_json",
    "read_yaml",
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
_COLONS = 100  # in a value in YAML
_NUMBERS_HEADER = 10_000  # characters of what stands before an array


def printable(text: Any) -> str:
    r"""A text of a file's, for the screen: control characters are written out, and it is not long.

    Args:
        text: Anything.

    Returns:
        At most 300 characters.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[:300]
    )
    return shown[:300]


def existing(path: str | Path) -> Path:
    """The path of a file to train on; raises where there is none."""
    if path is None:
        raise ValueError("data.path must name the file of examples. Received: null.")
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Set data.path to one that exists.")
    return path


def file_size(path: str | Path) -> int:
    """Bytes of an ordinary file; raises on pipes, devices and folders, which may never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{printable(path)} is no ordinary file.")
    return status.st_size


# ---------------------------------------------------------------------- texts


def _text(path: str | Path) -> str:
    size = file_size(path)
    if size > _TEXT_BYTES:
        raise ValueError(
            f"{printable(path)} is too large: expected at most {_TEXT_BYTES:,} bytes. Received: "
            f"{size:,}."
        )
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{printable(path)} is no text in UTF-8.") from None


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file of plain values.

    Args:
        path: Of the file: at most 4 MB, at most 32 containers in each other, and no aliases, which
            can make a small file endless.

    Returns:
        Plain containers.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "config.yaml"
        ...     _ = path.write_text("model: {hidden: [128]}")
        ...     read_yaml(path)
        {'model': {'hidden': [128]}}
    """
    text = _text(path)
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=loader):
            value = event.value if isinstance(event, yaml.ScalarEvent) and event.implicit[0] else ""
            if value.count(":") > _COLONS:
                raise ValueError(  # 1:30 is 90 to YAML, and takes the square of the parts
                    f"{printable(path)} has a value with more than {_COLONS} colons."
                )
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{printable(path)} has an alias (*{printable(event.anchor)}).")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            _check_depth(depth, path)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{printable(path)} is no YAML: {type(error).__name__}.") from None
    try:
        return yaml.load(text, Loader=loader)
    except (ValueError, yaml.YAMLError, TypeError, OverflowError, RecursionError):
        raise ValueError(f"{printable(path)} has a value that is none in YAML.") from None


def read_json(path: str | Path) -> Any:
    """The content of a JSON file: within the limits of `read_yaml`, whose errors it raises.

    Args:
        path: Of the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "summary.json"
        ...     _ = path.write_text('{"updates": 3}')
        ...     read_json(path)
        {'updates': 3}
    """
    text = _text(path)
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"{printable(path)} has too many containers in each other.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{printable(path)} is no JSON, from line {error.lineno} on.") from None
    except ValueError:
        raise ValueError(f"{printable(path)} has a number with too many digits.") from None
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
        raise ValueError(f"{printable(path)} has more than {MOST_DEPTH} containers in each other.")


def lines(path: str | Path) -> Iterator[str]:
    r"""The lines of a table, one at a time.

    Args:
        path: Of the file; its lines have at most a million characters.

    Yields:
        The lines, with their ends.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no ordinary file of text, or a line is too long.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "metrics.csv"
        ...     _ = path.write_text("step,loss\n1,0.5\n")
        ...     list(lines(path))
        ['step,loss\n', '1,0.5\n']
    """
    file_size(path)
    with open(path, encoding="utf-8", newline="") as file:
        while line := _line(file, path):
            if len(line) > _LINE:
                raise ValueError(f"{printable(path)} has a line of more than {_LINE:,} characters.")
            yield line


def _line(file: Any, path: str | Path) -> str:
    try:
        return str(file.readline(_LINE + 1))
    except UnicodeDecodeError:
        raise ValueError(f"{printable(path)} is no text in UTF-8.") from None


# ---------------------------------------------------------------------- packed files


def check_unpacked(path: str | Path) -> None:
    """Raise where a `.gz`, `.bz2`, `.xz` or `.zip` file would become very much larger.

    Args:
        path: Of the file; another one is let pass.

    Raises:
        OSError: It cannot be read.
        ValueError: Unpacked, it would be more than a hundred times as large (and 64 MB), or it is
            damaged.

    Example:
        >>> check_unpacked(__file__)
    """
    path = Path(path)
    size, suffix = file_size(path), path.suffix.lower()
    most = max(MOST_ANYWAY, _PACKED * size)
    if suffix == ".zip":
        _check_total(sum(info.file_size for info in archive_entries(path)), size, path)
    if suffix not in _OPENERS:
        return
    total = 0
    try:
        if suffix == ".xz":
            _check_xz(path)
        with _OPENERS[suffix](path) as file:
            while total <= most and (piece := file.read(MEGABYTE)):
                total += len(piece)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{printable(path)} cannot be unpacked: {error}") from None
    _check_total(total, size, path)


def _check_xz(path: Path) -> None:
    """Raise where the first block asks for more memory than xz's own settings do."""
    with open(path, "rb") as file:
        lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(file.read(MEGABYTE), max_length=1)


def _check_total(total: int, size: int, path: str | Path) -> None:
    if total > max(MOST_ANYWAY, _PACKED * size):
        raise ValueError(
            f"{printable(path)} has {size:,} bytes, and would be unpacked to more than "
            f"{max(MOST_ANYWAY, _PACKED * size):,}. If it is meant, unpack it first."
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
        raise ValueError(f"{printable(path)} is no archive: {error}") from None
    names = [info.filename for info in infos]
    if len(set(names)) < len(names):
        raise ValueError(f"{printable(path)} has two files of one name.")
    for info in infos:
        parts = info.filename.split("/")
        if info.filename != info.orig_filename:  # others read the name that stands there
            raise ValueError(f"{printable(path)} has a file of two names.")
        if info.filename.startswith("/") or "\\" in info.filename or ".." in parts:
            raise ValueError(f"{printable(path)} has a file {printable(info.filename)!r}.")
        if info.flag_bits & 1:
            raise ValueError(f"{printable(path)} is encrypted.")
    return infos


def _check_directory(file: Any, size: int, path: str | Path) -> None:
    """The list of files comes last, and is of a size that may be read."""
    file.seek(max(0, size - 98))
    tail = file.read()
    if len(tail) < 22 or tail[-22:-18] != b"PK\x05\x06":
        raise ValueError(f"{printable(path)} is no archive, or there is something behind it.")
    (length,) = struct.unpack("<I", tail[-10:-6])
    if tail[:4] == b"PK\x06\x06" and tail[-42:-38] == b"PK\x06\x07":  # zip64
        (length,) = struct.unpack("<Q", tail[40:48])
    if length > min(_DIRECTORY, size):
        raise ValueError(f"{printable(path)} lists too many files.")
    file.seek(0)


# ---------------------------------------------------------------------- arrays


def check_array_file(path: str | Path) -> None:
    """Raise where an `.npy` file is not as large as its header claims, or holds no plain values.

    Args:
        path: Of the file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder) / "x.npy", np.ones(3))
        ...     check_array_file(Path(folder) / "x.npy")
    """
    size = file_size(path)
    with open(path, "rb") as file:
        _check_header(file, size, path)


def _check_header(file: Any, size: int, path: str | Path) -> None:
    formats = np.lib.format
    try:
        version = formats.read_magic(file)
        read = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
        shape, _, dtype = read[version](file, max_header_size=_NUMBERS_HEADER)
    except Exception as error:
        raise ValueError(
            f"{printable(path)} could not be read as an array of numbers in NumPy's format "
            f"({type(error).__name__})."
        ) from None
    if dtype.hasobject or dtype.names is not None or dtype.itemsize == 0:
        raise ValueError(
            f"{printable(path)} could not be read as an array of numbers in NumPy's format: it "
            f"holds {printable(dtype)}."
        )
    claimed, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if any(type(n) is not int or n < 0 for n in shape) or claimed > there:
        raise ValueError(
            f"{printable(path)} is damaged: its header claims an array of shape "
            f"{printable(shape)}, {claimed:,} bytes, and it has {there:,}."
        )


def read_arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file.

    Args:
        path: Of the file. Unpacked, it is at most a hundred times as large (or 64 MB).

    Returns:
        By name.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(Path(folder) / "x.npz", a=np.ones(2))
        ...     read_arrays(Path(folder) / "x.npz")
        {'a': array([1., 1.])}
    """
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
        raise ValueError(f"{printable(path)} is damaged ({type(error).__name__}).") from None


def unpacked_bytes(path: str | Path) -> int:
    """What an archive takes when it is read.

    Args:
        path: Of the file, `.npz` or a checkpoint.

    Returns:
        Bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no archive.
    """
    return sum(info.file_size for info in archive_entries(path))


def most_features(stored: int) -> int:
    """How many features a file of so many bytes may have: a weight is made for each."""
    return max(2**25, 8 * stored)
