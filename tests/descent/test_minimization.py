"""Where `minimize` starts, and what it says at the end."""

import json
import math

import numpy as np
import pytest
import torch

from gdtrain import minimize


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def stiff(x):
    return 0.5 * (x[0] ** 2 + 100 * x[1] ** 2)


def square(x):
    return (x**2).sum()


TABLE = {  # f, start, arguments, reason, a part of what is said
    "grown to 3e86": (square, [1.0], {"lr": 1.05, "updates": 2000}, "DIVERGED", "a lower lr"),
    "grown slowly": (square, [1.0], {"lr": 1.01, "updates": 50}, "DIVERGED", "a lower lr"),
    "a kink": (lambda x: x.abs().sum(), [1.0], {"lr": 0.3}, "STALLED", "to and fro"),
    "a line": (lambda x: x.sum(), [0.0], {"lr": 1.0}, "BUDGET", "may have no minimum"),
    "downhill faster": (lambda x: -square(x), [1.0], {"lr": 0.01}, "BUDGET", "no minimum"),
    "down to -inf": (lambda x: -square(x), [1.0], {"lr": 1.0}, "NON_FINITE", "bounded below"),
    "too long for a valley": (rosenbrock, [-1.2, 1.0], {"lr": 0.1}, "NON_FINITE", "Try lr=0.01"),
    "a saddle": (lambda x: x[0] ** 2 - x[1] ** 2, [0.0, 0.0], {"lr": 0.1}, "CONVERGED", "saddle"),
    "a constant": (lambda x: 0 * x.sum() + 5, [1.0], {"lr": 0.1}, "CONVERGED", "plateau"),
    "huge": (lambda x: 1e30 * square(x), [1.0], {"lr": 2e-31}, "CONVERGED", "‖∇f‖"),
    "huge, too long": (lambda x: 1e30 * square(x), [1.0], {"lr": 1.1e-30}, "DIVERGED", "lower lr"),
    "just above 2/λ": (stiff, [1.0, 1e-9], {"lr": 0.0201, "updates": 3000}, "DIVERGED", "lower"),
    "at 2/λ": (stiff, [0.0, 1.0], {"lr": 0.02}, "STALLED", "to and fro"),
    "just below 2/λ": (stiff, [1.0, 1.0], {"lr": 0.0199, "updates": 3000}, "CONVERGED", "‖∇f‖"),
    "cos": (lambda x: x.cos().sum(), [1.0], {"lr": 0.5}, "CONVERGED", "‖∇f‖"),
    "cos, too long": (lambda x: x.cos().sum(), [1.0], {"lr": 3.0}, "STALLED", "a lower lr"),
    "x⁴": (lambda x: (x**4).sum(), [1.0], {"lr": 0.01, "updates": 200}, "BUDGET", "If f has a m"),
    "small units": (lambda x: 1e-9 * square(x - 3), [0.0], {"lr": 1e8}, "CONVERGED", "lower tol"),
    "far away": (lambda x: square(x - 1e8), [0.0], {"lr": 0.1}, "CONVERGED", "of max(1, 2e+08)"),
    "at once": (lambda x: (x**4).sum(), [1e60], {"lr": 1e10}, "NON_FINITE", "Try lr=1e+09"),
    "out of the domain": (lambda x: square(x.log()), [3.0], {"lr": 10.0}, "NON_FINITE", "defined"),
    "not finite at x0": (lambda x: x.log().sum(), [-1.0], {"lr": 1.0}, "NON_FINITE", "elsewhere"),
    "NaN at x0": (square, [math.nan], {"lr": 0.1}, "NON_FINITE", "elsewhere"),
    "too short": (square, [1.0], {"lr": 1e-30}, "STALLED", "a larger lr"),
    "to the last digit": (lambda x: 1 + x @ x, [1.0], {"lr": 0.1, "tolerance": 0}, "CONVERGED", ""),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_end_is_told_truly(case):
    f, start, arguments, reason, words = TABLE[case]
    found = minimize(f, start, **arguments)
    assert found.stop.reason.value == reason, str(found.stop)
    assert words in str(found.stop)
    json.dumps(dict(found.stop.numbers), allow_nan=case == "NaN at x0")
    assert len(found.values) == found.updates + 1


def test_its_numbers_by_hand():
    # x halves: |∇f| = 2·2^(−t) <= 2e-6 from t = 20 on
    found = minimize(square, [1.0], lr=0.25, updates=100, tolerance=1e-6)
    norms = {"gradient_norm": pytest.approx(2.0**-19), "first_gradient_norm": 2.0}
    assert (found.updates, found.stop.numbers) == (20, {**norms, "tolerance": 1e-6})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_rounding_limit_of_a_dtype_is_convergence(dtype, momentum):
    scale = torch.tensor([1.0, 10.0], dtype=dtype)
    goal = torch.tensor([0.3, 0.7], dtype=dtype)
    found = minimize(
        lambda x: (scale * (x - goal) ** 2).sum() + 1,
        torch.tensor([10.0, 0.1], dtype=dtype),
        lr=0.04,
        momentum=momentum,
        updates=3000,
        tolerance=1e-10,
    )
    assert found.stop.reason.value == "CONVERGED", str(found.stop)
    assert (found.x - goal).abs().max() <= 30 * torch.finfo(dtype).eps
    assert found.x.dtype == dtype


def test_momentum_at_a_turning_point_goes_on():
    found = minimize(square, [1.0], lr=0.01, momentum=0.95, updates=2000)
    assert found.stop.reason.value == "CONVERGED"
    assert abs(found.x.item()) < 1e-7


# ------------------------------------------------------------ starts


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_a_complex_start_descends_in_both_parts(dtype):
    def f(z):
        return ((z - (1 + 2j)).abs() ** 2).sum() + (z.imag**4).sum()

    def g(x):
        return ((x - torch.tensor([1.0, 2.0])) ** 2).sum() + x[1] ** 4

    found = minimize(f, torch.tensor([3 - 1j], dtype=dtype), lr=0.02, updates=60)
    twin = minimize(g, [3.0, -1.0], lr=0.02, updates=60)
    assert found.x.dtype == dtype
    assert found.path.dtype == np.complex128
    np.testing.assert_allclose(found.path.view(np.float64), twin.path, rtol=1e-5)
    assert found.gradient_norm == pytest.approx(twin.gradient_norm, rel=1e-4)
    assert found.plot().axes[1].get_xlabel() == "Re x"


@pytest.mark.parametrize(
    ("start", "dtype", "shape"),
    [
        (np.float32(3), torch.float64, ()),
        (np.arange(4), torch.float64, (4,)),
        (np.ma.array([1, 2]), torch.float64, (2,)),
        ([[1, 2], [3, 4]], torch.float64, (2, 2)),
        ([torch.tensor(1.0), 2.0], torch.float64, (2,)),
        (torch.arange(3), torch.float64, (3,)),
        (torch.ones(2, requires_grad=True), torch.float32, (2,)),
        (1 + 2j, torch.complex128, ()),
        ([1, 2j], torch.complex128, (2,)),
        (np.ones(2, np.complex64), torch.complex128, (2,)),
    ],
    ids=str,
)
def test_the_type_of_a_start(start, dtype, shape):
    found = minimize(lambda x: (x.abs() ** 2).sum(), start, lr=0.25, updates=1)
    assert (found.x.dtype, tuple(found.x.shape)) == (dtype, shape)
    np.testing.assert_allclose(found.path[1], 0.5 * found.path[0])


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (np.ma.array([1.0, 2.0], mask=[0, 1]), "masked"),
        ([], "at least one number"),
        (torch.ones(0, 2), "at least one number"),
        ("three", "x0 must be numbers"),
        ([[1.0], [1.0, 2.0]], "equal lengths"),
        (None, "x0 must be numbers"),
    ],
    ids=str,
)
def test_a_start_that_is_none_is_refused(start, words):
    with pytest.raises(ValueError, match=words):
        minimize(square, start, lr=0.1)


def test_a_complex_value_is_refused():
    with pytest.raises(ValueError, match="one real number"):
        minimize(lambda z: (z**2).sum(), [1j], lr=0.1)
