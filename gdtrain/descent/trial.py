"""Everything that updates change, so that updates which are only tried leave no trace.

`Loop.trial` puts back what a loop counts, too. What only evaluates J, and steps nothing, needs
less: `gdtrain.objective.untouched`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.generators import RandomStates
from gdtrain.objective import Objective, buffers_of

__all__ = ["Snapshot", "staying", "trial"]


class Snapshot:
    """What updates change, as it is before one of them: θ, buffers, gradients, the optimizer's
    state and groups (a step-size rule keeps what it knows there), and every generator.
    """

    def __init__(self, objective: Objective, optimizer: Optimizer, update: int = 0) -> None:
        self.update = update
        self._optimizer = optimizer
        # A module may put another tensor in a buffer's place.
        self._places = buffers_of(objective.model)
        buffers = dict.fromkeys(buffer for _, _, buffer in self._places)
        self._tensors = [*objective.params, *buffers]
        self._copies = [t.detach().clone() for t in self._tensors]
        self._gradients = [(p, p.grad) for p in objective.params]
        self._states = [(p, _copied(state)) for p, state in optimizer.state.items()]
        self._groups = [
            {name: _copied(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        on_gpu = any(t.is_cuda for t in self._tensors)
        self._random = RandomStates.now(None if on_gpu else ())

    @torch.no_grad()
    def give_back(self) -> None:
        """Put all back as it was; may be called again."""
        for owner, name, buffer in self._places:
            owner[name] = buffer
        for tensor, old in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(old)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._optimizer.state.clear()
        for p, state in self._states:
            self._optimizer.state[p] = _copied(state)
        for group, options in zip(self._optimizer.param_groups, self._groups, strict=True):
            for name in group.keys() - options.keys() - {"params"}:
                del group[name]
            group.update(_copied(options))
        self._random.restore()

    @property
    def size(self) -> int:
        """Numbers in it."""
        own = [v for _, state in self._states for v in state.values() if isinstance(v, Tensor)]
        return sum(t.numel() for t in (*self._copies, *own))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint; without gradients."""
        places = {p: i for i, p in enumerate(_owned(self._optimizer))}
        return {
            "update": self.update,
            "tensors": self._copies,
            "groups": self._groups,
            "states": {places[p]: state for p, state in self._states if p in places},
            "random": self._random.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be the snapshot of another session that `state_dict` has told of."""
        self.update, self._copies, self._groups = (
            state[name] for name in ("update", "tensors", "groups")
        )
        owned = _owned(self._optimizer)
        self._states = [(owned[i], _beside(owned[i], own)) for i, own in state["states"].items()]
        self._gradients = [(p, None) for p, _ in self._gradients]
        self._random = RandomStates.from_state_dict(state["random"])


@contextmanager
def trial(objective: Objective, optimizer: Optimizer) -> Iterator[Snapshot]:
    """Within it, updates may be made; after it, all that they change is as it was."""
    before = Snapshot(objective, optimizer)
    try:
        yield before
    finally:
        before.give_back()


@contextmanager
def staying(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Within it, parameters may be moved in place; after it, they are as its copies of them."""
    before = [p.detach().clone() for p in params]
    try:
        yield before
    finally:
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)


def _owned(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _beside(p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint is read into main memory: what has the shape of p goes to p's device."""
    return {
        name: value.to(p.device) if isinstance(value, Tensor) and value.shape == p.shape else value
        for name, value in state.items()
    }


def _copied(value: Any) -> Any:
    """As `copy.deepcopy`, but for tensors: of a view it copies all that the storage holds."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return copy.deepcopy(value)
