import math

import pytest
import torch
from torch import nn

from gdtrain import GD
from gdtrain.analysis.diagnosis import examine, health, overshoot, step_limit
from gdtrain.descent.monitors import Cause
from gdtrain.losses import CrossEntropy, SquaredError
from gdtrain.objective import Objective

ALL = torch.arange(6)


def make(micro=None, hidden=nn.ReLU, classes=3):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), hidden(), nn.Linear(5, classes))
    x = torch.randn(6, 4, generator=generator)
    return Objective(model, CrossEntropy(), x, torch.arange(6) % classes, micro)


def test_a_finite_update_has_no_finding():
    objective = make()
    before = [p.clone() for p in objective.params]
    state = torch.get_rng_state()
    assert examine(objective, ALL) is None
    assert all(torch.equal(a, b) for a, b in zip(before, objective.params, strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("micro", [None, 2])
def test_an_input(value, micro):
    objective = make(micro)
    objective.inputs[3, 2] = value
    found = examine(objective, ALL)
    assert found.cause is Cause.INPUT
    assert found.numbers == {"examples": [3], "features": [2], "values": [str(value)]}
    assert found.told(lambda kind, i: f"{kind} {i}") == f"feature 2 of example 3 is {value}"
    # Its place in the batch is told, and other batches are sound.
    assert examine(objective, torch.tensor([5, 3])).numbers["examples"] == [1]
    assert examine(objective, torch.tensor([0, 1])) is None


def test_a_target():
    x, y = torch.ones(4, 2), torch.zeros(4, 2)
    y[1, 1] = math.nan
    found = examine(Objective(nn.Linear(2, 2), SquaredError(), x, y), torch.arange(4))
    assert found.cause is Cause.TARGET
    assert found.numbers == {"examples": [1], "targets": [1], "values": ["nan"]}


def test_a_weight_comes_before_what_it_spoils():
    objective = make()
    objective.inputs[3, 2] = math.nan
    with torch.no_grad():
        objective.model[2].weight[1, :2] = math.nan
    found = examine(objective, ALL)
    assert found.cause is Cause.WEIGHT
    assert found.numbers == {"parameters": ["2.weight"]}
    assert found.message == "2 of 15 in 2.weight are not finite"


def test_the_loss_of_one_example():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.tensor([[1.0], [1e30], [2.0]])  # (1e30)²/2 overflows float32
    found = examine(Objective(model, SquaredError(), x, torch.zeros(3)), torch.arange(3))
    assert found.cause is Cause.LOSS
    assert found.numbers == {"examples": [1]}
    assert found.told(lambda kind, i: f"{kind} {i}") == "the loss of example 1 is inf"


class Root(nn.Module):
    """√|w x|, whose slope at 0 is infinite."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return (self.w * x).abs().sqrt() + self.b


def test_the_gradient_of_one_example():
    x = torch.tensor([[1.0], [4.0], [0.0]])
    found = examine(Objective(Root(), SquaredError(), x, torch.ones(3)), torch.arange(3))
    assert found.cause is Cause.GRADIENT
    assert found.numbers == {"examples": [2], "parameters": ["w"]}


def test_a_long_list_is_cut():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.full((9, 1), 1e30)
    found = examine(Objective(model, SquaredError(), x, torch.zeros(9)), torch.arange(9))
    assert found.message == "the loss of 9 of its 9 examples is not finite"


# ---------------------------------------------------------------------- units


def test_dead_units_are_counted():
    objective = make()
    with torch.no_grad():
        objective.model[0].bias[:2] = -100.0
    found = health(objective, ALL)
    alive = (objective.model[1](objective.model[0](objective.inputs)) > 0).any(0)
    assert found.dead["1"] == pytest.approx(1 - alive.float().mean().item())
    assert found.dead["1"] >= 0.4
    assert not found.died
    assert found.value == pytest.approx(objective.value(ALL).item())
    assert found.value_of_zero == pytest.approx(math.log(3))
    with torch.no_grad():
        objective.model[0].bias[:] = -100.0
    assert health(objective, ALL).died
    assert not objective.model[1]._forward_hooks
    assert not objective.model._forward_hooks


def test_a_dead_branch_beside_a_living_one_is_no_death():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.relu, self.out = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(x + self.relu(self.inner(x)))

    model = Skip()
    nn.init.constant_(model.inner.bias, -100.0)
    objective = Objective(model, CrossEntropy(), torch.randn(6, 4), torch.arange(6) % 3)
    found = health(objective, ALL)
    assert found.dead == {"relu": 1.0}
    assert not found.died


@pytest.mark.parametrize("kind", [nn.Tanh, nn.Sigmoid])
def test_saturated_units(kind):
    objective = make(hidden=kind)
    assert not health(objective, ALL).is_saturated
    with torch.no_grad():
        objective.model[0].weight.mul_(1e6)
    found = health(objective, ALL)
    assert found.saturated == {"1": 1.0}
    assert found.is_saturated


def test_channels_of_images_are_units():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias[0] = -1e3
        model[0].bias[1] = 1e3
    objective = Objective(model, CrossEntropy(), torch.randn(6, 1, 4, 4), torch.arange(6) % 2)
    assert health(objective, ALL).dead == {"1": 0.5}


# ---------------------------------------------------------------------- step size


def quadratic(*curvatures):
    """½ Σ λ_i θ_i²: squared error of examples √(n λ_i) e_i."""
    n = len(curvatures)
    model = nn.Linear(n, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x = torch.diag(torch.tensor([math.sqrt(n * c) for c in curvatures], dtype=torch.float64))
    return Objective(model, SquaredError(), x, torch.zeros(n, dtype=torch.float64))


def test_the_limit():
    objective = quadratic(8.0, 1.0)
    found = step_limit(objective, GD(objective.params, lr=0.1))
    assert found == pytest.approx((8.0, 0.25))
    heavy = GD(objective.params, lr=0.1, momentum=0.5)
    assert step_limit(objective, heavy) == pytest.approx((8.0, 0.375))
    objective.inputs[0, 0] = math.nan
    assert step_limit(objective, heavy) is None


def test_overshoot_on_a_quadratic():
    # g = (8, 1), g' = (8(1 − 8η), 1 − η): 1 − (64(1 − 8η) + 1 − η)/65 = 513η/65
    objective = quadratic(8.0, 1.0)
    assert overshoot(objective, torch.arange(2), 0.2) == pytest.approx(0.2 * 513 / 65)
    assert objective.params[0].tolist() == [[1.0, 1.0]]
    nn.init.zeros_(objective.params[0])
    assert overshoot(objective, torch.arange(2), 0.2) is None
