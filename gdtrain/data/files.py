"""Examples from a file that is not the one trained on: to predict, and to evaluate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdtrain.data.arrays import load_npy, load_npz
from gdtrain.data.columns import Kind, listed
from gdtrain.data.frames import features
from gdtrain.data.libsvm import load_libsvm
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.tables import Header, Table, is_table

__all__ = ["read_features", "read_labelled"]

_log = logging.getLogger("gdtrain")


def read_features(
    path: str | Path,
    feature_names: list[str] | None = None,
    *,
    num_features: int | None = None,
    first_feature: int | None = None,
    header: Header = "auto",
) -> Any:
    r"""Examples without targets, to predict from.

    Args:
        path: `.csv` or `.tsv` (see `Table`; any other name too where `feature_names` are given);
            `.npy`; `.npz` of `scipy.sparse.save_npz`; or a LIBSVM file (`.svm`, `.svmlight` or
            `.libsvm`, plain or compressed; any other name too where `first_feature` is given),
            whose labels are not used.
        feature_names: Columns to take from a table, in this order; None: all.
        num_features: D, which a LIBSVM file does not tell; None: its highest feature. Further
            features are left out.
        first_feature: As for `Preprocessing`; None: 0 if the file has a feature 0, else 1.
        header: As for `Table`.

    Returns:
        (N, D), or what the `.npy` file holds; CSR of `scipy.sparse` from `.npz` and LIBSVM.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind, lacks columns, or has values that are no numbers.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "new.csv"
        ...     _ = path.write_text("b,a\n2,1\n4,3\n")
        ...     read_features(path, ["a", "b"])
        array([[1., 2.],
               [3., 4.]])
    """
    path = _input(path)
    kind = _kind(path, feature_names, first_feature)
    if kind == "npy":
        return features(load_npy(path))
    if kind == "npz":
        return features(load_npz(path))
    if kind == "libsvm":
        return load_libsvm([path], np.float64, first_feature, num_features)[0][0]
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
    r"""Examples with targets, to evaluate on; as they are in the file.

    Args:
        path: As for `read_features`.
        preprocessing: Learnt in training.
        target: Name of a table's column, by default the one that is no feature; of `.npy` the
            column, by default the last, or a `.npy` file of targets, which `.npz` needs. Not used
            for LIBSVM.
        header: As for `Table`.

    Returns:
        The features as from `read_features`, and the targets, which training has seen if they are
        classes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As for `read_features`; or the target is not found, or has another label.

    Example:
        >>> import tempfile
        >>> preprocessing = Preprocessing(classes=["no", "yes"], feature_names=["a", "b"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "new.csv"
        ...     _ = path.write_text("kind,b,a\nyes,2,1\nno,4,3\n")
        ...     read_labelled(path, preprocessing)
        (array([[1., 2.],
               [3., 4.]]), array(['yes', 'no'], dtype=object))
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
        x, y = table.read(own, target, _labels(preprocessing), _LEAVE)
        assert y is not None
        _check_labels(y, preprocessing, path, lambda row: f"line {table.lines([row])[row][0]}")
        return x, y
    if kind == "libsvm":
        width = int(np.prod(preprocessing.input_shape)) if preprocessing.input_shape else None
        tables, labels, _ = load_libsvm([path], np.float64, first, width)
        x, y = tables[0], labels[0]
    else:
        x = features(load_npz(path) if kind == "npz" else load_npy(path))
        x, y = _apart(x, target, path, kind)
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


_LEAVE = "train on other columns"


def _input(path: str | Path, key: str = "input") -> Path:
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{key} must name a file. Received: {path}, a folder.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Set {key} to one that exists.")
    return path


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


def _apart(x: Any, target: str | None, path: Path, kind: str) -> tuple[Any, NDArray[Any]]:
    """Inputs and targets of NumPy's files."""
    if target is not None and not target.strip().lstrip("-").isdigit():
        return x, load_npy(_input(target, "target"))
    column = -1 if target is None else int(target)
    if kind == "npz" or x.ndim != 2 or not -x.shape[1] <= column < x.shape[1]:
        raise ValueError(
            f"{path} must come with a .npy file of targets (target=FILE.npy), or be a .npy table "
            f"with them in column {column}. Received: shape {x.shape}."
        )
    return np.delete(x, column, axis=1), x[:, column]


def _labels(preprocessing: Preprocessing) -> Kind:
    """How targets are to be read, so that they can be those of training."""
    return "text" if isinstance((preprocessing.classes or [0])[0], str) else "numbers"


def _check_labels(
    y: NDArray[Any], preprocessing: Preprocessing, path: Path, place: Callable[[int], str]
) -> None:
    """Raise, with its place, on a label that training did not have."""
    if preprocessing.classes is None:
        return
    try:
        preprocessing.targets(y)
    except ValueError as error:
        message = error
    else:
        return
    for label in dict.fromkeys(y.tolist()):
        try:
            preprocessing.targets(y[y == label][:1])
        except ValueError as error:
            rows = np.flatnonzero(y == label)
            raise ValueError(
                f"{path}, {place(int(rows[0]))}: {error}"
                + f" There are {len(rows)} of this label." * (len(rows) > 1)
            ) from None
    raise message
