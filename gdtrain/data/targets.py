"""What a target is: classes or numbers. All sources, `fit` and the Lightning module ask here.

N examples, K target columns, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gdtrain.data.frames import is_of, kind_of, listed, raw_array, series_array, shortened

if TYPE_CHECKING:
    from gdtrain.losses import Loss

__all__ = [
    "Decision",
    "Task",
    "check_numbers",
    "check_task",
    "class_numbers",
    "decide",
    "label_array",
    "may_be_classes",
    "read",
    "wanted_task",
]

Task = Literal["auto", "classification", "regression"]

_MOST_CLASSES = 32  # that whole numbers are taken for, unasked
_ENOUGH = 30  # examples of a class, to be taken for one
_SHARE = 5  # or as many as a fifth of those of the most frequent class
_SHOWN = 10  # labels in a message
_DTYPES = {"S": "bytes", "M": "date", "m": "time span", "c": "complex number", "V": "record"}


@dataclass(frozen=True)
class Decision:
    """What the targets are.

    `values`: labels (N,), or numbers (N,) or (N, K). `classes`: the labels, in the order of the
    class numbers; None: the targets are numbers, which may be standardised if `standardize`.
    """

    values: NDArray[Any]
    classes: list[Any] | None
    standardize: bool
    said: str


def check_task(task: Any) -> Task:
    """Raise on a word that names no task."""
    if task not in ("auto", "classification", "regression"):
        raise ValueError(
            f"task must be auto, classification or regression. Received: task={task!r}."
        )
    return task


def decide(values: Any, task: Task = "auto", loss: Loss | None = None) -> Decision:
    """Classes or numbers, (N,), (N, 1) or (N, K), in an array, tensor, list, Series or DataFrame.

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
    """
    check_task(task)
    wanted, because = wanted_task(task, loss)
    found = _read(values)
    y = found.values
    if not len(y):
        raise ValueError("Targets must be those of at least one example. Received: none.")
    words = y.dtype.kind in "OU"
    if wanted == "regression":
        if words:
            raise ValueError(
                f"A regression needs numbers as targets{because}. Received: text, such as "
                f"{shortened(y.ravel()[0])}. task=classification takes it as classes."
            )
        return _numbers(y, loss, because)
    if y.ndim > 1:
        return _columns(found, wanted, loss, because)
    if wanted is None and not words and not found.nominal and y.dtype.kind != "b":
        if found.exact or not _looks_like_classes(y):
            return _numbers(y, loss)
    elif loss is not None and task == "auto" and not words and not _is_whole(y):
        return _numbers(y, loss)  # which the loss will refuse, in its own words
    check_numbers(y)
    classes = np.unique(y).tolist()
    if len(classes) < 2:
        raise ValueError(
            f"There must be at least two classes. Received: {len(y)} examples of the class "
            f"{shortened(classes[0])}."
        )
    other = ""
    if wanted is None and y.dtype.kind in "iuf":
        other = "; task=regression would make them numbers"
    return Decision(y, classes, False, f"target: {_classes_said(classes)}{because}{other}")


def class_numbers(values: Any, classes: list[Any]) -> NDArray[np.int64]:
    """The number of each label (or one-hot row) among the classes, (N,)."""
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
        f"Labels must be among those of the training data, {listed(classes, _SHOWN)}. "
        f"Received: {shortened(unknown)}."
    )


def label_array(classes: list[Any]) -> NDArray[Any]:
    """Labels as an array, to be picked from."""
    whole = all(type(label) is int for label in classes)
    return _whole(classes) if whole else np.asarray(classes)


# ---------------------------------------------------------------------- what was meant


def wanted_task(
    task: Task, loss: Loss | None
) -> tuple[Literal["classification", "regression"] | None, str]:
    """What is asked for (None: nothing), and by which loss, in words for a message."""
    if task != "auto":
        return task, ""
    if loss is None:
        return None, ""
    kind = "regression" if loss.task == "regression" else "classification"
    return kind, f", for {type(loss).__name__}"  # type: ignore[return-value]


def may_be_classes(y: NDArray[Any]) -> bool:
    """Whether some of the targets, seen alone, may be classes: whole numbers, or 0 and 1."""
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


def _columns(found: _Values, wanted: str | None, loss: Loss | None, because: str) -> Decision:
    """Several columns, which are not known to be numbers."""
    y = found.values
    if y.dtype.kind not in "OU" and _is_one_hot(y):
        labels = found.names if found.names is not None else list(range(y.shape[1]))
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


# ---------------------------------------------------------------------- targets as they come


@dataclass
class _Values:
    """Targets, read: text, booleans or numbers (N,), or numbers (N, K).

    `nominal`: they are categories of pandas. `exact`: some are fractions or decimals. `names`: of
    K columns.
    """

    values: NDArray[Any]
    nominal: bool = False
    exact: bool = False
    names: list[Any] | None = None


def read(values: Any) -> NDArray[Any]:
    """Targets, as `decide` takes them: text (object or str), booleans or numbers, (N,) or (N, K).

    Raises where they are missing, of several types, or of a type that is neither.
    """
    return _read(values).values


def check_numbers(y: NDArray[Any]) -> None:
    """Raise, with its row, on a number that is not finite."""
    if y.dtype.kind != "f" or np.isfinite(y).all():
        return
    rows = np.flatnonzero(~np.isfinite(y.reshape(len(y), -1)).all(1))
    more = f", and such in {len(rows) - 1:,} more" if len(rows) > 1 else ""
    raise ValueError(
        f"Targets must be finite numbers. Received: {y[rows[0]]} in example {rows[0]} (counted "
        f"from 0){more}."
    )


def _read(values: Any) -> _Values:
    found = _read_as_it_is(values)
    y = found.values
    if y.ndim == 2 and y.shape[1] == 1:
        found.values = y[:, 0]
    elif y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise ValueError(
            f"Targets must be one or several for each example, (N,) or (N, K), K >= 1. "
            f"Received: shape {y.shape}."
        )
    return found


def _read_as_it_is(values: Any) -> _Values:
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
            try:
                values = np.array(values, dtype=object)
            except ValueError:
                raise ValueError(
                    "Targets must be as many for each example. Received: lists of different "
                    "lengths."
                ) from None
    return _read_array(raw_array(values))


def _read_pandas(values: Any) -> _Values:
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
        whole = all(kind_of(name) == "whole number" for name in values.columns)
        names = [int(name) if whole else str(name) for name in values.columns]
        return _Values(np.stack([column.values for column in columns], axis=1), names=names)
    series = pd.Series(values)
    if series.isna().any() and series.dtype != np.dtype("float64"):
        _refuse_missing(series.isna().to_numpy())
    found = _read_array(series_array(series))
    found.nominal = isinstance(series.dtype, pd.CategoricalDtype)
    return found


def _read_array(y: NDArray[Any]) -> _Values:
    kind = y.dtype.kind
    if kind in "OT":  # T: NumPy's text of any length
        return _read_objects(y.astype(object, copy=False))
    if kind == "f":
        return _Values(y.astype(np.float64) if y.dtype.itemsize > 8 else y)
    if kind in "biuU":
        return _Values(y)
    example = y.ravel()[0] if y.size else y.dtype
    raise ValueError(_not_a_target(_DTYPES.get(kind, str(y.dtype)), example))


def _read_objects(y: NDArray[Any]) -> _Values:
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
        place = kinds["list"]
        raise ValueError(
            f"Targets must be as many for each example. Received: {shortened(flat[place])} in "
            f"example {place} (counted from 0), beside others."
        )
    width = y.size // max(len(y), 1)
    if kinds.keys() <= {"whole number", "number", "fraction"}:
        if kinds.keys() == {"whole number"}:
            return _Values(_whole([int(value) for value in flat]).reshape(y.shape))
        exact = "fraction" in kinds
        return _Values(np.array([float(v) for v in flat]).reshape(y.shape), exact=exact)
    if len(kinds) > 1:
        (one, at), (other, there) = sorted(kinds.items(), key=lambda item: item[1])[:2]
        raise ValueError(
            f"Targets must be of one type. Received: {one} ({shortened(flat[at])} in example "
            f"{at // width}) and {other} ({shortened(flat[there])} in example {there // width}, "
            f"counted from 0)."
        )
    (kind,) = kinds
    if kind == "boolean":
        return _Values(y.astype(bool))
    if kind == "text":
        plain = np.empty(len(flat), dtype=object)
        plain[:] = [str.__str__(value) for value in flat]
        return _Values(plain.reshape(y.shape))
    raise ValueError(_not_a_target(kind, flat[0]))


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


# ---------------------------------------------------------------------- messages


def _not_a_target(kind: str, value: Any) -> str:
    advice = (
        "y.astype(str) makes text of an array of them."
        if kind == "bytes"
        else "Make them text for classes (y.astype(str)), or numbers for a regression (of dates: "
        "the days since one of them)."
    )
    return (
        f"Targets must be text, booleans or numbers: other labels cannot be kept with a model. "
        f"Received: {kind}, such as {shortened(value)} in example 0. {advice}"
    )


def _refuse_missing(missing: NDArray[Any]) -> None:
    rows = np.flatnonzero(missing)
    shown = ", ".join(map(str, rows[:5].tolist())) + (", …" if len(rows) > 5 else "")
    raise ValueError(
        f"Each example must have a target. Received: none in {len(rows):,} of {len(missing):,} "
        f"examples: {shown} (counted from 0). Drop them first."
    )


def _classes_said(classes: list[Any]) -> str:
    return f"{len(classes)} classes ({listed(classes, _SHOWN, total=False)})"
