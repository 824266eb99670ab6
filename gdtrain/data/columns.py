"""Columns of a table: text as numbers or labels, and what is wrong where it is neither."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "TEXT",
    "column_numbers",
    "column_targets",
    "is_number",
    "listed",
    "look_like_values",
    "quoted",
    "reason",
]

Kind = Literal["auto", "labels", "numbers", "text"]

_EXACT = 2**53  # float64 has every whole number up to here
_MISSING = frozenset(
    ["", "na", "n/a", "<na>", "nan", "-nan", "nat", "null", "none", "?"]
    + [f"#{word}" for word in ("n/a", "div/0!", "num!", "value!", "ref!", "name?")]  # Excel's
)
TEXT = "Encode text as numbers."
_FILL = "Fill in or drop missing values first."
_PLAIN = "Write numbers with a point and nothing else, as in 1234.5."


def column_numbers(column: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A column of pandas as float64, and which of its values are no finite number."""
    import pandas as pd

    if column.dtype.kind in "biuf":
        values = column.to_numpy(dtype=np.float64)
    else:
        text = column.astype(str).str.strip().str.lower()
        switches = text.map({"true": 1.0, "false": 0.0})
        if switches.notna().any() and (switches.notna() | text.isin(_MISSING)).all():
            values = switches.to_numpy(dtype=np.float64)
        else:
            values = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(values)
    if column.dtype.kind != "f" and (np.abs(values[~bad]) >= _EXACT).any():
        for row in np.flatnonzero(~bad & (np.abs(values) >= _EXACT)):
            written = str(column.iloc[row]).strip()
            whole = re.fullmatch(r"[+-]?\d+", written)
            bad[row] = whole is not None and int(written) != int(values[row])
    return values, bad


def column_targets(column: Any, kind: Kind) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A column of pandas as numbers or labels, and which of its values are none."""
    if column.dtype.kind in "biuf":
        values = column.to_numpy()
        return values, ~np.isfinite(values)
    text = column.astype(str).str.strip()
    labels = text.to_numpy(dtype=object)
    empty = labels == ""
    if kind == "text":
        return labels, empty
    numbers, bad = column_numbers(column)
    bad = ~np.isfinite(numbers)
    if kind == "numbers":
        return numbers, bad
    missing = text.str.lower().isin(_MISSING).to_numpy()
    if not missing.all() and not (bad & ~missing).any():
        return numbers, bad
    if kind == "auto" and not missing.all():
        words = text[~missing & bad]
        alike = all(is_decorated(word) for word in words.unique())
        if alike or (2 * len(words) < len(text) and text.nunique() > 20):
            return labels, bad
    return labels, empty


def reason(value: str) -> tuple[str, str]:
    """Why a value of a table is no finite number, and what to do about it."""
    if not value:
        return "empty", _FILL
    shown = quoted(value)
    if value.lower() in _MISSING:
        return f"{shown}, a missing value", _FILL
    if is_number(value):
        if "inf" in value.lower():
            return f"{shown}, which is not finite", _FILL
        if not np.isfinite(float(value)):
            return f"{shown}, beyond float64", "Divide such numbers by a constant first."
        return (
            f"{shown}, which float64 rounds: it has whole numbers up to 2^53 only",
            "Subtract a constant from such numbers first, or leave them out if they name things.",
        )
    if is_decorated(value):
        return f"{shown}, with a decimal comma, a separator or a unit", _PLAIN
    return f"{shown}, which is text", TEXT


def is_number(text: str) -> bool:
    """Whether a text is a number as tables write them."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # Python's own


def is_decorated(text: str) -> bool:
    """Whether it is a number with a decimal comma, separators of thousands, or a unit's sign."""
    bare = re.sub("[\\s\u00a0\u202f'’$€£¥%]", "", text).replace(",", ".").replace("−", "-")
    return re.fullmatch(r"[+-]?\d+(\.\d+)*(e[+-]?\d+)?", bare, re.IGNORECASE) is not None


def look_like_values(names: list[str]) -> bool:
    """Whether columns' names look like the values of an example.

    They do if half of them are numbers; but not if text stands beside 0, 1, 2, … or 1990, 1991, ….
    """
    numbers = [float(name) for name in names if is_number(name)]
    if len(numbers) < len(names) and len(numbers) > 1 and set(np.diff(numbers)) == {1.0}:
        return False
    return 2 * len(numbers) >= len(names)


def quoted(value: str | bytes, most: int = 60) -> str:
    """As Python writes it, and not longer than a line."""
    return repr(value if len(value) <= most else value[:most]) + "…" * (len(value) > most)


def listed(names: list[str], most: int = 20) -> str:
    """Names for a message: the first ones, and how many more there are."""
    shown = ", ".join(quoted(name) for name in names[:most])
    return shown + f" and {len(names) - most} more" * (len(names) > most)
