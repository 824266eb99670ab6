"""Sees a run diverge, says why, takes it back to the last good state and cuts the step size.

η step size, J the loss on an update's examples before it, B examples per update, N training
examples, T planned updates.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.analysis.diagnosis import (
    RECTIFIERS,
    Cause,
    Finding,
    Health,
    examine,
    health,
    overshoot,
    step_limit,
)
from gdtrain.data.dataset import PairLoader
from gdtrain.data.loader import IndexLoader
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.generators import RandomStates
from gdtrain.lightning.module import SupervisedModule
from gdtrain.objective import Objective
from gdtrain.schedules import ReduceOnPlateau

__all__ = ["Divergence"]

_log = logging.getLogger("gdtrain")

_CUT = 10.0  # by which η is divided
_WINDOW = 16  # updates, over which a loss must have grown
_STRETCH, _GOOD = 64, 256  # updates and examples at least, by whose losses states are compared
_SPACING = 2**14  # updates from station to station, at most
_EXAMPLES = {"cpu": 2**16}  # and in these at most so many examples: those that pass in some tenths
_EXAMPLES_ELSEWHERE = 2**20  # of a second
_PART = 32  # of the planned updates, 1/32 at most (but 16 updates)
_SOFAR = 4  # of the updates made, 1/4 at most (but 16 updates)
_PROBE = 256  # examples at most, on which suspicions are checked
_LEAST = 32  # examples of a batch that can be such a probe
_HIGH = 2.0  # times the start's loss: is above it, whatever the noise
_LASTING = 1.5  # the same, where it lasts for three looks or until the end
_FORECAST = 0.2  # of the start's loss: where the run would end, if the loss fell as 1/t
_SHARE = 8  # of the planned updates, 1/8 must be over until a lasting loss counts
_DEAD = 0.9  # of a layer's units: the rest cannot make up for them
_HALF = 0.5  # of a layer's units, that a state to go back to may have lost
_LEFT = 0.25  # of the start's loss: below it a loss that no longer falls is no sign of death
_SUSPECT = 1.2  # of the start's loss: below it only death is looked for
_FLAT = 0.9  # of the loss before: one that has not fallen below it no longer falls
_SCALE = 0.1  # of the loss of predicting 0, which a start is not taken to be below
_SAVED = 2**22  # numbers that a checkpoint may keep of the states to go back to
_RETAINED = 64 * 2**20  # bytes of a loader's batches that are kept to be replayed
_TAIL = 32  # changes of the loss at the end, that tell whether it bounces


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

    Sweeps stay fast: losses are read at stations alone, whose update numbers are fixed before
    training. They are multiples of a power of two, about 1/4 of the updates made, but at least 16,
    and at most 1/32 of the planned updates, 2¹⁴ updates, or (on CPU) 2¹⁶ examples; every validation
    and the end of the run are stations too. (Batches from a loader of pairs: every update.)
    Everything is decided there, so that a run is the same however it is cut into sweeps.

    Looks are at the stations at which 16, 32, 64, … updates were made, on a fixed probe of at most
    256 training examples, and only where the training loss is not below the start's, or falls no
    more and the units are dead: so a loss that is only noisy has no say.
    The start's loss is that of the probe before the first update (but at least a tenth of that of
    predicting 0).

    At a station that shows a failure the updates are made again, by the same engine, from a state
    that was kept, up to the one that failed, and that is examined by autograd: its inputs, targets
    and parameters, the loss of each example, and the gradient.

    With action="recover" the parameters, the optimizer's state and the generators go back to the
    station from which on the mean loss (of 64 updates, and 256 examples, at least) was lowest so
    far. η is cut to a tenth, by `SupervisedModule.rate_cut`, a factor beside the schedule's. The
    update number goes on: the updates up to the station at hand are spent. What no step size can
    help (a NaN in the data) ends the run at once.

    Where a callback freezes or frees parameters, or adds groups to the optimizer, what came before
    is no state to go back to: the update at which it does is a station.

    State in checkpoints: what was seen so far, the losses since the last station and, for models
    with up to about a million parameters, the states to go back to; larger ones go back to where
    they were resumed, at most.

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
        if action not in ("recover", "stop"):
            raise ValueError(f"action must be recover or stop. Received: action={action!r}.")
        if isinstance(recoveries, bool) or not isinstance(recoveries, int) or recoveries < 0:
            raise ValueError(
                f"recoveries must be a whole number of at least 0. Received: "
                f"recoveries={recoveries!r}."
            )
        if isinstance(growth, bool) or not 1 < growth < math.inf:
            raise ValueError(f"growth must be finite and > 1. Received: growth={growth!r}.")
        self.action = action
        self.recoveries = recoveries
        self.growth = float(growth)
        self.events: list[dict[str, Any]] = []
        self._forget()

    def _forget(self) -> None:
        self._station = -1  # the last one; -1: none yet
        self._losses: list[NDArray[np.float64]] = []  # since then
        self._rates: list[NDArray[np.float64]] = []
        self._seen = _Seen()
        self._first: _Kept | None = None  # the state at the origin
        self._good: _Kept | None = None  # the last good one
        self._pending: _Kept | None = None  # at the start of the stretch at hand
        self._last_kept: _Kept | None = None
        self._last_losses: NDArray[np.float64] = np.zeros(0)
        self._forget_session()

    def _forget_session(self) -> None:
        """What begins anew in a resumed run."""
        self._begun = False
        self._module: SupervisedModule | None = None
        self._probe: tuple[Objective, Tensor] | None = None
        self._batches: dict[int, Any] = {}  # of a loader that cannot be asked again
        self._trained: list[int] | None = None  # which parameters are
        self._last_rate = math.nan
        self._bounce: float | None = None

    # ------------------------------------------------------------------ hooks

    def next_update(self, update: int) -> int | None:
        """The next station.

        Args:
            update: Number of updates made.
        """
        module = self._module
        assert module is not None, "asked while training only"
        loader = module.trainer.train_dataloader
        if not isinstance(loader, IndexLoader):
            return update + 1
        examples = _EXAMPLES.get(module.device.type, _EXAMPLES_ELSEWHERE)
        most = min(_SPACING, max(1, examples // loader.batch_size))
        if module.total_updates is not None:
            most = min(most, max(_WINDOW, module.total_updates // _PART))
        spacing = _power_of_two(min(most, max(_WINDOW, update // _SOFAR)))
        ends = (
            (update // spacing + 1) * spacing,
            module.next_validation(update),
            module.total_updates,
        )
        return min((end for end in ends if end is not None and end > update), default=None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew, unless a run is resumed."""
        self._forget_session()
        if trainer.global_step == 0:
            self.events = []
            self._forget()
        self._module = cast(SupervisedModule, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the state at a station, where a stretch begins."""
        module = cast(SupervisedModule, pl_module)
        update = module.updates
        if not self._begun:
            with trainer.strategy.precision_plugin.train_step_context():
                self._begin(module, batch)
        module.follow_callbacks()
        self._notice_changes(module)
        full = False
        if _cannot_be_asked_again(module):
            self._batches[update] = batch
            full = sum(map(_bytes, self._batches.values())) > _RETAINED
        if update != self._station and self._last_kept is not None:
            return
        begins = self._pending is None or update - self._pending.update >= self._length(module)
        if self._last_kept is None or begins or full or _has_memory(module):
            self._last_kept = _Kept.of(module, update)
            self._batches = {u: b for u, b in self._batches.items() if u >= update}
        if begins:
            self._pending, self._seen.stretch = self._last_kept, (0.0, 0)
        self._first = self._first or self._last_kept
        self._good = self._good or self._last_kept

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Gather losses; at a station read them, and recover or stop where the run has failed."""
        module = cast(SupervisedModule, pl_module)
        losses = outputs["losses"].detach().cpu().numpy().astype(np.float64)
        self._losses.append(losses)
        self._rates.append(outputs["rates"].numpy().copy())
        self._last_rate = float(outputs["rates"][-1])
        self._last_losses = np.append(self._last_losses, losses)[-_TAIL - 1 :]
        if module.updates == self.next_update(self._station):
            self._settle(trainer, module, last=module.updates == module.total_updates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what came since the last station, if the run ends here for good.

        See whether the last steps of full-batch descent went beyond the valley's floor.
        """
        module = cast(SupervisedModule, pl_module)
        stop = module.stop
        final = stop is not None and stop.reason is not StopReason.INTERRUPTED
        # A run that was only told to stop may go on, as if nobody had looked.
        if self._losses and (final or (stop is None and not _is_finite(module))):
            with torch.enable_grad():
                self._settle(trainer, module, last=True)
        objective = module.objective
        if (
            objective is not None
            and _is_full(module)
            # Rules go beyond the floor on purpose, and come back.
            and getattr(module.optimizers(use_pl_optimizer=False), "step_size", None) is None
            and len(self._last_losses) > _TAIL
            and (module.stop is None or not _is_lost(module.stop))
        ):
            everything = torch.arange(len(objective.targets), device=objective.targets.device)
            with torch.enable_grad(), trainer.strategy.precision_plugin.train_step_context():
                self._bounce = overshoot(objective, everything, self._last_rate)
        self._batches, self._probe, self._module = {}, None, None

    def annotate(self, stop: Stop) -> Stop:
        """A run's end, with what the user should know of it: recoveries, and whether it bounced.

        Args:
            stop: As another found it.

        Returns:
            The same reason, with more message, numbers and advice where there is some.

        Example:
            >>> Divergence().annotate(Stop(StopReason.BUDGET, "All 9 updates were made.")).message
            'All 9 updates were made.'
        """
        if _is_lost(stop):
            return stop
        message, advice, numbers = [stop.message], [stop.advice], dict(stop.numbers)
        if self.events:
            last = self.events[-1]
            message.append(
                f"The run had diverged {_times(len(self.events))}, last at update "
                f"{last['update']} ({last['cause']}), and went on with η cut to "
                f"{last['lr'] / _CUT:.3g}."
            )
            advice.append(f"Set optimizer.lr={self.events[-1]['advised_lr']:.3g}.")
            numbers["recoveries"] = [dict(event) for event in self.events]
        if self._bounce is not None and self._bounce > 1 and self._last_rate > 0:
            changes = np.sign(np.diff(self._last_losses))
            turns = int((changes[1:] * changes[:-1] < 0).sum())
            bouncing = f"; the loss turned {turns} times in the last {len(changes)} updates"
            message.append(
                f"The steps oscillate: they go beyond the floor of the valley that they cross (η "
                f"times the curvature along the gradient is {self._bounce:.2f}: from 1 on a step "
                f"does, from 2 on it climbs){bouncing if turns > len(changes) // 2 else ''}."
            )
            advice.append(
                f"lr={self._last_rate / self._bounce:.3g} would step onto the floor; a schedule "
                f"that decays settles there too."
            )
            numbers.update(oscillation=self._bounce, turns=turns, lr=self._last_rate)
        return replace(
            stop,
            message=" ".join(filter(None, message)),
            advice=" ".join(filter(None, advice)),
            numbers=numbers,
        )

    # ------------------------------------------------------------------ what losses tell

    def _begin(self, module: SupervisedModule, batch: Any) -> None:
        """Choose the probe, and see what the loss is before the first update."""
        self._begun = True
        if _cannot_be_asked_again(module) or self._station < 0:
            # (Of a run that is resumed, such a loader's batches are lost.)
            self._station, self._losses, self._rates = module.updates, [], []
            self._last_kept = None
        if isinstance(module.trainer.train_dataloader, PairLoader) and module.updates:
            batch = self._block(module, 0, 1)
        objective, indices = module.named(batch)
        if objective is module.objective:
            count = len(objective.targets)
            rows = torch.arange(min(count, _PROBE), device=objective.targets.device)
            self._probe = objective, rows * count // len(rows)  # spread: they may be sorted
        elif indices.shape[1] >= _LEAST:
            self._probe = objective, indices[0]
        seen = self._seen
        if math.isnan(seen.start) and self._probe is not None:
            found = health(*self._probe)
            seen.dead_before = found.dead_share
            seen.start = max(found.value, _SCALE * found.value_of_zero)
            seen.good_mean = found.value if math.isfinite(found.value) else math.inf
            seen.origin = module.updates

    def _notice_changes(self, module: SupervisedModule) -> None:
        """Begin a stretch anew where other parameters are trained: no kept state fits them."""
        trained = [id(p) for p in _owned(module.trainer.optimizers[0]) if p.requires_grad]
        if self._trained not in (None, trained):
            self._station, self._losses, self._rates = module.updates, [], []
            self._first = self._good = self._pending = self._last_kept = None
            self._seen.window, self._batches = np.zeros(0), {}
        self._trained = trained

    @staticmethod
    def _length(module: SupervisedModule) -> int:
        """Updates in a stretch, over which losses are averaged."""
        loader = module.trainer.train_dataloader
        plan = loader.plan if isinstance(loader, PairLoader) else loader
        if not isinstance(plan, IndexLoader):
            return _STRETCH
        return _STRETCH * max(1, -(-_GOOD // (plan.batch_size * _STRETCH)))

    def _settle(self, trainer: Trainer, module: SupervisedModule, last: bool) -> None:
        """Read the losses since the last station; recover or stop where the run has failed."""
        first, self._station = self._station, module.updates
        losses, rates = np.concatenate(self._losses), np.concatenate(self._rates)
        self._losses, self._rates = [], []
        with trainer.strategy.precision_plugin.train_step_context():
            failure = self._read(module, losses, first)
            if failure is None:
                return
            failure = self._explained(module, failure)
            k = min(max(failure.update - first, 0), len(losses) - 1)
            loss = float(losses[k]) if failure.update >= first else None
            self._recover(trainer, module, replace(failure, last=last), float(rates[k]), loss)

    def _read(
        self, module: SupervisedModule, losses: NDArray[np.float64], first: int
    ) -> _Failure | None:
        """Take in the losses of updates first, …; the first failure, if there is one."""
        seen, end = self._seen, first + len(losses)
        bad = np.flatnonzero(~np.isfinite(losses))
        sound = losses[: bad[0]] if len(bad) else losses
        before = len(seen.window)
        series = np.concatenate([seen.window, sound])
        grown = self._grown(series)
        if grown is not None:
            return _Failure(first - before + grown - 1, Cause.GROWTH)
        if len(bad):
            return _Failure(first + int(bad[0]), None)
        seen.window = series[len(series) // _WINDOW * _WINDOW :]
        total, count = seen.stretch
        seen.stretch = total, count = total + float(losses.sum()), count + len(losses)
        if count >= self._length(module):
            mean = total / count
            if math.isnan(seen.start):  # no probe: the first stretch has to do
                seen.start = mean
            if mean < seen.good_mean and self._pending is not None:
                self._good, seen.good_mean = self._pending, mean
        if not _is_finite(module):
            return _Failure(end, None)
        found = self._look(module, losses, first)
        if found is None and end == module.total_updates:
            found = self._look_at_the_end(module)
        return found

    def _grown(self, series: NDArray[np.float64]) -> int | None:
        """After how many losses a window's mean is beyond the bound."""
        bound = self.growth * self._seen.start
        count = len(series) // _WINDOW
        windows = np.minimum(series[: count * _WINDOW].reshape(count, _WINDOW), 4 * bound)
        over = np.flatnonzero(windows.mean(1) > bound)
        return (int(over[0]) + 1) * _WINDOW if len(over) else None

    # ------------------------------------------------------------------ looks

    def _look(
        self, module: SupervisedModule, losses: NDArray[np.float64], first: int
    ) -> _Failure | None:
        """Look at the state at hand, if one of 16, 32, 64, … updates were made since the origin."""
        seen = self._seen
        total, count = seen.since
        seen.since = total, count = total + float(losses.sum()), count + len(losses)
        before, age = first - seen.origin, first + len(losses) - seen.origin
        if (before // _WINDOW).bit_length() == (age // _WINDOW).bit_length():
            return None
        mean, seen.since = total / count, (0.0, 0)
        flat, seen.mean_before = mean > _FLAT * seen.mean_before, mean
        # A loss that only does not fall may be that of a net whose units are dead.
        idle = flat or mean > _FLAT * seen.start
        if not mean > _SUSPECT * seen.start and not (idle and self._is_dead(module)):
            seen.looks.append((age, mean / seen.start))
            return None
        return self._suspect(module, age, mean, flat)

    def _is_dead(self, module: SupervisedModule) -> bool:
        """Whether units are dead; only nets with rectifiers are looked at."""
        return (
            self._probe is not None
            and _has_rectifiers(module)
            and self._has_died(health(*self._probe))
        )

    def _has_died(self, found: Health) -> bool:
        return found.dead_share >= _DEAD > self._seen.dead_before

    def _suspect(
        self, module: SupervisedModule, age: int, mean: float, flat: bool
    ) -> _Failure | None:
        """Whether the state at hand is that of a failed run."""
        seen = self._seen
        found = (
            Health(mean, {}, {}, constant=False) if self._probe is None else health(*self._probe)
        )
        ratio = found.value / seen.start
        before = seen.looks[-1][1] if seen.looks else math.inf
        seen.looks.append((age, ratio))
        left = None if module.total_updates is None else module.total_updates - seen.origin
        cause: Cause | None = None
        if self._has_died(found) and (ratio > _FLAT or (flat and ratio > _LEFT) or found.died):
            cause = Cause.DEAD
        elif found.is_saturated and ratio > _HIGH:
            slow = ratio > 0.7 * before if left is None else ratio * age / left > _FORECAST
            cause = Cause.SATURATED if slow else None
        elif ratio > self.growth:
            cause = Cause.GROWTH
        if cause is None and left is not None and age * _SHARE >= left and len(seen.looks) > 2:
            ratios = [value for _, value in seen.looks[-3:]]
            flat = min(ratios) > _LASTING and ratios[2] >= _FLAT * ratios[0]
            if flat or ratio * age / left > _HIGH:
                cause = Cause.ABOVE_START
        if cause is None:
            return None
        return _Failure(module.updates - 1, cause, self._told(cause, found))

    def _look_at_the_end(self, module: SupervisedModule) -> _Failure | None:
        """Whether all planned updates have led above the start."""
        if self._probe is None:
            return None
        found = health(*self._probe)
        ratio = found.value / self._seen.start
        if self._has_died(found) and (ratio > _FLAT or found.died):
            cause = Cause.DEAD
        elif ratio > _LASTING:
            cause = Cause.SATURATED if found.is_saturated else Cause.ABOVE_START
        else:
            return None
        return _Failure(module.updates - 1, cause, self._told(cause, found))

    def _told(self, cause: Cause, found: Health) -> Finding:
        numbers: dict[str, Any] = {"probe_loss": found.value, "start_loss": self._seen.start}
        loss = f"the loss is {found.value:.4g} on a probe of training examples, and was {{}} there"
        loss = loss.format(f"{self._seen.start:.4g} at the start")
        if cause is Cause.DEAD:
            numbers["layers"] = [n for n, share in found.dead.items() if share == found.dead_share]
            numbers["dead"] = found.dead_share
            text = (
                f"{found.dead_share:.1%} of the units of {', '.join(numbers['layers'])} give 0 for "
                f"every example; {loss}"
            )
        elif cause is Cause.SATURATED:
            share = max(found.saturated.values())
            numbers["layers"] = [name for name, s in found.saturated.items() if s == share]
            numbers["saturated"] = share
            text = (
                f"{share:.1%} of the units of {', '.join(numbers['layers'])} are saturated; {loss}"
            )
        elif cause is Cause.ABOVE_START:
            text = f"{loss}, and has not fallen"
        else:
            text = loss
        return Finding(cause, text, numbers)

    # ------------------------------------------------------------------ why it failed

    def _explained(self, module: SupervisedModule, failure: _Failure) -> _Failure:
        """The failure with its finding; the state is then that before the update that failed."""
        if failure.finding is not None:
            return failure
        if failure.cause is Cause.GROWTH:
            text = (
                f"the mean loss of {_WINDOW} updates is above {self.growth:.4g} times the start's, "
                f"{self._seen.start:.4g}"
            )
            numbers = {"start_loss": self._seen.start, "growth": self.growth}
            return replace(failure, finding=Finding(Cause.GROWTH, text, numbers))
        kept = self._last_kept
        assert kept is not None
        update, spoilt = failure.update, failure.update
        self._go(module, kept, update)
        if not _is_finite(module):
            update = self._last_finite(module, kept, update)
        objective, indices = self._examples(module, update)
        finding = examine(objective, indices, module.draw_of(update), module.watched())
        if finding is None and update < spoilt:
            finding = Finding(
                Cause.STEP,
                "loss and gradient are finite, but the parameters after the step are not",
            )
        elif finding is None:
            finding = Finding(Cause.LOSS, "the loss of the batch is not finite")
        return _Failure(update, finding.cause, finding)

    def _last_finite(self, module: SupervisedModule, kept: _Kept, bad: int) -> int:
        """The update before which all parameters are finite for the last time, by halving."""
        kept.give_back(module)
        good = kept.update
        if not _is_finite(module):
            return good
        while bad - good > 1:
            middle = (good + bad) // 2
            self._go(module, kept, middle)
            if _is_finite(module):
                good, kept = middle, _Kept.of(module, middle)
            else:
                bad = middle
        kept.give_back(module)
        return good

    def _go(self, module: SupervisedModule, kept: _Kept, to: int) -> None:
        """Make the updates again from a state that was kept, with the schedule as it was then."""
        kept.give_back(module)
        schedule = module.schedule
        module.schedule = kept.schedule if kept.schedule is not None else schedule
        try:
            update = kept.update
            while update < to:
                losses, _ = module.make_updates(self._block(module, update, to - update), update)
                update += len(losses)
        finally:
            module.schedule = schedule

    def _block(self, module: SupervisedModule, update: int, count: int) -> Any:
        loader = module.trainer.train_dataloader
        if isinstance(loader, IndexLoader):
            return loader.block(update, count).to(module.device)
        if isinstance(loader, PairLoader):
            return loader.batch(update)
        return self._batches[update]

    def _examples(self, module: SupervisedModule, update: int) -> tuple[Objective, Tensor]:
        """J and the examples of one update."""
        objective, indices = module.named(self._block(module, update, 1))
        return objective, indices[0]

    # ------------------------------------------------------------------ what is done

    def _recover(
        self,
        trainer: Trainer,
        module: SupervisedModule,
        failure: _Failure,
        rate: float,
        loss: float | None,
    ) -> None:
        """Go back to the last good state, and on with a smaller η; or end there."""
        finding = failure.finding
        assert finding is not None
        assert self._good is not None
        finite = finding.cause in _FINITE
        data = None if finite else self._examples(module, failure.update)
        self._good.give_back(module)
        if (
            finding.cause is Cause.DEAD
            and self._first is not None
            and self._probe is not None
            and health(*self._probe).dead_share > max(_HALF, self._seen.dead_before)
        ):
            # A net with many dead units may well have a lower loss than it had before.
            self._good, self._seen.good_mean = self._first, math.inf
            self._first.give_back(module)
        # What is not finite for the good parameters either, no step size can help.
        hopeless = data is not None and (
            examine(*data, module.draw_of(failure.update), module.watched()) is not None
        )
        objective = module.objective
        limit = None
        if objective is not None and _is_full(module) and not hopeless:
            limit = step_limit(objective, trainer.optimizers[0])
        told, where = self._named(trainer, module, failure)
        # η before the schedule: of the group, or the rule's.
        factor = float(module.rate_factors(failure.update, 1)) / module.rate_cut
        peak = float(trainer.optimizers[0].param_groups[0]["initial_lr"]) * module.rate_cut
        peak = rate / factor if factor > 0 else peak
        if failure.last and failure.cause in _FINITE:
            rate = peak  # the last ones are short
        advised = peak / _CUT
        if limit is not None:  # half of it is 1/λ, where a quadratic converges fastest
            advised = min(advised, limit[1] / 2)
        numbers = {
            "update": failure.update,
            "cause": finding.cause.value,
            **({} if loss is None else {"loss": loss}),
            "lr": rate,
            **finding.numbers,
            **where,
        }
        if limit is not None:
            numbers.update(sharpness=limit[0], lr_limit=limit[1])
        message = self._sentence(failure, rate, loss, told, limit)
        again = (
            self.action == "recover"
            and len(self.events) < self.recoveries
            and not hopeless
            and not failure.last
        )
        if again:
            module.rate_cut /= _CUT
            good = self._good.update
            self.events.append({**numbers, "good_update": good, "advised_lr": advised})
            if trainer.is_global_zero:
                _log.warning(
                    "%s The run goes on from the state before update %d, with lr=%.3g.",
                    message,
                    good,
                    rate / _CUT,
                )
            self._begin_again(module)
            return
        if self.events:
            message += f" It had recovered {_times(len(self.events))} before."
            numbers["recoveries"] = [dict(event) for event in self.events]
        kept = f"The model is that before update {self._good.update}, the last good state."
        module.stop = Stop(
            StopReason.DIVERGED if finite else StopReason.NON_FINITE,
            f"{message} {kept}" if _is_finite(module) else message,
            numbers,
            _ADVICE.get(finding.cause, "")
            if hopeless
            else f"Set optimizer.lr={advised:.3g} or less.",
        )
        trainer.should_stop = True

    def _begin_again(self, module: SupervisedModule) -> None:
        """Compare from here on, with the state at hand as the good one."""
        seen = self._seen
        self._seen = _Seen(module.updates, seen.start, seen.dead_before, good_mean=seen.good_mean)
        self._first = self._good = _Kept.of(module, module.updates)
        self._pending = self._last_kept = self._first

    def _sentence(
        self,
        failure: _Failure,
        rate: float,
        loss: float | None,
        told: str,
        limit: tuple[float, float] | None,
    ) -> str:
        assert failure.finding is not None
        cause = failure.finding.cause
        what = (
            "The run diverged"
            if cause in _FINITE
            else f"The loss was {loss}"
            if loss is not None and not math.isfinite(loss)
            else "The parameters became infinite or not a number"
        )
        sentence = f"{what} at update {failure.update} (counted from 0) with lr={rate:.4g}: {told}."
        if limit is not None:
            sentence += (
                f" Full-batch descent is stable below lr={limit[1]:.3g} at the last good state "
                f"(sharpness {limit[0]:.3g})."
            )
        return sentence

    def _named(
        self, trainer: Trainer, module: SupervisedModule, failure: _Failure
    ) -> tuple[str, dict[str, Any]]:
        """The finding in words; examples by their numbers in the training part and the source."""
        finding = failure.finding
        assert finding is not None
        data = cast(Any, trainer).datamodule
        loader = trainer.train_dataloader
        plan = loader.plan if isinstance(loader, PairLoader) else loader
        rows: list[int] | None = None
        if isinstance(plan, IndexLoader):
            rows = plan.block(failure.update, 1)[0].tolist()
        split = getattr(data, "split", None)
        names = getattr(getattr(data, "preprocessing", None), "feature_names", None)

        def source(i: int) -> int | None:
            return None if rows is None or not split else int(split["train"][rows[i]])

        def name(kind: str, i: int) -> str:
            if kind == "feature":
                return f"feature {i}" + (f" ({names[i]})" if names and i < len(names) else "")
            if kind == "target":
                return "the target" if i == 0 else f"target {i}"
            if rows is None:
                return f"example {i} of the batch"
            row = source(i)
            return f"training example {rows[i]}" + (
                "" if row is None else f" (row {row} of the data)"
            )

        where: dict[str, Any] = {}
        positions = finding.numbers.get("examples", [])
        if rows is not None and positions:
            where["examples"] = [rows[i] for i in positions]
            if split:
                where["rows"] = [source(i) for i in positions]
        return finding.told(name), where

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        places = (self._first, self._good, self._pending, self._last_kept)
        kept = list(dict.fromkeys(k for k in places if k is not None))
        if sum(k.size for k in kept) > _SAVED:
            kept = []
        return {
            "events": copy.deepcopy(self.events),
            "station": self._station,
            "losses": [loss for part in self._losses for loss in part.tolist()],
            "rates": [rate for part in self._rates for rate in part.tolist()],
            "seen": {**asdict(self._seen), "window": self._seen.window.tolist()},
            "last_losses": self._last_losses.tolist(),
            "kept": [k.state_dict() for k in kept],
            "places": [kept.index(k) if k in kept else None for k in places],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._forget()
        self.events = copy.deepcopy(state_dict["events"])
        self._station = state_dict["station"]
        self._losses = [np.asarray(state_dict["losses"], dtype=np.float64)]
        self._rates = [np.asarray(state_dict["rates"], dtype=np.float64)]
        seen = state_dict["seen"]
        self._seen = _Seen(**{**seen, "window": np.asarray(seen["window"], dtype=np.float64)})
        self._last_losses = np.asarray(state_dict["last_losses"], dtype=np.float64)
        kept = [_Kept(**saved) for saved in state_dict["kept"]]
        self._first, self._good, self._pending, self._last_kept = (
            None if place is None else kept[place] for place in state_dict["places"]
        )


@dataclass
class _Seen:
    """What losses have told since the origin; pairs are a sum and a number of losses."""

    origin: int = 0  # the update from which losses are compared
    start: float = math.nan  # J on the probe before the first update
    dead_before: float = 0.0  # share of dead units, then
    window: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # not yet full
    since: tuple[float, int] = (0.0, 0)  # the last look
    mean_before: float = math.inf  # of the losses before that look
    looks: list[tuple[int, float]] = field(default_factory=list)  # age, loss in units of start
    stretch: tuple[float, int] = (0.0, 0)  # since the state that is pending
    good_mean: float = math.inf


@dataclass(frozen=True, eq=False)
class _Failure:
    """An update that failed.

    Args:
        update: Its number.
        cause: None: something is not finite, and it is not known yet what.
        finding: What is known.
        last: Whether the run ends here.
    """

    update: int
    cause: Cause | None
    finding: Finding | None = None
    last: bool = False


@dataclass(frozen=True, eq=False)
class _Kept:
    """A copy of everything that updates change, before an update."""

    update: int
    tensors: list[Tensor]
    groups: list[dict[str, Any]]
    states: dict[int, dict[str, Any]]  # of the optimizer, by the parameter's place
    random: dict[str, Any] | tuple[Any, ...]
    schedule: ReduceOnPlateau | None = None

    @classmethod
    def of(cls, module: SupervisedModule, update: int) -> _Kept:
        """The state at hand, which is that before an update."""
        optimizer, schedule = module.trainer.optimizers[0], module.schedule
        owned = _owned(optimizer)
        return cls(
            update,
            [t.detach().clone() for t in _changing(module)],
            [
                {name: _copied(value) for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
            ],
            {i: _copied(optimizer.state[p]) for i, p in enumerate(owned) if p in optimizer.state},
            _generators(module),
            copy.deepcopy(schedule) if isinstance(schedule, ReduceOnPlateau) else None,
        )

    def give_back(self, module: SupervisedModule) -> None:
        """Put it back, but for the schedule."""
        with torch.no_grad():
            for tensor, kept in zip(_changing(module), self.tensors, strict=True):
                tensor.copy_(kept)
                tensor.grad = None
        optimizer = module.trainer.optimizers[0]
        for group, old in zip(optimizer.param_groups, self.groups, strict=True):
            for name in group.keys() - old.keys() - {"params"}:
                del group[name]
            group.update(_copied(old))
        optimizer.state.clear()
        for i, p in enumerate(_owned(optimizer)):
            if i in self.states:
                optimizer.state[p] = _copied(self.states[i])
        RandomStates.from_state_dict(_plain(self.random)).restore()

    @property
    def size(self) -> int:
        """Numbers in it."""
        own = [v for state in self.states.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(t.numel() for t in (*self.tensors, *own))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; what a plateau schedule remembers is the run's to keep."""
        names = ("update", "tensors", "groups", "states")
        return {**{name: getattr(self, name) for name in names}, "random": _plain(self.random)}


def _generators(module: SupervisedModule) -> tuple[Any, ...]:
    """All that a user's layers may draw from, as fast as can be."""
    cuda = torch.cuda.get_rng_state_all() if module.device.type == "cuda" else []
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()  # noqa: NPY002


def _plain(states: dict[str, Any] | tuple[Any, ...]) -> dict[str, Any]:
    """The same in plain containers, as checkpoints have them."""
    if isinstance(states, dict):
        return states
    torchs, cuda, (version, numbers, gauss), (name, keys, *rest) = states
    return {
        "torch": torchs,
        "cuda": cuda,
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def _owned(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


_FINITE = (Cause.GROWTH, Cause.DEAD, Cause.SATURATED, Cause.ABOVE_START)
_ADVICE = {
    Cause.INPUT: "Correct or leave out that example: no step size helps.",
    Cause.TARGET: "Correct or leave out that example: no step size helps.",
    Cause.WEIGHT: "Give the model finite initial parameters: no step size helps.",
    Cause.LOSS: (
        "The last good parameters give no finite loss for it either: look at the scale of these "
        "examples and of the initial parameters, or set data.dtype=float64."
    ),
    Cause.GRADIENT: (
        "The last good parameters give no finite gradient for it either: look for a square root, "
        "a division or a logarithm at 0 in the model."
    ),
}


def _changing(module: SupervisedModule) -> list[Tensor]:
    model = module.model
    return [*(p for p in model.parameters() if p.requires_grad), *model.buffers()]


def _is_finite(module: SupervisedModule) -> bool:
    watched = [t.detach() for t in module.watched().values() if t.is_floating_point()]
    sums = [t.sum() for t in watched]
    if module.device.type == "cuda":  # one wait for the device instead of many
        sums = [torch.stack([total.float() for total in sums]).sum()]
    if all(math.isfinite(float(total)) for total in sums):
        return True
    # A sum may overflow where no number does.
    return all(bool(torch.isfinite(t).all()) for t in watched)


def _is_full(module: SupervisedModule) -> bool:
    loader = module.trainer.train_dataloader
    return isinstance(loader, IndexLoader) and (
        loader.batch_size == loader.num_examples and loader.sampling != "replacement"
    )


def _has_rectifiers(module: SupervisedModule) -> bool:
    return any(isinstance(layer, RECTIFIERS) for layer in module.model.modules())


def _has_memory(module: SupervisedModule) -> bool:
    """Whether the schedule depends on more than the update number."""
    return isinstance(module.schedule, ReduceOnPlateau)


def _is_lost(stop: Stop) -> bool:
    return stop.reason in (StopReason.DIVERGED, StopReason.NON_FINITE)


def _power_of_two(number: int) -> int:
    """The largest that is not above."""
    return 1 << (number.bit_length() - 1)


def _cannot_be_asked_again(module: SupervisedModule) -> bool:
    """Whether the batches come from a loader that is not gdtrain's."""
    return not isinstance(module.trainer.train_dataloader, IndexLoader | PairLoader)


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"


def _bytes(batch: Any) -> int:
    parts = batch if isinstance(batch, list | tuple) else [batch]
    return sum(t.nbytes for t in parts if isinstance(t, Tensor))
