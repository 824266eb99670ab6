"""Loss curves by update, example, epoch and time: in TensorBoard, metrics.csv and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray

from gdtrain.lightning.module import SupervisedModule
from gdtrain.ranges import Whole
from gdtrain.reporting.tensorboard import BAND, LAYOUT, SPEED, described

__all__ = ["History", "LossCurves"]

_BLOCK = 1024  # losses that are added up at once


@dataclass
class History:
    """A run in numbers: columns by name, one row for each logged point.

    Args:
        train: "update", "examples", "epoch", "seconds", "loss" (mean since the row before), "min"
            and "max" (of an update since the row before) and "lr".
        val: "update", "examples", "epoch", "seconds", and each validation metric by its tag.

    Example:
        >>> History().array("train", "loss")
        array([], dtype=float64)
    """

    train: dict[str, list[float]] = field(default_factory=dict)
    val: dict[str, list[float]] = field(default_factory=dict)

    def array(self, part: str, column: str) -> NDArray[np.float64]:
        """One column of a part, "train" or "val"."""
        return np.asarray(getattr(self, part).get(column, []), dtype=np.float64)

    def append(self, part: str, row: dict[str, float]) -> None:
        """Add a row to a part: values by column."""
        for column, value in row.items():
            getattr(self, part).setdefault(column, []).append(value)


class LossCurves(Callback):
    """Writes the curves of a `SupervisedModule` to the trainer's loggers.

    Tags, with the number of updates made as step:

    - `loss/train`, the mean over the updates since the last point; the same as
      `spread/loss/train/mean` between `…/min` and `…/max`, the smallest and largest of them, unless
      every update is a point; `loss/val`; `metric/<name>/val`;
    - `lr`, η of the last update; `time/updates_per_second`, over the time of training alone.

    The losses stand again under `by_sample/…` with the number of examples seen as step, under
    `by_millisecond/…` with the time since the start, and under `by_epoch/…`, where `loss/train` is
    the mean over an epoch's examples (or several epochs'). Loggers other than TensorBoard get
    examples, epoch and seconds as columns instead. Points and their values depend neither on the
    machine's speed nor on sweeps. What was logged is on disk about a second later.

    State in checkpoints: the unfinished point and epoch, the seconds so far, and the history.

    Args:
        points: At most how many points the training curves get, range [1, ∞). Where the number of
            updates is not known, points become rarer: so many in each doubling of the run.

    Example:
        >>> callback = LossCurves(points=100)
    """

    def __init__(self, points: int = 500) -> None:
        self.points = Whole(1).check("points", points)
        self.history = History()
        self._point = _Point()
        self._epoch = _Point()
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        self._on_disk_at = 0.0  # on the same clock
        self._described: list[set[str]] = []  # of each logger: tags that have their description

    @property
    def seconds(self) -> float:
        """Since training started, over all sessions of a resumed run."""
        return self._seconds_before + time.perf_counter() - self._started

    def every(self, module: SupervisedModule, update: int = 0) -> int:
        """Updates per point, after so many of a run."""
        return self._every(module.total_updates, update, max(1, module.updates_per_epoch // 10))

    def _every(self, total: int | None, done: int, least: int) -> int:
        if total is not None:
            return max(1, math.ceil(total / self.points))
        return least << max(0, (done // (least * self.points)).bit_length() - 1)

    def next_update(self, update: int) -> int | None:
        """None: wherever sweeps end will do."""
        return None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock; lay out TensorBoard's custom scalars."""
        self._started = self._on_disk_at = time.perf_counter()
        self._described = [set() for _ in trainer.loggers]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(LAYOUT)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Cut the losses of the sweep into points, and into epochs."""
        module: SupervisedModule = pl_module
        losses = outputs["losses"].detach().cpu().numpy().astype(np.float64)
        first, size = outputs["first"], outputs["examples"]
        last, total = first + len(losses), module.total_updates
        # Within the sweep the clock was not read: its updates take equal times.
        each = outputs["seconds"] / len(losses)
        now = self.seconds
        for start, end in _pieces(first, last, lambda done: self.every(module, done)):
            self._point.add(losses[start - first : end - first], 1, each)
            if end % self.every(module, start) == 0 or end == total:
                point, self._point = self._point, _Point()
                row = {
                    "update": end,
                    "examples": module.examples_seen - (last - end) * size,
                    "epoch": end / module.updates_per_epoch,
                    "seconds": now - (last - end) * each,
                    "loss": point.mean,
                    "min": point.min,
                    "max": point.max,
                    "lr": float(outputs["rates"][end - 1 - first]),
                }
                self.history.append("train", row)
                values = {"loss/train": row["loss"], "lr": row["lr"]}
                if total is None or self.every(module) > 1:
                    values |= zip(BAND, (row["loss"], point.min, point.max), strict=True)
                if point.seconds > 0:
                    values[SPEED] = point.updates / point.seconds
                self._log(trainer, values, row)
        per_epoch = module.updates_per_epoch
        epochs = None if total is None else math.ceil(total / per_epoch)

        def whole(done: int) -> int:
            return per_epoch * self._every(epochs, done // per_epoch, 1)

        for start, end in _pieces(first, last, whole):
            self._epoch.add(losses[start - first : end - first], size, each)
            if end % whole(start) == 0 or (end == total and end % per_epoch == 0):
                epoch, self._epoch = self._epoch, _Point()
                values = {"by_epoch/loss/train": epoch.mean}
                self._write(trainer, {end // per_epoch: values}, now - (last - end) * each)
        self._keep(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the validation metrics."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._write_validation(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Validate after the last update, if no validation fell there."""
        if pl_module.validate_at_the_end():
            self._write_validation(trainer, pl_module)

    def _write_validation(self, trainer: Trainer, module: SupervisedModule) -> None:
        if module.validated_at != module.updates:
            return  # of an interruption, not of the run
        if self.history.val.get("update", [])[-1:] == [module.updates]:
            return  # the run was resumed there
        values = module.validation
        row = {
            "update": module.updates,
            "examples": module.examples_seen,
            "epoch": module.updates / module.updates_per_epoch,
            "seconds": self.seconds,
        }
        self.history.append("val", {**row, **values})
        self._log(trainer, values, row)
        if module.updates % module.updates_per_epoch == 0:
            by_epoch = {"by_epoch/loss/val": values["loss/val"]}
            self._write(trainer, {int(row["epoch"]): by_epoch}, row["seconds"])
        self._keep(trainer)

    def _log(self, trainer: Trainer, values: dict[str, float], row: dict[str, Any]) -> None:
        events: dict[int, dict[str, float]] = {row["update"]: dict(values)}
        for axis, step in (
            ("by_sample", row["examples"]),
            ("by_millisecond", round(1000 * row["seconds"])),
        ):
            losses = {f"{axis}/{t}": v for t, v in values.items() if t.startswith("loss/")}
            events.setdefault(step, {}).update(losses)
        self._write(trainer, events, row["seconds"])
        place = {**row, "seconds": round(row["seconds"], 4)}
        columns = {name: place[name] for name in ("examples", "epoch", "seconds")}
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_metrics({**columns, **values}, step=row["update"])

    def _write(
        self, trainer: Trainer, events: Mapping[int, Mapping[str, float]], seconds: float
    ) -> None:
        """All values of a step in one event: half the time of one event for each."""
        if not trainer.is_global_zero:
            return
        clock = time.time() - (self.seconds - seconds)
        for logger, known in zip(trainer.loggers, self._described, strict=True):
            if isinstance(logger, TensorBoardLogger):
                for step, values in events.items():
                    logger.experiment.file_writer.add_summary(described(values, known), step, clock)

    def _keep(self, trainer: Trainer) -> None:
        """A process may be killed: put what was logged on disk, at most once a second."""
        now = time.perf_counter()
        if now - self._on_disk_at < 1 or not trainer.is_global_zero:
            return
        self._on_disk_at = now
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
            else:
                logger.save()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        return {
            **{
                name: {**vars(point), "rest": point.rest.tolist()}
                for name, point in (("point", self._point), ("epoch", self._epoch))
            },
            "seconds": self.seconds,
            "train": {k: list(v) for k, v in self.history.train.items()},
            "val": {k: list(v) for k, v in self.history.val.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._point, self._epoch = (
            _Point(**{**state_dict[name], "rest": np.asarray(state_dict[name]["rest"], np.float64)})
            for name in ("point", "epoch")
        )
        self._seconds_before = state_dict["seconds"]
        self.history = History(state_dict["train"], state_dict["val"])


@dataclass
class _Point:
    """Losses of updates, as they come in: summed in whole blocks, however sweeps are cut."""

    updates: int = 0
    weights: int = 0
    sum: float = 0.0  # of the blocks that are full
    rest: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    min: float = math.inf
    max: float = -math.inf
    seconds: float = 0.0

    def add(self, losses: NDArray[np.float64], weight: int, seconds: float) -> None:
        """Each loss has the weight, and its update took the seconds."""
        series = np.concatenate([self.rest, losses if weight == 1 else losses * weight])
        full = len(series) // _BLOCK * _BLOCK
        for added in series[:full].reshape(-1, _BLOCK).sum(1).tolist():
            self.sum += added
        self.rest = series[full:].copy()
        self.updates += len(losses)
        self.weights += len(losses) * weight
        self.min = float(losses.min(initial=self.min))  # a NaN stays
        self.max = float(losses.max(initial=self.max))
        self.seconds += len(losses) * seconds

    @property
    def mean(self) -> float:
        """Of the losses, by weight."""
        return (self.sum + float(self.rest.sum())) / self.weights


def _pieces(first: int, last: int, every: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Cut updates at the multiples of `every`, which may depend on the update."""
    while first < last:
        end = min((first // every(first) + 1) * every(first), last)
        yield first, end
        first = end
