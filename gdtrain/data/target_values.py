"""What users have as features and targets, read as arrays: lists, tensors, Series, DataFrames.

N examples, K target columns.
"""

from __future__ import annotations

import numbers
import sys
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Values",
    "check_numbers",
    "is_of",
    "kind_of",
    "label_array",
    "raw_array",
    "read",
    "read_values",
]

_LENGTH = 60  # characters of a value in a message


def raw_array(values: Any) -> Any:
    """What a user has as an array of NumPy: nothing is converted but what NumPy cannot hold.

    Args:
        values: A list, array, tensor (on any device), or what offers `__array__`.

    Raises:
        ValueError: Entries are masked, or lists are of different lengths.

    Example:
        >>> raw_array([[1, 2], [3, 4]]).shape
        (2, 2)
    """
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


def kind_of(value: Any) -> str:
    """What an entry of a list or table is, in a word: "text", "whole number", …

    Args:
        value: One entry.

    Example:
        >>> kind_of(Decimal("1.5")), kind_of(None)
        ('fraction', 'NoneType')
    """
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


def is_of(package: str, value: Any) -> bool:
    """Whether its class is of a package, which need not be imported to tell.

    Args:
        package: Its name.
        value: Anything.

    Example:
        >>> is_of("numpy", np.ones(1)), is_of("numpy", 1.0)
        (True, False)
    """
    return package in sys.modules and any(
        base.__module__.partition(".")[0] == package for base in type(value).__mro__
    )


@dataclass
class Values:
    """Targets, read.

    Args:
        values: Text, booleans or numbers, (N,); or numbers (N, K).
        nominal: Whether they are categories of pandas.
        exact: Whether some are fractions or decimals.
        names: Of K columns.

    Example:
        >>> read_values([Decimal("1.5"), 2]).exact
        True
    """

    values: NDArray[Any]
    nominal: bool = False
    exact: bool = False
    names: list[Any] | None = None


def read_values(values: Any) -> Values:
    """Targets as they come, with what is known of them beside their values.

    Args:
        values: As for `gdtrain.data.targets.decide`.

    Raises:
        ValueError: They are missing, of several types, or of a type that is neither.

    Example:
        >>> read_values([[1], [2]]).values
        array([1, 2])
    """
    made = _read_as_it_is(values)
    y = made.values
    if y.ndim == 2 and y.shape[1] == 1:
        made.values = y[:, 0]
    elif y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise ValueError(
            f"Targets must be one or several for each example, (N,) or (N, K), K >= 1. "
            f"Received: shape {y.shape}."
        )
    return made


def read(values: Any) -> NDArray[Any]:
    """Targets as an array: labels or numbers (N,), or numbers (N, K).

    Args:
        values: As for `gdtrain.data.targets.decide`.

    Returns:
        Text (object or str), booleans or numbers; (N, 1) becomes (N,).

    Raises:
        ValueError: They are missing, of several types, or of a type that is neither.

    Example:
        >>> read([[Decimal("1.5")], [2]])
        array([1.5, 2. ])
    """
    return read_values(values).values


def check_numbers(y: NDArray[Any]) -> None:
    """Raise, with its row, on a number that is not finite.

    Args:
        y: (N,) or (N, K).

    Raises:
        ValueError: There is one.

    Example:
        >>> check_numbers(np.array([1.0, np.nan]))
        Traceback (most recent call last):
        ...
        ValueError: Targets must be finite numbers. Received: nan in example 1 (counted from 0).
    """
    if y.dtype.kind != "f" or np.isfinite(y).all():
        return
    rows = np.flatnonzero(~np.isfinite(y.reshape(len(y), -1)).all(1))
    more = f", and such in {len(rows) - 1:,} more" if len(rows) > 1 else ""
    raise ValueError(
        f"Targets must be finite numbers. Received: {y[rows[0]]} in example {rows[0]} (counted "
        f"from 0){more}."
    )


def label_array(classes: list[Any]) -> NDArray[Any]:
    """Labels as an array, to be picked from.

    Args:
        classes: Text, booleans or numbers.

    Example:
        >>> label_array([2, 2**63]).dtype
        dtype('uint64')
    """
    whole = all(type(label) is int for label in classes)
    return _whole(classes) if whole else np.asarray(classes)


def _read_as_it_is(values: Any) -> Values:
    if is_of("polars", values):
        columns = {name: values[name].to_list() for name in getattr(values, "columns", ())}
        values = columns or values.to_list()
    if type(values) is dict:
        import pandas as pd

        values = pd.DataFrame(values)
    if is_of("pandas", values):
        return _read_pandas(values)
    if is_of("scipy", values) and hasattr(values, "toarray"):
        values = values.toarray()
    if isinstance(values, list | tuple):
        # NumPy would make text of [1, "1"], and numbers of [True, 2].
        if any(isinstance(value, Tensor) for value in values):
            values = raw_array(values)
        elif not all(type(value) is float for value in values):
            values = _objects(values)
    return _read_array(raw_array(values))


def _objects(values: Any) -> NDArray[Any]:
    try:
        return np.array(values, dtype=object)
    except ValueError:
        raise ValueError(
            "Targets must be as many for each example. Received: lists of different lengths."
        ) from None


def _read_pandas(values: Any) -> Values:
    import pandas as pd

    if isinstance(values, pd.DataFrame):
        columns = [_read_pandas(values.iloc[:, k]) for k in range(values.shape[1])]
        if len(columns) == 1:
            return columns[0]
        if not columns or any(column.values.dtype.kind in "OU" for column in columns):
            raise ValueError(
                f"Targets in several columns must be numbers. Received: the columns "
                f"{', '.join(map(str, values.columns))}, with text. Choose one of them."
            )
        stacked = np.stack([column.values for column in columns], axis=1)
        return Values(stacked, names=_labels(list(values.columns)))
    series = pd.Series(values)
    if series.isna().any() and series.dtype != np.dtype("float64"):
        _refuse_missing(series.isna().to_numpy())
    if isinstance(series.dtype, pd.CategoricalDtype):
        kept = _read_array(series.astype(object).to_numpy())
        kept.nominal = True
        return kept
    if isinstance(series.dtype, np.dtype):
        return _read_array(series.to_numpy())
    if isinstance(series.dtype, pd.SparseDtype):
        return _read_array(np.asarray(series))
    kind = series.dtype.kind
    if kind in "biuf":  # of pandas or Arrow, which know missing values
        own = getattr(series.dtype, "numpy_dtype", None)
        return _read_array(series.to_numpy(dtype=own))
    return _read_array(series.to_numpy(dtype=object))


def _labels(names: list[Any]) -> list[Any]:
    """Names of columns as labels: whole numbers or text."""
    if all(kind_of(name) == "whole number" for name in names):
        return [int(name) for name in names]
    return [str(name) for name in names]


def _read_array(y: NDArray[Any]) -> Values:
    kind = y.dtype.kind
    if kind == "O":
        return _read_objects(y)
    if kind == "f":
        return Values(y.astype(np.float64) if y.dtype.itemsize > 8 else y)
    if kind in "biuU":
        return Values(y)
    if kind == "T":  # NumPy's text of any length
        return _read_objects(y.astype(object))
    example = y.ravel()[0] if y.size else y.dtype
    raise ValueError(_not_a_target(_DTYPES.get(kind, str(y.dtype)), example, 0))


_DTYPES = {"S": "bytes", "M": "date", "m": "time span", "c": "complex number", "V": "record"}


def _read_objects(y: NDArray[Any]) -> Values:
    import pandas as pd

    if not y.ndim:
        raise ValueError(
            f"Targets must be an array, tensor, list or table. Received: {type(y.item()).__name__}."
        )
    missing = np.asarray(pd.isna(y), dtype=bool)
    if missing.any():
        _refuse_missing(np.asarray(missing.reshape(len(y), -1).any(axis=1)))
    flat = y.ravel()
    kinds: dict[str, int] = {}
    for place, value in enumerate(flat):
        kinds.setdefault(kind_of(value), place)
    if "list" in kinds:
        raise ValueError(
            f"Targets must be as many for each example. Received: "
            f"{shortened(flat[kinds['list']])} in example {kinds['list']} (counted from 0), beside "
            f"others."
        )
    width = y.size // max(len(y), 1)
    numeric = {"whole number", "number", "fraction"}
    if kinds.keys() <= numeric:
        if kinds.keys() == {"whole number"}:
            return Values(_whole([int(value) for value in flat]).reshape(y.shape))
        exact = "fraction" in kinds
        return Values(np.array([float(v) for v in flat]).reshape(y.shape), exact=exact)
    if len(kinds) > 1:
        (one, at), (other, there) = sorted(kinds.items(), key=lambda item: item[1])[:2]
        raise ValueError(
            f"Targets must be of one type. Received: {one} ({shortened(flat[at])} in example "
            f"{at // width}) and {other} ({shortened(flat[there])} in example {there // width}, "
            f"counted from 0)."
        )
    (kind,) = kinds
    if kind == "boolean":
        return Values(y.astype(bool))
    if kind == "text":
        plain = np.empty(len(flat), dtype=object)
        plain[:] = [str.__str__(value) for value in flat]
        return Values(plain.reshape(y.shape))
    raise ValueError(_not_a_target(kind, flat[0], 0))


def _whole(values: list[int]) -> NDArray[Any]:
    for dtype in (np.int64, np.uint64):
        try:
            return np.array(values, dtype=dtype)
        except OverflowError:
            continue
    raise ValueError(
        f"Whole numbers as targets must fit into 64 bits. Received: {max(values, key=abs)}. Make "
        f"them text for classes, or floating-point numbers for a regression."
    )


def _not_a_target(kind: str, value: Any, example: int) -> str:
    advice = (
        "y.astype(str) makes text of an array of them."
        if kind == "bytes"
        else "Make them text for classes (y.astype(str)), or numbers for a regression (of dates: "
        "the days since one of them)."
    )
    return (
        f"Targets must be text, booleans or numbers: other labels cannot be kept with a model. "
        f"Received: {kind}, such as {shortened(value)} in example {example}. {advice}"
    )


def _refuse_missing(missing: NDArray[Any]) -> None:
    rows = np.flatnonzero(missing)
    shown = ", ".join(map(str, rows[:5].tolist())) + (", …" if len(rows) > 5 else "")
    raise ValueError(
        f"Each example must have a target. Received: none in {len(rows):,} of {len(missing):,} "
        f"examples: {shown} (counted from 0). Drop them first."
    )


def shortened(label: Any) -> str:
    """A value for a message: as Python writes it, and not longer than a line."""
    text = repr(label)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"
