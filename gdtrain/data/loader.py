"""Which examples make which update: a pure function of the seed and the update number.

N examples, B examples per update, U = ⌈N/B⌉ updates per epoch, T planned updates,
K updates in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from gdtrain.data.order import Draws, Order
from gdtrain.objective import own_part

__all__ = ["EvaluationLoader", "IndexLoader", "Sampling"]

_FIRST_SWEEP = 16  # updates, of which the first ones warm up

Sampling = Literal["reshuffle", "shuffle_once", "replacement", "sequential"]


class IndexLoader:
    """Plans sweeps: yields blocks (K, B) of example numbers, one row for each update.

    It holds no state and has no length: update t alone gives the epoch ⌊t/U⌋ and the place in it,
    so each iteration starts at the update that `start` tells, and a resumed run goes on with the
    examples that would have come. One iteration is (the rest of) one epoch, or up to the next
    epoch whose number is a multiple of the attribute `epochs_per_iteration` (None: up to the end of
    the run). No block crosses the end of an iteration; a ragged last batch has a block of its own.

    The order is drawn from (seed, epoch), see `gdtrain.data.order`, and is made a block at a time:
    it takes no memory of the size of N. A batch of all N examples, whose mean has no order, is read
    as stored (but for "replacement").

    Args:
        num_examples: N, range [1, ∞).
        batch_size: B, range [1, N].
        sampling: "reshuffle", a new permutation each epoch; "shuffle_once", one for all;
            "replacement", N independent draws an epoch; "sequential", as stored.
        seed: Of the order, range [0, ∞).
        start: Called at the start of an iteration; the update number to go on from.
        total: T; None: no end.
        updates_per_sweep: The largest K, range [1, ∞); may change between two blocks. "auto":
            begins with few; the Lightning module then sets it by the time that updates take.
        next_update: From an update number to the smallest one above it at which somebody must see
            the state: a block ends there. None: nobody, from there on.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> loader = IndexLoader(5, 2, sampling="sequential", updates_per_sweep=8)
        >>> [block.tolist() for block in loader]
        [[[0, 1], [2, 3]], [[4]]]
        >>> loader.next_update = lambda update: update + 1
        >>> [block.tolist() for block in loader]
        [[[0, 1]], [[2, 3]], [[4]]]
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        sampling: Sampling = "reshuffle",
        seed: int = 0,
        start: Callable[[], int] = lambda: 0,
        total: int | None = None,
        updates_per_sweep: int | Literal["auto"] = "auto",
        next_update: Callable[[int], int | None] = lambda update: None,
    ) -> None:
        if sampling not in ("reshuffle", "shuffle_once", "replacement", "sequential"):
            raise ValueError(
                f"sampling must be one of reshuffle, shuffle_once, replacement, sequential. "
                f"Received: {sampling!r}."
            )
        if not 1 <= batch_size <= num_examples:
            raise ValueError(
                f"batch_size must lie in [1, {num_examples}], the number of training examples. "
                f"Received: batch_size={batch_size}."
            )
        self.automatic = updates_per_sweep == "auto"
        if isinstance(updates_per_sweep, str):
            updates_per_sweep = _FIRST_SWEEP if self.automatic else 0
        if isinstance(updates_per_sweep, bool) or updates_per_sweep < 1:
            raise ValueError(
                f"updates_per_sweep must be a whole number of at least 1, or auto. Received: "
                f"{updates_per_sweep!r}."
            )
        if seed < 0:
            raise ValueError(f"seed must be at least 0. Received: seed={seed}.")
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.sampling = sampling
        self.seed = seed
        self.start = start
        self.total = total
        self.updates_per_sweep = updates_per_sweep
        self.next_update = next_update
        self.epochs_per_iteration: int | None = 1
        self._drawn: tuple[int, Order | Draws] | None = None

    @property
    def updates_per_epoch(self) -> int:
        """U = ⌈N/B⌉."""
        return -(-self.num_examples // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The N example numbers of an epoch, in their order.

        Args:
            epoch: From 0.

        Returns:
            (N,), int64.
        """
        return self._part(epoch)(0, self.num_examples)

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

    def __iter__(self) -> Iterator[Tensor]:
        update = first = self.start()
        # Asked again before each block: the first is fetched before the module can say.
        while update < self._end(first):
            ends = (update + self.updates_per_sweep, self._end(first), self.next_update(update))
            block = self.block(update, min(end for end in ends if end is not None) - update)
            yield block
            update += len(block)

    def _end(self, first: int) -> int:
        """The update before which the iteration that began with `first` ends."""
        epochs, per_epoch = self.epochs_per_iteration, self.updates_per_epoch
        if epochs is None and self.total is not None:
            return self.total
        epochs = epochs or 1
        end = (first // (epochs * per_epoch) + 1) * epochs * per_epoch
        return end if self.total is None else min(end, self.total)

    def block(self, update: int, count: int) -> Tensor:
        """The examples of some updates: fewer before a ragged batch, which comes alone.

        Args:
            update: The first, range [0, ∞).
            count: At most so many, range [1, ∞).

        Returns:
            (K, B), int64.
        """
        n, size = self.num_examples, self.batch_size
        if size == n and self.sampling != "replacement":
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


class EvaluationLoader:
    """Yields (inputs, targets) of all examples in order, as slices that copy nothing.

    Args:
        inputs: (N, …); a tensor, or rows mapped from a file.
        targets: (N, …).
        batch_size: Examples per slice, range [1, ∞).
        rank: Of this process, which gets its part of the examples.
        ranks: Number of processes.

    Example:
        >>> loader = EvaluationLoader(torch.zeros(5, 2), torch.zeros(5), batch_size=2)
        >>> [len(x) for x, y in loader], len(loader)
        ([2, 2, 1], 3)
    """

    def __init__(
        self, inputs: Any, targets: Tensor, batch_size: int = 1024, rank: int = 0, ranks: int = 1
    ) -> None:
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size
        start, end = own_part(len(inputs), rank, ranks)
        self._slices = [
            slice(first, min(first + batch_size, end)) for first in range(start, end, batch_size)
        ] or [slice(start, end)]  # a rank without examples takes part all the same

    def __len__(self) -> int:
        return len(self._slices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self._slices:
            yield self.inputs[part], self.targets[part]
