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
import pickletools
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

__all__ = [
    "check_array_file",
    "check_checkpoint",
    "check_unpacked",
    "lines",
    "load_checkpoint",
    "printable",
    "read_arrays",
    "read_json",
    "read_yaml",
]

_MEGABYTE = 2**20
_TEXT_BYTES = 4 * _MEGABYTE  # of a YAML or JSON file
_LINE = _MEGABYTE  # characters of a line of a table
_DEPTH = 32  # of containers in containers
_DIRECTORY = 64 * _MEGABYTE  # bytes of the list of files in an archive
_PACKED = 100  # times: how much larger than itself a file may be when it is unpacked
_ANYWAY = 64 * _MEGABYTE  # bytes that it may be unpacked to in any case
_XZ_MEMORY = 128 * _MEGABYTE
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_SHARED = 16  # times: how much larger than its file the tensors of a checkpoint may be, if shared
_REPEATED = 4  # times: how many more values than bytes a checkpoint may have, where they are shared
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


def _size(path: str | Path) -> int:
    """Bytes of an ordinary file; raises on pipes, devices and folders, which may never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{printable(path)} is no ordinary file.")
    return status.st_size


# ---------------------------------------------------------------------- texts


def _text(path: str | Path) -> str:
    size = _size(path)
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
    """The content of a JSON file.

    Args:
        path: Of the file: at most 4 MB, and at most 32 containers in each other.

    Returns:
        Plain containers.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such file.

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
    if depth > _DEPTH:
        raise ValueError(f"{printable(path)} has more than {_DEPTH} containers in each other.")


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
    _size(path)
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
    size, suffix = _size(path), path.suffix.lower()
    most = max(_ANYWAY, _PACKED * size)
    if suffix == ".zip":
        _check_total(sum(info.file_size for info in _listed(path)), size, path)
    if suffix not in _OPENERS:
        return
    total = 0
    try:
        if suffix == ".xz":
            _check_xz(path)
        with _OPENERS[suffix](path) as file:
            while total <= most and (piece := file.read(_MEGABYTE)):
                total += len(piece)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{printable(path)} cannot be unpacked: {error}") from None
    _check_total(total, size, path)


def _check_xz(path: Path) -> None:
    """Raise where the first block asks for more memory than xz's own settings do."""
    with open(path, "rb") as file:
        lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(file.read(_MEGABYTE), max_length=1)


def _check_total(total: int, size: int, path: str | Path) -> None:
    if total > max(_ANYWAY, _PACKED * size):
        raise ValueError(
            f"{printable(path)} has {size:,} bytes, and would be unpacked to more than "
            f"{max(_ANYWAY, _PACKED * size):,}. If it is meant, unpack it first."
        )


def _listed(path: str | Path) -> list[zipfile.ZipInfo]:
    """The files in an archive, none twice and none elsewhere than in it."""
    size = _size(path)
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
    size = _size(path)
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
    infos = _listed(path)
    _check_total(unpacked_bytes(path), _size(path), path)
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
    return sum(info.file_size for info in _listed(path))


# ---------------------------------------------------------------------- checkpoints

# Bytes of a number, by the name under which torch.save keeps a storage.
_ITEM_BYTES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}
# What torch.save puts into its archive. torch.load takes no heed of upper case, and Python does.
_PARTS = re.compile(
    r"[^/]+/(data\.pkl|data/[0-9]+|version|byteorder|\.data/serialization_id|\.format_version"
    r"|\.storage_alignment)"
)
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)


def check_checkpoint(path: str | Path) -> None:
    """Raise unless a file is what torch.save writes of dense tensors and plain containers.

    The archive is not compressed, each storage is as large as its tensors need, and all tensors
    together take memory in proportion to the file. So `torch.load(path, weights_only=True)` makes
    nothing large of a small file.

    Args:
        path: Of the file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such file.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"weight": torch.ones(3)}, Path(folder) / "last.ckpt")
        ...     check_checkpoint(Path(folder) / "last.ckpt")
    """
    size = _size(path)
    infos = _listed(path)
    with open(path, "rb") as file:
        starts = file.read(4) == b"PK\x03\x04" and min(info.header_offset for info in infos) == 0
    folders = {info.filename.partition("/")[0] for info in infos}
    if not starts or len(folders) > 1:
        raise ValueError("it is no archive of torch.save")
    for info in infos:
        if not _PARTS.fullmatch(info.filename):
            raise ValueError(f"torch.save writes no part {printable(info.filename)!r}")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise ValueError("it is compressed, which torch.save does not do")
    if sum(info.file_size for info in infos) > size:
        raise ValueError("its parts are larger than the file")
    folder = folders.pop()
    records = {
        info.filename.removeprefix(f"{folder}/data/"): info.file_size
        for info in infos
        if info.filename.startswith(f"{folder}/data/")
    }
    with zipfile.ZipFile(path) as archive:
        try:
            content = archive.read(f"{folder}/data.pkl")
        except (KeyError, zipfile.BadZipFile):
            raise ValueError("it is no archive of torch.save") from None
    _Pickle(records, _ANYWAY + _SHARED * size).check(content)


class _Name(str):
    """Something that a pickle asks for by name."""


class _Opaque:
    """A tensor, or whatever else need not be looked into."""


class _Storage:
    def __init__(self, item_bytes: int, numbers: int) -> None:
        self.item_bytes, self.numbers = item_bytes, numbers


class _Pickle:
    """Follows what a pickle of torch.save makes, without making it."""

    def __init__(self, records: Mapping[str, int], most: int) -> None:
        self._records, self._left = records, most
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def check(self, content: bytes) -> None:
        """Raise on whatever torch.save would not have written."""
        try:
            for opcode, argument, _ in pickletools.genops(content):
                self._step(opcode.name, argument)
            _check_tree(self._stack[-1], 10**6 + _REPEATED * len(content))
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"it is damaged ({type(error).__name__})") from None

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("PROTO", "STOP"):
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET"):
            stack.append({"D": {}, "L": [], "T": (), "S": set()}[name[6]])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[5])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("APPEND", "APPENDS"):
            values = self._since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            for key, value in zip(values[::2], values[1::2], strict=True):
                stack[-1][_scalar(key)] = value
        elif name == "ADDITEMS":
            values = self._since_mark()
            stack[-1].update(_scalar(value) for value in values)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(_allowed(argument))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self._made(stack.pop(), *arguments))
        elif name == "BUILD":
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise ValueError("it sets what it may not set")
        else:
            raise ValueError(f"it holds more than numbers, texts and tensors ({name})")

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _storage(self, told: Any) -> _Storage:
        word, kind, key, _, numbers = told
        module, _, name = str(kind).partition(" ")
        if word != "storage" or module != "torch" or type(numbers) is not int or numbers < 0:
            raise ValueError("it has a storage of another kind")
        item_bytes = _ITEM_BYTES[name]
        if self._records.get(key) != item_bytes * numbers:
            raise ValueError("a storage is not as large as it claims")
        return _Storage(item_bytes, numbers)

    def _made(self, name: Any, *arguments: Any) -> Any:
        if name == "torch._utils _rebuild_tensor_v2":
            return self._tensor(*arguments)
        if name == "torch._utils _rebuild_parameter" and isinstance(arguments[0], _Opaque):
            return arguments[0]
        if name == "collections OrderedDict" and not arguments:
            return {}
        if name == "torch Size":
            return _Opaque()
        if name == "torch device":
            return _Opaque()
        if name in ("__builtin__ set", "builtins set"):
            return {_scalar(value) for value in arguments[0]}
        if name == "_codecs encode" and arguments[1:] == ("latin1",):  # how bytes are kept
            return _Opaque()
        raise ValueError(f"it asks to call {printable(name)}")

    def _tensor(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        stride: Any,
        requires_grad: Any,
        hooks: Any,
        metadata: Any = None,
    ) -> _Opaque:
        whole = isinstance(shape, tuple) and isinstance(stride, tuple)
        whole = whole and all(type(n) is int and n >= 0 for n in (offset, *shape, *stride))
        if not isinstance(storage, _Storage) or not whole or len(shape) != len(stride):
            raise ValueError("it has a tensor of another kind")
        if hooks or metadata:
            raise ValueError("it has a tensor with more than numbers")
        count = math.prod(shape)
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if count and last >= storage.numbers:
            raise ValueError("a tensor reaches beyond its storage")
        size = count * storage.item_bytes
        self._left -= size
        if self._left < 0 or size > max(_MEGABYTE, storage.numbers * storage.item_bytes):
            raise ValueError("its tensors are larger than the file")
        return _Opaque()


def _check_tree(root: Any, most: int) -> None:
    """Raise on containers that hold themselves, or each other so often that they have no end."""
    left, count = [(root, 0)], 0
    while left:
        node, depth = left.pop()
        count += 1
        if count > most or depth > _DEPTH:
            raise ValueError("it has containers that hold themselves or each other without end")
        if isinstance(node, dict | list | tuple | set):
            left.extend((x, depth + 1) for x in (node.values() if type(node) is dict else node))
            if len(left) > most:
                count = most


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_CALLED = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "__builtin__ set",
    "builtins set",
    "_codecs encode",
)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running anything that it may hold.

    Args:
        path: Of a checkpoint of gdtrain.

    Returns:
        Its content: tensors and plain containers.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint of gdtrain.

    Example:
        >>> load_checkpoint("missing.ckpt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no checkpoint missing.ckpt. ...
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint {path}. A run keeps its own in <its folder>/checkpoints/."
        )
    try:
        check_checkpoint(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than numbers, "
            f"texts and tensors ({why})."
        ) from None
    parts = {"state_dict", "gdtrain"}
    if not isinstance(state, dict) or not all(isinstance(state.get(p), dict) for p in parts):
        raise ValueError(f"{path} is no checkpoint of gdtrain.")
    _check_kinds(state, path)
    return state


_WORDS_BY_KEY = ("state_dict", "callbacks", "loops", "gdtrain", "gdtrain.settings")
_KINDS: dict[str, Any] = {
    **dict.fromkeys(_WORDS_BY_KEY, dict),
    "optimizer_states": list,
    "lr_schedulers": list,
    **dict.fromkeys(("gdtrain.updates", "gdtrain.examples_seen"), int),
    "gdtrain.updates_per_epoch": int,
    "gdtrain.planned": int | None,
    "gdtrain.rate_cut": int | float,
    "gdtrain.random_state": dict | None,
    **dict.fromkeys(("gdtrain.race", "gdtrain.stop", "gdtrain.schedule"), dict | None),
    "gdtrain.description": dict | None,
}


def _check_kinds(state: Mapping[str, Any], path: str | Path) -> None:
    """Raise, with its name, on a part of a checkpoint that is of another kind than is written."""
    for name, kind in _KINDS.items():
        place, _, key = name.rpartition(".")
        part = state[place] if place else state
        if key not in part:
            continue
        found = part[key]
        right = isinstance(found, kind)
        if right and name in _WORDS_BY_KEY:
            right = all(isinstance(word, str) for word in found)
        if right and name == "gdtrain.settings":
            right = all(isinstance(word, str) for word in found.values())
        if not right:
            raise ValueError(
                f"{path} cannot be used: it is damaged, its {name} is of another kind than "
                f"training writes. Use another checkpoint of the run, best.ckpt or last.ckpt."
            )


def _allowed(name: str) -> _Name:
    module, _, item = name.partition(" ")
    if name in _CALLED or (module == "torch" and (item in _ITEM_BYTES or item in _DTYPES)):
        return _Name(name)
    raise ValueError(f"it asks for {printable(name)}")


def _scalar(key: Any) -> Any:
    """A key; not a tuple of tuples, whose hash may take for ever."""
    if key is None or isinstance(key, bool | int | float | str):
        return key
    raise ValueError("it has keys of another kind")
