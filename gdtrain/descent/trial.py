"""Everything that updates change, so that updates which are only tried leave no trace.

A trial puts back θ, buffers, the optimizer's state and groups (a step-size rule keeps what it knows
there), gradients, and every generator. What only evaluates J, and steps nothing, needs less:
`gdtrain.objective.untouched`. States that outlive a sweep are kept by `gdtrain.descent.recovery`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.generators import RandomStates
from gdtrain.objective import Objective, buffers_of

__all__ = ["Snapshot", "staying", "trial"]


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
        self._optimizer = optimizer
        self._parameters = [(p, p.detach().clone()) for p in objective.model.parameters()]
        # A module may put another tensor in a buffer's place.
        self._buffers = [
            (*place, place[-1].detach().clone()) for place in buffers_of(objective.model)
        ]
        self._gradients = [(p, p.grad) for p in objective.params]
        self._states = [(p, copy.deepcopy(v)) for p, v in optimizer.state.items()]
        self._groups = [
            {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        self._random = RandomStates.now(p.device for p, _ in self._parameters)

    @torch.no_grad()
    def give_back(self) -> None:
        """Put all back as it was; may be called again."""
        for parameter, old in self._parameters:
            parameter.copy_(old)
        for owner, name, buffer, old in self._buffers:
            owner[name] = buffer.copy_(old)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._optimizer.state.clear()
        for p, state in self._states:
            self._optimizer.state[p] = copy.deepcopy(state)
        for group, options in zip(self._optimizer.param_groups, self._groups, strict=True):
            for name in group.keys() - options.keys() - {"params"}:
                del group[name]
            group.update(copy.deepcopy(options))
        self._random.restore()


@contextmanager
def staying(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Within it, parameters may be moved in place; after it, they are where they were.

    Args:
        params: Which.

    Yields:
        Copies of them as they were.

    Example:
        >>> theta = torch.ones(1)
        >>> with staying([theta]) as (before,):
        ...     _ = theta.add_(before)
        >>> theta
        tensor([1.])
    """
    before = [p.detach().clone() for p in params]
    try:
        yield before
    finally:
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)


@contextmanager
def trial(objective: Objective, optimizer: Optimizer) -> Iterator[Snapshot]:
    """Within it, anything may be tried; after it, all is as it was.

    Args:
        objective: J; its model has the parameters and buffers.
        optimizer: Of its parameters.

    Yields:
        The state to which it goes back, also in between, as often as one likes.

    Example:
        >>> from torch import nn
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1)
        >>> before = model.weight.item()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> objective = Objective(model, SquaredError(), torch.ones(1, 1), torch.ones(1))
        >>> with trial(objective, optimizer):
        ...     model.weight.grad = torch.ones(1, 1)
        ...     optimizer.step()
        >>> model.weight.item() == before
        True
    """
    before = Snapshot(objective, optimizer)
    try:
        yield before
    finally:
        before.give_back()
