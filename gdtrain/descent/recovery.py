"""The way back of a run that failed: states to go back to, updates made again, the one that failed.

A `Run` makes the updates again; `gdtrain.descent.monitors` says when to go back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.generators import RandomStates
from gdtrain.schedules import ReduceOnPlateau, Schedule

__all__ = ["Guard", "Kept", "Recovery", "Run"]

_SAVED = 2**22  # numbers that a checkpoint may keep of the states to go back to


class Guard(Protocol):
    """Is asked about each sweep before anybody else sees it, and may set the run back.

    Example:
        >>> class Counts:
        ...     def before(self, batch): ...
        ...     def after(self, outputs):
        ...         print(len(outputs["losses"]), "updates")
        ...     def end(self): ...
        >>> guard: Guard = Counts()
        >>> guard.after({"losses": torch.zeros(3)})
        3 updates
    """

    def before(self, batch: Any) -> None:
        """A sweep comes: the state is that before its first update."""

    def after(self, outputs: Mapping[str, Any]) -> None:
        """A sweep was made and is counted, but nobody has seen it yet."""

    def end(self) -> None:
        """The run ends here. Asked once more, it changes nothing."""


class Run(Protocol):
    """What a way back needs of a run.

    Example:
        >>> class Still:
        ...     updates = 0
        ...     def repeat(self, update, count):
        ...         return count
        ...     def is_finite(self):
        ...         return True
        >>> Still().repeat(3, 2)
        2
    """

    @property
    def model(self) -> nn.Module:
        """With the parameters and buffers that updates change."""

    @property
    def optimizer(self) -> Optimizer:
        """Of the parameters."""

    @property
    def updates(self) -> int:
        """Number of updates made."""

    schedule: Schedule

    def repeat(self, update: int, count: int) -> int:
        """Make at most so many updates again, from one on; says how many were made."""

    def is_finite(self) -> bool:
        """Whether all is that updates change."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A copy of everything that updates change, before an update.

    Args:
        update: Its number.
        tensors: Trainable parameters and buffers, in the model's order.
        groups: Of the optimizer, without the parameters.
        states: Of the optimizer, by the parameter's place.
        random: States of all generators that layers may draw from.
        schedule: With what it remembers, where that is more than the update number.

    Example:
        >>> Kept(3, [torch.zeros(2)], [], {}, RandomStates.now()).size
        2
    """

    update: int
    tensors: list[Tensor]
    groups: list[dict[str, Any]]
    states: dict[int, dict[str, Any]]
    random: RandomStates
    schedule: ReduceOnPlateau | None = None

    @classmethod
    def of(cls, run: Run, update: int) -> Kept:
        """The state at hand.

        Args:
            run: Which.
            update: The one that comes next.
        """
        optimizer, schedule = run.optimizer, run.schedule
        return cls(
            update,
            [t.detach().clone() for t in _changing(run.model)],
            [
                {name: _copied(value) for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
            ],
            {
                i: _copied(optimizer.state[p])
                for i, p in enumerate(_owned(optimizer))
                if p in optimizer.state
            },
            _generators(run.model),
            copy.deepcopy(schedule) if isinstance(schedule, ReduceOnPlateau) else None,
        )

    def give_back(self, run: Run) -> None:
        """Put it back, but for the schedule.

        Args:
            run: From which it was taken.
        """
        with torch.no_grad():
            for tensor, kept in zip(_changing(run.model), self.tensors, strict=True):
                tensor.copy_(kept)
                tensor.grad = None
        optimizer = run.optimizer
        for group, old in zip(optimizer.param_groups, self.groups, strict=True):
            for name in group.keys() - old.keys() - {"params"}:
                del group[name]
            group.update(_copied(old))
        optimizer.state.clear()
        for i, p in enumerate(_owned(optimizer)):
            if i in self.states:
                optimizer.state[p] = _copied(self.states[i])
        self.random.restore()

    @property
    def size(self) -> int:
        """Numbers in it."""
        own = [v for state in self.states.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(t.numel() for t in (*self.tensors, *own))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; what a plateau schedule remembers is the run's to keep."""
        names = ("update", "tensors", "groups", "states")
        return {**{name: getattr(self, name) for name in names}, "random": self.random.state_dict()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Kept:
        """The inverse of `state_dict`.

        Args:
            state: What that returned.
        """
        return cls(**{**state, "random": RandomStates.from_state_dict(state["random"])})


class Recovery:
    """States to go back to, and the updates from there made again.

    Kept are the state at the origin, the last good one, that at the start of the stretch at hand,
    and the latest, from which updates are made again to find the one that failed.

    Example:
        >>> recovery = Recovery()
        >>> recovery.good is None, recovery.state_dict()
        (True, {'kept': [], 'places': [None, None, None, None]})
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """No state that was kept fits any more."""
        self.first: Kept | None = None
        self.good: Kept | None = None
        self.pending: Kept | None = None
        self.latest: Kept | None = None

    def keep(self, run: Run, length: int, renew: bool) -> bool:
        """Keep the state at hand, where a stretch begins or it is asked for.

        Args:
            run: Which.
            length: Updates in a stretch.
            renew: Whether the latest is to be that at hand.

        Returns:
            Whether a stretch begins.
        """
        update = run.updates
        begins = self.pending is None or update - self.pending.update >= length
        # A schedule with a memory cannot be asked again what it was before a validation.
        if self.latest is None or begins or renew or isinstance(run.schedule, ReduceOnPlateau):
            self.latest = Kept.of(run, update)
        if begins:
            self.pending = self.latest
        self.first = self.first or self.latest
        self.good = self.good or self.latest
        return begins

    def promote(self) -> None:
        """The state at the start of the stretch is the last good one."""
        self.good = self.pending

    def go_back(self, run: Run, *, to_the_first: bool = False) -> int:
        """Put the last good state back.

        Args:
            run: Which.
            to_the_first: From now on, the one at the origin is that.

        Returns:
            The update before which it was.
        """
        self.good = self.first if to_the_first else self.good
        assert self.good is not None, "kept before the first update"
        self.good.give_back(run)
        return self.good.update

    def begin_again(self, run: Run) -> None:
        """The state at hand is the origin, and the good one.

        Args:
            run: Which.
        """
        self.first = self.good = self.pending = self.latest = Kept.of(run, run.updates)

    def locate(self, run: Run, bad: int) -> int:
        """The update after which something is not finite, found by making the updates again.

        Args:
            run: Left in the state before that update.
            bad: An update at whose examples the loss is not finite, or before which something else
                is not.

        Returns:
            The number: `bad` itself, where all is finite before it.
        """
        kept = self.latest
        assert kept is not None, "kept before the first update"
        _repeat(run, kept, bad)
        if run.is_finite():
            return bad
        kept.give_back(run)
        good = kept.update
        if not run.is_finite():
            return good
        while bad - good > 1:  # by halving
            middle = (good + bad) // 2
            _repeat(run, kept, middle)
            if run.is_finite():
                good, kept = middle, Kept.of(run, middle)
            else:
                bad = middle
        kept.give_back(run)
        return good

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; without the states, where they are large."""
        places = (self.first, self.good, self.pending, self.latest)
        kept = list(dict.fromkeys(k for k in places if k is not None))
        if sum(k.size for k in kept) > _SAVED:
            kept = []
        return {
            "kept": [k.state_dict() for k in kept],
            "places": [kept.index(k) if k in kept else None for k in places],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: That.
        """
        kept = [Kept.from_state_dict(saved) for saved in state["kept"]]
        self.first, self.good, self.pending, self.latest = (
            None if place is None else kept[place] for place in state["places"]
        )


def _repeat(run: Run, kept: Kept, to: int) -> None:
    """Make the updates again from a state that was kept, with the schedule as it was then."""
    kept.give_back(run)
    schedule = run.schedule
    run.schedule = schedule if kept.schedule is None else kept.schedule
    try:
        update = kept.update
        while update < to:
            update += run.repeat(update, to - update)
    finally:
        run.schedule = schedule


def _generators(model: nn.Module) -> RandomStates:
    """States of all that a user's layers may draw from, as fast as can be."""
    return RandomStates.now(None if any(p.is_cuda for p in model.parameters()) else ())


def _changing(model: nn.Module) -> list[Tensor]:
    return [*(p for p in model.parameters() if p.requires_grad), *model.buffers()]


def _owned(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
