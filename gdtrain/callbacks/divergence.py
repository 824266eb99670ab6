"""Sees a run diverge, says why, takes it back to the last good state and cuts the step size.

η step size, J the loss on an update's examples before it, B examples per update, N training
examples, T planned updates.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.analysis.diagnosis import (
    RECTIFIERS,
    Finding,
    Names,
    examine,
    explain,
    health,
    oscillation,
    overshoot,
    sentence,
    step_limit,
    what_helps,
)
from gdtrain.data.loader import IndexLoader, PairLoader
from gdtrain.descent.monitors import (
    FINITE,
    Cause,
    Failure,
    Health,
    LossMonitor,
    next_station,
    stretch_length,
)
from gdtrain.descent.recovery import Recovery
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.lightning.module import SupervisedModule
from gdtrain.objective import Objective
from gdtrain.optim.protocol import step_size_of, update_rules
from gdtrain.ranges import Interval, Whole
from gdtrain.schedules import Schedule

__all__ = ["Divergence"]

_log = logging.getLogger("gdtrain")

_CUT = 10.0  # by which η is divided
_EXAMPLES = {"cpu": 2**16}  # from station to station at most so many: those that pass in some
_EXAMPLES_ELSEWHERE = 2**20  # tenths of a second
_PROBE = 256  # examples at most, on which suspicions are checked
_LEAST = 32  # examples of a batch that can be such a probe
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

    Sweeps stay fast: losses are read at stations alone (`gdtrain.descent.monitors.next_station`),
    whose update numbers are fixed before training, at most 2¹⁶ examples apart (on CPU), and at
    validations. (Batches from a loader of pairs: every update.) All is decided there, before any
    callback sees the sweep: a run depends neither on its sweeps nor on the order of callbacks.

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
        self.action = action
        self.recoveries = Whole(0).check("recoveries", recoveries)
        self.growth = Interval(1, math.inf).check("growth", growth)
        self.events: list[dict[str, Any]] = []
        self._forget()

    def _forget(self) -> None:
        self._monitor, self._recovery = LossMonitor(self.growth), Recovery()
        self._station = -1  # the last one; -1: none yet
        self._losses: list[NDArray[np.float64]] = []  # since then
        self._rates: list[NDArray[np.float64]] = []
        self._last_losses: NDArray[np.float64] = np.zeros(0)
        self._forget_session()

    def _forget_session(self) -> None:
        """What begins anew in a resumed run."""
        self._run: _Run | None = None
        self._begun = self._ended = False
        self._last_rate = math.nan
        self._bounce: float | None = None

    # ------------------------------------------------------------------ the guard of the sweeps

    def next_update(self, update: int) -> int | None:
        """The next station.

        Args:
            update: Number of updates made.
        """
        assert self._run is not None, "asked while training only"
        module, loader = self._run.module, self._run.loader
        if not isinstance(loader, IndexLoader):
            return update + 1
        examples = _EXAMPLES.get(module.device.type, _EXAMPLES_ELSEWHERE)
        most = max(1, examples // loader.batch_size)
        return next_station(update, most, module.total_updates, module.next_validation(update))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew, unless a run is resumed; from now on, see each sweep before anybody else."""
        self._forget_session()
        if trainer.global_step == 0:
            self.events = []
            self._forget()
        module = cast(SupervisedModule, pl_module)
        self._run, module.guard = _Run(module), self

    def before(self, batch: Any) -> None:
        """Keep the state at a station, where a stretch begins.

        Args:
            batch: From which the next updates are made.
        """
        run, recovery = self._run, self._recovery
        assert run is not None
        if not self._begun:
            self._begin(run, batch)
        self._notice_changes(run)
        full = run.retain(batch)
        if run.updates != self._station and recovery.latest is not None:
            return
        if recovery.keep(run, stretch_length(run.batch_size), full):
            self._monitor.stretch = (0.0, 0)
        assert recovery.latest is not None
        run.forget_before(recovery.latest.update)

    def after(self, outputs: Mapping[str, Any]) -> None:
        """Gather losses; at a station read them, and recover or stop where the run has failed.

        Args:
            outputs: What the module hands out about a sweep.
        """
        run = self._run
        assert run is not None
        losses = outputs["losses"].detach().cpu().numpy().astype(np.float64)
        self._losses.append(losses)
        self._rates.append(outputs["rates"].numpy().copy())
        self._last_rate = float(outputs["rates"][-1])
        self._last_losses = np.append(self._last_losses, losses)[-_TAIL - 1 :]
        if run.updates == self.next_update(self._station):
            self._settle(run, last=run.updates == run.module.total_updates)

    def end(self) -> None:
        """Read what came since the last station, if the run ends here for good."""
        run = self._run
        if run is None or self._ended:
            return
        self._ended = True
        stop = run.module.stop
        final = stop is not None and stop.reason is not StopReason.INTERRUPTED
        # A run that was only told to stop may go on, as if nobody had looked.
        if self._losses and (final or (stop is None and not run.is_finite())):
            precision = run.module.trainer.strategy.precision_plugin
            with torch.enable_grad(), precision.train_step_context():
                self._settle(run, last=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the last steps of full-batch descent went beyond the valley's floor."""
        module = cast(SupervisedModule, pl_module)
        self.end()
        run, self._run, module.guard = self._run, None, None
        objective = module.objective
        if (
            objective is not None
            and run is not None
            and run.is_full
            and _is_plain(run.optimizer)
            and len(self._last_losses) > _TAIL
            and (module.stop is None or not _is_lost(module.stop))
        ):
            everything = torch.arange(len(objective.targets), device=objective.targets.device)
            with torch.enable_grad(), trainer.strategy.precision_plugin.train_step_context():
                self._bounce = overshoot(objective, everything, self._last_rate)

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
                f"The run had diverged {_times(self.events)}, last at update {last['update']} "
                f"({last['cause']}), and went on with η cut to {last['lr'] / _CUT:.3g}."
            )
            advice.append(f"Set optimizer.lr={last['advised_lr']:.3g}.")
            numbers["recoveries"] = [dict(event) for event in self.events]
        if self._bounce is not None and self._bounce > 1 and self._last_rate > 0:
            said, helps, found = oscillation(self._bounce, self._last_rate, self._last_losses)
            message, advice, numbers = [*message, said], [*advice, helps], numbers | found
        return replace(
            stop,
            message=" ".join(filter(None, message)),
            advice=" ".join(filter(None, advice)),
            numbers=numbers,
        )

    # ------------------------------------------------------------------ at a station

    def _begin(self, run: _Run, batch: Any) -> None:
        """Choose the probe, and see what the loss is before the first update."""
        self._begun = True
        if run.cannot_be_asked_again or self._station < 0:
            # (Of a run that is resumed, such a loader's batches are lost.)
            self._station, self._losses, self._rates = run.updates, [], []
            self._recovery.latest = None
        run.choose_probe(batch)
        if run.probe is not None and math.isnan(self._monitor.start):
            self._monitor.begin(run.updates, run.units())

    def _notice_changes(self, run: _Run) -> None:
        """Begin a stretch anew where other parameters are trained: no kept state fits them."""
        if run.trains_others():
            self._station, self._losses, self._rates = run.updates, [], []
            self._recovery.forget()
            self._monitor.window = np.zeros(0)
            run.forget_before(run.updates)

    def _settle(self, run: _Run, last: bool) -> None:
        """Read the losses since the last station; recover or stop where the run has failed."""
        first, self._station = self._station, run.updates
        losses, rates = np.concatenate(self._losses), np.concatenate(self._rates)
        self._losses, self._rates = [], []
        verdict = self._monitor.read(
            first,
            losses,
            finite=run.is_finite(),
            total=run.module.total_updates,
            stretch=stretch_length(run.batch_size),
            units=None if run.probe is None else run.units,
            rectifies=run.rectifies,
        )
        if verdict.lowest:
            self._recovery.promote()
        if verdict.failure is None:
            return
        update, finding = self._explained(run, verdict.failure)
        k = min(max(update - first, 0), len(losses) - 1)
        loss = float(losses[k]) if update >= first else None
        self._answer(run, _Accident(update, finding, last, float(rates[k]), loss))

    def _explained(self, run: _Run, failure: Failure) -> tuple[int, Finding]:
        """Which update failed, and why; found by making updates again, where that is not known."""
        if failure.cause is not None:
            return failure.update, explain(failure, self._monitor.start, self.growth)
        update = self._recovery.locate(run, failure.update)
        if update < failure.update:
            text = "loss and gradient are finite, but the parameters after the step are not"
            unseen = Finding(Cause.STEP, text)
        else:
            unseen = Finding(Cause.LOSS, "the loss of the batch is not finite")
        return update, run.examine(update) or unseen

    def _answer(self, run: _Run, accident: _Accident) -> None:
        """Go back to the last good state, and on with a smaller η; or end there."""
        module, monitor, finding = run.module, self._monitor, accident.finding
        good = self._recovery.go_back(run)
        dead = finding.cause is Cause.DEAD and run.probe is not None
        if dead and monitor.too_few_live(run.units()):
            good, monitor.good_mean = self._recovery.go_back(run, to_the_first=True), math.inf
        finite = finding.cause in FINITE
        # What is not finite for the good parameters either, no step size can help.
        hopeless = not finite and run.examine(accident.update) is not None
        limit = None
        if module.objective is not None and run.is_full and not hopeless:
            limit = step_limit(module.objective, run.optimizer)
        peak = run.peak(accident.update, accident.rate)
        rate = peak if accident.last and finite else accident.rate  # the last ones are short
        # Half of the limit is 1/λ, where a quadratic converges fastest.
        advised = min(peak / _CUT, math.inf if limit is None else limit[1] / 2)
        numbers, message = accident.told(run.names(accident.update), rate, limit)
        again = self.action == "recover" and len(self.events) < self.recoveries
        if again and not hopeless and not accident.last:
            module.rate_cut /= _CUT
            self.events.append({**numbers, "good_update": good, "advised_lr": advised})
            if module.trainer.is_global_zero:
                goes_on = "%s The run goes on from the state before update %d, with lr=%.3g."
                _log.warning(goes_on, message, good, rate / _CUT)
            monitor.begin_again(run.updates)
            self._recovery.begin_again(run)
            return
        if self.events:
            message += f" It had recovered {_times(self.events)} before."
            numbers["recoveries"] = [dict(event) for event in self.events]
        kept = f"The model is that before update {good}, the last good state."
        module.stop = Stop(
            StopReason.DIVERGED if finite else StopReason.NON_FINITE,
            f"{message} {kept}" if run.is_finite() else message,
            numbers,
            what_helps(finding.cause) if hopeless else f"Set optimizer.lr={advised:.3g} or less.",
        )
        module.trainer.should_stop = True

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {
            "events": copy.deepcopy(self.events),
            "station": self._station,
            "losses": [loss for part in self._losses for loss in part.tolist()],
            "rates": [rate for part in self._rates for rate in part.tolist()],
            "seen": self._monitor.state_dict(),
            "last_losses": self._last_losses.tolist(),
            **self._recovery.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._forget()
        self.events = copy.deepcopy(state_dict["events"])
        self._station = state_dict["station"]
        self._losses = [np.asarray(state_dict["losses"], dtype=np.float64)]
        self._rates = [np.asarray(state_dict["rates"], dtype=np.float64)]
        self._monitor.load_state_dict(state_dict["seen"])
        self._last_losses = np.asarray(state_dict["last_losses"], dtype=np.float64)
        self._recovery.load_state_dict(state_dict)


@dataclass(frozen=True)
class _Accident:
    """An update that failed, why, whether the run ends here, and η and J there."""

    update: int
    finding: Finding
    last: bool
    rate: float
    loss: float | None

    def told(
        self, names: Names, rate: float, limit: tuple[float, float] | None
    ) -> tuple[dict[str, Any], str]:
        """Numbers and words, with η, and λ and the largest stable η where they are known."""
        finding, update, loss = self.finding, self.update, self.loss
        numbers = {
            "update": update,
            "cause": finding.cause.value,
            **({} if loss is None else {"loss": loss}),
            "lr": rate,
            **finding.numbers,
            **names.numbers(finding),
        }
        if limit is not None:
            numbers.update(sharpness=limit[0], lr_limit=limit[1])
        return numbers, sentence(finding, finding.told(names), update, rate, loss, limit)


class _Run:
    """A `SupervisedModule` in training, as `gdtrain.descent.recovery.Run`, with its probe."""

    def __init__(self, module: SupervisedModule) -> None:
        self.module = module
        self.loader = module.trainer.train_dataloader
        self.probe: tuple[Objective, Tensor] | None = None
        self._batches: dict[int, Any] = {}  # of a loader that cannot be asked again
        self._trained: list[int] | None = None  # which parameters are

    @property
    def model(self) -> nn.Module:
        return self.module.model

    @property
    def optimizer(self) -> Optimizer:
        return self.module.trainer.optimizers[0]

    @property
    def schedule(self) -> Schedule:
        return self.module.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self.module.schedule = schedule

    @property
    def updates(self) -> int:
        return self.module.updates

    @property
    def plan(self) -> IndexLoader | None:
        """Which examples make which update, where that is known."""
        loader = self.loader.plan if isinstance(self.loader, PairLoader) else self.loader
        return loader if isinstance(loader, IndexLoader) else None

    @property
    def batch_size(self) -> int | None:
        return None if self.plan is None else self.plan.batch_size

    @property
    def is_full(self) -> bool:
        """Whether each update sees all (resident) examples."""
        return isinstance(self.loader, IndexLoader) and (
            self.loader.batch_size == self.loader.num_examples
            and self.loader.sampling != "replacement"
        )

    @property
    def rectifies(self) -> bool:
        return any(isinstance(layer, RECTIFIERS) for layer in self.model.modules())

    @property
    def cannot_be_asked_again(self) -> bool:
        """Whether the batches come from a loader that is not gdtrain's."""
        return self.plan is None

    def trains_others(self) -> bool:
        """Whether other parameters are trained than when this was last asked."""
        groups, before = self.optimizer.param_groups, self._trained
        self._trained = [id(p) for g in groups for p in g["params"] if p.requires_grad]
        return before not in (None, self._trained)

    def retain(self, batch: Any) -> bool:
        """Keep a batch that cannot be asked again; says whether too much is kept by now."""
        if not self.cannot_be_asked_again:
            return False
        self._batches[self.updates] = batch
        return sum(map(_bytes, self._batches.values())) > _RETAINED

    def forget_before(self, update: int) -> None:
        self._batches = {u: batch for u, batch in self._batches.items() if u >= update}

    def choose_probe(self, batch: Any) -> None:
        """Training examples, spread, for they may be sorted; or a batch, if it is large enough."""
        if isinstance(self.loader, PairLoader) and self.updates:
            batch = self._block(0, 1)
        objective, indices = self.module.named(batch)
        if objective is self.module.objective:
            count = len(objective.targets)
            rows = torch.arange(min(count, _PROBE), device=objective.targets.device)
            self.probe = objective, rows * count // len(rows)
        elif indices.shape[1] >= _LEAST:
            self.probe = objective, indices[0]

    def units(self) -> Health:
        """How they are, on the probe."""
        assert self.probe is not None
        return health(*self.probe)

    def examine(self, update: int) -> Finding | None:
        """What is not finite in an update, at the parameters at hand."""
        objective, indices = self.module.named(self._block(update, 1))
        return examine(objective, indices[0], self.module.draw_of(update), self.module.watched())

    def is_finite(self) -> bool:
        watched = [t.detach() for t in self.module.watched().values() if t.is_floating_point()]
        sums = [t.sum() for t in watched]
        if self.module.device.type == "cuda":  # one wait for the device instead of many
            sums = [torch.stack([total.float() for total in sums]).sum()]
        if all(math.isfinite(float(total)) for total in sums):
            return True
        # A sum may overflow where no number does.
        return all(bool(torch.isfinite(t).all()) for t in watched)

    def repeat(self, update: int, count: int) -> int:
        losses, _ = self.module.make_updates(self._block(update, count), update)
        return len(losses)

    def _block(self, update: int, count: int) -> Any:
        if isinstance(self.loader, IndexLoader):
            return self.loader.block(update, count).to(self.module.device)
        if isinstance(self.loader, PairLoader):
            return self.loader.batch(update)
        return self._batches[update]

    def peak(self, update: int, rate: float) -> float:
        """η before the schedule: of the group, or the rule's."""
        factor = float(self.module.rate_factors(update, 1)) / self.module.rate_cut
        group = self.optimizer.param_groups[0]
        return rate / factor if factor > 0 else float(group["initial_lr"]) * self.module.rate_cut

    def names(self, update: int) -> Names:
        """What the user calls the examples of an update."""
        data = cast(Any, self.module.trainer).datamodule
        split = getattr(data, "split", None)
        features = getattr(getattr(data, "preprocessing", None), "feature_names", None)
        if self.plan is None:
            return Names(features=features)
        rows = self.plan.block(update, 1)[0].tolist()
        return Names(rows, split["train"] if split else None, features)


def _is_lost(stop: Stop) -> bool:
    return stop.reason in (StopReason.DIVERGED, StopReason.NON_FINITE)


def _is_plain(optimizer: Optimizer) -> bool:
    """Whether steps follow −g, at a given η: rules pass the floor on purpose, and come back."""
    return update_rules(optimizer) is not None and step_size_of(optimizer) is None


def _times(events: list[Any]) -> str:
    count = len(events)
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"


def _bytes(batch: Any) -> int:
    parts = batch if isinstance(batch, list | tuple) else [batch]
    return sum(t.nbytes for t in parts if isinstance(t, Tensor))
