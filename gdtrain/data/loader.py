"""What Lightning iterates over: the blocks of a plan, and the examples of a part in slices.

N examples, B examples per update, T planned updates, K updates in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor

from gdtrain.descent.plan import Plan, Sampling
from gdtrain.objective import own_part

__all__ = ["EvaluationLoader", "IndexLoader"]


class IndexLoader(Plan):
    """A plan that yields its blocks (K, B) of example numbers, one row for each update.

    It has no state and no length: each iteration starts at the update that `start` tells. One
    iteration is (the rest of) one epoch, or up to the next epoch whose number is a multiple of the
    attribute `epochs_per_iteration` (None: up to the end of the run). No block crosses the end of
    an iteration.

    Args:
        num_examples: N, range [1, ∞).
        batch_size: B, range [1, N].
        sampling: As for `gdtrain.descent.plan.Plan`.
        seed: Of the order, range [0, ∞).
        start: Called at the start of an iteration; the update number to go on from.
        total: T; None: no end.
        updates_per_sweep: The largest K, range [1, ∞), or "auto"; may change between two blocks.

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
        updates_per_sweep: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(
            num_examples,
            batch_size,
            sampling=sampling,
            seed=seed,
            total=total,
            updates_per_sweep=updates_per_sweep,
        )
        self.start = start
        self.epochs_per_iteration: int | None = 1

    def __iter__(self) -> Iterator[Tensor]:
        update = first = self.start()
        # Asked again before each block: the first is fetched before the module can say.
        while update < self._end(first):
            block = self.sweep(update, self._end(first))
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


class EvaluationLoader:
    """Yields (inputs, targets) of all examples in order, as slices that copy nothing.

    Args:
        inputs: (N, …); a tensor, or rows mapped from a file.
        targets: (N, …).
        batch_size: Examples per slice, range [1, ∞).
        rank: Of this process, which gets its part of the examples.
        ranks: Number of processes.

    Example:
        >>> import torch
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
