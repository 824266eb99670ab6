"""K mini-batch updates of a dense network, as matrix products: backpropagation written by hand.

    Z_l = H_{l−1} W_lᵀ + b_l,  H_l = a(Z_l),  l = 1 … L       forward, H_0 = X (M, D), P = H_L
    Δ_L = (1/B) ∂ℓ/∂P,  Δ_{l−1} = Δ_l W_l ∘ a′(Z_{l−1})       backward
    ∂J/∂W_l = Δ_lᵀ H_{l−1},  ∂J/∂b_l = Σ_i Δ_l,i              summed over passes of M examples

B examples per update, M in one pass, D features, L layers. Nothing is allocated in the loop.

Without momentum the gradient of an update that is one pass is never formed: the product is added to
the weights as it is computed, W_l ← (1 − ηλ) W_l − η Δ_lᵀ H_{l−1}. Else `gdtrain.rules` makes the
update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdtrain.engines.engine import LookAhead
from gdtrain.engines.native.arguments import Arguments
from gdtrain.engines.native.kernels import bounded_share, losses_and_slopes
from gdtrain.models.activations import Activation
from gdtrain.rules import descend_

__all__ = ["Backpropagation", "ByRule", "Matrix"]

_RULE = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
_CACHED = 4 * 2**20  # bytes of one pass


class Backpropagation:
    """Updates W_l (n_l, n_{l−1}) and b_l (n_l,) or None in place, from mini-batches.

    `loss` gets predictions (M, C) and the numbers of the examples, returns the sum of their losses
    and writes ∂ℓ/∂P into its third argument (M, C).
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        activations: list[Activation],
        loss: Callable[[Tensor, Tensor, Tensor], float],
    ) -> None:
        self.weights, self.biases, self.activations = weights, biases, activations
        self.loss = loss
        self.transposed = [w.t() for w in weights]
        self._rooms: dict[int, dict[str, list[Any]]] = {}
        self._gradients: list[Tensor | None] = []
        self._flat = weights[0].new_empty(0)  # all of them, in one piece
        self._tensors = [t for pair in zip(weights, biases, strict=True) for t in pair]

    def _room(self, size: int) -> dict[str, list[Any]]:
        if size not in self._rooms:
            if len(self._rooms) > 4:  # another micro-batch size, and ragged tails
                self._rooms.clear()
            made = [[w.new_empty(size, len(w)) for w in self.weights] for _ in range(3)]
            z, h, delta = made
            h = [
                b if a.name == "identity" else own
                for a, own, b in zip(self.activations, h, z, strict=True)
            ]
            x = [self.weights[0].new_empty(size, self.weights[0].shape[1])]
            self._rooms[size] = {"z": z, "h": h, "delta": delta, "x": x}
        return self._rooms[size]

    def gathered(self, inputs: Any, rows: Tensor) -> Tensor:
        """The examples as one matrix (M, D), valid until the next call of this size."""
        if not isinstance(inputs, Tensor):
            return inputs[rows].reshape(len(rows), -1)
        first, last = int(rows[0]), int(rows[-1])
        if last - first == len(rows) - 1 and bool((rows[1:] > rows[:-1]).all()):
            return inputs[first : last + 1]  # of a whole batch: nothing is copied
        return torch.index_select(inputs, 0, rows, out=self._room(len(rows))["x"][0])

    def update(
        self,
        inputs: Any,
        rows: Tensor,
        size: int,
        rules: list[tuple[float, dict[str, Any]]],
        buffers: list[Tensor | None],
        share: Callable[[float, float], float] | None = None,
    ) -> float:
        """Make one update by the examples `rows` (B,), `size` of them in a pass; J before it.

        `rules` has η and the arguments of `gdtrain.rules.descend_` for W_1, b_1, W_2, …, `buffers`
        their momentum, where a None is filled. `share` makes a factor on η of f and ‖g‖².
        """
        count = len(rows)
        total = 0.0
        plain = share is None and count <= size and all(r["momentum"] == 0 for _, r in rules)
        for start in range(0, count, size):
            part = rows[start : start + size]
            room = self._room(len(part))
            x = self.gathered(inputs, part)
            total += self._forward(x, part, room)
            room["delta"][-1].div_(count)
            if plain:
                self._descend(x, room, rules)
            else:
                self._accumulate(x, room, first=start == 0)
        if share is not None:
            own = share(*self._value_and_square(total / count, rules))
            rules = [(lr * own, rule) for lr, rule in rules]
        if not plain:
            self._apply(rules, buffers)
        return total / count

    def value_and_grad(
        self, inputs: Any, rows: Tensor, size: int
    ) -> tuple[float, list[Tensor | None]]:
        """J and ∂J/∂W_1, ∂J/∂b_1, …, valid until the next call; nothing is updated."""
        total = 0.0
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            room = self._room(len(part))
            x = self.gathered(inputs, part)
            total += self._forward(x, part, room)
            room["delta"][-1].div_(len(rows))
            self._accumulate(x, room, first=start == 0)
        return total / len(rows), self._gradients

    def value(self, inputs: Any, rows: Tensor, size: int) -> float:
        """J alone."""
        total = 0.0
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            total += self._forward(self.gathered(inputs, part), part, self._room(len(part)))
        return total / len(rows)

    def _value_and_square(
        self, value: float, rules: list[tuple[float, dict[str, Any]]]
    ) -> tuple[float, float]:
        """f and ‖g‖², with the penalty, from the gradient at hand."""
        square = float(torch.dot(self._flat, self._flat))
        for tensor, gradient, (_, rule) in zip(self._tensors, self._gradients, rules, strict=True):
            decay = rule["weight_decay"]
            if decay != 0 and tensor is not None and gradient is not None:
                g, theta = gradient.view(-1), tensor.reshape(-1)
                size = float(torch.dot(theta, theta))
                square += 2 * decay * float(torch.dot(g, theta)) + decay * decay * size
                value += 0.5 * decay * size
        return value, square

    def _forward(self, x: Tensor, rows: Tensor, room: dict[str, list[Any]]) -> float:
        h = x
        for layer, activation in enumerate(self.activations):
            z, bias = room["z"][layer], self.biases[layer]
            if bias is None:
                torch.mm(h, self.transposed[layer], out=z)
            else:
                torch.addmm(bias, h, self.transposed[layer], out=z)
            if activation.name != "identity":
                activation.write(z, room["h"][layer])
            h = room["h"][layer]
        return self.loss(h, rows, room["delta"][-1])

    def _through(self, layer: int, room: dict[str, list[Any]]) -> Tensor:
        """Δ of a layer's Z, from Δ of its H."""
        activation = self.activations[layer]
        delta: Tensor = room["delta"][layer]
        if activation.name != "identity":
            activation.times_slope(room["z"][layer], room["h"][layer], delta)
        return delta

    def _descend(
        self, x: Tensor, room: dict[str, list[Any]], rules: list[tuple[float, dict[str, Any]]]
    ) -> None:
        for layer in range(len(self.weights) - 1, -1, -1):
            delta = self._through(layer, room)
            if layer:
                torch.mm(delta, self.weights[layer], out=room["delta"][layer - 1])
            below = room["h"][layer - 1] if layer else x
            (lr, rule), (lr_bias, rule_bias) = rules[2 * layer : 2 * layer + 2]
            self.weights[layer].addmm_(
                delta.t(),
                below,
                beta=1 - lr * rule["weight_decay"],
                alpha=lr if rule["maximize"] else -lr,
            )
            bias = self.biases[layer]
            if bias is not None:
                descend_([bias], [delta.sum(0)], [], lr=lr_bias, **rule_bias)

    def _accumulate(self, x: Tensor, room: dict[str, list[Any]], first: bool) -> None:
        if not self._gradients:
            sizes = [0 if t is None else t.numel() for t in self._tensors]
            self._flat = self.weights[0].new_empty(sum(sizes))
            self._gradients = [
                None if t is None else part.view(t.shape)
                for t, part in zip(self._tensors, self._flat.split(sizes), strict=True)
            ]
        for layer in range(len(self.weights) - 1, -1, -1):
            delta = self._through(layer, room)
            if layer:
                torch.mm(delta, self.weights[layer], out=room["delta"][layer - 1])
            below = room["h"][layer - 1] if layer else x
            gradient, of_bias = self._gradients[2 * layer : 2 * layer + 2]
            assert gradient is not None
            if first:
                gradient.zero_()  # and add: faster than to write the product
            gradient.addmm_(delta.t(), below)
            if of_bias is not None:
                if first:
                    torch.sum(delta, 0, out=of_bias)
                else:
                    of_bias.add_(delta.sum(0))

    def _apply(
        self, rules: list[tuple[float, dict[str, Any]]], buffers: list[Tensor | None]
    ) -> None:
        # At once what has the same rule: a call takes as long as the numbers of a small layer do.
        alike: dict[tuple[float, int], list[int]] = {}
        tensors: list[Any] = self._tensors
        gradients: list[Any] = self._gradients
        for i, (lr, rule) in enumerate(rules):
            if tensors[i] is not None:
                alike.setdefault((lr, id(rule)), []).append(i)
        for members in alike.values():
            lr, rule = rules[members[0]]
            own = [buffers[i] for i in members]
            descend_(
                [tensors[i] for i in members], [gradients[i] for i in members], own, lr=lr, **rule
            )
            for i, buffer in zip(members, own, strict=True):
                buffers[i] = buffer


class _Passes:
    """The network of a run, its inputs as rows, and how many of them make one pass."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        inputs, layers = arguments.objective.inputs, arguments.layers
        self.inputs = inputs.reshape(len(inputs), -1) if isinstance(inputs, Tensor) else inputs
        kernel, (labels, targets) = arguments.loss_kernel(0), arguments.targets()

        def loss(prediction: Tensor, rows: Tensor, slope: Tensor) -> float:
            made: float = losses_and_slopes(
                kernel, prediction.numpy(), labels, targets, rows.numpy(), slope.numpy()
            )
            return made

        self.network = Backpropagation(
            [layer.linear.weight for layer in layers],
            [layer.linear.bias for layer in layers],
            [layer.activation for layer in layers],
            loss,
        )

    def size(self, count: int) -> int:
        """M: what was asked for, else as many examples as the processor's caches hold."""
        objective, layers = self.arguments.objective, self.arguments.layers
        if objective.micro_batch_size is None:
            if not objective.automatic:
                units = sum(layer.linear.out_features for layer in layers)
                features = layers[0].linear.in_features
                itemsize = self.arguments.parameters[0].element_size()
                return min(max(_CACHED // ((features + 3 * units) * itemsize), 32), count)
            objective.micro_batch_size = objective.automatic_size()
        return min(objective.micro_batch_size, count)


class Matrix(_Passes):
    """Updates by B > 1 examples, whose step sizes a schedule gives."""

    def __call__(self, indices: Tensor, factors: Tensor, shares: Tensor, total: Tensor) -> Tensor:
        """(K, B) example numbers, (K,) factors to (K,) losses.

        Where the step is bounded, `shares` (K,) of η₀ and `total` (1,), Σ‖g‖², are written.
        """
        arguments, groups = self.arguments, self.arguments.optimizer.param_groups
        own = [{name: group[name] for name in _RULE} for group in groups]
        rules = [own[i] for i in arguments.group_of]
        buffers = [None if p is None else arguments.buffer(p) for p in arguments.tensors]
        size, bound = self.size(indices.shape[1]), arguments.bound()
        peak, most, taken = float(groups[0]["initial_lr"]), bound.most, shares.numpy()
        squares = total.numpy()
        squares[0] = bound.total
        made: list[float] = []

        def share(value: float, square: float) -> float:
            nonlocal most
            squares[0] += square
            part = bounded_share(value, square, squares[0], peak, most, bound)
            taken[len(made)] = part
            if bound.growth > 0 and part > 0:
                most = bound.growth * part
            return float(part)

        for rows, factor in zip(indices.cpu(), factors.tolist(), strict=True):
            rates = [groups[i]["initial_lr"] * factor for i in arguments.group_of]
            made.append(
                self.network.update(
                    self.inputs,
                    rows,
                    size,
                    list(zip(rates, rules, strict=True)),
                    buffers,
                    None if arguments.bounded is None else share,
                )
            )
        for p, group, buffer in zip(arguments.tensors, arguments.group_of, buffers, strict=True):
            if p is not None and arguments.has_momentum(p, group):
                arguments.optimizer.state[p]["momentum_buffer"] = buffer
        return torch.tensor(made, dtype=arguments.dtype)


class ByRule(_Passes):
    """Updates whose step sizes the optimizer's own rule gives; value and gradient are ours."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        self.rates: list[float] = []
        self.evaluations = 0
        self._ahead = LookAhead()

    def __call__(self, indices: Tensor, factors: Tensor) -> Tensor:
        """(K, B) example numbers and (K,) factors to (K,) losses; `rates` are set."""
        arguments, network = self.arguments, self.network
        optimizer: Any = arguments.optimizer
        size = self.size(indices.shape[1])
        full = indices.shape[1] == len(arguments.objective.targets)
        made, self.rates = [], []

        def set_gradients(gradient: list[Tensor | None], copies: bool = True) -> None:
            for p, g in zip(arguments.tensors, gradient, strict=True):
                if p is not None:
                    p.grad = g.clone() if copies and g is not None else g

        for rows, factor in zip(indices.cpu(), factors.tolist(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            found = self._ahead.begin(arguments.parameters, rows) if full else None
            if found is None:
                value, gradient = network.value_and_grad(self.inputs, rows, size)
                set_gradients(gradient)
            else:
                self.evaluations -= 1
                value, gradient = found
                set_gradients(gradient, copies=False)

            def evaluate(rows: Tensor = rows) -> float:
                self.evaluations += 1
                if not (full and self._ahead.wanted()):
                    return float(network.value(self.inputs, rows, size))
                there, gradient = network.value_and_grad(self.inputs, rows, size)
                own = [None if g is None else g.clone() for g in gradient]
                self._ahead.keep(arguments.parameters, rows, (there, own))
                return there

            def differentiate(rows: Tensor = rows) -> None:
                self.evaluations += 1
                set_gradients(network.value_and_grad(self.inputs, rows, size)[1])

            optimizer.step_by_rule(value, evaluate, differentiate)
            made.append(value)
            self.rates.append(optimizer.last_rate)
        for p in arguments.parameters:
            p.grad = None
        return torch.tensor(made, dtype=arguments.dtype)
