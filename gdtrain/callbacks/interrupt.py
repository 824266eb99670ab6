"""Ctrl-C, or a polite kill, ends a run in good order."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from gdtrain.module import SupervisedModule
from gdtrain.stopping import Stop, StopReason

__all__ = ["Interrupt"]


class Interrupt(Callback):
    """At the first SIGINT or SIGTERM, stops after the sweep at hand: the run can go on later.

    The second ends it at once. No state.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[Interrupt()], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        if trainer.world_size > 1:  # ranks that stop at different updates would wait for each other
            return
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: FrameType | None) -> None:
            self._give_back()
            module = cast(SupervisedModule, pl_module)
            module.stop = Stop(
                StopReason.INTERRUPTED,
                "Interrupted. ckpt_path=…/checkpoints/last.ckpt goes on with this run.",
            )
            trainer.should_stop = True

        for number in self._before:
            signal.signal(number, stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
