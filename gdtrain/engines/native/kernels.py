"""The pieces of the compiled loops, by Numba: losses, activations and the update rule.

D features, C outputs, N examples, M of them in a pass. What `gdtrain.losses`,
`gdtrain.models.activations` and `gdtrain.rules` say is said here again, for one example, one unit
and one row of numbers; tests hold the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray  # type: ignore[attr-defined]
from numba.core import cgutils, types
from numba.extending import intrinsic

from gdtrain.engines.native import arguments
from gdtrain.engines.native.arguments import (
    CROSS_ENTROPY,
    ELU,
    GELU,
    HINGE,
    HUBER,
    LEAKY_RELU,
    LOGISTIC,
    MARGIN,
    ONE_HOT,
    OWN,
    RELU,
    SIGMOID,
    SILU,
    SOFTPLUS,
    SQUARED_ERROR,
    TANH,
    Rule,
)

__all__ = [
    "activate",
    "bounded_share",
    "compiled",
    "descend",
    "loss_and_slope",
    "loss_of_margin",
    "losses_and_slopes",
    "own_activation",
    "own_loss",
    "rule_of",
    "slope_of",
]


def compiled(function: Callable[..., Any] | None = None, *, reassoc: bool = True) -> Any:
    """Compile for this processor, and keep it on disk for the next process where that can be.

    With `reassoc`, sums may be formed in another order, in vector registers.
    """
    if function is None:
        return partial(compiled, reassoc=reassoc)
    # Not nnan, ninf: an infinite loss must stay one.
    freedoms = {"contract", "arcp", "afn", "nsz", *(["reassoc"] if reassoc else [])}
    options: dict[str, Any] = {"fastmath": freedoms, "error_model": "numpy", "nogil": True}
    try:
        made = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for it can be written
        return numba.njit(**options)(function)
    with suppress(OSError):
        _forget_stale(Path(made.stats.cache_path), function)
    return made


def _forget_stale(folder: Path, function: Callable[..., Any]) -> None:
    """Remove what was compiled before these files changed: Numba looks at the function's own."""
    changed = max(Path(source).stat().st_mtime for source in (__file__, arguments.__file__))
    stem = function.__module__.rpartition(".")[2]
    for index in folder.glob(f"{stem}.{function.__name__}-*.nbi"):
        if index.stat().st_mtime < changed:
            index.unlink(missing_ok=True)


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


def _at(context, builder, kind, array, place):  # type: ignore[no-untyped-def]
    """The address of an entry of an array."""
    made = context.make_array(kind)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, kind, made, place)


def _function(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
    """Call the function at an address: numbers of one type to one of the same."""
    number = context.get_value_type(signature.return_type)
    function = ir.FunctionType(number, [number] * (len(arguments) - 1))
    pointer = builder.inttoptr(arguments[0], function.as_pointer())
    return builder.call(pointer, arguments[1:])


def _call_value(context, address, z):  # type: ignore[no-untyped-def]
    """a(z) of a user's activation."""
    return z(types.intp, z), _function


def _call_slope(context, address, z, h):  # type: ignore[no-untyped-def]
    """a′(z, h) of a user's activation."""
    return z(types.intp, z, z), _function


def _call_loss(context, address, p, label, targets, i, slopes, n):  # type: ignore[no-untyped-def]
    """The kernel of a user's loss at an address, which reads p and targets[i], writes slopes[n]."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        number = context.get_value_type(signature.return_type)
        whole = context.get_value_type(types.intp)
        zero = context.get_constant(types.intp, 0)
        address, p, label, targets, i, slopes, n = arguments
        kinds = signature.args
        size = context.make_array(kinds[1])(context, builder, p).nitems
        pointers = [number.as_pointer()] * 2
        function = ir.FunctionType(number, [number.as_pointer(), whole, whole, *pointers])
        return builder.call(
            builder.inttoptr(address, function.as_pointer()),
            [
                _at(context, builder, kinds[1], p, [zero]),
                size,
                label,
                _at(context, builder, kinds[3], targets, [i, zero]),
                _at(context, builder, kinds[5], slopes, [n, zero]),
            ],
        )

    given = (types.intp, p, types.intp, targets, types.intp, slopes, types.intp)
    return p.dtype(*given), generate


call_value: Any = intrinsic(_call_value)
call_slope: Any = intrinsic(_call_slope)
call_loss: Any = intrinsic(_call_loss)


def own_loss(kernel: Callable[..., Any], dtype: Any) -> Any:
    """A user's loss (`gdtrain.losses.Loss.native`) as a function of C's with an `address`."""
    number = _number(dtype)
    pointer, inner = types.CPointer(number), numba.njit(error_model="numpy", nogil=True)(kernel)

    @numba.cfunc(number(pointer, types.intp, types.intp, pointer, pointer))
    def outer(p, size, label, y, slope):  # type: ignore[no-untyped-def]
        return inner(carray(p, size), label, carray(y, size), carray(slope, size))

    return outer


def own_activation(value: Callable[..., Any], slope: Callable[..., Any], dtype: Any) -> Any:
    """A user's a(z) and a′(z, h) as two functions of C's, each with an `address`."""
    number = _number(dtype)
    options: dict[str, Any] = {"error_model": "numpy", "nogil": True}
    a, s = (numba.njit(**options)(function) for function in (value, slope))

    @numba.cfunc(number(number))
    def activate(z):  # type: ignore[no-untyped-def]
        return a(z)

    @numba.cfunc(number(number, number))
    def differentiate(z, h):  # type: ignore[no-untyped-def]
        return s(z, h)

    return activate, differentiate


def _number(dtype: Any) -> Any:
    return types.float32 if "32" in str(dtype) else types.float64


@compiled
def activate(code, parameter, z):  # type: ignore[no-untyped-def]
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
def slope_of(code, parameter, z, h):  # type: ignore[no-untyped-def]
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
    """ℓ and ∂ℓ/∂m of a loss for two classes; `zero` and `one` have the type of m = s·p."""
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
def loss_and_slope(loss, p, label, targets, i, slopes, n):  # type: ignore[no-untyped-def]
    """ℓ, and ∂ℓ/∂p into a row of `slopes`: as in `gdtrain.losses`, for one example.

    Rows of arrays are named by number: to make a view of each would take longer than the rest.
    """
    code, parameter, zero = loss.code, loss.parameter, p.dtype.type(0)
    total = zero
    if code == SQUARED_ERROR:
        for c in range(p.size):
            slopes[n, c] = p[c] - targets[i, c]
            total += 0.5 * slopes[n, c] * slopes[n, c]
    elif code == HUBER:
        for c in range(p.size):
            r = p[c] - targets[i, c]
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
    elif code == OWN:
        total = call_loss(loss.address, p, label, targets, i, slopes, n)
    else:
        one = p.dtype.type(1)
        sign = one if label == 1 else -one
        total, slope = loss_of_margin(code, sign * p[0], zero, one)
        slopes[n, 0] = sign * slope
    return total


@compiled
def losses_and_slopes(loss, predictions, labels, targets, rows, slopes):  # type: ignore[no-untyped-def]
    """The float64 sum of `loss_and_slope` of the M examples `rows`; writes `slopes` (M, C)."""
    total = 0.0
    for m in range(rows.size):
        i = rows[m]
        label = labels[i] if labels.size > 1 else labels[0]
        total += loss_and_slope(
            loss, predictions[m], label, targets, i if targets.shape[0] > 1 else 0, slopes, m,
        )  # fmt: skip
    return total


@compiled
def rule_of(rules, at):  # type: ignore[no-untyped-def]
    """Of one tensor, from a `Rule` of arrays."""
    return Rule(
        rules.present[at], rules.momentum[at], rules.keep[at], rules.weight_decay[at],
        rules.nesterov[at], rules.sign[at], rules.fresh[at],
    )  # fmt: skip


@compiled
def descend(theta, b, g, x, lr, rule, first):  # type: ignore[no-untyped-def]
    """The update rule on one row θ (D,) of parameters, whose gradient is g·x; b is its momentum.

    `first`: of the sweep, where a fresh buffer is made.
    """
    momentum, keep, weight_decay = rule.momentum, rule.keep, rule.weight_decay
    g = g * rule.sign
    old = momentum
    if first and rule.fresh:
        old, keep = theta.dtype.type(0), theta.dtype.type(1)
    if momentum == 0:
        if weight_decay == 0:
            if g != 0:
                step = lr * g
                for i in range(theta.size):
                    theta[i] -= step * x[i]
        else:
            for i in range(theta.size):
                theta[i] -= lr * (g * x[i] + weight_decay * theta[i])
    elif rule.nesterov:
        for i in range(theta.size):
            d = g * x[i] + weight_decay * theta[i]
            b[i] = old * b[i] + keep * d
            theta[i] -= lr * (d + momentum * b[i])
    else:
        for i in range(theta.size):
            b[i] = old * b[i] + keep * (g * x[i] + weight_decay * theta[i])
            theta[i] -= lr * b[i]


@compiled
def bounded_share(value, square, total, peak, most, bound):  # type: ignore[no-untyped-def]
    """η / η₀ of a step, as `gdtrain.step_sizes.Bound` says; `total` is Σ‖g‖² with this `square`."""
    if square == 0:
        return most if most < np.inf and bound.reach == np.inf else 0.0
    share = bound.inverse * max(value - bound.least, 0.0 * value) / (square * peak)
    reach = bound.reach / (math.sqrt(total) * peak)
    if share > reach:
        share = reach
    return most if share >= most else share
