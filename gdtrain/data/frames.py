"""Features as users have them: arrays, tensors, lists, and tables whose columns have names.

N examples, D features.
"""

from __future__ import annotations

import logging
import mmap
import numbers
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdtrain._compat.numpy_memmap import file_map
from gdtrain.data.sparse import check_entries, is_sparse, rows_of

__all__ = [
    "CHUNK",
    "check_aligned",
    "check_features",
    "check_whole",
    "feature_names",
    "features",
    "give_back",
    "is_of",
    "kind_of",
    "listed",
    "raw_array",
    "series_array",
    "shortened",
]

_log = logging.getLogger("gdtrain")

CHUNK = 32 * 2**20  # bytes of raw features that are looked at together
_NUMERIC = {"boolean", "whole number", "number", "fraction"}
_EXACT = 2**53  # up to which float64 has all whole numbers
_LENGTH = 60  # characters of a value in a message
_BLUR = 1e-6  # of the range of a column, that rounding to float64 may cost


# ---------------------------------------------------------------------- what users have


def is_of(package: str, value: Any) -> bool:
    """Whether its class is of a package, which need not be imported to tell."""
    return package in sys.modules and any(
        base.__module__.partition(".")[0] == package for base in type(value).__mro__
    )


def kind_of(value: Any) -> str:
    """What an entry of a list or table is, in a word: "text", "whole number", …"""
    if isinstance(value, bool | np.bool_):
        return "boolean"
    if isinstance(value, numbers.Integral):
        return "whole number"
    if isinstance(value, Decimal | Fraction):
        return "fraction"
    if isinstance(value, numbers.Real):
        return "number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bytes):
        return "bytes"
    return type(value).__name__


def raw_array(values: Any) -> Any:
    """A list, array or tensor of a user's as an array: only what NumPy cannot hold is converted."""
    if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
        values = [raw_array(value) for value in values]
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.to_dense() if values.layout is not torch.strided else values
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        return values.resolve_conj().resolve_neg().numpy()
    if isinstance(values, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(values)
        if mask.any():
            place = np.argwhere(mask)[0].tolist()
            column = f", column {place[1]}" if len(place) == 2 else ""
            raise ValueError(
                f"Masked entries are missing values. Received: {mask.sum()} of them, the first in "
                f"example {place[0]} (counted from 0){column}. Fill in or drop missing values "
                f"first."
            )
        return np.asarray(values.data)
    try:
        return np.asarray(values)
    except ValueError as error:
        if "inhomogeneous" not in str(error):
            raise
        raise ValueError(
            "Expected as many numbers in each example. Received: lists of different lengths."
        ) from None


def series_array(series: Any) -> NDArray[Any]:
    """A Series without missing values: numbers of pandas' own types or Arrow's become NumPy's."""
    import pandas as pd

    if isinstance(series.dtype, np.dtype | pd.SparseDtype):
        return np.asarray(series)
    plain = getattr(series.dtype, "numpy_dtype", None) if series.dtype.kind in "biuf" else object
    made: NDArray[Any] = series.to_numpy(dtype=plain)
    return made


def features(inputs: Any, names: list[str] | None = None) -> Any:
    """A user's numbers as an array (N, D) or (N, C, H, W): of arrays, lists, tensors or tables.

    A memory-mapped array stays one, and what is of `scipy.sparse` becomes CSR. `names`: columns
    that a table must have, in this order; others are left out. What has no names is taken by
    position.
    """
    table = _table(inputs)
    if table is not None:
        return _numbers(_chosen(table, names))
    kept = isinstance(inputs, np.memmap) or is_sparse(inputs)
    x: Any = inputs if kept else raw_array(inputs)
    if x.ndim == 1 and not is_sparse(x):
        x = x[:, None]
    if x.dtype.kind == "O" and x.ndim == 2 and 0 not in x.shape:
        import pandas as pd

        return _numbers(pd.DataFrame(x))
    if x.ndim < 2 or x.dtype.kind not in "fiub" or 0 in x.shape:
        raise ValueError(
            f"Inputs must be numbers of shape (N, D) or (N, C, H, W), N and D >= 1. Received: "
            f"shape {x.shape}, dtype {x.dtype}."
        )
    return rows_of(x) if is_sparse(x) else x


def feature_names(inputs: Any) -> list[str] | None:
    """Names of a table's columns; None: it has none but 0 … D − 1, or is no table."""
    table = _table(inputs)
    if table is None or _is_numbered(table):
        return None
    names = [str(name) for name in table.columns]
    _check_different(names, names)
    return names


def check_aligned(inputs: Any, targets: Any) -> None:
    """Raise where inputs and targets are tables of pandas with one index, in two orders."""
    if not (is_of("pandas", inputs) and is_of("pandas", targets)):
        return
    one, other = getattr(inputs, "index", None), getattr(targets, "index", None)
    if one is None or other is None or len(one) != len(other) or one.equals(other):
        return
    if one.is_unique and other.is_unique and one.isin(other).all():
        raise ValueError(
            "Inputs and targets have the same index in different orders. y.loc[X.index] brings the "
            "targets into the order of the inputs; y.to_numpy() takes them by position."
        )


def _table(inputs: Any) -> Any:
    """As a DataFrame of pandas, if it has columns."""
    if is_of("polars", inputs) and hasattr(inputs, "columns"):
        inputs = {name: inputs[name].to_numpy() for name in inputs.columns}
    if type(inputs) is dict:  # not the dict of keys of scipy.sparse
        import pandas as pd

        return pd.DataFrame(inputs)
    if not is_of("pandas", inputs):
        return None
    import pandas as pd

    if isinstance(inputs, pd.DataFrame):
        return inputs
    series = pd.Series(inputs)  # of an index or an extension array, too
    return series.to_frame(0 if series.name is None else series.name)


def _is_numbered(table: Any) -> bool:
    names = list(table.columns)
    numbered = names == list(range(len(names)))
    return numbered and all(kind_of(name) == "whole number" for name in names)


def _check_different(names: list[str], wanted: Iterable[str]) -> None:
    counts = Counter(names)
    twice = next((name for name in wanted if counts[name] > 1), None)
    if twice is not None:
        raise ValueError(
            f"The columns of a table must have different names. Received: {twice!r} more than once."
        )


def _chosen(table: Any, names: list[str] | None) -> Any:
    """The columns by name, in the order of training; by position where either has no names."""
    own = [str(name) for name in table.columns]
    if names is None:
        # As in training, which had none: but numbers out of their order are names after all.
        numbered = [str(k) for k in range(len(own))]
        if own != numbered and sorted(own) == sorted(numbered):
            return table.iloc[:, [own.index(name) for name in numbered]]
        return table
    if _is_numbered(table):
        return table
    missing = [name for name in names if name not in own]
    if missing:
        raise ValueError(
            f"The examples lack {len(missing)} of the {len(names)} features of the training data: "
            f"{listed(missing)}. Received: the columns {listed(own)}."
        )
    _check_different(own, names)
    others = [name for name in own if name not in names]
    if others:
        _log.info("features: the columns %s were not in training and are left out", listed(others))
    return table.iloc[:, [own.index(name) for name in names]]


def _numbers(table: Any) -> NDArray[Any]:
    """(N, D); raises on all columns that are no numbers, or have missing ones."""
    if 0 in table.shape:
        raise ValueError(
            f"Inputs must have N and D >= 1. Received: a table of shape {table.shape}."
        )
    refused: list[str] = []
    gaps: list[str] = []
    columns = []
    for k, name in enumerate(table.columns):
        column = table.iloc[:, k]
        missing = column.isna().to_numpy()
        present = column[~missing] if missing.any() else column
        values = _column(present)
        if values is None:
            other = next((v for v in present if kind_of(v) not in _NUMERIC), present.iloc[0])
            refused.append(f"{name} (such as {shortened(other)})")
        elif missing.any():
            count = f", {missing.sum():,} in all" if missing.sum() > 1 else ""
            gaps.append(f"{name} (example {int(missing.argmax())}{count})")
        else:
            if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
                check_whole(values[:, None], [str(name)])
            columns.append(values)
    problems = []
    if refused:
        problems.append(
            f"Received others in {len(refused)} of the {table.shape[1]} columns: "
            f"{', '.join(refused)}. Encode them as numbers (pandas.get_dummies makes columns of 0 "
            f"and 1 of text), or leave them out."
        )
    if gaps:
        problems.append(
            f"Received missing values in {len(gaps)} of the {table.shape[1]} columns: "
            f"{', '.join(gaps)}; counted from 0. Fill in or drop missing values first."
        )
    if problems:
        raise ValueError(f"Features must be finite numbers. {' '.join(problems)}")
    return np.stack(columns, axis=1)


def _column(column: Any) -> NDArray[Any] | None:
    """Numbers or booleans, also of pandas' own types and categories; None: something else."""
    import pandas as pd

    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    values = series_array(column)
    if values.dtype.kind == "O" and {kind_of(value) for value in values} <= _NUMERIC:
        values = np.array([float(value) for value in values])
    return values if values.dtype.kind in "biuf" else None


def shortened(label: Any) -> str:
    """A value for a message: as Python writes it, and not longer than a line."""
    text = repr(label)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"


def listed(labels: Sequence[Any], most: int = 20, total: bool = True) -> str:
    """Some of the labels, and how many there are."""
    shown = ", ".join(map(shortened, labels[:most]))
    if len(labels) <= most:
        return shown
    return f"{shown}, … ({len(labels)} in all)" if total else f"{shown}, …"


# ---------------------------------------------------------------------- what is refused


def check_features(x: Any, names: list[str] | None = None, number: int = 0) -> None:
    """Raise, with its place, on a feature that is not finite.

    `names`: of the columns. `number`: of the first example, for the message.
    """
    if is_sparse(x):
        check_entries(x, names)
        return
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8 and x.ndim == 2:
        check_whole(x, names)
    if x.dtype.kind != "f" or not len(x):
        return
    size = max(1, CHUNK // max(x[0].nbytes, 1))
    for first in range(0, len(x), size):
        finite = np.isfinite(x[first : first + size])
        give_back(x)
        if not finite.all():  # places are looked for only then: that takes 60 times as long
            index = np.argwhere(~finite)[0].tolist()
            place = (first + index[0], *index[1:])
            feature = place[1] if len(place) == 2 else place[1:]
            name = names[place[1]] if names else feature
            raise ValueError(
                f"Features must be finite numbers. Received: {x[place]} in example "
                f"{number + place[0]} (counted from 0), feature {name}. Fill in or drop missing "
                f"values first."
            )


def check_whole(x: NDArray[Any], names: list[str] | None = None) -> None:
    """Raise on whole numbers (N, D) of 64 bits that float64, in which all is computed, blurs.

    Rounding may cost a millionth of the range of a column.
    """
    low, high = (f(axis=0).tolist() for f in (x.min, x.max))
    give_back(x)
    for k, (least, most) in enumerate(zip(low, high, strict=True)):
        size = max(abs(least), abs(most))
        if size > _EXACT and 0 < most - least < np.spacing(float(size)) / _BLUR:
            name = names[k] if names else k
            raise ValueError(
                f"Whole numbers above 2^53 lose digits in float64. Received: {least} … {most} in "
                f"column {name}. Subtract a whole number first, such as the smallest."
            )


def give_back(array: NDArray[Any]) -> None:
    """Tell the system that the pages of a memory-mapped array need not stay in memory."""
    mapped = file_map(array)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED)
