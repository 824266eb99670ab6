"""The way back of a run that failed: states to go back to, updates made again, the one that failed.

`gdtrain.analysis.guard` has the guard that decides when, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.descent.trial import Snapshot
from gdtrain.objective import Objective
from gdtrain.schedules import ReduceOnPlateau

if TYPE_CHECKING:
    from gdtrain.descent.loop import Loop, SweepOutput

__all__ = ["Guard", "Recovery", "Watched"]

_SAVED = 2**22  # numbers that a checkpoint may keep of the states to go back to
_RETAINED = 64 * 2**20  # bytes of batches that nobody can name again, kept to be replayed


class Guard(Protocol):
    """Sees each sweep of a loop before anybody else, and may set the run back or end it."""

    def start(self, loop: Loop) -> None:
        """The run begins, or goes on."""

    def next_update(self, update: int) -> int | None:
        """The smallest update number above one at which a sweep must end; None: none is."""

    def before(self, objective: Objective, indices: Tensor) -> None:
        """A sweep comes: the state is that before its first update."""

    def after(self, output: SweepOutput) -> None:
        """A sweep was made and is counted, but nobody has seen it yet."""

    def end(self) -> None:
        """The run ends here. Asked once more, it changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


class Watched:
    """What stays finite in a sound run: trainable parameters, and buffers.

    A buffer that is not finite from the start, such as a causal mask of −∞, is left out.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = nn.Identity() if model is None else model
        buffers = self._model.named_buffers()
        self._constant = {name for name, b in buffers if not torch.isfinite(b).all()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {
            **{name: p for name, p in self._model.named_parameters() if p.requires_grad},
            **{n: b for n, b in self._model.named_buffers() if n not in self._constant},
        }

    def is_finite(self) -> bool:
        """Whether all of it is."""
        numbers = [torch.view_as_real(t) if t.is_complex() else t for t in self.tensors.values()]
        watched = [t.detach() for t in numbers if t.is_floating_point()]
        sums = [t.sum() for t in watched]
        if any(total.is_cuda for total in sums):  # one wait for the device instead of many
            sums = [torch.stack([total.float() for total in sums]).sum()]
        if all(math.isfinite(float(total)) for total in sums):
            return True
        # A sum may overflow where no number does.
        return all(bool(torch.isfinite(t).all()) for t in watched)


class Recovery:
    """States to go back to, and the updates from there made again.

    Kept are the state at the origin, the last good one, that at the start of the stretch at hand,
    and the latest, from which updates are made again to find the one that failed.
    """

    def __init__(self) -> None:
        self.first: Snapshot | None = None
        self.good: Snapshot | None = None
        self.pending: Snapshot | None = None
        self.latest: Snapshot | None = None
        self._batches: dict[int, tuple[Objective, Tensor]] = {}  # that nobody can name again
        self._saved: Mapping[str, Any] | None = None  # until there is a model to put it into

    def resume(self, objective: Objective, optimizer: Optimizer) -> None:
        """Take over the states of a checkpoint, if there are some."""
        if self._saved is None:
            return
        kept = [Snapshot(objective, optimizer) for _ in self._saved["kept"]]
        for snapshot, state in zip(kept, self._saved["kept"], strict=True):
            snapshot.load_state_dict(state)
        self.first, self.good, self.pending, self.latest = (
            None if place is None else kept[place] for place in self._saved["places"]
        )
        self._saved = None

    def retain(self, loop: Loop, objective: Objective, indices: Tensor) -> bool:
        """Keep a batch that no plan can name again; says whether too much is kept by now."""
        if loop.plan is not None:
            return False
        self._batches[loop.updates] = objective, indices
        batches = [(own.inputs, own.targets) for own, _ in self._batches.values()]
        return sum(t.nbytes for pair in batches for t in pair if isinstance(t, Tensor)) > _RETAINED

    def examples(self, loop: Loop, update: int, count: int = 1) -> tuple[Objective, Tensor]:
        """J, and the examples of at most so many updates from one on that was made."""
        return self._batches[update] if loop.plan is None else loop.examples(update, count)

    def keep(self, loop: Loop, objective: Objective, length: int, renew: bool) -> bool:
        """Keep the state at hand, where a stretch of that length begins (it says whether one does)
        or the latest is to be renewed.
        """
        update = loop.updates
        begins = self.pending is None or update - self.pending.update >= length
        # A schedule with a memory cannot be asked again what it was before a validation.
        if self.latest is None or begins or renew or isinstance(loop.schedule, ReduceOnPlateau):
            self.latest = _snapshot(objective, loop.optimizer, update)
        if begins:
            self.pending = self.latest
        self.first = self.first or self.latest
        self.good = self.good or self.latest
        self._batches = {u: batch for u, batch in self._batches.items() if u >= self.latest.update}
        return begins

    def begin_again(self, loop: Loop, objective: Objective) -> None:
        """The state at hand is the origin, and the good one."""
        self.first = _snapshot(objective, loop.optimizer, loop.updates)
        self.good = self.pending = self.latest = self.first

    def go_back(self, *, to_the_first: bool = False) -> int:
        """Put the last good state back (or let the one at the origin be that); says its update."""
        self.good = self.first if to_the_first else self.good
        assert self.good is not None, "kept before the first update"
        self.good.give_back()
        return self.good.update

    def locate(self, loop: Loop, objective: Objective, bad: int) -> int:
        """The update after which something is not finite, found by making the updates again.

        `bad` is an update whose loss is not finite, or before which something else is not; it is
        the answer where all is finite before it. The state is left as it is before that update.
        """
        kept = self.latest
        assert kept is not None, "kept before the first update"
        self._repeat(loop, kept, bad)
        if loop.watched.is_finite():
            return bad
        kept.give_back()
        good = kept.update
        if not loop.watched.is_finite():
            return good
        while bad - good > 1:  # by halving
            middle = (good + bad) // 2
            self._repeat(loop, kept, middle)
            if loop.watched.is_finite():
                good, kept = middle, _snapshot(objective, loop.optimizer, middle)
            else:
                bad = middle
        kept.give_back()
        return good

    def _repeat(self, loop: Loop, kept: Snapshot, to: int) -> None:
        kept.give_back()
        update = kept.update
        while update < to:
            objective, indices = self.examples(loop, update, to - update)
            update += len(loop.make_updates(objective, indices, update))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; without the states, where they are large."""
        if self._saved is not None:
            return {name: self._saved[name] for name in ("kept", "places")}
        places = (self.first, self.good, self.pending, self.latest)
        kept = list(dict.fromkeys(k for k in places if k is not None))
        if sum(k.size for k in kept) > _SAVED:
            kept = []
        return {
            "kept": [k.state_dict() for k in kept],
            "places": [kept.index(k) if k in kept else None for k in places],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, once `resume` is called."""
        self._saved = state


def _snapshot(objective: Objective, optimizer: Optimizer, update: int) -> Snapshot:
    for p in objective.params:
        p.grad = None  # of no use to a state that outlives a sweep
    return Snapshot(objective, optimizer, update)
