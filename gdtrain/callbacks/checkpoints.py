"""The best and the last checkpoint of a run."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint

from gdtrain.data.checkpoint_reading import load_checkpoint
from gdtrain.lightning.module import SupervisedModule
from gdtrain.ranges import Interval

__all__ = ["BestAndLast"]


class BestAndLast(Checkpoint):
    """Keeps `best.ckpt`, of the lowest validation loss, and `last.ckpt`.

    A file is written beside its place and then put there in one move, so that a run that dies, or a
    full disk, leaves the checkpoint before. A model that is not finite is never saved. State in
    checkpoints: the best value.

    Args:
        directory: Where to; made when the first is saved.
        monitor: Metric that the best has lowest.
        seconds_between: `last.ckpt` is renewed if it is older, range [0, ∞); and at the end.

    Example:
        >>> BestAndLast("checkpoints").last_path.name
        'last.ckpt'
    """

    needs_every_epoch = False  # only those with a validation, and the clock

    def __init__(
        self, directory: str | Path, monitor: str = "loss/val", seconds_between: float = 30.0
    ) -> None:
        self.directory = Path(directory)
        self.best_path, self.last_path = self.directory / "best.ckpt", self.directory / "last.ckpt"
        self.monitor = monitor
        seconds = Interval(0, math.inf, "left")
        self.seconds_between = seconds.check("seconds_between", seconds_between)
        self.best_value = math.inf
        self._last_saved = time.monotonic()
        self._last_update = -1

    def next_update(self, update: int) -> int | None:
        """None: wherever sweeps end will do."""
        return None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock; all ranks save together, whatever lies in their folders."""
        self.best_value = trainer.strategy.broadcast(self.best_value)
        self._last_saved = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the best if it is better, the last if it is old."""
        if _spoilt(pl_module):
            return
        self._save_if_best(trainer, pl_module)
        old = time.monotonic() - self._last_saved > self.seconds_between
        if trainer.strategy.broadcast(old):  # all ranks save together
            self._save_last(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Save the last if it is old: epochs of one-example descent can be long."""
        if trainer.world_size > 1:  # not worth an agreement of the ranks at each sweep
            return
        if pl_module.next_validation(pl_module.updates - 1) == pl_module.updates:
            return  # it comes next, and belongs to what is saved
        old = time.monotonic() - self._last_saved > max(self.seconds_between, 1.0)
        if old and not _spoilt(pl_module):
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the last, and the best if that is it."""
        if _spoilt(pl_module):
            return
        self._save_if_best(trainer, pl_module)
        if self._last_update != trainer.global_step:
            self._save_last(trainer)

    def _save_if_best(self, trainer: Trainer, module: SupervisedModule) -> None:
        if module.validated_at != module.updates:
            return
        value = module.validation.get(self.monitor, math.nan)
        if value < self.best_value:
            self.best_value = value
            self._save(trainer, self.best_path)

    def take_over(self, checkpoint: Path) -> None:
        """Keep the best checkpoint of the run that `checkpoint` is of, until there is a better."""
        best = checkpoint.parent / "best.ckpt"
        if not best.is_file() or best.resolve() == self.best_path.resolve():
            return
        updates = [load_checkpoint(path)["gdtrain"].get("updates") for path in (best, checkpoint)]
        if all(isinstance(n, int) for n in updates) and updates[0] <= updates[1]:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(best, self.best_path)

    def _save_last(self, trainer: Trainer) -> None:
        self._save(trainer, self.last_path)
        self._last_saved = time.monotonic()
        self._last_update = trainer.global_step

    def _save(self, trainer: Trainer, path: Path) -> None:
        new = path.with_name(f".{path.name}.new")
        trainer.save_checkpoint(new)  # makes the folder
        if trainer.is_global_zero:
            os.replace(new, path)

    def state_dict(self) -> dict[str, Any]:
        """The best value."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; a folder without a best checkpoint gets the next one."""
        if self.best_path.exists():
            self.best_value = state_dict["best_value"]


def _spoilt(module: SupervisedModule) -> bool:
    """Whether a parameter or buffer is not finite: such a model is never saved."""
    return not module.loop.watched.is_finite()
