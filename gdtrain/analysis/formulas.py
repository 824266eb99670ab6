"""The losses and activations that a written-out update has: in words, and their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gdtrain.losses import (
    CrossEntropy,
    Hinge,
    Huber,
    Logistic,
    Loss,
    OneHotSquaredError,
    SquaredError,
    SquaredHinge,
)

__all__ = ["LOSSES", "SLOPES", "LossFormula"]


class LossFormula(NamedTuple):
    """A loss of one example, and its derivative in the prediction.

    Args:
        value: ℓ, in words.
        derivative: ∂ℓ/∂p, in words.
        signal: From the loss, p (B, C) and y to ∂ℓ/∂p, (B, C).

    Example:
        >>> LOSSES[SquaredError].signal(SquaredError(), torch.tensor([[2.0]]), torch.tensor([3.0]))
        tensor([[-1.]])
    """

    value: str
    derivative: str
    signal: Callable[[Any, Tensor, Tensor], Tensor]


def _one_hot(p: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, p.shape[1]).to(p.dtype)


def _sign(p: Tensor, y: Tensor) -> Tensor:
    return (2 * y.to(p.dtype) - 1).reshape(p.shape)


LOSSES: dict[type[Loss], LossFormula] = {
    SquaredError: LossFormula("½ Σ (p − y)²", "p − y", lambda _, p, y: p - y.reshape(p.shape)),
    Huber: LossFormula(
        "Σ huber(p − y)",
        "p − y, cut to [−δ, δ]",
        lambda loss, p, y: (p - y.reshape(p.shape)).clamp(-loss.delta, loss.delta),
    ),
    CrossEntropy: LossFormula(
        "log Σ exp(p) − p_y",
        "softmax(p) − onehot(y)",
        lambda _, p, y: p.softmax(1) - _one_hot(p, y),
    ),
    OneHotSquaredError: LossFormula(
        "½ Σ (p − onehot(y))²", "p − onehot(y)", lambda _, p, y: p - _one_hot(p, y)
    ),
    Logistic: LossFormula(
        "log(1 + exp(−s p)), s = ±1",
        "−s / (1 + exp(s p))",
        lambda _, p, y: -_sign(p, y) * torch.sigmoid(-_sign(p, y) * p),
    ),
    Hinge: LossFormula(
        "max(0, 1 − s p), s = ±1",
        "−s where s p < 1, else 0",
        lambda _, p, y: torch.where(_sign(p, y) * p < 1, -_sign(p, y), 0.0),
    ),
    SquaredHinge: LossFormula(
        "max(0, 1 − s p)², s = ±1",
        "−2 s max(0, 1 − s p)",
        lambda _, p, y: -2 * _sign(p, y) * (1 - _sign(p, y) * p).clamp(min=0),
    ),
}


def _gelu(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density


def _silu(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


# a′(z), in words and as it is computed.
SLOPES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "relu": ("1 where z > 0, else 0", lambda z: (z > 0).to(z.dtype)),
    "tanh": ("1 − tanh²(z)", lambda z: 1 - torch.tanh(z).square()),
    "sigmoid": ("σ(z) (1 − σ(z))", lambda z: torch.sigmoid(z) * (1 - torch.sigmoid(z))),
    "gelu": ("Φ(z) + z φ(z)", _gelu),
    "silu": ("σ(z) (1 + z (1 − σ(z)))", _silu),
    "leaky_relu": ("1 where z > 0, else 0.01", lambda z: 0.01 + 0.99 * (z > 0).to(z.dtype)),
    "elu": ("1 where z > 0, else exp(z)", lambda z: torch.where(z > 0, 1.0, z.exp()).to(z)),
    "softplus": ("σ(z)", torch.sigmoid),
    "identity": ("1", torch.ones_like),
}
