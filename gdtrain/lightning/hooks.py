"""What callbacks that act on batches see of a run whose batches are sweeps of several updates.

gdtrain's callbacks know sweeps, and say so by a method `next_update`. Everybody else, of Lightning
or of the user, has learnt that a batch is an update: it gets what it relies on, or a refusal.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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

__all__ = ["UpdateHooks", "Watchers", "before_step", "call", "overrides", "watchers_of"]

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


class Watchers(NamedTuple):
    """Where sweeps must end for those who do not know them."""

    single: str = ""
    cuts: Sequence[Every] = ()
    step: Sequence[Any] = ()


def overrides(owner: Any, hook: str) -> bool:
    """Whether a callback or a module brings a hook of its own, by its class or as an attribute."""
    parent = Callback if isinstance(owner, Callback) else LightningModule
    found = getattr(owner, hook, None)
    return hasattr(parent, hook) and getattr(found, "__func__", found) is not getattr(parent, hook)


def watchers_of(callbacks: Sequence[Any], module: Any, log_every: int, by_rule: bool) -> Watchers:
    """What each of the callbacks, and the module's own subclass, gets."""
    single, cuts, step = "", list[Every](), []
    for owner in (*callbacks, module):
        name = type(owner).__name__
        _refuse(owner, name)
        hooks = [hook for hook in _STEP if overrides(owner, hook)]
        if hooks and by_rule:
            raise ValueError(
                f"{name} acts on {hooks[0]}, and a rule computes the step size from the gradient "
                f"as it is. Set optimizer.lr to a number, or leave {name} out."
            )
        if hooks:
            step.append(owner)
        if hasattr(owner, "next_update") and owner is not module:
            continue  # it knows sweeps
        kind = type(owner)
        if kind is ModelCheckpoint:
            every = saves_every(owner)
            cuts += [Every(every)] if every >= 1 else []
        elif kind in _AT_LOG_POINTS:
            if getattr(owner, "logging_interval", None) != "epoch" and log_every:
                # Logged are the starts and the ends of the batches n − 1, 2n − 1, …
                cuts += [Every(log_every, offset) for offset in (0, log_every - 1)]
        elif isinstance(owner, _ONLY_LOOK):
            continue
        elif hooks or any(overrides(owner, hook) for hook in _BATCH):
            single = single or f"{name} acts on batches"
    return Watchers(single, cuts, step)


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


def before_step(owners: Sequence[Any], trainer: Any, module: Any, optimizer: Any) -> None:
    """Call the hooks that come between the backward pass and the step."""
    for hook, arguments in (("on_after_backward", ()), ("on_before_optimizer_step", (optimizer,))):
        call(owners, hook, trainer, module, *arguments)


def call(owners: Sequence[Any], hook: str, trainer: Any, module: Any, *arguments: Any) -> None:
    """Call one hook of callbacks, and of the module."""
    for owner in owners:
        if overrides(owner, hook):
            before = () if owner is module else (trainer, module)
            getattr(owner, hook)(*before, *arguments)


class UpdateHooks:
    """Those who act on single updates: where sweeps end for them, and the calls of their hooks."""

    def __init__(self) -> None:
        self._found = Watchers()
        self._trainer: Any = None
        self._module: Any = None
        self._handle: Any = None  # of the optimizer's steps
        self._updating = False

    def find(self, trainer: Any, module: Any, own_step: bool = False) -> None:
        """Ask who must see which updates of the run."""
        self._trainer, self._module = trainer, module
        by_rule = any(step_size_of(o) is not None for o in trainer.optimizers)
        found = watchers_of(trainer.callbacks, module, trainer.log_every_n_steps, by_rule)
        if own_step and not found.single:
            found = found._replace(single=f"{type(module).__name__} has its own training_step")
        self._found = found
        # Right here, where the state after an update is what a resumed run goes on with.
        warnings.filterwarnings(
            "ignore", message="Using ModelCheckpoint with manual optimization and every_n_train_st"
        )

    def watchers(self) -> list[Watcher]:
        """At which updates sweeps must end."""
        if self._found.single:
            return [Every(1)]
        callbacks = [] if self._trainer is None else self._trainer.callbacks
        return [*self._found.cuts, *(c for c in callbacks if hasattr(c, "next_update"))]

    def listen(self, optimizer: Optimizer, in_sweeps: bool) -> None:
        """Call the hooks of those who act on each step of the optimizer."""
        self.remove()
        found = self._found
        if found.step:

            def listen(optimizer: Any, arguments: Any, options: Any) -> None:
                if self._updating:  # and no update that is only tried, or made once more
                    before_step(found.step, self._trainer, self._module, optimizer)

            self._handle = optimizer.register_step_pre_hook(listen)
        if found.single and in_sweeps:
            _log.info(
                "sweeps: one update a step, because %s; each step costs Lightning about 0.4 ms",
                found.single,
            )

    @contextmanager
    def updating(self, optimizer: Optimizer) -> Iterator[None]:
        """Around the updates of the run itself."""
        call(self._found.step, "on_before_zero_grad", self._trainer, self._module, optimizer)
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
