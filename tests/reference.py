"""The oracle: update rules as plain float64 loops over coordinates, losses of one example.

Written to be trusted at a glance and to share nothing with `gdtrain.rules`: no tensors, no lists of
tensors, no in-place kernels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def trajectory(
    gradient: Callable[[np.ndarray, int], Sequence[float]],
    start: Sequence[float],
    updates: int,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> np.ndarray:
    """θ after each update, shape (updates, D); `gradient(θ, t)` is g before update t = 0, 1, …"""
    theta = [float(x) for x in start]
    b = [0.0] * len(theta)
    path = []
    for t in range(updates):
        g = [float(x) for x in gradient(np.array(theta), t)]
        for i in range(len(theta)):
            d = -g[i] if maximize else g[i]
            d = d + weight_decay * theta[i]
            if momentum != 0:
                b[i] = d if t == 0 else momentum * b[i] + (1 - dampening) * d
                d = d + momentum * b[i] if nesterov else b[i]
            theta[i] = theta[i] - lr * d
        path.append(list(theta))
    return np.array(path)


def mean_gradient(
    example_gradient: Callable[[np.ndarray, int], Sequence[float]],
    theta: np.ndarray,
    batch: Sequence[int],
) -> np.ndarray:
    """(1/B) Σ_{i∈batch} ∇f_i(θ), one example after the other."""
    total = np.zeros(len(theta))
    for i in batch:
        total = total + np.array(example_gradient(theta, i))
    return total / len(batch)


def loss_value(loss: Any, p: Sequence[float], y: Any) -> float:
    """ℓ(p, y) of one example, by the name of the loss."""
    name = type(loss).__name__
    if name in ("Logistic", "Hinge", "SquaredHinge"):
        m = p[0] if int(y) else -p[0]
        return {
            "Logistic": max(0.0, -m) + math.log1p(math.exp(-abs(m))),
            "Hinge": max(0.0, 1 - m),
            "SquaredHinge": max(0.0, 1 - m) ** 2,
        }[name]
    if name == "CrossEntropy":
        top = max(p)
        return top + math.log(sum(math.exp(v - top) for v in p)) - p[int(y)]
    if name == "OneHotSquaredError":
        return 0.5 * sum((v - (c == int(y))) ** 2 for c, v in enumerate(p))
    r = [abs(v - t) for v, t in zip(p, np.atleast_1d(y), strict=True)]
    if name == "Huber":
        d = loss.delta
        return sum(0.5 * v * v if v <= d else d * (v - 0.5 * d) for v in r)
    return sum(0.5 * v * v for v in r)
