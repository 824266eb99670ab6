"""The mathematics of what the instruments show, apart from when they look.

θ parameters, J objective, g = ∇J on the B examples of an update, s the step that it made, N
training examples, G = ∇J on all of them, Σ the covariance of the gradients of single examples.
Sums are in float64, whatever the model's precision.
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
    "cosine",
    "dot",
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
    """Which of a model's trainable parameters belong to one layer: to the same module.

    Args:
        model: Any module.

    Returns:
        By the layer's name (a parameter of the model itself: its own name), the places in
        `gdtrain.objective.Objective.params`.

    Example:
        >>> layers(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)))
        {'0': [0, 1], '2': [2, 3]}
    """
    found: dict[str, list[int]] = {}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for i, name in enumerate(names):
        found.setdefault(name.rpartition(".")[0] or name, []).append(i)
    return found


def norms(
    tensors: Sequence[Tensor | None], groups: dict[str, list[int]]
) -> tuple[float, dict[str, float]]:
    """‖v‖ of a vector in parts, and of each layer's part.

    Args:
        tensors: The parts; None is 0.
        groups: From `layers`.

    Returns:
        The norm of all, and each layer's.

    Example:
        >>> norms([torch.tensor([3.0]), None, torch.tensor([4.0])], {"a": [0, 1], "b": [2]})
        (5.0, {'a': 3.0, 'b': 4.0})
    """
    own = [0.0 if t is None else dot([t], [t]) for t in tensors]
    by_layer = {name: math.sqrt(sum(own[i] for i in places)) for name, places in groups.items()}
    return math.sqrt(sum(own)), by_layer


def dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """⟨a, b⟩ of two vectors in parts; None is 0.

    Args:
        a: The parts of one.
        b: Of the other.

    Example:
        >>> dot([torch.tensor([1.0, 2.0]), None], [torch.tensor([3.0, 4.0]), torch.ones(1)])
        11.0
    """
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return sum(float(torch.dot(x.flatten().double(), y.flatten().double())) for x, y in pairs)


def cosine(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float | None:
    """⟨a, b⟩ / (‖a‖ ‖b‖), range [−1, 1]; None where one of them is 0.

    Args:
        a: One gradient, in parts.
        b: The next.

    Example:
        >>> cosine([torch.tensor([1.0, 0.0])], [torch.tensor([-2.0, 0.0])])
        -1.0
    """
    length = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / length if length > 0 else None


# ---------------------------------------------------------------------- gradient noise


def gram(gradients: Sequence[Sequence[Tensor | None]]) -> NDArray[np.float64]:
    """⟨g_k, g_l⟩ of K gradients.

    Args:
        gradients: K times the parts of one.

    Returns:
        (K, K).

    Example:
        >>> gram([[torch.tensor([1.0, 2.0])], [torch.tensor([0.0, 1.0])]])
        array([[5., 2.],
               [2., 1.]])
    """
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
    """Unbiased estimates from one sample, and how far they may be off.

    Args:
        variance: Of tr Σ, the variance of one example's gradient.
        square: Of ‖G‖²; may be below 0.
        error: (var(variance), cov(variance, square), var(square)) of the two estimates.
        degrees: Of freedom, of `error`.

    Example:
        >>> NoiseEstimate(2.0, 1.0, (0.0, 0.0, 0.0), 15).variance
        2.0
    """

    variance: float
    square: float
    error: tuple[float, float, float]
    degrees: int


def noise(products: NDArray[np.float64], group: int, population: int) -> NoiseEstimate:
    """tr Σ and ‖G‖² from K gradients, each the mean over a group of b examples of its own.

        U = Σ_{k≠l} ⟨g_k, g_l⟩ / (K(K−1))
        tr Σ ≈ b (Σ_k ‖g_k‖²/K − U),    ‖G‖² ≈ U + tr Σ/N

    Both are unbiased where the Kb examples are drawn from the N without replacement (two groups are
    then not independent, which the last term makes good); tr Σ is with N − 1. BatchNorm in training
    mixes the examples of a group: Σ is then b times the covariance of such a group's gradient.
    Errors are by the jackknife over groups.

    Args:
        products: (K, K), from `gram`, K ≥ 3.
        group: b, range [1, ∞).
        population: N; math.inf is allowed: G is then that of the distribution.

    Returns:
        The estimates.

    Example:
        >>> g = torch.tensor([1.0, 2.0, 6.0])  # all there are: G = 3, Σ = (4 + 1 + 9)/2
        >>> found = noise(gram([[x] for x in g]), group=1, population=3)
        >>> round(found.variance, 9), round(found.square, 9)
        (7.0, 9.0)

    References:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv 1812.06162,
        appendix A.1.
        Efron and Stein, The Jackknife Estimate of Variance, 1981.
    """
    count = len(products)
    own = np.diag(products)
    trace, total = own.sum(), products.sum()

    def estimates(own_sum: object, all_sum: object, k: int) -> NDArray[np.float64]:
        between = (np.asarray(all_sum) - own_sum) / (k * (k - 1))
        variance = group * (np.asarray(own_sum) / k - between)
        return np.stack([variance, between + variance / population])

    variance, square = estimates(trace, total, count)
    left = estimates(trace - own, total - 2 * products.sum(axis=1) + own, count - 1)
    off = left - left.mean(axis=1, keepdims=True)
    error = (count - 1) / count * off @ off.T
    spread = (float(error[0, 0]), float(error[0, 1]), float(error[1, 1]))
    return NoiseEstimate(float(variance), float(square), spread, count - 1)


@dataclass(frozen=True)
class NoiseScale:
    """The simple noise scale, over one or more samples.

    Args:
        value: tr Σ/‖G‖², examples; None where ‖G‖² is not significantly above 0.
        low: Lower end of the interval; None as `value`.
        high: Upper end.
        variance: Mean of the estimates of tr Σ.
        square: Mean of those of ‖G‖².
        samples: How many there were.

    Example:
        >>> print(NoiseScale(None, None, None, 2.0, -0.1, 1).words)
        The simple noise scale is undefined: over 1 look, ‖G‖² is not significantly above 0.
    """

    value: float | None
    low: float | None
    high: float | None
    variance: float
    square: float
    samples: int

    @property
    def words(self) -> str:
        """One sentence."""
        looks = f"{self.samples} look{'s' * (self.samples != 1)}"
        if self.value is None or self.low is None or self.high is None:
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

    Args:
        estimates: Of independent samples, at least one.

    Returns:
        The scale.

    Example:
        >>> sure = NoiseEstimate(variance=6.0, square=2.0, error=(0.0, 0.0, 0.0), degrees=15)
        >>> noise_scale([sure]).value, noise_scale([sure]).low
        (3.0, 3.0)

    References:
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


# ---------------------------------------------------------------------- the step test


@dataclass(frozen=True)
class StepTrial:
    """The slopes of J along one step, at both of its ends, on the same examples.

    The parabola with these slopes has its minimum at the share start/(start − end) of the step.

    Args:
        start: ⟨∇J(θ), s⟩; below 0 where the step begins downhill.
        end: ⟨∇J(θ + s), s⟩.

    Example:
        >>> StepTrial(start=-2.0, end=0.0).alpha, StepTrial(start=-2.0, end=2.0).alpha
        (0.0, 1.0)
    """

    start: float
    end: float

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
    """What some steps of a run say about its step size.

    Args:
        state: "stable", "unstable", "undecided" or "too few".
        steps: How many were looked at.
        higher: How many ended higher than they began.
        uphill: How many began uphill: they have no α.
        median: Of α; None where there is none.
        quartiles: Of α; None likewise.

    Example:
        >>> print(StepVerdict("too few", 2, 0, 0, None, None).words(256))
        Too few steps were looked at for a verdict: 2, and 6 are the least.
    """

    state: str
    steps: int
    higher: int
    uphill: int
    median: float | None
    quartiles: tuple[float, float] | None

    def words(self, probe: int) -> str:
        """One sentence.

        Args:
            probe: Examples on which both ends were looked at.
        """
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

    Args:
        trials: In the order of the run.

    Returns:
        The verdict.

    Example:
        >>> judge([StepTrial(-1.0, -0.5)] * 8).state, judge([StepTrial(-1.0, 3.0)] * 8).state
        ('stable', 'unstable')

    References:
        Schneider et al., Cockpit: A Practical Debugging Tool for the Training of Deep Neural
        Networks, 2021, arXiv 2102.06604 (α).
        Wilcoxon, Individual Comparisons by Ranking Methods, 1945.
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
    low, middle, high = np.quantile(alphas, [0.25, 0.5, 0.75]) if alphas else (None, None, None)
    return StepVerdict(
        state,
        len(trials),
        int((rises > 0).sum()),
        len(trials) - len(alphas),
        None if middle is None else float(middle),
        None if low is None or high is None else (float(low), float(high)),
    )
