"""Hydra's grammar of overrides, its flags, and its split of a sweep: none has a public name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

__all__ = [
    "Override",
    "flag_parser",
    "function_names",
    "in_quotes",
    "is_text",
    "parse_override",
    "sweep",
]


def parse_override(word: str) -> Override | None:
    """A word as Hydra reads it; None: it cannot.

    Args:
        word: Such as "seed=1".

    Example:
        >>> parse_override("seed=1").value(), parse_override("model.hidden=[64")
        (1, None)
    """
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError):  # ValueError: thousands of digits
        return None


def in_quotes(value: str) -> str:
    """A text as it must stand in an override to be taken as it is.

    Args:
        value: The text.

    Example:
        >>> in_quotes("price ($)")
        "'price ($)'"
    """
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def is_text(value: Any) -> bool:
    """Whether the value of an override is a text.

    Args:
        value: Of an `Override`.

    Example:
        >>> is_text(parse_override("model='cnn'").value()), is_text(7)
        (True, False)
    """
    return isinstance(value, str | QuotedString)


def function_names() -> list[str]:
    """What may be called in a value, such as range(0,3).

    Example:
        >>> "choice" in function_names()
        True
    """
    return list(create_functions().functions)


def flag_parser() -> argparse.ArgumentParser:
    """The parser of Hydra's flags.

    Example:
        >>> flag_parser().parse_args(["-m", "seed=0,1"]).multirun
        True
    """
    return get_args_parser()


def sweep(overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of each run of a sweep.

    Args:
        overrides: Parsed.

    Example:
        >>> sweep([parse_override("seed=0,1")])
        [['seed=0'], ['seed=1']]
    """
    batches = BasicSweeper.split_arguments(list(overrides), max_batch_size=None)
    return [list(job) for batch in batches for job in batch]
