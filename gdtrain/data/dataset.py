"""Examples that only have `__getitem__`: fetched one by one, stacked into the batch of an update.

N examples, B examples per update, C classes, W worker processes.
"""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from gdtrain.data.loader import IndexLoader
from gdtrain.data.module import DataModule, Raw
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.targets import Task, check_task, decide, may_be_classes, wanted_task

__all__ = ["DatasetDataModule", "PairLoader"]

_log = logging.getLogger("gdtrain")

_ROUND_TRIP = 1e-3  # seconds: a batch that takes less gains nothing from a worker process
_WORTH_STARTING = 1.0  # seconds of fetching, below which evaluation starts no processes
_SLICE_BYTES = 64 * 2**20  # of the examples that are evaluated together
_PROBES = 16  # examples that are fetched to measure the time of one, at most
_PROBE_SECONDS = 0.2  # as long as that, at most


class DatasetDataModule(DataModule):
    """Any map-style torch `Dataset` that yields pairs (input, target).

    The examples are fetched one by one through a DataLoader, which a line on the log says, with
    their speed: tensors in an `ArrayDataModule` are faster where the data fit into memory. A
    `TensorDataset`, or a `Subset` of one, is resident already and is trained by index.

    Inputs are used as the Dataset yields them: nothing is standardised, and only floating-point
    numbers, bytes and booleans are converted (to `dtype`). Classes are whole numbers 0 … C−1, or
    one-hot.

    The order is that of every data module, `IndexLoader.order`. What a Dataset draws from the
    global generators of torch, NumPy or Python (for augmentation) depends on `seed` and the update
    alone: not on the number of workers, nor on where a run was resumed. It trains on one device.

    Args:
        train: The training set: `__len__` and `__getitem__`, or `__getitems__` for several.
        val: The validation set; None: `val_fraction` of the training set.
        test: The test set; None: `test_fraction` of the training set.
        num_classes: C, range [2, ∞); None: the Dataset's `num_classes`, `classes` or `targets`, or
            else all targets are fetched once.
        task: "classification", "regression", or "auto": what the Dataset tells (`num_classes`,
            `classes`), or else `gdtrain.data.targets.decide` says of its targets, all of which are
            fetched once where they may be classes.
        num_workers: W, range [0, ∞); "auto": 0 where the batch of an update takes less than a
            millisecond to fetch, else one less than there are cores, and at most 16.
        val_fraction: Share of the training set (or count, if ≥ 1), not used with `val`.
        test_fraction: Likewise.
        **options: As for `DataModule`: `batch_size`, `sampling`, `seed`, … `batch_size="full"`
            holds all examples in memory at each update.

    Raises:
        ValueError: An argument is out of range; later, examples that cannot be used.

    Example:
        >>> class Squares(Dataset):
        ...     def __len__(self):
        ...         return 100
        ...     def __getitem__(self, i):
        ...         return torch.tensor([i / 100]), (i / 100) ** 2
        >>> data = DatasetDataModule(Squares(), batch_size=10)
        >>> data.setup()
        >>> data.num_train, data.input_shape, data.num_classes
        (100, (1,), None)
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, targets.shape
        (torch.Size([10, 1]), torch.Size([10]))
    """

    def __init__(
        self,
        train: Dataset,
        val: Dataset | None = None,
        test: Dataset | None = None,
        *,
        num_classes: int | None = None,
        task: Task = "auto",
        num_workers: int | Literal["auto"] = "auto",
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        **options: Any,
    ) -> None:
        options = {"standardize": False, "standardize_targets": False, **options}
        super().__init__(val_fraction=val_fraction, test_fraction=test_fraction, **options)
        if self.standardize or self.standardize_targets:
            raise ValueError(
                "A Dataset's examples are used as it yields them, so standardize and "
                "standardize_targets must be false: scale them in its transform, or put them into "
                "an ArrayDataModule."
            )
        check_task(task)
        _check_whole("num_classes", num_classes, 2, None)
        _check_whole("num_workers", num_workers, 0, "auto")
        self._sets: dict[str, Dataset] = {"train": _checked(train, "train")}
        for name, dataset in (("val", val), ("test", test)):
            if dataset is not None:
                self._sets[name] = _checked(dataset, name)
        self.num_workers = num_workers
        self._task, self._given_classes = task, num_classes
        self._examples: dict[str, _Examples] = {}
        self._example_shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._seconds = 0.0
        self._slice = 1
        self._loaders: list[PairLoader] = []

    def load(self) -> Raw:
        """Not for a Dataset, whose examples are fetched when they are needed.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("The examples of a Dataset are fetched one by one.")

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str | None = None) -> None:
        """Split, look at a few examples, count the classes; once, whatever the stage.

        Args:
            stage: Lightning's; not used.

        Raises:
            ValueError: The examples cannot be used, or not be split as asked.
        """
        if self._examples:
            return
        train = self._sets["train"]
        split = self._rows()
        sets = {name: self._sets.get(name, train) for name in split}
        made = {
            name: _Examples(sets[name], rows, self.dtype, self.seed, stream)
            for stream, (name, rows) in enumerate(split.items())
        }
        self._follow_trainer()
        x, y = made["train"].fetch([0])
        resident = {name: self._resident(sets[name], split[name]) for name in made}
        self._parts = {name: part for name, part in resident.items() if part is not None}
        fetched = [examples for name, examples in made.items() if name not in self._parts]
        if fetched:
            self._measure(fetched[0], x.nbytes)
        classes = self._settle(made["train"])
        for name, examples in made.items():
            examples.num_classes = classes
            examples.classify = classes is not None
            if name in self._parts and classes is not None:
                inputs, targets = self._parts[name]
                self._parts[name] = inputs, examples.labels(targets, split[name])
        shape = () if classes is not None else tuple(y.shape[1:])
        self._example_shapes = (tuple(x.shape[1:]), shape)
        for name, (inputs, targets) in self._parts.items():
            made[name].check(cast(Tensor, inputs), targets, split[name])
        self.preprocessing = Preprocessing(
            classes=None if classes is None else list(range(classes)),
            input_shape=list(self._example_shapes[0]),
        )
        count = len(split["train"])
        if self.batch_size != "full" and self.batch_size > count:
            raise ValueError(
                f"batch_size must be at most {count}, the number of training examples. "
                f"Received: batch_size={self.batch_size}. batch_size=full takes them all."
            )
        if self.micro_batch_size == "auto" and "train" not in self._parts:
            raise ValueError(
                "micro_batch_size=auto is chosen for resident examples: for a Dataset it must be "
                "a number or null."
            )
        self._examples = made
        self._say()

    @property
    def is_resident(self) -> bool:
        """Whether the training examples are held in memory."""
        return "train" in self._parts

    @property
    def split(self) -> dict[str, NDArray[np.int64]]:
        """Which examples of its set each part has."""
        return {name: examples.rows for name, examples in self._examples.items()}

    def _rows(self) -> dict[str, NDArray[np.int64]]:
        """Which examples of its set each part has."""
        n = len(cast(Sized, self._sets["train"]))
        counts = {
            name: 0 if name in self._sets else int(f) if f >= 1 else round(f * n)
            for name, f in (("val", self.val_fraction), ("test", self.test_fraction))
        }
        if n - sum(counts.values()) < 1:
            raise ValueError(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} leave "
                f"nothing of {n} examples to train on."
            )
        order = np.arange(n)
        if any(counts.values()):
            order = np.random.default_rng(self.split_seed).permutation(n)
        val, test, train = np.split(order, [counts["val"], sum(counts.values())])
        split = {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}
        for name in ("val", "test"):
            if name in self._sets:
                split[name] = np.arange(len(cast(Sized, self._sets[name])))
        return split

    def _resident(self, dataset: Dataset, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor] | None:
        """The tensors of a TensorDataset, or of a Subset of one; None for other datasets."""
        picked = torch.from_numpy(rows)
        while type(dataset) is Subset:
            picked = torch.as_tensor(dataset.indices)[picked]
            dataset = dataset.dataset
        if type(dataset) is not TensorDataset or len(dataset.tensors) != 2:
            return None  # a subclass may yield something else
        inputs, targets = dataset.tensors
        if not torch.equal(picked, torch.arange(len(inputs))):
            inputs, targets = inputs[picked], targets[picked]
        return _number(inputs, self.dtype), _target(targets, self.dtype)

    def _measure(self, examples: _Examples, size: int) -> None:
        """Time of one example, from a few."""
        probes = np.linspace(0, len(examples) - 1, min(_PROBES, len(examples))).astype(np.int64)
        times: list[float] = []
        for number in probes.tolist():
            started = time.perf_counter()
            examples.items([number])
            times.append(time.perf_counter() - started)
            if sum(times) > _PROBE_SECONDS:
                break
        self._seconds = float(np.median(times))  # not the mean: the first may open files
        self._slice = max(1, _SLICE_BYTES // max(size, 1))

    def _workers(self, batch: int, batches: int) -> int:
        """W for batches of so many examples, which are so many."""
        if self.num_workers != "auto":
            return self.num_workers
        if batch * self._seconds < _ROUND_TRIP:
            return 0
        return min(_cores() - 1, 16, batches)

    def _settle(self, examples: _Examples) -> int | None:
        """C; None: the targets are numbers."""
        wanted, because = wanted_task(self._task, self._loss)
        count, said = self._given_classes, ""
        if count is None or wanted == "regression":
            y = self._some_targets(examples)
            if wanted == "regression" or (wanted is None and not may_be_classes(y)):
                said = decide(y, "regression", self._loss).said
                self.target_said = said if y.ndim > 1 else f"target: numbers{because}"
                return None
            count = _told_classes(self._sets["train"])
            if count is None:
                y, rows = (y, examples.rows) if y.ndim > 1 else self._all_targets(examples)
                if wanted is not None and y.ndim == 1:
                    examples.labels(torch.from_numpy(y), rows)
                decision = decide(y, self._task, self._loss)
                said = decision.said
                if decision.classes is None:
                    self.target_said = said
                    return None
                if y.ndim == 1:
                    examples.labels(torch.from_numpy(y), rows)
                count = y.shape[1] if y.ndim > 1 else int(y.max()) + 1
        if count < 2:
            raise ValueError(f"There must be at least two classes. Received: {count}.")
        self.target_said = said or f"target: {count} classes{because}"
        return count

    def _some_targets(self, examples: _Examples) -> NDArray[Any]:
        """Those of a few examples; all, where they are resident."""
        if "train" in self._parts:
            return self._parts["train"][1].numpy()
        return examples.fetch(list(range(min(_PROBES, len(examples)))))[1].numpy()

    def _all_targets(self, examples: _Examples) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """With the rows that they have in their set."""
        if "train" in self._parts:
            return self._parts["train"][1].numpy(), examples.rows
        told = _told_targets(self._sets["train"])
        if told is not None:
            return told, np.arange(len(told))
        _log.info(
            f"What the targets are is seen from all {len(examples):,} examples, about "
            f"{len(examples) * self._seconds:.1f} s in one process: num_classes=… or "
            f"task=regression spares that."
        )
        return torch.cat([y for _, y in self._in_order(examples)]).numpy(), examples.rows

    def _say(self) -> None:
        if "train" in self._parts:
            _log.info(
                "The training set is a TensorDataset: its tensors are used by index, as they are "
                "(not standardised)."
            )
            return
        size = self.examples_per_update
        workers = self._workers(size, -(-self.num_train // size))
        by = "in this process" if workers == 0 else f"by {workers} worker process(es)"
        rate = 1 / max(self._seconds, 1e-9)
        _log.info(
            f"The {self.num_train:,} training examples are fetched one by one through a DataLoader "
            f"{by}, about {rate:,.0f} examples/s in each. Tensors (ArrayDataModule) would be "
            f"faster, where they fit into memory."
        )

    # ------------------------------------------------------------------ what models need to know

    def examples(self, part: Literal["train", "val", "test"]) -> tuple[Any, Tensor]:
        """Inputs and targets of one part, where they are resident; else see `evaluation_loader`.

        Args:
            part: "train", "val" or "test".

        Raises:
            ValueError: They are fetched one by one.
        """
        if part not in self._parts:
            raise ValueError(
                f"The {part} examples of a Dataset are fetched one by one: use "
                f"evaluation_loader({part!r})."
            )
        return self._parts[part]

    def count(self, part: Literal["train", "val", "test"]) -> int:
        """Number of examples of one part.

        Args:
            part: "train", "val" or "test".
        """
        return len(self._examples[part])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self._example_shapes[0]

    @property
    def num_targets(self) -> int:
        """Target columns of a regression."""
        return self._example_shapes[1][0] if self._example_shapes[1] else 1

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> IndexLoader | PairLoader:  # type: ignore[override]
        """Batches of pairs, one for each update; blocks of example numbers if they are resident."""
        plan = super().train_dataloader()
        if "train" in self._parts:
            return plan
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1:
            raise ValueError(
                f"The examples of a Dataset are fetched for one device. Received: "
                f"{trainer.world_size} processes. Put them into tensors (ArrayDataModule)."
            )
        plan.updates_per_sweep = 1
        cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        workers = self._workers(plan.batch_size, plan.updates_per_epoch)
        loader = PairLoader(self._examples["train"], plan, workers, keep=True, pin_memory=cuda)
        self._loaders.append(loader)
        return loader

    def evaluation_loader(
        self,
        part: Literal["train", "val", "test"],
        rank: int = 0,
        ranks: int = 1,
        batch_size: int = 1024,
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """All examples of one part, in their order.

        Args:
            part: "train", "val" or "test".
            rank: Of this process.
            ranks: Number of processes.
            batch_size: Examples in one pair, at most, range [1, ∞).

        Returns:
            Pairs of inputs and targets; empty for an empty part.
        """
        if not self.count(part):
            return []
        if part in self._parts:
            return super().evaluation_loader(part, rank, ranks, batch_size)
        return self._in_order(self._examples[part], batch_size)

    def _in_order(self, examples: _Examples, batch_size: int = 1024) -> _SizedPairLoader:
        n = len(examples)
        plan = IndexLoader(
            n, min(batch_size, self._slice, n), sampling="sequential", updates_per_sweep=1
        )
        # Processes that start anew each time must be worth it.
        worth = n * self._seconds > _WORTH_STARTING
        workers = self._workers(n, plan.updates_per_epoch) if worth else 0
        return _SizedPairLoader(examples, plan, workers)

    def teardown(self, stage: str) -> None:
        """End the worker processes.

        Args:
            stage: Lightning's; not used.
        """
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()


class PairLoader:
    """Yields the (inputs, targets) of each update of a plan, fetched by worker processes.

    Like `IndexLoader` it has no length and no state of its own: each iteration starts at the update
    that `plan.start` tells, and is (the rest of) one epoch.

    Args:
        examples: From (update, example numbers) to a pair of tensors.
        plan: Which examples make which update, one update a block.
        num_workers: W, range [0, ∞); 0: fetched in this process.
        keep: Whether the processes live on from one epoch to the next, until `close`.
        pin_memory: Whether the tensors are copied to pinned memory, for a GPU.

    Example:
        >>> dataset = TensorDataset(torch.eye(4), torch.arange(4))
        >>> examples = _Examples(dataset, np.arange(4))
        >>> loader = PairLoader(examples, IndexLoader(4, 3, seed=3, updates_per_sweep=1))
        >>> batches = [targets for _, targets in loader]
        >>> [len(targets) for targets in batches]
        [3, 1]
        >>> torch.equal(torch.cat(batches), loader.plan.order(0))
        True
    """

    def __init__(
        self,
        examples: _Examples,
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
        """The (inputs, targets) of one update, fetched again.

        Args:
            update: From 0.
        """
        return self.examples.fetch(self.plan.block(update, 1)[0].tolist(), update)

    def close(self) -> None:
        """End the worker processes."""
        self._loader = None


class _SizedPairLoader(PairLoader):
    """All examples once."""

    def __len__(self) -> int:
        return self.plan.updates_per_epoch


class _Keys:
    """What a worker needs to know of each update: its number, and the numbers of its examples."""

    def __init__(self, plan: IndexLoader) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for update, block in enumerate(self.plan, self.plan.start()):
            yield update, block[0].tolist()


class _Examples(Dataset):
    """Fetches, checks and stacks rows of a Dataset; worker processes hold a copy."""

    def __init__(
        self,
        dataset: Dataset,
        rows: NDArray[np.int64],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        stream: int = 0,
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
        with _drawing(self.seed, self.stream, update):
            items = self.items(numbers)
        for row, item in zip(rows, items, strict=True):
            if not isinstance(item, tuple | list) or len(item) != 2:
                what = f"{type(item).__name__} of {len(item)}" if isinstance(item, Sized) else item
                raise _RefusedError(
                    f"An example must be a pair (input, target). Received: {what} as example {row}."
                )
        inputs = _number(_stacked([item[0] for item in items], rows, "input"), self.dtype)
        targets = _target(_stacked([item[1] for item in items], rows, "target"), self.dtype)
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


def _checked(dataset: Any, name: str) -> Dataset:
    has_both = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not has_both:
        raise ValueError(
            f"{name} must be a map-style Dataset, with __len__ and __getitem__: without a length "
            f"there are no epochs and no order. Received: {type(dataset).__name__}. Read it into "
            f"arrays once, for an ArrayDataModule, or give Lightning a loader of your own."
        )
    if not len(dataset):
        raise ValueError(f"{name} must hold at least one example. Received: none.")
    return cast(Dataset, dataset)


def _check_whole(name: str, value: Any, least: int, other: str | None) -> None:
    if value == other or (
        isinstance(value, int) and not isinstance(value, bool) and value >= least
    ):
        return
    raise ValueError(
        f"{name} must be a whole number of at least {least}, or {other or 'null'}. "
        f"Received: {name}={value!r}."
    )


def _told_classes(dataset: Any) -> int | None:
    """C as the Dataset tells it, in the ways of torchvision."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    count = getattr(dataset, "num_classes", None)
    if isinstance(count, int):
        return count
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple):
        return len(names)
    return None


def _told_targets(dataset: Any) -> NDArray[Any] | None:
    """All targets, as torchvision's sets hold them."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    targets = getattr(dataset, "targets", None)
    if isinstance(targets, Tensor | np.ndarray | list) and len(targets):
        labels = np.asarray(targets)
        if labels.ndim == 1 and labels.dtype.kind in "iub":
            return labels
    return None


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


def _number(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs: floating-point numbers, bytes and booleans in `dtype`; whole numbers as they are."""
    if x.is_floating_point() or x.dtype in (torch.uint8, torch.bool):
        x = x.to(dtype)
        return x.unsqueeze(1) if x.ndim == 1 else x
    return x


def _target(y: Tensor, dtype: torch.dtype) -> Tensor:
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    return y.to(dtype if y.is_floating_point() else torch.int64)


def _as_it_is(pair: Any) -> Any:
    return pair


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _drawing(*names: int) -> Iterator[None]:
    """The global generators on the CPU give the numbers of these names; then go on as before."""
    own = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed = int(np.random.SeedSequence(names).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (a user's Dataset may draw from it)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(own[0])
        np.random.set_state(own[1])  # noqa: NPY002
        torch.set_rng_state(own[2])
