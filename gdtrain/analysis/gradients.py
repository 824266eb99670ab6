"""The mathematics of what the instruments show, apart from when they look.

θ parameters, J objective, g = ∇J on the B examples of an update, s the step that it made, N
training examples, G = ∇J on all of them, Σ the covariance of the gradients of single examples.
A vector comes in parts, one for each parameter; None is 0. Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = [
    "NoiseEstimate",
    "NoiseScale",
    "StepTrial",
    "StepVerdict",
    "apart",
    "cosine",
    "dot",
    "flat",
    "gram",
    "judge",
    "layers",
    "noise",
    "noise_scale",
    "norms",
]

_SIGNIFICANT = 1.959963984540054  # of the normal distribution, both sides, 95%
_FEWEST_STEPS = 6  # with fewer, equal signs may be chance


def layers(model: nn.Module) -> dict[str, list[int]]:
    """Places in `Objective.params` of each layer's parameters: those of the same module.

    A parameter of the model itself is a layer of its own name.
    """
    found: dict[str, list[int]] = {}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for i, name in enumerate(names):
        found.setdefault(name.rpartition(".")[0] or name, []).append(i)
    return found


def flat(parts: Sequence[Tensor]) -> Tensor:
    """A vector in parts as one tensor, (P,)."""
    return torch.cat([part.reshape(-1) for part in parts])


def apart(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector (P,) in parts that are shaped like others."""
    parts = v.split([p.numel() for p in like])
    return [part.view(p.shape) for part, p in zip(parts, like, strict=True)]


def norms(
    tensors: Sequence[Tensor | None], groups: dict[str, list[int]]
) -> tuple[float, dict[str, float]]:
    """‖v‖, and that of the part of each of the `layers`."""
    own = [dot([t], [t]) for t in tensors]
    by_layer = {name: math.sqrt(sum(own[i] for i in places)) for name, places in groups.items()}
    return math.sqrt(sum(own)), by_layer


def dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """⟨a, b⟩."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return sum(float(torch.dot(x.flatten().double(), y.flatten().double())) for x, y in pairs)


def cosine(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float | None:
    """⟨a, b⟩ / (‖a‖ ‖b‖); None where one of them is 0."""
    length = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / length if length > 0 else None


def gram(gradients: Sequence[Sequence[Tensor | None]]) -> NDArray[np.float64]:
    """⟨g_k, g_l⟩ of K gradients, (K, K)."""
    total = np.zeros((len(gradients), len(gradients)))
    for parts in zip(*gradients, strict=True):
        like = next((p for p in parts if p is not None), None)
        if like is not None:
            rows = torch.stack([torch.zeros_like(like) if p is None else p for p in parts])
            flat = rows.reshape(len(rows), -1).double()
            total += (flat @ flat.T).cpu().numpy()
    return total


@dataclass(frozen=True)
class NoiseEstimate:
    """Unbiased estimates of tr Σ and ‖G‖² from one sample, and how far they may be off."""

    variance: float  # of tr Σ, the variance of one example's gradient
    square: float  # of ‖G‖²; may be below 0
    error: tuple[float, float, float]  # var(variance), cov(variance, square), var(square)
    degrees: int  # of freedom, of `error`


def noise(products: NDArray[np.float64], group: int, population: float) -> NoiseEstimate:
    """tr Σ and ‖G‖² from the `gram` of K ≥ 3 gradients, each the mean over b examples of its own.

        U = Σ_{k≠l} ⟨g_k, g_l⟩ / (K(K−1))
        tr Σ ≈ b (Σ_k ‖g_k‖²/K − U),    ‖G‖² ≈ U + tr Σ/N

    Both are unbiased where the Kb examples are drawn from the N (or infinitely many) without
    replacement: two groups are then not independent, which the last term makes good. tr Σ is with
    N − 1. BatchNorm in training mixes the examples of a group: Σ is then b times the covariance of
    such a group's gradient. Errors are by the jackknife over groups.

    McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv 1812.06162, A.1.
    Efron and Stein, The Jackknife Estimate of Variance, 1981.
    """
    count = len(products)
    own = np.diag(products)
    trace, total = own.sum(), products.sum()

    def estimates(own_sum: object, all_sum: object, k: int) -> NDArray[np.float64]:
        between = (np.asarray(all_sum) - own_sum) / (k * (k - 1))
        variance = group * (np.asarray(own_sum) / k - between)
        return np.stack([variance, between + variance / population])

    variance, square = estimates(trace, total, count).tolist()
    left = estimates(trace - own, total - 2 * products.sum(axis=1) + own, count - 1)
    off = left - left.mean(axis=1, keepdims=True)
    (first, both), (_, second) = ((count - 1) / count * off @ off.T).tolist()
    return NoiseEstimate(variance, square, (first, both, second), count - 1)


@dataclass(frozen=True)
class NoiseScale:
    """The simple noise scale tr Σ/‖G‖², over one or more samples."""

    value: float | None  # in examples; None where ‖G‖² is not significantly above 0
    low: float | None  # the interval; None as `value`
    high: float | None
    variance: float  # mean of the estimates of tr Σ
    square: float  # and of ‖G‖²
    samples: int

    @property
    def words(self) -> str:
        """One sentence."""
        looks = f"{self.samples} look{'s' * (self.samples != 1)}"
        if self.value is None:
            return (
                f"The simple noise scale is undefined: over {looks}, ‖G‖² is not significantly "
                f"above 0."
            )
        return (
            f"Over {looks}, the simple noise scale tr Σ/‖G‖² is {self.value:.3g} examples (95% "
            f"interval {self.low:.3g} to {self.high:.3g}): a heuristic for the batch size from "
            f"which larger batches help little."
        )


def noise_scale(estimates: Sequence[NoiseEstimate]) -> NoiseScale:
    """B_simple = tr Σ/‖G‖² with a 95% interval, numerator and denominator averaged apart.

    The interval is Fieller's: all ρ for which tr Σ − ρ‖G‖² is not significantly different from 0
    (Student's t). It is bounded only where ‖G‖² is significantly above 0; elsewhere the scale is
    undefined. B_simple is a heuristic: it takes Σ and the Hessian to be alike in all directions,
    and one η for all batch sizes.

    Fieller, Some Problems in Interval Estimation, 1954.
    """
    from scipy.special import stdtrit

    count = len(estimates)
    top = sum(e.variance for e in estimates) / count
    bottom = sum(e.square for e in estimates) / count
    v_top, v_both, v_bottom = (sum(e.error[i] for e in estimates) / count**2 for i in range(3))
    t2 = float(stdtrit(sum(e.degrees for e in estimates), 0.975)) ** 2
    # (top − ρ bottom)² ≤ t² (v_top − 2ρ v_both + ρ² v_bottom)
    a, b, c = bottom**2 - t2 * v_bottom, top * bottom - t2 * v_both, top**2 - t2 * v_top
    if not (bottom > 0 and a > 0):
        return NoiseScale(None, None, None, top, bottom, count)
    width = math.sqrt(max(b * b - a * c, 0.0))
    low, high = max((b - width) / a, 0.0), (b + width) / a
    return NoiseScale(top / bottom, low, high, top, bottom, count)


@dataclass(frozen=True)
class StepTrial:
    """The slopes of J along one step, at both of its ends, on the same examples.

    The parabola with these slopes has its minimum at the share start/(start − end) of the step.
    """

    start: float  # ⟨∇J(θ), s⟩; below 0 where the step begins downhill
    end: float  # ⟨∇J(θ + s), s⟩

    @property
    def alpha(self) -> float | None:
        """Where the step ends: −1 at its start, 0 at the minimum, 1 at the start's height beyond.

        None where the step does not begin downhill. For a gradient step ηg on a quadratic it is
        ηκ − 1, κ the curvature along g, so that α < 1 is η < 2/κ.
        """
        return -self.end / self.start + 0.0 if self.start < 0 else None

    @property
    def rise(self) -> float:
        """How much higher the step ends than it begins, by the parabola."""
        return (self.start + self.end) / 2


@dataclass(frozen=True)
class StepVerdict:
    """What some steps of a run say about its step size."""

    state: str  # "stable", "unstable", "undecided" or "too few"
    steps: int
    higher: int  # how many ended higher than they began
    uphill: int  # how many began uphill: they have no α
    median: float | None  # of α; None where there is none
    quartiles: tuple[float, float] | None

    def words(self, probe: int) -> str:
        """One sentence, of steps whose ends were looked at on so many examples."""
        if self.state == "too few":
            return (
                f"Too few steps were looked at for a verdict: {self.steps}, and {_FEWEST_STEPS} "
                f"are the least."
            )
        what = {
            "stable": "The steps are stable",
            "unstable": "The steps are unstable, η is too large",
            "undecided": "The steps neither lower nor raise the loss beyond chance, as at a noise "
            "floor or at the edge of stability, where only a smaller η goes lower",
        }[self.state]
        alpha = "" if self.median is None else f" (median α {self.median:.2f})"
        return (
            f"{what}: on {probe} probe examples {self.higher} of the last {self.steps} ended "
            f"higher than they began{alpha}."
        )


def judge(trials: Sequence[StepTrial]) -> StepVerdict:
    """Whether steps lower the objective: stable, not at its lowest point along the step.

    α = 0, the lowest point, is no aim: it is greedy, and steps that end there are often too short
    or too long for the steps that follow. What decides is whether the steps end lower than they
    began: Wilcoxon's signed-rank test of their rises, at 95%, which no single large rise decides.

    Schneider et al., Cockpit: A Practical Debugging Tool for the Training of Deep Neural Networks,
    2021, arXiv 2102.06604 (α). Wilcoxon, Individual Comparisons by Ranking Methods, 1945.
    """
    alphas = [t.alpha for t in trials if t.alpha is not None]
    rises = np.array([t.rise for t in trials])
    state = "too few"
    if len(trials) >= _FEWEST_STEPS:
        # Mean ranks where rises are equal.
        sizes = np.abs(rises)
        ranks = np.array([(sizes < r).sum() + ((sizes == r).sum() + 1) / 2 for r in sizes])
        z = float((np.sign(rises) * ranks).sum() / math.sqrt((ranks**2).sum()))
        state = "stable" if z < -_SIGNIFICANT else "unstable" if z > _SIGNIFICANT else "undecided"
    median, quartiles = None, None
    if alphas:
        low, median, high = np.quantile(alphas, [0.25, 0.5, 0.75]).tolist()
        quartiles = low, high
    uphill = len(trials) - len(alphas)
    return StepVerdict(state, len(trials), int((rises > 0).sum()), uphill, median, quartiles)
