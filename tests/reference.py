"""The oracle: the update rules as plain float64 loops over coordinates.

Written to be trusted at a glance and to share nothing with `gdtrain.rules`: no tensors, no lists of
tensors, no in-place kernels.
"""

from collections.abc import Callable, Sequence

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
