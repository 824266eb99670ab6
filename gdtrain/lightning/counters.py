"""Lightning's own counters, brought to what the descent has counted.

The update number alone says where a run is. Lightning's counters depend on the hook in which a
checkpoint was saved, and would repeat or skip an epoch.
"""

from __future__ import annotations

from typing import Any

from gdtrain._compat.lightning_training import set_logged_step

__all__ = ["align_progress", "count_epochs", "count_updates"]


def align_progress(trainer: Any, epoch: int) -> None:
    """Tell Lightning's loops that `epoch` epochs are done and the next begins or goes on."""
    loop = trainer.fit_loop
    current = loop.epoch_progress.current
    current.ready = current.started = current.processed = current.completed = epoch
    loop.restarting = False
    loop.reset_restart_stage()
    loop.epoch_loop.restarting = False
    loop.epoch_loop.reset_restart_stage()
    loop.epoch_loop.batch_progress.reset_on_run()
    loop.epoch_loop.val_loop.restarting = False
    loop.epoch_loop.val_loop.batch_progress.reset_on_run()


def count_epochs(trainer: Any, done: int) -> None:
    """Tell Lightning's loop that the epoch after so many is under way."""
    current = trainer.fit_loop.epoch_progress.current
    current.ready = current.started = done + 1
    current.processed = current.completed = done


def count_updates(trainer: Any, count: int, updates: int) -> None:
    """Tell Lightning that the batch at hand has made some updates: `global_step` counts them."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    for counts in (progress.total, progress.current):
        counts.ready += count
        counts.completed += count
    set_logged_step(trainer, updates)
