"""J with the penalty of the weight decay, worked by hand."""

import pytest
import torch
from torch import nn

from gdtrain.losses import SquaredError
from gdtrain.objective import Objective
from gdtrain.penalised import Penalised, penalty


def weighted(maximize=False, **options):
    """J = ½(wx + b − y)² at w = 2, b = 1, x = 3, y = 4: residual 3, ∇J = (9, 3)."""
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(1.0)
    x, y = torch.tensor([[3.0]], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    groups = [
        {"params": [model.weight], "weight_decay": 0.5},
        {"params": [model.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, maximize=maximize, **options)
    return Objective(model, SquaredError(), x, y), optimizer


def test_the_penalty_is_each_groups_own():
    objective, optimizer = weighted()
    f = Penalised(objective, optimizer)
    assert f.penalty() == penalty(optimizer) == 1.0  # ½·0.5·2²
    assert f.value(torch.arange(1)) == 5.5  # ½·3² + 1
    value, gradient = f.value_and_grad(torch.arange(1))
    assert value == 5.5
    assert [g.item() for g in gradient] == [10.0, 3.0]  # 9 + 0.5·2, 3


@pytest.mark.parametrize("maximize", [False, True])
def test_the_gradient_is_the_direction_of_the_optimizer(maximize):
    objective, optimizer = weighted(maximize)
    value, gradient = Penalised(objective, optimizer).value_and_grad(torch.arange(1))
    assert value == (-3.5 if maximize else 5.5)
    before = [p.detach().clone() for p in objective.params]
    for p, g in zip(objective.params, objective.value_and_grad(torch.arange(1))[1], strict=True):
        p.grad = g
    optimizer.step()
    for p, old, g in zip(objective.params, before, gradient, strict=True):
        torch.testing.assert_close(p, old - 0.1 * g, rtol=1e-14, atol=0)


def test_it_follows_a_weight_decay_that_changes():
    objective, optimizer = weighted()
    f = Penalised(objective, optimizer)
    optimizer.param_groups[1]["weight_decay"] = 2.0
    assert f.penalty() == 2.0


def test_a_parameter_that_is_not_stepped_has_no_gradient():
    objective, optimizer = weighted()
    assert Penalised(objective, optimizer).gradient([None, torch.ones(1)])[0] is None


def test_there_is_no_function_that_some_groups_maximize():
    objective, optimizer = weighted()
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="Received: both"):
        Penalised(objective, optimizer)


def test_an_optimizer_without_weight_decay_has_no_penalty():
    objective, _ = weighted()
    assert penalty(torch.optim.Rprop(objective.params)) == 0.0
