"""Where Lightning's loop decides at which batches the optimizer makes a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["decide_steps", "ends_epoch", "leave_steps", "only_forward", "steps_are_decided"]

_NAME = "_should_accumulate"


def decide_steps(trainer: Any, steps: Callable[[], bool]) -> None:
    """Let a function say whether the batch at hand makes a step.

    The one method that the loop, schedulers, loggers and callbacks ask. It, rather than
    `trainer.accumulate_grad_batches`: that is overruled at the end of an epoch, and divides the
    losses.

    Args:
        trainer: Lightning's.
        steps: Asked at each batch.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> decide_steps(trainer, lambda: True)
        >>> steps_are_decided(trainer)
        True
        >>> leave_steps(trainer)
        >>> steps_are_decided(trainer)
        False
    """
    trainer.fit_loop.epoch_loop.__dict__[_NAME] = lambda: not steps()


def steps_are_decided(trainer: Any) -> bool:
    """Whether `decide_steps` is in force.

    Args:
        trainer: Lightning's.

    Example:
        >>> from lightning import Trainer
        >>> steps_are_decided(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))
        False
    """
    return _NAME in trainer.fit_loop.epoch_loop.__dict__


def leave_steps(trainer: Any) -> None:
    """Give the decision back to Lightning.

    Args:
        trainer: Lightning's, whose steps are decided.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> decide_steps(trainer, lambda: True)
        >>> leave_steps(trainer)
    """
    del trainer.fit_loop.epoch_loop.__dict__[_NAME]


def ends_epoch(trainer: Any) -> bool:
    """Whether the batch that is ready is the last of its epoch.

    Args:
        trainer: Lightning's, in training.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> trainer.fit_loop.epoch_loop.batch_progress.current.ready = 3
        >>> trainer.fit_loop.max_batches = 3
        >>> ends_epoch(trainer)
        True
    """
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def only_forward(trainer: Any) -> bool:
    """Whether batches pass forward alone: StochasticWeightAveraging renews BatchNorm's statistics.

    Args:
        trainer: Lightning's.

    Example:
        >>> from lightning import Trainer
        >>> only_forward(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))
        False
    """
    return bool(trainer.fit_loop._skip_backward)
