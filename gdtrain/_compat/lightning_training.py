"""Private names of Lightning: of its loops, of how it restores a run, and of some callbacks."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

__all__ = [
    "average_holds_batch_norm",
    "decide_steps",
    "ends_epoch",
    "fetch_again",
    "keep_batch_norm",
    "leave_steps",
    "only_forward",
    "restores",
    "saves_by_time",
    "saves_every",
    "set_logged_step",
    "steps_are_decided",
]

_DECISION = "_should_accumulate"


def decide_steps(trainer: Any, steps: Callable[[], bool]) -> None:
    """Let a function say whether the batch at hand makes a step.

    Through the one method that the loop, schedulers, loggers and callbacks ask: Lightning overrules
    `trainer.accumulate_grad_batches` at the end of an epoch, and divides the losses by it.
    """
    trainer.fit_loop.epoch_loop.__dict__[_DECISION] = lambda: not steps()


def steps_are_decided(trainer: Any) -> bool:
    """Whether `decide_steps` is in force."""
    return _DECISION in trainer.fit_loop.epoch_loop.__dict__


def leave_steps(trainer: Any) -> None:
    """Give the decision back to Lightning."""
    del trainer.fit_loop.epoch_loop.__dict__[_DECISION]


def ends_epoch(trainer: Any) -> bool:
    """Whether the batch that is ready is the last of its epoch."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def only_forward(trainer: Any) -> bool:
    """Whether weight averaging renews BatchNorm's statistics: batches pass forward alone."""
    return bool(trainer.fit_loop._skip_backward)


def set_logged_step(trainer: Any, step: int) -> None:
    """Set what Lightning passes to loggers as the step, once the batch at hand is over."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step - 1  # it adds 1 for this batch itself


def fetch_again(trainer: Any) -> None:
    """Within `on_train_start`, forget the batch that was fetched, and ask the loader anew."""
    iter(trainer.fit_loop._data_fetcher)


def restores(frame: FrameType) -> bool:
    """Whether a frame of a traceback is one of Lightning's steps of restoring a checkpoint."""
    connector = isinstance(frame.f_locals.get("self"), _CheckpointConnector)
    return connector and "restore" in frame.f_code.co_name


def saves_every(checkpoint: Any) -> int:
    """After how many steps a `ModelCheckpoint` saves; 0: not by steps."""
    return int(checkpoint._every_n_train_steps)


def saves_by_time(checkpoint: Any) -> bool:
    """Whether a `ModelCheckpoint` saves by the clock."""
    return checkpoint._train_time_interval is not None


def average_holds_batch_norm(averaging: Any) -> bool:
    """Whether `StochasticWeightAveraging`, after `on_fit_start`, means to renew the statistics."""
    return bool(averaging._model_contains_batch_norm)


def keep_batch_norm(averaging: Any) -> None:
    """Let `StochasticWeightAveraging`, after `on_fit_start`, leave the statistics alone."""
    averaging._model_contains_batch_norm = False
