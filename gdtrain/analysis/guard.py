"""Sees a run diverge, says why, takes it back to the last good state and cuts the step size.

η step size, J the loss on an update's examples before it, B examples per update, N training
examples, T planned updates. `gdtrain.callbacks.Divergence` tells the user what this does.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdtrain.analysis.diagnosis import (
    RECTIFIERS,
    Finding,
    Names,
    examine,
    explain,
    health,
    sentence,
    step_limit,
    what_helps,
)
from gdtrain.descent.loop import Loop, SweepOutput
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
from gdtrain.objective import Objective
from gdtrain.ranges import Interval, Whole

__all__ = ["CUT", "TAIL", "DivergenceGuard", "times"]

_log = logging.getLogger("gdtrain")

CUT = 10.0  # by which η is divided
TAIL = 32  # changes of the loss at the end, that tell whether it bounces
_EXAMPLES = {"cpu": 2**16}  # from station to station at most so many: those that pass in some
_EXAMPLES_ELSEWHERE = 2**20  # tenths of a second
_PROBE = 256  # examples at most, on which suspicions are checked
_LEAST = 32  # examples of a batch that can be such a probe


def times(events: Sequence[Any]) -> str:
    """How often, in words."""
    count = len(events)
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"


class DivergenceGuard:
    """The guard of a `Loop` that reads losses at stations, and recovers or ends a run that failed.

    At a station that shows a failure, the updates are made again up to the one that failed, and
    that is examined. `rows` and `features` name the examples and features for messages: the row of
    the data that each training example is, and words. Arguments as for
    `gdtrain.callbacks.Divergence`, which says what a failure is.

    Example:
        >>> DivergenceGuard(recoveries=2).events
        []
    """

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
        self.rows: Sequence[int] | None = None
        self.features: Sequence[str] | None = None
        self.last_rate = math.nan
        self._loop: Loop | None = None  # from the start to the end
        self._begun = False
        self._forget()

    def _forget(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.last_losses: NDArray[np.float64] = np.zeros(0)
        self._monitor, self._recovery = LossMonitor(self.growth), Recovery()
        self._begin_stretch(-1)  # no station yet

    def _begin_stretch(self, station: int) -> None:
        self._station = station  # the last one
        self._losses: list[NDArray[np.float64]] = []  # since then
        self._rates: list[NDArray[np.float64]] = []

    @property
    def _run(self) -> Loop:
        assert self._loop is not None, "asked while training only"
        return self._loop

    def start(self, loop: Loop) -> None:
        """Start anew, unless a run is resumed."""
        self._loop, self._begun = loop, False
        self._stretch = stretch_length(None if loop.plan is None else loop.plan.batch_size)
        self._probe: tuple[Objective, Tensor] | None = None
        self._trained: list[int] | None = None  # which parameters are
        self.last_rate = math.nan
        if loop.updates == 0:
            self._forget()

    def next_update(self, update: int) -> int | None:
        """The next station."""
        loop = self._run
        if loop.plan is None or loop.objective is None:
            return update + 1
        examples = _EXAMPLES.get(loop.objective.targets.device.type, _EXAMPLES_ELSEWHERE)
        most = max(1, examples // loop.plan.batch_size)
        return next_station(update, most, loop.total_updates, loop.next_validation(update))

    def before(self, objective: Objective, indices: Tensor) -> None:
        """Keep the state at a station, where a stretch begins."""
        loop, self._objective = self._run, objective
        if not self._begun:
            self._begin(objective, indices)
        self._notice_changes()
        full = self._recovery.retain(loop, objective, indices)
        if loop.updates != self._station and self._recovery.latest is not None:
            return
        if self._recovery.keep(loop, objective, self._stretch, full):
            self._monitor.stretch = (0.0, 0)

    def after(self, output: SweepOutput) -> None:
        """Gather losses; at a station read them, and recover or stop where the run has failed."""
        losses = output.losses.detach().cpu().numpy().astype(np.float64)
        self._losses.append(losses)
        self._rates.append(output.rates.numpy().copy())
        self.last_rate = float(output.rates[-1])
        self.last_losses = np.append(self.last_losses, losses)[-TAIL - 1 :]
        updates = self._run.updates
        if updates == self.next_update(self._station):
            self._settle(last=updates == self._run.total_updates)

    def end(self) -> None:
        """Read what came since the last station, if the run ends here for good."""
        loop = self._loop
        if loop is None:
            return
        stop = loop.state.stop
        final = stop is not None and stop.reason is not StopReason.INTERRUPTED
        # A run that was only told to stop may go on, as if nobody had looked.
        if self._begun and self._losses and (final or not (stop or loop.watched.is_finite())):
            self._settle(last=True)
        self._loop, self._probe = None, None

    def _begin(self, objective: Objective, indices: Tensor) -> None:
        """Choose the probe, and see what the loss is before the first update."""
        loop, self._begun = self._run, True
        self._recovery.resume(objective, loop.optimizer)
        if loop.plan is None or self._station < 0:
            # (Of a run that is resumed, batches that no plan names are lost.)
            self._begin_stretch(loop.updates)
            self._recovery.latest = None
        if objective is loop.objective:  # training examples, spread, for they may be sorted
            count = len(objective.targets)
            rows = torch.arange(min(count, _PROBE), device=objective.targets.device)
            self._probe = objective, rows * count // len(rows)
        else:  # a batch, if it is large enough
            if loop.plan is not None and loop.updates:
                objective, indices = loop.examples(0, 1)
            self._probe = (objective, indices[0]) if indices.shape[1] >= _LEAST else None
        if self._probe is not None and math.isnan(self._monitor.start):
            self._monitor.begin(loop.updates, self._units())

    def _notice_changes(self) -> None:
        """Begin a stretch anew where other parameters are trained: no kept state fits them."""
        groups, before = self._run.optimizer.param_groups, self._trained
        self._trained = [id(p) for g in groups for p in g["params"] if p.requires_grad]
        if before not in (None, self._trained):
            self._begin_stretch(self._run.updates)
            self._recovery, self._monitor.window = Recovery(), np.zeros(0)

    def _settle(self, last: bool) -> None:
        """Read the losses since the last station; recover or stop where the run has failed."""
        loop, first = self._run, self._station
        losses, rates = np.concatenate(self._losses), np.concatenate(self._rates)
        self._begin_stretch(loop.updates)
        verdict = self._monitor.read(
            first,
            losses,
            finite=loop.watched.is_finite(),
            total=loop.total_updates,
            stretch=self._stretch,
            units=None if self._probe is None else self._units,
            rectifies=any(isinstance(m, RECTIFIERS) for m in self._objective.model.modules()),
        )
        if verdict.lowest:
            self._recovery.good = self._recovery.pending
        if verdict.failure is None:
            return
        update, finding = self._explained(verdict.failure)
        k = min(max(update - first, 0), len(losses) - 1)
        loss = float(losses[k]) if update >= first else None
        self._answer(update, finding, float(rates[k]), loss, last)

    def _explained(self, failure: Failure) -> tuple[int, Finding]:
        """Which update failed, and why; found by making updates again, where that is not known."""
        if failure.cause is not None:
            return failure.update, explain(failure, self._monitor.start, self.growth)
        update = self._recovery.locate(self._run, self._objective, failure.update)
        if update < failure.update:
            text = "loss and gradient are finite, but the parameters after the step are not"
            unseen = Finding(Cause.STEP, text)
        else:
            unseen = Finding(Cause.LOSS, "the loss of the batch is not finite")
        return update, self._examine(update) or unseen

    def _answer(
        self, update: int, finding: Finding, rate: float, loss: float | None, last: bool
    ) -> None:
        """Go back to the last good state, and on with a smaller η; or end there."""
        loop, monitor, recovery = self._run, self._monitor, self._recovery
        good = recovery.go_back()
        dead = finding.cause is Cause.DEAD and self._probe is not None
        if dead and monitor.too_few_live(self._units()):
            good, monitor.good_mean = recovery.go_back(to_the_first=True), math.inf
        finite = finding.cause in FINITE
        # What is not finite for the good parameters either, no step size can help.
        hopeless = not finite and self._examine(update) is not None
        limit = None
        full = loop.plan is not None and loop.plan.is_full_batch
        if loop.objective is not None and full and not hopeless:
            limit = step_limit(loop.objective, loop.optimizer)
        peak = self._peak(update, rate)
        if last and finite:
            rate = peak  # the last ones are short
        # Half of the limit is 1/λ, where a quadratic converges fastest.
        advised = min(peak / CUT, math.inf if limit is None else limit[1] / 2)
        names = self._names(update)
        message = sentence(finding, finding.told(names), update, rate, loss, limit)
        numbers = {
            "update": update,
            "cause": finding.cause.value,
            **({} if loss is None else {"loss": loss}),
            "lr": rate,
            **finding.numbers,
            **names.numbers(finding),
            **({} if limit is None else {"sharpness": limit[0], "lr_limit": limit[1]}),
        }
        again = self.action == "recover" and len(self.events) < self.recoveries
        if again and not hopeless and not last:
            loop.state.rate_cut /= CUT
            self.events.append({**numbers, "good_update": good, "advised_lr": advised})
            if self._objective.rank == 0:
                goes_on = "%s The run goes on from the state before update %d, with lr=%.3g."
                _log.warning(goes_on, message, good, rate / CUT)
            monitor.begin_again(loop.updates)
            recovery.begin_again(loop, self._objective)
            return
        if self.events:
            message += f" It had recovered {times(self.events)} before."
            numbers["recoveries"] = [dict(event) for event in self.events]
        kept = f"The model is that before update {good}, the last good state."
        loop.state.stop = Stop(
            StopReason.DIVERGED if finite else StopReason.NON_FINITE,
            f"{message} {kept}" if loop.watched.is_finite() else message,
            numbers,
            what_helps(finding.cause) if hopeless else f"Set optimizer.lr={advised:.3g} or less.",
        )

    def _units(self) -> Health:
        """How they are, on the probe."""
        assert self._probe is not None
        return health(*self._probe)

    def _examine(self, update: int) -> Finding | None:
        """What is not finite in an update, at the parameters at hand."""
        loop = self._run
        objective, indices = self._recovery.examples(loop, update)
        return examine(objective, indices[0], loop.draw_of(update), loop.watched.tensors)

    def _peak(self, update: int, rate: float) -> float:
        """η before the schedule: of the group, or the rule's."""
        loop = self._run
        cut = loop.state.rate_cut
        factor = float(loop.rate_factors(update, 1)) / cut
        return rate / factor if factor > 0 else loop.optimizer.param_groups[0]["initial_lr"] * cut

    def _names(self, update: int) -> Names:
        """What the user calls the examples of an update."""
        plan = self._run.plan
        examples = None if plan is None else plan.block(update, 1)[0].tolist()
        return Names(examples, self.rows, self.features)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {
            "events": copy.deepcopy(self.events),
            "station": self._station,
            "losses": [loss for part in self._losses for loss in part.tolist()],
            "rates": [rate for part in self._rates for rate in part.tolist()],
            "seen": self._monitor.state_dict(),
            "last_losses": self.last_losses.tolist(),
            **self._recovery.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._forget()
        self.events = copy.deepcopy(state_dict["events"])
        self._begin_stretch(state_dict["station"])
        self._losses.append(np.asarray(state_dict["losses"], dtype=np.float64))
        self._rates.append(np.asarray(state_dict["rates"], dtype=np.float64))
        self._monitor.load_state_dict(state_dict["seen"])
        self.last_losses = np.asarray(state_dict["last_losses"], dtype=np.float64)
        self._recovery.load_state_dict(state_dict)
