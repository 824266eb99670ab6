"""Ends a run that has converged, or that its own noise keeps from converging, and says so."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from gdtrain.convex.certificate import Certificate, certify
from gdtrain.convex.problem import LinearProblem, NoCertificateError, linear_layer
from gdtrain.descent.stationarity import (
    PAIRS,
    Look,
    Patience,
    Slopes,
    Stationarity,
    falls_later,
    look,
)
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.lightning.module import SupervisedModule
from gdtrain.models.dropout import Dropout
from gdtrain.optim.protocol import step_size_of, update_rules
from gdtrain.ranges import Interval, Whole

__all__ = ["Convergence"]

_EXAMPLES = 1024  # that a look costs at least: small passes cost more than their examples
_PASSES, _NUMBERS = 4, 2**24  # that a search for a bound may take at least: passes, inputs read
_END_SHARE = 0.03  # of the passes of the run: for the certificate at the end
_FIRST_BATCH = Stationarity(None, 0.95).batch  # examples in a batch of the first look
_DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    Dropout,
)
_LOST = (StopReason.DIVERGED, StopReason.NON_FINITE)


class Convergence(Callback):
    """Ends a run with the reason CONVERGED, NOISE_FLOOR or STALLED, with its numbers.

    J is the training objective with the weight decay of each parameter group, ½ Σ λ‖θ‖²; B
    examples make an update, N are there.

    **CONVERGED, full batch** (B = N): ‖∇J‖ ≤ tolerance · max(1, ‖∇J₀‖), with ∇J₀ at the start.

    **CONVERGED, stochastic** (B < N, or dropout): gradients g, g' of independent batches at the
    same θ have E⟨g, g'⟩ = ‖∇J‖². The upper confidence bound of the mean of 8 such products must be
    at most (tolerance · max(1, ‖∇J₀‖))², twice in a row with fresh batches. While the bounds do
    not decide, the batches are doubled, up to one exact gradient of all N.

    **CONVERGED, linear models**: the duality gap P − D is at most `gap` · |P|, see
    `gdtrain.convex.certificate`. Whether or not `gap` is set, a linear model with weight decay ends
    with the certificate in `module.certificate` (a dictionary, or None). It is that of the average,
    where the step-size rule keeps one.

    **NOISE_FLOOR** (B < N): at this η an update is expected to change J by −η‖∇J‖² + c, where
    c = ½ η² E[gᵀHg] is what the curvature H makes of the noise of the B-example gradient g. c is
    measured as ½[J(θ + ηg) + J(θ − ηg)] − J(θ), on examples that g does not know. The run is at
    its floor if c > ½ η‖∇J‖² with confidence over the last looks, so that the noise takes back at
    least half of what the gradient gives, and the training loss did not fall over the last half of
    all updates at this η, at least two epochs. With momentum μ, η stands for η(1 − dampening)/
    (1 − μ). This is never called converged: a lower η would go on. While the schedule is still to
    fall below its factor at hand, or halves it itself (reduce_on_plateau), the run goes on.

    **STALLED**: `patience` validations without a lower validation loss.

    A small decrease of the loss is no reason by itself: with η = 10⁻⁴ it is always small.

    Checks stand at update numbers that are fixed by what they cost in passed examples, and by no
    clock: at multiples of the updates of which `share` pays for the cheapest check (on the full
    batch 50, with share=0.02), once `share` of the examples passed since the last check of its kind
    pays for the one that is due; with `every`, at each multiple of it. They change neither
    parameters, buffers nor random numbers. Data that do not come from resident or mapped examples
    (a `Dataset` of pairs) are not looked at, but for `patience`.

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
        >>> from functools import partial
        >>> from gdtrain import GD, SupervisedModule
        >>> from gdtrain.data import EmbeddedDataModule
        >>> from gdtrain.losses import SquaredError
        >>> from gdtrain.models import Linear
        >>> data = EmbeddedDataModule("diabetes", batch_size="full", dtype="float64")
        >>> optimizer = partial(GD, lr=0.3, weight_decay=0.1)
        >>> module = SupervisedModule(Linear((10,), 1).double(), SquaredError(), optimizer)
        >>> trainer = Trainer(callbacks=[Convergence(gap=1e-6, every=100)], max_epochs=5000,
        ...     accelerator="cpu", precision="64-true", logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module, datamodule=data)
        >>> module.stop.reason.value, module.certificate["relative_gap"] <= 1e-6
        ('CONVERGED', True)

    References:
        Inner products of gradients as a sign of the stationary phase: Pflug, Non-asymptotic
        Confidence Bounds for Stochastic Approximation Algorithms, 1990; Chee and Toulis, 2018
        (arXiv 1710.06382). Balance at stationarity: Yaida, 2018 (arXiv 1810.00004).
    """

    needs_every_epoch = False

    decisive = (
        "tolerance",
        "gap",
        "confidence",
        "noise_floor",
        "patience",
        "every",
        "share",
    )  # a resumed run must have the same

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
        self._module: SupervisedModule | None = None
        self._forget()

    def _forget(self) -> None:
        self._test = Stationarity(self.tolerance, self.confidence)
        self._validations = Patience(self.patience or 1)
        self._certifies = _Certifies(self.gap, self.every is None)
        self._gradient_turn = _LastCheck()
        self._spent = 0.0  # seconds
        self._ready = False

    # ------------------------------------------------------------------ hooks

    def next_update(self, update: int) -> int | None:
        """The next update at which a check may be due.

        Args:
            update: Number of updates made.
        """
        module = self._module
        if module is None or module.objective is None:
            return None
        spacings = [self._spacing(module, kind) for kind in self._kinds(module)]
        return min(((update // s + 1) * s for s in spacings), default=None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew, unless a run is resumed."""
        if trainer.global_step == 0:
            self._forget()
        self._module = cast(SupervisedModule, pl_module)
        self._ready = False
        self._certifies.problem = self._certifies.last = None
        cast(Any, pl_module).certificate = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first update: ‖∇J₀‖, and whether there is a duality gap."""
        module = cast(SupervisedModule, pl_module)
        if self._ready or module.objective is None:
            return
        self._ready = True
        optimizer = trainer.optimizers[0]
        if self.gap is not None:
            self._certifies.begin(module)
        if self._test.first_norm is None and self._looks_at_gradients(module, optimizer):
            started = time.perf_counter()
            found = self._look(trainer, module, balance=False)
            self._test.first_norm = math.sqrt(max(found.mean, 0.0))
            self._spent += time.perf_counter() - started

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take the losses in; check, if a check is due."""
        module = cast(SupervisedModule, pl_module)
        if module.objective is None:
            return
        if self.noise_floor:
            losses = outputs["losses"].detach().cpu().numpy().astype(np.float64)
            self._test.take(outputs["first"], losses, outputs["rates"].numpy())
        for kind in self._kinds(module):
            if module.stop is None and self._is_due(trainer, module, kind):
                started = time.perf_counter()
                if kind == "gradient":
                    turn, stop = self._gradient_turn, self._check_gradient(trainer, module)
                else:
                    turn, stop = self._certifies.turn, self._certifies.check(module, self.share)
                turn.examples = module.examples_seen
                self._spent += time.perf_counter() - started
                if stop is not None:
                    module.stop, trainer.should_stop = stop, True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count validations without a lower loss."""
        module = cast(SupervisedModule, pl_module)
        if (
            self.patience is None
            or trainer.sanity_checking
            or trainer.state.fn != "fit"
            or module.validated_at != module.updates
        ):
            return
        stop = self._validations.read(module.validation.get("loss/val", math.nan))
        if stop is not None and module.stop is None:
            module.stop = stop
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A last look, and the certificate of a linear model."""
        module = cast(SupervisedModule, pl_module)
        module.settle()
        # A run that is interrupted goes on as if there had been no look at its end.
        self._certifies.remember()
        lost = module.stop is not None and module.stop.reason in _LOST
        if module.objective is not None and module.updates and not lost:
            if (
                module.stop is None
                and self._looks_at_gradients(module, trainer.optimizers[0])
                and not _is_stochastic(module)
            ):
                module.stop = self._check_gradient(trainer, module) or module.stop
            started = time.perf_counter()
            numbers = self._certifies.end(module, _END_SHARE)
            self._spent += time.perf_counter() - started
            if numbers is not None:
                module.certificate = {**numbers, "seconds_of_all_checks": self._spent}
        self._module = self._certifies.problem = None

    # ------------------------------------------------------------------ when

    def _looks_at_gradients(self, module: SupervisedModule, optimizer: Optimizer) -> bool:
        if self.tolerance is None and not (self.noise_floor and _is_stochastic(module)):
            return False
        # Decoupled decay is the gradient of nothing: the run's fixed point is no stationary point.
        return not any(
            g.get("decoupled_weight_decay") and g["weight_decay"] for g in optimizer.param_groups
        )

    def _kinds(self, module: SupervisedModule) -> list[str]:
        """Of checks that this run has."""
        gradient = self._looks_at_gradients(module, module.trainer.optimizers[0])
        return ["gradient"] * gradient + ["gap"] * (self.gap is not None)

    def _spacing(self, module: SupervisedModule, kind: str) -> int:
        """Updates between two multiples at which a check may be due."""
        if self.every is not None:
            return self.every
        assert module.objective is not None
        count = len(module.objective.inputs)
        if kind == "gap":
            least = _PASSES * count
        elif _is_stochastic(module):
            least = min(2 * PAIRS * _size(module, _FIRST_BATCH), count)
        else:
            least = count
        return math.ceil(max(least, _EXAMPLES) / (self.share * _batch_size(module.trainer)))

    def _is_due(self, trainer: Trainer, module: SupervisedModule, kind: str) -> bool:
        if module.updates % self._spacing(module, kind):
            return False
        turn = self._certifies.turn if kind == "gap" else self._gradient_turn
        cost = turn.cost if kind == "gap" else self._cost(trainer, module)
        return self.every is not None or self.share * (module.examples_seen - turn.examples) >= cost

    def _cost(self, trainer: Trainer, module: SupervisedModule) -> float:
        """Of a look at the gradient, in examples: a pass without gradients costs a third."""
        assert module.objective is not None
        size = _size(module, self._test.batch)
        cost = len(module.objective.inputs)
        if _is_stochastic(module):
            cost = min(2 * PAIRS * size, cost) if not _drops(module) else 2 * PAIRS * size
        if self._can_be_at_the_floor(trainer, module):
            cost += PAIRS * (_batch_size(trainer) + size)
        return max(cost, _EXAMPLES)

    # ------------------------------------------------------------------ the gradient

    def _check_gradient(self, trainer: Trainer, module: SupervisedModule) -> Stop | None:
        balance = self._can_be_at_the_floor(trainer, module)
        found = self._look(trainer, module, balance=balance)
        if not math.isfinite(found.mean):
            return None
        again = partial(self._look, trainer, module, balance=False, again=True)
        stop = self._test.converged(found, again, module.updates)
        if stop is None and balance:
            stop = self._test.at_the_floor(found, _batch_size(trainer), module.updates)
        return stop

    def _look(
        self, trainer: Trainer, module: SupervisedModule, *, balance: bool, again: bool = False
    ) -> Look:
        """With random numbers that the update number alone decides."""
        objective = module.objective
        assert objective is not None
        count, size = len(objective.inputs), _size(module, self._test.batch)
        data_seed = int(getattr(cast(Any, trainer).datamodule, "seed", 0))
        seed = np.random.SeedSequence([int(again), module.updates, data_seed])
        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        with (
            module.loop.trial(),
            torch.enable_grad(),
            trainer.precision_plugin.train_step_context(),
        ):
            return look(
                Slopes(objective, trainer.optimizers[0]),
                generator,
                size=size,
                batch_size=_batch_size(trainer),
                exact=not _is_stochastic(module)
                or (2 * PAIRS * size >= count and not _drops(module)),
                balance=balance,
                confidence=self.confidence,
            )

    def _can_be_at_the_floor(self, trainer: Trainer, module: SupervisedModule) -> bool:
        """Whether the loss is flat at a constant η that the schedule will not lower."""
        objective, level = module.objective, self._test.level
        assert objective is not None
        rules = update_rules(trainer.optimizers[0])

        def factor(update: int) -> float:
            return float(module.rate_factors(update, 1))

        return (
            self.noise_floor
            and _batch_size(trainer) < len(objective.inputs)
            and rules is not None  # steps along −g
            and not any(rule.maximize for rule in rules)
            and level.count >= 2 * module.updates_per_epoch
            and level.flat()
            and not falls_later(module.schedule, factor, module.updates, module.total_updates)
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        return {
            **self._test.state_dict(),
            "gradient_turn": dataclasses.asdict(self._gradient_turn),
            "spent": self._spent,
            "best_loss": self._validations.best,
            "since": self._validations.since,
            **self._certifies.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._test.load_state_dict(state_dict)
        self._gradient_turn = _LastCheck(**state_dict["gradient_turn"])
        self._certifies.load_state_dict(state_dict)
        self._spent = state_dict["spent"]
        self._validations.best = state_dict["best_loss"]
        self._validations.since = state_dict["since"]


@dataclasses.dataclass
class _LastCheck:
    """Examples that were seen at the last check of a kind, and those that the next will pass."""

    examples: int = 0
    cost: float = 0.0


class _Certifies:
    """The duality gap of a linear model in a run.

    Args:
        gap: That ends it, relative; None: none does.
        bounded: Whether the work of a search for a bound is: by a share of the run's passes.
    """

    def __init__(self, gap: float | None, bounded: bool) -> None:
        self.gap, self.bounded = gap, bounded
        self.turn = _LastCheck()
        self.lower = 0.0
        self.problem: LinearProblem | None = None
        self.last: tuple[int, Certificate] | None = None  # after which update, and what
        self._state: dict[str, Any] | None = None  # of the problem, as resumed or at the end

    def begin(self, module: SupervisedModule) -> None:
        """Raise ValueError, if the model has no duality gap."""
        assert module.objective is not None
        try:
            self.problem = LinearProblem.of(module.objective, module.trainer.optimizers[0])
        except NoCertificateError as error:
            raise ValueError(
                f"gap={self.gap} needs a linear model with a duality gap, and here is none: "
                f"{error}. Leave it out (gap=null); tolerance is for any model."
            ) from error
        if self._state is not None:
            self.problem.load_state_dict(self._state)

    def _certify(self, module: SupervisedModule, share: float) -> Certificate:
        """Of the parameters at hand, or of their average, by work that no clock bounds."""
        layer, objective = linear_layer(module.model), module.objective
        assert self.problem is not None
        assert objective is not None
        count = len(objective.inputs)
        passes = max(
            share * module.examples_seen / count, _NUMBERS / (count * layer.in_features), _PASSES
        )
        with _averaged(module.trainer.optimizers[0]):
            return certify(
                self.problem,
                layer.weight,
                layer.bias,
                tolerance=1e-6 if self.gap is None else 0.5 * self.gap,
                work=passes if self.bounded else math.inf,
                lower=self.lower,
            )

    def check(self, module: SupervisedModule, share: float) -> Stop | None:
        """Whether the gap is as small as was asked."""
        made = self._certify(module, share)
        self.lower = max(self.lower, made.dual)
        self.last = module.updates, made
        assert module.objective is not None
        self.turn.cost = made.work * len(module.objective.inputs)
        return self._verdict(module, made)

    def _verdict(self, module: SupervisedModule, made: Certificate) -> Stop | None:
        if self.gap is None:
            return None
        if module.trainer.strategy.broadcast(made.relative_gap) > self.gap:
            return None
        return Stop(
            StopReason.CONVERGED,
            f"The objective is {made.primal:.8g} after {module.updates} updates, and at most "
            f"{made.gap:.2g} above its minimum (relative: {made.relative_gap:.1e}, asked: "
            f"{self.gap:g}).",
            {**made.numbers(), "update": module.updates},
            "To go further, lower callbacks.convergence.gap.",
        )

    def end(self, module: SupervisedModule, share: float) -> dict[str, Any] | None:
        """The certificate's numbers, also in the reason why the run stops; None: there is none."""
        if self.problem is None:
            assert module.objective is not None
            try:
                self.problem = LinearProblem.of(module.objective, module.trainer.optimizers[0])
            except NoCertificateError:
                return None
        if self.last is not None and self.last[0] == module.updates:
            made = self.last[1]
        else:
            made = self._certify(module, share)
            if module.stop is None:
                module.stop = self._verdict(module, made) or module.stop
        if module.stop is not None:
            numbers = {**module.stop.numbers, **made.numbers()}
            module.stop = dataclasses.replace(module.stop, numbers=numbers)
        return {**made.numbers(), "weight_decay": self.problem.weight_decay}

    def remember(self) -> None:
        """What the state is from now on, whatever the problem is asked at the end."""
        self._state = self.state_dict()["problem"]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        return {
            "gap_turn": dataclasses.asdict(self.turn),
            "lower": self.lower,
            "problem": self._state if self.problem is None else self.problem.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; other entries are left alone."""
        self.turn = _LastCheck(**state["gap_turn"])
        self.lower, self._state = state["lower"], state["problem"]


@contextmanager
def _averaged(optimizer: Optimizer) -> Iterator[None]:
    """With the parameters that a step-size rule's average stands for, where there is one."""
    rule = step_size_of(optimizer)
    numbers = optimizer.param_groups[0].get("step_size", {}) if rule is not None else {}
    if rule is None or rule.average is None or numbers.get("mode") == "eval":  # it is in already
        yield
        return
    rule.eval(optimizer)
    try:
        yield
    finally:
        rule.train(optimizer)


def _is_stochastic(module: SupervisedModule) -> bool:
    assert module.objective is not None
    return _batch_size(module.trainer) < len(module.objective.inputs) or _drops(module)


def _size(module: SupervisedModule, size: int) -> int:
    """Examples in a batch of a look; layers that mix examples get the run's own."""
    assert module.objective is not None
    if module.objective.mixes_examples:
        return _batch_size(module.trainer)
    return min(size, len(module.objective.inputs))


def _drops(module: SupervisedModule) -> bool:
    return any(isinstance(m, _DROPOUT) and m.p > 0 and m.training for m in module.model.modules())


def _batch_size(trainer: Trainer) -> int:
    return int(cast(Any, trainer).train_dataloader.batch_size)
