"""A number's range: stated once, checked and printed by one class. Imports no torch."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Interval", "Whole"]


@dataclass(frozen=True)
class Interval:
    """An interval of real numbers, which checks a number and prints itself.

    Args:
        low: Least number, may be −∞.
        high: Greatest, may be ∞.
        closed: Which of the two ends belong to it. An infinite end never does.

    Example:
        >>> Interval(0, math.inf, closed="left").check("lr", -0.5)
        Traceback (most recent call last):
        ...
        ValueError: lr must be a number in [0, ∞). Received: lr=-0.5.
    """

    low: float
    high: float
    closed: Literal["neither", "left", "right", "both"] = "neither"

    def __str__(self) -> str:
        """In mathematical notation, as docstrings have it."""
        left = "[" if self.closed in ("left", "both") and math.isfinite(self.low) else "("
        right = "]" if self.closed in ("right", "both") and math.isfinite(self.high) else ")"
        return f"{left}{_end(self.low)}, {_end(self.high)}{right}"

    def __contains__(self, value: float) -> bool:
        """Whether a finite number lies in it; NaN and ±∞ do in none."""
        above = value >= self.low if self.closed in ("left", "both") else value > self.low
        below = value <= self.high if self.closed in ("right", "both") else value < self.high
        return math.isfinite(value) and above and below

    def check(self, name: str, value: Any) -> float:
        """The number as a float, if it is a real one (of Python or NumPy; no bool, no text) in it.

        Else a ValueError names the argument.
        """
        number = _real(value)
        if number is None or number not in self:
            raise ValueError(f"{name} must be a number in {self}. Received: {name}={value!r}.")
        return number


@dataclass(frozen=True)
class Whole:
    """The whole numbers from one to another, both included.

    Args:
        low: The least.
        high: The greatest; None: there is none.
    """

    low: int
    high: int | None = None

    def __str__(self) -> str:
        """In words."""
        if self.high is None:
            return f"a whole number of at least {self.low}"
        return f"a whole number from {self.low} to {self.high}"

    def check(self, name: str, value: Any) -> int:
        """The number as an int, if it is a whole one (of Python or NumPy; no bool) in the range.

        Else a ValueError names the argument.
        """
        try:
            number = None if _is_bool(value) else operator.index(value)
        except TypeError:
            number = None
        if number is None or number < self.low or (self.high is not None and number > self.high):
            raise ValueError(f"{name} must be {self}. Received: {name}={value!r}.")
        return number


def _end(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:g}"


def _is_bool(value: Any) -> bool:
    return type(value).__name__ in ("bool", "bool_") or str(getattr(value, "dtype", "")) in (
        "bool",
        "torch.bool",
    )


def _real(value: Any) -> float | None:
    if isinstance(value, str | bytes | complex) or _is_bool(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
