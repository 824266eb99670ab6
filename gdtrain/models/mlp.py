"""The multi-layer perceptron."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from gdtrain.models.activations import ACTIVATIONS, Activation
from gdtrain.models.dropout import Dropout
from gdtrain.models.initialisation import Init, check_hidden_init, initialise_

__all__ = ["MLP"]


class MLP(nn.Module):
    """h_l = a(W_l h_{l−1} + b_l), l = 1 … L, then p = W h_L + b, on the flattened input.

    Args:
        input_shape: Shape of one example, without the batch.
        num_outputs: C, range [1, ∞).
        hidden: Widths of the L hidden layers, each in [1, ∞).
        activation: a: relu, tanh, sigmoid, gelu, silu, leaky_relu, elu, softplus or identity; or an
            `Activation` of your own, or its class.
        dropout: Share of hidden units that are dropped in training, range [0, 1).
        init: Initial weights, see `initialise_`.
        std: Standard deviation of init="gaussian".

    Raises:
        ValueError: Unknown activation, a width below 1, dropout out of range, or init="zeros".

    Example:
        >>> import torch
        >>> MLP((1, 8, 8), 10, hidden=[128, 64])(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        hidden: Sequence[int] = (128,),
        activation: Literal[
            "relu", "tanh", "sigmoid", "gelu", "silu", "leaky_relu", "elu", "softplus", "identity"
        ]
        | Activation
        | type[Activation] = "relu",
        dropout: float = 0.0,
        init: Init = "default",
        std: float = 0.01,
    ) -> None:
        super().__init__()
        a = activation() if isinstance(activation, type) else activation
        if not isinstance(a, Activation) and a not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}. Received: {activation!r}."
            )
        if isinstance(hidden, int | str) or any(
            isinstance(width, bool) or not isinstance(width, int) or width < 1 for width in hidden
        ):
            raise ValueError(
                f"hidden must be a list of whole widths of at least 1, such as [128]. "
                f"Received: hidden={hidden!r}."
            )
        check_hidden_init(init)
        self.input_shape, self.num_outputs = tuple(input_shape), num_outputs
        a = a if isinstance(a, Activation) else ACTIVATIONS[a]()
        self.hidden, self.activation, self.dropout = list(hidden), a.name, dropout
        build = a.module or partial(copy.deepcopy, a)
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(input_shape)
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), build()]
            if dropout != 0:
                layers.append(Dropout(dropout, layer=len(layers)))
            width = next_width
        layers.append(nn.Linear(width, num_outputs))
        self.layers = nn.Sequential(*layers)
        initialise_(self, init, std)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) to (B, C)."""
        return self.layers(x)
