"""Examples that only have `__getitem__`: split, looked at, and fetched when they are needed.

N examples, B examples per update, C classes, W worker processes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from gdtrain.data.loader import (
    Examples,
    IndexLoader,
    PairLoader,
    SizedPairLoader,
    as_inputs,
    as_targets,
)
from gdtrain.data.prepared import Part, PreparedData, held_out
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.targets import Task, decide, may_be_classes, wanted_task
from gdtrain.generators import same_after

if TYPE_CHECKING:
    from gdtrain.losses import Loss

__all__ = ["FetchedData"]

_log = logging.getLogger("gdtrain")

_ROUND_TRIP = 1e-3  # seconds: a batch that takes less gains nothing from a worker process
_WORTH_STARTING = 1.0  # seconds of fetching, below which evaluation starts no processes
_SLICE_BYTES = 64 * 2**20  # of the examples that are evaluated together
_PROBES = 16  # examples that are fetched to measure the time of one, at most
_PROBE_SECONDS = 0.2  # as long as that, at most


class FetchedData(PreparedData):
    """Examples of map-style Datasets: what `DatasetDataModule` trains on, without Lightning.

    `sets` has the training set as "train", and "val" and "test" where they have sets of their own.
    """

    def __init__(
        self,
        sets: Mapping[str, Any],
        *,
        num_classes: int | None,
        task: Task,
        num_workers: int | Literal["auto"],
        val_fraction: float,
        test_fraction: float,
        split_seed: int,
        seed: int,
        dtype: torch.dtype,
        loss: Loss | None,
    ) -> None:
        self._sets, self._task, self._given_classes, self._loss = sets, task, num_classes, loss
        self.num_workers = num_workers
        counts = held_out(len(sets["train"]), val_fraction, test_fraction, sets.keys())
        split = self._rows(counts, split_seed)
        own = {name: self._sets.get(name, self._sets["train"]) for name in split}
        self._examples = {
            name: Examples(own[name], rows, dtype, seed, stream)
            for stream, (name, rows) in enumerate(split.items())
        }
        train = self._examples["train"]
        x, y = train.fetch([0])
        resident = {name: _resident(own[name], split[name], dtype) for name in split}
        parts = {name: part for name, part in resident.items() if part is not None}
        super().__init__(parts, split, Preprocessing())
        self._seconds, self._slice = 0.0, 1
        self._loaders: list[PairLoader] = []
        fetched = [examples for name, examples in self._examples.items() if name not in parts]
        if fetched:
            self._measure(fetched[0], x.nbytes)
        classes, self.target_said = self._settle(train)
        for name, examples in self._examples.items():
            examples.num_classes = classes
            examples.classify = classes is not None
            if name in parts and classes is not None:
                inputs, targets = parts[name]
                parts[name] = inputs, examples.labels(targets, split[name])
        for name, (inputs, targets) in parts.items():
            self._examples[name].check(inputs, targets, split[name])
        self.num_targets = 1 if classes is not None or y.ndim == 1 else int(y.shape[1])
        self.preprocessing = Preprocessing(
            classes=None if classes is None else list(range(classes)),
            input_shape=list(x.shape[1:]),
        )

    def _rows(self, counts: Mapping[str, int], seed: int) -> dict[str, NDArray[np.int64]]:
        """Which examples of its set each part has."""
        order = np.arange(len(self._sets["train"]))
        if any(counts.values()):
            order = np.random.default_rng(seed).permutation(order)
        val, test, train = np.split(order, [counts["val"], sum(counts.values())])
        split = {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}
        for name in self._sets.keys() - {"train"}:
            split[name] = np.arange(len(self._sets[name]))
        return split

    def _measure(self, examples: Examples, size: int) -> None:
        """Time of one example, from a few."""
        probes = np.linspace(0, len(examples) - 1, min(_PROBES, len(examples))).astype(np.int64)
        times: list[float] = []
        with same_after(()):  # what the Dataset draws is not the model's, and how much is chance
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

    def _settle(self, examples: Examples) -> tuple[int | None, str]:
        """C, None: the targets are numbers; and what they were taken for, in words."""
        wanted, because = wanted_task(self._task, self._loss)
        count, said = self._given_classes, ""
        if count is None or wanted == "regression":
            few = list(range(min(_PROBES, len(examples))))
            resident = self._parts["train"][1] if self.is_resident else None
            y = (examples.fetch(few)[1] if resident is None else resident).numpy()
            if wanted == "regression" or (wanted is None and not may_be_classes(y)):
                said = decide(y, "regression", self._loss).said
                return None, said if y.ndim > 1 else f"target: numbers{because}"
            count = _told_classes(self._sets["train"])
            if count is None:
                y, rows = (y, examples.rows) if y.ndim > 1 else self._all_targets(examples)
                if wanted is not None and y.ndim == 1:
                    examples.labels(torch.from_numpy(y), rows)
                decision = decide(y, self._task, self._loss)
                said = decision.said
                if decision.classes is None:
                    return None, said
                if y.ndim == 1:
                    examples.labels(torch.from_numpy(y), rows)
                count = y.shape[1] if y.ndim > 1 else int(y.max()) + 1
        if count < 2:
            raise ValueError(f"There must be at least two classes. Received: {count}.")
        return count, said or f"target: {count} classes{because}"

    def _all_targets(self, examples: Examples) -> tuple[NDArray[Any], NDArray[np.int64]]:
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

    def how_fetched(self, size: int) -> str:
        """How the training examples are had in batches of a size, for the log."""
        if self.is_resident:
            return (
                "The training set is a TensorDataset: its tensors are used by index, as they are "
                "(not standardised)."
            )
        workers = self._workers(size, -(-self.num_train // size))
        by = "in this process" if workers == 0 else f"by {workers} worker process(es)"
        rate = 1 / max(self._seconds, 1e-9)
        return (
            f"The {self.num_train:,} training examples are fetched one by one through a DataLoader "
            f"{by}, about {rate:,.0f} examples/s in each. Tensors (ArrayDataModule) would be "
            f"faster, where they fit into memory."
        )

    def examples(self, part: Part) -> tuple[Any, Tensor]:
        """Inputs and targets of one part, where they are resident; else see `evaluation_loader`."""
        if part not in self._parts:
            raise ValueError(
                f"The {part} examples of a Dataset are fetched one by one: use "
                f"evaluation_loader({part!r})."
            )
        return self._parts[part]

    def count(self, part: Part) -> int:
        """Number of examples of one part."""
        return len(self._examples[part])

    def train_loader(self, plan: IndexLoader, pin_memory: bool = False) -> PairLoader:
        """The batches of training examples that a plan names, one update a block; until `close`."""
        plan.updates_per_sweep = 1
        workers = self._workers(plan.batch_size, plan.updates_per_epoch)
        loader = PairLoader(
            self._examples["train"], plan, workers, keep=True, pin_memory=pin_memory
        )
        self._loaders.append(loader)
        return loader

    def evaluation_loader(
        self, part: Part, rank: int = 0, ranks: int = 1, batch_size: int = 1024
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """All examples of one part, in order; only resident ones are divided between ranks."""
        if part in self._parts or not self.count(part):
            return super().evaluation_loader(part, rank, ranks, batch_size)
        return self._in_order(self._examples[part], batch_size)

    def _in_order(self, examples: Examples, batch_size: int = 1024) -> SizedPairLoader:
        n = len(examples)
        plan = IndexLoader(
            n, min(batch_size, self._slice, n), sampling="sequential", updates_per_sweep=1
        )
        # Processes that start anew each time must be worth it.
        worth = n * self._seconds > _WORTH_STARTING
        workers = self._workers(n, plan.updates_per_epoch) if worth else 0
        return SizedPairLoader(examples, plan, workers)

    def close(self) -> None:
        """End the worker processes."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()


def check_dataset(dataset: Any, name: str) -> Any:
    """The Dataset of a part; raises where it has no length, no items, or none at all."""
    has_both = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not has_both:
        raise ValueError(
            f"{name} must be a map-style Dataset, with __len__ and __getitem__: without a length "
            f"there are no epochs and no order. Received: {type(dataset).__name__}. Read it into "
            f"arrays once, for an ArrayDataModule, or give Lightning a loader of your own."
        )
    if not len(dataset):
        raise ValueError(f"{name} must hold at least one example. Received: none.")
    return dataset


def _resident(
    dataset: Dataset, rows: NDArray[np.int64], dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
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
    return as_inputs(inputs, dtype), as_targets(targets, dtype)


def _told_classes(dataset: Any) -> int | None:
    """C as the Dataset tells it, in the ways of torchvision."""
    dataset = _whole_set(dataset)
    count = getattr(dataset, "num_classes", None)
    if isinstance(count, int):
        return count
    names = getattr(dataset, "classes", None)
    return len(names) if isinstance(names, list | tuple) else None


def _told_targets(dataset: Any) -> NDArray[Any] | None:
    """All targets, as torchvision's sets hold them."""
    targets = getattr(_whole_set(dataset), "targets", None)
    if isinstance(targets, Tensor | np.ndarray | list) and len(targets):
        labels = np.asarray(targets)
        if labels.ndim == 1 and labels.dtype.kind in "iub":
            return labels
    return None


def _whole_set(dataset: Any) -> Any:
    """What a Subset is of."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
