"""Private names of Lightning: of its epoch loop, its fetcher, and some of its callbacks."""

from __future__ import annotations

from typing import Any

__all__ = [
    "average_holds_batch_norm",
    "fetch_again",
    "keep_batch_norm",
    "saves_by_time",
    "saves_every",
    "set_logged_step",
]


def set_logged_step(trainer: Any, step: int) -> None:
    """Set what Lightning passes to loggers as the step, once the batch at hand is over.

    Args:
        trainer: Lightning's.
        step: Range [1, ∞).

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> set_logged_step(trainer, 7)
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step - 1  # it adds 1 for this batch itself


def fetch_again(trainer: Any) -> None:
    """Let Lightning forget the batch that it has fetched beforehand, and ask the loader anew.

    Args:
        trainer: Lightning's, within `on_train_start`.

    Example:
        >>> from types import SimpleNamespace
        >>> fetch_again(SimpleNamespace(fit_loop=SimpleNamespace(_data_fetcher=[])))
    """
    iter(trainer.fit_loop._data_fetcher)


def saves_every(checkpoint: Any) -> int:
    """After how many steps a `ModelCheckpoint` saves; 0: not by steps.

    Args:
        checkpoint: Lightning's callback.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> saves_every(ModelCheckpoint(every_n_train_steps=100))
        100
    """
    return int(checkpoint._every_n_train_steps)


def saves_by_time(checkpoint: Any) -> bool:
    """Whether a `ModelCheckpoint` saves by the clock.

    Args:
        checkpoint: Lightning's callback.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> saves_by_time(ModelCheckpoint())
        False
    """
    return checkpoint._train_time_interval is not None


def average_holds_batch_norm(averaging: Any) -> bool:
    """Whether `StochasticWeightAveraging` means to renew BatchNorm's statistics.

    Args:
        averaging: Lightning's callback, after its `on_fit_start`.

    Example:
        >>> from lightning.pytorch.callbacks import StochasticWeightAveraging
        >>> averaging = StochasticWeightAveraging(swa_lrs=0.1)
        >>> averaging._model_contains_batch_norm = True
        >>> average_holds_batch_norm(averaging)
        True
        >>> keep_batch_norm(averaging)
        >>> average_holds_batch_norm(averaging)
        False
    """
    return bool(averaging._model_contains_batch_norm)


def keep_batch_norm(averaging: Any) -> None:
    """Let `StochasticWeightAveraging` leave BatchNorm's statistics alone.

    Args:
        averaging: Lightning's callback, after its `on_fit_start`.

    Example:
        >>> from types import SimpleNamespace
        >>> keep_batch_norm(SimpleNamespace())
    """
    averaging._model_contains_batch_norm = False
