"""Sharpness and stability on quadratics of known spectrum, and against explicit Hessians."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from gdtrain import GD
from gdtrain.analysis.curvature import (
    NotFiniteError,
    Sharpness,
    _largest,
    batch_sharpness,
    draw_batches,
    limit_of,
    sharpness,
    stability_limit,
)
from gdtrain.descent.preparation import parameter_groups
from gdtrain.losses import CrossEntropy, SquaredError
from gdtrain.models import CNN, MLP
from gdtrain.objective import Objective


def quadratic(spectrum, dtype=torch.float64, micro=None, rotate=True):
    """Least squares through 0 whose Hessian has the spectrum: H = XᵀX / N."""
    size = len(spectrum)
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(size, size)))[0] if rotate else np.eye(size)
    x = torch.from_numpy(np.sqrt(size * np.array(spectrum))[:, None] * q.T).to(dtype)
    torch.manual_seed(0)
    model = nn.Linear(size, 1, bias=False).to(dtype)
    return Objective(model, SquaredError(), x, torch.zeros(size, dtype=dtype), micro)


RNG = np.random.default_rng(1)
SPECTRA = {
    "uniform": np.linspace(0, 1, 200),
    "geometric": np.logspace(-6, 1, 200),
    "outliers": np.concatenate([np.linspace(5, 10, 9), 0.1 * RNG.uniform(size=300)]),
    "close": np.concatenate([[1.0, 0.999], np.linspace(0, 0.5, 200)]),
    "single": np.concatenate([[40.0], np.zeros(100)]),
    "equal": np.full(50, 3.0),
    "one": np.array([2.5]),
}


# ------------------------------------------------------------------ the largest eigenvalue


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_eigenvalue_within_one_percent_and_converged_exact(name, dtype):
    spectrum = SPECTRA[name]
    for micro in (None, 7):
        objective = quadratic(spectrum, dtype, micro)
        found = sharpness(objective)
        assert found.value == pytest.approx(spectrum.max(), rel=0.01)
        # Some eigenvalue is no further away than the error.
        slack = found.error + 1e-5 * spectrum.max()
        assert np.abs(spectrum - found.value).min() <= slack
        assert found.error <= 0.01 * found.value
        assert found.examples == len(spectrum)
        assert 1 <= found.iterations <= 60
    tolerance, rel = (1e-9, 1e-9) if dtype is torch.float64 else (1e-4, 2e-6)
    converged = sharpness(quadratic(spectrum, dtype), tolerance=tolerance, max_iterations=1000)
    assert converged.value == pytest.approx(spectrum.max(), rel=rel)


@pytest.mark.parametrize(
    "spectrum",
    [
        np.concatenate([[1.0], -np.linspace(0, 30, 300)]),  # the largest, not the longest
        -np.linspace(1, 2, 100),
        np.concatenate([np.linspace(0.9, 1, 50), RNG.uniform(0, 0.1, size=500)]),
    ],
    ids=["saddle", "maximum", "cluster"],
)
def test_from_many_starts(spectrum):
    d = torch.from_numpy(spectrum)
    for seed in range(30):
        start = torch.randn(len(d), generator=torch.Generator().manual_seed(seed)).double()
        value, error, _ = _largest(lambda v: d * v, start, 0.01, 200)
        assert abs(value - spectrum.max()) <= 0.01 * abs(spectrum.max())
        assert error <= 0.01 * abs(value)
        assert value <= spectrum.max() + 1e-12


def test_a_flat_objective_has_no_sharpness():
    found = sharpness(quadratic(np.zeros(5)))
    assert (found.value, found.error) == (0.0, 0.0)
    assert stability_limit(found) == math.inf


def test_too_few_products_leave_an_error_that_says_so():
    found = sharpness(quadratic(SPECTRA["uniform"]), max_iterations=3)
    assert found.iterations == 3
    assert found.error > 0.01 * found.value
    assert found.value < 0.99


def test_weight_decay_of_each_group_lies_on_the_diagonal():
    # H = diag(1, 3) of the weights and 0 of the parameter that is not used.
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.ones(1)) for _ in range(3))

        def forward(self, x):
            return x[:, :1] * self.a + x[:, 1:] * self.b

    x = torch.tensor([[2.0, 0.0], [0.0, 6.0]]).sqrt()
    objective = Objective(Two(), SquaredError(), x, torch.zeros(2))
    model = objective.model
    for a, b, c, wanted in ((0, 0, 0, 3), (0.5, 0.25, 0, 3.25), (9, 0, 1, 10), (0, 0, 7, 7)):
        pairs = ((model.c, c), (model.a, a), (model.b, b))
        groups = [{"params": [p], "weight_decay": decay} for p, decay in pairs]
        found = sharpness(objective, optimizer=GD(groups, lr=0.1), tolerance=1e-6)
        assert found.value == pytest.approx(wanted, rel=1e-6)


MODELS = {  # and whether they are in training mode
    "mlp": (MLP, {"hidden": [5], "activation": "tanh"}, False),
    "cnn, batch norm, eval": (CNN, {"channels": [2], "hidden": 4, "norm": "batch"}, False),
    "cnn, batch norm, train": (CNN, {"channels": [2], "hidden": 4, "norm": "batch"}, True),
}


def network(name):
    torch.manual_seed(0)
    kind, options, training = MODELS[name]
    model = kind((1, 6, 6), 3, **options).double().train(training)
    x, y = torch.randn(17, 1, 6, 6, dtype=torch.float64), torch.randint(3, (17,))
    return Objective(model, CrossEntropy(), x, y)


def explicit(objective, indices, groups):
    """g and H in float64 on the indices, weight decay included, with nothing of gdtrain's."""
    model = copy.deepcopy(objective.model)
    params = [*model.parameters()]
    decay = {p: group.get("weight_decay", 0.0) for group in groups for p in group["params"]}
    loss = F.cross_entropy(model(objective.inputs[indices]), objective.targets[indices])
    for own, p in zip(objective.params, params, strict=True):
        loss = loss + 0.5 * decay[own] * p.square().sum()
    g = parameters_to_vector(torch.autograd.grad(loss, params, create_graph=True))
    rows = [torch.autograd.grad(e, params, retain_graph=True) for e in g]
    return g.detach(), torch.stack([parameters_to_vector(row) for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_of_networks_it_is_that_of_the_explicit_hessian(name):
    objective = network(name)
    groups = parameter_groups(objective.model)
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.3, 0.05
    optimizer = GD(groups, lr=0.1)
    for examples in (None, torch.tensor([3, 1, 16, 8, 2])):
        indices = torch.arange(17) if examples is None else examples
        _, h = explicit(objective, indices, groups)
        found = sharpness(objective, examples, optimizer=optimizer, tolerance=1e-6)
        assert found.value == pytest.approx(torch.linalg.eigvalsh(h)[-1].item(), rel=1e-9)
        assert found.examples == len(indices)


def test_a_sample_is_named_by_its_size_and_seed():
    objective = network("mlp")
    first = sharpness(objective, 6)
    assert first.examples == 6
    assert sharpness(objective, 6) == first
    assert sharpness(objective, 6, seed=1).value != pytest.approx(first.value)
    whole = sharpness(objective, 17, tolerance=1e-6)
    assert whole.value == pytest.approx(sharpness(objective, tolerance=1e-6).value, rel=1e-9)


def test_equal_calls_are_equal_and_change_nothing():
    objective = network("cnn, batch norm, train")
    before = {k: v.clone() for k, v in objective.model.state_dict().items()}
    state, batches = torch.get_rng_state(), torch.arange(16).view(4, 4)
    first = sharpness(objective), batch_sharpness(objective, batches)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert first == (sharpness(objective), batch_sharpness(objective, batches))
    assert objective.model.training
    assert all(torch.equal(before[k], v) for k, v in objective.model.state_dict().items())
    assert all(p.grad is None for p in objective.model.parameters())


class Numpy(torch.autograd.Function):
    """tanh, whose backward pass autograd does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.y = np.tanh(x.detach().numpy())
        return torch.from_numpy(ctx.y)

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy() * (1 - ctx.y**2))


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(Numpy.apply(self.first(x)))


def test_a_backward_pass_that_autograd_does_not_see_is_refused():
    torch.manual_seed(0)
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randint(3, (9,))
    with pytest.raises(ValueError, match="hide its backward pass from autograd"):
        sharpness(Objective(Hidden().double(), CrossEntropy(), x, y))


@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e200])
def test_what_has_diverged_has_no_sharpness(weight):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    for p in model.parameters():
        nn.init.constant_(p, weight)
    x = torch.ones(3, 2, dtype=torch.float64)
    objective = Objective(model, SquaredError(), x, torch.zeros(3, dtype=torch.float64))
    for measure in (sharpness, partial(batch_sharpness, batches=[torch.arange(3)])):
        with pytest.raises(NotFiniteError, match="not finite: the parameters have diverged"):
            measure(objective)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0.0}, r"tolerance must be a number in \(0, 1\)\. Received: tolerance=0"),
        (
            {"max_iterations": 0},
            "max_iterations must be a whole number of at least 1. Received: max_iterations=0",
        ),
        ({"examples": 0}, "examples must be a whole number from 1 to 2. Received: examples=0"),
        ({"examples": 3}, "examples must be a whole number from 1 to 2. Received: examples=3"),
        ({"examples": torch.zeros(0).long()}, "at least one example"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        sharpness(quadratic([1.0, 2.0]), **arguments)


def test_ascent_is_refused():
    objective = quadratic([1.0, 2.0])
    optimizer = GD(objective.params, lr=0.1, maximize=True)
    for measure in (sharpness, partial(batch_sharpness, batches=[torch.arange(2)])):
        with pytest.raises(ValueError, match=r"minimised\. Received: maximize=True"):
            measure(objective, optimizer=optimizer)


# ------------------------------------------------------------------ the limit


def test_the_limit_by_hand():
    assert stability_limit(4.0) == 0.5
    assert stability_limit(Sharpness(4.0, 0.0, 1, 1)) == 0.5
    assert stability_limit(4.0, momentum=0.9) == pytest.approx(0.95)
    assert stability_limit(4.0, momentum=0.5, nesterov=True) == 0.375
    assert stability_limit(4.0, momentum=0.5, dampening=0.5) == 1.5
    assert stability_limit(4.0, dampening=0.5) == 0.5  # without momentum it does nothing
    assert stability_limit(0.0) == stability_limit(-1.0) == math.inf
    groups = [{"params": [torch.zeros(1)], "momentum": beta} for beta in (0.5, 0.9)]
    assert limit_of(Sharpness(4.0, 0.0, 1, 1), torch.optim.SGD(groups, lr=0.1)) == 0.75
    assert limit_of(Sharpness(4.0, 0.0, 1, 1), torch.optim.Adam(groups, lr=0.1)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": -0.1}, r"momentum must be a number in \[0, 1\]"),
        ({"momentum": 1.1}, r"momentum must be a number in \[0, 1\]"),
        ({"momentum": 0.5, "dampening": 1.0}, r"dampening must be a number in \[0, 1\)"),
        ({"momentum": 0.5, "dampening": 0.1, "nesterov": True}, "Nesterov momentum has no damp"),
        ({"sharpness": math.nan}, "sharpness must be a number"),
    ],
)  # fmt: skip
def test_the_limit_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        stability_limit(**{"sharpness": 1.0, **arguments})


RULES = [
    {},
    {"weight_decay": 0.7},
    {"momentum": 0.5},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.6, "weight_decay": 0.7},
    {"momentum": 0.5, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.7},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_descent_is_stable_just_below_the_limit_and_diverges_just_above(rule):
    sizes = {}
    for share in (0.98, 1.02):
        objective = quadratic([0.5, 1.0, 4.0])
        (weight,) = objective.params
        optimizer = GD([weight], lr=1.0, **rule)
        found = sharpness(objective, optimizer=optimizer, tolerance=1e-6)
        assert found.value == pytest.approx(4 + rule.get("weight_decay", 0), rel=1e-9)
        kinds = {k: v for k, v in rule.items() if k != "weight_decay"}
        optimizer.param_groups[0]["lr"] = share * stability_limit(found, **kinds)
        for _ in range(1500):
            _, (weight.grad,) = objective.value_and_grad(torch.arange(3))
            optimizer.step()
        sizes[share] = weight.norm().item()
    assert sizes[0.98] < 1e-3
    assert sizes[1.02] > 1e3


# ------------------------------------------------------------------ batches


def test_batch_sharpness_by_hand():
    # One example each: g = x²w + λw, H = x² + λ; w = 1, x = 1 and 2, λ = 1: g = H = 2, then 5.
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    objective = Objective(model, SquaredError(), torch.tensor([[1.0], [2.0]]), torch.zeros(2))
    optimizer = GD(model.parameters(), lr=0.1, weight_decay=1.0)
    found = batch_sharpness(objective, torch.tensor([[0], [1]]), optimizer=optimizer)
    value = (2**3 + 5**3) / (2**2 + 5**2)
    assert found.value == pytest.approx(value)
    assert (found.examples, found.iterations) == (2, 2)
    # Delta method: residuals 8 − 4r and 125 − 25r.
    spread = math.sqrt((8 - 4 * value) ** 2 + (125 - 25 * value) ** 2)
    assert found.error == pytest.approx(spread / math.sqrt(2) / 14.5)
    assert batch_sharpness(objective, torch.tensor([[0]])).error == math.inf


@pytest.mark.filterwarnings("ignore:BatchNorm normalises each pass")
@pytest.mark.parametrize("name", MODELS)
def test_batch_sharpness_is_that_of_a_loop(name):
    objective = network(name)
    groups = parameter_groups(objective.model)
    groups[0]["weight_decay"] = 0.3
    batches = [torch.tensor(b) for b in ([0, 5, 9, 3], [11, 2, 16], [7, 7, 1, 4, 8])]
    above = below = 0.0
    for indices in batches:
        g, h = explicit(objective, indices, groups)
        above += (g @ h @ g).item()
        below += (g @ g).item()
    for micro in (None, 2) if "train" not in name else (None,):
        objective.micro_batch_size = micro
        found = batch_sharpness(objective, batches, optimizer=GD(groups, lr=0.1))
        assert found.value == pytest.approx(above / below, rel=1e-10)
        assert (found.examples, found.iterations) == (12, 3)


def test_without_a_batch_or_a_gradient_there_is_no_direction():
    objective = quadratic([1.0, 2.0])
    with pytest.raises(ValueError, match=r"at least one batch\. Received: none"):
        batch_sharpness(objective, [])
    nn.init.zeros_(objective.params[0])
    assert math.isnan(batch_sharpness(objective, [torch.arange(2)]).value)


def test_draws_repeat_no_example_where_there_are_enough():
    assert sorted(draw_batches(6, 2, 3, (0,)).flatten().tolist()) == [0, 1, 2, 3, 4, 5]
    more = draw_batches(6, 4, 3, (1,))
    assert more.shape == (3, 4)
    assert all(len(set(batch)) == 4 for batch in more.tolist())
