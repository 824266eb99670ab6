"""Read checkpoints that may come from anybody: torch.load gets what was followed through first."""

from __future__ import annotations

import math
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gdtrain._compat.torch_saving import REBUILD_PARAMETER, REBUILD_TENSOR
from gdtrain.data.reading import (
    MEGABYTE,
    MOST_ANYWAY,
    MOST_DEPTH,
    archive_entries,
    file_size,
    printable,
)

__all__ = ["check_checkpoint", "load_checkpoint"]

_SHARED = 16  # times: how much larger than its file the tensors of a checkpoint may be, if shared
_REPEATED = 4  # times: how many more values than bytes a checkpoint may have, where they are shared
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
    """
    size = file_size(path)
    infos = archive_entries(path)
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
    _Pickle(records, MOST_ANYWAY + _SHARED * size).check(content)


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
        if name == REBUILD_TENSOR:
            return self._tensor(*arguments)
        if name == REBUILD_PARAMETER and isinstance(arguments[0], _Opaque):
            return arguments[0]
        if name == "collections OrderedDict" and not arguments:
            return {}
        if name in ("torch Size", "torch device"):
            return _Opaque()
        if name in ("__builtin__ set", "builtins set"):
            return {_scalar(value) for value in arguments[0]}
        if name == "_codecs encode" and arguments[1:] == ("latin1",):  # how bytes are kept
            return _Opaque()
        raise ValueError(f"it asks to call {printable(name)}")

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _Opaque:
        whole = isinstance(shape, tuple) and isinstance(stride, tuple)
        whole = whole and all(type(n) is int and n >= 0 for n in (offset, *shape, *stride))
        if not isinstance(storage, _Storage) or not whole or len(shape) != len(stride):
            raise ValueError("it has a tensor of another kind")
        if any(more[1:]):  # behind requires_grad, hooks and metadata
            raise ValueError("it has a tensor with more than numbers")
        count = math.prod(shape)
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if count and last >= storage.numbers:
            raise ValueError("a tensor reaches beyond its storage")
        size = count * storage.item_bytes
        self._left -= size
        if self._left < 0 or size > max(MEGABYTE, storage.numbers * storage.item_bytes):
            raise ValueError("its tensors are larger than the file")
        return _Opaque()


def _check_tree(root: Any, most: int) -> None:
    """Raise on containers that hold themselves, or each other so often that they have no end."""
    left, count = [(root, 0)], 0
    while left:
        node, depth = left.pop()
        count += 1
        if count > most or depth > MOST_DEPTH:
            raise ValueError("it has containers that hold themselves or each other without end")
        if isinstance(node, dict | list | tuple | set):
            left.extend((x, depth + 1) for x in (node.values() if type(node) is dict else node))
            if len(left) > most:
                count = most


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_CALLED = (
    REBUILD_TENSOR,
    REBUILD_PARAMETER,
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "__builtin__ set",
    "builtins set",
    "_codecs encode",
)


def _allowed(name: str) -> str:
    module, _, item = name.partition(" ")
    if name in _CALLED or (module == "torch" and (item in _ITEM_BYTES or item in _DTYPES)):
        return name
    raise ValueError(f"it asks for {printable(name)}")


def _scalar(key: Any) -> Any:
    """A key; not a tuple of tuples, whose hash may take for ever."""
    if key is None or isinstance(key, int | float | str):
        return key
    raise ValueError("it has keys of another kind")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Tensors and plain containers of a checkpoint of gdtrain; nothing that it may hold is run."""
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
    **dict.fromkeys(("gdtrain.stop", "gdtrain.schedule"), dict | None),
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
