"""Examples in files: NumPy's and LIBSVM's (tables: see `tables`), to train, predict and evaluate.

N examples, D features.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gdtrain.data.frames import features
from gdtrain.data.prepared import Raw
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.reading import (
    check_unpacked,
    existing,
    printable,
    read_array,
    read_arrays,
    unpacked,
)
from gdtrain.data.sparse import ARRAYS, rows_of
from gdtrain.data.tables import Header, Kind, Table, is_table, listed
from gdtrain.data.targets import Task

__all__ = ["read_features", "read_labelled", "read_libsvm", "read_npy"]

_log = logging.getLogger("gdtrain")

# Below this share of entries that are not zero, CSR takes less than half of the dense memory, and
# its indexed sums beat the dense ones.
_SPARSE_BELOW = 0.25
_LINE = 2**20  # bytes of a line of LIBSVM that are looked at, where one is wrong
_DENSE_BYTES = 8e9  # the most that a file of LIBSVM may take as a dense array
_LEAVE = "train on other columns"


# ---------------------------------------------------------------------- to train on


def read_npy(
    path: Path, target: int, target_path: Path | None, memory_map: bool, task: Task
) -> Raw:
    """The examples of a NumPy file of numbers: see `NPYDataModule`."""
    sparse = path.suffix.lower() == ".npz" and target_path is not None
    x = _sparse_array(path) if sparse else read_array(path, memory_map)
    if target_path is not None:
        y = read_array(target_path)
    else:
        if x.ndim != 2 or not -x.shape[1] <= target < x.shape[1]:
            raise ValueError(
                f"{path} must be a table with a column {target} for the target, or "
                f"target_path must name a file of targets. Received: shape {x.shape}."
            )
        x, y = np.delete(x, target, axis=1), x[:, target]
    return Raw(features(x), y, task)


def read_libsvm(
    path: Path,
    test_path: Path | None,
    sparse: bool | Literal["auto"],
    standardize: bool,
    dtype: torch.dtype,
    task: Task,
) -> Raw:
    """The examples of a LIBSVM (svmlight) file: see `LIBSVMDataModule`.

    They are read in float64 if they are to be standardised, or are to be tensors of that dtype.
    """
    paths = [path] if test_path is None else [path, test_path]
    single = dtype == torch.float32 and not standardize
    tables, targets, first = _libsvm(paths, np.float32 if single else np.float64)
    large = [math.prod(x.shape) * x.dtype.itemsize > _DENSE_BYTES for x in tables]
    if sparse == "auto":
        density = tables[0].nnz / math.prod(tables[0].shape)
        sparse = not standardize and (density < _SPARSE_BELOW or large[0])
    if not sparse:
        for i, (file, x) in enumerate(zip(paths, tables, strict=True)):
            if large[i]:
                raise ValueError(
                    f"{file} has {x.shape[0]} examples of {x.shape[1]} features, more than "
                    f"8 GB as a dense array. Select features first, or keep them sparse: "
                    f"standardize=false."
                )
            tables[i] = x.toarray()
    test = (tables[1], targets[1]) if len(tables) > 1 else None
    return Raw(tables[0], targets[0], task, test=test, first_feature=first)


# ---------------------------------------------------------------------- to predict and evaluate


def read_features(
    path: str | Path,
    feature_names: list[str] | None = None,
    *,
    num_features: int | None = None,
    first_feature: int | None = None,
    header: Header = "auto",
) -> Any:
    """Examples without targets, to predict from: (N, D), what a `.npy` file holds, or CSR.

    `num_features`: D, which a LIBSVM file does not tell; None: its highest feature; further ones
    are left out. `first_feature`: from which number it counts; None: from 0 if it has a feature 0,
    else 1.
    """
    path = _input(path)
    kind = _kind(path, feature_names, first_feature)
    if kind in ("npy", "npz"):
        return _array_features(path, kind)
    if kind == "libsvm":
        return _libsvm([path], np.float64, first_feature, num_features)[0][0]
    names = _stripped(feature_names)
    table = Table(path, header, expected=names, key="header")
    return table.read(_there(table, names), advice=_LEAVE)[0]


def read_labelled(
    path: str | Path,
    preprocessing: Preprocessing,
    target: str | None = None,
    *,
    header: Header = "auto",
) -> tuple[Any, NDArray[Any]]:
    """Features, as from `read_features`, and targets (N,), to evaluate on.

    `target`: name of a table's column, by default the one that is no feature; of `.npy` the column,
    by default the last, or a `.npy` file of targets, which `.npz` needs. Not used for LIBSVM.
    """
    path = _input(path)
    names, first = _stripped(preprocessing.feature_names), preprocessing.first_feature
    kind = _kind(path, names, first)
    if kind == "table":
        expected = names or ([] if target is None else [target])
        table = Table(path, header, expected=expected, key="header")
        taken = _there(table, names)
        target = _target(table, names, target)
        own = taken if names is not None else [name for name in taken if name != target]
        is_text = isinstance((preprocessing.classes or [0])[0], str)
        read_as: Kind = "text" if is_text else "numbers"  # so that they can be those of training
        x, y = table.read(own, target, read_as, _LEAVE)
        assert y is not None
        _check_labels(y, preprocessing, path, lambda row: f"line {table.lines([row])[row][0]}")
        return x, y
    if kind == "libsvm":
        width = int(np.prod(preprocessing.input_shape)) if preprocessing.input_shape else None
        tables, labels, _ = _libsvm([path], np.float64, first, width)
        x, y = tables[0], labels[0]
    else:
        x, y = _apart(_array_features(path, kind), target, path, kind)
    if len(y) != x.shape[0]:
        raise ValueError(
            f"{path}: expected one target for each example. Received: {x.shape[0]} examples and "
            f"{len(y)} targets."
        )
    if preprocessing.classes is not None and y.size != len(y):
        raise ValueError(
            f"The targets of {path} must be one label for each example. Received: an array of "
            f"shape {y.shape}."
        )
    _check_labels(y, preprocessing, path, lambda row: f"example {row} (counted from 0)")
    return x, y


def _input(path: str | Path, key: str = "input") -> Path:
    if Path(path).is_dir():
        raise ValueError(f"{key} must name a file. Received: {path}, a folder.")
    return existing(path, key)


def _kind(path: Path, names: list[str] | None, first_feature: int | None) -> str:
    """What a file holds, by its suffix; where that says nothing, as the training file did."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".bz2")
    if name.endswith((".svm", ".svmlight", ".libsvm")):
        return "libsvm"
    if path.suffix.lower() in (".npy", ".npz"):
        return path.suffix.lower()[1:]
    if is_table(path) or names is not None:
        return "table"
    if first_feature is not None:
        return "libsvm"
    raise ValueError(
        f"Examples must come as .csv, .tsv or .npy, or sparse as .npz, .svm or .libsvm. "
        f"Received: {path}."
    )


def _stripped(names: list[str] | None) -> list[str] | None:
    """As tables have them."""
    return None if names is None else [name.strip() for name in names]


def _there(table: Table, names: list[str] | None) -> list[str]:
    """The names to take; raises on all that a table lacks."""
    there = set(table.names)
    missing = [name for name in names or () if name not in there]
    if missing:
        raise ValueError(
            f"{table.path} lacks the feature{'s' * (len(missing) > 1)} {listed(missing, 10)}. "
            f"It has: {listed(table.names)}."
        )
    return table.all_names() if names is None else names


def _target(table: Table, names: list[str] | None, target: str | None) -> str:
    """The target's column: what is named, or the only one that is no feature."""
    if target is not None:
        return str(target).strip()
    others = table.names[-1:] if names is None else [n for n in table.names if n not in names]
    if len(others) != 1:
        raise ValueError(
            f"{table.path}: which column has the targets? target=… names it. Beside the features "
            f"there are: {listed(others) or 'none'}."
        )
    return others[0]


def _array_features(path: Path, kind: str) -> Any:
    return features(_sparse_array(path) if kind == "npz" else read_array(path))


def _apart(x: Any, target: str | None, path: Path, kind: str) -> tuple[Any, NDArray[Any]]:
    """Inputs and targets of NumPy's files."""
    if target is not None and not target.strip().lstrip("-").isdigit():
        return x, read_array(_input(target, "target"))
    column = -1 if target is None else int(target)
    if kind == "npz" or x.ndim != 2 or not -x.shape[1] <= column < x.shape[1]:
        raise ValueError(
            f"{path} must come with a .npy file of targets (target=FILE.npy), or be a .npy table "
            f"with them in column {column}. Received: shape {x.shape}."
        )
    return np.delete(x, column, axis=1), x[:, column]


def _check_labels(
    y: NDArray[Any], preprocessing: Preprocessing, path: Path, place: Callable[[int], str]
) -> None:
    """Raise, with its place, on a label that training did not have."""
    try:
        if preprocessing.classes is not None:
            preprocessing.targets(y)
    except ValueError:
        for label in dict.fromkeys(y.tolist()):
            rows = np.flatnonzero(y == label)
            try:
                preprocessing.targets(y[rows[:1]])
            except ValueError as error:
                many = f" There are {len(rows)} of this label." if len(rows) > 1 else ""
                raise ValueError(f"{path}, {place(int(rows[0]))}: {error}{many}") from None
        raise


# ---------------------------------------------------------------------- sparse files


def _sparse_array(path: Path) -> Any:
    """A matrix as `scipy.sparse.save_npz` keeps it, made of arrays that were checked."""
    from scipy import sparse

    try:
        found = read_arrays(path)
        kind = found["format"].item()
        kind = kind.decode() if isinstance(kind, bytes) else kind
        shape = tuple(int(n) for n in found["shape"])
        numbers = tuple(found[name] for name in ARRAYS[kind])
        whole = all(array.dtype.kind in "iu" for array in (found["shape"], *numbers[1:]))
        if not whole or numbers[0].dtype.kind not in "fiub":
            raise TypeError("its values are no numbers, or its indices not whole ones")
        # SciPy makes offsets fit its type of index, and so another matrix.
        if kind == "dia" and (abs(numbers[1].astype(float)) >= max(shape)).any():
            raise ValueError("an offset is out of range")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} could not be read as a matrix of scipy.sparse.save_npz ({error})."
        ) from None
    stored = sum(a.nbytes for a in numbers)
    if len(shape) != 2 or shape[0] > stored + 2**20 or shape[1] > _most_features(stored):
        raise ValueError(
            f"{path} could not be read as a matrix of scipy.sparse.save_npz: it claims the shape "
            f"{shape}, and has {stored:,} bytes of entries."
        )
    parts: Any = (numbers[0], tuple(numbers[1:])) if kind == "coo" else numbers
    try:
        return rows_of(getattr(sparse, f"{kind}_array")(parts, shape=shape))
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} could not be read as a matrix: {error}") from None


def _libsvm(
    paths: list[Path], number: type[np.floating], first: int | None = None, width: int | None = None
) -> tuple[list[Any], list[NDArray[Any]], int]:
    """CSR arrays and targets of files with features counted alike, and from which number.

    `first` and `width`: as `first_feature` and `num_features` of `read_features`, for all files.
    """
    from scipy.sparse import csr_array
    from sklearn.datasets import load_svmlight_file

    tables, targets = [], []
    for path in paths:
        check_unpacked(path)
        try:
            x, y = load_svmlight_file(str(path), zero_based=True, dtype=number)
        except (ValueError, OSError, OverflowError, EOFError) as error:
            raise _bad_libsvm(path, error) from None
        if x.shape[1] > _most_features(path.stat().st_size):
            raise _bad_libsvm(path)
        tables.append(csr_array(x))
        targets.append(y)
    has_zero = any((x.indices == 0).any() for x in tables)
    if first is None:
        first = 0 if has_zero else 1
    elif first == 1 and has_zero:
        raise ValueError(
            f"{paths[0]} has a feature 0. Expected features counted from 1, as in training."
        )
    width = tables[0].shape[1] - first if width is None else width
    if width < 1 or not tables[0].shape[0]:
        raise ValueError(f"{paths[0]} could not be read as LIBSVM: it has no examples or features.")
    for i, (path, x) in enumerate(zip(paths, tables, strict=True)):
        unseen = np.unique(x.indices[x.indices >= first + width])
        if len(unseen):  # no weight was learnt for them
            several = f"{len(unseen)}, from {unseen[0]} to {unseen[-1]}"
            _log.info(
                f"{path}: features that training did not have are left out: "
                f"{several if len(unseen) > 1 else unseen[0]}."
            )
            x = x[:, : first + width]
        columns = x.indices - np.asarray(first, dtype=x.indices.dtype)
        tables[i] = csr_array((x.data, columns, x.indptr), shape=(x.shape[0], width))
    return tables, targets, first


def _bad_libsvm(path: Path, error: Exception | None = None) -> ValueError:
    """What is wrong with a file, by its first line that no LIBSVM file has."""
    widest = _most_features(path.stat().st_size)
    with contextlib.suppress(OSError, EOFError), unpacked(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE), b""), 1):
            if why := _wrong_in(line.partition(b"#")[0].split(), widest):
                shown = printable(line[:60].decode(errors="replace").rstrip())
                return ValueError(
                    f"{path} could not be read as LIBSVM: {why}. Received, in line {number}: "
                    f"{shown}{'…' if len(line) > 60 else ''} Mend that line."
                )
    return ValueError(
        f"{path} could not be read as LIBSVM, lines of a label and feature:value "
        f"({type(error).__name__}). Is it damaged, or of another kind?"
    )


def _wrong_in(words: list[bytes], widest: int) -> str:
    """Why no line of a LIBSVM file has these words; nothing, where one may."""
    before = -1
    try:
        if words:
            float(words[0])
    except ValueError:
        return "expected a number as label at the start of each line"
    for word in words[1:]:
        feature, _, value = word.partition(b":")
        if feature == b"qid":
            continue
        try:
            number = int(feature)
            float(value)
        except ValueError:
            return "expected whole_number:number for each feature"
        if not 0 <= number < widest:
            return f"expected features from 0 to {widest - 1:,} in a file of this size"
        if number <= before:
            return "expected the features of a line in ascending order, none twice"
        before = number
    return ""


def _most_features(stored: int) -> int:
    """How many features a file of so many bytes may have: a weight is made for each."""
    return max(2**25, 8 * stored)
