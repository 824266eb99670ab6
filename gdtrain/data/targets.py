"""What a target is: classes or numbers. All sources, `fit` and the Lightning module ask here.

N examples, K target columns, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gdtrain.data.target_values import (
    Values,
    check_numbers,
    label_array,
    read,
    read_values,
    shortened,
)

if TYPE_CHECKING:
    from gdtrain.losses import Loss

__all__ = [
    "Decision",
    "Task",
    "check_task",
    "class_numbers",
    "decide",
    "may_be_classes",
    "wanted_task",
]

Task = Literal["auto", "classification", "regression"]

_MOST_CLASSES = 32  # that whole numbers are taken for, unasked
_ENOUGH = 30  # examples of a class, to be taken for one
_SHARE = 5  # or as many as a fifth of those of the most frequent class
_SHOWN = 10  # labels in a message


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
    read_ = read_values(values)
    y = read_.values
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
            f"{shortened(classes[0])}."
        )
    other = ""
    if wanted is None and y.dtype.kind in "iuf":
        other = "; task=regression would make them numbers"
    return Decision(y, classes, False, f"target: {_classes_said(classes)}{because}{other}")


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
        f"Received: {shortened(unknown)}."
    )


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


def _columns(read_: Values, wanted: str | None, loss: Loss | None, because: str) -> Decision:
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


def _listed(labels: Sequence[Any], total: bool = True) -> str:
    shown = ", ".join(shortened(label) for label in labels[:_SHOWN])
    if len(labels) <= _SHOWN:
        return shown
    return f"{shown}, … ({len(labels)} in all)" if total else f"{shown}, …"
