"""One line that tells how a run is doing."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gdtrain.lightning.module import SupervisedModule
from gdtrain.ranges import Interval

__all__ = ["ProgressLine"]


class ProgressLine(Callback):
    """A Rich progress bar over updates: epoch, updates/s, loss and η. Only on a terminal.

    No state.

    Args:
        seconds_between: Time between two looks at the numbers, range (0, ∞).

    Example:
        >>> callback = ProgressLine(seconds_between=1.0)
    """

    def __init__(self, seconds_between: float = 0.2) -> None:
        self.seconds_between = Interval(0, math.inf).check("seconds_between", seconds_between)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._looked, self._updates = 0.0, 0
        self._loss = float("nan")

    def next_update(self, update: int) -> int | None:
        """None: wherever sweeps end will do."""
        return None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Draw the bar."""
        console = Console(stderr=True)
        if not console.is_terminal or not trainer.is_global_zero:
            return
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} updates"),
            TextColumn("{task.fields[speed]:,.0f}/s"),
            TextColumn("loss {task.fields[loss]:.4g}"),
            TextColumn("η {task.fields[rate]:.3g}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=5,
        )
        self._task = self._progress.add_task("", total=None, **self._fields(pl_module, 0.0))
        self._looked, self._updates = time.monotonic(), trainer.global_step
        self._progress.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Renew the numbers, if they are old."""
        elapsed = time.monotonic() - self._looked
        if self._progress is None or elapsed < self.seconds_between:
            return
        module: SupervisedModule = pl_module
        speed = (module.updates - self._updates) / elapsed
        self._loss = float(outputs["losses"].mean())
        self._progress.update(
            self._task,
            total=module.total_updates,  # the module knows it from the first batch on
            completed=module.updates,
            **self._fields(module, speed),
        )
        self._looked, self._updates = time.monotonic(), module.updates

    def _fields(self, module: SupervisedModule, speed: float) -> dict[str, Any]:
        return {
            "epoch": module.updates // module.updates_per_epoch,
            "speed": speed,
            "loss": self._loss,
            "rate": float(module.trainer.optimizers[0].param_groups[0]["lr"]),
        }

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Take the bar away."""
        self.on_train_end(trainer, pl_module)
