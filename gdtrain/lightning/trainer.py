"""What the settings of Lightning's trainer mean for a run whose steps are sweeps of updates.

U updates per epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging

from gdtrain._compat.lightning_training import average_holds_batch_norm, keep_batch_norm
from gdtrain.lightning.hooks import overrides

__all__ = ["check_counts", "check_precision", "epochs_at_once", "take_over_batch_norm"]

# Callbacks to which only the epochs with a validation matter.
_INDIFFERENT = (EarlyStopping,)


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
    minding = [
        owner
        for owner in owners
        if getattr(owner, "needs_every_epoch", True) and not isinstance(owner, _INDIFFERENT)
    ]
    if (
        trainer.world_size > 1
        or trainer.fast_dev_run
        or trainer.reload_dataloaders_every_n_epochs
        or any(overrides(owner, hook) for owner in minding for hook in hooks)
    ):
        return 1
    if validated and trainer.enable_validation:
        return trainer.check_val_every_n_epoch or 1
    return None


def take_over_batch_norm(trainer: Any, rule: Any) -> bool:
    """Let Lightning average weights, but not renew BatchNorm's statistics in a further epoch.

    Its way needs sized loaders, and would be planned as an epoch of updates; the statistics are to
    be made at the end of training instead.
    """
    found = False
    for callback in trainer.callbacks:
        if not isinstance(callback, StochasticWeightAveraging):
            continue
        if rule is not None and not rule.needs.lr:
            raise ValueError(
                f"StochasticWeightAveraging sets η (swa_lrs), and {type(rule).__name__} computes "
                f"it: set optimizer.lr to a number, without a step-size rule."
            )
        if average_holds_batch_norm(callback) and trainer.max_epochs != -1:
            keep_batch_norm(callback)
            trainer.fit_loop.max_epochs -= 1
            found = True
    return found
