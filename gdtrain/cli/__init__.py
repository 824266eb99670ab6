"""The command line: `gdtrain`, `gdtrain-compare`, …, and the scripts; --help tells exit codes.

Each ends the process with its exit code: 2 where a word of the user's is wrong.
"""

from __future__ import annotations

import os
import signal
import threading
from importlib import import_module
from types import FrameType

__all__ = [
    "compare_main",
    "evaluate_main",
    "explain_main",
    "find_lr_main",
    "landscape_main",
    "predict_main",
    "train_main",
]


def train_main() -> None:
    """Train from the command line."""
    _start("train", "train")


def compare_main() -> None:
    """Train contenders with several seeds, or read finished runs, and leave a report."""
    _start("compare", "compare")


def evaluate_main() -> None:
    """Print the test metrics of a checkpoint."""
    _start("tools", "evaluate")


def predict_main() -> None:
    """Write predictions for a file of examples."""
    _start("tools", "predict")


def find_lr_main() -> None:
    """Look for a learning rate by a range test."""
    _start("tools", "find_lr")


def explain_main() -> None:
    """Print one update in full."""
    _start("tools", "explain")


def landscape_main() -> None:
    """Draw the objective around a checkpoint."""
    _start("tools", "landscape")


def _start(module: str, command: str) -> None:
    """Run a command; Ctrl-C ends it at once for as long as it only imports and reads words."""
    main_thread = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        if main_thread:
            for number in before:
                signal.signal(number, _end)
        getattr(import_module(f"gdtrain.cli.{module}"), command)()
    finally:
        if main_thread:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(130)  # nothing is made yet; an exception may be swallowed by what is being imported
