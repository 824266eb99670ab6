"""The path of a run through parameter space, at a few dozen of its updates."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import nn

from gdtrain.data.loader import IndexLoader
from gdtrain.landscape import Snapshots
from gdtrain.module import SupervisedModule
from gdtrain.snapshot import Snapshot

__all__ = ["Trajectory"]

_log = logging.getLogger("gdtrain")

_LEAST = 8  # copies, below which a path is none
_POINTS = 16  # that a run has in any case
_PAYS = 0.05  # seconds of a sweep, of which a Lightning step and a copy are about 1%
_FEW = 2  # parameters, of which the first steps are kept one by one
_SECONDS = 30.0  # between two writings while the run goes on


class Trajectory(Callback):
    """Keeps copies of the parameters, and leaves them as `trajectory.npz` in the run's folder.

    T planned updates. A copy (float32, in memory) is made before the first update and at the first
    end of a sweep at or after each multiple of T/points updates. Sweeps are made no longer than
    that, where it costs about 1% of the time at most; and no longer than T/16. The updates are the
    same, bit for bit. Of a model with one or two parameters, the first `points` updates are kept
    one by one: they are made beforehand, and taken back. Where a run is longer than planned, every
    second copy is dropped, and the spacing doubles. A state that is not finite is left out.

    The file (`gdtrain.landscape.Snapshots`) is written at the end of the run, also of one that was
    stopped, and beside a checkpoint if it is 30 s old; a resumed run goes on with the file of the
    run before. `gdtrain.landscape` draws it. A step-size rule that averages shows the points at
    which it descends, not their average.

    State in checkpoints: none.

    Args:
        directory: Of the run's checkpoints; the file lies beside it, in the run's folder.
        points: About how many copies at most, range [8, ∞).
        megabytes: What they may take, range (0, ∞). Fewer are kept of a large model; none, which
            the log says, where 8 do not fit.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> Trajectory("outputs/run/checkpoints").path.as_posix()
        'outputs/run/trajectory.npz'
    """

    needs_every_epoch = False

    def __init__(self, directory: str | Path, points: int = 50, megabytes: float = 8.0) -> None:
        if isinstance(points, bool) or not isinstance(points, int) or points < _LEAST:
            raise ValueError(
                f"points must be a whole number of at least {_LEAST}. Received: points={points!r}."
            )
        if (
            isinstance(megabytes, bool)
            or not isinstance(megabytes, int | float)
            or not megabytes > 0
        ):
            raise ValueError(f"megabytes must be above 0. Received: megabytes={megabytes!r}.")
        self.path = Path(directory).parent / "trajectory.npz"
        self.points, self.megabytes = points, megabytes
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._planned = False
        self._every, self._most = 1, 0
        self._seen = -1  # the last update whose copy is of the run itself, not made beforehand
        self._written = time.monotonic()

    @property
    def updates(self) -> list[int]:
        """Of which there are copies."""
        return sorted(self._kept)

    def next_update(self, update: int) -> int | None:
        """None: wherever sweeps end will do.

        Args:
            update: Number of updates made.
        """
        return None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a run before."""
        self._kept, self._planned, self._most, self._seen = {}, False, 0, -1
        self._written = time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first update: plan, and keep the start."""
        if self._planned:
            return
        self._planned = True
        module = cast(SupervisedModule, pl_module)
        count = sum(p.numel() for p in _trainable(module).values())
        if not trainer.is_global_zero or not count:
            return
        fitting = int(self.megabytes * 2**20 / (4 * count))
        if fitting < _LEAST:
            _log.info(
                "trajectory: none is kept, since %d copies of %s parameters take more than %g MB "
                "(callbacks.trajectory.megabytes)",
                _LEAST,
                f"{count:,}",
                self.megabytes,
            )
            return
        few = count <= _FEW
        # Two more than are wanted: the start, and an end between two multiples.
        self._most = min(fitting, (2 if few else 1) * self.points + 2)
        total = module.total_updates
        if total is None:
            self._every = max(1, module.updates_per_epoch // 10)
        else:
            self._every = max(1, -(-total // min(self.points, self._most - 2)))
        self._take_over(trainer, module)
        if module.updates not in self._kept:
            self._keep(module)
        if few and module.updates == 0 and trainer.world_size == 1:
            self._look_ahead(trainer, module)
        self._seen = module.updates

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep a copy, if it is time."""
        if not self._most:
            return
        module = cast(SupervisedModule, pl_module)
        now = module.updates
        if now in self._kept and not np.array_equal(self._kept[now], _flat(module)):
            # The run did not take the steps that were made beforehand: it has recovered.
            for update in [u for u in self._kept if u > self._seen]:
                del self._kept[update]
        ahead = [u for u in self._kept if u > now]
        if not ahead and now // self._every > max(self._kept, default=-1) // self._every:
            self._keep(module)
        self._seen = now
        loader = trainer.train_dataloader
        if isinstance(loader, IndexLoader) and trainer.world_size == 1:
            each = outputs["seconds"] / len(outputs["losses"])
            paying = min(int(_PAYS / max(each, 1e-9)), -(-(loader.total or now) // _POINTS))
            loader.updates_per_sweep = min(loader.updates_per_sweep, max(self._every, paying, 1))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write beside the checkpoint, if the file is old."""
        if time.monotonic() - self._written > _SECONDS:
            self._write(cast(SupervisedModule, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the end, and write."""
        if self._most:
            module = cast(SupervisedModule, pl_module)
            if module.updates not in self._kept:
                self._keep(module)
            self._write(module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write what there is."""
        if self._seen > 0:
            self._write(cast(SupervisedModule, pl_module))

    # ------------------------------------------------------------------ copies

    def _keep(self, module: SupervisedModule) -> None:
        if len(self._kept) >= self._most:
            self._thin()
        theta = _flat(module)
        if np.isfinite(theta).all():
            self._kept[module.updates] = theta

    def _thin(self) -> None:
        """Drop every second copy, but for the first."""
        self._every *= 2
        for update in self.updates[1::2]:
            del self._kept[update]

    def _look_ahead(self, trainer: Trainer, module: SupervisedModule) -> None:
        """Keep the first steps one by one: sweeps are longer, and the first is on its way."""
        loader = trainer.train_dataloader
        if not isinstance(loader, IndexLoader) or module.objective is None:
            return
        end = self.points if loader.total is None else min(self.points, loader.total)
        before = Snapshot(module.objective, trainer.optimizers[0])
        try:
            for update in range(end):
                module.make_updates(loader.block(update, 1).to(module.device), update)
                theta = _flat(module)
                if not np.isfinite(theta).all():
                    break
                self._kept[update + 1] = theta
        finally:
            before.give_back()

    # ------------------------------------------------------------------ the file

    def _take_over(self, trainer: Trainer, module: SupervisedModule) -> None:
        """The path of the run that is resumed."""
        if trainer.ckpt_path is None:
            return
        path = Path(trainer.ckpt_path).parent.parent / self.path.name
        if not path.is_file():
            return
        try:
            found = Snapshots.load(path)
            found.check(module.model, path)
        except ValueError as error:
            _log.info("trajectory: begins with this run. %s", error)
            return
        found = found.until(module.updates)
        self._kept = dict(zip(found.updates.tolist(), found.parameters, strict=True))
        while len(self._kept) >= self._most:
            self._thin()

    def _write(self, module: SupervisedModule) -> None:
        # Not what was made beforehand, where the run has ended before it.
        updates = [u for u in self.updates if u <= module.updates]
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


def _flat(module: SupervisedModule) -> NDArray[np.float32]:
    parts = [p.detach().flatten().float().cpu() for p in _trainable(module).values()]
    return np.concatenate([part.numpy() for part in parts])
