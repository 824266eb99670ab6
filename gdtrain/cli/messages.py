"""What the user reads, but for results: one message for what was wrong."""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from yaml import YAMLError

from gdtrain.errors import ConfigurationError
from gdtrain.lightning.launch import is_first_process
from gdtrain.runs.configuration import closest

__all__ = ["EXIT_CODES", "explain_error", "one_message", "report_error", "set_up_process", "shown"]

EXIT_CODES = {"DIVERGED": 3, "NON_FINITE": 3, "INTERRUPTED": 130}


def report_error(text: str, where: str = "") -> int:
    """Print what was wrong, once for all processes of a run; returns the exit code."""
    if is_first_process():
        print(f"error{where}: {text}", file=sys.stderr)
    return 2


@contextmanager
def one_message() -> Iterator[None]:
    """End the process with one message, and no traceback, where the command was wrong."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(EXIT_CODES["INTERRUPTED"])
    except MemoryError as error:
        first = (str(error).strip() or "none is left").splitlines()[0].rstrip(".")
        sys.exit(report_error(f"There is not enough memory: {first}."))
    except (
        ValueError,
        OSError,
        TypeError,
        HydraException,
        OmegaConfBaseException,
        YAMLError,
    ) as error:
        sys.exit(report_error(explain_error(error)))


def explain_error(error: BaseException) -> str:
    """Hydra's message, or another, said for a user: what was wrong, and what there is."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    if isinstance(error, ConfigurationError) or type(error) is ValueError:  # our own words
        return text
    if group := re.search(r"Could not find '([^']+)'", text):
        name, _, value = group[1].rpartition("/")
        listed = text.partition("Config search path")[0]
        options = re.findall(r"^\t(\S+)", listed, re.MULTILINE)
        if not options:
            return f"There is no {group[1]}: expected a choice of one of the groups. See --help."
        hint = closest(value, options)
        return f"There is no {name}={value}.{hint} There are: {', '.join(sorted(options))}."
    if isinstance(error, InterpolationKeyError):
        missing = re.search(r"Interpolation key '([^']*)'", text)
        key = getattr(error, "full_key", None) or "A value"
        name = missing[1] if missing else "…"
        return f"{key} refers to ${{{name}}}, and there is no key {name}. --cfg job shows all keys."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be read or written: {error.strerror}."
    if twice := re.search(r"(\S+) appears more than once in the final defaults list", text):
        name = twice[1]
        return f"{name} has a choice already. To choose another, leave out the +: {name}=…"
    if multiple := re.search(r"Multiple values for ([^.]+)\.", text):
        return f"{multiple[1]} was given twice. Give it once."
    first = text.splitlines()[0] if text else type(error).__name__
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key and str(key) not in first else first


def set_up_process(log: bool = True, signals: bool = True) -> None:
    """Show warnings without their line of code, and what gdtrain logs; let Ctrl-C interrupt.

    So does a polite kill; but not in a launcher's worker (`signals=False`), which the launcher ends
    by signals of its own.
    """
    logger = logging.getLogger("gdtrain")
    for handler in [h for h in logger.handlers if isinstance(h, _Screen)]:
        logger.removeHandler(handler)
    if log and not logger.handlers:
        logger.addHandler(_Screen())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    warnings.showwarning = _warn  # type: ignore[assignment]
    if signals and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)


class _Screen(logging.Handler):
    """Writes what is said to the error stream of the moment, which may be replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def shown(folder: Path) -> str:
    """A folder as a user writes it: from here, where it is below."""
    try:
        return str(folder.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
