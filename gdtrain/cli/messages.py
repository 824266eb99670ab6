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

__all__ = ["EXIT_CODES", "complain", "heard", "listen", "one_message", "shown"]

EXIT_CODES = {"DIVERGED": 3, "NON_FINITE": 3, "INTERRUPTED": 130}


def complain(text: str, where: str = "") -> int:
    """Print what was wrong, once for all processes of a run.

    Args:
        text: For the user.
        where: Which run of several.

    Returns:
        The exit code, 2.

    Example:
        >>> complain("optimizer.lr must be > 0.")
        2
    """
    if is_first_process():
        print(f"error{where}: {text}", file=sys.stderr)
    return 2


@contextmanager
def one_message() -> Iterator[None]:
    """End the process with one message, and no traceback, where the command was wrong.

    Example:
        >>> with one_message():
        ...     raise ConfigurationError("optimizer.lr must be > 0.")
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(EXIT_CODES["INTERRUPTED"])
    except MemoryError as error:
        sys.exit(complain(f"There is not enough memory: {_first_line(error)}."))
    except (
        ValueError,
        OSError,
        TypeError,
        HydraException,
        OmegaConfBaseException,
        YAMLError,
    ) as error:
        sys.exit(complain(heard(error)))


def heard(error: BaseException) -> str:
    """Hydra's message, or another, said for a user: what was wrong, and what there is.

    Args:
        error: What came.

    Returns:
        One sentence or a few.

    Example:
        >>> heard(ConfigurationError("optimizer.lr must be > 0."))
        'optimizer.lr must be > 0.'
    """
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    if isinstance(error, ConfigurationError) or type(error) is ValueError:  # our own words
        return text
    group = re.search(r"Could not find '([^']+)'", text)
    if group:
        name, _, value = group.group(1).rpartition("/")
        listed = text.partition("Config search path")[0]
        options = re.findall(r"^\t(\S+)", listed, re.MULTILINE)
        if not options:
            return (
                f"There is no {group.group(1)}: expected a choice of one of the groups. See --help."
            )
        hint = closest(value, options)
        return f"There is no {name}={value}.{hint} There are: {', '.join(sorted(options))}."
    if isinstance(error, InterpolationKeyError):
        missing = re.search(r"Interpolation key '([^']*)'", text)
        key = getattr(error, "full_key", None) or "A value"
        name = missing.group(1) if missing else "…"
        return f"{key} refers to ${{{name}}}, and there is no key {name}. --cfg job shows all keys."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be read or written: {error.strerror}."
    twice = re.search(r"(\S+) appears more than once in the final defaults list", text)
    if twice:
        name = twice.group(1)
        return f"{name} has a choice already. To choose another, leave out the +: {name}=…"
    multiple = re.search(r"Multiple values for ([^.]+)\.", text)
    if multiple:
        return f"{multiple.group(1)} was given twice. Give it once."
    first = text.splitlines()[0] if text else type(error).__name__
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key and str(key) not in first else first


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "none is left").splitlines()[0].rstrip(".")


def listen(log: bool = True, signals: bool = True) -> None:
    """From here on there may be something to put in order: Ctrl-C and a polite kill interrupt.

    Shows, too, warnings without the line of code that gave them.

    Args:
        log: Whether to show what gdtrain says on its log: which engine was chosen, and the like.
        signals: False in a launcher's worker, which the launcher ends by signals of its own.

    Example:
        >>> listen()
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
    """A folder as a user writes it: from here, where it is below.

    Args:
        folder: The folder.

    Returns:
        Its path.

    Example:
        >>> shown(Path.cwd() / "outputs")
        'outputs'
    """
    try:
        return str(folder.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
