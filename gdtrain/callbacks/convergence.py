"""Ends a run that has converged, or that its own noise keeps from converging, and says so."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from torch import nn

from gdtrain._compat.torch_modules import DROPOUTS
from gdtrain.convex.certificate import Certificate, certify
from gdtrain.convex.problem import LinearProblem, NoCertificateError, linear_layer
from gdtrain.descent.stationarity import (
    PAIRS,
    Level,
    Look,
    Patience,
    Slopes,
    Stationarity,
    falls_later,
    look,
)
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.models.dropout import Dropout
from gdtrain.optim.protocol import update_rules
from gdtrain.ranges import Interval, Whole

__all__ = ["Convergence"]

_EXAMPLES = 1024  # that a look costs at least: small passes cost more than their examples
_PASSES, _NUMBERS = 4, 2**24  # that a search for a bound may take at least: passes, inputs read
_END_SHARE = 0.03  # of the passes of the run: for the certificate at the end
_FIRST_BATCH = Stationarity(None, 0.95).batch  # examples in a batch of the first look
_LOST = (StopReason.DIVERGED, StopReason.NON_FINITE)


class Convergence(Callback):
    """Ends a run with the reason CONVERGED, NOISE_FLOOR or STALLED, with its numbers.

    J is the training objective with the weight decay of each parameter group, ½ Σ λ‖θ‖²; B of the N
    examples make an update.

    **CONVERGED**, full batch (B = N): ‖∇J‖ ≤ tolerance · max(1, ‖∇J₀‖), with ∇J₀ at the start.
    Stochastic (B < N, or dropout): gradients g, g' of independent batches at the same θ have
    E⟨g, g'⟩ = ‖∇J‖². The upper confidence bound of the mean of 8 such products must be at most the
    square of that, twice in a row. While the bounds do not decide, the batches are doubled, up to
    one exact gradient of all N.

    **CONVERGED**, linear models: the duality gap P − D is at most `gap` · |P|. With weight decay
    they end with the certificate (`gdtrain.convex.certificate`) in `module.certificate`, a
    dictionary, also without `gap`: that of the average, where the step-size rule keeps one.

    **NOISE_FLOOR** (B < N): an update is expected to change J by −η‖∇J‖² + c, c = ½ η² E[gᵀHg] with
    the curvature H. It is at its floor if c > ½ η‖∇J‖² with confidence over the last looks, and the
    training loss did not fall over the last half of all updates at this η, at least two epochs.
    With momentum μ, η stands for η(1 − dampening)/(1 − μ). While the schedule is still to lower η,
    the run goes on.

    **STALLED**: `patience` validations without a lower validation loss.

    Checks stand where `share` of the examples passed since the last of its kind pays for the next,
    whatever the clock says, and change nothing of the run. Without resident or mapped examples
    there are none, but for `patience`.

    State in checkpoints: ‖∇J₀‖, the sizes, costs and places of the checks, the losses at this η,
    the best validation, the best lower bound and what it came from.

    Args:
        tolerance: Of the gradient's norm, range [0, ∞); None or 0: not looked at.
        gap: Relative duality gap, range (0, 1); None: it does not end the run.
        confidence: Of each one-sided bound, range (0.5, 1).
        noise_floor: Whether the noise floor ends the run.
        patience: Validations, range [1, ∞); None: any number.
        every: Updates from check to check, range [1, ∞); None: as `share` allows.
        share: Of the examples passed in training, those passed in each kind of check, range
            (0, 0.5].

    Raises:
        ValueError: An argument is out of range; or, at the start of training, `gap` is set for a
            model that has no duality gap.

    Example:
        >>> callback = Convergence(gap=1e-6)  # after the fit, module.stop and module.certificate

    References:
        Inner products of gradients as a sign of the stationary phase: Pflug, Non-asymptotic
        Confidence Bounds for Stochastic Approximation Algorithms, 1990; Chee and Toulis, 2018
        (arXiv 1710.06382). Balance at stationarity: Yaida, 2018 (arXiv 1810.00004).
    """

    needs_every_epoch = False
    # A resumed run must have the same.
    decisive = ("tolerance", "gap", "confidence", "noise_floor", "patience", "every", "share")

    def __init__(
        self,
        tolerance: float | None = 1e-6,
        gap: float | None = None,
        *,
        confidence: float = 0.95,
        noise_floor: bool = True,
        patience: int | None = None,
        every: int | None = None,
        share: float = 0.02,
    ) -> None:
        if not isinstance(noise_floor, bool):
            raise ValueError(f"noise_floor must be true or false. Received: {noise_floor!r}.")
        self.tolerance = Interval(0, math.inf, "left").check("tolerance", tolerance or 0.0) or None
        self.gap = None if gap is None else Interval(0, 1).check("gap", gap)
        self.confidence = Interval(0.5, 1).check("confidence", confidence)
        self.noise_floor = noise_floor
        self.patience = None if patience is None else Whole(1).check("patience", patience)
        self.every = None if every is None else Whole(1).check("every", every)
        self.share = Interval(0, 0.5, "right").check("share", share)
        self._module: Any = None  # while it trains
        self._problem: LinearProblem | None = None  # of a linear model
        self._certified: tuple[int, Certificate] | None = None  # after which update, and what
        self._forget()

    def _forget(self) -> None:
        self._test = Stationarity(self.tolerance, self.confidence)
        self._validations = Patience(self.patience or 1)
        # Examples that were seen at the last check of a kind, and what the next will pass.
        self._turns = {kind: {"examples": 0, "cost": 0.0} for kind in ("gradient", "gap")}
        self._lower = 0.0  # bound on the objective of a linear model
        self._searched: dict[str, Any] | None = None  # where the search for it goes on
        self._spent = 0.0  # seconds

    def next_update(self, update: int) -> int | None:
        """The next update at which a check may be due."""
        if self._module is None or self._module.objective is None:
            return None
        spacings = [self._spacing(kind) for kind in self._kinds]
        return min(((update // s + 1) * s for s in spacings), default=None)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start anew, unless a run is resumed."""
        if trainer.global_step == 0:
            self._forget()
        self._module, self._ready = pl_module, False
        self._problem = self._certified = pl_module.certificate = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Before the first update: ‖∇J₀‖, and whether there is a duality gap."""
        if self._ready or pl_module.objective is None:
            return
        self._ready = True
        if self.gap is not None:
            try:
                self._find_problem()
            except NoCertificateError as error:
                raise ValueError(
                    f"gap={self.gap} needs a linear model with a duality gap, and here is none: "
                    f"{error}. Leave it out (gap=null); tolerance is for any model."
                ) from error
        if self._test.first_norm is None and self._looks_at_gradients:
            started = time.perf_counter()
            self._test.first_norm = math.sqrt(max(self._look(balance=False).mean, 0.0))
            self._spent += time.perf_counter() - started

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Take the losses in; check, if a check is due."""
        if pl_module.objective is None:
            return
        if self.noise_floor:
            losses = outputs["losses"].detach().cpu().numpy().astype(np.float64)
            self._test.take(outputs["first"], losses, outputs["rates"].numpy())
        for kind in self._kinds:
            if pl_module.stop is None and self._is_due(kind):
                started = time.perf_counter()
                stop = self._check_gradient() if kind == "gradient" else self._check_gap()
                self._turns[kind]["examples"] = pl_module.examples_seen
                self._spent += time.perf_counter() - started
                if stop is not None:
                    pl_module.stop, trainer.should_stop = stop, True

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Count validations without a lower loss."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self.patience is None or not fitting or pl_module.validated_at != pl_module.updates:
            return
        stop = self._validations.read(pl_module.validation.get("loss/val", math.nan))
        if stop is not None and pl_module.stop is None:
            pl_module.stop, trainer.should_stop = stop, True

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """A last look, and the certificate of a linear model."""
        pl_module.settle()
        # A run that is interrupted goes on as if there had been no look at its end.
        self._searched = self.state_dict()["problem"]
        is_lost = pl_module.stop is not None and pl_module.stop.reason in _LOST
        if pl_module.objective is not None and pl_module.updates and not is_lost:
            if pl_module.stop is None and self._looks_at_gradients and not self._is_stochastic:
                pl_module.stop = self._check_gradient()
            started = time.perf_counter()
            numbers = self._certify_the_end()
            self._spent += time.perf_counter() - started
            if numbers is not None:
                pl_module.certificate = {**numbers, "seconds_of_all_checks": self._spent}
        self._module = self._problem = None

    @property
    def _count(self) -> int:
        """N."""
        return len(self._module.objective.inputs)

    @property
    def _batch_size(self) -> int:
        """B."""
        return int(self._module.trainer.train_dataloader.batch_size)

    @property
    def _is_stochastic(self) -> bool:
        return self._batch_size < self._count or _drops(self._module.model)

    @property
    def _looks_at_gradients(self) -> bool:
        if self.tolerance is None and not (self.noise_floor and self._is_stochastic):
            return False
        # Decoupled decay is the gradient of nothing: the run's fixed point is no stationary point.
        groups = self._module.trainer.optimizers[0].param_groups
        return not any(g.get("decoupled_weight_decay") and g["weight_decay"] for g in groups)

    @property
    def _kinds(self) -> list[str]:
        """Of checks that this run has."""
        return ["gradient"] * self._looks_at_gradients + ["gap"] * (self.gap is not None)

    def _size(self, size: int) -> int:
        """Examples in a batch of a look; layers that mix examples get the run's own."""
        mixes = self._module.objective.mixes_examples
        return self._batch_size if mixes else min(size, self._count)

    def _spacing(self, kind: str) -> int:
        """Updates between two multiples at which a check may be due."""
        if self.every is not None:
            return self.every
        least = self._count
        if kind == "gap":
            least *= _PASSES
        elif self._is_stochastic:
            least = min(2 * PAIRS * self._size(_FIRST_BATCH), least)
        return math.ceil(max(least, _EXAMPLES) / (self.share * self._batch_size))

    def _is_due(self, kind: str) -> bool:
        turn, module = self._turns[kind], self._module
        if module.updates % self._spacing(kind):
            return False
        if self.every is not None:
            return True
        cost = turn["cost"] if kind == "gap" else self._cost()
        return self.share * (module.examples_seen - turn["examples"]) >= cost

    def _cost(self) -> int:
        """Of a look at the gradient, in examples: a pass without gradients costs a third."""
        size, cost = self._size(self._test.batch), self._count
        if self._is_stochastic:
            pairs = 2 * PAIRS * size
            cost = pairs if _drops(self._module.model) else min(pairs, cost)
        if self._can_be_at_the_floor():
            cost += PAIRS * (self._batch_size + size)
        return max(cost, _EXAMPLES)

    def _check_gradient(self) -> Stop | None:
        balance, update = self._can_be_at_the_floor(), self._module.updates
        found = self._look(balance=balance)
        if not math.isfinite(found.mean):
            return None
        again = partial(self._look, balance=False, again=True)
        stop = self._test.converged(found, again, update)
        if stop is not None or not balance:
            return stop
        return self._test.at_the_floor(found, self._batch_size, update)

    def _look(self, *, balance: bool, again: bool = False) -> Look:
        """With random numbers that the update number alone decides."""
        objective, trainer = self._module.objective, self._module.trainer
        size = self._size(self._test.batch)
        data_seed = int(getattr(trainer.datamodule, "seed", 0))
        seed = np.random.SeedSequence([int(again), self._module.updates, data_seed])
        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        every_example = 2 * PAIRS * size >= self._count and not _drops(objective.model)
        context = trainer.precision_plugin.train_step_context()
        with self._module.loop.trial(), torch.enable_grad(), context:
            return look(
                Slopes(objective, trainer.optimizers[0]),
                generator,
                size=size,
                batch_size=self._batch_size,
                exact=every_example or not self._is_stochastic,
                balance=balance,
                confidence=self.confidence,
            )

    def _can_be_at_the_floor(self) -> bool:
        below = self._batch_size < self._count
        return self.noise_floor and below and _is_level(self._module, self._test.level)

    def _find_problem(self) -> None:
        """Raises NoCertificateError, if the model has no duality gap."""
        module = self._module
        self._problem = LinearProblem.of(module.objective, module.trainer.optimizers[0])
        if self._searched is not None:
            self._problem.load_state_dict(self._searched)

    def _certify(self, share: float) -> Certificate:
        """Of the parameters at hand, or of their average, by work that no clock bounds."""
        module, count = self._module, self._count
        if self._certified is not None and self._certified[0] == module.updates:
            return self._certified[1]
        assert self._problem is not None
        layer = linear_layer(module.model)
        numbers = _NUMBERS / (count * layer.in_features)
        passes = max(share * module.examples_seen / count, numbers, _PASSES)
        with module.averaged():
            made = certify(
                self._problem,
                layer.weight,
                layer.bias,
                tolerance=1e-6 if self.gap is None else 0.5 * self.gap,
                work=passes if self.every is None else math.inf,
                lower=self._lower,
            )
        self._certified = module.updates, made
        return made

    def _check_gap(self) -> Stop | None:
        """Whether the gap is as small as was asked."""
        made = self._certify(self.share)
        self._lower = max(self._lower, made.dual)
        self._turns["gap"]["cost"] = made.work * self._count
        return self._verdict(made)

    def _verdict(self, made: Certificate) -> Stop | None:
        broadcast = self._module.trainer.strategy.broadcast
        if self.gap is None or broadcast(made.relative_gap) > self.gap:
            return None
        return Stop(
            StopReason.CONVERGED,
            f"The objective is {made.primal:.8g} after {self._module.updates} updates, and at most "
            f"{made.gap:.2g} above its minimum (relative: {made.relative_gap:.1e}, asked: "
            f"{self.gap:g}).",
            {**made.numbers(), "update": self._module.updates},
            "To go further, lower callbacks.convergence.gap.",
        )

    def _certify_the_end(self) -> dict[str, Any] | None:
        """The certificate's numbers, also in the reason why the run stops; None: there is none."""
        module = self._module
        if self._problem is None:
            try:
                self._find_problem()
            except NoCertificateError:
                return None
        made = self._certify(_END_SHARE)
        module.stop = module.stop or self._verdict(made)
        if module.stop is not None:
            numbers = {**module.stop.numbers, **made.numbers()}
            module.stop = dataclasses.replace(module.stop, numbers=numbers)
        assert self._problem is not None
        return {**made.numbers(), "weight_decay": self._problem.weight_decay}

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        return {
            **self._test.state_dict(),
            "gradient_turn": dict(self._turns["gradient"]),
            "spent": self._spent,
            "best_loss": self._validations.best,
            "since": self._validations.since,
            "gap_turn": dict(self._turns["gap"]),
            "lower": self._lower,
            "problem": self._searched if self._problem is None else self._problem.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._test.load_state_dict(state_dict)
        self._turns = {kind: dict(state_dict[f"{kind}_turn"]) for kind in ("gradient", "gap")}
        self._spent = state_dict["spent"]
        self._validations.best = state_dict["best_loss"]
        self._validations.since = state_dict["since"]
        self._lower, self._searched = state_dict["lower"], state_dict["problem"]


def _drops(model: nn.Module) -> bool:
    layers: list[Any] = [m for m in model.modules() if isinstance(m, (DROPOUTS, Dropout))]
    return any(layer.p > 0 and layer.training for layer in layers)


def _is_level(module: Any, level: Level) -> bool:
    """Whether the loss is flat at a constant η that the schedule will not lower."""
    rules = update_rules(module.trainer.optimizers[0])

    def factor(update: int) -> float:
        return float(module.rate_factors(update, 1))

    return (
        rules is not None  # steps along −g
        and not any(rule.maximize for rule in rules)
        and level.count >= 2 * module.updates_per_epoch
        and level.flat()
        and not falls_later(module.schedule, factor, module.updates, module.total_updates)
    )
