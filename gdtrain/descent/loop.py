"""The descent by itself: makes the updates of a run, sweep by sweep, and counts them.

N examples, B examples per update, K updates in one sweep, U updates per epoch, T planned updates.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.descent.plan import Plan
from gdtrain.descent.preparation import (
    check_examples,
    restore_layout,
    single_example,
    use_channels_last,
)
from gdtrain.descent.recovery import Guard, Watched
from gdtrain.descent.state import State
from gdtrain.descent.trial import Snapshot, trial
from gdtrain.engines import ENGINES, Eager, Engine, EngineName, NotApplicableError, choose
from gdtrain.losses import Loss
from gdtrain.objective import Objective
from gdtrain.optim.protocol import step_size_of
from gdtrain.schedules import ReduceOnPlateau, Schedule
from gdtrain.step_sizes import StepSize

__all__ = ["Loop", "SweepOutput", "check_engine"]

_log = logging.getLogger("gdtrain")

_SWEEP_SECONDS = 0.1  # of automatic length: what surrounds a sweep then costs below 1%
_MOST_UPDATES = 2**16  # in such a sweep
_SCHEDULED = "scheduled_lr"  # of a group: its "lr" as the schedule left it


@dataclass(frozen=True)
class SweepOutput:
    """What one sweep of K updates gives out: the number of its first update, (K,) losses J on each
    update's examples before it, (K,) rates η of the first group, seconds, and B.
    """

    first: int
    losses: Tensor
    rates: Tensor
    seconds: float
    examples: int

    @property
    def updates(self) -> int:
        """K."""
        return len(self.losses)


def check_engine(name: str) -> None:
    """Raise where there is no such engine, and it is not "auto"."""
    if name not in ("auto", *ENGINES):
        raise ValueError(f"engine must be one of auto, {', '.join(ENGINES)}. Received: {name!r}.")


class EngineChoice:
    """Makes updates with an engine that is chosen at the first of them, and named in the state.

    Without an objective of the run, each sweep has its own, and eager makes its updates.
    """

    def __init__(
        self, objective: Objective | None, optimizer: Optimizer, wanted: EngineName, state: State
    ) -> None:
        check_engine(wanted)
        self.objective, self.optimizer = objective, optimizer
        self.wanted, self.state = wanted, state
        self.reason = ""
        self.rates = torch.zeros(0, dtype=torch.float64)
        """(K,): η of the first group at each of the updates that were made last."""
        self._engine: Engine | None = None
        if state.engine_before is None:
            state.engine = "eager"  # until one is chosen

    @property
    def evaluations(self) -> int:
        """How often a rule has looked at J or its gradient elsewhere, by the engine in use."""
        return 0 if self._engine is None else self._engine.evaluations

    def choose_again(self) -> None:
        """Before the next update, for parameters or groups have changed."""
        self._engine, self.state.engine = None, "eager"

    def run(self, objective: Objective, indices: Tensor, factors: Tensor, draw: int) -> Tensor:
        """Make K updates, on indices (K, B) with the schedule's factors (K,), float64.

        `draw` names the random numbers of the first. Returned is (K,), J on each update's examples
        before it.
        """
        if objective is not self.objective:  # of one batch
            return self._run_on(Eager(objective, self.optimizer), indices, factors, draw)
        if self._engine is None:
            self._engine = self._choose(objective)
        try:
            return self._run_on(self._engine, indices, factors, draw)
        except NotApplicableError as error:  # found out only by trying, as a compiler does
            if self.wanted != "auto":
                raise ValueError(
                    f"engine={self.wanted} does not apply: {error}. Use engine=auto, which "
                    f"takes the fastest that does."
                ) from error
            self.reason = f"not {self._engine.name}: {error}"
            warnings.warn(
                f"The {self._engine.name} engine does not apply, and eager goes on: {error}",
                stacklevel=2,
            )
            self._engine = Eager(objective, self.optimizer)
            return self._run_on(self._engine, indices, factors, draw)

    def _run_on(self, engine: Engine, indices: Tensor, factors: Tensor, draw: int) -> Tensor:
        losses = engine(indices, factors, draw)
        self.rates, self.state.engine = engine.rates, engine.name
        return losses

    def _choose(self, objective: Objective) -> Engine:
        before, self.state.engine_before = self.state.engine_before, None
        if self.wanted == "auto" and before is not None:
            # A resumed run goes on with the engine that it had, so that it is the same run.
            try:
                engine, _ = choose(before, objective, self.optimizer)  # type: ignore[arg-type]
                self.reason = "as before"
                return engine
            except ValueError as error:
                warnings.warn(
                    f"The run goes on equal to rounding, not bit for bit: {error}", stacklevel=2
                )
        planned = self.state.total_updates
        engine, self.reason = choose(self.wanted, objective, self.optimizer, planned)
        if objective.rank == 0:
            _log.info("engine: %s (%s)", engine.name, self.reason)
        return engine


class Average:
    """Puts the average that some step-size rules keep in the parameters' place: for a while, for
    evaluation, or at the end.
    """

    def __init__(self, optimizer: Optimizer, state: State) -> None:
        self._optimizer, self._state = optimizer, state
        self._shown = self._ended = False

    @property
    def _rule(self) -> StepSize | None:
        rule = step_size_of(self._optimizer)
        if rule is None or rule.average is None or not self._state.updates or self._ended:
            return None
        return rule

    @property
    def is_hidden(self) -> bool:
        """Whether there is one that the parameters are not."""
        return self._rule is not None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it, the parameters are the average, if there is one."""
        rule = self._rule
        if rule is None or self._shown:
            yield
            return
        rule.eval(self._optimizer)
        self._shown = True
        try:
            yield
        finally:
            self._shown = False
            rule.train(self._optimizer)

    def end(self) -> None:
        """Leave the average in the parameters' place, if there is one."""
        rule = self._rule
        if rule is not None:
            rule.eval(self._optimizer)
            self._ended = True


class Loop:
    """Descends on an objective, update by update; needs no Lightning.

        for each sweep of the plan:  engine: K times  g = ∇J(θ; B examples), θ ← rule(θ, g, η)

    Only here are updates made and counted. Without an objective, each sweep comes with its own, of
    `model`; without a plan, each sweep's indices are handed to `advance`. The groups of the
    optimizer have "initial_lr", as `make_optimizer` sets it. The plan's seed names the random
    numbers of gdtrain's layers.
    """

    def __init__(
        self,
        objective: Objective | None,
        optimizer: Optimizer,
        plan: Plan | None,
        *,
        model: nn.Module | None = None,
        engine: EngineName = "auto",
        state: State | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.objective, self.optimizer, self.plan = objective, optimizer, plan
        self.model = objective.model if objective is not None else model
        self.state = State() if state is None else state
        self.engine = EngineChoice(objective, optimizer, engine, self.state)
        self.average = Average(optimizer, self.state)
        if plan is not None:
            self.state.total_updates = plan.total
            self.state.updates_per_epoch = plan.updates_per_epoch
        self.guard = guard
        # From an update and a count, K at most, to J and the (K, B) examples of the plan there.
        self.examples: Callable[[int, int], tuple[Objective, Tensor]] = self._resident
        # The smallest update number above one at which the run is validated.
        self.next_validation: Callable[[int], int | None] = lambda update: None
        # Around the updates that count, and no others.
        self.updating: Callable[[], AbstractContextManager[None]] = nullcontext
        # Whether somebody sets η of each group beside the schedule, which then stands back.
        self.has_own_scheduler: Callable[[], bool] = lambda: False
        self.restores_on_error = False  # whether a sweep that raises leaves the counted state
        self._draws = 0 if plan is None else plan.seed & (2**30 - 1)
        self._owned = 0  # parameters of the optimizer, in all groups
        self._started = False
        if objective is not None and self.state.micro_batch_size is not None:
            objective.micro_batch_size = self.state.micro_batch_size

    # ------------------------------------------------------------------ what it is asked

    @property
    def updates(self) -> int:
        """Made so far."""
        return self.state.updates

    @property
    def schedule(self) -> Schedule:
        """The factor on η."""
        return self.state.schedule

    @property
    def total_updates(self) -> int | None:
        """T; None: no end is planned."""
        return self.state.total_updates

    @property
    def done(self) -> bool:
        """Whether all planned updates are made, or there is another reason to end."""
        over = self.total_updates is not None and self.updates >= self.total_updates
        return over or self.state.stop is not None

    def rate_factors(self, first: int, count: int) -> Tensor:
        """As `State.rate_factors`; without the schedule's, where somebody else sets η."""
        if self.has_own_scheduler():
            return torch.full((count,), self.state.rate_cut, dtype=torch.float64)
        return self.state.rate_factors(first, count)

    def draw_of(self, update: int) -> int:
        """Names the random numbers of an update, for `Objective`."""
        return (self._draws << 32) + update

    def _resident(self, update: int, count: int) -> tuple[Objective, Tensor]:
        assert self.plan is not None
        assert self.objective is not None
        indices = self.plan.block(update, count)
        return self.objective, indices.to(self.objective.targets.device)

    # ------------------------------------------------------------------ start and end

    def start(self) -> None:
        """Go on from the state: look whether all fits."""
        self._started = True
        self._prepare()
        if self.state.random is not None:
            self.state.random.restore()
            self.state.random = None
        self.state.check_end()
        if self.objective is not None:
            self.state.micro_batch_size = self.objective.micro_batch_size
        groups = self.optimizer.param_groups
        self._owned = sum(len(group["params"]) for group in groups)
        self.watched = Watched(self.model)
        for group in groups:
            group[_SCHEDULED] = group["lr"]
        if self.guard is not None:
            self.guard.start(self)

    def _prepare(self) -> None:
        """Look whether model, loss and examples fit, and lay the model out in memory."""
        objective, plan = self.objective, self.plan
        if objective is None or plan is None:
            return
        if isinstance(objective.loss, Loss):
            single = single_example(plan, objective)
            check_examples(
                objective.model, objective.loss, objective.inputs, objective.targets, single
            )
        use_channels_last(objective.model, plan.batch_size)
        if step_size_of(self.optimizer) is not None:
            self.optimizer.batch_fraction = plan.batch_size / plan.num_examples  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Let the guard read what it has not read: the run ends here. Again, it changes nothing."""
        if self.guard is not None:
            self.guard.end()

    def finish(self) -> None:
        """End at the average, if the rule keeps one, and in the default layout."""
        self.settle()
        self.average.end()
        if self.objective is not None:
            restore_layout(self.objective.model)

    # ------------------------------------------------------------------ updates

    def advance(
        self, indices: Tensor | None = None, objective: Objective | None = None
    ) -> SweepOutput:
        """Make the updates of one sweep, count them, and let the guard answer where they failed.

        Without (K, B) indices, it is the next sweep of the plan; without an objective, J of their
        examples is that of the loop.
        """
        if not self._started:
            self.start()
        first = self.updates
        if indices is None:
            indices = self._planned()
        objective = self.objective if objective is None else objective
        assert objective is not None, "a loop without an objective is handed one"
        indices = indices.to(objective.targets.device)
        if self.guard is not None:
            self.follow_changes()
            self.guard.before(objective, indices)
        with self.updating():
            self.follow_changes()
            restores = self.restores_on_error and objective is self.objective
            before = Snapshot(objective, self.optimizer) if restores else None
            started = time.perf_counter()
            try:
                losses = self.make_updates(objective, indices, first)
            except BaseException:
                if before is not None:
                    before.give_back()
                raise
        if losses.is_cuda:
            torch.cuda.synchronize()  # once per sweep: its time is measured
        seconds = time.perf_counter() - started
        state = self.state
        state.updates += len(indices)
        state.examples_seen += indices.numel()
        if self.objective is not None:
            state.micro_batch_size = self.objective.micro_batch_size
        self._adapt_sweeps(len(indices), seconds)
        output = SweepOutput(first, losses, self.engine.rates, seconds, indices.shape[1])
        if self.guard is not None:
            self.guard.after(output)
        return output

    def _planned(self) -> Tensor:
        """The next sweep of the plan."""
        if self.plan is None or self.done:
            made = f"{self.updates} updates made of {self.total_updates}"
            what = "no plan" if self.plan is None else self.state.stop or made
            raise ValueError(
                f"A sweep needs a plan with updates left, or indices. Received: {what}."
            )
        before = None if self.guard is None else self.guard.next_update(self.updates)
        return self.plan.sweep(self.updates, before)

    def make_updates(self, objective: Objective, indices: Tensor, first: int) -> Tensor:
        """Make the updates of (K, B) indices from the parameters as they are; nothing is counted.

        Schedule and dropout depend on the number of the first. η of each is then in `engine.rates`;
        returned is (K,), J on each update's examples before it.
        """
        factors = self.rate_factors(first, len(indices))
        losses = self.engine.run(objective, indices, factors, self.draw_of(first))
        for group in self.optimizer.param_groups:
            group[_SCHEDULED] = group["lr"]
        return losses

    def follow_changes(self) -> None:
        """Go on with what somebody has changed since the last sweep.

        Frozen parameters are left alone, freed ones trained. A group that was added, or whose "lr"
        was set, has that η at the next update, and is scheduled from there on in proportion.
        """
        groups = self.optimizer.param_groups
        factor = float(self.rate_factors(self.updates, 1))
        follows_other = self.has_own_scheduler()
        for group in groups:
            if follows_other or "initial_lr" not in group or group["lr"] != group[_SCHEDULED]:
                group["initial_lr"] = group["lr"] / factor if factor > 0 else group["lr"]
                group[_SCHEDULED] = group["lr"]
        objective = self.objective
        if objective is None:
            return
        trainable = [p for p in objective.model.parameters() if p.requires_grad]
        owned = sum(len(group["params"]) for group in groups)
        if owned != self._owned or [*map(id, trainable)] != [*map(id, objective.params)]:
            for p in objective.params:
                p.grad = None  # a frozen parameter is not stepped along an old gradient
            objective.params, self._owned = trainable, owned
            self.engine.choose_again()

    def _adapt_sweeps(self, count: int, seconds: float) -> None:
        """Let automatic sweeps take a tenth of a second: no update depends on their length."""
        plan, objective = self.plan, self.objective
        if plan is None or objective is None or not plan.automatic:
            return
        if objective.ranks > 1:  # of rank 0: all must have the same sweeps
            told = torch.tensor([seconds], device=objective.params[0].device)
            torch.distributed.broadcast(told, src=0)
            seconds = float(told)
        if seconds > 0:
            fitting = int(count * _SWEEP_SECONDS / seconds)
            # In steps: the first updates warm up, and are no measure of the others.
            plan.updates_per_sweep = max(1, min(fitting, 8 * count, _MOST_UPDATES))

    # ------------------------------------------------------------------ going back

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Within it, updates may be made and all be changed; after it, all is as it was."""
        assert self.objective is not None, "there is nothing to try without an objective"
        state, schedule, objective = dict(vars(self.state)), self.schedule, self.objective
        plateau = schedule.state_dict() if isinstance(schedule, ReduceOnPlateau) else None
        owned, engine = self._owned, dict(vars(self.engine))
        params, micro = objective.params, objective.micro_batch_size
        length = None if self.plan is None else self.plan.updates_per_sweep
        guard, self.guard = self.guard, None
        try:
            with trial(objective, self.optimizer):
                yield
        finally:
            vars(self.state).update(state)
            if isinstance(schedule, ReduceOnPlateau) and plateau is not None:
                schedule.load_state_dict(plateau)
            vars(self.engine).update(engine)
            self._owned, self.guard = owned, guard
            objective.params, objective.micro_batch_size = params, micro
            if self.plan is not None and length is not None:
                self.plan.updates_per_sweep = length

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on beside parameters, buffers and optimizer."""
        guard = None if self.guard is None else self.guard.state_dict()
        return {**self.state.state_dict(), "guard": guard}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; model and optimizer load theirs themselves."""
        self.state.load_state_dict(state)
        if self.guard is not None and state.get("guard") is not None:
            self.guard.load_state_dict(state["guard"])
        self.engine.choose_again()
        self._started = False
        if self.objective is not None:
            self.objective.micro_batch_size = self.state.micro_batch_size
