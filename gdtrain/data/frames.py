"""Features as users have them: arrays, tensors, lists, and tables whose columns have names.

N examples, D features.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdtrain.data.preprocessing import check_whole
from gdtrain.data.sparse import is_sparse, rows_of
from gdtrain.data.target_values import is_of, kind_of, raw_array

__all__ = ["check_aligned", "feature_names", "features"]

_log = logging.getLogger("gdtrain")

_NUMERIC = {"boolean", "whole number", "number", "fraction"}


def features(inputs: Any, names: list[str] | None = None) -> Any:
    """Numbers of a user's, as an array: a list, array, data frame or tensor (on any device).

    Args:
        inputs: (N,), (N, D) or (N, C, H, W); or (N, D) of `scipy.sparse`; or a table: a DataFrame
            of pandas or polars, or a dict of columns.
        names: Of the D columns that a table must have, in this order, as `feature_names` tells
            them; its other columns are left out. None: all columns. What has no names is taken by
            position.

    Returns:
        (N, D) or (N, C, H, W); a memory-mapped array stays one, and what is of `scipy.sparse` is
        CSR.

    Raises:
        ValueError: They are no numbers, there are none, or some are missing.

    Example:
        >>> features([[1, 2], [3, 4]]).shape
        (2, 2)
        >>> features({"b": [1, 2], "a": [3, 4]}, ["a", "b"])
        array([[3, 1],
               [4, 2]])
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
    """Names of a table's columns; None: it has none, or is no table.

    Columns that are numbered 0 … D − 1, as pandas does by itself, have no names.

    Args:
        inputs: As for `features`.

    Raises:
        ValueError: Two columns have one name.

    Example:
        >>> feature_names({"age": [31, 45], "height": [1.7, 1.6]})
        ['age', 'height']
    """
    table = _table(inputs)
    if table is None or _is_numbered(table):
        return None
    names = [str(name) for name in table.columns]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"The columns of a table must have different names. Received: {twice!r} more than once."
        )
    return names


def check_aligned(inputs: Any, targets: Any) -> None:
    """Raise where tables of pandas have one index, in two orders.

    Args:
        inputs: Of the examples.
        targets: Likewise.

    Raises:
        ValueError: They have.

    Example:
        >>> import pandas as pd
        >>> y = pd.Series([1.0, 2.0])
        >>> check_aligned(pd.DataFrame({"a": [3, 4]}, index=[1, 0]), y)
        Traceback (most recent call last):
        ...
        ValueError: Inputs and targets have the same index in different orders. ...
    """
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


def _is_numbered(table: Any) -> bool:
    names = list(table.columns)
    return all(kind_of(name) == "whole number" for name in names) and names == list(
        range(len(names))
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
            f"{_quoted(missing)}. Received: the columns {_quoted(own)}."
        )
    places = [own.index(name) for name in names]
    others = [name for name in own if name not in names]
    twice = [name for name in names if own.count(name) > 1]
    if twice:
        raise ValueError(
            f"The columns of a table must have different names. Received: {twice[0]!r} more than "
            f"once."
        )
    if others:
        _log.info("features: the columns %s were not in training and are left out", _quoted(others))
    return table.iloc[:, places]


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
        numbers = _column(present)
        if numbers is None:
            other = next((v for v in present if kind_of(v) not in _NUMERIC), present.iloc[0])
            refused.append(f"{name} (such as {other!r})")
        elif missing.any():
            count = f", {missing.sum():,} in all" if missing.sum() > 1 else ""
            gaps.append(f"{name} (example {int(missing.argmax())}{count})")
        else:
            if numbers.dtype.kind in "iu" and numbers.dtype.itemsize == 8:
                check_whole(numbers[:, None], [str(name)])
            columns.append(numbers)
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
    if isinstance(column.dtype, np.dtype | pd.SparseDtype):
        values = np.asarray(column)
    elif column.dtype.kind in "biuf":
        values = column.to_numpy(dtype=getattr(column.dtype, "numpy_dtype", None))
    else:
        return None
    if values.dtype.kind == "O":
        kinds = {kind_of(value) for value in values}
        if not kinds <= _NUMERIC:
            return None
        return np.array([float(value) for value in values])
    return values if values.dtype.kind in "biuf" else None


def _quoted(names: list[str], most: int = 20) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f", … ({len(names)} in all)" if len(names) > most else "")
