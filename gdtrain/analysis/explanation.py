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

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.lightning.module import SupervisedModule
from gdtrain.lightning.strategy import alone_in
from gdtrain.losses import Loss
from gdtrain.models import MLP, Linear
from gdtrain.models.activations import Activation, activation_of
from gdtrain.models.dropout import Dropout, drawing
from gdtrain.objective import Objective
from gdtrain.optim import GD, SGD, MiniBatchSGD

__all__ = ["Explanation", "Layer", "Step", "check_text", "explain", "explain_run"]

_WIDTH = 100  # characters of a line
_ROWS = 8  # of a matrix that is shown
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _subscript(number: int) -> str:
    """₂ for layer 2; nothing for the only layer of a linear model."""
    return str(number).translate(_SUBSCRIPTS) if number else ""


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
        >>> from gdtrain.losses import SquaredError
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
        return symbol + _subscript(self.number)

    @property
    def source(self) -> str:
        """The name of what comes in: x, or the h of the layer before."""
        return "x" if self.number < 2 else "h" + _subscript(self.number - 1)


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
        >>> from gdtrain.losses import SquaredError
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
        >>> from gdtrain.losses import SquaredError
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
        check_text(digits, examples)
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


# ---------------------------------------------------------------------- the numbers


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
        >>> from gdtrain.losses import SquaredError
        >>> model, x = Linear((1,), 1, init="zeros"), torch.tensor([[2.0]])
        >>> objective = Objective(model, SquaredError(), x, torch.tensor([3.0]))
        >>> found = explain(objective, GD(model.parameters(), lr=0.1), torch.tensor([0]))
        >>> found.losses.item(), round(found.losses_after.item(), 6)
        (4.5, 1.125)

    References:
        Rumelhart, Hinton and Williams, Learning representations by back-propagating errors, 1986.
    """
    loss = _known_loss(objective.loss)
    _check_optimizer(optimizer)
    chain = _chain(objective.model)
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
    for number, (place, end) in enumerate(zip(places, [*places[1:], len(parts)], strict=True), 1):
        behind = parts[place + 1 : end]
        act = next((m for m in behind if not isinstance(m, Dropout)), nn.Identity())
        dropout = next((m for m in behind if isinstance(m, Dropout)), None)
        a = activation_of(act) if behind else None
        chain.append(_Link(number, parts[place], a, act, dropout))  # type: ignore[arg-type]
    return chain if len(chain) > 1 else [chain[0]._replace(number=0)]


def _known_loss(loss: object) -> Loss:
    if not isinstance(loss, Loss) or not loss.states("formula", "slope_formula", "slope"):
        raise ValueError(
            f"One update can be written out for gdtrain's own losses, and for a class that states "
            f"formula, slope_formula and slope. Received: {type(loss).__name__}."
        )
    return loss


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, GD | SGD | MiniBatchSGD | torch.optim.SGD):
        raise ValueError(
            f"One update can be written out for gradient descent: GD, SGD and MiniBatchSGD "
            f"(optimizer=gd, sgd or minibatch), momentum included. Received: "
            f"{type(optimizer).__name__}."
        )


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
                named[symbol + _subscript(link.number)] = p
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


# ---------------------------------------------------------------------- of a run


class _Reached(Exception):  # noqa: N818 (no error)
    """The update was explained: the rest of the run need not be made."""


class _Pause(Callback):
    """Lets a run go on up to an update, and explains that one."""

    needs_every_epoch = False

    def __init__(self, update: int) -> None:
        self.update = update
        self.found: Explanation | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, SupervisedModule)
        first, total = pl_module.updates, pl_module.total_updates
        if total is not None and self.update >= total:
            raise ValueError(
                f"update must be one of the run's {total}, counted from 0: range [0, {total - 1}]. "
                f"Received: update={self.update}."
            )
        if isinstance(batch, Tensor):
            if self.update >= first + len(batch):
                return
            before, own = batch[: self.update - first], batch[self.update - first :][:1]
            if len(before):
                pl_module.make_updates(before, first)
            batch = own
        elif self.update > first:
            return
        self.found = self._explained(pl_module, batch)
        raise _Reached

    def _explained(self, module: SupervisedModule, batch: Any) -> Explanation:
        """The update by hand with the η that it has, beside what the optimizer makes."""
        optimizer = module.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        _check_optimizer(optimizer)
        named = _parameters(_chain(module.model))
        objective, indices = module.named(batch)
        before = {name: p.detach().clone() for name, p in named.items()}
        buffers = {n: optimizer.state[p].get("momentum_buffer") for n, p in named.items()}
        buffers = {n: None if b is None else b.clone() for n, b in buffers.items()}
        module.make_updates(batch, self.update)
        # Only after the step is η known, where a rule computes it: back to the numbers before it.
        made = {name: _double(p) for name, p in named.items()}
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(before[name])
                optimizer.state[p]["momentum_buffer"] = buffers[name]
        found = explain(
            objective,
            optimizer,
            indices[0],
            lr=float(module.rates[0]),
            draw=module.draw_of(self.update),
        )
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


def explain_run(
    module: SupervisedModule,
    data: LightningDataModule,
    trainer: Callable[..., Trainer],
    update: int = 0,
) -> Explanation:
    """Train up to an update, and explain that one; its optimizer's own result is compared.

    Args:
        module: To train, with a `Linear` or an `MLP`.
        data: To train on.
        trainer: From `callbacks=`, `logger=` and `enable_checkpointing=` to a trainer.
        update: Which, range [0, T).

    Returns:
        The numbers, which read as text.

    Raises:
        ValueError: There is no such update, or it cannot be explained.

    Example:
        >>> from gdtrain.losses import CrossEntropy
        >>> from functools import partial
        >>> from gdtrain.data import EmbeddedDataModule
        >>> data = EmbeddedDataModule("iris", batch_size=1)
        >>> module = SupervisedModule(Linear((4,), 3), CrossEntropy(), partial(SGD, lr=0.1))
        >>> found = explain_run(module, data, update=7, trainer=partial(Trainer, max_epochs=1,
        ...     accelerator="cpu", enable_progress_bar=False, enable_model_summary=False))
        >>> found.rate, found.losses.item() > found.losses_after.item(), found.gap < 1e-6
        (0.1, True, True)
    """
    if isinstance(update, bool) or not isinstance(update, int) or update < 0:
        raise ValueError(
            f"update must be a whole number of at least 0. Received: update={update!r}."
        )
    _chain(module.model)  # before anything is trained
    _known_loss(module.loss)
    pause = _Pause(update)
    with alone_in(None, trainer) as make_trainer:
        lightning = make_trainer(callbacks=[pause], logger=False, enable_checkpointing=False)
        if lightning.world_size > 1 or "mixed" in str(lightning.precision):
            raise ValueError(
                f"One update is written out on one device, in one precision. Received: "
                f"{lightning.world_size} processes, precision={lightning.precision}. Set "
                f"trainer=default trainer.precision=32."
            )
        with suppress(_Reached):
            lightning.fit(module, datamodule=data)
    if pause.found is None:
        raise ValueError(f"The run ended before update {update}.")
    return pause.found


# ---------------------------------------------------------------------- as text


def check_text(digits: int, examples: int) -> None:
    """Refuse what `Explanation.text` would refuse, before anything is trained.

    Args:
        digits: As there.
        examples: As there.

    Raises:
        ValueError: One is out of range.

    Example:
        >>> check_text(digits=4, examples=2)
    """
    for name, value, low, high in (("digits", digits, 1, 12), ("examples", examples, 0, math.inf)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            bound = f"in [{low}, {high}]" if high < math.inf else f"of at least {low}"
            raise ValueError(f"{name} must be a whole number {bound}. Received: {name}={value!r}.")


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
