"""Whether a run is stationary: exact and sampled tests of the gradient, and the floor of the noise.

J is the training objective with the weight decay of each parameter group, ½ Σ λ‖θ‖²; B examples
make an update, N are there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.descent.trial import staying
from gdtrain.objective import Objective
from gdtrain.penalised import penalty, weight_decays, with_decay
from gdtrain.schedules import ReduceOnPlateau, Schedule

__all__ = [
    "PAIRS",
    "Level",
    "Look",
    "Patience",
    "Slopes",
    "Stationarity",
    "falls_later",
    "look",
    "mean_bounds",
]

PAIRS = 8
"""Pairs of independent batches in one look."""
_BATCH = 32  # examples of such a batch, at first
_LOOKS = 8  # of which the balance of noise and gradient is taken together
_CHUNK, _CHUNKS = 16, 128  # losses in a mean; means that are kept; then neighbours are joined


def mean_bounds(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Mean of independent numbers, and its one-sided bounds: m ∓ t s/√n.

    s is the standard deviation, t the quantile of Student's distribution with n − 1 degrees of
    freedom at the confidence.
    """
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=np.float64)
    n, mean = len(array), float(array.mean())
    reach = float(stdtrit(n - 1, confidence)) * float(array.std(ddof=1)) / math.sqrt(n)
    return mean - reach, mean, mean + reach


@dataclass(frozen=True)
class Look:
    """What one look at the gradient found."""

    lower: float  # bound on ‖∇J‖², with confidence
    mean: float
    upper: float  # the same as `lower`, where the gradient is exact
    balance: Sequence[float] = ()  # samples of c − ½ η‖∇J‖², if they were asked for
    rise: float = math.nan  # mean of c
    fall: float = math.nan  # mean of η‖∇J‖²

    @property
    def exact(self) -> bool:
        """Whether the gradient is that of all examples."""
        return self.lower == self.upper


@dataclass
class Level:
    """Training losses at one η, as means over chunks of equal numbers of updates.

    Each mean is formed of the same numbers in the same order, however they come in.
    """

    rate: float = math.nan  # η
    next: int = -1  # update
    length: int = _CHUNK
    rest: list[float] = field(default_factory=list)  # losses that fill no 16 yet
    sum: float = 0.0  # of means of 16, that fill no chunk yet
    filled: int = 0  # the number of these
    means: list[float] = field(default_factory=list)

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
        before, after = np.array(self.means[-2 * quarter :]).reshape(2, quarter)
        error = math.sqrt((before.var(ddof=1) + after.var(ddof=1)) / quarter)
        return bool(before.mean() - after.mean() <= error)

    def last(self) -> tuple[float, float]:
        """Mean of the last half, and its standard error."""
        half = np.array(self.means[-(len(self.means) // 2) :])
        return float(half.mean()), float(half.std(ddof=1)) / math.sqrt(len(half))


class Slopes:
    """Gradients of J, weight decay included, for the parameters that the optimizer trains."""

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self.objective = objective
        owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.trained = [i for i, p in enumerate(objective.params) if id(p) in owner]
        self.params = [objective.params[i] for i in self.trained]
        self.groups = [owner[id(p)] for p in self.params]
        self.decays = weight_decays(self.params, optimizer.param_groups)

    def gradient(self, indices: Tensor, draw: int) -> list[Tensor]:
        """Of the mean over these examples, one float64 tensor for each parameter."""
        _, gradient = self.objective.value_and_grad(indices, draw)
        made = []
        for i, p, group in zip(self.trained, self.params, self.groups, strict=True):
            g = gradient[i]
            total = _double(torch.zeros_like(p) if g is None else g)
            total = total.to_dense() if total.is_sparse else total
            made.append(-total if group.get("maximize") else total)
        return with_decay(made, [_double(p) for p in self.params], self.decays)

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

        def value(sign: float) -> float:
            for p, before, s in zip(self.params, own, step, strict=True):
                p.copy_(_double(before) + sign * s if sign else before)
            torch.manual_seed(draw)  # the same dropout in all three
            return float(_double(self.objective.losses(indices, draw)).mean())

        with staying(self.params) as own:
            there, back, here = value(1.0), value(-1.0), value(0.0)
        return 0.5 * (there + back) - here + penalty(step, self.decays)


def look(
    slopes: Slopes,
    generator: torch.Generator,
    *,
    size: int,
    batch_size: int,
    exact: bool,
    balance: bool,
    confidence: float,
) -> Look:
    """Estimate ‖∇J‖² with its bounds and, for the floor of the noise, c − ½ η‖∇J‖² by samples.

    For gradients g, g' of independent batches E⟨g, g'⟩ = ‖∇J‖²;
    c = ½[J(θ + ηg) + J(θ − ηg)] − J(θ) for g of B examples, on `size` that g does not know, as
    many as each batch of a pair has. `exact`: the gradient of all examples instead of pairs.
    """
    objective = slopes.objective
    count, device = len(objective.inputs), objective.targets.device

    def some(number: int) -> Tensor:
        return torch.randint(count, (number,), generator=generator).to(device)

    def draw() -> int:
        return int(torch.randint(2**31, (), generator=generator))

    products: list[float] = []
    falls: list[float] = []
    rises: list[float] = []
    if exact:
        g = h = slopes.gradient(torch.arange(count, device=device), draw())
    for _ in range(PAIRS if balance or not exact else 1):
        if not exact:
            g, h = (slopes.gradient(some(size), draw()) for _ in range(2))
        products.append(slopes.product(g, h))
        falls.append(slopes.product(g, h, by_rate=True))
        if balance:
            step = slopes.step(slopes.gradient(some(batch_size), draw()))
            rises.append(slopes.rise(step, some(size), draw()))
    lower, mean, upper = 3 * products[:1] if exact else mean_bounds(products, confidence)
    if not balance:
        return Look(lower, mean, upper)
    balances = [c - 0.5 * fall for c, fall in zip(rises, falls, strict=True)]
    return Look(lower, mean, upper, balances, float(np.mean(rises)), float(np.mean(falls)))


class Stationarity:
    """Tells from looks at the gradient, and from losses, whether a run is stationary.

    **CONVERGED**: the upper bound on ‖∇J‖² is at most (tolerance · max(1, ‖∇J₀‖))², with ∇J₀ at the
    start; for bounds by samples twice in a row, with fresh batches. While they do not decide,
    `batch`, the examples in a batch of a look, is doubled.

    **NOISE_FLOOR**: with confidence over the last looks the noise takes back at least half of what
    the gradient gives, c > ½ η‖∇J‖², and the loss at this η is flat.
    """

    def __init__(self, tolerance: float | None, confidence: float) -> None:
        self.tolerance, self.confidence = tolerance, confidence
        self.first_norm: float | None = None
        self.batch = _BATCH
        self.level = Level()
        self.balances: list[list[float]] = []

    def take(self, first: int, losses: NDArray[np.float64], rates: NDArray[np.float64]) -> None:
        """Take losses at one η in; another η begins anew."""
        if first != self.level.next or rates[0] != self.level.rate:
            self._restart(float(rates[0]), first)
        if (rates != rates[0]).any():
            changed = int((rates != rates[-1]).nonzero()[0][-1]) + 1
            self._restart(float(rates[-1]), first + changed)
            losses = losses[changed:]
        self.level.push(losses)

    def _restart(self, rate: float, update: int) -> None:
        self.level, self.balances = Level(rate, update), []

    def converged(self, found: Look, again: Callable[[], Look], update: int) -> Stop | None:
        """Whether the gradient is as small as was asked; `again` looks with fresh batches."""
        if self.tolerance is None:
            return None
        assert self.first_norm is not None, "before the first update there was a look"
        threshold = self.tolerance * max(1.0, self.first_norm)
        small = found.upper <= threshold**2
        if not (small and (found.exact or again().upper <= threshold**2)):
            if not found.exact and found.lower <= threshold**2:  # undecided
                self.batch *= 2
            return None
        norm = math.sqrt(max(found.upper, 0.0))
        said = "is" if found.exact else "is, with confidence, at most"
        return Stop(
            StopReason.CONVERGED,
            f"The gradient's norm {said} {norm:.3g} after {update} updates: within "
            f"tolerance={self.tolerance:g} of max(1, {self.first_norm:.3g}), its norm at the "
            f"start.",
            {
                "gradient_norm": norm,
                "gradient_norm_at_start": self.first_norm,
                "threshold": threshold,
                "confidence": 1.0 if found.exact else self.confidence,
                "update": update,
            },
            "To go further, lower callbacks.convergence.tolerance.",
        )

    def at_the_floor(self, found: Look, batch_size: int, update: int) -> Stop | None:
        """Whether the noise keeps the loss where it is; the level is known to be flat."""
        self.balances = [*self.balances, list(found.balance)][-_LOOKS:]
        if len(self.balances) < 2:
            return None
        lower, _, _ = mean_bounds([d for part in self.balances for d in part], self.confidence)
        if not lower > 0:
            return None
        rate, (loss, error) = self.level.rate, self.level.last()
        of = "one example" if batch_size == 1 else f"{batch_size} examples"
        return Stop(
            StopReason.NOISE_FLOOR,
            f"The training loss has stayed at {loss:.4g} ± {error:.1g} at lr={rate:.4g}: the noise "
            f"of gradients of {of} raises it by {found.rise:.2g} an update, and the gradient "
            f"lowers it by {max(found.fall, 0.0):.2g}. This is not the optimum.",
            {
                "loss": loss,
                "lr": rate,
                "updates_at_this_lr": self.level.count,
                "rise_by_noise": found.rise,
                "fall_by_gradient": found.fall,
                "gradient_norm_squared": found.mean,
                "gradient_norm_squared_bound": found.upper,
                "confidence": self.confidence,
                "update": update,
            },
            f"A lower rate goes on: set optimizer.lr={rate / 10:.2g}, or a schedule that decays, "
            f"such as schedule=linear.",
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        return {
            "first_norm": self.first_norm,
            "batch": self.batch,
            "level": asdict(self.level),
            "balances": [list(part) for part in self.balances],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.first_norm, self.batch = state["first_norm"], state["batch"]
        self.level = Level(**copy.deepcopy(state["level"]))
        self.balances = [list(part) for part in state["balances"]]


class Patience:
    """Counts validations without a lower loss."""

    def __init__(self, validations: int) -> None:
        self.validations = validations
        self.best, self.since = math.inf, 0

    def read(self, loss: float) -> Stop | None:
        """Take one validation in."""
        if loss < self.best:
            self.best, self.since = loss, 0
            return None
        self.since += 1
        if self.since < self.validations:
            return None
        return Stop(
            StopReason.STALLED,
            f"The validation loss has not been below {self.best:.6g} for {self.since} validations.",
            {"best": self.best, "loss/val": loss, "validations": self.since},
            "The best model is in checkpoints/best.ckpt, if checkpoints are kept. To go on, raise "
            "callbacks.convergence.patience; to reach lower, regularise or lower optimizer.lr.",
        )


def falls_later(
    schedule: Schedule, factor: Callable[[int], float], updates: int, total: int | None
) -> bool:
    """Whether the schedule is to go below its factor at hand."""
    if isinstance(schedule, ReduceOnPlateau):  # may halve η by itself
        return True
    now = updates - 1
    end = 10 * updates if total is None else total - 1
    here = factor(now)
    later = np.unique(np.linspace(now, max(end, now), 33).astype(np.int64))
    return any(factor(int(t)) < 0.999 * here for t in later)


def _rate(group: dict[str, Any]) -> float:
    """η (1 − dampening)/(1 − μ): how far a gradient moves θ in the end."""
    momentum = float(group.get("momentum", 0.0))  # other optimizers have none
    share = (1 - float(group.get("dampening", 0.0))) / (1 - momentum) if 0 < momentum < 1 else 1.0
    return float(group["lr"]) * share


def _double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)
