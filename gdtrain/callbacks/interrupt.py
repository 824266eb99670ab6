"""Ctrl-C ends a run in good order."""

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
    """At the first SIGINT, stops after the sweep at hand, so that the run can be resumed.

    The second ends it at once. No state.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[Interrupt()], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signal."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._before = signal.getsignal(signal.SIGINT)

        def stop(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, self._before)
            module = cast(SupervisedModule, pl_module)
            module.stop = Stop(
                StopReason.INTERRUPTED,
                "Interrupted. ckpt_path=…/checkpoints/last.ckpt goes on with this run.",
            )
            trainer.should_stop = True

        signal.signal(signal.SIGINT, stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signal back."""
        self._give_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signal back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
