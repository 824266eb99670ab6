"""Steps bounded by the loss and ‖g‖² (stochastic Polyak), in every engine, against a plain loop."""

import copy
import itertools

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
from gdtrain.step_sizes import StochasticPolyak

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


def by_hand(model, loss, x, y, indices, factors, peak, rule, c, f_star=0.0, growth=0):
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
            losses.append(value.item())
            rates.append(eta * factor)
            for i, p in enumerate(params):
                own = buffers[i : i + 1]
                options = {k: v for k, v in rule.items() if k != "weight_decay"}
                descend_(
                    [p.data], [gradient[i]], own, lr=eta * factor, weight_decay=decays[i], **options
                )
                buffers[i] = own[0]
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
