"""J with the penalty of the weight decay, worked by hand."""

import pytest
import torch
from torch import nn

from gdtrain.losses import SquaredError
from gdtrain.objective import Objective
from gdtrain.penalised import penalty, weight_decays, with_decay


def weighted():
    """J = ½(wx + b − y)² at w = 2, b = 1, x = 3, y = 4: residual 3, ∇J = (9, 3)."""
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(1.0)
    x, y = torch.tensor([[3.0]], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    groups = [
        {"params": [model.bias], "weight_decay": 0.0},
        {"params": [model.weight], "weight_decay": 0.5},
    ]
    return Objective(model, SquaredError(), x, y), torch.optim.SGD(groups, lr=0.1)


def test_the_penalty_is_each_groups_own():
    objective, optimizer = weighted()
    decays = weight_decays(objective.params, optimizer.param_groups)
    assert decays == [0.5, 0.0]
    assert penalty(objective.params, decays) == 1.0  # ½·0.5·2²


def test_the_penalty_of_a_complex_parameter_has_both_of_its_parts():
    assert penalty([torch.tensor([3 + 4j])], [0.5]) == 0.25 * 25


def test_the_gradient_is_the_direction_of_the_optimizer():
    objective, optimizer = weighted()
    _, gradient = objective.value_and_grad(torch.arange(1))
    decays = weight_decays(objective.params, optimizer.param_groups)
    made = with_decay(gradient, objective.params, decays)
    assert [g.item() for g in made] == [10.0, 3.0]  # 9 + 0.5·2, 3
    assert not any(g.requires_grad for g in made)
    before = [p.detach().clone() for p in objective.params]
    for p, g in zip(objective.params, gradient, strict=True):
        p.grad = g
    optimizer.step()
    for p, old, g in zip(objective.params, before, made, strict=True):
        torch.testing.assert_close(p, old - 0.1 * g, rtol=1e-14, atol=0)


def test_a_parameter_that_j_does_not_depend_on_has_its_decay():
    assert with_decay([None], [torch.tensor(3.0)], [0.5]) == [1.5]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Rprop])
def test_no_decay_and_a_decoupled_one_are_no_penalty(optimizer):
    objective, _ = weighted()
    groups = optimizer(objective.params).param_groups
    assert penalty(objective.params, weight_decays(objective.params, groups)) == 0.0
