"""Ends a run that has converged, or that its own noise keeps from converging, and says so."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.convex.certificate import Certificate, certify
from gdtrain.convex.conjugates import double
from gdtrain.convex.problem import LinearProblem, NoCertificateError, linear_layer
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.lightning.module import SupervisedModule
from gdtrain.models.dropout import Dropout
from gdtrain.objective import Objective, untouched
from gdtrain.optim.protocol import step_size_of
from gdtrain.schedules import ReduceOnPlateau

__all__ = ["Convergence", "mean_bounds"]

_PAIRS = 8  # of independent batches in one look
_BATCH = 32  # examples of such a batch, at first
_LOOKS = 8  # of which the balance of noise and gradient is taken together
_CHUNK, _CHUNKS = 16, 128  # losses in a mean; means that are kept; then neighbours are joined
_EXAMPLES = 1024  # that a look costs at least: small passes cost more than their examples
_PASSES, _NUMBERS = 4, 2**24  # that a search for a bound may take at least: passes, inputs read
_END_SHARE = 0.03  # of the passes of the run: for the certificate at the end
_LOST = (StopReason.DIVERGED, StopReason.NON_FINITE)


def mean_bounds(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Mean of independent numbers, and its one-sided bounds: m ∓ t s/√n.

    s is the standard deviation, t the quantile of Student's distribution with n − 1 degrees of
    freedom at the confidence.

    Args:
        values: n numbers, n at least 2.
        confidence: Of each of the bounds by itself, range (0.5, 1).

    Returns:
        Lower bound, mean, upper bound.

    Example:
        >>> [round(x, 3) for x in mean_bounds([1.0, 2.0, 3.0], 0.95)]  # s = 1, t = 2.920
        [0.314, 2.0, 3.686]

    References:
        Student, The Probable Error of a Mean, 1908.
    """
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=np.float64)
    n, mean = len(array), float(array.mean())
    reach = float(stdtrit(n - 1, confidence)) * float(array.std(ddof=1)) / math.sqrt(n)
    return mean - reach, mean, mean + reach


class _Look(NamedTuple):
    """What one look at the gradient found: ‖∇J‖² and its bounds, and the noise's balance."""

    lower: float
    mean: float
    upper: float
    balance: list[float]
    rise: float
    fall: float


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
        if tolerance is not None and not (_number(tolerance) and 0 <= tolerance < math.inf):
            raise ValueError(
                f"tolerance must be finite and >= 0, or null for none. Received: {tolerance!r}."
            )
        if gap is not None and not (_number(gap) and 0 < gap < 1):
            raise ValueError(f"gap must lie in (0, 1), or be null for none. Received: {gap!r}.")
        if not (_number(confidence) and 0.5 < confidence < 1):
            raise ValueError(f"confidence must lie in (0.5, 1). Received: {confidence!r}.")
        if not isinstance(noise_floor, bool):
            raise ValueError(f"noise_floor must be true or false. Received: {noise_floor!r}.")
        for name, value in (("patience", patience), ("every", every)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ValueError(
                    f"{name} must be a whole number of at least 1, or null for none. Received: "
                    f"{value!r}."
                )
        if not (_number(share) and 0 < share <= 0.5):
            raise ValueError(f"share must lie in (0, 0.5]. Received: {share!r}.")
        self.tolerance, self.gap, self.confidence = tolerance or None, gap, confidence
        self.noise_floor, self.patience = noise_floor, patience
        self.every, self.share = every, share
        self._module: SupervisedModule | None = None
        self._forget()

    def _forget(self) -> None:
        self._first_norm: float | None = None
        self._batch = _BATCH
        self._gradient_turn, self._gap_turn = _Turn(), _Turn()
        self._spent = 0.0  # seconds
        self._level = _Level()
        self._balances: list[list[float]] = []
        self._best_loss, self._since = math.inf, 0
        self._lower = 0.0
        self._problem: LinearProblem | None = None
        self._problem_state: dict[str, Any] | None = None
        self._certificate: tuple[int, Certificate] | None = None
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
        spacings = [self.every or self._spacing(module, kind) for kind in self._kinds(module)]
        return min(((update // s + 1) * s for s in spacings), default=None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew, unless a run is resumed."""
        if trainer.global_step == 0:
            self._forget()
        self._module = cast(SupervisedModule, pl_module)
        self._problem, self._certificate, self._ready = None, None, False
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
            try:
                self._problem = LinearProblem.of(module.objective, optimizer)
                if self._problem_state is not None:
                    self._problem.load_state_dict(self._problem_state)
            except NoCertificateError as error:
                raise ValueError(
                    f"gap={self.gap} needs a linear model with a duality gap, and here is none: "
                    f"{error}. Leave it out (gap=null); tolerance is for any model."
                ) from error
        if self._first_norm is None and self._looks_at_gradients(module, optimizer):
            started = time.perf_counter()
            look = self._look(trainer, module, balance=False)
            self._first_norm = math.sqrt(max(look.mean, 0.0))
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
            self._take(outputs)
        for kind in self._kinds(module):
            if module.stop is None and self._is_due(trainer, module, kind):
                started = time.perf_counter()
                if kind == "gradient":
                    self._check_gradient(trainer, module)
                    self._gradient_turn.examples = module.examples_seen
                else:
                    self._check_gap(trainer, module)
                    self._gap_turn.examples = module.examples_seen
                self._spent += time.perf_counter() - started
                trainer.should_stop |= module.stop is not None

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
        value = module.validation.get("loss/val", math.nan)
        if value < self._best_loss:
            self._best_loss, self._since = value, 0
            return
        self._since += 1
        if self._since >= self.patience and module.stop is None:
            module.stop = Stop(
                StopReason.STALLED,
                f"The validation loss has not been below {self._best_loss:.6g} for "
                f"{self._since} validations.",
                {"best": self._best_loss, "loss/val": value, "validations": self._since},
                "The best model is in checkpoints/best.ckpt, if checkpoints are kept. To go on, "
                "raise callbacks.convergence.patience; to reach lower, regularise or lower "
                "optimizer.lr.",
            )
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A last look, and the certificate of a linear model."""
        module = cast(SupervisedModule, pl_module)
        # A run that is interrupted goes on as if there had been no look at its end.
        self._problem_state = self._state_of_problem()
        lost = module.stop is not None and module.stop.reason in _LOST
        if module.objective is not None and module.updates and not lost:
            optimizer = trainer.optimizers[0]
            if (
                module.stop is None
                and self._looks_at_gradients(module, optimizer)
                and not self._stochastic(module)
            ):
                self._check_gradient(trainer, module)
            self._certify_at_the_end(trainer, module)
        self._module = self._problem = None

    # ------------------------------------------------------------------ when

    def _looks_at_gradients(self, module: SupervisedModule, optimizer: Optimizer) -> bool:
        if self.tolerance is None and not (self.noise_floor and self._stochastic(module)):
            return False
        # Decoupled decay is the gradient of nothing: the run's fixed point is no stationary point.
        return not any(
            g.get("decoupled_weight_decay") and g["weight_decay"] for g in optimizer.param_groups
        )

    @staticmethod
    def _stochastic(module: SupervisedModule) -> bool:
        objective = module.objective
        assert objective is not None
        return _batch_size(module.trainer) < len(objective.inputs) or _drops(module)

    def _kinds(self, module: SupervisedModule) -> list[str]:
        """Of checks that this run has."""
        gradient = self._looks_at_gradients(module, module.trainer.optimizers[0])
        return ["gradient"] * gradient + ["gap"] * (self.gap is not None)

    def _spacing(self, module: SupervisedModule, kind: str) -> int:
        """Updates between two multiples at which a check may be due."""
        assert module.objective is not None
        count = len(module.objective.inputs)
        if kind == "gap":
            least = _PASSES * count
        elif self._stochastic(module):
            least = min(2 * _PAIRS * self._size(module, module.objective, _BATCH), count)
        else:
            least = count
        return math.ceil(max(least, _EXAMPLES) / (self.share * _batch_size(module.trainer)))

    def _is_due(self, trainer: Trainer, module: SupervisedModule, kind: str) -> bool:
        if module.updates % (self.every or self._spacing(module, kind)):
            return False
        turn = self._gap_turn if kind == "gap" else self._gradient_turn
        cost = turn.cost if kind == "gap" else self._cost(trainer, module)
        return self.every is not None or self.share * (module.examples_seen - turn.examples) >= cost

    def _cost(self, trainer: Trainer, module: SupervisedModule) -> float:
        """Of a look at the gradient, in examples: a pass without gradients costs a third."""
        assert module.objective is not None
        size = self._size(module, module.objective, self._batch)
        cost = len(module.objective.inputs)
        if self._stochastic(module):
            cost = min(2 * _PAIRS * size, cost) if not _drops(module) else 2 * _PAIRS * size
        if self._can_be_at_the_floor(trainer, module):
            cost += _PAIRS * (_batch_size(trainer) + size)
        return max(cost, _EXAMPLES)

    # ------------------------------------------------------------------ the gradient

    def _check_gradient(self, trainer: Trainer, module: SupervisedModule) -> None:
        stochastic = self._stochastic(module)
        balance = self._can_be_at_the_floor(trainer, module)
        look = self._look(trainer, module, balance=balance)
        if not math.isfinite(look.mean):
            return
        assert self._first_norm is not None
        if self.tolerance is not None:
            threshold = self.tolerance * max(1.0, self._first_norm)
            if look.upper <= threshold**2 and (
                look.lower == look.upper
                or self._look(trainer, module, balance=False, again=True).upper <= threshold**2
            ):
                self._stop_converged(module, look, threshold)
                return
            if stochastic and look.lower <= threshold**2:  # undecided
                self._batch *= 2
        if balance:
            self._balances = [*self._balances, look.balance][-_LOOKS:]
            self._check_floor(trainer, module, look)

    def _stop_converged(self, module: SupervisedModule, look: _Look, threshold: float) -> None:
        assert self._first_norm is not None
        exact = look.lower == look.upper
        norm = math.sqrt(max(look.upper, 0.0))
        named = "The gradient's norm is" if exact else "The gradient's norm is, with confidence,"
        module.stop = Stop(
            StopReason.CONVERGED,
            f"{named} {'' if exact else 'at most '}{norm:.3g} after {module.updates} updates: "
            f"within tolerance={self.tolerance:g} of max(1, {self._first_norm:.3g}), its norm at "
            f"the start.",
            {
                "gradient_norm": norm,
                "gradient_norm_at_start": self._first_norm,
                "threshold": threshold,
                "confidence": 1.0 if exact else self.confidence,
                "update": module.updates,
            },
            "To go further, lower callbacks.convergence.tolerance.",
        )

    def _look(
        self, trainer: Trainer, module: SupervisedModule, *, balance: bool, again: bool = False
    ) -> _Look:
        """‖∇J‖² with its bounds and, for the floor, c − ½ η‖∇J‖² by samples."""
        objective = module.objective
        assert objective is not None
        slopes = _Slopes(objective, trainer.optimizers[0])
        count, size = len(objective.inputs), self._size(module, objective, self._batch)
        seed = np.random.SeedSequence([int(again), module.updates, *_seed(trainer)])
        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))

        def some(number: int) -> Tensor:
            drawn = torch.randint(count, (number,), generator=generator)
            return drawn.to(objective.targets.device)

        def draw() -> int:
            return int(torch.randint(2**31, (), generator=generator))

        with (
            _untouched(objective),
            torch.enable_grad(),
            trainer.precision_plugin.train_step_context(),
        ):
            products: list[float] = []
            falls: list[float] = []
            rises: list[float] = []
            exact = not self._stochastic(module) or (
                2 * _PAIRS * size >= count and not _drops(module)
            )
            if exact:
                everything = torch.arange(count, device=objective.targets.device)
                g = slopes.gradient(everything, draw())
                products, falls = [slopes.product(g, g)], [slopes.product(g, g, by_rate=True)]
            for _ in range(_PAIRS if balance or not exact else 0):
                if not exact:
                    g, h = (slopes.gradient(some(size), draw()) for _ in range(2))
                    products.append(slopes.product(g, h))
                    falls.append(slopes.product(g, h, by_rate=True))
                if balance:
                    step = slopes.step(slopes.gradient(some(_batch_size(trainer)), draw()))
                    rises.append(slopes.rise(step, some(size), draw()))
        if exact:
            falls = falls * len(rises)
            lower = mean = upper = products[0]
        else:
            lower, mean, upper = mean_bounds(products, self.confidence)
        return _Look(
            lower,
            mean,
            upper,
            [c - 0.5 * fall for c, fall in zip(rises, falls, strict=True)] if balance else [],
            float(np.mean(rises)) if rises else math.nan,
            float(np.mean(falls)) if rises else math.nan,
        )

    @staticmethod
    def _size(module: SupervisedModule, objective: Objective, size: int) -> int:
        """Examples in a batch of a look; layers that mix examples get the run's own."""
        if objective._mixes:
            return _batch_size(module.trainer)
        return min(size, len(objective.inputs))

    # ------------------------------------------------------------------ the noise floor

    def _take(self, outputs: Any) -> None:
        """Losses at one η; another η begins anew."""
        losses = outputs["losses"].detach().cpu().numpy().astype(np.float64)
        rates = outputs["rates"].numpy()
        level = self._level
        if outputs["first"] != level.next or rates[0] != level.rate:
            self._restart(float(rates[0]), outputs["first"])
        if (rates != rates[0]).any():
            changed = int((rates != rates[-1]).nonzero()[0][-1]) + 1
            self._restart(float(rates[-1]), outputs["first"] + changed)
            losses = losses[changed:]
        self._level.push(losses)

    def _restart(self, rate: float, update: int) -> None:
        self._level = _Level(rate, update)
        self._balances = []

    def _can_be_at_the_floor(self, trainer: Trainer, module: SupervisedModule) -> bool:
        """Whether the loss is flat at a constant η that the schedule will not lower."""
        objective = module.objective
        assert objective is not None
        optimizer = trainer.optimizers[0]
        return (
            self.noise_floor
            and _batch_size(trainer) < len(objective.inputs)
            and all("dampening" in g and not g.get("maximize") for g in optimizer.param_groups)
            and self._level.count >= 2 * module.updates_per_epoch
            and self._level.flat()
            and not _falls_later(module)
        )

    def _check_floor(self, trainer: Trainer, module: SupervisedModule, look: _Look) -> None:
        if len(self._balances) < 2:
            return
        lower, _, _ = mean_bounds([d for part in self._balances for d in part], self.confidence)
        if not lower > 0:
            return
        level, rate = self._level, self._level.rate
        batch_size = _batch_size(trainer)
        loss, error = level.last()
        of = "one example" if batch_size == 1 else f"{batch_size} examples"
        module.stop = Stop(
            StopReason.NOISE_FLOOR,
            f"The training loss has stayed at {loss:.4g} ± {error:.1g} at lr={rate:.4g}: the noise "
            f"of gradients of {of} raises it by {look.rise:.2g} an update, and the gradient lowers "
            f"it by {max(look.fall, 0.0):.2g}. This is not the optimum.",
            {
                "loss": loss,
                "lr": rate,
                "updates_at_this_lr": level.count,
                "rise_by_noise": look.rise,
                "fall_by_gradient": look.fall,
                "gradient_norm_squared": look.mean,
                "gradient_norm_squared_bound": look.upper,
                "confidence": self.confidence,
                "update": module.updates,
            },
            f"A lower rate goes on: set optimizer.lr={rate / 10:.2g}, or a schedule that decays, "
            f"such as schedule=linear.",
        )

    # ------------------------------------------------------------------ the duality gap

    def _certify(self, module: SupervisedModule, share: float) -> Certificate:
        """The certificate of the parameters at hand, by work that no clock bounds."""
        layer = linear_layer(module.model)
        problem, objective = self._problem, module.objective
        assert problem is not None
        assert objective is not None
        count = len(objective.inputs)
        passes = max(
            share * module.examples_seen / count, _NUMBERS / (count * layer.in_features), _PASSES
        )
        with _averaged(module.trainer.optimizers[0]):
            return certify(
                problem,
                layer.weight,
                layer.bias,
                tolerance=1e-6 if self.gap is None else 0.5 * self.gap,
                work=math.inf if self.every is not None else passes,
                lower=self._lower,
            )

    def _check_gap(self, trainer: Trainer, module: SupervisedModule) -> None:
        made = self._certify(module, self.share)
        self._lower = max(self._lower, made.dual)
        self._certificate = module.updates, made
        assert module.objective is not None
        self._gap_turn.cost = made.work * len(module.objective.inputs)
        self._stop_at_gap(trainer, module, made)

    def _stop_at_gap(
        self, trainer: Trainer, module: SupervisedModule, certificate: Certificate
    ) -> None:
        assert self.gap is not None
        if trainer.strategy.broadcast(certificate.relative_gap) <= self.gap:
            module.stop = Stop(
                StopReason.CONVERGED,
                f"The objective is {certificate.primal:.8g} after {module.updates} updates, and at "
                f"most {certificate.gap:.2g} above its minimum (relative: "
                f"{certificate.relative_gap:.1e}, asked: {self.gap:g}).",
                {**certificate.numbers(), "update": module.updates},
                "To go further, lower callbacks.convergence.gap.",
            )

    def _certify_at_the_end(self, trainer: Trainer, module: SupervisedModule) -> None:
        objective = module.objective
        assert objective is not None
        started = time.perf_counter()
        if self._problem is None:
            try:
                self._problem = LinearProblem.of(objective, trainer.optimizers[0])
            except NoCertificateError:
                return
        if self._certificate is not None and self._certificate[0] == module.updates:
            certificate = self._certificate[1]
        else:
            certificate = self._certify(module, _END_SHARE)
            self._spent += time.perf_counter() - started
            if self.gap is not None and module.stop is None:
                self._stop_at_gap(trainer, module, certificate)
        numbers: dict[str, Any] = {
            **certificate.numbers(),
            "weight_decay": self._problem.weight_decay,
            "seconds_of_all_checks": self._spent,
        }
        cast(Any, module).certificate = numbers
        if module.stop is not None:
            module.stop = dataclasses.replace(
                module.stop, numbers={**module.stop.numbers, **certificate.numbers()}
            )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        return {
            "first_norm": self._first_norm,
            "batch": self._batch,
            "gradient_turn": dataclasses.asdict(self._gradient_turn),
            "gap_turn": dataclasses.asdict(self._gap_turn),
            "spent": self._spent,
            "level": self._level.state_dict(),
            "balances": [list(part) for part in self._balances],
            "best_loss": self._best_loss,
            "since": self._since,
            "lower": self._lower,
            "problem": self._state_of_problem(),
        }

    def _state_of_problem(self) -> dict[str, Any] | None:
        return self._problem_state if self._problem is None else self._problem.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._first_norm, self._batch = state_dict["first_norm"], state_dict["batch"]
        self._gradient_turn = _Turn(**state_dict["gradient_turn"])
        self._gap_turn = _Turn(**state_dict["gap_turn"])
        self._spent = state_dict["spent"]
        self._level = _Level.from_state(state_dict["level"])
        self._balances = [list(part) for part in state_dict["balances"]]
        self._best_loss, self._since = state_dict["best_loss"], state_dict["since"]
        self._lower, self._problem_state = state_dict["lower"], state_dict["problem"]


@dataclasses.dataclass
class _Turn:
    """Examples that were seen at the last check of a kind, and those that the next will pass."""

    examples: int = 0
    cost: float = 0.0


class _Level:
    """Training losses at one η, as means over chunks of equal numbers of updates.

    Each mean is formed of the same numbers in the same order, however they come in.
    """

    def __init__(self, rate: float = math.nan, update: int = -1) -> None:
        self.rate, self.next = rate, update
        self.length = _CHUNK
        self.rest: list[float] = []  # losses that fill no 16 yet
        self.sum, self.filled = 0.0, 0  # of means of 16, that fill no chunk yet
        self.means: list[float] = []

    @property
    def count(self) -> int:
        """Updates in all."""
        return len(self.means) * self.length + _CHUNK * self.filled + len(self.rest)

    def push(self, losses: NDArray[np.float64]) -> None:
        """Add the losses of further updates."""
        self.next += len(losses)
        series = np.concatenate([self.rest, losses])
        whole = len(series) // _CHUNK * _CHUNK
        self.rest = series[whole:].tolist()
        for mean in series[:whole].reshape(-1, _CHUNK).mean(1).tolist():
            self.sum, self.filled = self.sum + mean, self.filled + 1
            if _CHUNK * self.filled == self.length:
                self.means.append(self.sum / self.filled)
                self.sum, self.filled = 0.0, 0
            if len(self.means) == _CHUNKS:
                self.means = [(a + b) / 2 for a, b in zip(*[iter(self.means)] * 2, strict=True)]
                self.length *= 2

    def flat(self) -> bool:
        """Whether the last quarter is not below the one before by more than its standard error."""
        quarter = len(self.means) // 4
        if quarter < 8:
            return False
        before, after = (
            np.array(self.means[-2 * quarter : -quarter]),
            np.array(self.means[-quarter:]),
        )
        error = math.sqrt((before.var(ddof=1) + after.var(ddof=1)) / quarter)
        return bool(before.mean() - after.mean() <= error)

    def last(self) -> tuple[float, float]:
        """Mean of the last half, and its standard error."""
        half = np.array(self.means[-(len(self.means) // 2) :])
        return float(half.mean()), float(half.std(ddof=1)) / math.sqrt(len(half))

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "rest": list(self.rest), "means": list(self.means)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> _Level:
        made = cls()
        vars(made).update(state, rest=list(state["rest"]), means=list(state["means"]))
        return made


class _Slopes:
    """Gradients of J, weight decay included, for the parameters that the optimizer trains."""

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self.objective = objective
        owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.trained = [i for i, p in enumerate(objective.params) if id(p) in owner]
        self.params = [objective.params[i] for i in self.trained]
        self.groups = [owner[id(p)] for p in self.params]

    def gradient(self, indices: Tensor, draw: int) -> list[Tensor]:
        """Of the mean over these examples, one float64 tensor for each parameter."""
        _, gradient = self.objective.value_and_grad(indices, draw)
        made = []
        for i, p, group in zip(self.trained, self.params, self.groups, strict=True):
            g = gradient[i]
            total = double(torch.zeros_like(p) if g is None else g)
            total = total.to_dense() if total.is_sparse else total
            if group.get("maximize"):
                total = -total
            decay = float(group.get("weight_decay", 0.0))
            made.append(total + decay * double(p) if decay else total)
        return made

    def product(self, g: list[Tensor], h: list[Tensor], by_rate: bool = False) -> float:
        """⟨g, h⟩, or Σ η ⟨g, h⟩ over the parameters."""
        return sum(
            (_rate(group) if by_rate else 1.0) * float((a * b).sum())
            for a, b, group in zip(g, h, self.groups, strict=True)
        )

    def step(self, g: list[Tensor]) -> list[Tensor]:
        """η g."""
        return [_rate(group) * a for a, group in zip(g, self.groups, strict=True)]

    @torch.no_grad()
    def rise(self, step: list[Tensor], indices: Tensor, draw: int) -> float:
        """½[J(θ + s) + J(θ − s)] − J(θ) over these examples."""
        saved = [p.detach().clone() for p in self.params]

        def value(sign: float) -> float:
            for p, before, s in zip(self.params, saved, step, strict=True):
                p.copy_(double(before) + sign * s if sign else before)
            torch.manual_seed(draw)  # the same dropout in all three
            return float(double(self.objective.losses(indices, draw)).mean())

        try:
            there, back, here = value(1.0), value(-1.0), value(0.0)
        finally:
            for p, before in zip(self.params, saved, strict=True):
                p.copy_(before)
        penalty = sum(
            0.5 * float(group.get("weight_decay", 0.0)) * float(s.square().sum())
            for s, group in zip(step, self.groups, strict=True)
        )
        return 0.5 * (there + back) - here + penalty


def _rate(group: dict[str, Any]) -> float:
    """η (1 − dampening)/(1 − μ): how far a gradient moves θ in the end."""
    momentum = float(group.get("momentum", 0.0))  # other optimizers have none
    share = (1 - float(group.get("dampening", 0.0))) / (1 - momentum) if 0 < momentum < 1 else 1.0
    return float(group["lr"]) * share


@contextmanager
def _untouched(objective: Objective) -> Iterator[None]:
    """Leaves M, too, as it is."""
    micro = objective.micro_batch_size
    try:
        with untouched(objective.model):
            yield
    finally:
        objective.micro_batch_size = micro


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


def _drops(module: SupervisedModule) -> bool:
    return any(
        isinstance(m, torch.nn.modules.dropout._DropoutNd | Dropout) and m.p > 0 and m.training
        for m in module.model.modules()
    )


def _falls_later(module: SupervisedModule) -> bool:
    """Whether the schedule is to go below its factor at hand."""
    if isinstance(module.schedule, ReduceOnPlateau):
        return True
    now = module.updates - 1
    end = 10 * module.updates if module.total_updates is None else module.total_updates - 1
    factor = float(module.rate_factors(now, 1))
    later = np.unique(np.linspace(now, max(end, now), 33).astype(np.int64))
    return any(float(module.rate_factors(int(t), 1)) < 0.999 * factor for t in later)


def _batch_size(trainer: Trainer) -> int:
    return int(cast(Any, trainer).train_dataloader.batch_size)


def _seed(trainer: Trainer) -> list[int]:
    return [int(getattr(cast(Any, trainer).datamodule, "seed", 0))]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
