"""K updates of a linear model on sparse inputs, compiled by Numba: loops over the non-zeros.

    p = W x + b,  ∂ℓ/∂W = δ xᵀ,  ∂ℓ/∂b = δ = ∂ℓ/∂p,  averaged over the B examples of an update

K updates in the sweep, D features, C outputs; row i of the inputs has the values
values[starts[i] : starts[i + 1]] in the columns columns[starts[i] : starts[i + 1]] (CSR).

Without momentum and weight decay an update touches only the columns of its examples. Both of these
move every weight, and take time in proportion to C·D.
"""

from __future__ import annotations

import math

import numpy as np

from gdtrain.engines.native.kernels import (
    compiled,
    descend,
    loss_and_slope,
    loss_of_margin,
    polyak_share,
    prefetch,
)

__all__ = ["sweep"]


@compiled(reassoc=False)
def _single(  # type: ignore[no-untyped-def]
    values, columns, starts, labels, rows, factors, peaks, w, bias, biased, rule, loss, losses,
    polyak, shares,
):  # fmt: skip
    """`sweep` for two classes, one example an update and no momentum: all in registers."""
    number = w.dtype.type
    zero, one = number(0), number(1)
    values_, columns_ = values.reshape(1, values.size), columns.reshape(1, columns.size)
    b = bias[0]
    bounded = polyak.size > 0
    most = polyak[3] if bounded else 1.0
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
        losses[k], slope = loss_of_margin(loss, sign * p, zero, one)
        g = rule[0, 4] * sign * slope
        if bounded:
            square = 1.0 if biased else 0.0
            for at in range(start, end):
                square += values[at] * values[at]
            part = polyak_share(losses[k], slope * slope * square, peaks[0], most, polyak)
            shares[k] = part
            if polyak[2] > 0 and part > 0:
                most = polyak[2] * part
        lr = number(factors[k] * part * peaks[0])
        decay = lr * rule[0, 2]
        if decay != 0:
            for j in range(w.size):
                w[j] -= decay * w[j]
        for at in range(start, end):
            w[columns[at]] -= lr * g * values[at]
        if biased:
            b -= number(factors[k] * part * peaks[1]) * (
                g * rule[1, 4] * rule[0, 4] + rule[1, 2] * b
            )
    bias[0] = b


# Without reassoc: short sums of scattered terms are slower in vector registers.
@compiled(reassoc=False)
def sweep(  # type: ignore[no-untyped-def]
    values, columns, starts, labels, targets, rows, factors, peaks, theta, buffers, features,
    rule, fresh, loss, loss_parameter, losses, prediction, slopes, gradient, polyak, shares,
):  # fmt: skip
    """Make K updates in place.

    Args:
        values: (nnz,).
        columns: (nnz,), each in [0, D).
        starts: (N+1,).
        labels: (N,) class numbers, or (1,) in a regression.
        targets: (N, C) numbers, or (1, C) of classes.
        rows: (K, B), which examples make which update.
        factors: (K,), the schedule's factor at each update, float64.
        peaks: (2,), η₀ of W and of b, float64.
        theta: (C·D + C,): W, then b, in place.
        buffers: (C·D + C,) momentum in the same order, in place; (0,) without momentum.
        features: D.
        rule: (2, 5) and
        fresh: (2,), of W and b, as for `gdtrain.engines.native.kernels.sweep`.
        loss: A value of `gdtrain.engines.native.kernels.LOSS`.
        loss_parameter: Huber's δ.
        losses: (K,), written.
        prediction: (C,) room.
        slopes: (B, C) room.
        gradient: (C, D) of zeros, and left so; room for what momentum needs.
        polyak: (4,) or (0,), and
        shares: (K,), as for `gdtrain.engines.native.kernels.sweep`.

    Example:
        >>> from gdtrain.engines.native.kernels import LOSS
        >>> theta, losses = np.zeros(3), np.zeros(1)
        >>> rule = np.array([[-1.0, 1, 0, 0, 1]] * 2)  # W and b by plain descent
        >>> sweep(np.array([2.0, 1.0]), np.array([1, 0], np.int32), np.array([0, 1, 2]),
        ...     np.zeros(1, np.int64), np.array([[1.0], [3.0]]), np.array([[0, 1]]),
        ...     np.ones(1), np.full(2, 0.5), theta, np.zeros(0), 2, rule, np.zeros(2, np.bool_),
        ...     LOSS["SquaredError"], 0.0, losses, np.zeros(1), np.zeros((2, 1)), np.zeros((1, 2)),
        ...     np.zeros(0), np.zeros(0))
        >>> losses, theta  # ¼(1² + 3²); the mean gradient is −(3, 2) for W, −4 for b, halved
        (array([2.5]), array([0.75, 0.5 , 1.  ]))
    """
    updates, batch = rows.shape
    outputs = prediction.size
    weight = theta[: outputs * features].reshape(outputs, features)
    bias = theta[outputs * features :]
    b_weight = buffers[: outputs * features].reshape(outputs, features) if buffers.size else weight
    b_bias = buffers[outputs * features :] if buffers.size else bias
    biased = not math.isnan(rule[1, 0])
    number = theta.dtype.type
    zero, one = number(0), number(1)
    share = one / number(batch)
    columns = columns.view(np.uint32)  # an index without a sign needs no test for it
    values_, columns_ = values.reshape(1, values.size), columns.reshape(1, columns.size)
    bounded = polyak.size > 0
    most = polyak[3] if bounded else 1.0
    part = 1.0
    # Without decay, one example has its gradient where it has its values; else it is formed whole.
    formed = bounded and (batch > 1 or rule[0, 2] != 0 or (biased and rule[1, 2] != 0))
    if (
        batch == outputs == 1 and labels.size > 1 and rule[0, 0] < 0 and not rule[1, 0] >= 0
        and not formed
    ):  # fmt: skip
        _single(
            values, columns, starts, labels, rows, factors, peaks, weight[0], bias, biased, rule,
            loss, losses, polyak, shares,
        )  # fmt: skip
        return
    for k in range(updates):
        if k + 4 < updates:  # fetched before their turn
            prefetch(values_, 0, starts[rows[k + 4, 0]])
            prefetch(columns_, 0, starts[rows[k + 4, 0]])
        total = zero
        for n in range(batch):
            i = rows[k, n]
            for c in range(outputs):
                p = bias[c] if biased else zero
                for at in range(starts[i], starts[i + 1]):
                    p += weight[c, columns[at]] * values[at]
                prediction[c] = p
            total += loss_and_slope(
                loss, loss_parameter, prediction, labels[i] if labels.size > 1 else labels[0],
                targets, i if targets.shape[0] > 1 else 0, slopes, n,
            )  # fmt: skip
        losses[k] = total * share
        if rule[0, 0] >= 0 or formed:
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
                        d = share * gradient[c, j] + rule[0, 2] * weight[c, j]
                        square += d * d
                        value += 0.5 * rule[0, 2] * weight[c, j] * weight[c, j]
                    if biased:
                        d = rule[1, 2] * bias[c]
                        for n in range(batch):
                            d += share * slopes[n, c]
                        square += d * d
                        value += 0.5 * rule[1, 2] * bias[c] * bias[c]
            else:
                i = rows[k, 0]
                size = 1.0 if biased else 0.0
                for at in range(starts[i], starts[i + 1]):
                    size += values[at] * values[at]
                for c in range(outputs):
                    square += slopes[0, c] * slopes[0, c] * size
            part = polyak_share(value, square, peaks[0], most, polyak)
            shares[k] = part
            if polyak[2] > 0 and part > 0:
                most = polyak[2] * part
        lr = number(factors[k] * part * peaks[0])
        lr_bias = number(factors[k] * part * peaks[1])
        if rule[0, 0] < 0 and not formed:  # no momentum
            decay = lr * rule[0, 2]
            if decay != 0:
                for c in range(outputs):
                    for j in range(features):
                        weight[c, j] -= decay * weight[c, j]
            for n in range(batch):
                i = rows[k, n]
                for c in range(outputs):
                    step = lr * rule[0, 4] * share * slopes[n, c]
                    for at in range(starts[i], starts[i + 1]):
                        weight[c, columns[at]] -= step * values[at]
        else:
            for c in range(outputs):
                descend(
                    weight[c], b_weight[c], share, gradient[c], lr, rule, 0,
                    k == 0 and fresh[0],
                )  # fmt: skip
            for n in range(batch):
                i = rows[k, n]
                for c in range(outputs):
                    for at in range(starts[i], starts[i + 1]):
                        gradient[c, columns[at]] = zero
        if biased:
            for n in range(1, batch):
                for c in range(outputs):
                    slopes[0, c] += slopes[n, c]
            if rule[1, 0] < 0:
                for c in range(outputs):
                    g = rule[1, 4] * share * slopes[0, c] + rule[1, 2] * bias[c]
                    bias[c] -= lr_bias * g
            else:
                descend(bias, b_bias, share, slopes[0], lr_bias, rule, 1, k == 0 and fresh[1])
