"""Which examples make which update, and where a sweep must end.

Both are known before the first update. The examples are a pure function of the seed and the update
number. A sweep ends where somebody must see the run: a validation, a checkpoint, a point of a
curve, an instrument. Everybody declares that beforehand, and the plan alone cuts.

N examples, B examples per update, U = ⌈N/B⌉ updates per epoch, T planned updates,
K updates in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from gdtrain.data.order import Draws, Order
from gdtrain.ranges import Whole

__all__ = ["Every", "Plan", "Sampling", "Watcher"]

_FIRST_SWEEP = 16  # updates, of which the first ones warm up
_SAMPLINGS = ("reshuffle", "shuffle_once", "replacement", "sequential")

Sampling = Literal["reshuffle", "shuffle_once", "replacement", "sequential"]


class Watcher(Protocol):
    """Somebody who must see the run at certain updates.

    Example:
        >>> watcher: Watcher = Every(100)
        >>> watcher.next_update(0)
        100
    """

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
        """The smallest such number above an update.

        Args:
            update: Updates made, range [0, ∞).
        """
        return update + self.updates - (update - self.offset) % self.updates


class Plan:
    """Names the examples of each update, and cuts the updates into sweeps.

    It holds no state: update t alone gives the epoch ⌊t/U⌋ and the place in it, so a resumed run
    goes on with the examples that would have come. A ragged last batch makes a sweep of its own.

    The order is drawn from (seed, epoch), see `gdtrain.data.order`, and is made a sweep at a time:
    it takes no memory of the size of N. A batch of all N examples, whose mean has no order, is read
    as stored (but for "replacement").

    Args:
        num_examples: N, range [1, ∞).
        batch_size: B, range [1, N].
        sampling: "reshuffle", a new permutation each epoch; "shuffle_once", one for all;
            "replacement", N independent draws an epoch; "sequential", as stored.
        seed: Of the order, range [0, ∞).
        total: T; None: no end.
        updates_per_sweep: The largest K, range [1, ∞); "auto": begins with few, and the loop sets
            it by the time that updates take.
        watchers: Who must see the run.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> plan = Plan(5, 2, sampling="sequential", total=6, updates_per_sweep=8)
        >>> plan.sweep(0).tolist(), plan.sweep(2).tolist()
        ([[0, 1], [2, 3]], [[4]])
        >>> plan.watchers = [Every(1)]
        >>> plan.sweep(0).tolist()
        [[0, 1]]
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
        if sampling not in _SAMPLINGS:
            raise ValueError(
                f"sampling must be one of {', '.join(_SAMPLINGS)}. Received: {sampling!r}."
            )
        if not 1 <= batch_size <= num_examples:
            raise ValueError(
                f"batch_size must lie in [1, {num_examples}], the number of training examples. "
                f"Received: batch_size={batch_size}."
            )
        self.num_examples, self.batch_size = num_examples, batch_size
        self.sampling, self.seed = sampling, Whole(0).check("seed", seed)
        self.total = total
        self.automatic = updates_per_sweep == "auto"
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
        """The smallest update number above one at which a watcher must see the run.

        Args:
            update: Updates made, range [0, ∞).

        Returns:
            None: there is no such update.

        Raises:
            ValueError: A watcher names an update that is not above the one asked about.
        """
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
        """The examples of the next sweep.

        Args:
            update: Its first update, range [0, T).
            before: The update before which it must end; None: T and the watchers alone matter.

        Returns:
            (K, B), int64, one row for each update.
        """
        ends = (update + self.updates_per_sweep, self.total, before, self.next_update(update))
        return self.block(update, min(end for end in ends if end is not None) - update)

    # ------------------------------------------------------------------ which examples

    def order(self, epoch: int) -> Tensor:
        """The N example numbers of an epoch, in their order.

        Args:
            epoch: From 0.

        Returns:
            (N,), int64.
        """
        return self._part(epoch)(0, self.num_examples)

    def block(self, update: int, count: int) -> Tensor:
        """The examples of some updates: fewer before a ragged batch, which comes alone.

        Args:
            update: The first, range [0, ∞).
            count: At most so many, range [1, ∞).

        Returns:
            (K, B), int64.
        """
        n, size = self.num_examples, self.batch_size
        if self.is_full_batch:
            # A mean over all examples has no order: files are then read from front to back.
            return torch.arange(n).expand(count, n)
        parts: list[Tensor] = []
        epoch, position = divmod(update, self.updates_per_epoch)
        while count:
            k = min(count, n // size - position)
            if k == 0:
                break
            parts.append(self._part(epoch)(position * size, k * size).reshape(k, size))
            count, position = count - k, position + k
            if position == self.updates_per_epoch:
                epoch, position = epoch + 1, 0
        if not parts:
            done = position * size
            return self._part(epoch)(done, n - done)[None]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, epoch: int) -> Callable[[int, int], Tensor]:
        """From a position and a count to the example numbers that stand there in an epoch."""
        if self.sampling == "sequential":
            return lambda first, count: torch.arange(first, first + count)
        number = 0 if self.sampling == "shuffle_once" else epoch
        if self._drawn is None or self._drawn[0] != number:
            kind = Draws if self.sampling == "replacement" else Order
            self._drawn = number, kind(self.num_examples, (self.seed, number))
        draw = self._drawn[1]
        return lambda first, count: torch.from_numpy(draw(first, count))
