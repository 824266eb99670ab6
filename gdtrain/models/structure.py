"""Whether a model is a chain of linear layers with activations, and which."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from gdtrain.models.activations import ACTIVATIONS, Activation, activation_of
from gdtrain.models.dropout import Dropout
from gdtrain.models.linear import Linear
from gdtrain.models.mlp import MLP

__all__ = ["Layer", "NotDenseError", "dense_layers"]


class NotDenseError(ValueError):
    """A model is no linear model or MLP; the text says what else it has."""


@dataclass
class Layer:
    """m ∘ a(W h + b), with a dropout's mask m, where there is dropout."""

    linear: nn.Linear
    activation: Activation = field(default_factory=ACTIVATIONS["identity"])
    dropout: nn.Module | None = None

    @property
    def is_linear(self) -> bool:
        """Whether a(z) = z."""
        return self.activation.name == "identity"


def dense_layers(model: nn.Module) -> list[Layer]:
    """The layers of a linear model or MLP: gdtrain's own, or an `nn.Sequential` of such layers."""
    layers: list[Layer] = []
    for module in _modules(model):
        if type(module) is nn.Linear:
            layers.append(Layer(module))
        elif isinstance(module, Dropout | nn.Dropout):
            if not layers:
                raise NotDenseError("the model has dropout before its first layer")
            layers[-1].dropout = module
        else:
            activation = activation_of(module)
            if activation is None:
                raise NotDenseError(
                    f"there is no hand-written backward pass of {type(module).__name__}"
                )
            if not layers or not layers[-1].is_linear or layers[-1].dropout is not None:
                raise NotDenseError(f"{type(module).__name__} stands behind no linear layer")
            layers[-1].activation = activation
    if not layers:
        raise NotDenseError("the model has no linear layer")
    return layers


def _modules(model: nn.Module) -> list[nn.Module]:
    """The leaves that do something, in order."""
    if "forward" in vars(model):
        raise NotDenseError(f"the forward of a {type(model).__name__} was replaced")
    if type(model) is nn.Sequential:
        return [leaf for child in model for leaf in _modules(child)]
    if type(model) is MLP:
        return _modules(model.layers)
    if type(model) is Linear:
        return _modules(model.linear)
    if type(model) is nn.Identity:
        return []
    if type(model) is nn.Flatten and (model.start_dim, model.end_dim) == (1, -1):
        return []
    if type(model) in (Dropout, nn.Dropout) and not model.p:
        return []
    return [model]
