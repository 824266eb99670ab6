"""One update in full, as a reader would make it and write it down by hand.

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.descent.trial import trial
from gdtrain.losses import Loss
from gdtrain.models import MLP, Linear
from gdtrain.models.activations import Activation
from gdtrain.models.dropout import drawing
from gdtrain.models.structure import Layer as Link
from gdtrain.models.structure import dense_layers
from gdtrain.objective import Objective
from gdtrain.optim.protocol import update_rules
from gdtrain.ranges import Whole
from gdtrain.rules import UpdateRule

__all__ = ["Explanation", "check_explainable", "explain", "explain_made"]

_WIDTH = 100  # characters of a line
_ROWS = 8  # of a matrix that is shown
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass
class Layer:
    """One layer on its way forward and back, float64. D numbers come in, O go out."""

    number: int  # l, from 1; 0 in a linear model, which has one layer
    activation: Activation | None  # a; None at the output
    weight: Tensor  # W, (O, D)
    bias: Tensor | None  # b, (O,)
    inputs: Tensor  # h_{l−1}, (B, D)
    z: Tensor  # (B, O)
    slope: Tensor | None  # a′(z), (B, O); None at the output
    mask: Tensor | None  # m, (B, O); None without dropout
    h: Tensor  # (B, O); z itself at the output
    signal: Tensor = field(init=False)  # δ, (B, O)

    @property
    def weight_gradient(self) -> Tensor:
        """Mean of δ hᵀ, (O, D)."""
        return self.signal.T @ self.inputs / len(self.signal)

    @property
    def bias_gradient(self) -> Tensor | None:
        """Mean of δ, (O,)."""
        return None if self.bias is None else self.signal.mean(0)

    def named(self, symbol: str) -> str:
        """W₂ for W in layer 2."""
        return symbol + _subscript(self.number)

    @property
    def source(self) -> str:
        """The name of what comes in: x, or the h of the layer before."""
        return "x" if self.number < 2 else "h" + _subscript(self.number - 1)


@dataclass
class Step:
    """The rule on one parameter, float64."""

    name: str  # W₁, b₁, …
    before: Tensor  # θ
    gradient: Tensor  # g
    weight_decay: float  # λ that acts on it
    d: Tensor  # g + λθ; −g + λθ where the update climbs
    old_buffer: Tensor | None  # b of the update before; None where momentum starts
    buffer: Tensor | None  # b of this one; None without momentum
    direction: Tensor  # what η multiplies
    after: Tensor  # the new θ


@dataclass
class Explanation:
    """All numbers of one update; as text, the update in full."""

    loss: Loss
    indices: Tensor  # (B,), the numbers of the examples
    targets: Tensor  # (B, …)
    layers: list[Layer]
    losses: Tensor  # (B,), ℓ of each example before the update
    losses_after: Tensor  # (B,), and after it, with the same dropout masks
    steps: list[Step]  # one for each parameter
    rate: float  # η
    rule: UpdateRule  # μ, τ and the like
    gap: float | None = None  # largest difference to the weights that the optimizer made, if it did

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 4, examples: int = 2, title: str = "") -> str:
        """The update in full, at most 100 characters wide, below a title.

        Numbers have 1 to 12 significant digits; so many examples are shown, range [0, ∞).
        """
        Whole(1, 12).check("digits", digits)
        Whole(0).check("examples", examples)
        shown = min(examples, len(self.indices))
        lines = [title, ""] if title else []
        lines += self._model(digits)
        for k in range(shown):
            lines += ["", *self._example(k, digits)]
        lines += ["", *self._mean(shown, digits), "", *self._gradients(digits)]
        lines += ["", *self._rule(digits), "", *self._after(digits)]
        return "\n".join(lines)

    def _model(self, digits: int) -> list[str]:
        lines = ["The model, before the update"]
        for layer in self.layers:
            bias = "" if layer.bias is None else f" + {layer.named('b')}"
            z = layer.named("z") if layer.activation else "p"
            formula = f"{z} = {layer.named('W')} {layer.source}{bias}"
            if layer.activation:
                mask = "" if layer.mask is None else f"{layer.named('m')} ∘ "
                formula += f",   {layer.named('h')} = {mask}{layer.activation.name}({z})"
            lines.append(f"  {formula}")
            lines += _shown(layer.named("W"), layer.weight, digits)
            lines += _shown(layer.named("b"), layer.bias, digits)
        return lines

    def _example(self, k: int, digits: int) -> list[str]:
        target = self.targets[k]
        y = f", y = {_number(target, digits)}" if target.numel() == 1 else ""
        lines = [f"Example {int(self.indices[k])} ({k + 1} of {len(self.indices)}){y}"]
        lines.append("  forward")
        lines += _shown("x", self.layers[0].inputs[k], digits)
        for layer in self.layers[:-1]:
            lines += _shown(layer.named("z"), layer.z[k], digits)
            if layer.mask is not None:
                lines += _shown(layer.named("m"), layer.mask[k], digits)
            lines += _shown(layer.named("h"), layer.h[k], digits)
        lines += _shown("p", self.layers[-1].z[k], digits)
        if not y:
            lines += _shown("y", target, digits)
        lines.append(f"    ℓ = {self.loss.formula} = {_number(self.losses[k], digits)}")
        lines.append("  backward")
        above = None
        for layer in reversed(self.layers):
            delta, z = layer.named("δ"), layer.named("z")
            if above is None or layer.activation is None or layer.slope is None:
                lines.append(f"    {delta} = ∂ℓ/∂p = {self.loss.slope_formula}")
            else:
                mask = "" if layer.mask is None else f"{layer.named('m')} ∘ "
                lines.append(
                    f"    {delta} = ({above.named('W')}ᵀ {above.named('δ')}) ∘ {mask}a′({z}),   "
                    f"a′(z) = {layer.activation.slope_formula}"
                )
                lines += _shown(f"a′({z})", layer.slope[k], digits)
            lines += _shown(delta, layer.signal[k], digits)
            above = layer
        return lines

    def _mean(self, shown: int, digits: int) -> list[str]:
        count, lines = len(self.indices), []
        if shown < count:
            lines.append(f"… {count - shown} examples more, likewise (examples= shows more)")
        value = _number(self.losses.mean(), digits)
        if count == 1:
            return [*lines, f"The objective: J = ℓ = {value}"]
        return [*lines, f"The objective: J = mean of ℓ over the {count} examples = {value}"]

    def _gradients(self, digits: int) -> list[str]:
        mean = "mean of " if len(self.indices) > 1 else ""
        lines = ["The gradient g"]
        for layer in self.layers:
            delta, w, b = (layer.named(symbol) for symbol in ("δ", "W", "b"))
            lines.append(f"  ∂J/∂{w} = {mean}{delta} {layer.source}ᵀ")
            lines += _shown("", layer.weight_gradient, digits)
            if layer.bias is not None:
                lines.append(f"  ∂J/∂{b} = {mean}{delta}")
                lines += _shown("", layer.bias_gradient, digits)
        return lines

    def _rule(self, digits: int) -> list[str]:
        decayed = {step.weight_decay for step in self.steps} - {0.0}
        gradient = "−g" if self.rule.maximize else "g"
        rule = f"d = {gradient} + λθ" if decayed else f"d = {gradient}"
        numbers = [f"η = {_number(self.rate, digits)}"]
        if self.rule.momentum:
            damped = "(1 − τ) d" if self.rule.dampening else "d"
            rule += f",   b ← μb + {damped} (b = d at first)"
            rule += ",   θ ← θ − η (d + μb)" if self.rule.nesterov else ",   θ ← θ − ηb"
            numbers.append(f"μ = {self.rule.momentum:g}")
            numbers += [f"τ = {self.rule.dampening:g}"] if self.rule.dampening else []
        else:
            rule += ",   θ ← θ − ηd"
        for value in sorted(decayed):
            free = [s.name for s in self.steps if s.weight_decay != value]
            numbers.append(f"λ = {value:g}" + (f" (not on {', '.join(free)})" if free else ""))
        lines = [f"The rule: {rule}", f"  {',   '.join(numbers)}"]
        for step in self.steps:
            lines += self._worked(step, digits)
            lines += _shown("new buffer", step.buffer, digits)
            lines += _shown(f"new {step.name}", step.after, digits)
        return lines

    def _worked(self, step: Step, digits: int) -> list[str]:
        """The entry that moves furthest, number by number."""
        place = int((step.after - step.before).abs().argmax())

        def at(values: Tensor) -> str:
            return _number(values.reshape(-1)[place], digits)

        def term(values: Tensor) -> str:
            return f"({at(values)})" if at(values).startswith("-") else at(values)

        where = ", ".join(str(i + 1) for i in np.unravel_index(place, step.before.shape))
        lines = [f"  {step.name}, for one the entry [{where}]:"]
        d = f"−{term(step.gradient)}" if self.rule.maximize else at(step.gradient)
        if step.weight_decay:
            d = f"{d} + {step.weight_decay:g} · {term(step.before)}"
        if d != at(step.d):
            lines.append(f"      d = {d} = {at(step.d)}")
        direction = term(step.d)
        if step.buffer is not None:
            momentum, dampening = self.rule.momentum, self.rule.dampening
            share = f"{1 - dampening:g} · " if dampening else ""
            old = step.old_buffer
            sum_ = "d" if old is None else f"{momentum:g} · {term(old)} + {share}{term(step.d)}"
            lines.append(f"      b = {sum_} = {at(step.buffer)}")
            direction = term(step.buffer)
            if self.rule.nesterov:
                direction = f"({at(step.d)} + {momentum:g} · {direction})"
        lines.append(
            f"      θ = {at(step.before)} − {_number(self.rate, digits)} · {direction}"
            f" = {at(step.after)}"
        )
        return lines

    def _after(self, digits: int) -> list[str]:
        before, after = self.losses.mean(), self.losses_after.mean()
        slope = sum(float((s.gradient * s.direction).sum()) for s in self.steps)
        direction = ("d + μb" if self.rule.nesterov else "b") if self.rule.momentum else "d"
        linear = _number(before - self.rate * slope, digits)
        lines = [
            "After",
            f"  J on the same examples: {_number(before, digits)} before, "
            f"{_number(after, digits)} after.",
            f"  To first order, J − η ⟨g, {direction}⟩ = {linear}.",
        ]
        if self.gap is not None:
            lines.append(
                f"  The optimizer made the same weights: the largest difference is {self.gap:.0e}."
            )
        return lines


def _number(value: Tensor | float, digits: int) -> str:
    text = f"{float(value):.{digits}g}"
    return "0" if text == "-0" else text


def _shown(name: str, values: Tensor | None, digits: int) -> list[str]:
    """`name = [ … ]` in columns; what does not fit is cut, and its shape and norm are told."""
    if values is None:
        return []
    rows = values if values.ndim > 1 else values.reshape(1, -1)
    head = f"    {name} = " if name else "      "
    cells = [[_number(v, digits) for v in row.tolist()] for row in rows[:_ROWS]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    room = _WIDTH - len(head) - len("[  … ]")
    while sum(widths) + 2 * len(widths) > room and len(widths) > 1:
        widths.pop()
    more = "  …" if len(widths) < rows.shape[1] else ""
    lines = []
    for i, row in enumerate(cells):
        start = head if i == 0 else " " * len(head)
        inside = "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=False))
        lines.append(f"{start}[ {inside}{more} ]")
    if more or len(rows) > _ROWS:
        shape = " × ".join(str(n) for n in values.shape)
        dots = "⋮  " if len(rows) > _ROWS else ""
        norm = _number(torch.linalg.vector_norm(values), digits)
        lines.append(f"{' ' * len(head)}{dots}({shape} in all, norm {norm})")
    return lines


def _subscript(number: int) -> str:
    """₂ for layer 2; nothing for the only layer of a linear model."""
    return str(number).translate(_SUBSCRIPTS) if number else ""


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
        optimizer: `GD`, `SGD`, `MiniBatchSGD` or `torch.optim.SGD`, with its momentum as it is.
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
    theta = {name: _double(p) for name, p in _parameters(chain).items()}
    layers = _forward(chain, theta, x, draw)
    losses = loss(layers[-1].z, y)
    layers[-1].signal = loss.slope(layers[-1].z, y)
    for above, layer in pairwise(reversed(layers)):
        assert layer.slope is not None
        signal = (above.signal @ above.weight) * layer.slope
        layer.signal = signal if layer.mask is None else signal * layer.mask
    group = optimizer.param_groups[0]
    rate = float(group["lr"]) if lr is None else lr
    steps = _steps(chain, layers, optimizer, rate)
    moved = _forward(chain, theta | {step.name: step.after for step in steps}, x, draw)
    after, rule = loss(moved[-1].z, y), UpdateRule.of(group)
    return Explanation(loss, indices, y, layers, losses, after, steps, rate, rule)


def explain_made(
    objective: Objective,
    optimizer: Optimizer,
    indices: Tensor,
    make: Callable[[], float],
    *,
    draw: int = 0,
) -> Explanation:
    """`explain` an update, beside the one that `make` makes of it; all is then put back.

    `make` uses whatever engine, schedule and rule, with the same `draw`, and returns its η. It is a
    ValueError if it makes the update in another way.
    """
    named = _parameters(_chain(objective.model))
    with trial(objective, optimizer):
        rate = make()  # only now is η known, where a rule computes it
        made = {name: _double(p) for name, p in named.items()}
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
    """Refuse what cannot be written out."""
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


_Chain = list[tuple[int, Link]]  # the linear layers with what follows each, by `Layer.number`


def _chain(model: nn.Module) -> _Chain:
    if type(model) not in (Linear, MLP):
        raise ValueError(
            f"One update can be written out for gdtrain's Linear and MLP (model=linear, "
            f"model=mlp). Received: {type(model).__name__}."
        )
    chain = dense_layers(model)
    return list(enumerate(chain, start=1 if len(chain) > 1 else 0))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64, copy=True)


def _parameters(chain: _Chain) -> dict[str, Tensor]:
    """By the names that steps have."""
    return {
        symbol + _subscript(number): p
        for number, link in chain
        for symbol, p in (("W", link.linear.weight), ("b", link.linear.bias))
        if p is not None
    }


def _forward(chain: _Chain, theta: Mapping[str, Tensor], x: Tensor, draw: int) -> list[Layer]:
    layers, h = [], x
    for number, link in chain:
        w, b = (theta.get(symbol + _subscript(number)) for symbol in "Wb")
        assert w is not None
        inputs, slope, mask = h, None, None
        a = None if link is chain[-1][1] else link.activation
        h = z = inputs @ w.T if b is None else inputs @ w.T + b
        if a is not None:
            h = a(z)
            slope = a.slope(z, h)
        if link.dropout is not None and link.dropout.training:
            with drawing(draw, 0):
                mask = link.dropout(torch.ones_like(h))
            h = mask * h
        layers.append(Layer(number, a, w, b, inputs, z, slope, mask, h))
    return layers


def _steps(chain: _Chain, layers: list[Layer], optimizer: Optimizer, rate: float) -> list[Step]:
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    gradients: dict[str, Any] = {}
    for layer in layers:
        gradients[layer.named("W")] = layer.weight_gradient
        gradients[layer.named("b")] = layer.bias_gradient
    steps = []
    for name, p in _parameters(chain).items():
        if p not in groups:
            continue
        rule, theta, g = UpdateRule.of(groups[p]), _double(p), gradients[name]
        decay = float(rule.weight_decay)
        d = (-g if rule.maximize else g) + decay * theta
        old, buffer, direction = None, None, d
        if rule.momentum:
            old = optimizer.state[p].get("momentum_buffer")
            old = None if old is None else _double(old)
            buffer = d if old is None else rule.momentum * old + (1 - rule.dampening) * d
            direction = d + rule.momentum * buffer if rule.nesterov else buffer
        after = theta - rate * direction
        steps.append(Step(name, theta, g, decay, d, old, buffer, direction, after))
    return steps
