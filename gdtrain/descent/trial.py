"""Everything that updates change, so that updates which are only tried leave no trace."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from gdtrain.objective import Objective, buffers_of

__all__ = ["Snapshot", "random_states", "seed_all", "set_random_states"]


class Snapshot:
    """Parameters, buffers, the optimizer's state and groups, and generators, as they are now.

    Args:
        objective: J; its model has the parameters and buffers.
        optimizer: Of its parameters.

    Example:
        >>> from torch import nn
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1)
        >>> before = model.weight.item()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> objective = Objective(model, SquaredError(), torch.ones(1, 1), torch.ones(1))
        >>> snapshot = Snapshot(objective, optimizer)
        >>> model.weight.grad = torch.ones(1, 1)
        >>> optimizer.step()
        >>> snapshot.give_back()
        >>> model.weight.item() == before, len(optimizer.state), model.weight.grad
        (True, 0, None)
    """

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self._objective, self._optimizer = objective, optimizer
        self._kept = [(p, p.detach().clone()) for p in objective.model.parameters()]
        # A module may put another tensor in a buffer's place.
        self._buffers = [
            (*place, place[-1].detach().clone()) for place in buffers_of(objective.model)
        ]
        self._gradients = [p.grad for p in objective.params]
        self._states = [(p, copy.deepcopy(v)) for p, v in optimizer.state.items()]
        self._groups = [
            {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        self._random = random_states(objective)

    @torch.no_grad()
    def give_back(self) -> None:
        """Put all back as it was; may be called again."""
        for parameter, old in self._kept:
            parameter.copy_(old)
        for owner, name, buffer, old in self._buffers:
            owner[name] = buffer.copy_(old)
        for parameter, gradient in zip(self._objective.params, self._gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.state.clear()
        for p, state in self._states:
            self._optimizer.state[p] = copy.deepcopy(state)
        for group, options in zip(self._optimizer.param_groups, self._groups, strict=True):
            for name in group.keys() - options.keys() - {"params"}:
                del group[name]
            group.update(copy.deepcopy(options))
        set_random_states(self._objective, self._random)


def seed_all(objective: Objective, seed: int) -> None:
    """Seed all generators that layers may draw from.

    Args:
        objective: Tells the device.
        seed: Any integer.

    Example:
        >>> from torch import nn
        >>> from gdtrain.losses import SquaredError
        >>> objective = Objective(nn.Linear(1, 1), SquaredError(), torch.ones(1, 1), torch.ones(1))
        >>> states = random_states(objective)
        >>> seed_all(objective, 3)
        >>> drawn = torch.rand(1)
        >>> seed_all(objective, 3)
        >>> bool(torch.rand(1) == drawn)
        True
        >>> set_random_states(objective, states)
    """
    torch.default_generator.manual_seed(seed % 2**63)
    device = objective.params[0].device
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed % 2**63)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def random_states(objective: Objective) -> tuple[Any, ...]:
    """Of all generators that layers may draw from.

    Args:
        objective: Tells the device.

    Example:
        >>> from torch import nn
        >>> from gdtrain.losses import SquaredError
        >>> objective = Objective(nn.Linear(1, 1), SquaredError(), torch.ones(1, 1), torch.ones(1))
        >>> states = random_states(objective)
        >>> drawn = torch.rand(1)
        >>> set_random_states(objective, states)
        >>> bool(torch.rand(1) == drawn)
        True
    """
    device = objective.params[0].device
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()  # noqa: NPY002


def set_random_states(objective: Objective, states: tuple[Any, ...]) -> None:
    """Go back to them.

    Args:
        objective: Tells the device.
        states: From `random_states`.

    Example:
        >>> from torch import nn
        >>> from gdtrain.losses import SquaredError
        >>> objective = Objective(nn.Linear(1, 1), SquaredError(), torch.ones(1, 1), torch.ones(1))
        >>> set_random_states(objective, random_states(objective))
    """
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], objective.params[0].device)
    random.setstate(states[2])
    np.random.set_state(states[3])  # noqa: NPY002
