"""Losses per example. Their mean over a batch is formed in one place, `gdtrain.objective`.

B batch, C outputs of the model. A loss maps predictions (B, C) and targets (B,) or (B, C) to
values (B,). Subclass `Loss` for one of your own.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    A subclass defines `forward(prediction, target) -> (B,)` and `task`.

    Example:
        >>> import torch
        >>> class AbsoluteError(Loss):
        ...     task = "regression"
        ...     def forward(self, prediction, target):
        ...         return (prediction - target.reshape(prediction.shape)).abs().sum(1)
        >>> AbsoluteError()(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.0]))
        tensor([2., 0.])
    """

    task: ClassVar[Literal["regression", "binary", "multiclass"]]
    smooth: ClassVar[bool] = True
    """Whether it is differentiable in the prediction everywhere; some step-size rules need that."""

    def outputs(self, num_classes: int | None, num_targets: int = 1) -> int:
        """How many outputs the model needs.

        Args:
            num_classes: Of the data; None for regression.
            num_targets: Target columns in regression.

        Returns:
            C.

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

        Args:
            prediction: (B, C).
            target: (B,) or (B, C).

        Raises:
            ValueError: Shapes or labels do not fit the loss.
        """
        name = type(self).__name__
        if prediction.ndim != 2 or len(prediction) != len(target):
            raise ValueError(
                f"{name} expects predictions (B, C) for targets (B, …). Received: predictions "
                f"{tuple(prediction.shape)}, targets {tuple(target.shape)}."
            )
        columns = prediction.shape[1]
        if self.task == "regression":
            if target.numel() != prediction.numel():
                raise ValueError(
                    f"{name} expects one prediction for each target. Received: predictions "
                    f"{tuple(prediction.shape)}, targets {tuple(target.shape)}."
                )
            return
        classes = columns if self.task == "multiclass" else 2
        if self.task == "binary" and columns != 1:
            raise ValueError(f"{name} expects one output. Received: {columns}.")
        low, high = int(target.min()), int(target.max())
        if target.is_floating_point() or low < 0 or high >= classes:
            raise ValueError(
                f"{name} expects integer labels 0 … {classes - 1} for {columns} outputs. "
                f"Received: {target.dtype} from {low} to {high}."
            )

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, C) and (B, …) to (B,)."""
        raise NotImplementedError

    def decide(self, prediction: Tensor) -> Tensor:
        """The answer that a prediction stands for: a class (B,), or the numbers (B, C) themselves.

        Args:
            prediction: (B, C).
        """
        if self.task == "multiclass":
            return prediction.argmax(1)
        if self.task == "binary":
            return (prediction[:, 0] > 0).long()
        return prediction


class SquaredError(Loss):
    """½ Σ_c (p_c − y_c)², gradient p − y.

    Example:
        >>> import torch
        >>> SquaredError()(torch.tensor([[3.0]]), torch.tensor([1.0]))
        tensor([2.])
    """

    task = "regression"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """½ Σ_c (p_c − y_c)²."""
        return 0.5 * (prediction - target.reshape(prediction.shape)).square().sum(1)


class Huber(Loss):
    """Σ_c h(p_c − y_c), with h(r) = ½r² for |r| ≤ δ and δ(|r| − ½δ) beyond.

    Args:
        delta: δ, in units of the target, range (0, ∞).

    Raises:
        ValueError: delta is out of range.

    Example:
        >>> import torch
        >>> Huber(delta=1.0)(torch.tensor([[3.0], [0.5]]), torch.tensor([0.0, 0.0]))
        tensor([2.5000, 0.1250])

    References:
        Huber, Robust Estimation of a Location Parameter, 1964.
    """

    task = "regression"

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        if not 0 < delta < float("inf"):
            raise ValueError(f"delta must be finite and > 0. Received: delta={delta}.")
        self.delta = delta

    def extra_repr(self) -> str:
        """For messages, and to tell a resumed run's loss."""
        return f"delta={self.delta}"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Σ_c h(p_c − y_c)."""
        # The kernel's gradient wants one dtype; labels of two classes come as whole numbers.
        target = target.reshape(prediction.shape).to(prediction.dtype)
        return F.huber_loss(prediction, target, reduction="none", delta=self.delta).sum(1)


class CrossEntropy(Loss):
    """log Σ_c exp(p_c) − p_y for classes y = 0 … C−1; softmax regression with a linear model.

    Example:
        >>> import torch
        >>> CrossEntropy()(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([0.6931])
    """

    task = "multiclass"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """log Σ_c exp(p_c) − p_y."""
        return F.cross_entropy(prediction, target, reduction="none")


class OneHotSquaredError(Loss):
    """½ Σ_c (p_c − 1[y = c])² for classes y = 0 … C−1, gradient p − one-hot(y).

    Least squares on the indicators of the classes. The curvature in p is 1 wherever p is, which
    cross-entropy's is not.

    Example:
        >>> import torch
        >>> OneHotSquaredError()(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([1]))
        tensor([2.5000])
    """

    task = "multiclass"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """½ Σ_c (p_c − 1[y = c])²."""
        classes = torch.arange(prediction.shape[1], device=target.device)
        wanted = (target.unsqueeze(1) == classes).to(prediction.dtype)
        return 0.5 * (prediction - wanted).square().sum(1)


class Logistic(Loss):
    """log(1 + exp(−s p)) with s = +1 for class 1, −1 for class 0, and one output p.

    Example:
        >>> import torch
        >>> Logistic()(torch.tensor([[0.0], [2.0]]), torch.tensor([1, 0]))
        tensor([0.6931, 2.1269])
    """

    task = "binary"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """log(1 + exp(−s p))."""
        return F.softplus(-_sign(target, prediction) * prediction[:, 0])


class Hinge(Loss):
    """max(0, 1 − s p) with s = ±1 for classes 1, 0; a linear SVM with a linear model and λ > 0.

    Not differentiable at s p = 1, where the subgradient 0 is used.

    Example:
        >>> import torch
        >>> Hinge()(torch.tensor([[0.5], [2.0]]), torch.tensor([1, 1]))
        tensor([0.5000, 0.0000])

    References:
        Cortes and Vapnik, Support-Vector Networks, 1995.
    """

    task = "binary"
    smooth = False

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """max(0, 1 − s p)."""
        return F.relu(1 - _sign(target, prediction) * prediction[:, 0])


class SquaredHinge(Loss):
    """max(0, 1 − s p)² with s = ±1 for classes 1, 0; smooth.

    Example:
        >>> import torch
        >>> SquaredHinge()(torch.tensor([[0.5], [2.0]]), torch.tensor([1, 1]))
        tensor([0.2500, 0.0000])
    """

    task = "binary"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """max(0, 1 − s p)²."""
        return F.relu(1 - _sign(target, prediction) * prediction[:, 0]).square()


def _sign(target: Tensor, like: Tensor) -> Tensor:
    """Classes 0, 1 as −1, +1."""
    return 2 * target.to(like.dtype) - 1
