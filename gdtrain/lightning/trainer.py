"""What Lightning's trainer is told about a run whose steps are sweeps of updates.

The update number alone says where a run is: Lightning's own counters depend on the hook in which a
checkpoint was saved, and would repeat or skip an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging

from gdtrain._compat.lightning_training import (
    average_holds_batch_norm,
    keep_batch_norm,
    set_logged_step,
)
from gdtrain.lightning.hooks import overrides

__all__ = [
    "align_progress",
    "check_counts",
    "check_precision",
    "count_epochs",
    "count_updates",
    "epochs_at_once",
    "take_over_batch_norm",
]


def check_precision(trainer: Any) -> None:
    """Raise where the gradients would need a scaler."""
    precision = str(trainer.precision)
    if precision.startswith("16"):
        raise ValueError(
            f"precision={precision} needs a gradient scaler, which a sweep of updates does not "
            f"have. Use trainer.precision=bf16-mixed or 32."
        )


def check_counts(trainer: Any) -> None:
    """Raise where a setting would count Lightning's steps as updates."""
    if trainer.fast_dev_run:
        return
    for name, neutral in (
        ("val_check_interval", 1.0),
        ("overfit_batches", 0.0),
        ("limit_train_batches", 1.0),
    ):
        value = getattr(trainer, name)
        # 1.0 is all of an epoch; the whole number 1 is one step.
        if value and (value != neutral or not isinstance(value, float)):
            raise ValueError(
                f"trainer.{name} counts Lightning steps, each of several updates. Received: "
                f"{name}={value}. Bound the run with max_epochs or max_steps (which counts "
                f"updates), and validate with check_val_every_n_epoch."
            )


def epochs_at_once(trainer: Any, owners: Sequence[Any], validated: bool) -> int | None:
    """How many epochs Lightning may take for one; None: all.

    The end of an epoch costs it some milliseconds, as long as thousands of updates of a small model
    take. So it sees only the ends at which something happens: a validation, or a hook of a callback
    (unless that has an attribute `needs_every_epoch = False`).
    """
    hooks = ("on_train_epoch_start", "on_train_epoch_end")
    if (
        trainer.world_size > 1
        or trainer.fast_dev_run
        or trainer.reload_dataloaders_every_n_epochs
        or any(
            overrides(owner, hook)
            for owner in owners
            if getattr(owner, "needs_every_epoch", True)
            and not isinstance(owner, EarlyStopping)  # looks where there is a validation
            for hook in hooks
        )
    ):
        return 1
    if validated and trainer.enable_validation:
        return trainer.check_val_every_n_epoch or 1
    return None


def take_over_batch_norm(trainer: Any, rule: Any) -> bool:
    """Let Lightning average weights, but not renew BatchNorm's statistics in a further epoch.

    Its way needs sized loaders, and would be planned as an epoch of updates: where it returns true,
    the statistics are to be made at the end of training instead.
    """
    averages = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging)]
    if averages and rule is not None and not rule.needs.lr:
        raise ValueError(
            f"StochasticWeightAveraging sets η (swa_lrs), and {type(rule).__name__} computes it: "
            f"set optimizer.lr to a number, without a step-size rule."
        )
    renewing = [c for c in averages if average_holds_batch_norm(c) and trainer.max_epochs != -1]
    for callback in renewing:
        keep_batch_norm(callback)
        trainer.fit_loop.max_epochs -= 1
    return bool(renewing)


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
