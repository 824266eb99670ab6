"""Losses against closed forms in float64, and their mean over examples."""

import itertools
import math
from functools import partial

import pytest
import torch
from reference import loss_value
from torch import nn
from torch.nn import functional as F

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
from gdtrain.models import MLP
from gdtrain.objective import Objective

REGRESSION = [SquaredError(), Huber(), Huber(delta=0.25)]
BINARY = [Logistic(), Hinge(), SquaredHinge()]


def name(loss):
    return f"{type(loss).__name__}{getattr(loss, 'delta', '')}"


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)


# ---------------------------------------------------------------------- closed forms


def squared_error_slope(p, y):
    return p - y


def huber_slope(p, y, delta=1.0):
    return max(-delta, min(delta, p - y))


def logistic_slope(p, y):
    return 1 / (1 + math.exp(-p)) - y


def hinge_slope(p, y):
    s = 1 if y else -1
    return -s if s * p < 1 else 0.0


def squared_hinge_slope(p, y):
    s = 1 if y else -1
    return -2 * s * max(0.0, 1 - s * p)


NUMBERS = [(0.3, 0.1), (-2.0, 1.5), (4.0, -0.5), (0.0, 0.0), (1.25, 0.25), (7.0, 7.1)]
SIGNS = [(p, y) for p in (-3.0, -0.7, 0.0, 0.4, 0.99, 2.5) for y in (0, 1)]


@pytest.mark.parametrize(
    ("loss", "slope", "pairs"),
    [
        (SquaredError(), squared_error_slope, NUMBERS),
        (Huber(), huber_slope, NUMBERS),
        (Huber(delta=0.25), partial(huber_slope, delta=0.25), NUMBERS),
        (Logistic(), logistic_slope, SIGNS),
        (Hinge(), hinge_slope, SIGNS),
        (SquaredHinge(), squared_hinge_slope, SIGNS),
    ],
    ids=["squared error", "huber 1", "huber 0.25", "logistic", "hinge", "squared hinge"],
)
def test_value_and_gradient_equal_the_closed_form(loss, slope, pairs):
    prediction = column(*[p for p, _ in pairs]).requires_grad_()
    dtype = torch.float64 if loss.task == "regression" else torch.int64
    target = torch.tensor([y for _, y in pairs], dtype=dtype)
    losses = loss(prediction, target)
    assert losses.shape == (len(pairs),)
    assert losses.dtype == torch.float64
    values = [loss_value(loss, [p], y) for p, y in pairs]
    assert losses.tolist() == pytest.approx(values, abs=1e-14)
    (gradient,) = torch.autograd.grad(losses.sum(), prediction)
    assert gradient[:, 0].tolist() == pytest.approx([slope(p, y) for p, y in pairs], abs=1e-14)


def test_cross_entropy_is_log_sum_exp_less_the_prediction_of_the_class():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 1, 2, 3, 0])
    losses = CrossEntropy()(prediction, target)
    for row, y, value in zip(prediction.tolist(), target.tolist(), losses.tolist(), strict=True):
        assert value == pytest.approx(math.log(sum(map(math.exp, row))) - row[y], abs=1e-14)
    (gradient,) = torch.autograd.grad(losses.sum(), prediction)
    wanted = prediction.detach().softmax(1) - F.one_hot(target, 4)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-15)


def test_one_hot_squared_error_is_half_the_squared_distance_to_the_indicator():
    # By hand: (1, 3, 0) less (0, 1, 0) is (1, 2, 0); (0.5, 0, 0) less (1, 0, 0) is (−0.5, 0, 0).
    prediction = torch.tensor([[1.0, 3.0, 0.0], [0.5, 0.0, 0.0]], requires_grad=True)
    losses = OneHotSquaredError()(prediction, torch.tensor([1, 0]))
    assert losses.tolist() == [2.5, 0.125]
    (gradient,) = torch.autograd.grad(losses.sum(), prediction)
    assert gradient.tolist() == [[1.0, 2.0, 0.0], [-0.5, 0.0, 0.0]]
    same = SquaredError()(prediction, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert torch.equal(losses, same)
    double = prediction.detach().double()
    assert OneHotSquaredError()(double, torch.tensor([1, 0])).dtype == torch.float64


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_extreme_predictions_give_finite_losses(size):
    prediction = torch.tensor([[size], [-size]])
    assert Logistic()(prediction, torch.tensor([1, 1])).tolist() == pytest.approx([0.0, size])
    both = torch.tensor([[size, -size], [-size, size]])
    assert CrossEntropy()(both, torch.tensor([0, 0])).tolist() == pytest.approx([0.0, 2 * size])


def test_hinge_takes_the_subgradient_zero_at_its_corner():
    for loss in (Hinge(), SquaredHinge()):
        prediction = column(1.0, -1.0).requires_grad_()
        loss(prediction, torch.tensor([1, 0])).sum().backward()
        assert prediction.grad[:, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("delta", [0.0, -1.0, math.inf, math.nan])
def test_huber_refuses_a_delta_out_of_range(delta):
    with pytest.raises(ValueError, match=r"delta must be a number in \(0, ∞\)\. Received: delta="):
        Huber(delta=delta)


# ---------------------------------------------------------------- outputs, check, decide


@pytest.mark.parametrize(
    ("losses", "data", "outputs"),
    [
        (REGRESSION, (None,), 1),
        (REGRESSION, (None, 3), 3),
        (BINARY, (2,), 1),
        ([CrossEntropy(), OneHotSquaredError()], (2,), 2),
        ([CrossEntropy(), OneHotSquaredError()], (10,), 10),
        (REGRESSION, (2,), "targets are 2 classes: use loss=cross_entropy"),
        ([SquaredError()], (3,), "3 classes: use loss=cross_entropy or loss=one_hot_squared_error"),
        ([Huber()], (3,), r"use loss=cross_entropy\.$"),
        (BINARY, (3,), "two classes, and the targets have 3: use loss=cross_entropy"),
        ([*BINARY, CrossEntropy()], (None,), "targets are numbers: use loss=squared_error"),
    ],
)
def test_how_many_outputs_the_data_ask_for(losses, data, outputs):
    for loss in losses:
        if isinstance(outputs, int):
            assert loss.outputs(*data) == outputs
        else:
            with pytest.raises(ValueError, match=f"{type(loss).__name__} is a loss.*{outputs}"):
                loss.outputs(*data)


@pytest.mark.parametrize(
    ("loss", "prediction", "target", "message"),
    [
        (SquaredError(), torch.zeros(3), torch.zeros(3), r"expects predictions \(B, C\)"),
        (SquaredError(), torch.zeros(3, 1), torch.zeros(2), r"predictions \(3, 1\), targets \(2,"),
        (SquaredError(), torch.zeros(3, 2), torch.zeros(3), "one prediction for each target"),
        (Huber(), torch.zeros(3, 1), torch.zeros(3, 2), "one prediction for each target"),
        (CrossEntropy(), torch.zeros(2, 3), torch.tensor([0, 3]), r"0 … 2 for 3 outputs.*0 to 3"),
        (CrossEntropy(), torch.zeros(2, 3), torch.tensor([-1, 1]), r"from -1 to 1"),
        (CrossEntropy(), torch.zeros(2, 3), torch.tensor([0.0, 1.5]), r"Received: torch.float32"),
        (OneHotSquaredError(), torch.zeros(2, 3), torch.tensor([0, 3]), "0 … 2 for 3 outputs"),
        (Logistic(), torch.zeros(2, 2), torch.tensor([0, 1]), "Logistic expects one output.*2"),
        (Hinge(), torch.zeros(2, 1), torch.tensor([-1, 1]), "integer labels 0 … 1"),
        (SquaredHinge(), torch.zeros(2, 1), torch.tensor([0, 2]), "from 0 to 2"),
    ],
)
def test_check_names_what_does_not_fit(loss, prediction, target, message):
    with pytest.raises(ValueError, match=message):
        loss.check(prediction, target)


def test_decide_reads_a_prediction_as_an_answer():
    prediction = torch.tensor([[0.1, 0.9, 0.0], [2.0, -1.0, 1.0]])
    for several in (CrossEntropy(), OneHotSquaredError()):
        assert several.decide(prediction).tolist() == [1, 0]
    assert SquaredError().decide(prediction) is prediction
    for loss in BINARY:
        decided = loss.decide(torch.tensor([[0.3], [-0.3], [0.0]]))
        assert decided.tolist() == [1, 0, 0]
        assert decided.dtype == torch.int64


# ------------------------------------------------------------------- the mean, once

N = 23  # a prime: every M < N leaves a ragged last pass


def problem(loss):
    torch.manual_seed(0)
    x = torch.randn(N, 5, dtype=torch.float64)
    if loss.task == "regression":
        outputs, y = 2, torch.randn(N, 2, dtype=torch.float64)
    elif loss.task == "multiclass":
        outputs, y = 3, torch.randint(3, (N,))
    else:
        outputs, y = 1, torch.randint(2, (N,))
    model = MLP((5,), outputs, hidden=(4,), activation="tanh").double()
    return model, x, y


@pytest.mark.parametrize(
    "loss", [SquaredError(), Huber(), CrossEntropy(), OneHotSquaredError(), *BINARY], ids=name
)
def test_the_objective_is_the_mean_over_examples_for_every_micro_batch_size(loss):
    model, x, y = problem(loss)
    each = torch.stack([loss(model(x[i : i + 1]), y[i : i + 1]).sum() for i in range(N)])
    mean = each.sum() / N
    wanted = torch.autograd.grad(mean, list(model.parameters()))
    for m in [*range(1, N + 2), None]:
        objective = Objective(model, loss, x, y, micro_batch_size=m)
        value, gradient = objective.value_and_grad(torch.arange(N))
        torch.testing.assert_close(value, mean.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, list(wanted), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            objective.value(torch.arange(N)), mean.detach(), rtol=1e-12, atol=1e-12
        )


def test_losses_come_in_the_order_of_the_indices_each_as_often_as_it_is_named():
    loss = CrossEntropy()
    model, x, y = problem(loss)
    indices = torch.tensor([7, 0, 22, 7, 3])
    wanted = loss(model(x[indices]), y[indices]).detach()
    for m in (1, 2, 5, None):
        objective = Objective(model, loss, x, y, micro_batch_size=m)
        losses = objective.losses(indices)
        torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-14)
        assert not losses.requires_grad
        assert objective.value_and_grad(indices)[0].item() == pytest.approx(wanted.mean().item())


def test_the_gradient_leaves_grad_and_frozen_parameters_alone():
    loss = CrossEntropy()
    model, x, y = problem(loss)
    first, last = model.layers[1], model.layers[3]
    first.weight.requires_grad_(False)
    objective = Objective(model, loss, x, y)
    _, gradient = objective.value_and_grad(torch.arange(N))
    assert [g.shape for g in gradient] == [first.bias.shape, last.weight.shape, last.bias.shape]
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_the_objective_does_not_depend_on_has_no_gradient():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(1, 1)

        def forward(self, x):
            return self.used(x)

    _, x, y = problem(CrossEntropy())
    objective = Objective(Spare().double(), CrossEntropy(), x, y, micro_batch_size=4)
    _, gradient = objective.value_and_grad(torch.arange(N))
    assert [g is None for g in gradient] == [False, False, True, True]


def test_a_parameter_used_by_only_some_micro_batches_has_their_share_of_the_gradient():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.v = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x):
            return x * (self.v if (x < 0).all() else self.w)

    x = column(1.0, 2.0, -3.0)
    objective = Objective(Gated(), SquaredError(), x, torch.zeros(3), micro_batch_size=2)
    _, (w, v) = objective.value_and_grad(torch.arange(3))
    assert w.item() == pytest.approx((1.0 + 4.0) / 3)
    assert v.item() == pytest.approx(9.0 / 3)


def test_the_objective_refuses_inputs_without_their_targets():
    with pytest.raises(ValueError, match="Received: 3 examples and 2 targets"):
        Objective(nn.Linear(1, 1), SquaredError(), torch.zeros(3, 1), torch.zeros(2))


# ------------------------------------------------------------------------- shapes of targets

ALL = [*REGRESSION, *BINARY, CrossEntropy(), OneHotSquaredError()]
B = 4


@pytest.mark.parametrize("loss", ALL, ids=name)
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_a_loss_is_right_or_refuses_the_shape_and_type(loss, outputs):
    classes = 2 if loss.task == "binary" else outputs
    labels = torch.arange(B) % min(classes, 2)
    shapes = {
        "(B,)": labels,
        "(B, 1)": labels[:, None],
        "(B, C)": labels[:, None] == torch.arange(classes) + (classes == 1),
        "(1, B)": labels[None],
        "(C, B)": torch.zeros(classes, B),
        "(2B,)": torch.zeros(2 * B),
        "()": torch.tensor(0),
    }
    types = (torch.int64, torch.uint8, torch.bool, torch.float32, torch.cfloat)
    for (shape, values), dtype in itertools.product(shapes.items(), types):
        check_right_or_refused(loss, outputs, shape, values.to(dtype))


def check_right_or_refused(loss, outputs, shape, values):
    prediction = torch.randn(B, outputs, generator=torch.Generator().manual_seed(0)).double()
    classes, dtype = 2 if loss.task == "binary" else outputs, values.dtype
    fits = (loss.task != "binary" or outputs == 1) and dtype != torch.cfloat
    if loss.task == "regression":
        right = (shape in ("(B,)", "(B, 1)") and outputs == 1) or shape == "(B, C)"
        wanted = values.reshape(B, -1).float().tolist() if right and fits else None
    else:
        right = shape in ("(B,)", "(B, 1)") or (shape == "(B, C)" and classes == 1)
        fits &= dtype != torch.float32
        wanted = values.reshape(B).long().tolist() if right and fits else None
    if wanted is None:
        with pytest.raises(ValueError, match=f"{type(loss).__name__} expects"):
            print(shape, dtype, loss(prediction, values))
    else:
        loss.check(prediction, values)
        made = loss(prediction, values).tolist()
        pairs = zip(prediction.tolist(), wanted, strict=True)
        assert made == pytest.approx([loss_value(loss, p, y) for p, y in pairs]), (shape, dtype)


@pytest.mark.parametrize("loss", [*BINARY, CrossEntropy(), OneHotSquaredError()], ids=name)
def test_class_numbers_of_any_loader_are_read_exactly(loss):
    outputs = 1 if loss.task == "binary" else 2
    labels = torch.tensor([0, 1, 1, 0])
    unsigned = (torch.uint8, torch.uint16, torch.uint32)
    for dtype in (torch.int8, torch.int32, torch.bool, torch.float32, *unsigned):
        for target in (labels, labels[:, None], F.one_hot(labels, 2)):
            made = loss.as_targets(target.to(dtype), outputs)
            assert made.dtype == torch.int64
            assert made.tolist() == labels.tolist()
    for wrong in (
        torch.tensor([0, 5]).to(torch.uint16),
        torch.tensor([0, 2]),
        torch.tensor([-1, 1]),
        torch.tensor([0.0, 0.5]),
        torch.tensor([0.0, math.nan]),
        torch.tensor([[1, 1], [0, 1]]),
        torch.tensor([[0.5, 0.5], [0.0, 1.0]]),
        labels[None],
        torch.zeros(2, 5),
    ):
        with pytest.raises(ValueError, match=f"{type(loss).__name__} expects"):
            loss.as_targets(wrong, outputs)


@pytest.mark.parametrize("loss", REGRESSION, ids=name)
def test_numbers_of_any_loader_are_read_exactly(loss):
    y = torch.tensor([0.5, 1.5, 2.5])
    assert torch.equal(loss.as_targets(y[:, None], 1), y)
    assert torch.equal(loss.as_targets(y, 1), y)
    assert torch.equal(loss.as_targets(y > 1, 1), torch.tensor([0.0, 1.0, 1.0]))
    both = torch.stack([y, y], 1)
    assert torch.equal(loss.as_targets(both, 2), both)
    for wrong, outputs in ((y[None], 1), (y, 3), (both, 1), (both.T, 2), (y.to(torch.cfloat), 1)):
        with pytest.raises(ValueError, match="expects one prediction for each target"):
            loss.as_targets(wrong, outputs)


def test_check_names_a_loss_of_ones_own_that_mixes_the_examples():
    class Broadcast(Loss):
        task = "regression"

        def forward(self, prediction, target):
            return (prediction - target).square().mean(1)  # (B, 1) − (B,)

    class Mean(Loss):
        task = "regression"

        def forward(self, prediction, target):
            return (prediction[:, 0] - target).square().mean()

    for loss in (Broadcast(), Mean()):
        with pytest.raises(ValueError, match="one value for each example, from its own prediction"):
            loss.check(column(1.0, 2.0), torch.tensor([3.0, 5.0]))
