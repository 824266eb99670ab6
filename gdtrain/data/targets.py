"""What a target is: classes or numbers. All sources, `fit` and the Lightning module ask here.

N examples, K target columns, C classes.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from gdtrain.losses import Loss

__all__ = [
    "Decision",
    "Task",
    "check_numbers",
    "check_task",
    "class_numbers",
    "decide",
    "is_of",
    "kind_of",
    "label_array",
    "may_be_classes",
    "raw_array",
    "read",
    "wanted_task",
]

Task = Literal["auto", "classification", "regression"]

_MOST_CLASSES = 32  # that whole numbers are taken for, unasked
_ENOUGH = 30  # examples of a class, to be taken for one
_SHARE = 5  # or as many as a fifth of those of the most frequent class
_SHOWN = 10  # labels in a message
_LENGTH = 60  # characters of one


@dataclass(frozen=True)
class Decision:
    """What the targets are.

    Args:
        values: Labels (N,), or numbers (N,) or (N, K).
        classes: The labels, in the order of the class numbers; None: the targets are numbers.
        standardize: Whether the numbers may be standardised.
        said: The decision in words.

    Example:
        >>> decide(["no", "yes", "no"]).said
        "target: 2 classes ('no', 'yes')"
    """

    values: NDArray[Any]
    classes: list[Any] | None
    standardize: bool
    said: str


def check_task(task: Any) -> Task:
    """Raise on a word that names no task.

    Args:
        task: "auto", "classification" or "regression".

    Returns:
        The task.

    Raises:
        ValueError: It is another.

    Example:
        >>> check_task("auto")
        'auto'
    """
    if task not in ("auto", "classification", "regression"):
        raise ValueError(
            f"task must be auto, classification or regression. Received: task={task!r}."
        )
    return task


def decide(values: Any, task: Task = "auto", loss: Loss | None = None) -> Decision:
    """Classes or numbers.

    An explicit task decides; else a given loss does, which is for one of them; else ("auto"):

    - text, booleans and pandas' categories are classes, fractions and decimals are numbers;
    - whole numbers, of whatever type, are classes where there are just two different ones, or
      where they are exactly 0 … C−1, 1 … C with C ≤ 32, or −1, 0, 1, and enough examples of each:
      at least two, and thirty or a fifth as many as of the most frequent. Else they are numbers:
      counts;
    - several columns are classes where they are one-hot; other columns of 0 and 1 are refused;
      all else are numbers.

    Numbers in several columns of 0 and 1 are not standardised, nor are those for a loss with
    `raw_targets`.

    Args:
        values: (N,), (N, 1) or (N, K): an array, tensor, list, Series or DataFrame.
        task: "auto", "classification" or "regression".
        loss: That is trained on them; None: not known.

    Returns:
        The targets, read, and what they are.

    Raises:
        ValueError: They are missing, of several types, of a type that is neither, or do not suit
            the task or the loss.

    Example:
        >>> decide([0, 1, 2] * 4).said
        'target: 3 classes (0, 1, 2); task=regression would make them numbers'
        >>> decide(np.arange(50.0)).said
        'target: numbers, 50 different whole values; task=classification would make them classes'
    """
    check_task(task)
    wanted, because = wanted_task(task, loss)
    read_ = _read(values)
    y = read_.values
    if not len(y):
        raise ValueError("Targets must be those of at least one example. Received: none.")
    words = y.dtype.kind in "OU"
    if wanted == "regression":
        if words:
            raise ValueError(
                f"A regression needs numbers as targets{because}. Received: text, such as "
                f"{_short(y.ravel()[0])}. task=classification takes it as classes."
            )
        return _numbers(y, loss, because)
    if y.ndim > 1:
        return _columns(read_, wanted, loss, because)
    if wanted is None and not words and not read_.nominal and y.dtype.kind != "b":
        if read_.exact or not _looks_like_classes(y):
            return _numbers(y, loss)
    elif loss is not None and task == "auto" and not words and not _is_whole(y):
        return _numbers(y, loss)  # which the loss will refuse, in its own words
    check_numbers(y)
    classes = np.unique(y).tolist()
    if len(classes) < 2:
        raise ValueError(
            f"There must be at least two classes. Received: {len(y)} examples of the class "
            f"{_short(classes[0])}."
        )
    other = ""
    if wanted is None and y.dtype.kind in "iuf":
        other = "; task=regression would make them numbers"
    return Decision(y, classes, False, f"target: {_classes_said(classes)}{because}{other}")


def read(values: Any) -> NDArray[Any]:
    """Targets as an array: labels or numbers (N,), or numbers (N, K).

    Args:
        values: As for `decide`.

    Returns:
        Text (object or str), booleans or numbers; (N, 1) becomes (N,).

    Raises:
        ValueError: They are missing, of several types, or of a type that is neither.

    Example:
        >>> read([[Decimal("1.5")], [2]])
        array([1.5, 2. ])
    """
    return _read(values).values


def class_numbers(values: Any, classes: list[Any]) -> NDArray[np.int64]:
    """The number of each label among the classes.

    Args:
        values: Labels as for `decide`; or one-hot (N, C).
        classes: The labels in their order.

    Returns:
        (N,), from 0 to C − 1.

    Raises:
        ValueError: A label is not among the classes.

    Example:
        >>> class_numbers(["yes", "no"], ["no", "yes"])
        array([1, 0])
    """
    labels = read(values)
    if labels.ndim > 1:
        if labels.shape[1] != len(classes) or not _is_one_hot(labels):
            raise ValueError(
                f"Classes must be one column, or one-hot in {len(classes)} columns. Received: "
                f"targets of shape {labels.shape}."
            )
        return labels.argmax(1).astype(np.int64)
    known = label_array(classes)
    if known.dtype.kind in "biuf" and labels.dtype.kind in "biuf":
        order = np.argsort(known, kind="stable")
        places = np.searchsorted(known, labels, sorter=order)
        found = order[np.minimum(places, len(known) - 1)]
        wrong = np.flatnonzero(known[found] != labels)
        if not len(wrong):
            return found.astype(np.int64, copy=False)
        unknown = labels[wrong[0]].item()
    else:
        number = {label: i for i, label in enumerate(classes)}
        try:
            return np.array([number[label] for label in labels.tolist()], dtype=np.int64)
        except KeyError as error:
            unknown = error.args[0]
    raise ValueError(
        f"Labels must be among those of the training data, {_listed(classes)}. "
        f"Received: {_short(unknown)}."
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
        values = values.to_dense() if values.layout is not _strided() else values
        values = values.float() if values.dtype in _half() else values
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


def _strided() -> Any:
    import torch

    return torch.strided


def _half() -> tuple[Any, Any]:
    import torch

    return torch.bfloat16, torch.float16


# ---------------------------------------------------------------------- what was meant


def wanted_task(
    task: Task, loss: Loss | None
) -> tuple[Literal["classification", "regression"] | None, str]:
    """What is asked for, and by whom, in words.

    Args:
        task: As for `decide`.
        loss: Likewise.

    Returns:
        The task, None: nobody asked; and a few words for a message, perhaps none.

    Example:
        >>> wanted_task("auto", None), wanted_task("regression", None)
        ((None, ''), ('regression', ''))
    """
    if task != "auto":
        return task, ""
    if loss is None:
        return None, ""
    kind = "regression" if loss.task == "regression" else "classification"
    return kind, f", for {type(loss).__name__}"  # type: ignore[return-value]


def may_be_classes(y: NDArray[Any]) -> bool:
    """Whether some of the targets, seen alone, may be classes: whole numbers, or 0 and 1.

    Args:
        y: (N,) or (N, K), numbers.

    Example:
        >>> may_be_classes(np.array([3.0, 1.0])), may_be_classes(np.array([0.5, 1.0]))
        (True, False)
    """
    return _is_whole(y) if y.ndim == 1 else y.ndim == 2 and _is_zero_one(y)


def _numbers(y: NDArray[Any], loss: Loss | None, because: str = "") -> Decision:
    check_numbers(y)
    raw = loss is not None and loss.raw_targets
    standardize = not raw and not (y.ndim > 1 and _is_zero_one(y))
    said = "target: numbers" + (f" in {y.shape[1]} columns" if y.ndim > 1 else "") + because
    if y.ndim == 1 and not because and _is_whole(y):
        values = np.unique(y)
        said += (
            f", {len(values):,} different whole values; task=classification would make them classes"
            if len(values) > 1
            else f", all {values[0]}"
        )
    if not standardize:
        said += " (not standardised)"
    return Decision(y, None, standardize, said)


def _columns(read_: _Read, wanted: str | None, loss: Loss | None, because: str) -> Decision:
    """Several columns, which are not known to be numbers."""
    y = read_.values
    if y.dtype.kind not in "OU" and _is_one_hot(y):
        labels = read_.names if read_.names is not None else list(range(y.shape[1]))
        said = f"target: {_classes_said(labels)}, one-hot{because}"
        other = "" if wanted else "; task=regression would make them numbers"
        return Decision(np.asarray(labels)[y.argmax(1)], labels, False, said + other)
    if wanted == "classification" or y.dtype.kind in "OU":
        raise ValueError(
            f"Classes must be one column, or one-hot: one 1 in each row, and zeros{because}. "
            f"Received: targets of shape {y.shape}."
        )
    if _is_zero_one(y):
        row = int(np.flatnonzero(y.sum(1) != 1)[0])
        raise ValueError(
            f"Targets of several columns must be one-hot, or numbers. Received: {y.shape[1]} "
            f"columns of 0 and 1, with {int(y[row].sum())} ones in example {row} (counted from 0). "
            f"Train on one column at a time; or task=regression fits all of them as numbers (not "
            f"standardised), and so does a loss of your own with task = 'regression'."
        )
    return _numbers(y, loss)


def _looks_like_classes(y: NDArray[Any]) -> bool:
    if not _is_whole(y):
        return False
    labels, counts = np.unique(y, return_counts=True)
    if len(labels) == 2:
        return True
    if not 2 < len(labels) <= _MOST_CLASSES:
        return False
    if labels[0] not in (0, 1) and labels.tolist() != [-1, 0, 1]:
        return False
    if labels[-1] - labels[0] != len(labels) - 1:
        return False
    # The tails of counts are thin, however many there are: a handful of examples.
    enough = max(2.0, min(_ENOUGH, counts.max() / _SHARE))
    return bool(counts.min() >= enough)


def _is_whole(y: NDArray[Any]) -> bool:
    if y.dtype.kind in "iub":
        return True
    return y.dtype.kind == "f" and bool(np.isfinite(y).all() and (y == np.round(y)).all())


def _is_zero_one(y: NDArray[Any]) -> bool:
    return y.dtype.kind in "biuf" and bool(((y == 0) | (y == 1)).all())


def _is_one_hot(y: NDArray[Any]) -> bool:
    return y.ndim == 2 and y.shape[1] > 1 and _is_zero_one(y) and bool((y.sum(1) == 1).all())


def _classes_said(classes: list[Any]) -> str:
    return f"{len(classes)} classes ({_listed(classes, total=False)})"


def _short(label: Any) -> str:
    text = repr(label)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"


def _listed(labels: Sequence[Any], total: bool = True) -> str:
    shown = ", ".join(_short(label) for label in labels[:_SHOWN])
    if len(labels) <= _SHOWN:
        return shown
    return f"{shown}, … ({len(labels)} in all)" if total else f"{shown}, …"


# ---------------------------------------------------------------------- reading


@dataclass
class _Read:
    """`nominal`: pandas' categories. `exact`: fractions or decimals. `names`: of K columns."""

    values: NDArray[Any]
    nominal: bool = False
    exact: bool = False
    names: list[Any] | None = None


def _read(values: Any) -> _Read:
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


def _read_as_it_is(values: Any) -> _Read:
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


def _read_pandas(values: Any) -> _Read:
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
        return _Read(stacked, names=_labels(list(values.columns)))
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


def _read_array(y: NDArray[Any]) -> _Read:
    kind = y.dtype.kind
    if kind == "O":
        return _read_objects(y)
    if kind == "f":
        return _Read(y.astype(np.float64) if y.dtype.itemsize > 8 else y)
    if kind in "biuU":
        return _Read(y)
    if kind == "T":  # NumPy's text of any length
        return _read_objects(y.astype(object))
    example = y.ravel()[0] if y.size else y.dtype
    raise ValueError(_not_a_target(_DTYPES.get(kind, str(y.dtype)), example, 0))


_DTYPES = {"S": "bytes", "M": "date", "m": "time span", "c": "complex number", "V": "record"}


def _read_objects(y: NDArray[Any]) -> _Read:
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
            f"Targets must be as many for each example. Received: {_short(flat[kinds['list']])} in "
            f"example {kinds['list']} (counted from 0), beside others."
        )
    width = y.size // max(len(y), 1)
    numeric = {"whole number", "number", "fraction"}
    if kinds.keys() <= numeric:
        if kinds.keys() == {"whole number"}:
            return _Read(_whole([int(value) for value in flat]).reshape(y.shape))
        exact = "fraction" in kinds
        return _Read(np.array([float(v) for v in flat]).reshape(y.shape), exact=exact)
    if len(kinds) > 1:
        (one, at), (other, there) = sorted(kinds.items(), key=lambda item: item[1])[:2]
        raise ValueError(
            f"Targets must be of one type. Received: {one} ({_short(flat[at])} in example "
            f"{at // width}) and {other} ({_short(flat[there])} in example {there // width}, "
            f"counted from 0)."
        )
    (kind,) = kinds
    if kind == "boolean":
        return _Read(y.astype(bool))
    if kind == "text":
        plain = np.empty(len(flat), dtype=object)
        plain[:] = [str.__str__(value) for value in flat]
        return _Read(plain.reshape(y.shape))
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


def _not_a_target(kind: str, value: Any, example: int) -> str:
    advice = (
        "y.astype(str) makes text of an array of them."
        if kind == "bytes"
        else "Make them text for classes (y.astype(str)), or numbers for a regression (of dates: "
        "the days since one of them)."
    )
    return (
        f"Targets must be text, booleans or numbers: other labels cannot be kept with a model. "
        f"Received: {kind}, such as {_short(value)} in example {example}. {advice}"
    )


def _refuse_missing(missing: NDArray[Any]) -> None:
    rows = np.flatnonzero(missing)
    shown = ", ".join(map(str, rows[:5].tolist())) + (", …" if len(rows) > 5 else "")
    raise ValueError(
        f"Each example must have a target. Received: none in {len(rows):,} of {len(missing):,} "
        f"examples: {shown} (counted from 0). Drop them first."
    )


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
