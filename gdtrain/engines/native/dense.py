"""K one-example updates of a dense network, compiled by Numba: loops written by hand.

    z_l = W_l h_{l−1} + b_l,  h_l = a(z_l),  l = 1 … L        forward, h_0 = x, p = h_L
    δ_L = ∂ℓ/∂p,  δ_{l−1} = W_lᵀ δ_l · a′(z_{l−1})            backward
    ∂ℓ/∂W_l = δ_l h_{l−1}ᵀ,  ∂ℓ/∂b_l = δ_l                    one row of W_l for each unit

K updates in the sweep, D = n_0 features, n_l units in layer l, C = n_L outputs, P parameters. The
update rule is that of `gdtrain.rules`, applied to a row at a time, and skipped where it changes
nothing: behind a unit that is off.

Most of the time goes into moving W_1 between the caches. The update of its rows for one example is
therefore put off until the rows are read for the next one: they are moved once, not twice. The sums
are always formed by the same loop, so that nothing depends on where a sweep begins or ends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdtrain.engines.native.arguments import IDENTITY, OWN, Arguments, Examples, Made, Room
from gdtrain.engines.native.kernels import (
    activate,
    bounded_share,
    call_slope,
    call_value,
    compiled,
    descend,
    loss_and_slope,
    prefetch,
    rule_of,
    slope_of,
)
from gdtrain.step_sizes.bounded import Bound, last_share

__all__ = ["Dense", "logistic_losses", "sweep"]

_GATHERED = 16 * 2**20  # bytes of examples that are brought from a file together


def logistic_losses(margins: Tensor) -> Tensor:
    """log(1 + exp(−m)), each bit independent of where in the tensor m stands.

    What does not fill a vector of the processor may be computed in another way: so it is filled up.
    (NumPy is several times as fast here as torch's softplus, which this equals to rounding.)
    """
    count = len(margins)
    m = np.pad(margins.numpy(), (0, -count % 64))
    made = np.exp(-np.abs(m))
    np.log1p(made, out=made)
    made += np.maximum(-m, 0)
    return torch.from_numpy(made[:count])


@compiled
def _value_and_square(loss, square, theta, widths, rules, room):  # type: ignore[no-untyped-def]
    """f and ‖g‖² with the penalty, from ‖x‖² and what forward and backward pass have left.

    Of a layer, ‖δ hᵀ + λ W‖² = ‖δ‖² ‖h‖² + 2λ Σ_j δ_j (W h)_j + λ² ‖W‖², and W h = z − b.
    """
    value, total = loss, 0.0
    z, h, delta = room.z, room.h, room.delta
    at, unit_at = 0, 0
    for layer in range(widths.size - 1):
        m, n = widths[layer], widths[layer + 1]
        if layer > 0:
            below = h[unit_at - m : unit_at]
            square = 0.0
            for i in range(m):
                square += below[i] * below[i]
        slopes = 0.0
        for j in range(unit_at, unit_at + n):
            slopes += delta[j] * delta[j]
        total += slopes * square
        decay = float(rules.weight_decay[2 * layer])
        decay_bias = float(rules.weight_decay[2 * layer + 1])
        biased = rules.present[2 * layer + 1]
        bias = theta[at + n * m : at + n * m + n]
        if decay != 0:
            along, size = 0.0, 0.0
            for j in range(n):
                along += delta[unit_at + j] * (z[unit_at + j] - bias[j] * biased)
            for i in range(at, at + n * m):
                size += theta[i] * theta[i]
            total += 2 * decay * along + decay * decay * size
            value += 0.5 * decay * size
        if biased:
            total += slopes
            if decay_bias != 0:
                along, size = 0.0, 0.0
                for j in range(n):
                    along += delta[unit_at + j] * bias[j]
                    size += bias[j] * bias[j]
                total += 2 * decay_bias * along + decay_bias * decay_bias * size
                value += 0.5 * decay_bias * size
        at += n * m + n
        unit_at += n
    return value, total


@compiled
def _activate_all(network, layer, z, h):  # type: ignore[no-untyped-def]
    """h = a(z) of the units of a layer."""
    code, parameter = network.activations[layer], network.parameters[layer]
    if code == OWN:
        for j in range(z.size):
            h[j] = call_value(network.values[layer], z[j])
    else:
        for j in range(z.size):
            h[j] = activate(code, parameter, z[j])


@compiled
def _times_slope(network, layer, z, h, delta):  # type: ignore[no-untyped-def]
    """δ ← δ · a′(z) of the units of a layer."""
    code, parameter = network.activations[layer], network.parameters[layer]
    if code == OWN:
        for j in range(z.size):
            delta[j] *= call_slope(network.slopes[layer], z[j], h[j])
    elif code != IDENTITY:
        for j in range(z.size):
            delta[j] *= slope_of(code, parameter, z[j], h[j])


@compiled
def sweep(examples, rows, rates, parameters, network, rules, loss, bound, room, made):  # type: ignore[no-untyped-def]
    """Make K updates in place, of the `rows` (K,) of the examples."""
    inputs, labels, targets = examples.inputs, examples.labels, examples.targets
    factors, peaks, widths = rates.factors, rates.peaks, network.widths
    theta, buffers = parameters.theta, parameters.buffers
    z, h, delta = room.z, room.h, room.delta
    layers = widths.size - 1
    number = theta.dtype.type  # a literal would widen the loops
    zero, one = number(0), number(1)
    rule, rule_bias = rule_of(rules, 0), rule_of(rules, 1)
    n0, n1 = widths[0], widths[1]
    first = theta[: n1 * n0].reshape(n1, n0)
    first_bias = theta[n1 * n0 : n1 * n0 + n1]
    momentum_1 = buffers[: n1 * n0].reshape(n1, n0) if buffers.size else first
    momentum_bias_1 = buffers[n1 * n0 : n1 * n0 + n1] if buffers.size else first_bias
    plain = rule.momentum == 0 and rule.weight_decay == 0
    z1, h1, d1 = z[:n1], h[:n1], delta[:n1]
    outputs = widths[layers]
    prediction = h[h.size - outputs :]
    slopes = delta[delta.size - outputs :].reshape(1, outputs)
    ahead = max(4096 // (n0 * theta.itemsize), 1)  # examples that are fetched before their turn
    bounded = bound.inverse != 0
    most, total = bound.most, bound.total
    share = 1.0
    for k in range(rows.size + 1):
        if k + ahead < rows.size:
            for i in range(0, n0, 64 // theta.itemsize):
                prefetch(inputs, rows[k + ahead], i)
        # ---- the first layer: the update of example k − 1, then z_1 of example k, by four rows
        factor = factors[max(k - 1, 0)] * share
        lr = number(factor * peaks[0])
        lr_bias = number(factor * peaks[1])
        before = inputs[rows[max(k - 1, 0)]]
        x = inputs[rows[min(k, rows.size - 1)]]
        for start in range(0, n1, 4):
            end = min(start + 4, n1)
            if k > 0:
                for j in range(start, end):
                    if plain:
                        step = lr * rule.sign * d1[j]
                        if step != 0:
                            for i in range(n0):
                                first[j, i] -= step * before[i]
                    else:
                        descend(first[j], momentum_1[j], d1[j], before, lr, rule, k == 1)
            if k < rows.size:
                if end - start == 4:
                    s0, s1, s2, s3 = zero, zero, zero, zero
                    for i in range(n0):
                        s0 += first[start, i] * x[i]
                        s1 += first[start + 1, i] * x[i]
                        s2 += first[start + 2, i] * x[i]
                        s3 += first[start + 3, i] * x[i]
                    z1[start], z1[start + 1], z1[start + 2], z1[start + 3] = s0, s1, s2, s3
                else:
                    for j in range(start, end):
                        s0 = zero
                        for i in range(n0):
                            s0 += first[j, i] * x[i]
                        z1[j] = s0
        if rule_bias.present:
            if k > 0:
                descend(first_bias, momentum_bias_1, one, d1, lr_bias, rule_bias, k == 1)
            if k < rows.size:
                for j in range(n1):
                    z1[j] += first_bias[j]
        if k == rows.size:
            made.total[0] = total
            break
        _activate_all(network, 0, z1, h1)
        # ---- forward through the other layers
        at, unit_at = n1 * n0 + n1, n1
        for layer in range(1, layers):
            m, n = widths[layer], widths[layer + 1]
            weight = theta[at : at + n * m].reshape(n, m)
            bias = theta[at + n * m : at + n * m + n]
            below = h[unit_at - m : unit_at]
            biased = rules.present[2 * layer + 1]
            for j in range(n):
                s0 = zero
                for i in range(m):
                    s0 += weight[j, i] * below[i]
                if biased:
                    s0 += bias[j]
                z[unit_at + j] = s0
            _activate_all(network, layer, z[unit_at : unit_at + n], h[unit_at : unit_at + n])
            at += n * m + n
            unit_at += n
        # ---- the loss, and δ of each layer
        label = labels[rows[k]] if labels.size > 1 else labels[0]
        made.losses[k] = loss_and_slope(
            loss, prediction, label, targets, rows[k] if targets.shape[0] > 1 else 0, slopes, 0
        )
        for layer in range(layers - 1, 0, -1):
            m, n = widths[layer], widths[layer + 1]
            at -= n * m + n
            unit_at -= n
            end = unit_at + n
            _times_slope(network, layer, z[unit_at:end], h[unit_at:end], delta[unit_at:end])
            weight = theta[at : at + n * m].reshape(n, m)
            d_below = delta[unit_at - m : unit_at]
            d_below[:] = zero
            for j in range(n):
                d = delta[unit_at + j]
                if d != 0:
                    for i in range(m):
                        d_below[i] += d * weight[j, i]
        _times_slope(network, 0, z1, h1, d1)
        # ---- the step size
        if bounded:
            value, square = _value_and_square(
                float(made.losses[k]), examples.squares[rows[k]], theta, widths, rules, room
            )
            total += square
            share = bounded_share(value, square, total, peaks[0], most, bound)
            made.shares[k] = share
            if bound.growth > 0 and share > 0:
                most = bound.growth * share
        # ---- the update of all layers but the first
        at, unit_at = n1 * n0 + n1, n1
        for layer in range(1, layers):
            m, n = widths[layer], widths[layer + 1]
            weight = theta[at : at + n * m].reshape(n, m)
            bias = theta[at + n * m : at + n * m + n]
            momentum = buffers[at : at + n * m].reshape(n, m) if buffers.size else weight
            momentum_bias = buffers[at + n * m : at + n * m + n] if buffers.size else bias
            below = h[unit_at - m : unit_at]
            lr = number(factors[k] * share * peaks[2 * layer])
            lr_bias = number(factors[k] * share * peaks[2 * layer + 1])
            own, own_bias = rule_of(rules, 2 * layer), rule_of(rules, 2 * layer + 1)
            for j in range(n):
                descend(weight[j], momentum[j], delta[unit_at + j], below, lr, own, k == 0)
            if own_bias.present:
                d = delta[unit_at : unit_at + n]
                descend(bias, momentum_bias, one, d, lr_bias, own_bias, k == 0)
            at += n * m + n
            unit_at += n


class Dense:
    """Updates by one dense example each."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        units = sum(layer.linear.out_features for layer in arguments.layers)
        self._room = Room(*(arguments.empty(units) for _ in range(3)))
        self._network = arguments.network()
        self._examples: Examples | None = None

    def __call__(self, indices: Tensor, factors: Tensor, shares: Tensor, total: Tensor) -> Tensor:
        """(K, 1) example numbers, (K,) factors to (K,) losses.

        Where the step is bounded, `shares` (K,) of η₀ and `total` (1,), Σ‖g‖², are written.
        """
        arguments, inputs = self.arguments, self.arguments.objective.inputs
        rows, bound = indices.reshape(-1).cpu(), arguments.bound()
        if isinstance(inputs, Tensor):
            if self._examples is None:
                flat = inputs.reshape(len(inputs), -1).contiguous().numpy()
                self._examples = Examples(flat, *arguments.targets(), self._squares(flat))
            return self._sweep(self._examples, rows, factors, shares, total, bound)
        # Rows from a file, so many at a time.
        labels, targets = arguments.targets()
        width = arguments.layers[0].linear.in_features * arguments.parameters[0].element_size()
        many, parts = max(_GATHERED // width, 1), []
        for part, own, taken in zip(
            rows.split(many), factors.split(many), shares.split(many), strict=True
        ):
            flat = inputs[part].reshape(len(part), -1).contiguous().numpy()
            examples = Examples(
                flat,
                labels[part.numpy()] if len(labels) > 1 else labels,
                targets[part.numpy()] if len(targets) > 1 else targets,
                self._squares(flat),
            )
            parts.append(self._sweep(examples, torch.arange(len(part)), own, taken, total, bound))
            bound = bound._replace(total=float(total))
            if bound.growth > 0:
                last = last_share(taken, bound.most / bound.growth)
                bound = bound._replace(most=bound.growth * last)
        return torch.cat(parts)

    def _sweep(
        self,
        examples: Examples,
        rows: Tensor,
        factors: Tensor,
        shares: Tensor,
        total: Tensor,
        bound: Bound,
    ) -> Tensor:
        arguments = self.arguments
        losses = arguments.empty(len(rows))
        sweep(
            examples,
            rows.numpy(),
            arguments.rates(factors),
            arguments.gather(),
            self._network,
            arguments.rule(),
            arguments.loss_kernel(1),
            bound,
            self._room,
            Made(losses, shares.numpy(), total.numpy()),
        )
        arguments.give_back()
        made = torch.from_numpy(losses)
        return logistic_losses(made) if arguments.gives_margins(1) else made

    def _squares(self, inputs: NDArray[Any]) -> NDArray[np.float64]:
        """‖x‖² of each row, where the step is bounded."""
        if self.arguments.bounded is None:
            return np.zeros(0)
        return np.einsum("ij,ij->i", inputs, inputs, dtype=np.float64)
