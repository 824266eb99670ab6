"""What is tried leaves no trace: parameters, buffers, optimizer, gradients, generators."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from gdtrain import GD
from gdtrain.descent.trial import Snapshot
from gdtrain.engines import Eager
from gdtrain.generators import RandomStates
from gdtrain.losses import SquaredError
from gdtrain.objective import Objective
from gdtrain.step_sizes import Armijo, StochasticPolyak


class Drawing(nn.Module):
    """Draws from each generator, and puts another tensor in a buffer's place."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 1), nn.BatchNorm1d(1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return self.norm(self.linear(x)) + 1e-3 * noise


def made(**options):
    torch.manual_seed(0)
    model = Drawing()
    x = torch.randn(8, 2)
    objective = Objective(model, SquaredError(), x, x[:, 0])
    options = {"lr": 0.1, "momentum": 0.9, **options}
    optimizer = GD([{"params": model.parameters(), "initial_lr": options["lr"]}], **options)
    return objective, optimizer


def kept(objective, optimizer):
    return (
        copy.deepcopy(objective.model.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        [None if p.grad is None else p.grad.clone() for p in objective.params],
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def run(objective, optimizer, updates):
    engine = Eager(objective, optimizer)
    return engine(torch.arange(8).expand(updates, 8), torch.ones(updates))


@pytest.mark.parametrize("rule", [None, Armijo, StochasticPolyak])
@pytest.mark.parametrize("before", [0, 3])
def test_what_is_tried_leaves_no_trace(rule, before):
    options = {} if rule is None else {"lr": 1.0, "step_size": rule(), "momentum": 0}
    objective, optimizer = made(**options)
    if before:
        run(objective, optimizer, before)
    there, states = kept(objective, optimizer), RandomStates.now()
    gradients = [p.grad for p in objective.params]
    buffers = list(objective.model.buffers())
    snapshot = Snapshot(objective, optimizer)
    for _ in range(2):
        first = run(objective, optimizer, 4)
        optimizer.param_groups[0]["found"] = 1
        snapshot.give_back()
    assert same(kept(objective, optimizer), there)
    assert RandomStates.now() == states
    assert all(p.grad is g for p, g in zip(objective.params, gradients, strict=True))
    assert all(a is b for a, b in zip(objective.model.buffers(), buffers, strict=True))
    assert torch.equal(run(objective, optimizer, 4), first)


def test_a_snapshot_of_another_session_goes_to_where_the_parameters_are(tmp_path):
    objective, optimizer = made()
    run(objective, optimizer, 2)
    torch.save(Snapshot(objective, optimizer, 2).state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)  # in main memory
    with torch.device("meta"):  # as a GPU is
        objective, optimizer = made()
    there = Snapshot(objective, optimizer)
    there.load_state_dict(saved)
    there.give_back()
    buffers = [optimizer.state[p]["momentum_buffer"] for p in objective.params]
    assert (there.update, {b.device.type for b in buffers}) == (2, {"meta"})
