"""Which examples make which update, and where a sweep must end.

A sweep ends where somebody must see the run (a validation, a checkpoint, a point of a curve);
everybody declares that beforehand, and the plan alone cuts. N examples, B examples per update,
U = ⌈N/B⌉ updates per epoch, T planned updates, K updates in one sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from gdtrain.data.order import Draws, Order
from gdtrain.ranges import Whole

__all__ = ["Every", "Plan", "Sampling", "Watcher"]

_FIRST_SWEEP = 16  # updates, of which the first ones warm up

Sampling = Literal["reshuffle", "shuffle_once", "replacement", "sequential"]


class Watcher(Protocol):
    """Somebody who must see the run at certain updates."""

    def next_update(self, update: int) -> int | None:
        """The smallest update number above `update` at which a sweep must end; None: none is.

        It must be a function of the update number alone, and of what is fixed before training.
        """


@dataclass(frozen=True)
class Every:
    """Sees the run at each multiple of a number of updates.

    Args:
        updates: Range [1, ∞).
        offset: It sees the updates that are so many more than a multiple.

    Example:
        >>> Every(100).next_update(250), Every(100).next_update(300), Every(10, 9).next_update(0)
        (300, 400, 9)
    """

    updates: int
    offset: int = 0

    def next_update(self, update: int) -> int:
        """The smallest such number above an update."""
        return update + self.updates - (update - self.offset) % self.updates


class Plan:
    """Names the examples of each update, and cuts the updates into sweeps.

    It holds no state: the examples are a function of the seed and the update number, which gives
    the epoch ⌊t/U⌋ and the place in it. A ragged last batch makes a sweep of its own. A batch of
    all N examples, whose mean has no order, is read as stored (but for "replacement").
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        sampling: Sampling = "reshuffle",
        seed: int = 0,
        total: int | None = None,
        updates_per_sweep: int | Literal["auto"] = "auto",
        watchers: list[Watcher] | None = None,
    ) -> None:
        if sampling not in (known := get_args(Sampling)):
            raise ValueError(f"sampling must be one of {', '.join(known)}. Received: {sampling!r}.")
        if not 1 <= batch_size <= num_examples:
            raise ValueError(
                f"batch_size must lie in [1, {num_examples}], the number of training examples. "
                f"Received: batch_size={batch_size}."
            )
        self.num_examples, self.batch_size = num_examples, batch_size
        self.sampling, self.seed = sampling, Whole(0).check("seed", seed)
        self.total = total
        self.automatic = updates_per_sweep == "auto"  # then the loop sets it, by the time it takes
        longest = _FIRST_SWEEP if updates_per_sweep == "auto" else updates_per_sweep
        self.updates_per_sweep = Whole(1).check("updates_per_sweep", longest)
        self.watchers: list[Watcher] = [] if watchers is None else watchers
        self._drawn: tuple[int, Order | Draws] | None = None

    @property
    def updates_per_epoch(self) -> int:
        """U = ⌈N/B⌉."""
        return -(-self.num_examples // self.batch_size)

    @property
    def is_full_batch(self) -> bool:
        """Whether each update averages all N examples."""
        return self.batch_size == self.num_examples and self.sampling != "replacement"

    # ------------------------------------------------------------------ where sweeps end

    def next_update(self, update: int) -> int | None:
        """The smallest update number above one at which a watcher must see the run, if any."""
        wanted = []
        for watcher in self.watchers:
            found = watcher.next_update(update)
            if found is not None and found <= update:
                raise ValueError(
                    f"{type(watcher).__name__}.next_update({update}) must be above {update}, "
                    f"or None. Received: {found}."
                )
            wanted += [] if found is None else [found]
        return min(wanted, default=None)

    def sweep(self, update: int, before: int | None = None) -> Tensor:
        """The examples (K, B) of the next sweep, which ends before an update at the latest."""
        ends = (update + self.updates_per_sweep, self.total, before, self.next_update(update))
        return self.block(update, min(end for end in ends if end is not None) - update)

    # ------------------------------------------------------------------ which examples

    def order(self, epoch: int) -> Tensor:
        """The N example numbers of an epoch, in their order."""
        return self._part(epoch, 0, self.num_examples)

    def block(self, update: int, count: int) -> Tensor:
        """The examples (K, B) of so many updates, or fewer: a ragged batch comes alone."""
        n, size = self.num_examples, self.batch_size
        if self.is_full_batch:
            # A mean over all examples has no order: files are then read from front to back.
            return torch.arange(n).expand(count, n)
        parts: list[Tensor] = []
        epoch, position = divmod(update, self.updates_per_epoch)
        while k := min(count, n // size - position):
            parts.append(self._part(epoch, position * size, k * size).reshape(k, size))
            count, position = count - k, position + k
            if position == self.updates_per_epoch:
                epoch, position = epoch + 1, 0
        if not parts:
            return self._part(epoch, position * size, n - position * size)[None]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, epoch: int, first: int, count: int) -> Tensor:
        """The example numbers that stand at some places of an epoch."""
        if self.sampling == "sequential":
            return torch.arange(first, first + count)
        number = 0 if self.sampling == "shuffle_once" else epoch
        if self._drawn is None or self._drawn[0] != number:
            kind = Draws if self.sampling == "replacement" else Order
            self._drawn = number, kind(self.num_examples, (self.seed, number))
        return torch.from_numpy(self._drawn[1](first, count))
