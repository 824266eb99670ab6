"""Small problems with minima known in closed form, in float64.

Each comes with a step size that is stable with and without momentum (Nesterov's included: below
4/3 of 1/λ_max), and a number of updates within which gradient descent, with or without momentum up
to 0.9, comes within `tolerance` of the minimum.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    name: str
    loss: Callable[[Tensor], Tensor]
    start: Tensor
    minimum: Tensor
    lr: float
    updates: int
    tolerance: float = 1e-8

    def __str__(self) -> str:
        return self.name


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ½θᵀAθ − bᵀθ: A (2, 3) = (9, 8)
A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
b = vector(9, 8)

# The line through (1, 6), (2, 5), (3, 7), (4, 10): 3.5 + 1.4 x
LINE_X = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0], [1.0, 4.0]], dtype=torch.float64)
LINE_Y = vector(6, 5, 7, 10)

# Group j alone decides θ_j: 3 of 4, 1 of 2 and 1 of 5 labels are 1, so θ_j = log(odds)
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
LABEL = vector(1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0)
LOG_ODDS = torch.log(vector(3 / 1, 1 / 1, 1 / 4))


def quadratic(theta: Tensor) -> Tensor:
    return 0.5 * theta @ A @ theta - b @ theta


def rosenbrock(theta: Tensor) -> Tensor:
    x, y = theta.unbind()
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def least_squares(theta: Tensor) -> Tensor:
    return 0.5 * ((LINE_X @ theta - LINE_Y) ** 2).mean()


def logistic(theta: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(theta[GROUP], LABEL)


PROBLEMS = [
    Problem("quadratic", quadratic, vector(0, 0), vector(2, 3), lr=0.25, updates=600),
    Problem(
        "rosenbrock",
        rosenbrock,
        vector(-1.2, 1),
        vector(1, 1),
        1e-3,
        updates=20_000,
        tolerance=0.01,
    ),
    Problem("least squares", least_squares, vector(0, 0), vector(3.5, 1.4), lr=0.1, updates=1_500),
    Problem("logistic", logistic, vector(0, 0, 0), LOG_ODDS, lr=6.0, updates=600),
]
