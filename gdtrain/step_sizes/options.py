"""The options of rules: their ranges."""

from __future__ import annotations

from math import inf
from typing import Any

from gdtrain.ranges import Interval

__all__ = ["known_fraction", "option", "optional"]


def option(
    name: str, value: float, low: float, high: float = inf, closed: Any = "neither"
) -> float:
    """An option of a rule that lies in its interval; NumPy's numbers become Python's.

    Args:
        name: Of the option.
        value: What was given.
        low: Least number.
        high: Greatest.
        closed: Which ends belong to the interval.

    Returns:
        It, an int where it was one.

    Raises:
        ValueError: It lies outside.

    Example:
        >>> option("c", 0.5, 0, 1)
        0.5
    """
    number = Interval(low, high, closed).check(name, value)
    return value if type(value) is int else number


def optional(
    name: str, value: float | None, low: float, high: float = inf, closed: Any = "neither"
) -> float | None:
    """An option, as `option`, that may be left out.

    Args:
        name: Of the option.
        value: What was given, or None.
        low: Least number.
        high: Greatest.
        closed: Which ends belong to the interval.

    Raises:
        ValueError: It lies outside.

    Example:
        >>> optional("cap", None, 0) is None
        True
    """
    return None if value is None else option(name, value, low, high, closed)


def known_fraction(own: float | None, told: float | None) -> float:
    """B/N: a rule's own option, or what the optimizer knows.

    Args:
        own: The option.
        told: What the optimizer knows.

    Returns:
        B/N, range (0, 1].

    Raises:
        ValueError: Neither is known.

    Example:
        >>> known_fraction(None, 0.25)
        0.25
    """
    fraction = told if own is None else own
    if fraction is None:
        raise ValueError(
            "This rule needs to know B/N, the part of the data in one update. Construct it with "
            "batch_fraction=B/N."
        )
    return fraction
