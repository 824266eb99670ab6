"""Activations, with all that is known of them: value, slope, words, and what torch calls them.

h = a(z) acts on each unit by itself. Subclass `Activation` for one of your own: the class is the
only thing that a model, an engine or an explanation asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "Activation", "activation_of"]


class Activation(nn.Module):
    """Base of the activations: a module that also knows its slope.

    A subclass defines `forward` and `name`. With `slope` it can be explained and, with `native`
    too, trained by the hand-written engine.
    """

    name: ClassVar[str]
    """In configurations and messages."""
    formula: ClassVar[str]
    """a(z) in words."""
    slope_formula: ClassVar[str]
    """a′(z) in words."""
    module: ClassVar[type[nn.Module] | None] = None
    """The module of torch's that computes it, which models are built of; None: the class itself."""
    ends: ClassVar[tuple[float, float] | None] = None
    """The two values at whose neighbourhood a unit is saturated."""
    parameter: float = 0.0
    """Slope of leaky_relu, α of elu."""
    option: ClassVar[str] = ""
    """What `module` calls the parameter."""

    @classmethod
    def of(cls, module: Any) -> Activation | None:
        """What a module of type `cls.module` computes; None: with its options it is another."""
        made = cls()
        if cls.option:
            made.parameter = float(getattr(module, cls.option))
        return made

    def slope(self, z: Tensor, h: Tensor) -> Tensor:
        """a′(z), of z and h = a(z), from which it is often cheaper."""
        raise NotImplementedError

    def write(self, z: Tensor, out: Tensor) -> None:
        """Write a(z) into `out`."""
        out.copy_(self(z))

    def times_slope(self, z: Tensor, h: Tensor, delta: Tensor) -> None:
        """δ ← δ ∘ a′(z), with h = a(z)."""
        delta.mul_(self.slope(z, h))

    def native(self) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
        """a(z) and a′(z, h) of one number, in Numba's part of Python; None: there are none."""
        return None


class _ReLU(Activation):
    name, module = "relu", nn.ReLU
    formula, slope_formula = "max(0, z)", "1 where z > 0, else 0"

    def forward(self, z: Tensor) -> Tensor:
        return F.relu(z)

    def slope(self, z: Tensor, h: Tensor) -> Tensor:
        return (z > 0).to(z.dtype)

    def write(self, z: Tensor, out: Tensor) -> None:
        torch.clamp_min(z, 0, out=out)

    def times_slope(self, z: Tensor, h: Tensor, delta: Tensor) -> None:
        # Not where h > 0: h is NaN where z is, and NaN must go on.
        torch.ops.aten.threshold_backward.grad_input(delta, h, 0, grad_input=delta)


class _Tanh(Activation):
    name, module, ends = "tanh", nn.Tanh, (-1.0, 1.0)
    formula, slope_formula = "tanh(z)", "1 − tanh²(z)"

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z)

    def slope(self, z: Tensor, h: Tensor) -> Tensor:
        return 1 - h * h

    def write(self, z: Tensor, out: Tensor) -> None:
        torch.tanh(z, out=out)

    def times_slope(self, z: Tensor, h: Tensor, delta: Tensor) -> None:
        delta.addcmul_(delta, h * h, value=-1)


class _Sigmoid(Activation):
    name, module, ends = "sigmoid", nn.Sigmoid, (0.0, 1.0)
    formula, slope_formula = "1 / (1 + exp(−z))", "σ(z) (1 − σ(z))"

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def slope(self, z: Tensor, h: Tensor) -> Tensor:
        return h * (1 - h)

    def write(self, z: Tensor, out: Tensor) -> None:
        torch.sigmoid(z, out=out)

    def times_slope(self, z: Tensor, h: Tensor, delta: Tensor) -> None:
        delta.mul_(h).addcmul_(delta, h, value=-1)


class _GELU(Activation):
    name, module = "gelu", nn.GELU
    formula, slope_formula = "z Φ(z)", "Φ(z) + z φ(z)"

    @classmethod
    def of(cls, module: Any) -> Activation | None:
        return cls() if module.approximate == "none" else None

    def forward(self, z: Tensor) -> Tensor:
        return F.gelu(z)

    def slope(self, z: Tensor, h: Tensor) -> Tensor:
        density = torch.exp(-0.5 * z * z).mul_(math.sqrt(0.5 / math.pi))
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * density


class _SiLU(Activation):
    name, module = "silu", nn.SiLU
    formula, slope_formula = "z σ(z)", "σ(z) (1 + z (1 − σ(z)))"

    def forward(self, z: Tensor) -> Tensor:
        return F.silu(z)

    def slope(self, z: Tensor, h: Tensor) -> Tensor:
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))


class _LeakyReLU(Activation):
    name, module, option, parameter = "leaky_relu", nn.LeakyReLU, "negative_slope", 0.01
    formula, slope_formula = "z where z > 0, else 0.01 z", "1 where z > 0, else 0.01"

    def forward(self, z: Tensor) -> Tensor:
        return F.leaky_relu(z, self.parameter)

    def slope(self, z: Tensor, h: Tensor) -> Tensor:
        return (z > 0).to(z.dtype).mul_(1 - self.parameter).add_(self.parameter)


class _ELU(Activation):
    name, module, option, parameter = "elu", nn.ELU, "alpha", 1.0
    formula, slope_formula = "z where z > 0, else exp(z) − 1", "1 where z > 0, else exp(z)"

    def forward(self, z: Tensor) -> Tensor:
        return F.elu(z, self.parameter)

    def slope(self, z: Tensor, h: Tensor) -> Tensor:
        return torch.where(z <= 0, h + self.parameter, 1.0)


class _Softplus(Activation):
    name, module = "softplus", nn.Softplus
    formula, slope_formula = "log(1 + exp(z))", "σ(z)"

    @classmethod
    def of(cls, module: Any) -> Activation | None:
        return cls() if (module.beta, module.threshold) == (1, 20) else None

    def forward(self, z: Tensor) -> Tensor:
        return F.softplus(z)

    def slope(self, z: Tensor, h: Tensor) -> Tensor:
        return torch.sigmoid(z)


class _Identity(Activation):
    name, module = "identity", nn.Identity
    formula, slope_formula = "z", "1"

    def forward(self, z: Tensor) -> Tensor:
        return z

    def slope(self, z: Tensor, h: Tensor) -> Tensor:
        return torch.ones_like(z)


ACTIVATIONS: dict[str, type[Activation]] = {
    kind.name: kind
    for kind in (
        _ReLU, _Tanh, _Sigmoid, _GELU, _SiLU, _LeakyReLU, _ELU, _Softplus, _Identity,
    )
}  # fmt: skip


def activation_of(module: nn.Module) -> Activation | None:
    """What is known of a module as an activation, with its options; None: nothing.

    Subclasses of torch's modules may compute anything.
    """
    if isinstance(module, Activation):
        return module
    for kind in ACTIVATIONS.values():
        if kind.module is type(module):
            return kind.of(module)
    return None
