"""How parameters start: the spread of the first weights decides how far signals carry."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from gdtrain.ranges import Interval

__all__ = ["Init", "check_hidden_init", "initialise_"]

Init = Literal["default", "gaussian", "kaiming", "xavier", "zeros"]


def check_hidden_init(init: Init) -> None:
    """Raise where hidden units would start equal, and stay so."""
    if init == "zeros":
        raise ValueError(
            "init=zeros is for linear models: hidden units that start equal stay equal. "
            "Use init=default, gaussian, kaiming or xavier."
        )


@torch.no_grad()
def initialise_(module: nn.Module, init: Init = "default", std: float = 0.01) -> nn.Module:
    """Draw the weights of every linear and convolutional layer, set biases to 0; the module again.

        default     PyTorch's own: uniform in ±1/√fan_in, biases too (nothing is changed here)
        gaussian    N(0, std²)
        kaiming     N(0, 2/fan_in), for ReLU
        xavier      N(0, 2/(fan_in + fan_out)), for tanh
        zeros       0: for linear models only, since equal hidden units stay equal

    Args:
        module: Changed in place.
        init: Which.
        std: Standard deviation of "gaussian", range (0, ∞).

    Raises:
        ValueError: Unknown name, or std out of range.

    Example:
        >>> layer = initialise_(nn.Linear(3, 2), "zeros")
        >>> layer.weight.abs().sum().item()
        0.0

    References:
        Glorot and Bengio, 2010 (xavier); He et al., 2015, arXiv 1502.01852 (kaiming).
    """
    draws: dict[str, Callable[[torch.Tensor], Any]] = {
        "gaussian": partial(nn.init.normal_, std=std),
        "kaiming": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
        "xavier": nn.init.xavier_normal_,
        "zeros": nn.init.zeros_,
    }
    names = ("default", *draws)
    if init not in names:
        raise ValueError(f"init must be one of {', '.join(names)}. Received: {init!r}.")
    Interval(0, math.inf).check("std", std)
    for layer in module.modules() if init != "default" else ():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            draws[init](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module
