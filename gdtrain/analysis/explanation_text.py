"""All numbers of one update, and how they read: as a reader would write them down by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdtrain.losses import Loss
from gdtrain.models.activations import Activation
from gdtrain.ranges import Whole

__all__ = ["Explanation", "Layer", "Step", "subscript"]

_WIDTH = 100  # characters of a line
_ROWS = 8  # of a matrix that is shown
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass
class Layer:
    """One layer on its way forward and back, float64.

    Args:
        number: l, from 1; 0 in a linear model, which has one layer.
        activation: a, or None at the output.
        weight: W, (O, D).
        bias: b, (O,), or None.
        inputs: h_{l−1}, (B, D).
        z: (B, O).
        mask: m, (B, O), or None without dropout.
        h: (B, O); z itself at the output.
        signal: δ, (B, O).
        slope: a′(z), (B, O), or None at the output.
        weight_gradient: Mean of δ hᵀ, (O, D).
        bias_gradient: Mean of δ, (O,), or None.

    Example:
        >>> from gdtrain import GD
        >>> from gdtrain.analysis.explanation import explain
        >>> from gdtrain.losses import SquaredError
        >>> from gdtrain.models import Linear
        >>> from gdtrain.objective import Objective
        >>> model, x = Linear((1,), 1, init="zeros"), torch.tensor([[2.0]])
        >>> objective = Objective(model, SquaredError(), x, torch.tensor([3.0]))
        >>> (layer,) = explain(objective, GD(model.parameters(), lr=0.1), torch.tensor([0])).layers
        >>> layer.signal.item(), layer.weight_gradient.item()
        (-3.0, -6.0)
    """

    number: int
    activation: Activation | None
    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    z: Tensor
    mask: Tensor | None
    h: Tensor
    signal: Tensor
    slope: Tensor | None
    weight_gradient: Tensor
    bias_gradient: Tensor | None

    def named(self, symbol: str) -> str:
        """W₂ for W in layer 2.

        Args:
            symbol: Of a quantity of this layer.
        """
        return symbol + subscript(self.number)

    @property
    def source(self) -> str:
        """The name of what comes in: x, or the h of the layer before."""
        return "x" if self.number < 2 else "h" + subscript(self.number - 1)


@dataclass
class Step:
    """The rule on one parameter, float64.

    Args:
        name: W₁, b₁, …
        before: θ.
        gradient: g.
        weight_decay: λ that acts on it.
        d: g + λθ; −g + λθ where the update climbs.
        old_buffer: b of the update before, or None where momentum starts.
        buffer: b of this one, or None without momentum.
        direction: What η multiplies.
        after: The new θ.

    Example:
        >>> from gdtrain import GD
        >>> from gdtrain.analysis.explanation import explain
        >>> from gdtrain.losses import SquaredError
        >>> from gdtrain.models import Linear
        >>> from gdtrain.objective import Objective
        >>> model, x = Linear((1,), 1, init="zeros"), torch.tensor([[2.0]])
        >>> objective = Objective(model, SquaredError(), x, torch.tensor([3.0]))
        >>> found = explain(objective, GD(model.parameters(), lr=0.1), torch.tensor([0]))
        >>> [(step.name, round(step.after.item(), 6)) for step in found.steps]
        [('W', 0.6), ('b', 0.3)]
    """

    name: str
    before: Tensor
    gradient: Tensor
    weight_decay: float
    d: Tensor
    old_buffer: Tensor | None
    buffer: Tensor | None
    direction: Tensor
    after: Tensor


@dataclass
class Explanation:
    """All numbers of one update; as text, the update in full.

    Args:
        loss: The loss.
        indices: (B,), the numbers of the examples.
        targets: (B, …).
        layers: In order.
        losses: (B,), ℓ of each example before the update.
        losses_after: (B,), and after it, with the same dropout masks.
        steps: One for each parameter.
        rate: η.
        momentum: μ.
        dampening: τ.
        nesterov: Whether the step looks ahead along the new buffer.
        maximize: Whether the update climbs.
        gap: Largest difference to the weights that the optimizer itself made; None: it made none.

    Example:
        >>> from gdtrain import GD
        >>> from gdtrain.analysis.explanation import explain
        >>> from gdtrain.losses import SquaredError
        >>> from gdtrain.models import Linear
        >>> from gdtrain.objective import Objective
        >>> model, x = Linear((1,), 1, init="zeros"), torch.tensor([[2.0]])
        >>> objective = Objective(model, SquaredError(), x, torch.tensor([3.0]))
        >>> found = explain(objective, GD(model.parameters(), lr=0.1), torch.tensor([0]))
        >>> print(found.text().partition("After")[2])
        <BLANKLINE>
          J on the same examples: 4.5 before, 1.125 after.
          To first order, J − η ⟨g, d⟩ = 0.
    """

    loss: Loss
    indices: Tensor
    targets: Tensor
    layers: list[Layer]
    losses: Tensor
    losses_after: Tensor
    steps: list[Step]
    rate: float
    momentum: float
    dampening: float
    nesterov: bool
    maximize: bool
    gap: float | None = None

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 4, examples: int = 2, title: str = "") -> str:
        """The update in full, at most 100 characters wide.

        Args:
            digits: Significant digits of each number, range [1, 12].
            examples: How many are shown in full, range [0, ∞).
            title: Goes first.

        Returns:
            Lines of text.

        Raises:
            ValueError: digits or examples is out of range.
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
            if layer.bias is not None:
                lines += _shown(layer.named("b"), layer.bias, digits)
        return lines

    def _example(self, k: int, digits: int) -> list[str]:
        target = self.targets[k]
        y = _number(target, digits) if target.numel() == 1 else ""
        lines = [f"Example {int(self.indices[k])} ({k + 1} of {len(self.indices)})"]
        lines[0] += f", y = {y}" if y else ""
        lines.append("  forward")
        for layer in self.layers:
            if layer.number < 2:
                lines += _shown("x", layer.inputs[k], digits)
            if not layer.activation:
                lines += _shown("p", layer.z[k], digits)
                continue
            lines += _shown(layer.named("z"), layer.z[k], digits)
            if layer.mask is not None:
                lines += _shown(layer.named("m"), layer.mask[k], digits)
            lines += _shown(layer.named("h"), layer.h[k], digits)
        if not y:
            lines += _shown("y", target, digits)
        lines.append(f"    ℓ = {self.loss.formula} = {_number(self.losses[k], digits)}")
        lines.append("  backward")
        for layer, above in zip(
            reversed(self.layers), [None, *reversed(self.layers[1:])], strict=True
        ):
            if above is None:
                lines.append(f"    {layer.named('δ')} = ∂ℓ/∂p = {self.loss.slope_formula}")
            else:
                mask = "" if layer.mask is None else f"{layer.named('m')} ∘ "
                assert layer.activation is not None
                assert layer.slope is not None
                lines.append(
                    f"    {layer.named('δ')} = ({above.named('W')}ᵀ {above.named('δ')}) ∘ {mask}"
                    f"a′({layer.named('z')}),   a′(z) = {layer.activation.slope_formula}"
                )
                lines += _shown(f"a′({layer.named('z')})", layer.slope[k], digits)
            lines += _shown(layer.named("δ"), layer.signal[k], digits)
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
            if layer.bias_gradient is not None:
                lines.append(f"  ∂J/∂{b} = {mean}{delta}")
                lines += _shown("", layer.bias_gradient, digits)
        return lines

    def _rule(self, digits: int) -> list[str]:
        decayed = {step.weight_decay for step in self.steps} - {0.0}
        gradient = "−g" if self.maximize else "g"
        rule = f"d = {gradient} + λθ" if decayed else f"d = {gradient}"
        numbers = [f"η = {_number(self.rate, digits)}"]
        if self.momentum:
            damped = "(1 − τ) d" if self.dampening else "d"
            rule += f",   b ← μb + {damped} (b = d at first)"
            rule += ",   θ ← θ − η (d + μb)" if self.nesterov else ",   θ ← θ − ηb"
            numbers.append(f"μ = {self.momentum:g}")
            numbers += [f"τ = {self.dampening:g}"] if self.dampening else []
        else:
            rule += ",   θ ← θ − ηd"
        for value in sorted(decayed):
            free = [s.name for s in self.steps if s.weight_decay != value]
            numbers.append(f"λ = {value:g}" + (f" (not on {', '.join(free)})" if free else ""))
        lines = [f"The rule: {rule}", f"  {',   '.join(numbers)}"]
        for step in self.steps:
            lines += self._worked(step, digits)
            if step.buffer is not None:
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

        columns = step.before.shape[-1]
        where = f"{place // columns + 1}, {place % columns + 1}" if step.before.ndim > 1 else ""
        lines = [f"  {step.name}, for one the entry [{where or place + 1}]:"]
        d = f"−{term(step.gradient)}" if self.maximize else at(step.gradient)
        if step.weight_decay:
            d = f"{d} + {step.weight_decay:g} · {term(step.before)}"
        if d != at(step.d):
            lines.append(f"      d = {d} = {at(step.d)}")
        direction = term(step.d)
        if step.buffer is not None:
            share = f"{1 - self.dampening:g} · " if self.dampening else ""
            old = step.old_buffer
            sum_ = "" if old is None else f"{self.momentum:g} · {term(old)} + {share}{term(step.d)}"
            lines.append(f"      b = {sum_ or 'd'} = {at(step.buffer)}")
            direction = term(step.buffer)
            if self.nesterov:
                direction = f"({at(step.d)} + {self.momentum:g} · {direction})"
        lines.append(
            f"      θ = {at(step.before)} − {_number(self.rate, digits)} · {direction}"
            f" = {at(step.after)}"
        )
        return lines

    def _after(self, digits: int) -> list[str]:
        before, after = self.losses.mean(), self.losses_after.mean()
        slope = sum(float((s.gradient * s.direction).sum()) for s in self.steps)
        direction = ("d + μb" if self.nesterov else "b") if self.momentum else "d"
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


def _shown(name: str, values: Tensor, digits: int) -> list[str]:
    """`name = [ … ]` in columns; what does not fit is cut, and its shape and norm are told."""
    rows = values if values.ndim > 1 else values.reshape(1, -1)
    head = f"    {name} = " if name else "      "
    cells = [[_number(v, digits) for v in row.tolist()] for row in rows[:_ROWS]]
    count = rows.shape[1]
    room = _WIDTH - len(head) - len("[  … ]")
    while sum(max(len(row[j]) for row in cells) + 2 for j in range(count)) > room and count > 1:
        count -= 1
    widths = [max(len(row[j]) for row in cells) for j in range(count)]
    more = "  …" if count < rows.shape[1] else ""
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


def subscript(number: int) -> str:
    """₂ for layer 2; nothing for the only layer of a linear model.

    Args:
        number: Of the layer, from 1; 0: the only one.

    Example:
        >>> "W" + subscript(12)
        'W₁₂'
    """
    return str(number).translate(_SUBSCRIPTS) if number else ""
