"""Duality gaps: by hand, as lower bounds, tight at exact solvers' optima."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import loss_value
from scipy.optimize import minimize
from scipy.sparse import csr_array
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from torch import nn

from gdtrain import GD
from gdtrain.convex.certificate import certify, duality_gap
from gdtrain.convex.problem import LinearProblem, NoCertificateError, linear_layer
from gdtrain.data.sparse import SparseInputs
from gdtrain.losses import (
    CrossEntropy,
    Hinge,
    Huber,
    Logistic,
    Loss,
    OneHotSquaredError,
    SquaredError,
    SquaredHinge,
)
from gdtrain.models import MLP, Linear
from gdtrain.objective import Objective

LOSSES = [
    SquaredError(),
    Huber(0.7),
    Logistic(),
    Hinge(),
    SquaredHinge(),
    CrossEntropy(),
    OneHotSquaredError(),
]


def objective(loss, w, b, x, y, decay, bias_decay=0.0):
    """P, in plain Python."""
    bias = np.zeros(len(w)) if b is None else b
    total = sum(loss_value(loss, w @ xi + bias, yi) for xi, yi in zip(x, y, strict=True)) / len(x)
    return total + 0.5 * decay * (w**2).sum() + 0.5 * bias_decay * (bias**2).sum()


def problem_of(loss, rng, n=12, d=3):
    """Inputs, targets and C."""
    x = rng.normal(size=(n, d)) + rng.normal(size=d)
    if loss.task == "regression":
        return x, rng.normal(size=(n, 2)) + 1, 2
    if loss.task == "binary":
        return x, (x @ rng.normal(size=d) + rng.normal(size=n) > 0).astype(np.int64), 1
    return x, rng.integers(0, 3, size=n), 3


# ---------------------------------------------------------------------- by hand


def test_ridge_with_a_free_intercept_by_hand():
    # b = 1 is best; then P = ½(w − 1)² + ½w², least at w = ½: ¼. At 0: ½(0 + 4)/2 = 1.
    gap = duality_gap([[0.0]], [0.0], [[-1.0], [1.0]], [0.0, 2.0], SquaredError(), 1.0)
    assert gap.primal == 1.0
    assert gap.dual == pytest.approx(0.25, abs=1e-12)
    assert gap.gap == pytest.approx(0.75, abs=1e-12)
    assert gap.relative_gap == pytest.approx(0.75, abs=1e-12)
    at_the_minimum = duality_gap([[0.5]], [1.0], [[-1.0], [1.0]], [0.0, 2.0], SquaredError(), 1.0)
    assert at_the_minimum.gap < 1e-15


def test_svm_by_hand():
    # x = ±1, s = ±1, λ = 4: P = max(0, 1 − w) + 2w², least at w = ¼: ⅞.
    gap = duality_gap([[0.0]], [0.0], [[1.0], [-1.0]], [1, 0], Hinge(), 4.0)
    assert gap.primal == 1.0
    assert gap.dual == pytest.approx(0.875, abs=1e-9)


@pytest.mark.parametrize(
    ("loss", "y", "alpha", "bound"),
    [
        # D = −mean ℓ* − A²/(2λ) with λ = 1, x = ±1
        (SquaredError(), [1.0, -1.0], [[-0.5], [0.5]], (0.5 - 0.125) - 0.125),
        (Huber(0.5), [1.0, -1.0], [[-0.5], [0.5]], (0.5 - 0.125) - 0.125),
        (Logistic(), [1, 0], [[-0.5], [0.5]], math.log(2) - 0.125),
        (Hinge(), [1, 0], [[-0.5], [0.5]], 0.5 - 0.125),
        (SquaredHinge(), [1, 0], [[-0.5], [0.5]], (0.5 - 0.0625) - 0.125),
        # p = (¾, ¼) for class 0 at x = 1, and (¼, ¾) for class 1 at x = −1; A = (−¼, ¼)
        (
            CrossEntropy(),
            [0, 1],
            [[-0.25, 0.25], [0.25, -0.25]],
            -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - 0.0625,
        ),
        (OneHotSquaredError(), [0, 1], [[-0.5, 0.0], [0.0, -0.5]], 0.5 - 0.125 - 0.125),
    ],
)
def test_the_dual_by_hand(loss, y, alpha, bound):
    alpha = torch.tensor(alpha, dtype=torch.float64)
    problem = LinearProblem(
        torch.tensor([[1.0], [-1.0]]), torch.tensor(y), loss, alpha.shape[1], 1.0, bias=False
    )
    # A of the one-hot case: (−½·1, −½·−1)/2 = (−¼, ¼)
    if isinstance(loss, OneHotSquaredError):
        bound = 0.5 - 0.125 - 0.0625
    bound_found = problem.lower_bound(alpha, problem.gathered(alpha))
    assert bound_found == pytest.approx(bound, abs=1e-15)


def test_decay_on_the_bias_by_hand():
    # One example x = 0, y = 1: P = ½(b − 1)² + ½b², least ¼ at b = ½.
    gap = duality_gap([[0.0]], [0.0], [[0.0]], [1.0], SquaredError(), 1.0, bias_decay=1.0)
    assert gap.primal == 0.5
    assert gap.dual == pytest.approx(0.25, abs=1e-12)


def test_one_class_alone_has_the_minimum_zero_and_says_so():
    for loss in (Logistic(), Hinge(), SquaredHinge()):
        gap = duality_gap([[0.0]], [0.0], [[1.0], [2.0]], [1, 1], loss, 1.0)
        assert gap.dual == 0.0
        assert gap.relative_gap == 1.0


def test_a_class_without_examples():
    x = np.random.default_rng(0).normal(size=(20, 2))
    y = np.array([0, 2] * 10)
    gap = duality_gap(np.zeros((3, 2)), np.zeros(3), x, y, CrossEntropy(), 0.1)
    two = duality_gap(np.zeros((2, 2)), np.zeros(2), x, y // 2, CrossEntropy(), 0.1, tolerance=0)
    assert gap.primal == pytest.approx(math.log(3))
    # The third class may have any slopes, but costs nothing: the same minimum.
    assert gap.dual == pytest.approx(two.dual, rel=1e-3)
    assert gap.dual <= two.dual + 1e-9


# ---------------------------------------------------------------------- lower bounds


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("bias", ["none", "free", "decayed"])
@given(seed=st.integers(0, 10**6), decay=st.floats(1e-3, 10.0), scale=st.floats(0.0, 10.0))
@settings(max_examples=15, deadline=None)
def test_weak_duality_and_strong(loss, bias, seed, decay, scale):
    rng = np.random.default_rng(seed)
    x, y, outputs = problem_of(loss, rng)
    bias_decay = 0.3 if bias == "decayed" else 0.0

    def point(size):
        b = None if bias == "none" else size * rng.normal(size=outputs)
        return size * rng.normal(size=(outputs, x.shape[1])), b

    w, b = point(scale)
    gap = duality_gap(w, b, x, y, loss, decay, bias_decay, tolerance=1e-9)
    assert gap.primal == pytest.approx(objective(loss, w, b, x, y, decay, bias_decay), rel=1e-12)
    assert gap.gap >= 0
    for size in (0.0, 0.1, 1.0, 3.0):
        other = point(size)
        assert gap.dual <= objective(loss, *other, x, y, decay, bias_decay) + 1e-12
    quick = duality_gap(w, b, x, y, loss, decay, bias_decay, work=1.0)
    assert 0 <= quick.dual <= gap.dual + 1e-9


def flat_objective(loss, x, y, outputs, decay):
    def evaluate(theta):
        theta = torch.tensor(theta, requires_grad=True)
        w = theta[: outputs * x.shape[1]].view(outputs, -1)
        z = torch.tensor(x) @ w.T + theta[outputs * x.shape[1] :]
        made = loss(z, torch.tensor(y)).mean() + 0.5 * decay * w.square().sum()
        made.backward()
        return made.item(), theta.grad.numpy()

    return evaluate


@pytest.mark.parametrize(
    "loss",
    [loss for loss in LOSSES if not isinstance(loss, Hinge)],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.parametrize("decay", [1e-3, 1.0])
def test_the_bound_is_the_minimum_that_scipy_finds(loss, decay):
    rng = np.random.default_rng(1)
    x, y, outputs = problem_of(loss, rng, n=60, d=4)
    evaluate = flat_objective(loss, x, y, outputs, decay)
    found = minimize(evaluate, np.zeros(outputs * 5), jac=True, method="BFGS", tol=1e-10)
    w, b = found.x[: outputs * 4].reshape(outputs, 4), found.x[outputs * 4 :]
    assert duality_gap(w, b, x, y, loss, decay).relative_gap < 1e-6
    start = duality_gap(0 * w, 0 * b, x, y, loss, decay, tolerance=1e-12)
    excess = start.primal - found.fun
    assert excess - 1e-12 <= start.gap <= 1.002 * excess


# ---------------------------------------------------------------------- scikit-learn's optima


def standard(load):
    x, y = load(return_X_y=True)
    return StandardScaler().fit_transform(x), y


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("load", [load_breast_cancer, load_wine, load_digits])
def test_logistic_and_softmax_regression_of_scikit_learn(load, decay, intercept):
    x, y = standard(load)
    two = y.max() == 1
    exact = LogisticRegression(
        C=1 / (decay * len(x)),
        solver="newton-cholesky",
        tol=1e-10,
        max_iter=1000,
        fit_intercept=intercept,
    ).fit(x, y)
    b = exact.intercept_ if intercept else None
    loss = Logistic() if two else CrossEntropy()
    gap = duality_gap(exact.coef_, b, x, y, loss, decay)
    assert gap.relative_gap < 1e-9
    away = duality_gap(1.01 * exact.coef_, b, x, y, loss, decay)
    assert away.gap == pytest.approx(away.primal - gap.primal, rel=2e-2)
    assert away.dual <= gap.primal * (1 + 1e-12)


@pytest.mark.parametrize("decay", [1e-3, 1e-2, 1.0])
def test_support_vector_machines_of_scikit_learn(decay):
    x, y = standard(load_breast_cancer)
    exact = SVC(kernel="linear", C=1 / (decay * len(x)), tol=1e-9).fit(x, y)
    gap = duality_gap(exact.coef_, exact.intercept_, x, y, Hinge(), decay)
    assert gap.relative_gap < 1e-6  # what libsvm leaves
    far = duality_gap(0 * exact.coef_, 0 * exact.intercept_, x, y, Hinge(), decay)
    assert far.dual == pytest.approx(gap.dual, rel=1e-9)


@pytest.mark.parametrize(("loss", "name"), [(Hinge(), "hinge"), (SquaredHinge(), "squared_hinge")])
@pytest.mark.parametrize("intercept", [True, False])
def test_linear_svc_of_scikit_learn(loss, name, intercept):
    """LinearSVC decays its intercept like the weights."""
    x, y = standard(load_wine)
    y = (y == 1).astype(int)
    decay = 0.05
    exact = LinearSVC(
        C=1 / (decay * len(x)), loss=name, fit_intercept=intercept, tol=1e-10, max_iter=10**6
    ).fit(x, y)
    b = exact.intercept_ if intercept else None
    gap = duality_gap(exact.coef_, b, x, y, loss, decay, bias_decay=decay if intercept else 0.0)
    assert gap.relative_gap < 1e-7


# ---------------------------------------------------------------------- passes over the data


@pytest.mark.parametrize("loss", [Logistic(), Hinge()], ids=["logistic", "hinge"])
def test_many_examples_in_pieces_and_near_the_margin(loss, monkeypatch):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3000, 5))
    y = (x @ rng.normal(size=5) + 0.5 * rng.normal(size=3000) > 0.3).astype(np.int64)
    w, b = np.zeros((1, 5)), np.zeros(1)
    whole = duality_gap(w, b, x, y, loss, 1e-2, tolerance=1e-9)
    monkeypatch.setattr("gdtrain.convex.problem._RESIDENT", 8 * 5 * 700)
    monkeypatch.setattr("gdtrain.convex.search._WHOLE", 0)
    pieces = duality_gap(w, b, x, y, loss, 1e-2, tolerance=1e-9)
    assert pieces.primal == pytest.approx(whole.primal, rel=1e-14)
    # From far away, a bound as good as 10⁻³ of the way is enough.
    assert pieces.gap == pytest.approx(whole.gap, rel=2e-3)
    # From near by, the bound is as good as asked.
    exact = (
        SVC(kernel="linear", C=100 / 3000, tol=1e-8).fit(x, y)
        if isinstance(loss, Hinge)
        else LogisticRegression(C=100 / 3000, tol=1e-10).fit(x, y)
    )
    near = duality_gap(exact.coef_, exact.intercept_, x, y, loss, 1e-2)
    assert near.relative_gap < 1e-6
    assert near.dual >= pieces.dual - 1e-9


def test_sparse_rows_give_the_same():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(50, 6)) * (rng.random((50, 6)) < 0.3)
    y = torch.tensor(rng.normal(size=50))
    w, b = torch.tensor(rng.normal(size=(1, 6))), torch.zeros(1, dtype=torch.float64)
    gaps = [
        certify(LinearProblem(inputs, y, SquaredError(), 1, 0.1), w, b)
        for inputs in (
            torch.tensor(x),
            SparseInputs.from_scipy(csr_array(x), dtype=torch.float64),
        )
    ]
    assert gaps[0].primal == pytest.approx(gaps[1].primal, rel=1e-15)
    assert gaps[0].dual == pytest.approx(gaps[1].dual, rel=1e-12)


def test_parameters_of_any_type_are_taken_as_they_are_and_computed_in_float64():
    rng = np.random.default_rng(5)
    x, y, _ = problem_of(Logistic(), rng, n=40)
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.tensor(rng.normal(size=(1, 3)), dtype=dtype)
        gap = duality_gap(w, torch.zeros(1, dtype=dtype), x, y, Logistic(), 0.1)
        expected = objective(Logistic(), w.double().numpy(), np.zeros(1), x, y, 0.1)
        assert gap.primal == pytest.approx(expected, rel=1e-14)


def test_a_bound_that_is_known_is_kept():
    x, y = torch.tensor([[1.0]]), torch.tensor([1.0])
    problem = LinearProblem(x, y, SquaredError(), 1, 1.0, bias=False)
    gap = certify(problem, torch.zeros(1, 1), work=1.0, lower=0.25 - 1e-9)
    assert gap.dual == 0.25 - 1e-9


@pytest.mark.parametrize("loss", [Logistic(), Hinge(), CrossEntropy()], ids=repr)
def test_work_bounds_a_search_whatever_the_clock_and_it_goes_on(loss, monkeypatch):
    """Passes are counted: the same answers at any speed, and from the state of a search."""
    rng = np.random.default_rng(3)
    x, y, outputs = problem_of(loss, rng)
    x, y = (torch.from_numpy(np.asarray(part)) for part in (x, y))
    w, b = torch.zeros(outputs, x.shape[1]), torch.zeros(outputs)

    def searches(speed, reload):
        now = iter(range(10**6))
        clock = "gdtrain.convex.certificate.time.perf_counter"
        monkeypatch.setattr(clock, lambda: speed * next(now))
        problem = LinearProblem(x, y, loss, outputs, 0.01)
        found = []
        for work in (3.0, 8.0, 8.0, math.inf):
            if reload:
                state = problem.state_dict()
                problem = LinearProblem(x, y, loss, outputs, 0.01)
                problem.load_state_dict(state)
            made = certify(problem, w, b, tolerance=1e-9, work=work)
            found.append((made.primal, made.dual, made.gap, made.work))
        return found

    slow = searches(1.0, False)
    assert searches(1e-4, False) == searches(1e4, True) == slow
    whole = slow[-1][3]
    for (*_, spent), work in zip(slow[:3], (3.0, 8.0, 8.0), strict=True):
        assert spent <= work + 25  # a step of Newton's is not left in the middle
    assert whole + sum(row[3] for row in slow[:3]) > 11  # it had more to do
    assert slow[0][1] < slow[-1][1]
    for work in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"work must lie in \(0, ∞\]. Received: work="):
            certify(LinearProblem(x, y, loss, outputs, 0.01), w, b, work=work)


# ---------------------------------------------------------------------- least squares


@pytest.mark.parametrize("intercept", [True, False])
def test_least_squares_without_decay(intercept):
    rng = np.random.default_rng(6)
    x = rng.normal(size=(30, 4)) * [1, 100, 0.01, 0]  # badly scaled, and a column of zeros
    y = rng.normal(size=(30, 2)) + 1
    features = np.c_[x, np.ones(30)] if intercept else x
    best = 0.5 * ((features @ np.linalg.lstsq(features, y, rcond=None)[0] - y) ** 2).sum() / 30
    w, b = rng.normal(size=(2, 4)), rng.normal(size=2) if intercept else None
    gap = duality_gap(w, b, x, y, SquaredError(), weight_decay=0.0)
    assert gap.primal == pytest.approx(objective(SquaredError(), w, b, x, y, 0.0), rel=1e-12)
    assert gap.dual == pytest.approx(best, abs=1e-9 * gap.primal)


# ---------------------------------------------------------------------- what has no certificate


def test_what_has_no_certificate_says_why():
    x, y = torch.ones(3, 2), torch.tensor([0, 1, 1])

    class Own(Loss):
        task = "binary"

    with pytest.raises(NoCertificateError, match="no conjugate of Own"):
        LinearProblem(x, y, Own(), 1, 0.1)
    with pytest.raises(NoCertificateError, match="without weight decay on the weights"):
        LinearProblem(x, y, Logistic(), 1, 0.0)
    with pytest.raises(NoCertificateError, match="up to 1024 features"):
        LinearProblem(torch.ones(3, 1025), y, SquaredError(), 1, 0.0)
    with pytest.raises(NoCertificateError, match="not linear"):
        linear_layer(MLP((2,), 1))
    with pytest.raises(NoCertificateError, match="not linear"):
        linear_layer(nn.Conv2d(1, 1, 1))
    model = Linear((2,), 1)
    objective = Objective(model, Logistic(), x, y)
    with pytest.raises(NoCertificateError, match="decoupled"):
        LinearProblem.of(objective, torch.optim.AdamW(model.parameters()))
    with pytest.raises(NoCertificateError, match="maximises"):
        LinearProblem.of(objective, GD(model.parameters(), weight_decay=1.0, maximize=True))
    with pytest.raises(NoCertificateError, match="not trained"):
        LinearProblem.of(objective, GD([model.linear.weight], weight_decay=1.0))


def test_values_out_of_range():
    x, y = torch.ones(3, 2), torch.ones(3)
    with pytest.raises(ValueError, match=r"one target for each .* 3 examples and 2 targets"):
        LinearProblem(x, y[:2], SquaredError(), 1, 0.1)
    for decay in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight_decay must be a number in"):
            LinearProblem(x, y, SquaredError(), 1, decay)
        with pytest.raises(ValueError, match="bias_decay must be a number in"):
            LinearProblem(x, y, SquaredError(), 1, 0.1, bias_decay=decay)
    with pytest.raises(ValueError, match="Expected a bias"):
        certify(LinearProblem(x, y, SquaredError(), 1, 0.1), torch.zeros(1, 2))


def test_decays_come_from_the_optimizers_groups():
    model = Linear((2,), 1)
    objective = Objective(model, Logistic(), torch.ones(3, 2), torch.tensor([0, 1, 1]))
    groups = [
        {"params": [model.linear.bias], "weight_decay": 0.2},
        {"params": [model.linear.weight], "weight_decay": 0.5},
    ]
    problem = LinearProblem.of(objective, GD(groups))
    assert (problem.weight_decay, problem.bias_decay, problem.balances) == (0.5, 0.2, False)


def test_parameters_that_are_not_finite_have_no_bound():
    gap = duality_gap([[math.nan]], None, [[1.0]], [1.0], SquaredError(), 1.0)
    assert gap.gap == math.inf
    assert gap.relative_gap == math.inf
