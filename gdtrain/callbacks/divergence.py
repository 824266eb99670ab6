"""Tells a loop's guard what a run of Lightning is, and the user what it found: a run that diverges
goes back to its last good state, and on with a smaller step size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer

from gdtrain.analysis.diagnosis import oscillation, overshoot
from gdtrain.analysis.guard import CUT, TAIL, DivergenceGuard, times
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.lightning.module import SupervisedModule
from gdtrain.optim.protocol import step_size_of, update_rules

__all__ = ["Divergence"]


class Divergence(Callback):
    """Watches losses and parameters, with a diagnosis and a way back when a run fails.

    A run has failed at an update where

    - the loss, or a parameter after it, is infinite or not a number;
    - the mean loss of 16 updates is beyond `growth` times the start's (each counted up to 4 times
      the bound, so that a single example cannot be the cause), or the loss is at a look;
    - at a look, at least 90% of a layer's units are dead (give 0 for every example; at the start
      they were fewer) and the loss is not below the start's, or no longer falls; or at least 95% of
      a layer's tanh or sigmoid outputs are saturated, the loss is above twice the start's, and at a
      fall as 1/t it would end above a fifth of it; or an eighth of the planned updates is over and
      the loss was above 1.5 times the start's at three looks and does not fall, or would end above
      twice it at a fall as 1/t;
    - the last was made, and the loss is above 1.5 times the start's.

    Losses are read, and all is decided, at stations, whose update numbers are fixed before training
    (at most 2¹⁶ examples apart on CPU), and at validations; with a loader of pairs at every update.
    Looks are at the stations at which 16, 32, 64, … updates were made, on a fixed probe of at most
    256 training examples, and only where the training loss is not below the start's, or falls no
    more and the units are dead. The start's loss is that of the probe before the first update (but
    at least a tenth of that of predicting 0). After a failure the updates are made again from a
    state that was kept, up to the one that failed, which is examined.

    With action="recover" parameters, the optimizer's state and the generators go back to the
    station from which on the mean loss (of 64 updates, and 256 examples, at least) was lowest so
    far. η is cut to a tenth, by `SupervisedModule.rate_cut`, a factor beside the schedule's. The
    update number goes on: the updates up to the station at hand are spent. What no step size can
    help (a NaN in the data) ends the run at once. Where a callback freezes or frees parameters, or
    adds groups to the optimizer, what came before is no state to go back to. Checkpoints hold the
    states to go back to for models with up to about a million parameters.

    Args:
        action: "recover", or "stop": the run ends, with the last good state.
        recoveries: How many, range [0, ∞); then the run ends, with the last good state.
        growth: Bound on the loss, in units of the start's, range (1, ∞).

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from functools import partial
        >>> from gdtrain import GD
        >>> from gdtrain.data import EmbeddedDataModule
        >>> from gdtrain.losses import SquaredError
        >>> from gdtrain.models import Linear
        >>> data = EmbeddedDataModule("diabetes", batch_size="full")
        >>> module = SupervisedModule(Linear((10,), 1), SquaredError(), partial(GD, lr=30.0))
        >>> trainer = Trainer(callbacks=[Divergence()], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False, enable_progress_bar=False, max_epochs=200,
        ...     enable_model_summary=False)
        >>> trainer.fit(module, datamodule=data)
        >>> module.rate_cut, module.stop is None
        (0.01, True)

    References:
        Lewkowycz et al., The large learning rate phase of deep learning, arXiv 2003.02218 (a loss
        that grows at first may come back by itself).
    """

    decisive = ("action", "recoveries", "growth")  # a resumed run must have the same

    def __init__(
        self,
        action: Literal["recover", "stop"] = "recover",
        recoveries: int = 5,
        growth: float = 1e4,
    ) -> None:
        self.guard = guard = DivergenceGuard(action, recoveries, growth)
        self.action, self.recoveries, self.growth = guard.action, guard.recoveries, guard.growth
        self._bounce: float | None = None

    @property
    def events(self) -> list[dict[str, Any]]:
        """The recoveries so far: plain numbers and words of each."""
        return self.guard.events

    def next_update(self, update: int) -> int | None:
        """The next station."""
        return self.guard.next_update(update)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the guard to the loop that is about to be made, and names to the guard."""
        data = cast(Any, trainer).datamodule
        split = getattr(data, "split", None)
        self.guard.rows = split["train"] if split else None
        self.guard.features = getattr(getattr(data, "preprocessing", None), "feature_names", None)
        self._bounce = None
        cast(SupervisedModule, pl_module).guard = self.guard

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the last steps of full-batch descent went beyond the valley's floor."""
        module = cast(SupervisedModule, pl_module)
        module.settle()
        objective, plan = module.objective, module.plan
        if (
            objective is not None
            and plan is not None
            and plan.is_full_batch
            # Rules for the step size pass the floor on purpose, and come back.
            and update_rules(module.loop.optimizer) is not None
            and step_size_of(module.loop.optimizer) is None
            and len(self.guard.last_losses) > TAIL
            and (module.stop is None or not _is_lost(module.stop))
        ):
            everything = torch.arange(len(objective.targets), device=objective.targets.device)
            with module.in_a_step():
                self._bounce = overshoot(objective, everything, self.guard.last_rate)

    def annotate(self, stop: Stop) -> Stop:
        """A run's end, with what the user should know of it: recoveries, and whether it bounced."""
        if _is_lost(stop):
            return stop
        message, advice, numbers = [stop.message], [stop.advice], dict(stop.numbers)
        if self.events:
            last = self.events[-1]
            message.append(
                f"The run had diverged {times(self.events)}, last at update {last['update']} "
                f"({last['cause']}), and went on with η cut to {last['lr'] / CUT:.3g}."
            )
            advice.append(f"Set optimizer.lr={last['advised_lr']:.3g}.")
            numbers["recoveries"] = [dict(event) for event in self.events]
        rate = self.guard.last_rate
        if self._bounce is not None and self._bounce > 1 and rate > 0:
            said, helps, found = oscillation(self._bounce, rate, self.guard.last_losses)
            message, advice, numbers = [*message, said], [*advice, helps], numbers | found
        return replace(
            stop,
            message=" ".join(filter(None, message)),
            advice=" ".join(filter(None, advice)),
            numbers=numbers,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return self.guard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.guard.load_state_dict(state_dict)


def _is_lost(stop: Stop) -> bool:
    return stop.reason in (StopReason.DIVERGED, StopReason.NON_FINITE)
