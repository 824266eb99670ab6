"""The path of a run through parameter space, at a few dozen of its updates."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, Trainer
from numpy.typing import NDArray
from torch import nn

from gdtrain.analysis.trajectory import Snapshots, Spacing
from gdtrain.data.loader import IndexLoader
from gdtrain.descent.work import Work
from gdtrain.lightning.module import SupervisedModule
from gdtrain.ranges import Interval, Whole

__all__ = ["Trajectory"]

_log = logging.getLogger("gdtrain")

_LEAST = 8  # copies, below which a path is none
_POINTS = 16  # that a run has in any case
_PAYS = 2**29  # operations of a sweep, of which a Lightning step and a copy are about 1%
_FEW = 2  # parameters, of which the first steps are kept one by one
_SECONDS = 30.0  # between two writings while the run goes on


class Trajectory(Callback):
    """Keeps copies of the parameters, and leaves them as `trajectory.npz` in the run's folder.

    A copy (float32, in memory) is made before the first update, after each multiple of T/points of
    the T planned updates, and of the end. Cheap updates get fewer: copies cost about 1% of the
    run's work (`gdtrain.descent.work`), but there are 16 in any case. Of a model with one or two
    parameters, the first `points` updates are kept one by one. Where T is not known, or too low,
    the spacing doubles when there are too many. A state that is not finite is left out.

    The file (`gdtrain.analysis.trajectory.Snapshots`) is written at the end, and beside a
    checkpoint if it is 30 s old; a resumed run goes on with that of the run before. No state.

    Args:
        directory: Of the run's checkpoints; the file lies beside it, in the run's folder.
        points: About how many copies at most, range [8, ∞).
        megabytes: What they may take, range (0, ∞). Fewer are kept of a large model; none, which
            the log says, where 8 do not fit.

    Example:
        >>> Trajectory("outputs/run/checkpoints").path.as_posix()
        'outputs/run/trajectory.npz'
    """

    needs_every_epoch = False

    def __init__(self, directory: str | Path, points: int = 50, megabytes: float = 8.0) -> None:
        self.path = Path(directory).parent / "trajectory.npz"
        self.points = Whole(_LEAST).check("points", points)
        self.megabytes = Interval(0, math.inf).check("megabytes", megabytes)
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._module: Any = None  # of the run
        self._is_planned = False
        self._spacing: Spacing | None = None  # None: no copies are kept
        self._written = time.monotonic()

    @property
    def updates(self) -> list[int]:
        """Of which there are copies."""
        return sorted(self._kept)

    def next_update(self, update: int) -> int | None:
        """The next of which a copy is kept."""
        self._plan()
        return None if self._spacing is None else self._spacing.next(update)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget a run before."""
        self._kept, self._is_planned, self._spacing = {}, False, None
        self._module = pl_module
        self._written = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Before the first update: go on with the path of the run before, and keep the start."""
        if self._kept or not trainer.is_global_zero:
            return
        self._plan()
        if self._spacing is not None:
            self._take_over(pl_module)
            if not self._kept:
                self._keep(pl_module)

    def _plan(self) -> None:
        """How many copies, and how far apart: known when the module has begun, after callbacks."""
        if not self._is_planned:
            self._is_planned, self._spacing = True, self._planned(self._module)

    def _planned(self, module: SupervisedModule) -> Spacing | None:
        count = sum(p.numel() for p in _trainable(module).values())
        if not count:
            return None
        fitting = int(self.megabytes * 2**20 / (4 * count))
        if fitting < _LEAST:
            if module.trainer.is_global_zero:
                _log.info(
                    "trajectory: none is kept, since %d copies of %s parameters take more than %g "
                    "MB (callbacks.trajectory.megabytes)",
                    _LEAST,
                    f"{count:,}",
                    self.megabytes,
                )
            return None
        few = count <= _FEW
        # Two more than are wanted: the start, and an end between two multiples.
        most = min(fitting, (2 if few else 1) * self.points + 2)
        first = (most - 2) // 2 if few else 0
        total = module.total_updates
        if total is None:
            return Spacing(most, max(1, module.updates_per_epoch // 10), first)
        # Of few parameters, what the first updates leave.
        room = min(self.points, most - 2 - first)
        every = max(1, -(-total // room))
        loader = module.trainer.train_dataloader
        if isinstance(loader, IndexLoader) and module.objective is not None and not few:
            update = Work.of(module.objective, loader.batch_size).update
            every = max(every, min(int(_PAYS / update), -(-total // min(_POINTS, room))))
        return Spacing(most, every, first)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Keep a copy, if it is time."""
        if self._kept and self._spacing is not None and pl_module.updates in self._spacing:
            self._keep(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        """Write beside the checkpoint, if the file is old."""
        if time.monotonic() - self._written > _SECONDS:
            self._write(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the end, and write."""
        if self._kept:
            pl_module.settle()
            self._keep(pl_module)
            self._write(pl_module)
        self._module = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write what there is."""
        if len(self._kept) > 1:
            self._write(pl_module)

    def _keep(self, module: SupervisedModule) -> None:
        parts = [p.detach().flatten().float().cpu() for p in _trainable(module).values()]
        theta = np.concatenate([part.numpy() for part in parts])
        if np.isfinite(theta).all():
            self._kept[module.updates] = theta
        self._thin(module.updates)

    def _thin(self, now: int) -> None:
        """Drop what lies closer than the spacing of today, and an end that was none."""
        if self._kept and self._spacing is not None:
            self._kept = {u: self._kept[u] for u in self._spacing.kept(self._kept, now)}

    def _take_over(self, module: SupervisedModule) -> None:
        """The path of the run that is resumed."""
        checkpoint = module.trainer.ckpt_path
        path = Path(checkpoint or "").parent.parent / self.path.name
        if checkpoint is None or not path.is_file():
            return
        try:
            found = Snapshots.load(path)
            found.check(module.model, path)
        except ValueError as error:
            _log.info("trajectory: begins with this run. %s", error)
            return
        found = found.until(module.updates)
        self._kept = dict(zip(found.updates.tolist(), found.parameters, strict=True))
        self._thin(module.updates)

    def _write(self, module: SupervisedModule) -> None:
        updates = self.updates
        if not updates or not self.path.parent.is_dir():
            return
        params = _trainable(module)
        Snapshots(
            np.array(updates, dtype=np.int64),
            np.stack([self._kept[update] for update in updates]),
            list(params),
            [p.numel() for p in params.values()],
        ).save(self.path)
        self._written = time.monotonic()


def _trainable(module: SupervisedModule) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.model.named_parameters() if p.requires_grad}
