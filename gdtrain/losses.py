"""Losses per example, with all that is known of them: value, slope, curvature, conjugate, words.

B batch, C outputs of the model. A loss maps predictions (B, C) and targets (B,) or (B, C) to
values (B,). Their mean over a batch is formed elsewhere. Subclass `Loss` for one of your own: the
class is the only thing that an engine, a certificate or an explanation asks.

Class numbers are (B,) or (B, 1), of an integer type or booleans; numbers are (B, C), or (B,) for
one output. Another shape is an error: it would be broadcast, and the mean be one over pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdtrain.ranges import Interval

__all__ = [
    "CrossEntropy",
    "Hinge",
    "Huber",
    "Logistic",
    "Loss",
    "OneHotSquaredError",
    "SquaredError",
    "SquaredHinge",
]


class Loss(nn.Module):
    """Base of the losses: what they ask of the data, and how a prediction reads as an answer.

    A subclass defines `forward(prediction, target) -> (B,)` and `task`, which says what the targets
    are: "multiclass" gets class numbers 0 … C−1, "binary" 0 and 1, (B,); "regression" gets numbers,
    (B,) or (B, C), which a data module has standardised, unless `raw_targets` is True.

    The rest is optional, and each part has its use:

        slope, formula, slope_formula       an update worked out by hand (`gdtrain.analysis`)
        slope, curvature, conjugate, domain a duality gap of linear models (`gdtrain.convex`)
        native                              the hand-written engine (`gdtrain.engines.native`)

    A class that changes the value of another loss inherits none of these: see `states`.

    Example:
        >>> class AbsoluteError(Loss):
        ...     task = "regression"
        ...     def forward(self, prediction, target):
        ...         return (prediction - target.reshape(prediction.shape)).abs().sum(1)
        >>> AbsoluteError()(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.0]))
        tensor([2., 0.])
    """

    task: ClassVar[Literal["regression", "binary", "multiclass"]]
    raw_targets: ClassVar[bool] = False
    """Whether a loss for numbers wants them as they are, not standardised: counts, or 0 and 1."""
    smooth: ClassVar[bool] = True
    """Whether it is differentiable in the prediction everywhere; some step-size rules need that."""
    quadratic: ClassVar[bool] = False
    """Whether it is ½‖p‖² plus what is linear in p; least squares needs no weight decay."""
    formula: ClassVar[str]
    """ℓ in words, of a prediction p and a target y, or s = ±1 for classes 1 and 0."""
    slope_formula: ClassVar[str]
    """∂ℓ/∂p in words."""
    domain: ClassVar[Literal["everything", "intervals", "simplex"]]
    """Where the conjugate is finite: for every α; where each α_c lies in an interval that holds 0,
    and then ℓ is a sum over c; or where α + onehot(y) is a distribution."""

    def states(self, *names: str) -> bool:
        """Whether this very class says these things of itself.

        What a subclass inherits was said of another value, and is not believed.

        Example:
            >>> class Mine(SquaredError):
            ...     pass
            >>> SquaredError().states("slope", "conjugate"), Mine().states("slope")
            (True, False)
        """
        return all(name in vars(type(self)) for name in names)

    def outputs(self, num_classes: int | None, num_targets: int = 1) -> int:
        """How many outputs the model needs for so many classes, or columns of numbers (None).

        Raises:
            ValueError: The loss does not fit such targets.
        """
        name = type(self).__name__
        if self.task == "regression":
            if num_classes is not None:
                other = " or loss=one_hot_squared_error" if type(self) is SquaredError else ""
                raise ValueError(
                    f"{name} is a loss for numbers, and the targets are {num_classes} classes: "
                    f"use loss=cross_entropy{other}."
                )
            return num_targets
        if num_classes is None:
            raise ValueError(
                f"{name} is a loss for classes, and the targets are numbers: "
                f"use loss=squared_error or loss=huber."
            )
        if self.task == "binary" and num_classes != 2:
            raise ValueError(
                f"{name} is a loss for two classes, and the targets have {num_classes}: "
                f"use loss=cross_entropy."
            )
        return 1 if self.task == "binary" else num_classes

    def check(self, prediction: Tensor, target: Tensor) -> None:
        """Raise a clear error where shapes or labels do not fit; called once per fit.

        Raises:
            ValueError: They do not, or an example's value depends on the other examples.
        """
        shapes = f"predictions {tuple(prediction.shape)}, targets {tuple(target.shape)}"
        if prediction.ndim != 2 or len(prediction) != len(target):
            raise self._unfit("predictions (B, C) for targets (B, …)", shapes)
        target = self.as_targets(target, prediction.shape[1])
        together = self(prediction, target)
        if together.shape == (len(target),):
            rows = range(len(target))
            alone = torch.cat([self(prediction[i : i + 1], target[i : i + 1]) for i in rows])
            if torch.allclose(together, alone, rtol=1e-3, atol=1e-6, equal_nan=True):
                return
        raise ValueError(
            f"{type(self).__name__} must give one value for each example, from its own prediction "
            f"and target: (B, C) and (B,) or (B, C) to (B,). Received: {tuple(together.shape)} "
            f"from predictions {tuple(prediction.shape)} and targets {tuple(target.shape)}, and "
            f"other values than for each example alone."
        )

    def as_targets(self, target: Tensor, outputs: int) -> Tensor:
        """Targets of any loader, as the loss takes them: the same rule as for a data module's.

        Args:
            target: Class numbers (B,) or (B, 1), of any type that holds them exactly, or one-hot
                (B, C); or numbers (B,) or (B, C).
            outputs: C, of the model.

        Returns:
            Class numbers (B,), int64; or numbers (B, C), (B,) for one output.

        Raises:
            ValueError: They are no such targets.
        """
        count = len(target)
        if target.ndim == 2 and target.shape[1] == 1:
            target = target[:, 0]
        if self.task == "regression":
            fits = target.shape == ((count,) if outputs == 1 else (count, outputs))
            if not fits or target.is_complex():
                raise self._unfit(
                    "one prediction for each target",
                    f"targets {tuple(target.shape)} of {target.dtype} for {outputs} output(s) of "
                    f"the model",
                )
            return target.float() if target.dtype == torch.bool else target
        if self.task == "binary" and outputs != 1:
            raise self._unfit("one output", f"{outputs}")
        classes = outputs if self.task == "multiclass" else 2
        if not (target.is_floating_point() or target.is_complex()):
            target = target.long()  # torch compares no unsigned types
        if target.shape == (count, classes):
            if not bool(((target == 0) | (target == 1)).all() & (target.sum(1) == 1).all()):
                raise self._unfit(
                    "class numbers, or one-hot targets: one 1 in each row, and zeros",
                    f"targets {tuple(target.shape)} of other numbers",
                )
            return target.long().argmax(1)
        if target.ndim != 1:
            received = f"targets {tuple(target.shape)} for {classes} classes"
            raise self._unfit("a class number for each example", received)
        labels = target.long()
        wrong = (labels != target) | (labels < 0) | (labels >= classes)
        if bool(wrong.any()):
            raise self._unfit(
                f"integer labels 0 … {classes - 1} for {outputs} outputs",
                f"{target.dtype} from {target.min().item()} to {target.max().item()}",
            )
        return labels

    def _unfit(self, expected: str, received: str) -> ValueError:
        return ValueError(f"{type(self).__name__} expects {expected}. Received: {received}.")

    def _labels(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Class numbers (B,), int64, of targets whose shape and type leave no doubt."""
        count, binary = len(prediction), self.task == "binary"
        fits = prediction.ndim == 2 and not (binary and prediction.shape[1] != 1)
        if not fits or target.shape not in ((count,), (count, 1)):
            raise self._unfit(
                f"predictions {'(B, 1)' if binary else '(B, C)'} and class numbers (B,)",
                f"predictions {tuple(prediction.shape)}, targets {tuple(target.shape)}",
            )
        if target.is_floating_point() or target.is_complex():
            received = f"targets of {target.dtype}. target.long() makes them whole numbers"
            raise self._unfit("class numbers of an integer type", received)
        return target.reshape(count).long()

    def _one_hot(self, prediction: Tensor, target: Tensor) -> Tensor:
        """1[y = c], (B, C), of the type of the prediction."""
        classes = torch.arange(prediction.shape[1], device=target.device)
        return (self._labels(prediction, target).unsqueeze(1) == classes).to(prediction.dtype)

    def _signs(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Classes 0, 1 as −1, +1, (B,), of the type of the prediction."""
        return 2 * self._labels(prediction, target).to(prediction.dtype) - 1

    def _numbers(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Numbers of the shape of the prediction."""
        count = len(prediction)
        single = prediction.shape == (count, 1) and target.shape == (count,)
        fits = single or target.shape == prediction.shape
        if prediction.ndim != 2 or not fits or target.is_complex():
            raise self._unfit(
                "a number for each prediction (B, C)",
                f"predictions {tuple(prediction.shape)}, targets {tuple(target.shape)} of "
                f"{target.dtype}",
            )
        target = target.reshape(prediction.shape)
        return target if target.is_floating_point() else target.to(prediction.dtype)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, C) and (B, …) to (B,)."""
        raise NotImplementedError

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        """∂ℓ/∂p of each example, a subgradient where there is a kink, (B, C)."""
        raise NotImplementedError

    def curvature(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The diagonal of ∂²ℓ/∂p² of each example, (B, C)."""
        raise NotImplementedError

    def hessian(self, prediction: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        """v ↦ ∂²ℓ/∂p² v of each example, (B, C) to (B, C); here, for a sum over c."""
        diagonal = self.curvature(prediction, target)
        return lambda v: diagonal * v

    def conjugate(self, slope: Tensor, target: Tensor) -> Tensor:
        """ℓ*(α) = max_p ⟨α, p⟩ − ℓ(p), (B,), for α in the `domain`."""
        raise NotImplementedError

    def native(self) -> Callable[..., Any] | None:
        """Value and slope of one example, in Numba's part of Python; None: there is none.

        Returns:
            `kernel(p, label, y, slope)`: of p (C,), the class number and, in a regression, y (C,)
            it returns ℓ and writes ∂ℓ/∂p into slope (C,). What it takes from the loss (a δ, say)
            is bound when this is called.
        """
        return None

    def decide(self, prediction: Tensor) -> Tensor:
        """The answer that a prediction stands for: a class (B,), or the numbers (B, C)."""
        if self.task == "multiclass":
            return prediction.argmax(1)
        if self.task == "binary":
            return (prediction[:, 0] > 0).long()
        return prediction


class SquaredError(Loss):
    """½ Σ_c (p_c − y_c)², gradient p − y.

    Example:
        >>> SquaredError()(torch.tensor([[3.0]]), torch.tensor([1.0]))
        tensor([2.])
    """

    task = "regression"
    quadratic = True
    formula = "½ Σ (p − y)²"
    slope_formula = "p − y"
    domain = "everything"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """½ Σ_c (p_c − y_c)²."""
        return 0.5 * (prediction - self._numbers(prediction, target)).square().sum(1)

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        """p − y."""
        return prediction - self._numbers(prediction, target)

    def curvature(self, prediction: Tensor, target: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(prediction)

    def conjugate(self, slope: Tensor, target: Tensor) -> Tensor:
        """½‖α‖² + ⟨α, y⟩."""
        return (0.5 * slope.square() + slope * self._numbers(slope, target)).sum(1)


class Huber(Loss):
    """Σ_c h(p_c − y_c), with h(r) = ½r² for |r| ≤ δ and δ(|r| − ½δ) beyond.

    Args:
        delta: δ, in units of the target, range (0, ∞).

    Raises:
        ValueError: delta is out of range.

    Example:
        >>> Huber(delta=1.0)(torch.tensor([[3.0], [0.5]]), torch.tensor([0.0, 0.0]))
        tensor([2.5000, 0.1250])

    References:
        Huber, Robust Estimation of a Location Parameter, 1964.
    """

    task = "regression"
    formula = "Σ huber(p − y)"
    slope_formula = "p − y, cut to [−δ, δ]"
    domain = "intervals"

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        self.delta = Interval(0, math.inf).check("delta", delta)

    def extra_repr(self) -> str:
        """For messages, and to tell a resumed run's loss."""
        return f"delta={self.delta}"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Σ_c h(p_c − y_c)."""
        # The kernel's gradient wants one dtype.
        target = self._numbers(prediction, target).to(prediction.dtype)
        return F.huber_loss(prediction, target, reduction="none", delta=self.delta).sum(1)

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        """p − y, cut to [−δ, δ]."""
        r = prediction - self._numbers(prediction, target)
        return r.clamp(-self.delta, self.delta)

    def curvature(self, prediction: Tensor, target: Tensor) -> Tensor:
        """1 where |p_c − y_c| ≤ δ, else 0."""
        r = prediction - self._numbers(prediction, target)
        return (r.abs() <= self.delta).to(prediction)

    conjugate = SquaredError.conjugate  # for |α_c| ≤ δ


class CrossEntropy(Loss):
    """log Σ_c exp(p_c) − p_y for classes y = 0 … C−1; softmax regression with a linear model.

    Example:
        >>> CrossEntropy()(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([0.6931])
    """

    task = "multiclass"
    formula = "log Σ exp(p) − p_y"
    slope_formula = "softmax(p) − onehot(y)"
    domain = "simplex"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """log Σ_c exp(p_c) − p_y."""
        return F.cross_entropy(prediction, self._labels(prediction, target), reduction="none")

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        """softmax(p) − onehot(y)."""
        return prediction.softmax(1) - self._one_hot(prediction, target)

    def curvature(self, prediction: Tensor, target: Tensor) -> Tensor:
        """q_c (1 − q_c), with q = softmax(p)."""
        q = prediction.softmax(1)
        return q * (1 - q)

    def hessian(self, prediction: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        """v ↦ q ∘ (v − ⟨q, v⟩), with q = softmax(p)."""
        q = prediction.softmax(1)
        return lambda v: q * (v - (q * v).sum(1, keepdim=True))

    def conjugate(self, slope: Tensor, target: Tensor) -> Tensor:
        """Σ_c q_c log q_c for a distribution q = α + onehot(y)."""
        q = (slope + self._one_hot(slope, target)).clamp(min=0)
        return torch.xlogy(q, q).sum(1)


class OneHotSquaredError(Loss):
    """½ Σ_c (p_c − 1[y = c])² for classes y = 0 … C−1, gradient p − one-hot(y).

    Least squares on the indicators of the classes. The curvature in p is 1 wherever p is, which
    cross-entropy's is not.

    Example:
        >>> OneHotSquaredError()(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([1]))
        tensor([2.5000])
    """

    task = "multiclass"
    quadratic = True
    formula = "½ Σ (p − onehot(y))²"
    slope_formula = "p − onehot(y)"
    domain = "everything"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """½ Σ_c (p_c − 1[y = c])²."""
        return 0.5 * (prediction - self._one_hot(prediction, target)).square().sum(1)

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        """p − onehot(y)."""
        return prediction - self._one_hot(prediction, target)

    curvature = SquaredError.curvature

    def conjugate(self, slope: Tensor, target: Tensor) -> Tensor:
        """½‖α‖² + α_y."""
        return (0.5 * slope.square() + slope * self._one_hot(slope, target)).sum(1)


class Logistic(Loss):
    """log(1 + exp(−s p)) with s = +1 for class 1, −1 for class 0, and one output p.

    Example:
        >>> Logistic()(torch.tensor([[0.0], [2.0]]), torch.tensor([1, 0]))
        tensor([0.6931, 2.1269])
    """

    task = "binary"
    formula = "log(1 + exp(−s p)), s = ±1"
    slope_formula = "−s / (1 + exp(s p))"
    domain = "intervals"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """log(1 + exp(−s p))."""
        m = self._signs(prediction, target) * prediction[:, 0]
        # Beyond the threshold torch takes −m: as close as a number of the type can be.
        return F.softplus(-m, threshold=40 if m.dtype == torch.float64 else 20)

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        """−s / (1 + exp(s p))."""
        s = self._signs(prediction, target)[:, None]
        return -s * torch.sigmoid(-s * prediction)

    def curvature(self, prediction: Tensor, target: Tensor) -> Tensor:
        """σ(p) σ(−p)."""
        return torch.sigmoid(prediction) * torch.sigmoid(-prediction)

    def conjugate(self, slope: Tensor, target: Tensor) -> Tensor:
        """β log β + (1 − β) log(1 − β) for 0 ≤ β = −s α ≤ 1."""
        beta = -self._signs(slope, target) * slope[:, 0]
        return torch.xlogy(beta, beta) + torch.special.xlog1py(1 - beta, -beta)


class Hinge(Loss):
    """max(0, 1 − s p) with s = ±1 for classes 1, 0; a linear SVM with a linear model and λ > 0.

    Not differentiable at s p = 1, where the subgradient 0 is used.

    Example:
        >>> Hinge()(torch.tensor([[0.5], [2.0]]), torch.tensor([1, 1]))
        tensor([0.5000, 0.0000])

    References:
        Cortes and Vapnik, Support-Vector Networks, 1995.
    """

    task = "binary"
    smooth = False
    formula = "max(0, 1 − s p), s = ±1"
    slope_formula = "−s where s p < 1, else 0"
    domain = "intervals"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """max(0, 1 − s p)."""
        return F.relu(1 - self._signs(prediction, target) * prediction[:, 0])

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        """−s where s p < 1, else 0."""
        s = self._signs(prediction, target)[:, None]
        return -s * (s * prediction < 1)

    def curvature(self, prediction: Tensor, target: Tensor) -> Tensor:
        """0 but at the kink."""
        return torch.zeros_like(prediction)

    def conjugate(self, slope: Tensor, target: Tensor) -> Tensor:
        """−β for 0 ≤ β = −s α ≤ 1."""
        return self._signs(slope, target) * slope[:, 0]


class SquaredHinge(Loss):
    """max(0, 1 − s p)² with s = ±1 for classes 1, 0; smooth.

    Example:
        >>> SquaredHinge()(torch.tensor([[0.5], [2.0]]), torch.tensor([1, 1]))
        tensor([0.2500, 0.0000])
    """

    task = "binary"
    formula = "max(0, 1 − s p)², s = ±1"
    slope_formula = "−2 s max(0, 1 − s p)"
    domain = "intervals"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """max(0, 1 − s p)²."""
        return F.relu(1 - self._signs(prediction, target) * prediction[:, 0]).square()

    def slope(self, prediction: Tensor, target: Tensor) -> Tensor:
        """−2 s max(0, 1 − s p)."""
        s = self._signs(prediction, target)[:, None]
        return -2 * s * F.relu(1 - s * prediction)

    def curvature(self, prediction: Tensor, target: Tensor) -> Tensor:
        """2 where s p < 1, else 0."""
        s = self._signs(prediction, target)[:, None]
        return 2.0 * (s * prediction < 1).to(prediction)

    def conjugate(self, slope: Tensor, target: Tensor) -> Tensor:
        """¼β² − β for β = −s α ≥ 0."""
        beta = -self._signs(slope, target) * slope[:, 0]
        return 0.25 * beta.square() - beta
