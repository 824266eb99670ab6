"""Steps bounded by the loss, ‖g‖² and the way travelled, in every engine, against a plain loop."""

import copy
import itertools
import math

import pytest
import torch
from scipy import sparse
from torch import nn

from gdtrain import SGD
from gdtrain.data.sparse import SparseInputs
from gdtrain.descent.preparation import parameter_groups
from gdtrain.engines import Compiled, Eager, Native
from gdtrain.losses import CrossEntropy, Hinge, Huber, Logistic, SquaredError
from gdtrain.models import MLP, Linear
from gdtrain.objective import Objective
from gdtrain.rules import descend_
from gdtrain.step_sizes import PolyakDoG, StochasticPolyak

N, D = 40, 9
RULES = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.8, "weight_decay": 0.05},
    {"momentum": 0.5, "dampening": 0.2},
]
TASKS = {
    "cross-entropy": (CrossEntropy(), 3, "classes"),
    "logistic": (Logistic(), 1, "binary"),
    "hinge": (Hinge(), 1, "binary"),
    "squared error": (SquaredError(), 2, "numbers"),
    "huber": (Huber(0.5), 1, "numbers"),
}


def data(kind, outputs, is_sparse=False):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    if is_sparse:
        x = x.clamp_min(0)
    if kind == "numbers":
        y = torch.randn(N, outputs, generator=generator, dtype=torch.float64)
        return x, y if outputs > 1 else y[:, 0]
    return x, torch.randint(0, 2 if kind == "binary" else outputs, (N,), generator=generator)


def by_hand(model, loss, x, y, indices, factors, peak, rule, c, f_star=0.0, growth=0, own=None):
    """Autograd and the formula, one update after the other; (losses, η, parameters)."""
    model = copy.deepcopy(model)
    params = list(model.parameters())
    decays = [rule.get("weight_decay", 0.0) if p.ndim > 1 else 0.0 for p in params]
    buffers = [None for _ in params]
    losses, rates, most = [], [], peak
    for rows, factor in zip(indices, factors.tolist(), strict=True):
        value = loss(model(x[rows]), y[rows]).mean()
        gradient = torch.autograd.grad(value, params)
        with torch.no_grad():
            f = value + sum(0.5 * a * p.square().sum() for a, p in zip(decays, params, strict=True))
            d = [g + a * p for g, a, p in zip(gradient, decays, params, strict=True)]
            square = sum(t.square().sum() for t in d)
            eta = most
            if square > 0:
                eta = min(most, float((f - f_star).clamp_min(0) / (c * square)))
            if growth and eta > 0:
                most = growth * eta
            if own is not None:
                eta = own(params, float(f), float(square))
            losses.append(value.item())
            rates.append(eta * factor)
            for i, p in enumerate(params):
                buffer = buffers[i : i + 1]
                options = {k: v for k, v in rule.items() if k != "weight_decay"}
                descend_(
                    [p.data],
                    [gradient[i]],
                    buffer,
                    lr=eta * factor,
                    weight_decay=decays[i],
                    **options,
                )
                buffers[i] = buffer[0]
    number = torch.float64
    return (
        torch.tensor(losses, dtype=number),
        torch.tensor(rates, dtype=number),
        [p.detach() for p in params],
    )


def made_by(engine, model, loss, x, y, indices, factors, peak, rule, step_size, cuts=()):
    model = copy.deepcopy(model)
    optimizer = SGD(parameter_groups(model), step_size=step_size, **rule)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak
    optimizer.batch_fraction = indices.shape[1] / N
    sweep = engine(Objective(model, loss, x, y), optimizer)
    losses, rates = [], []
    for a, b in itertools.pairwise([0, *cuts, len(indices)]):
        losses.append(sweep(indices[a:b], factors[a:b], a))
        rates.append(sweep.rates)
    return torch.cat(losses), torch.cat(rates), [p.detach() for p in model.parameters()]


def plan(batch, updates=300):
    generator = torch.Generator().manual_seed(5)
    indices = torch.randint(0, N, (updates, batch), generator=generator)
    return indices, torch.linspace(1, 0.2, updates, dtype=torch.float64)


def assert_same(found, expected, tolerance):
    for a, b in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("engine", [Native, Eager])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_a_bounded_step_is_that_of_the_formula(task, rule, batch, engine):
    loss, outputs, kind = TASKS[task]
    x, y = data(kind, outputs)
    torch.manual_seed(0)
    hidden, activation = [5] * (batch > 1), "relu"
    if task == "cross-entropy":
        hidden, activation = [6, 5], "tanh"
    model = MLP((D,), outputs, hidden=hidden, activation=activation).double()
    indices, factors = plan(batch, 120)
    peak = 0.3 if "momentum" in rule else 2.0
    step_size = StochasticPolyak(c=1.0, f_star=0.01)
    expected = by_hand(model, loss, x, y, indices, factors, peak, rule, 1.0, 0.01)
    if "momentum" not in rule:
        assert (expected[1] < 0.999 * peak * factors).any()  # the bound is at work
    found = made_by(engine, model, loss, x, y, indices, factors, peak, rule, step_size)
    assert_same(found, expected, 1e-6)  # long steps magnify rounding


@pytest.mark.parametrize("engine", [Native, Eager])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_smoothed_bound_grows_by_a_power_of_the_share_of_examples_and_may_be_cut(batch, engine):
    x, y = data("classes", 3)
    torch.manual_seed(0)
    model = Linear((D,), 3).double()
    indices, factors = plan(batch)
    arguments = (model, CrossEntropy(), x, y, indices, factors, 0.3, {})
    expected = by_hand(*arguments, 0.5, growth=2 ** (batch / N))
    whole = made_by(engine, *arguments, StochasticPolyak(c=0.5, smoothing=2.0))
    assert_same(whole, expected, 1e-9)
    cut = made_by(engine, *arguments, StochasticPolyak(c=0.5, smoothing=2.0), cuts=(1, 50, 51))
    for a, b in zip((*cut[:2], *cut[2]), (*whole[:2], *whole[2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("rule", RULES[:3], ids=str)
@pytest.mark.parametrize("task", ["cross-entropy", "logistic", "squared error"])
def test_sparse_inputs(task, rule, batch):
    loss, outputs, kind = TASKS[task]
    x, y = data(kind, outputs, is_sparse=True)
    torch.manual_seed(0)
    model = Linear((D,), outputs).double()
    indices, factors = plan(batch)
    rows = SparseInputs.from_scipy(sparse.csr_matrix(x.numpy()), None, torch.float64)
    arguments = (indices, factors, 0.5, rule)
    expected = by_hand(model, loss, x, y, *arguments, 0.5)
    found = made_by(Native, model, loss, rows, y, *arguments, StochasticPolyak(c=0.5))
    assert_same(found, expected, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "smoothing"), [(RULES[2], None), (RULES[0], 2.0)], ids=str)
def test_compiled(rule, smoothing):
    x, y = data("classes", 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    indices, factors = plan(4)
    growth = 0 if smoothing is None else smoothing ** (4 / N)
    arguments = (model, CrossEntropy(), x, y, indices, factors, 0.5, rule)
    expected = by_hand(*arguments, 0.5, growth=growth)
    step_size = StochasticPolyak(c=0.5, smoothing=smoothing)
    found = made_by(Compiled, *arguments, step_size, cuts=(100,))
    assert_same(found, expected, 1e-8)


@pytest.mark.parametrize("batch", [1, 4])
def test_nan_is_not_hidden_by_the_bound(batch):
    x, y = data("classes", 3)
    x[:] = torch.nan
    model = Linear((D,), 3).double()
    indices, factors = plan(batch, 3)
    found = made_by(
        Native, model, CrossEntropy(), x, y, indices, factors, 0.5, {}, StochasticPolyak()
    )
    assert found[0].isnan().all()
    assert found[1].isnan().all()


# ------------------------------------------------------------------- distance over gradients


STATIONS = {
    *range(17), *range(18, 33, 2), *range(36, 65, 4), *range(72, 129, 8), *range(144, 257, 16),
    *range(288, 513, 32),
}  # fmt: skip
MOVING = [
    ({}, 1.0),
    ({"weight_decay": 0.1}, 1.0),
    ({"momentum": 0.8, "weight_decay": 0.05}, 5.0),
    ({"momentum": 0.5, "nesterov": True}, 2.0),
]


def distance_over_gradients(gain):
    """η of each update, by the formula of `PolyakDoG`."""
    start, radius, total, last, t = [], None, 0.0, math.inf, 0

    def eta(params, f, square):
        nonlocal radius, total, last, t
        if not start:
            start.extend(p.detach().clone() for p in params)
        if radius is not None and t in STATIONS:
            way = sum((p.detach() - q).square().sum() for p, q in zip(params, start, strict=True))
            radius = max(radius, math.sqrt(way))
        t += 1
        total += square
        depth = min(1.0, 4 / sum(p.ndim > 1 for p in start))
        if square == 0:
            return 0.0
        bounds = [1.5 * f / square / gain**0.75]
        if radius is None:
            radius = f / math.sqrt(square) if f > 0 else None
            if radius is not None and len(start) > 2:  # a hidden layer
                norm = math.sqrt(sum(p.square().sum() for p in start))
                radius = min(radius, 0.1 * norm)
        else:
            bounds.append(3.0 * depth * radius / math.sqrt(total) / gain)
        made = min(bounds)
        if gain > 1:
            made = min(made, last / (1 - 1 / gain))
        last = made if made > 0 else last
        return made

    return eta


@pytest.mark.parametrize("engine", [Native, Eager, pytest.param(Compiled, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("rule", "gain"), MOVING, ids=str)
@pytest.mark.parametrize("task", ["cross-entropy", "hinge", "squared error"])
def test_distance_over_gradients(task, rule, gain, batch, engine):
    loss, outputs, kind = TASKS[task]
    x, y = data(kind, outputs)
    torch.manual_seed(0)
    hidden = [6] if task == "hinge" else [6, 5, 5, 4]
    model = MLP((D,), outputs, hidden=hidden, activation="tanh").double()
    arguments = (model, loss, x, y, *plan(batch, 120), 1.0, rule)
    expected = by_hand(*arguments, 1.0, own=distance_over_gradients(gain))
    made = made_by(engine, *arguments, PolyakDoG(gain=gain))
    assert_same(made, expected, 1e-7)
    cut = made_by(engine, *arguments, PolyakDoG(gain=gain), cuts=(1, 2, 50, 51))
    for a, b in zip((*cut[:2], *cut[2]), (*made[:2], *made[2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("rule", "gain"), MOVING, ids=str)
def test_distance_over_gradients_on_sparse_inputs(rule, gain, batch):
    x, y = data("binary", 1, is_sparse=True)
    torch.manual_seed(0)
    arguments, model = (*plan(batch), 1.0, rule), Linear((D,), 1).double()
    rows = SparseInputs.from_scipy(sparse.csr_matrix(x.numpy()), None, torch.float64)
    own = distance_over_gradients(gain)
    expected = by_hand(model, Logistic(), x, y, *arguments, 1.0, own=own)
    found = made_by(Native, model, Logistic(), rows, y, *arguments, PolyakDoG(gain=gain))
    assert_same(found, expected, 1e-7)


@pytest.mark.parametrize("engine", [Native, Eager])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_start_without_slope_is_told(engine, batch):
    x, y = torch.zeros(N, D), torch.zeros(N)
    model = Linear((D,), 1, init="zeros")
    with pytest.raises(ValueError, match="stationary"):
        made_by(
            engine, model, SquaredError(), x, y, *plan(batch, 40), 1.0, {}, PolyakDoG(), cuts=(3,)
        )
