"""What a line search computed where it went is the next update's: nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from gdtrain import GD
from gdtrain.engines import Eager, Native
from gdtrain.engines.engine import LookAhead
from gdtrain.losses import CrossEntropy
from gdtrain.models import MLP
from gdtrain.models.dropout import Dropout
from gdtrain.objective import Objective
from gdtrain.step_sizes import Armijo, BarzilaiBorwein, InverseSmoothness

N = 60


def problem(model=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + x[:, 1] ** 2 > 0.5).long() + (x[:, 2] > 0.5).long()
    torch.manual_seed(0)
    model = (MLP((5,), 3, hidden=[8]) if model is None else model()).double()
    return Objective(model, CrossEntropy(), x, y)


def descended(engine, rule, model=None, cuts=(40,), weight_decay=0.0):
    objective = problem(model)
    optimizer = GD(
        objective.params, lr=1.0, step_size=copy.deepcopy(rule), weight_decay=weight_decay
    )
    optimizer.param_groups[0]["initial_lr"] = 1.0
    made = engine(objective, optimizer)
    losses, done = [], 0
    for count in cuts:
        rows = torch.arange(N).expand(count, N)
        losses.append(made(rows, torch.ones(count, dtype=torch.float64), done))
        done += count
    return torch.cat(losses), objective, made


def with_norm():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(
    "rule", [BarzilaiBorwein(memory=30, f_star=0.0), Armijo(growth=1.0)], ids=["BB", "Armijo"]
)
@pytest.mark.parametrize(
    ("engine", "model"),
    [(Native, None), (Eager, None), (Eager, with_norm)],
    ids=["native", "eager", "norm"],
)
def test_updates_are_the_same_and_fewer_passes_are_made(
    engine, model, rule, weight_decay, monkeypatch
):
    losses, objective, made = descended(engine, rule, model, weight_decay=weight_decay)
    cut, other, _ = descended(engine, rule, model, (1, 2, 37), weight_decay)
    monkeypatch.setattr(LookAhead, "wanted", lambda self: False)
    expected, plain, without = descended(engine, rule, model, weight_decay=weight_decay)
    assert without.evaluations >= 40
    assert made.evaluations <= without.evaluations - 20
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    assert torch.equal(losses, cut)
    for a, b, c in zip(
        objective.model.state_dict().values(),
        plain.model.state_dict().values(),
        other.model.state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert torch.equal(a, c)


@pytest.mark.parametrize("layer", [nn.Dropout, Dropout])
def test_what_draws_random_numbers_is_computed_anew(layer):
    def model():
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), layer(0.2), nn.Linear(8, 3))

    _, _, made = descended(Eager, BarzilaiBorwein(), model)
    assert made.evaluations >= 40


def test_parameters_that_were_changed_in_between_are_seen():
    objective = problem()
    optimizer = GD(objective.params, lr=1.0, step_size=BarzilaiBorwein())
    optimizer.param_groups[0]["initial_lr"] = 1.0
    engine, rows = Native(objective, optimizer), torch.arange(N).expand(1, N)
    one = torch.ones(1, dtype=torch.float64)
    engine(rows, one)
    with torch.no_grad():
        objective.params[0].mul_(2)
    expected = objective.value(torch.arange(N))
    assert engine(rows, one).item() == pytest.approx(expected.item(), rel=1e-12)


def test_rules_that_differentiate_elsewhere_go_on_as_before():
    losses, _, made = descended(Native, InverseSmoothness())
    assert losses[-1] < losses[0]
    assert made.evaluations > 0
