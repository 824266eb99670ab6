"""What the compiled loops restate, against its homes: losses, activations, the update rule."""

import math
import os
from functools import partial

import numpy as np
import pytest
import torch

from gdtrain import SGD
from gdtrain.descent.preparation import make_optimizer
from gdtrain.engines.native import kernels
from gdtrain.engines.native.arguments import ACTIVATION, LOSS, Arguments, LossKernel, Rule
from gdtrain.engines.native.kernels import activate, descend, loss_and_slope, slope_of
from gdtrain.losses import CrossEntropy, Loss
from gdtrain.models import MLP
from gdtrain.models.activations import ACTIVATIONS
from gdtrain.models.structure import dense_layers
from gdtrain.objective import Objective
from gdtrain.rules import descend_


def examples(loss):
    generator = torch.Generator().manual_seed(2)
    outputs = 1 if loss.task == "binary" else 3
    p = 2 * torch.randn(40, outputs, generator=generator, dtype=torch.float64)
    if loss.task == "regression":
        return p, torch.randn(40, outputs, generator=generator, dtype=torch.float64)
    return p, torch.randint(0, max(outputs, 2), (40,), generator=generator)


def test_the_tables_hold_every_loss_and_activation():
    assert set(LOSS) == {k for k in Loss.__subclasses__() if k.__module__ == "gdtrain.losses"}
    assert len(set(LOSS.values())) == len(LOSS)
    assert set(ACTIVATION) == set(ACTIVATIONS.values())
    assert len(set(ACTIVATION.values())) == len(ACTIVATION)


@pytest.mark.parametrize("kind", LOSS, ids=lambda kind: kind.__name__)
def test_a_loss_is_that_of_its_class(kind):
    loss = kind()
    p, y = examples(loss)
    numbers = y.numpy() if loss.task == "regression" else np.zeros((1, p.shape[1]))
    slopes = np.zeros((1, p.shape[1]))
    kernel = LossKernel(LOSS[kind], getattr(loss, "delta", 0.0))
    for i in range(len(p)):
        row, label = (i, 0) if loss.task == "regression" else (0, int(y[i]))
        value = loss_and_slope(kernel, p[i].numpy(), label, numbers, row, slopes, 0)
        assert value == pytest.approx(float(loss(p[i : i + 1], y[i : i + 1])), rel=1e-12)
        expected = loss.slope(p[i : i + 1], y[i : i + 1])
        np.testing.assert_allclose(slopes, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", LOSS, ids=lambda kind: kind.__name__)
def test_slope_curvature_and_conjugate_belong_to_the_value(kind):
    loss = kind()
    p, y = examples(loss)
    p.requires_grad_()
    (slope,) = torch.autograd.grad(loss(p, y).sum(), p, create_graph=True)
    torch.testing.assert_close(loss.slope(p.detach(), y), slope.detach())
    if slope.requires_grad:
        columns = [
            torch.autograd.grad(slope[:, c].sum(), p, retain_graph=True)[0]
            for c in range(p.shape[1])
        ]
        second = torch.stack(columns, 1)
        torch.testing.assert_close(loss.curvature(p.detach(), y), second.diagonal(0, 1, 2))
        v = torch.randn(p.shape, dtype=torch.float64)
        made = loss.hessian(p.detach(), y)(v)
        torch.testing.assert_close(made, (second @ v[:, :, None])[:, :, 0])
    # Fenchel and Young: ℓ(p) + ℓ*(α) ≥ ⟨α, p⟩, with equality at α = ∇ℓ(p).
    alpha, p = slope.detach(), p.detach()
    sums = loss(p, y) + loss.conjugate(alpha, y)
    torch.testing.assert_close(sums, (alpha * p).sum(1))
    other = p.flip(0)
    assert (loss(other, y) + loss.conjugate(alpha, y) >= (alpha * other).sum(1) - 1e-12).all()


@pytest.mark.parametrize("kind", ACTIVATION, ids=lambda kind: kind.name)
def test_an_activation_is_that_of_its_class(kind):
    a, code = kind(), ACTIVATION[kind]
    z = torch.linspace(-4, 4, 41, dtype=torch.float64)[:-1] + 0.01
    h = a(z)
    torch.testing.assert_close(h, kind.module()(z))  # and torch's
    slope = a.slope(z, h)
    tracked = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(a(tracked).sum(), tracked)
    torch.testing.assert_close(slope, expected)
    out, delta = torch.empty_like(z), torch.full_like(z, 2.0)
    a.write(z, out)
    a.times_slope(z, h, delta)
    torch.testing.assert_close(out, h)
    torch.testing.assert_close(delta, 2 * slope)
    for i in range(len(z)):
        x, value = float(z[i]), float(h[i])
        assert activate(code, a.parameter, x) == pytest.approx(value, rel=1e-12, abs=1e-15)
        found = slope_of(code, a.parameter, x, value)
        assert found == pytest.approx(float(slope[i]), rel=1e-12, abs=1e-15)
    assert math.isnan(activate(code, a.parameter, math.nan))


def test_what_was_compiled_before_a_change_of_the_pieces_is_compiled_again(tmp_path):
    names = (
        "kernels.descend-1.py311.nbi",
        "kernels.descend-2.py311.nbi",
        "dense.sweep-1.py311.nbi",
    )
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[0], (0, 0))
    os.utime(tmp_path / names[2], (0, 0))
    kernels._forget_stale(tmp_path, descend.py_func)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.0, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)]
)
@pytest.mark.parametrize("maximize", [False, True])
def test_the_rule_is_that_of_the_rules(momentum, dampening, nesterov, maximize, weight_decay):
    theta = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    x = torch.tensor([1.0, 6.0, 7.0, 2.0], dtype=torch.float64)
    own, b, buffers = theta.numpy().copy(), np.zeros(4), [None]
    sign = -1.0 if maximize else 1.0
    rule = Rule(True, momentum, 1 - dampening, weight_decay, nesterov, sign, True)
    for update in range(3):
        descend_(
            [theta], [0.5 * x], buffers, lr=0.1, momentum=momentum, dampening=dampening,
            weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
        )  # fmt: skip
        descend(own, b, 0.5, x.numpy(), 0.1, rule, update == 0)
        np.testing.assert_allclose(own, theta, rtol=1e-13)


def test_arrays_of_the_loops_are_far_from_each_other():
    """Or a loop that takes them for overlapping adds up in another order, as chance has it."""
    model = MLP((64,), 10, hidden=(16,))
    objective = Objective(model, CrossEntropy(), torch.rand(9, 64), torch.arange(9))
    optimizer = make_optimizer(partial(SGD, lr=0.05), model, CrossEntropy())
    arguments = Arguments(objective, optimizer, dense_layers(model))
    with torch.no_grad():
        arrays = [arguments.empty(26) for _ in range(20)] + [arguments.gather().theta]
    for array in arrays:
        tensor = array.base  # which holds the memory
        while not isinstance(tensor, torch.Tensor):
            tensor = tensor.base
        start, size = tensor.storage_offset(), tensor.untyped_storage().nbytes()
        margins = start, size // 4 - start - array.size
        assert min(margins) >= min(array.size, 1000)
        assert array.ctypes.data % 64 == 0
