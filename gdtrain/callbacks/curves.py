"""Loss curves: by update and by example, in TensorBoard, in metrics.csv and in memory."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary

from gdtrain.module import SupervisedModule

__all__ = ["History", "LossCurves"]

_LAYOUT = {
    "loss": {
        "training and validation": ["Multiline", ["loss/train", "loss/val"]],
        "by examples seen": ["Multiline", ["by_sample/loss/train", "by_sample/loss/val"]],
    },
    "rate": {"step size": ["Multiline", ["lr"]]},
}


@dataclass
class History:
    """A run in numbers: columns by name, one row for each logged point.

    Args:
        train: "update", "examples", "seconds", "loss" (mean since the row before) and "lr".
        val: "update", "examples", "seconds", and each validation metric by its tag.

    Example:
        >>> History().array("train", "loss")
        array([], dtype=float64)
    """

    train: dict[str, list[float]] = field(default_factory=dict)
    val: dict[str, list[float]] = field(default_factory=dict)

    def array(self, part: str, column: str) -> NDArray[np.float64]:
        """One column.

        Args:
            part: "train" or "val".
            column: Its name.
        """
        return np.asarray(getattr(self, part).get(column, []), dtype=np.float64)

    def append(self, part: str, row: dict[str, float]) -> None:
        """Add a row.

        Args:
            part: "train" or "val".
            row: Values by column.
        """
        for column, value in row.items():
            getattr(self, part).setdefault(column, []).append(value)


class LossCurves(Callback):
    """Writes the curves of a `SupervisedModule` to the trainer's loggers.

    Tags: `loss/train` (mean over the updates since the last point), `lr`, `loss/val`,
    `metric/<name>/val`, with the number of updates made as step; the losses again under
    `by_sample/…` with the number of examples seen as step, so that variants with different batch
    sizes lie over each other. Loggers other than TensorBoard get examples, epoch and seconds as
    columns instead.

    State in checkpoints: the unfinished point, the seconds so far, and the history.

    Args:
        points: About how many points the training curves get, range [1, ∞).

    Raises:
        ValueError: `points` is out of range.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[LossCurves(points=100)], logger=False,
        ...     enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self, points: int = 500) -> None:
        if isinstance(points, bool) or not isinstance(points, int) or points < 1:
            raise ValueError(f"points must be a whole number of at least 1. Received: {points!r}.")
        self.points = points
        self.history = History()
        self._sum, self._count = 0.0, 0
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since training started, over all sessions of a resumed run."""
        return self._seconds_before + time.perf_counter() - self._started

    def every(self, module: SupervisedModule) -> int:
        """Updates per point.

        Args:
            module: Knows the planned updates.
        """
        if module.total_updates is None:
            return max(1, module.updates_per_epoch // 10)
        return max(1, math.ceil(module.total_updates / self.points))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; lay out TensorBoard's custom scalars."""
        self._started = time.perf_counter()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(_LAYOUT)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Cut the losses of the sweep into points."""
        module = cast(SupervisedModule, pl_module)
        losses = outputs["losses"].detach().cpu().numpy().astype(np.float64)
        rates = outputs["rates"]
        first, per_update = outputs["first"], outputs["examples"]
        last = first + len(losses)
        every = self.every(module)
        # Within the sweep the clock was not read: its updates take equal times.
        now = self.seconds
        began = now - outputs["seconds"]
        done = first
        while done < last:
            point = min((done // every + 1) * every, last)
            self._sum += float(losses[done - first : point - first].sum())
            self._count += point - done
            done = point
            if done % every == 0 or done == module.total_updates:
                row = {
                    "update": done,
                    "examples": module.examples_seen - (last - done) * per_update,
                    "seconds": began + (now - began) * (done - first) / len(losses),
                    "loss": self._sum / self._count,
                    "lr": float(rates[done - 1 - first]),
                }
                self._sum, self._count = 0.0, 0
                self.history.append("train", row)
                self._log(trainer, module, {"loss/train": row["loss"], "lr": row["lr"]}, row)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation metrics."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._write_validation(trainer, cast(SupervisedModule, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate after the last update, if no validation fell there."""
        module = cast(SupervisedModule, pl_module)
        if module.validated_at != module.updates and module.validate_at_the_end():
            self._write_validation(trainer, module)

    def _write_validation(self, trainer: Trainer, module: SupervisedModule) -> None:
        if module.validated_at != module.updates:
            return  # of an interruption, not of the run
        values = module.validation
        row = {"update": module.updates, "examples": module.examples_seen, "seconds": self.seconds}
        self.history.append("val", {**row, **values})
        self._log(trainer, module, values, row)

    def _log(
        self,
        trainer: Trainer,
        module: SupervisedModule,
        values: dict[str, float],
        row: dict[str, Any],
    ) -> None:
        update, examples = row["update"], row["examples"]
        by_sample = {
            f"by_sample/{tag}": value for tag, value in values.items() if tag.startswith("loss/")
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if not trainer.is_global_zero:
                    continue
                if update == examples:
                    _write(logger, {**values, **by_sample}, update)
                else:
                    _write(logger, values, update)
                    _write(logger, by_sample, examples)
            else:
                place = {
                    "examples": examples,
                    "epoch": update / module.updates_per_epoch,
                    "seconds": round(row["seconds"], 4),
                }
                logger.log_metrics({**place, **values}, step=update)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        return {
            "sum": self._sum,
            "count": self._count,
            "seconds": self.seconds,
            "train": {k: list(v) for k, v in self.history.train.items()},
            "val": {k: list(v) for k, v in self.history.val.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._sum, self._count = state_dict["sum"], state_dict["count"]
        self._seconds_before = state_dict["seconds"]
        self.history = History(state_dict["train"], state_dict["val"])


def _write(logger: TensorBoardLogger, values: dict[str, float], step: int) -> None:
    """All values of a step in one event: half the time of one event for each."""
    entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    if entries:
        logger.experiment.file_writer.add_summary(Summary(value=entries), step)
