"""Tests of stationarity on written numbers, and on two examples by hand."""

import copy
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from gdtrain import SGD
from gdtrain.descent.stationarity import (
    Level,
    Look,
    Patience,
    Slopes,
    Stationarity,
    falls_later,
    mean_bounds,
)
from gdtrain.descent.stopping import StopReason
from gdtrain.losses import SquaredError
from gdtrain.objective import Objective
from gdtrain.schedules import Constant, Polynomial, ReduceOnPlateau, Step


def test_bounds_of_a_mean_by_hand():
    # s = √2, n = 2, t₁(0.95) = tan(0.45π) = 6.3138
    lower, mean, upper = mean_bounds([0.0, 2.0], 0.95)
    assert mean == 1.0
    assert upper == pytest.approx(1 + math.tan(0.45 * math.pi), rel=1e-12)
    assert lower == pytest.approx(1 - math.tan(0.45 * math.pi), rel=1e-12)
    assert mean_bounds([3.0, 3.0, 3.0], 0.99) == (3.0, 3.0, 3.0)


def made_slopes(momentum=0.0):
    """J = mean ½(w x + b − y)², x = 1, 2, y = 0, decay 0.1 on w alone, at w = 1, b = 0."""
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(0.0)
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    objective = Objective(model, SquaredError(), x, torch.zeros(2, dtype=torch.float64))
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "lr": 1.0}]
    return Slopes(objective, SGD(groups, lr=0.5, momentum=momentum)), model


def test_the_gradient_has_each_groups_decay():
    slopes, _ = made_slopes()
    w, b = slopes.gradient(torch.tensor([0, 1]), 0)
    assert w.item() == pytest.approx((1 + 4) / 2 + 0.1)
    assert b.item() == pytest.approx((1 + 2) / 2)
    g = [slopes.gradient(torch.tensor([i]), 0) for i in (0, 1)]
    assert slopes.product(*g) == pytest.approx(1.1 * 4.1 + 1 * 2)
    assert slopes.product(*g, by_rate=True) == pytest.approx(0.5 * 1.1 * 4.1 + 1.0 * 2)
    # Products of independent examples have ‖∇J‖² as their mean.
    products = [slopes.product(g[i], g[k]) for i in (0, 1) for k in (0, 1)]
    assert np.mean(products) == pytest.approx(2.6**2 + 1.5**2)


def test_the_rise_by_noise_is_half_the_steps_curvature():
    slopes, model = made_slopes()
    before = copy.deepcopy(model.state_dict())
    step = [0.2 * torch.ones(1, 1).double(), -0.1 * torch.ones(1).double()]
    # ½ mean (0.2 x − 0.1)² + ½ 0.1 0.2²
    rise = slopes.rise(step, torch.tensor([0, 1]), 0)
    assert rise == pytest.approx(0.5 * (0.1**2 + 0.3**2) / 2 + 0.5 * 0.1 * 0.04, rel=1e-9)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_momentum_lengthens_the_step():
    slopes, _ = made_slopes(momentum=0.9)
    ones = [torch.ones(1, 1).double(), torch.ones(1).double()]
    assert [s.item() for s in slopes.step(ones)] == pytest.approx([5.0, 10.0])


def test_levels_of_the_loss():
    level = Level(0.1, 0)
    level.push(np.arange(32.0))
    assert level.means == [7.5, 23.5]
    assert (level.count, level.next) == (32, 32)
    assert not level.flat()  # too few to say
    rng = np.random.default_rng(0)
    flat, falling = Level(0.1, 0), Level(0.1, 0)
    for _ in range(100):
        flat.push(1 + rng.normal(size=1000))
        start = falling.next
        falling.push(1 - 1e-5 * np.arange(start, start + 1000) + 0.1 * rng.normal(size=1000))
    assert flat.count == 100_000
    assert len(flat.means) < 128
    assert flat.flat()
    assert not falling.flat()


def test_a_new_rate_begins_a_new_level():
    test = Stationarity(None, 0.95)
    test.take(0, np.arange(20.0), np.full(20, 0.1))
    test.take(20, np.arange(20.0), np.full(20, 0.1))
    assert (test.level.count, test.level.rate, test.level.next) == (40, 0.1, 40)
    test.balances = [[1.0]]
    rates = np.array([0.1, 0.1, 0.05, 0.05, 0.05])
    test.take(40, np.arange(5.0), rates)  # at the last rate are the last three
    assert (test.level.count, test.level.rate, test.level.next) == (3, 0.05, 45)
    assert test.balances == []
    test.take(60, np.ones(2), np.full(2, 0.05))  # updates are missing
    assert (test.level.count, test.level.next) == (2, 62)


def test_convergence_by_bounds():
    test = Stationarity(0.1, 0.95)
    test.first_norm = 2.0  # the threshold is 0.2
    again = mock.Mock(side_effect=[Look(0.0, 0.0, 0.05), Look(0.0, 0.0, 0.03)])
    assert test.converged(Look(0.05, 0.06, 0.07), again, 3) is None
    assert (test.batch, again.call_count) == (32, 0)  # decided: it is larger
    assert test.converged(Look(0.01, 0.03, 0.05), again, 3) is None
    assert (test.batch, again.call_count) == (64, 0)  # not decided
    assert test.converged(Look(0.01, 0.02, 0.03), again, 3) is None
    assert (test.batch, again.call_count) == (128, 1)
    stop = test.converged(Look(0.01, 0.02, 0.03), again, 3)
    assert stop.reason is StopReason.CONVERGED
    assert stop.numbers["gradient_norm"] == pytest.approx(math.sqrt(0.03))
    assert stop.numbers["threshold"] == 0.2
    assert test.converged(Look(0.03, 0.03, 0.03), None, 3).numbers["confidence"] == 1.0
    assert test.converged(Look(0.05, 0.05, 0.05), None, 3) is None


def test_the_floor_needs_two_looks_with_confidence():
    test = Stationarity(None, 0.95)
    test.take(0, np.ones(64), np.full(64, 0.1))
    above = Look(1.0, 2.0, 3.0, [0.1, 0.2, 0.1, 0.2], rise=0.3, fall=0.1)
    assert test.at_the_floor(above, 1, 64) is None
    stop = test.at_the_floor(above, 1, 64)
    assert stop.reason is StopReason.NOISE_FLOOR
    assert (stop.numbers["lr"], stop.numbers["updates_at_this_lr"]) == (0.1, 64)
    mixed = Look(1.0, 2.0, 3.0, [-9.0, 9.0, -9.0, 9.0], rise=0.3, fall=0.1)
    assert test.at_the_floor(mixed, 1, 64) is None


def test_its_state_is_plain_and_goes_on():
    test = Stationarity(0.1, 0.95)
    test.first_norm = 2.0
    test.take(0, np.arange(40.0), np.full(40, 0.1))
    rest = Stationarity(0.1, 0.95)
    rest.load_state_dict(json.loads(json.dumps(test.state_dict())))
    for one in (test, rest):
        one.take(40, np.arange(50.0), np.full(50, 0.1))
    assert rest.state_dict() == test.state_dict()


def test_patience():
    patience = Patience(2)
    said = [patience.read(loss) for loss in (math.nan, 0.5, 0.5, 0.4, 0.6, 0.4)]
    assert said[:5] == [None] * 5
    assert said[5].numbers == {"best": 0.4, "loss/val": 0.4, "validations": 2}


@pytest.mark.parametrize(
    ("schedule", "total", "falls"),
    [
        (Constant(), 100, False),
        (Constant(), None, False),
        (Polynomial(), 100, True),
        (Constant(warmup=60), 100, False),
        (Step(every=6), 100, True),
        (Step(every=60), 60, False),
        (ReduceOnPlateau(), 100, True),
    ],
)
def test_the_rest_of_a_schedule(schedule, total, falls):
    def factor(update):
        return float(schedule(torch.tensor([float(update)]).double(), total or 2**62, 10))

    assert falls_later(schedule, factor, 50, total) == falls
