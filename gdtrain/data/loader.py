"""Which examples make which update: a pure function of the seed and the update number.

N examples, B examples per update, U = ⌈N/B⌉ updates per epoch, T planned updates,
K updates in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gdtrain.objective import own_part

__all__ = ["EvaluationLoader", "IndexLoader", "Sampling"]

Sampling = Literal["reshuffle", "shuffle_once", "replacement", "sequential"]


class IndexLoader:
    """Plans sweeps: yields blocks (K, B) of example numbers, one row for each update.

    It holds no state and has no length: update t alone gives the epoch ⌊t/U⌋ and the place in it,
    so each iteration starts at the update that `start` tells, and a resumed run goes on with the
    examples that would have come. One iteration is (the rest of) one epoch. No block crosses the
    end of an epoch or of the run; a ragged last batch has a block of its own.

    The order is that of `numpy.random.default_rng((seed, epoch))`.

    Args:
        num_examples: N, range [1, ∞).
        batch_size: B, range [1, N].
        sampling: "reshuffle", a new permutation each epoch; "shuffle_once", one for all;
            "replacement", N independent draws an epoch; "sequential", as stored.
        seed: Of the order, range [0, ∞).
        start: Called at the start of an iteration; the update number to go on from.
        total: T; None: no end.
        updates_per_sweep: The largest K, range [1, ∞).

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> loader = IndexLoader(5, 2, sampling="sequential", updates_per_sweep=8)
        >>> [block.tolist() for block in loader]
        [[[0, 1], [2, 3]], [[4]]]
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
        updates_per_sweep: int = 64,
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
        if updates_per_sweep < 1:
            raise ValueError(
                f"updates_per_sweep must be at least 1. Received: {updates_per_sweep}."
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
        n = self.num_examples
        if self.sampling == "sequential":
            return torch.arange(n)
        rng = np.random.default_rng((self.seed, 0 if self.sampling == "shuffle_once" else epoch))
        if self.sampling == "replacement":
            return torch.from_numpy(rng.integers(0, n, n))
        return torch.from_numpy(rng.permutation(n))

    def __iter__(self) -> Iterator[Tensor]:
        update = self.start()
        epoch, position = divmod(update, self.updates_per_epoch)
        last = self.updates_per_epoch
        if self.total is not None:
            last = min(last, position + self.total - update)
        if position >= last:
            return
        whole_batch = self.batch_size == self.num_examples and self.sampling != "replacement"
        # A mean over all examples has no order: files are then read from front to back.
        order = torch.arange(self.num_examples) if whole_batch else self.order(epoch)
        whole = min(self.num_examples // self.batch_size, last)  # updates with all B examples
        while position < last:
            if position < whole:
                k = min(self.updates_per_sweep, whole - position)
                first = position * self.batch_size
                block = order[first : first + k * self.batch_size]
                yield block.reshape(k, self.batch_size)
                position += k
            else:
                yield order[position * self.batch_size :].reshape(1, -1)
                position += 1


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
