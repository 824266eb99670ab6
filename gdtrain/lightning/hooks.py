"""What callbacks that act on batches see of a run whose batches are sweeps of several updates.

gdtrain's callbacks know sweeps, and say so by a method `next_update`. Everybody else, of Lightning
or of the user, has learnt that a batch is an update: it gets what it relies on, or a refusal.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    Timer,
)
from torch.optim import Optimizer

from gdtrain._compat.lightning_training import saves_by_time, saves_every
from gdtrain.descent.plan import Every, Watcher
from gdtrain.optim.protocol import step_size_of

__all__ = ["UpdateHooks", "overrides"]

_log = logging.getLogger("gdtrain")

_BATCH = ("on_train_batch_start", "on_train_batch_end")
_STEP = ("on_before_zero_grad", "on_after_backward", "on_before_optimizer_step")
_NEVER = {
    "on_before_backward": "the loss before its backward pass",
    "backward": "the loss before its backward pass",
    "optimizer_step": "the step of automatic optimization",
    "optimizer_zero_grad": "the step of automatic optimization",
    "configure_gradient_clipping": "the gradients of automatic optimization",
    "lr_scheduler_step": "a scheduler of Lightning",
}
_ONLY_LOOK = (ProgressBar, Timer)  # draw, or read a clock, as the user wishes
_AT_LOG_POINTS = (LearningRateMonitor, DeviceStatsMonitor)  # not their subclasses
_REFUSED = {
    BatchSizeFinder: (
        "changes the batch size, which is part of the method here, to fill the memory. What memory "
        "holds decides the micro-batch size: set data.micro_batch_size"
    ),
    LearningRateFinder: (
        "sets the rates of a scheduler of Lightning, which a sweep has none of. Use gdtrain's rate "
        "finder, or lr=auto"
    ),
    GradientAccumulationScheduler: (
        "joins batches to updates by Lightning's automatic optimization. A batch of "
        "data.batch_size examples makes an update here; data.micro_batch_size bounds a pass"
    ),
}


def overrides(owner: Any, hook: str) -> bool:
    """Whether a callback or a module brings a hook of its own, by its class or as an attribute."""
    parent = Callback if isinstance(owner, Callback) else LightningModule
    found = getattr(owner, hook, None)
    return hasattr(parent, hook) and getattr(found, "__func__", found) is not getattr(parent, hook)


def _refuse(owner: Any, name: str) -> None:
    for kind, reason in _REFUSED.items():
        if isinstance(owner, kind):
            raise ValueError(f"{name} {reason}. Received: callbacks with {name}.")
    if isinstance(owner, ModelCheckpoint) and saves_by_time(owner):
        raise ValueError(
            "ModelCheckpoint(train_time_interval=…) never saves in manual optimization, which "
            "sweeps of updates are. Use every_n_train_steps, which counts updates, or "
            "gdtrain.callbacks.BestAndLast(seconds_between=…)."
        )
    for hook, what in _NEVER.items():
        if overrides(owner, hook):
            raise ValueError(
                f"{name} acts on {hook}, and the updates of a sweep do not have {what}. "
                f"on_before_zero_grad, on_after_backward and on_before_optimizer_step are called "
                f"at each update; or train a LightningModule of your own with gdtrain's optimizers."
            )


class UpdateHooks:
    """Those who act on single updates: where sweeps end for them, and the calls of their hooks."""

    def __init__(self) -> None:
        self._trainer: Any = None
        self._module: Any = None
        self._handle: Any = None  # of the optimizer's steps
        self._updating = False
        self._forget()

    def _forget(self) -> None:
        self._single = ""  # who needs one update a step, in words
        self._cuts: list[Every] = []  # for those who do not know sweeps
        self._step: list[Any] = []  # who has hooks that are called at each step of the optimizer

    def find(self, trainer: Any, module: Any, own_step: bool = False) -> None:
        """Ask who must see which updates; ValueError: somebody acts on what a sweep does not have.

        `own_step` tells that the module's class has a `training_step` of its own.
        """
        self._trainer, self._module = trainer, module
        self._forget()
        by_rule = any(step_size_of(o) is not None for o in trainer.optimizers)
        for owner in (*trainer.callbacks, module):
            _refuse(owner, type(owner).__name__)
            self._note(owner, by_rule)
        if own_step:
            self._single = self._single or f"{type(module).__name__} has its own training_step"
        # Right here, where the state after an update is what a resumed run goes on with.
        warnings.filterwarnings(
            "ignore", message="Using ModelCheckpoint with manual optimization and every_n_train_st"
        )

    def _note(self, owner: Any, by_rule: bool) -> None:
        """What a callback, or the module's own subclass, gets."""
        kind, name = type(owner), type(owner).__name__
        hooks = [hook for hook in _STEP if overrides(owner, hook)]
        if hooks and by_rule:
            raise ValueError(
                f"{name} acts on {hooks[0]}, and a rule computes the step size from the gradient "
                f"as it is. Set optimizer.lr to a number, or leave {name} out."
            )
        self._step += [owner] if hooks else []
        if (hasattr(owner, "next_update") and owner is not self._module) or (
            isinstance(owner, _ONLY_LOOK)
        ):
            return  # it knows sweeps, or does not mind them
        if kind is ModelCheckpoint:
            every = saves_every(owner)
            self._cuts += [Every(every)] if every >= 1 else []
        elif kind in _AT_LOG_POINTS:
            n = self._trainer.log_every_n_steps
            if getattr(owner, "logging_interval", None) != "epoch" and n:
                # Logged are the starts and the ends of the batches n − 1, 2n − 1, …
                self._cuts += [Every(n), Every(n, n - 1)]
        elif hooks or any(overrides(owner, hook) for hook in _BATCH):
            self._single = self._single or f"{name} acts on batches"

    def watchers(self) -> list[Watcher]:
        """At which updates sweeps must end."""
        if self._single:
            return [Every(1)]
        callbacks = [] if self._trainer is None else self._trainer.callbacks
        return [*self._cuts, *(c for c in callbacks if hasattr(c, "next_update"))]

    def listen(self, optimizer: Optimizer, in_sweeps: bool) -> None:
        """Call the hooks of those who act on each step of the optimizer."""
        self.remove()
        if self._step:
            self._handle = optimizer.register_step_pre_hook(self._before_step)
        if self._single and in_sweeps:
            _log.info(
                "sweeps: one update a step, because %s; each step costs Lightning about 0.4 ms",
                self._single,
            )

    def _before_step(self, optimizer: Any, arguments: Any, options: Any) -> None:
        if self._updating:  # and no update that is only tried, or made once more
            self._call("on_after_backward")
            self._call("on_before_optimizer_step", optimizer)

    def _call(self, hook: str, *arguments: Any) -> None:
        """Call one hook of those who have it."""
        for owner in self._step:
            if overrides(owner, hook):
                before = () if owner is self._module else (self._trainer, self._module)
                getattr(owner, hook)(*before, *arguments)

    @contextmanager
    def updating(self, optimizer: Optimizer) -> Iterator[None]:
        """Around the updates of the run itself."""
        self._call("on_before_zero_grad", optimizer)
        self._updating = True
        try:
            yield
        finally:
            self._updating = False

    def remove(self) -> None:
        """Call nobody any more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
