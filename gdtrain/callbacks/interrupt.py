"""Ctrl-C, or a polite kill, ends a run in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning import Callback, Trainer

from gdtrain.descent.stopping import Stop, StopReason

__all__ = ["Interrupt", "OwnSignals", "as_keyboard_interrupt"]


class Interrupt(Callback):
    """At the first SIGINT or SIGTERM, stops after the sweep at hand: the run can go on later.

    The second ends it at once. No state.

    Example:
        >>> callback = Interrupt()
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take over the signals."""
        # Ranks that stop at different updates would wait for each other.
        if trainer.world_size > 1 or not _in_main_thread():
            return
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: FrameType | None) -> None:
            self.on_train_end(trainer, pl_module)
            goes_on = " ckpt_path=…/checkpoints/last.ckpt goes on with this run."
            kept = bool(trainer.checkpoint_callbacks)
            pl_module.stop = Stop(StopReason.INTERRUPTED, f"Interrupted.{goes_on if kept else ''}")
            trainer.should_stop = True

        for number in self._before:
            signal.signal(number, stop)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self.on_train_end(trainer, pl_module)


class OwnSignals(Callback):
    """Leaves SIGTERM to the program: Lightning's own handler ends a run later, with exit code 0."""

    def __init__(self) -> None:
        self._before = signal.getsignal(signal.SIGTERM)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Any) -> None:
        """As `on_train_start`, for whoever lets a check of the validation come first."""
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Put back the handler that was there when this was made."""
        # None: a handler that was not set from Python, and cannot be
        if trainer.world_size == 1 and _in_main_thread() and self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if trainer.received_sigterm:  # it came before
                signal.raise_signal(signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Let Ctrl-C out as KeyboardInterrupt, where Lightning makes an exit with code 1 of it."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
