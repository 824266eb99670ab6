"""The linear model: p = W x + b."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from gdtrain.models.initialisation import Init, initialise_

__all__ = ["Linear"]


class Linear(nn.Module):
    """p = W x + b, on the flattened input.

    With squared error it is linear regression, with cross-entropy softmax regression, with the
    logistic loss logistic regression, with hinge and weight decay a linear SVM.

    Args:
        input_shape: Shape of one example, without the batch.
        num_outputs: C, range [1, ∞).
        bias: Whether there is b.
        init: Initial weights, see `initialise_`; "zeros" is fine here: the problem is convex.
        std: Standard deviation of init="gaussian".

    Example:
        >>> import torch
        >>> Linear((8, 8), 10)(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        bias: bool = True,
        init: Init = "default",
        std: float = 0.01,
    ) -> None:
        super().__init__()
        self.input_shape, self.num_outputs, self.bias = tuple(input_shape), num_outputs, bias
        self.linear = nn.Linear(math.prod(input_shape), num_outputs, bias=bias)
        initialise_(self, init, std)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) to (B, C)."""
        return self.linear(x.flatten(1))
