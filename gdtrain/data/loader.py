"""What Lightning iterates over: blocks of a plan, pairs that are fetched for it, and slices.

N examples, B examples per update, C classes, T planned updates, K updates in one sweep, W worker
processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gdtrain.data.sparse import SparseInputs
from gdtrain.descent.plan import Plan
from gdtrain.generators import same_after, seed_all
from gdtrain.objective import own_part

__all__ = [
    "EvaluationLoader",
    "Examples",
    "IndexLoader",
    "PairLoader",
    "SizedPairLoader",
    "as_inputs",
    "as_targets",
]


# ---------------------------------------------------------------------- by index


class IndexLoader(Plan):
    """A plan that yields its blocks (K, B) of example numbers, one row for each update.

    It has no state and no length: each iteration starts at the update that `start()` tells. One
    iteration is (the rest of) one epoch, or up to the next epoch whose number is a multiple of the
    attribute `epochs_per_iteration` (None: up to the end of the run); no block crosses its end.
    """

    start: Callable[[], int] = staticmethod(lambda: 0)
    epochs_per_iteration: int | None = 1

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
    """Yields (inputs, targets) of a rank's examples in order, as slices that copy nothing."""

    def __init__(
        self, inputs: Any, targets: Tensor, batch_size: int = 1024, rank: int = 0, ranks: int = 1
    ) -> None:
        self.inputs, self.targets = inputs, targets
        if isinstance(inputs, SparseInputs):
            batch_size = min(batch_size, inputs.rows_at_once)
        start, end = own_part(len(inputs), rank, ranks)
        self._slices = [
            slice(first, min(first + batch_size, end)) for first in range(start, end, batch_size)
        ] or [slice(start, end)]  # a rank without examples takes part all the same

    def __len__(self) -> int:
        return len(self._slices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self._slices:
            yield self.inputs[part], self.targets[part]


# ---------------------------------------------------------------------- one by one


class PairLoader:
    """Yields the (inputs, targets) of each update of a plan, fetched by worker processes.

    Like `IndexLoader` it has no length and no state of its own. `keep`: whether the processes live
    on from one epoch to the next, until `close`.
    """

    def __init__(
        self,
        examples: Examples,
        plan: IndexLoader,
        num_workers: int = 0,
        *,
        keep: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.examples, self.plan, self.num_workers = examples, plan, num_workers
        self.keep, self.pin_memory = keep, pin_memory
        self._loader: DataLoader | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._loader is None:
            self._loader = DataLoader(
                self.examples,
                batch_size=None,  # an item is the batch of an update
                sampler=_Keys(self.plan),
                num_workers=self.num_workers,
                persistent_workers=self.keep and self.num_workers > 0,
                pin_memory=self.pin_memory,
                collate_fn=_as_it_is,
                generator=torch.Generator(),  # not the global one, whose numbers are the model's
            )
        for pair in self._loader:
            if isinstance(pair, str):  # said in a worker process, raised in this one
                raise ValueError(pair)
            yield pair

    def batch(self, update: int) -> tuple[Tensor, Tensor]:
        """The (inputs, targets) of one update, fetched again."""
        return self.examples.fetch(self.plan.block(update, 1)[0].tolist(), update)

    def close(self) -> None:
        """End the worker processes."""
        self._loader = None


class SizedPairLoader(PairLoader):
    """All examples once, so that it has a length."""

    def __len__(self) -> int:
        return self.plan.updates_per_epoch


class _Keys:
    """What a worker needs to know of each update: its number, and the numbers of its examples."""

    def __init__(self, plan: IndexLoader) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for update, block in enumerate(self.plan, self.plan.start()):
            yield update, block[0].tolist()


def _as_it_is(pair: Any) -> Any:
    return pair


class Examples(Dataset):
    """Fetches, checks and stacks rows of a Dataset of pairs; worker processes hold a copy.

    `dtype`: of all that is floating-point numbers. `seed`: of what the Dataset draws from global
    generators, and so is `stream`: a number that is another one for each set.
    """

    def __init__(
        self, dataset: Dataset, rows: NDArray[np.int64], dtype: torch.dtype, seed: int, stream: int
    ) -> None:
        self.dataset, self.rows, self.dtype = dataset, rows, dtype
        self.seed, self.stream = seed, stream
        self.classify = False
        self.num_classes: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, list[int]]) -> tuple[Tensor, Tensor] | str:
        update, numbers = key
        try:
            return self.fetch(numbers, update)
        except _RefusedError as error:
            return str(error)

    def items(self, numbers: list[int]) -> list[Any]:
        """What the Dataset yields for examples, counted from 0 within these rows."""
        rows = self.rows[numbers].tolist()
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(rows)
        return [self.dataset[row] for row in rows]

    def fetch(self, numbers: list[int], update: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs (B, …) and targets (B, …) of examples, counted from 0 within these rows."""
        rows = self.rows[numbers]
        names = np.random.SeedSequence((self.seed, self.stream, update))
        with same_after(()):  # what the Dataset draws is that of this update, wherever it is made
            seed_all(int(names.generate_state(1)[0]))
            items = self.items(numbers)
        for row, item in zip(rows, items, strict=True):
            if not isinstance(item, tuple | list) or len(item) != 2:
                what = f"{type(item).__name__} of {len(item)}" if isinstance(item, Sized) else item
                raise _RefusedError(
                    f"An example must be a pair (input, target). Received: {what} as example {row}."
                )
        inputs = as_inputs(_stacked([item[0] for item in items], rows, "input"), self.dtype)
        targets = as_targets(_stacked([item[1] for item in items], rows, "target"), self.dtype)
        self.check(inputs, targets, rows)
        return inputs, self.labels(targets, rows) if self.classify else targets

    def check(self, inputs: Tensor, targets: Tensor, rows: NDArray[np.int64]) -> None:
        """Raise on numbers that are not finite."""
        for tensor, what in ((inputs, "Inputs"), (targets, "Targets")):
            if not tensor.is_floating_point() or math.isfinite(tensor.sum()):
                continue  # a finite sum, which costs less, has finite terms
            if not tensor.isfinite().all():
                bad = int((~tensor.isfinite().reshape(len(tensor), -1).all(1)).nonzero()[0])
                raise _RefusedError(
                    f"{what} must be finite numbers. Received: one that is not in example "
                    f"{rows[bad]} (counted from 0)."
                )

    def labels(self, targets: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Class numbers (B,), int64, of targets that are whole numbers 0 … C−1, or one-hot."""
        if targets.ndim == 2 and targets.shape[1] == self.num_classes:
            ones = ((targets == 0) | (targets == 1)).all(1) & (targets.sum(1) == 1)
            if not ones.all():
                bad = int((~ones).nonzero()[0])
                raise _RefusedError(
                    f"Targets must be one-hot, one 1 and zeros, as in the first examples. "
                    f"Received: {targets[bad].tolist()} as that of example {rows[bad]} (counted "
                    f"from 0)."
                )
            return targets.argmax(1)
        if targets.ndim != 1:
            raise _RefusedError(
                f"A class must be one whole number, or one-hot in {self.num_classes} columns. "
                f"Received: targets of shape {tuple(targets.shape[1:])}."
            )
        classes = targets.long()
        wrong = (classes != targets) | (classes < 0)
        if self.num_classes is not None:
            wrong |= classes >= self.num_classes
        if wrong.any():
            bad = int(wrong.nonzero()[0])
            last = "C−1" if self.num_classes is None else f"{self.num_classes - 1}"
            raise _RefusedError(
                f"Labels must be whole numbers 0 … {last}. Received: {targets[bad].item()} as that "
                f"of example {rows[bad]} (counted from 0). task=regression takes them as numbers."
            )
        return classes


class _RefusedError(ValueError):
    """Examples cannot be used; the message is for the user."""


def _stacked(values: list[Any], rows: NDArray[np.int64], what: str) -> Tensor:
    """(B, …), of one type."""
    if all(isinstance(value, bool | int | float) for value in values):
        return torch.from_numpy(np.asarray(values))
    if all(isinstance(value, Tensor) for value in values):
        with suppress(RuntimeError):  # shapes that differ: below, one of them is named
            return torch.stack(values)
    tensors = []
    for row, value in zip(rows, values, strict=True):
        known = isinstance(value, Tensor | np.ndarray | np.generic | bool | int | float | list)
        array = value if isinstance(value, Tensor) else np.asarray(value) if known else None
        if array is None or (isinstance(array, np.ndarray) and array.dtype.kind not in "fiub"):
            raise _RefusedError(
                f"The {what} of an example must be a tensor, an array or a number: convert it in "
                f"the Dataset, as transform=torchvision.transforms.ToTensor() does for images. "
                f"Received: {type(value).__name__} in example {row}."
            )
        tensors.append(torch.as_tensor(array))
        if tensors[-1].shape != tensors[0].shape:
            raise _RefusedError(
                f"The {what}s of all examples must have one shape, {tuple(tensors[0].shape)} as in "
                f"example {rows[0]}. Received: {tuple(tensors[-1].shape)} in example {row}."
            )
    return torch.stack(tensors)


def as_inputs(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs: floating-point numbers, bytes and booleans in `dtype`; whole numbers as they are."""
    if x.is_floating_point() or x.dtype in (torch.uint8, torch.bool):
        x = x.to(dtype)
        return x.unsqueeze(1) if x.ndim == 1 else x
    return x


def as_targets(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Targets: floating-point numbers in `dtype`, others as whole numbers; (B, 1) as (B,)."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    return y.to(dtype if y.is_floating_point() else torch.int64)
