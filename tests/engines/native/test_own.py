"""A loss and an activation of a user's, each defined in one place: here."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from gdtrain import GD, SGD
from gdtrain.analysis.explanation import explain
from gdtrain.convex.certificate import duality_gap
from gdtrain.data.sparse import SparseInputs
from gdtrain.engines import Eager, Native, NotApplicableError
from gdtrain.losses import Loss, SquaredError
from gdtrain.models import MLP, Linear
from gdtrain.models.activations import Activation
from gdtrain.objective import Objective
from gdtrain.ranges import Interval

N, D = 50, 6


class LogCosh(Loss):
    """σ² Σ_c log cosh((p_c − y_c)/σ): ½r² near 0, σ|r| far away."""

    task = "regression"
    formula = "σ² Σ log cosh((p − y)/σ)"
    slope_formula = "σ tanh((p − y)/σ)"
    domain = "intervals"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = Interval(0, math.inf).check("scale", scale)

    def _residual(self, prediction, target):
        return (prediction - target.reshape(prediction.shape)) / self.scale

    def forward(self, prediction, target):
        r = self._residual(prediction, target).abs()
        return self.scale**2 * (r + torch.log1p(torch.exp(-2 * r)) - math.log(2)).sum(1)

    def slope(self, prediction, target):
        return self.scale * torch.tanh(self._residual(prediction, target))

    def curvature(self, prediction, target):
        return 1 - torch.tanh(self._residual(prediction, target)).square()

    def conjugate(self, slope, target):
        # ⟨α, y⟩ + ½σ² Σ_c (1 + a) log(1 + a) + (1 − a) log(1 − a), a = α/σ in [−1, 1]
        a = slope / self.scale
        entropy = torch.special.xlog1py(1 + a, a) + torch.special.xlog1py(1 - a, -a)
        return (slope * target.reshape(slope.shape) + 0.5 * self.scale**2 * entropy).sum(1)

    def native(self):
        scale = self.scale

        def kernel(p, label, y, slope):
            total = 0.0
            for c in range(p.size):
                r = (p[c] - y[c]) / scale
                slope[c] = scale * math.tanh(r)
                total += abs(r) + math.log1p(math.exp(-2 * abs(r))) - math.log(2.0)
            return scale * scale * total

        return kernel


class Exponential(Loss):
    """exp(−s p), whose kernel reads the class number."""

    task = "binary"

    def forward(self, prediction, target):
        return torch.exp(-self._signs(prediction, target) * prediction[:, 0])

    def native(self):
        def kernel(p, label, y, slope):
            s = 2.0 * label - 1
            value = math.exp(-s * p[0])
            slope[0] = -s * value
            return value

        return kernel


class Sine(Activation):
    name, formula, slope_formula = "sine", "sin(z)", "cos(z)"

    def forward(self, z):
        return z.sin()

    def slope(self, z, h):
        return z.cos()

    def native(self):
        def value(z):
            return math.sin(z)

        def slope(z, h):
            return math.cos(z)

        return value, slope


class Inherits(Sine):
    """Without a kernel of its own."""


def data(outputs, dtype=torch.float64):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(N, D)), rng.normal(size=(N, outputs))
    return torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)


def trained(engine, model, loss, x, y, batch, dtype=torch.float64, **rule):
    model = copy.deepcopy(model).to(dtype)
    optimizer = SGD([{"params": model.parameters(), "initial_lr": 0.05}], **rule)
    indices = torch.randint(0, N, (100, batch), generator=torch.Generator().manual_seed(1))
    losses = engine(Objective(model, loss, x, y), optimizer)(indices, torch.ones(100))
    return [losses, *(p.detach() for p in model.parameters())]


def same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("rule", [{}, {"momentum": 0.5, "weight_decay": 0.01}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_an_own_loss_makes_the_updates_of_the_reference(scale, rule, batch, dtype):
    x, y = data(2, dtype)
    model, tolerance = MLP((D,), 2, hidden=[5]), 1e-10 if dtype == torch.float64 else 1e-4
    found, expected = (
        trained(engine, model, LogCosh(scale), x, y, batch, dtype, **rule)
        for engine in (Native, Eager)
    )
    same(found, expected, tolerance)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_own_loss_of_classes_and_sparse_inputs(batch):
    x, y = data(1)
    labels, model = (y[:, 0] > 0).long(), Linear((D,), 1)
    expected = trained(Eager, model, Exponential(), x, labels, batch)
    same(trained(Native, model, Exponential(), x, labels, batch), expected, 1e-10)
    inputs = SparseInputs.from_scipy(csr_array(x.numpy()), dtype=torch.float64)
    same(trained(Native, model, Exponential(), inputs, labels, batch), expected, 1e-10)


@pytest.mark.parametrize("bias_decay", [None, 0.0, 0.2])
def test_an_own_loss_has_a_certificate(bias_decay):
    x, y = data(2)
    loss, decay = LogCosh(0.7), 0.1
    w = torch.zeros(2, D, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(2, dtype=torch.float64, requires_grad=bias_decay is not None)
    free = [w] if bias_decay is None else [w, b]

    def objective():
        value = loss(x @ w.T + b, y).mean() + 0.5 * decay * w.square().sum()
        return value + 0.5 * (bias_decay or 0.0) * b.square().sum()

    far = objective().item()
    options = {"weight_decay": decay, "bias_decay": bias_decay or 0.0}

    def gap():
        bias = None if bias_decay is None else b.detach()
        return duality_gap(w.detach(), bias, x, y, loss, **options)

    start = gap()
    for _ in range(3000):
        for p, g in zip(free, torch.autograd.grad(objective(), free), strict=True):
            p.data -= 0.5 * g
    best, end = objective().item(), gap()
    assert start.primal == pytest.approx(far, rel=1e-13)
    assert start.dual <= best + 1e-13  # a lower bound, whatever α is
    assert start.dual == pytest.approx(best, abs=1e-3 * (far - best))
    assert end.relative_gap < 1e-10


def test_an_own_loss_and_activation_are_explained():
    x, y = data(2)
    model = MLP((D,), 2, hidden=[4], activation=Sine).double()
    found = explain(Objective(model, LogCosh(), x, y), GD(model.parameters()), torch.arange(5))
    expected = torch.autograd.grad(LogCosh()(model(x[:5]), y[:5]).mean(), [*model.parameters()])
    gradients = [g for layer in found.layers for g in (layer.weight_gradient, layer.bias_gradient)]
    same(gradients, expected, 1e-12)
    text = found.text()
    assert "ℓ = σ² Σ log cosh((p − y)/σ) = " in text
    assert "a′(z) = cos(z)" in text


def test_what_a_loss_inherits_is_not_believed():
    class Twice(LogCosh):
        def forward(self, prediction, target):
            return 2 * super().forward(prediction, target)

    x, y = data(1)
    with pytest.raises(NotApplicableError, match=r"Twice is no loss .* has no native kernel"):
        trained(Native, Linear((D,), 1), Twice(), x, y, 1)
    with pytest.raises(ValueError, match="no conjugate of Twice"):
        duality_gap(torch.zeros(1, D), None, x, y, Twice(), 0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("hidden", [[5], [4, 3]], ids=str)
def test_an_own_activation_makes_the_updates_of_the_reference(hidden, batch, dtype):
    x, y = data(1, dtype)
    model = MLP((D,), 1, hidden=hidden, activation=Sine)
    found, expected = (
        trained(engine, model, SquaredError(), x, y, batch, dtype) for engine in (Native, Eager)
    )
    same(found, expected, 1e-11 if dtype == torch.float64 else 1e-4)


def test_an_activation_without_a_kernel_is_refused_with_the_reason():
    x, y = data(1)
    model = MLP((D,), 1, hidden=[3], activation=Inherits)
    assert trained(Eager, model, SquaredError(), x, y, 1)[0].isfinite().all()
    with pytest.raises(NotApplicableError, match=r"Inherits is no activation .* no native kernel"):
        trained(Native, model, SquaredError(), x, y, 1)
