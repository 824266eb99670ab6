"""One update in full, as a reader would make it by hand.

B examples make the update, D features, C outputs, L hidden layers. With h₀ = x, layer l computes
z_l = W_l h_{l−1} + b_l and h_l = m_l ∘ a(z_l), where m_l is dropout's mask (1 without dropout); the
prediction is p = z_{L+1}. Backpropagation goes the other way, for each example:

    δ_{L+1} = ∂ℓ/∂p                                      the error signal at the output
    δ_l     = (W_{l+1}ᵀ δ_{l+1}) ∘ m_l ∘ a′(z_l)         and at each hidden layer
    ∂J/∂W_l = mean of δ_l h_{l−1}ᵀ,   ∂J/∂b_l = mean of δ_l

All of it is computed here as it is written, in float64, without autograd. The step that follows is
the rule of `gdtrain.rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.analysis.explanation_text import Explanation, Layer, Step, subscript
from gdtrain.descent.trial import Snapshot
from gdtrain.losses import Loss
from gdtrain.models import MLP, Linear
from gdtrain.models.activations import Activation, activation_of
from gdtrain.models.dropout import Dropout, drawing
from gdtrain.objective import Objective
from gdtrain.optim.protocol import update_rules

__all__ = ["check_explainable", "explain", "explain_made"]


@torch.no_grad()
def explain(
    objective: Objective,
    optimizer: Optimizer,
    indices: Tensor,
    *,
    lr: float | None = None,
    draw: int = 0,
) -> Explanation:
    """Work one update out by hand; nothing is changed.

    Args:
        objective: J of a `Linear` or `MLP` of gdtrain with one of gdtrain's losses.
        optimizer: `GD`, `SGD`, `MiniBatchSGD` or `torch.optim.SGD`; its groups and momentum
            buffers are used as they are.
        indices: (B,), int64, the examples that make the update.
        lr: η, range [0, ∞); None: the optimizer's.
        draw: Names the random numbers of dropout, as for `Objective`.

    Returns:
        The numbers, which read as text.

    Raises:
        ValueError: The model, the loss or the optimizer is none that this explains.

    Example:
        >>> from gdtrain import GD
        >>> from gdtrain.losses import SquaredError
        >>> model, x = Linear((1,), 1, init="zeros"), torch.tensor([[2.0]])
        >>> objective = Objective(model, SquaredError(), x, torch.tensor([3.0]))
        >>> found = explain(objective, GD(model.parameters(), lr=0.1), torch.tensor([0]))
        >>> found.losses.item(), round(found.losses_after.item(), 6)
        (4.5, 1.125)

    References:
        Rumelhart, Hinton and Williams, Learning representations by back-propagating errors, 1986.
    """
    check_explainable(objective.model, objective.loss, optimizer)
    loss, chain = objective.loss, _chain(objective.model)
    assert isinstance(loss, Loss)
    x, y = objective.inputs[indices].double().flatten(1), objective.targets[indices]
    y = y.double() if y.is_floating_point() else y
    masks = _masks(chain, len(x), draw)
    weights = [_double(link.linear.weight) for link in chain]
    biases = [_double(link.linear.bias) for link in chain]
    layers = _forward(chain, weights, biases, masks, x)
    losses = loss(layers[-1].z, y)
    _backward(layers, loss.slope(layers[-1].z, y))
    group = optimizer.param_groups[0]
    rate = float(group["lr"]) if lr is None else lr
    steps = _steps(chain, layers, optimizer, rate)
    after = {step.name: step.after for step in steps}
    moved = _forward(
        chain,
        [after.get(layer.named("W"), layer.weight) for layer in layers],
        [after.get(layer.named("b"), layer.bias) for layer in layers],
        masks,
        x,
    )
    return Explanation(
        loss,
        indices,
        y,
        layers,
        losses,
        loss(moved[-1].z, y),
        steps,
        rate,
        float(group["momentum"]),
        float(group["dampening"]),
        bool(group["nesterov"]),
        bool(group["maximize"]),
    )


def explain_made(
    objective: Objective,
    optimizer: Optimizer,
    indices: Tensor,
    make: Callable[[], float],
    *,
    draw: int = 0,
) -> Explanation:
    """Work one update out by hand beside the one that is made of it; all is then put back.

    Args:
        objective: As for `explain`.
        optimizer: Likewise.
        indices: (B,), int64, the examples that make the update.
        make: Makes the update, by whatever engine, schedule and rule, and returns its η.
        draw: As for `explain`; the same that `make` uses.

    Returns:
        The numbers, and the largest difference to the weights that were made.

    Raises:
        ValueError: As `explain`; or the update was made in another way.

    Example:
        >>> from gdtrain import SGD
        >>> from gdtrain.engines import Eager
        >>> from gdtrain.losses import SquaredError
        >>> model, x = Linear((1,), 1), torch.tensor([[2.0]])
        >>> objective = Objective(model, SquaredError(), x, torch.tensor([3.0]))
        >>> optimizer = SGD([{"params": [*model.parameters()], "initial_lr": 0.1}])
        >>> engine, indices = Eager(objective, optimizer), torch.tensor([0])
        >>> def make():
        ...     engine(indices[None], torch.ones(1, dtype=torch.float64))
        ...     return engine.rates[0].item()
        >>> found = explain_made(objective, optimizer, indices, make)
        >>> found.rate, found.gap < 1e-6
        (0.1, True)
    """
    check_explainable(objective.model, objective.loss, optimizer)
    named = _parameters(_chain(objective.model))
    start = Snapshot(objective, optimizer)
    try:
        rate = make()  # only now is η known, where a rule computes it
        made = {name: _double(p) for name, p in named.items()}
    finally:
        start.give_back()
    found = explain(objective, optimizer, indices, lr=rate, draw=draw)
    found.gap = max(float((s.after - made[s.name]).abs().max()) for s in found.steps)
    longest = max(float((s.after - s.before).abs().max()) for s in found.steps)
    largest = max(float(s.before.abs().max()) for s in found.steps)
    rounding = 8 * torch.finfo(objective.params[0].dtype).eps * max(largest, 1.0)
    if not found.gap <= 1e-3 * longest + rounding:
        raise ValueError(
            "One update can be written out where it is θ − ηd, or θ − ηb with momentum. "
            "Received: one that the step-size rule makes in another way (it averages, or "
            "leaves this update out). Set step_size=none."
        )
    return found


def check_explainable(model: nn.Module, loss: object, optimizer: Optimizer) -> None:
    """Refuse what cannot be written out.

    Args:
        model: Of the update.
        loss: Likewise.
        optimizer: Likewise.

    Raises:
        ValueError: One of them is none that this explains.

    Example:
        >>> from gdtrain import GD
        >>> from gdtrain.losses import SquaredError
        >>> model = Linear((1,), 1)
        >>> check_explainable(model, SquaredError(), GD(model.parameters(), lr=0.1))
    """
    _chain(model)
    if not isinstance(loss, Loss) or not loss.states("formula", "slope_formula", "slope"):
        raise ValueError(
            f"One update can be written out for gdtrain's own losses, and for a class that states "
            f"formula, slope_formula and slope. Received: {type(loss).__name__}."
        )
    if update_rules(optimizer) is None:
        raise ValueError(
            f"One update can be written out for gradient descent: GD, SGD and MiniBatchSGD "
            f"(optimizer=gd, sgd or minibatch), momentum included. Received: "
            f"{type(optimizer).__name__}."
        )


class _Link(NamedTuple):
    """A linear layer, and what follows it."""

    number: int
    linear: nn.Linear
    activation: Activation | None
    act: nn.Module
    dropout: Dropout | None


def _chain(model: nn.Module) -> list[_Link]:
    if type(model) is Linear:
        return [_Link(0, model.linear, None, nn.Identity(), None)]
    if type(model) is not MLP:
        raise ValueError(
            f"One update can be written out for gdtrain's Linear and MLP (model=linear, "
            f"model=mlp). Received: {type(model).__name__}."
        )
    parts = [layer for layer in model.layers if not isinstance(layer, nn.Flatten)]
    places = [i for i, layer in enumerate(parts) if isinstance(layer, nn.Linear)]
    chain = []
    first = 1 if len(places) > 1 else 0  # the only layer has no number
    ends = [*places[1:], len(parts)]
    for number, (place, end) in enumerate(zip(places, ends, strict=True), first):
        behind = parts[place + 1 : end]
        act = next((m for m in behind if not isinstance(m, Dropout)), nn.Identity())
        dropout = next((m for m in behind if isinstance(m, Dropout)), None)
        a = activation_of(act) if behind else None
        chain.append(_Link(number, parts[place], a, act, dropout))  # type: ignore[arg-type]
    return chain


def _double(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double().clone()


def _masks(chain: list[_Link], count: int, draw: int) -> list[Tensor | None]:
    """m_l: what dropout makes of ones."""
    masks: list[Tensor | None] = []
    for link in chain:
        if link.dropout is None or not link.dropout.training:
            masks.append(None)
            continue
        ones = torch.ones(count, link.linear.out_features, dtype=torch.float64)
        with drawing(draw, 0):
            masks.append(link.dropout(ones.to(link.linear.weight.device)))
    return masks


def _forward(
    chain: list[_Link],
    weights: list[Tensor],
    biases: list[Tensor | None],
    masks: list[Tensor | None],
    x: Tensor,
) -> list[Layer]:
    layers, h, none = [], x, torch.empty(0)
    for link, w, b, mask in zip(chain, weights, biases, masks, strict=True):
        inputs = h
        z = inputs @ w.T if b is None else inputs @ w.T + b
        a = link.act(z)
        h = a if mask is None else mask * a
        slope = None if link.activation is None else link.activation.slope(z, a)
        layers.append(
            Layer(link.number, link.activation, w, b, inputs, z, mask, h, none, slope, none, None)
        )
    return layers


def _backward(layers: list[Layer], signal: Tensor) -> None:
    """δ and the gradients, from the last layer to the first."""
    for layer, below in zip(reversed(layers), [*reversed(layers[:-1]), None], strict=True):
        layer.signal = signal
        layer.weight_gradient = signal.T @ layer.inputs / len(signal)
        layer.bias_gradient = None if layer.bias is None else signal.mean(0)
        if below is not None:
            assert below.slope is not None
            signal = (signal @ layer.weight) * below.slope
            signal = signal if below.mask is None else signal * below.mask


def _parameters(chain: list[_Link]) -> dict[str, Tensor]:
    """By the names that steps have."""
    named = {}
    for link in chain:
        for symbol, p in (("W", link.linear.weight), ("b", link.linear.bias)):
            if p is not None:
                named[symbol + subscript(link.number)] = p
    return named


def _steps(
    chain: list[_Link], layers: list[Layer], optimizer: Optimizer, rate: float
) -> list[Step]:
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    gradients: dict[str, Tensor] = {}
    for layer in layers:
        gradients[layer.named("W")] = layer.weight_gradient
        if layer.bias_gradient is not None:
            gradients[layer.named("b")] = layer.bias_gradient
    steps = []
    for name, p in _parameters(chain).items():
        if p not in groups:
            continue
        group, theta, g = groups[p], _double(p), gradients[name]
        decay, momentum = float(group["weight_decay"]), group["momentum"]
        d = (-g if group["maximize"] else g) + decay * theta
        old = _double(optimizer.state[p].get("momentum_buffer")) if momentum else None
        buffer, direction = None, d
        if momentum:
            buffer = d if old is None else momentum * old + (1 - group["dampening"]) * d
            direction = d + momentum * buffer if group["nesterov"] else buffer
        steps.append(
            Step(name, theta, g, decay, d, old, buffer, direction, theta - rate * direction)
        )
    return steps
