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

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = [
    "ACTIVATION",
    "LOSS",
    "compiled",
    "descend",
    "loss_and_slope",
    "loss_of_margin",
    "losses_and_slopes",
    "polyak_share",
    "sweep",
]


def compiled(function: Callable[..., Any] | None = None, *, reassoc: bool = True) -> Any:
    """Compile for this processor, and keep it on disk for the next process where that can be.

    Args:
        function: In Numba's part of Python; None: returns the decorator.
        reassoc: Whether sums may be formed in another order, in vector registers.

    Returns:
        The compiled function.

    Example:
        >>> compiled(lambda x: x + 1)(2)
        3
    """
    if function is None:
        return partial(compiled, reassoc=reassoc)
    # Not nnan, ninf: an infinite loss must stay one.
    freedoms = {"contract", "arcp", "afn", "nsz", *(["reassoc"] if reassoc else [])}
    options: dict[str, Any] = {"fastmath": freedoms, "error_model": "numpy", "nogil": True}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for it can be written
        return numba.njit(**options)(function)


ACTIVATION = {
    name: code
    for code, name in enumerate(
        ("identity", "relu", "tanh", "sigmoid", "gelu", "silu", "leaky_relu", "elu", "softplus")
    )
}
# "Margin" has the slope of the logistic loss, and gives the margin s·p for it: the loss, a
# logarithm, is then computed for many examples at once.
LOSS = {
    name: code
    for code, name in enumerate(
        (
            "SquaredError",
            "Huber",
            "CrossEntropy",
            "Logistic",
            "Hinge",
            "SquaredHinge",
            "Margin",
            "OneHotSquaredError",
        )
    )
}
(IDENTITY, RELU, TANH, SIGMOID, GELU, SILU, LEAKY_RELU, ELU, SOFTPLUS) = range(9)
(SQUARED_ERROR, HUBER, CROSS_ENTROPY, LOGISTIC, HINGE, SQUARED_HINGE, MARGIN, ONE_HOT) = range(8)


def _prefetch(context, array, row, column):  # type: ignore[no-untyped-def]
    """Bring array[row, column] into the caches, without waiting for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = signature.args[0]
        made = context.make_array(kind)(context, builder, arguments[0])
        at = cgutils.get_item_pointer(context, builder, kind, made, list(arguments[1:]))
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, number, number, number]),
            "llvm.prefetch.p0",
        )
        # To read, keep in all caches, data.
        builder.call(function, [builder.bitcast(at, byte), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp), generate


prefetch: Any = intrinsic(_prefetch)


@compiled
def _activate(code, parameter, z):  # type: ignore[no-untyped-def]
    """a(z). A NaN stays one: comparisons are written so that it takes the way through."""
    if code == RELU:
        return z * 0 if z <= 0 else z
    if code == TANH:
        return math.tanh(z)
    if code == SIGMOID:
        return 1 / (1 + math.exp(-z))
    if code == GELU:
        return 0.5 * z * (1 + math.erf(z * math.sqrt(0.5)))
    if code == SILU:
        return z / (1 + math.exp(-z))
    if code == LEAKY_RELU:
        return z * parameter if z <= 0 else z
    if code == ELU:
        return parameter * math.expm1(z) if z <= 0 else z
    if code == SOFTPLUS:
        return max(z, z * 0) + math.log1p(math.exp(-abs(z)))
    return z


@compiled
def _slope(code, parameter, z, h):  # type: ignore[no-untyped-def]
    """a′(z), from z and h = a(z)."""
    one = z * 0 + 1
    if code == RELU:
        return one * 0 if z <= 0 else one
    if code == TANH:
        return 1 - h * h
    if code == SIGMOID:
        return h * (1 - h)
    if code == GELU:
        density = math.exp(-0.5 * z * z) * math.sqrt(0.5 / math.pi)
        return 0.5 * (1 + math.erf(z * math.sqrt(0.5))) + z * density
    if code == SILU:
        s = 1 / (1 + math.exp(-z))
        return s * (1 + z * (1 - s))
    if code == LEAKY_RELU:
        return one * parameter if z <= 0 else one
    if code == ELU:
        return h + parameter if z <= 0 else one
    if code == SOFTPLUS:
        return 1 / (1 + math.exp(-z))
    return one


@compiled(reassoc=False)
def _log1p(x, one):  # type: ignore[no-untyped-def]
    """log(1 + x) for x in [0, 1], faster than the library's; `one` has the type of x.

    The rounding of u = 1 + x is undone by the factor (Kahan; Goldberg, What Every Computer
    Scientist Should Know About Floating-Point Arithmetic, 1991, theorem 4).
    """
    u = one + x
    return x if u == one else math.log(u) * (x / (u - one))


@compiled
def loss_of_margin(code, margin, zero, one):  # type: ignore[no-untyped-def]
    """A loss for two classes and its slope, as functions of the margin m = s·p.

    Args:
        code: Which loss, a value of `LOSS`.
        margin: m.
        zero: 0, of the type of m.
        one: Likewise.

    Returns:
        ℓ and ∂ℓ/∂m.

    Example:
        >>> loss_of_margin(LOSS["SquaredHinge"], 0.5, 0.0, 1.0)
        (0.25, -1.0)
    """
    if code in (LOGISTIC, MARGIN):
        e = math.exp(-abs(margin))
        # log(1 + exp(−m)), and −σ(−m), without overflow on either side
        slope = -(e if margin > 0 else one) / (one + e)
        if code == MARGIN:
            return margin, slope
        return (abs(margin) - margin) / (one + one) + _log1p(e, one), slope
    missing = one - margin
    if missing <= 0:
        missing = zero
    if code == HINGE:
        return missing, zero if missing == 0 else -one
    return missing * missing, -(missing + missing)


@compiled
def loss_and_slope(code, parameter, p, label, values, i, slopes, n):  # type: ignore[no-untyped-def]
    """ℓ, and ∂ℓ/∂p into a row of `slopes`: as in `gdtrain.losses`, for one example.

    Rows of arrays are named by number: to make a view of each would take longer than the rest.

    Args:
        code: Which loss, a value of `LOSS`.
        parameter: Huber's δ.
        p: (C,).
        label: Class number.
        values: (N, C), targets of a regression.
        i: Which row of `values`.
        slopes: (M, C).
        n: Which row of `slopes`, written.

    Returns:
        ℓ.

    Example:
        >>> import numpy as np
        >>> slopes, values = np.zeros((1, 2)), np.ones((1, 2))
        >>> loss_and_slope(LOSS["SquaredError"], 0.0, np.array([3.0, 1.0]), 0, values, 0, slopes, 0)
        2.0
        >>> slopes
        array([[2., 0.]])
    """
    zero = p.dtype.type(0)
    total = zero
    if code == SQUARED_ERROR:
        for c in range(p.size):
            slopes[n, c] = p[c] - values[i, c]
            total += 0.5 * slopes[n, c] * slopes[n, c]
    elif code == HUBER:
        for c in range(p.size):
            r = p[c] - values[i, c]
            if abs(r) > parameter:
                slopes[n, c] = parameter if r > 0 else -parameter
                total += parameter * (abs(r) - 0.5 * parameter)
            else:
                slopes[n, c] = r
                total += 0.5 * r * r
    elif code == CROSS_ENTROPY:
        top = p[0]
        for c in range(1, p.size):
            top = max(top, p[c])
        for c in range(p.size):
            slopes[n, c] = math.exp(p[c] - top)
            total += slopes[n, c]
        for c in range(p.size):
            slopes[n, c] /= total
        slopes[n, label] -= 1
        total = math.log(total) + top - p[label]
    elif code == ONE_HOT:
        for c in range(p.size):
            slopes[n, c] = p[c] - (c == label)
            total += 0.5 * slopes[n, c] * slopes[n, c]
    else:
        one = p.dtype.type(1)
        sign = one if label == 1 else -one
        total, slope = loss_of_margin(code, sign * p[0], zero, one)
        slopes[n, 0] = sign * slope
    return total


@compiled
def losses_and_slopes(code, parameter, predictions, labels, values, rows, slopes):  # type: ignore[no-untyped-def]
    """`loss_and_slope` of each example of a batch.

    Args:
        code: A value of `LOSS`.
        parameter: Huber's δ.
        predictions: (M, C).
        labels: (N,) class numbers, or (1,) in a regression.
        values: (N, C) targets, or (1, C) of classes.
        rows: (M,), which examples.
        slopes: (M, C), written.

    Returns:
        The sum of ℓ, in float64.

    Example:
        >>> import numpy as np
        >>> p, none, slopes = np.zeros((2, 1)), np.zeros((1, 1)), np.zeros((2, 1))
        >>> total = losses_and_slopes(
        ...     LOSS["Logistic"], 0.0, p, np.array([1, 0]), none, np.array([0, 1]), slopes)
        >>> round(total, 4), slopes.ravel()  # 2 log 2
        (1.3863, array([-0.5,  0.5]))
    """
    total = 0.0
    for m in range(rows.size):
        i = rows[m]
        label = labels[i] if labels.size > 1 else labels[0]
        total += loss_and_slope(
            code, parameter, predictions[m], label, values, i if values.shape[0] > 1 else 0,
            slopes, m,
        )  # fmt: skip
    return total


@compiled
def descend(theta, b, g, x, lr, rules, at, first):  # type: ignore[no-untyped-def]
    """The update rule on one row θ of parameters, whose gradient is g·x.

    Args:
        theta: (D,), in place.
        b: (D,), its momentum buffer, in place; not used without momentum.
        g: A number.
        x: (D,).
        lr: η.
        rules: (·, 5): momentum (below 0: none), 1 − dampening, weight decay, whether Nesterov, and
            −1 to climb or +1 to descend.
        at: Which row of `rules`.
        first: Whether b is made now, as a copy of the gradient.

    Example:
        >>> import numpy as np
        >>> theta, rule = np.array([1.0, 2.0, 3.0, 4.0]), np.array([[-1.0, 1.0, 0.0, 0.0, 1.0]])
        >>> descend(theta, theta, 1.0, np.array([1.0, 6.0, 7.0, 2.0]), 0.5, rule, 0, False)
        >>> theta
        array([ 0.5, -1. , -0.5,  3. ])
    """
    momentum, keep, weight_decay = rules[at, 0], rules[at, 1], rules[at, 2]
    g = g * rules[at, 4]
    old = momentum
    if first:
        old, keep = theta.dtype.type(0), theta.dtype.type(1)
    if momentum < 0:
        if weight_decay == 0:
            if g != 0:
                step = lr * g
                for i in range(theta.size):
                    theta[i] -= step * x[i]
        else:
            for i in range(theta.size):
                theta[i] -= lr * (g * x[i] + weight_decay * theta[i])
    elif rules[at, 3] != 0:
        for i in range(theta.size):
            d = g * x[i] + weight_decay * theta[i]
            b[i] = old * b[i] + keep * d
            theta[i] -= lr * (d + momentum * b[i])
    else:
        for i in range(theta.size):
            b[i] = old * b[i] + keep * (g * x[i] + weight_decay * theta[i])
            theta[i] -= lr * b[i]


@compiled
def polyak_share(value, square, peak, most, polyak):  # type: ignore[no-untyped-def]
    """η / η₀ of a bounded step: min(most, (f − f*) / (c ‖g‖² η₀)).

    Args:
        value: f, the objective with its penalty on the examples of the update.
        square: ‖g‖².
        peak: η₀.
        most: The largest share.
        polyak: (4,): 1/c, f*, by what the share may grow from one update to the next (0: it is
            bounded by `most` alone), and the first `most`.

    Returns:
        The share; NaN where f or g is.

    Example:
        >>> import numpy as np
        >>> polyak_share(3.0, 4.0, 1.0, 1.0, np.array([0.5, 1.0, 0.0, 1.0]))  # ½ (3 − 1) / 4
        0.25
    """
    if square == 0:
        return most
    bound = polyak[0] * max(value - polyak[1], 0.0 * value) / (square * peak)
    return most if bound >= most else bound


@compiled
def _value_and_square(loss, square, theta, widths, rule, z, h, delta):  # type: ignore[no-untyped-def]
    """f and ‖g‖² with the penalty, from ‖x‖² and what forward and backward pass have left.

    Of a layer, ‖δ hᵀ + λ W‖² = ‖δ‖² ‖h‖² + 2λ Σ_j δ_j (W h)_j + λ² ‖W‖², and W h = z − b.
    """
    value, total = loss, 0.0
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
        decay, decay_bias = float(rule[2 * layer, 2]), float(rule[2 * layer + 1, 2])
        biased = not math.isnan(rule[2 * layer + 1, 0])
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
def sweep(  # type: ignore[no-untyped-def]
    inputs, labels, values, rows, factors, peaks, theta, buffers, widths, activations, parameters,
    rule, fresh, loss, loss_parameter, losses, z, h, delta, squares, polyak, shares,
):  # fmt: skip
    """Make K updates in place.

    Args:
        inputs: (N, D).
        labels: (N,) class numbers, or (1,) in a regression.
        values: (N, C) targets, or (1, C) of classes.
        rows: (K,), which example makes which update.
        factors: (K,), the schedule's factor at each update, float64.
        peaks: (2L,), η₀ of each layer's weights and bias, float64.
        theta: (P,): W_1 (n_1·n_0), b_1 (n_1), W_2 …, in place.
        buffers: (P,) momentum in the same order, in place; (0,) where no layer has momentum.
        widths: (L+1,) n_0 … n_L.
        activations: (L,) values of `ACTIVATION`.
        parameters: (L,) of the activations: slope of leaky_relu, α of elu.
        rule: (2L, 5): momentum (below 0: none), 1 − dampening, weight decay, whether Nesterov, and
            −1 to climb or +1 to descend; for weights and bias of each layer. A layer without bias
            has NaN in place of the bias' momentum.
        fresh: (2L,), whether the momentum buffer is made at the first update.
        loss: A value of `LOSS`.
        loss_parameter: Huber's δ.
        losses: (K,), written.
        z: (Σ n_l,) room for z_l, l = 1 … L.
        h: Likewise for h_l.
        delta: Likewise for δ_l.
        squares: (N,), ‖x‖² of each example; (0,) without a bound on the step.
        polyak: (4,), as for `polyak_share`, float64; (0,): no bound on the step.
        shares: (K,), written where there is a bound: which share of η₀ each update took, float64.

    Example:
        >>> import numpy as np
        >>> theta, losses, room = np.zeros(2), np.zeros(2), [np.zeros(1) for _ in range(3)]
        >>> rule = np.array([[-1.0, 1, 0, 0, 1]] * 2)  # W and b by plain descent
        >>> sweep(np.array([[1.0], [3.0]]), np.zeros(1, np.int64), np.array([[2.0], [4.0]]),
        ...     np.array([0, 1]), np.ones(2), np.full(2, 0.1), theta, np.zeros(0), np.array([1, 1]),
        ...     np.zeros(1, np.int64), np.zeros(1), rule, np.zeros(2, np.bool_),
        ...     LOSS["SquaredError"], 0.0, losses, *room, np.zeros(0), np.zeros(0), np.zeros(0))
        >>> losses, theta  # ½·2², then W = b = 0.2 and ½(0.8 − 4)²
        (array([2.  , 5.12]), array([1.16, 0.52]))
    """
    layers = widths.size - 1
    number = theta.dtype.type  # a literal would widen the loops
    zero, one = number(0), number(1)
    n0, n1 = widths[0], widths[1]
    first = theta[: n1 * n0].reshape(n1, n0)
    first_bias = theta[n1 * n0 : n1 * n0 + n1]
    momentum_1 = buffers[: n1 * n0].reshape(n1, n0) if buffers.size else first
    momentum_bias_1 = buffers[n1 * n0 : n1 * n0 + n1] if buffers.size else first_bias
    plain = rule[0, 0] < 0 and rule[0, 2] == 0
    z1, h1, d1 = z[:n1], h[:n1], delta[:n1]
    outputs = widths[layers]
    prediction = h[h.size - outputs :]
    slopes = delta[delta.size - outputs :].reshape(1, outputs)
    ahead = max(4096 // (n0 * theta.itemsize), 1)  # examples that are fetched before their turn
    bounded = polyak.size > 0
    most = polyak[3] if bounded else 1.0
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
                        step = lr * rule[0, 4] * d1[j]
                        if step != 0:
                            for i in range(n0):
                                first[j, i] -= step * before[i]
                    else:
                        descend(
                            first[j], momentum_1[j], d1[j], before, lr, rule, 0,
                            k == 1 and fresh[0],
                        )  # fmt: skip
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
        if not math.isnan(rule[1, 0]):
            if k > 0:
                descend(
                    first_bias, momentum_bias_1, one, d1, lr_bias, rule, 1,
                    k == 1 and fresh[1],
                )  # fmt: skip
            if k < rows.size:
                for j in range(n1):
                    z1[j] += first_bias[j]
        if k == rows.size:
            break
        for j in range(n1):
            h1[j] = _activate(activations[0], parameters[0], z1[j])
        # ---- forward through the other layers
        at, unit_at = n1 * n0 + n1, n1
        for layer in range(1, layers):
            m, n = widths[layer], widths[layer + 1]
            weight = theta[at : at + n * m].reshape(n, m)
            bias = theta[at + n * m : at + n * m + n]
            below = h[unit_at - m : unit_at]
            biased = not math.isnan(rule[2 * layer + 1, 0])
            for j in range(n):
                s0 = zero
                for i in range(m):
                    s0 += weight[j, i] * below[i]
                if biased:
                    s0 += bias[j]
                z[unit_at + j] = s0
                h[unit_at + j] = _activate(activations[layer], parameters[layer], s0)
            at += n * m + n
            unit_at += n
        # ---- the loss, and δ of each layer
        label = labels[rows[k]] if labels.size > 1 else labels[0]
        losses[k] = loss_and_slope(
            loss, loss_parameter, prediction, label, values,
            rows[k] if values.shape[0] > 1 else 0, slopes, 0,
        )  # fmt: skip
        for layer in range(layers - 1, 0, -1):
            m, n = widths[layer], widths[layer + 1]
            at -= n * m + n
            unit_at -= n
            if activations[layer] != IDENTITY:
                for j in range(unit_at, unit_at + n):
                    delta[j] *= _slope(activations[layer], parameters[layer], z[j], h[j])
            weight = theta[at : at + n * m].reshape(n, m)
            d_below = delta[unit_at - m : unit_at]
            d_below[:] = zero
            for j in range(n):
                d = delta[unit_at + j]
                if d != 0:
                    for i in range(m):
                        d_below[i] += d * weight[j, i]
        if activations[0] != IDENTITY:
            for j in range(n1):
                d1[j] *= _slope(activations[0], parameters[0], z1[j], h1[j])
        # ---- the step size
        if bounded:
            square = float(squares[rows[k]])
            value, slope_2 = _value_and_square(
                float(losses[k]), square, theta, widths, rule, z, h, delta
            )
            share = polyak_share(value, slope_2, peaks[0], most, polyak)
            shares[k] = share
            if polyak[2] > 0 and share > 0:
                most = polyak[2] * share
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
            for j in range(n):
                d = delta[unit_at + j]
                descend(
                    weight[j], momentum[j], d, below, lr, rule, 2 * layer,
                    k == 0 and fresh[2 * layer],
                )  # fmt: skip
            if not math.isnan(rule[2 * layer + 1, 0]):
                descend(
                    bias, momentum_bias, one, delta[unit_at : unit_at + n], lr_bias,
                    rule, 2 * layer + 1, k == 0 and fresh[2 * layer + 1],
                )  # fmt: skip
            at += n * m + n
            unit_at += n
