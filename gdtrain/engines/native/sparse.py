"""K updates of a linear model on sparse inputs, compiled by Numba: loops over the non-zeros.

    p = W x + b,  ∂ℓ/∂W = δ xᵀ,  ∂ℓ/∂b = δ = ∂ℓ/∂p,  averaged over the B examples of an update

K updates in the sweep, D features, C outputs; row i of the inputs has the values
values[starts[i] : starts[i + 1]] in the columns columns[starts[i] : starts[i + 1]] (CSR).

Without momentum and weight decay an update touches only the columns of its examples. Both of these
move every weight, and take time in proportion to C·D.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdtrain.data.sparse import SparseInputs
from gdtrain.engines.native.arguments import OWN, Arguments, Made
from gdtrain.engines.native.dense import logistic_losses
from gdtrain.engines.native.kernels import (
    bounded_share,
    compiled,
    descend,
    loss_and_slope,
    loss_of_margin,
    prefetch,
    rule_of,
)

__all__ = ["Rows", "Sparse", "SparseRoom", "sweep"]


class Rows(NamedTuple):
    """Sparse examples, CSR."""

    values: NDArray[Any]  # (nnz,)
    columns: NDArray[Any]  # (nnz,), each in [0, D)
    starts: NDArray[np.int64]  # (N+1,)
    labels: NDArray[np.int64]  # (N,) class numbers, or (1,) in a regression
    targets: NDArray[Any]  # (N, C) numbers, or (1, C) of classes


class SparseRoom(NamedTuple):
    """Room for an update."""

    prediction: NDArray[Any]  # (C,)
    slopes: NDArray[Any]  # (B, C)
    gradient: NDArray[Any]  # (C, D) of zeros, and left so; for what momentum needs


@compiled(reassoc=False)
def _single(  # type: ignore[no-untyped-def]
    values, columns, starts, labels, rows, factors, peaks, w, bias, rule, rule_bias, code, bound,
    losses, shares, totals,
):  # fmt: skip
    """`sweep` for two classes, one example an update and no momentum: all in registers.

    (Arrays are passed one by one: out of a tuple the loop reads their addresses at each use.)
    """
    biased = rule_bias.present
    number = w.dtype.type
    zero, one = number(0), number(1)
    values_, columns_ = values.reshape(1, values.size), columns.reshape(1, columns.size)
    b = bias[0]
    bounded = bound.inverse != 0
    most, total = bound.most, bound.total
    part = 1.0
    for k in range(rows.shape[0]):
        if k + 4 < rows.shape[0]:
            prefetch(values_, 0, starts[rows[k + 4, 0]])
            prefetch(columns_, 0, starts[rows[k + 4, 0]])
        i = rows[k, 0]
        start, end = starts[i], starts[i + 1]
        p = b if biased else zero
        for at in range(start, end):
            p += w[columns[at]] * values[at]
        sign = one if labels[i] == 1 else -one
        losses[k], slope = loss_of_margin(code, sign * p, zero, one)
        g = rule.sign * sign * slope
        if bounded:
            square = 1.0 if biased else 0.0
            for at in range(start, end):
                square += values[at] * values[at]
            square *= slope * slope
            total += square
            part = bounded_share(losses[k], square, total, peaks[0], most, bound)
            shares[k] = part
            if bound.growth > 0 and part > 0:
                most = bound.growth * part
        lr = number(factors[k] * part * peaks[0])
        decay = lr * rule.weight_decay
        if decay != 0:
            for j in range(w.size):
                w[j] -= decay * w[j]
        for at in range(start, end):
            w[columns[at]] -= lr * g * values[at]
        if biased:
            b -= number(factors[k] * part * peaks[1]) * (
                g * rule_bias.sign * rule.sign + rule_bias.weight_decay * b
            )
    bias[0], totals[0] = b, total


# Without reassoc: short sums of scattered terms are slower in vector registers.
@compiled(reassoc=False)
def sweep(examples, rows, rates, parameters, rules, loss, bound, room, made):  # type: ignore[no-untyped-def]
    """Make K updates in place, of the `rows` (K, B) of the examples."""
    values, columns, starts = examples.values, examples.columns, examples.starts
    labels, targets, factors, peaks = examples.labels, examples.targets, rates.factors, rates.peaks
    theta, buffers, losses = parameters.theta, parameters.buffers, made.losses
    prediction, slopes, gradient = room.prediction, room.slopes, room.gradient
    features = gradient.shape[1]
    rule, rule_bias = rule_of(rules, 0), rule_of(rules, 1)
    updates, batch = rows.shape
    outputs = prediction.size
    weight = theta[: outputs * features].reshape(outputs, features)
    bias = theta[outputs * features :]
    b_weight = buffers[: outputs * features].reshape(outputs, features) if buffers.size else weight
    b_bias = buffers[outputs * features :] if buffers.size else bias
    biased = rule_bias.present
    number = theta.dtype.type
    zero, one = number(0), number(1)
    share = one / number(batch)
    columns = columns.view(np.uint32)  # an index without a sign needs no test for it
    values_, columns_ = values.reshape(1, values.size), columns.reshape(1, columns.size)
    bounded = bound.inverse != 0
    most, total = bound.most, bound.total
    part = 1.0
    # Without decay, one example has its gradient where it has its values; else it is formed whole.
    decays = rule.weight_decay != 0 or (biased and rule_bias.weight_decay != 0)
    formed = bounded and (batch > 1 or decays)
    moves = rule.momentum != 0 or (biased and rule_bias.momentum != 0)
    if (
        batch == outputs == 1 and labels.size > 1 and loss.code != OWN and not moves and not formed
    ):  # fmt: skip
        _single(
            values, columns, starts, labels, rows, factors, peaks, weight[0], bias, rule, rule_bias,
            loss.code, bound, losses, made.shares, made.total,
        )  # fmt: skip
        return
    for k in range(updates):
        if k + 4 < updates:  # fetched before their turn
            prefetch(values_, 0, starts[rows[k + 4, 0]])
            prefetch(columns_, 0, starts[rows[k + 4, 0]])
        summed = zero
        for n in range(batch):
            i = rows[k, n]
            for c in range(outputs):
                p = bias[c] if biased else zero
                for at in range(starts[i], starts[i + 1]):
                    p += weight[c, columns[at]] * values[at]
                prediction[c] = p
            summed += loss_and_slope(
                loss, prediction, labels[i] if labels.size > 1 else labels[0],
                targets, i if targets.shape[0] > 1 else 0, slopes, n,
            )  # fmt: skip
        losses[k] = summed * share
        if rule.momentum != 0 or formed:
            for n in range(batch):
                i = rows[k, n]
                for c in range(outputs):
                    for at in range(starts[i], starts[i + 1]):
                        gradient[c, columns[at]] += slopes[n, c] * values[at]
        if bounded:
            value, square = float(losses[k]), 0.0
            if formed:
                for c in range(outputs):
                    for j in range(features):
                        d = share * gradient[c, j] + rule.weight_decay * weight[c, j]
                        square += d * d
                        value += 0.5 * rule.weight_decay * weight[c, j] * weight[c, j]
                    if biased:
                        d = rule_bias.weight_decay * bias[c]
                        for n in range(batch):
                            d += share * slopes[n, c]
                        square += d * d
                        value += 0.5 * rule_bias.weight_decay * bias[c] * bias[c]
            else:
                i = rows[k, 0]
                size = 1.0 if biased else 0.0
                for at in range(starts[i], starts[i + 1]):
                    size += values[at] * values[at]
                for c in range(outputs):
                    square += slopes[0, c] * slopes[0, c] * size
            total += square
            part = bounded_share(value, square, total, peaks[0], most, bound)
            made.shares[k] = part
            if bound.growth > 0 and part > 0:
                most = bound.growth * part
        lr = number(factors[k] * part * peaks[0])
        lr_bias = number(factors[k] * part * peaks[1])
        if rule.momentum == 0 and not formed:
            decay = lr * rule.weight_decay
            if decay != 0:
                for c in range(outputs):
                    for j in range(features):
                        weight[c, j] -= decay * weight[c, j]
            for n in range(batch):
                i = rows[k, n]
                for c in range(outputs):
                    step = lr * rule.sign * share * slopes[n, c]
                    for at in range(starts[i], starts[i + 1]):
                        weight[c, columns[at]] -= step * values[at]
        else:
            for c in range(outputs):
                descend(weight[c], b_weight[c], share, gradient[c], lr, rule, k == 0)
            for n in range(batch):
                i = rows[k, n]
                for c in range(outputs):
                    for at in range(starts[i], starts[i + 1]):
                        gradient[c, columns[at]] = zero
        if biased:
            for n in range(1, batch):
                for c in range(outputs):
                    slopes[0, c] += slopes[n, c]
            if rule_bias.momentum == 0:
                for c in range(outputs):
                    g = rule_bias.sign * share * slopes[0, c] + rule_bias.weight_decay * bias[c]
                    bias[c] -= lr_bias * g
            else:
                descend(bias, b_bias, share, slopes[0], lr_bias, rule_bias, k == 0)
    made.total[0] = total


class Sparse:
    """Updates of a linear model by sparse examples, B each."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        inputs, linear = arguments.objective.inputs, arguments.layers[0].linear
        assert isinstance(inputs, SparseInputs)
        self._rows = Rows(inputs.values, inputs.columns, inputs.row_starts, *arguments.targets())
        self._prediction = arguments.empty(linear.out_features)
        self._gradient = arguments.empty(linear.out_features, linear.in_features)

    def __call__(self, indices: Tensor, factors: Tensor, shares: Tensor, total: Tensor) -> Tensor:
        """(K, B) example numbers, (K,) factors to (K,) losses.

        Where the step is bounded, `shares` (K,) of η₀ and `total` (1,), Σ‖g‖², are written.
        """
        arguments, batch = self.arguments, indices.shape[1]
        losses = arguments.empty(len(indices))
        sweep(
            self._rows,
            indices.cpu().contiguous().numpy(),
            arguments.rates(factors),
            arguments.gather(),
            arguments.rule(),
            arguments.loss_kernel(batch),
            arguments.bound(),
            SparseRoom(
                self._prediction, arguments.empty(batch, len(self._prediction)), self._gradient
            ),
            Made(losses, shares.numpy(), total.numpy()),
        )
        arguments.give_back()
        made = torch.from_numpy(losses)
        return logistic_losses(made) if arguments.gives_margins(batch) else made
