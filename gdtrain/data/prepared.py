"""From raw arrays to the tensors of a run: what the targets are, the split, the standardisation.

N examples, D features, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdtrain.data.frames import check_features, check_whole
from gdtrain.data.loader import EvaluationLoader
from gdtrain.data.mapped import MappedInputs
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.sparse import SparseInputs
from gdtrain.data.targets import Decision, Task, decide

if TYPE_CHECKING:
    from gdtrain.losses import Loss

__all__ = ["PreparedData", "Raw", "prepare"]

_PARTS = ("train", "val", "test")

Inputs = Tensor | MappedInputs | SparseInputs
Part = Literal["train", "val", "test"]


@dataclass
class Raw:
    """What a source yields: arrays as they are in it.

    Args:
        inputs: (N, D), or images (N, C, H, W); or (N, D) as CSR of `scipy.sparse`.
        targets: Whatever `gdtrain.data.targets.decide` takes.
        task: "classification", "regression" or "auto".
        feature_names: Names of the D columns.
        test: Inputs and targets of a test set that the source has of its own.
        first_feature: As for `Preprocessing`.

    Example:
        >>> raw = Raw(np.zeros((4, 2)), np.array([0, 1, 0, 1]), "classification")
    """

    inputs: Any
    targets: Any
    task: Task = "auto"
    feature_names: list[str] | None = None
    test: tuple[Any, Any] | None = None
    first_feature: int | None = None


class _Split(Mapping[str, NDArray[np.int64]]):
    """Which examples each part has: kept in a byte for each example."""

    def __init__(self, parts: Mapping[str, NDArray[np.int64]]) -> None:
        self._part_of = np.zeros(sum(map(len, parts.values())), np.uint8)
        for code, name in enumerate(_PARTS):
            self._part_of[parts[name]] = code

    def __getitem__(self, name: str) -> NDArray[np.int64]:
        return np.flatnonzero(self._part_of == _PARTS.index(name))

    def __iter__(self) -> Iterator[str]:
        return iter(_PARTS)

    def __len__(self) -> int:
        return len(_PARTS)


class PreparedData:
    """The training, validation and test examples of a run, as tensors. Made by `prepare`.

    `split`: which examples of the source each part has, in ascending order. `target_said`: what the
    targets were taken for, in words.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[Inputs, Tensor]],
        split: Mapping[str, NDArray[np.int64]],
        preprocessing: Preprocessing,
        target_said: str = "",
    ) -> None:
        self._parts, self.preprocessing, self.target_said = parts, preprocessing, target_said
        self.split = split

    @cached_property
    def split_fingerprint(self) -> str:
        """Twelve hexadecimal digits of the split's SHA-256: equal for equal splits."""
        digest = hashlib.sha256()
        for name, rows in sorted(self.split.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(rows, dtype="<i8").data)
        return digest.hexdigest()[:12]

    def examples(self, part: Part) -> tuple[Inputs, Tensor]:
        """Inputs (N, …) and targets (N,) or (N, K) of one part, standardised, on the CPU.

        Inputs that are mapped from a file stay there, and sparse ones stay sparse.
        """
        return self._parts[part]

    def count(self, part: Part) -> int:
        """Number of examples of one part."""
        return len(self._parts[part][0])

    @property
    def is_resident(self) -> bool:
        """Whether the training examples are there by index, in memory or in a mapped file."""
        return "train" in self._parts

    @property
    def num_train(self) -> int:
        """N."""
        return self.count("train")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.preprocessing.input_shape or ())

    @property
    def num_classes(self) -> int | None:
        """C, or None for regression."""
        classes = self.preprocessing.classes
        return None if classes is None else len(classes)

    @cached_property
    def num_targets(self) -> int:
        """Target columns of a regression."""
        y = self._parts["train"][1]
        return 1 if y.ndim == 1 else y.shape[1]

    def evaluation_loader(
        self, part: Part, rank: int = 0, ranks: int = 1, batch_size: int = 1024
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """All examples of one part (of this rank), in order, as pairs of at most so many."""
        if not self.count(part):
            return []
        inputs, targets = self._parts[part]
        return EvaluationLoader(inputs, targets, batch_size, rank, ranks)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the preprocessing, the shapes and the split's fingerprint."""
        return {
            "preprocessing": self.preprocessing.state_dict(),
            "split_fingerprint": self.split_fingerprint,
            "input_shape": list(self.input_shape),
            "num_classes": self.num_classes,
            "num_targets": self.num_targets,
        }

    def fingerprints(self) -> dict[str, str]:
        """Of the split, of the preprocessing, and of the examples: all targets, and some inputs."""
        examples: list[Any] = []
        for inputs, targets in self._parts.values():
            if len(inputs):
                most = min(1024, getattr(inputs, "rows_at_once", 1024))
                spread = np.unique(np.linspace(0, len(inputs) - 1, most).astype(np.int64))
                examples += [inputs[torch.from_numpy(spread)], targets]
        preparation = sorted(self.preprocessing.state_dict().items())
        return {
            "split_fingerprint": self.split_fingerprint,
            "preprocessing_fingerprint": _digest(*(part for item in preparation for part in item)),
            "examples_fingerprint": _digest(*examples),
        }

    def check_same_data(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if the split or the preprocessing is not that of a checkpoint."""
        if state_dict["split_fingerprint"] != self.split_fingerprint:
            raise ValueError(
                "The checkpoint was trained on another split of the data: use the same data, "
                "val_fraction, test_fraction and split_seed."
            )
        then, now = state_dict["preprocessing"], self.preprocessing.state_dict()
        for name, value in now.items():
            same = (
                torch.equal(value, then[name])
                if isinstance(value, Tensor) and isinstance(then.get(name), Tensor)
                else (type(value) is type(then.get(name)) and value == then.get(name))
            )
            if not same:
                raise ValueError(
                    f"The checkpoint was trained on data prepared in another way ({name} differs): "
                    f"use the same data and the same standardize and standardize_targets."
                )


def prepare(
    raw: Raw,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    standardize: bool = True,
    standardize_targets: bool = True,
    split_seed: int = 0,
    dtype: torch.dtype = torch.float32,
    loss: Loss | None = None,
) -> PreparedData:
    """Decide what the targets are, split, and standardise with the statistics of the training part.

    The options are those of `DataModule`; `loss`, which is trained on them, says what the targets
    are where `raw.task` does not.
    """
    n = raw.inputs.shape[0]
    # Before the split, while rows have the numbers that the user knows them by.
    check_features(raw.inputs, raw.feature_names)
    target = decide(raw.targets, raw.task, loss)
    y = target.values
    _check_as_many("", n, y)
    if target.classes is None and y.dtype.kind in "iu":
        check_whole(y.reshape(n, -1))
    counts = held_out(n, val_fraction, test_fraction, () if raw.test is None else ("test",))
    split = _split(n, counts, target, split_seed)
    preprocessing = Preprocessing.learn(
        raw.inputs,
        y,
        split["train"],
        standardize=standardize,
        standardize_targets=standardize_targets and target.standardize,
        classes=target.classes,
        feature_names=raw.feature_names,
        first_feature=raw.first_feature,
    )

    def part(x: Any, y: Any, rows: NDArray[np.int64]) -> tuple[Inputs, Tensor]:
        inputs = (
            MappedInputs(x, rows, preprocessing, dtype)
            if isinstance(x, np.memmap)
            else preprocessing.inputs(x, dtype, rows)
        )
        return inputs, preprocessing.targets(y if len(rows) == x.shape[0] else y[rows], dtype)

    parts = {name: part(raw.inputs, y, rows) for name, rows in split.items()}
    if raw.test is not None:
        parts["test"] = part(*raw.test, np.arange(raw.test[0].shape[0]))
    for name, (inputs, targets) in parts.items():
        _check_as_many(f" of the {name} set", len(inputs), targets)
    return PreparedData(parts, _Split(split), preprocessing, target.said)


def held_out(
    n: int, val_fraction: float, test_fraction: float, given: Collection[str] = ()
) -> dict[str, int]:
    """How many of N examples are held out for the parts that are not given; raises on all."""
    counts = {}
    for name, f in (("val", val_fraction), ("test", test_fraction)):
        counts[name] = 0 if name in given else int(f) if f >= 1 else round(f * n)
    if n - sum(counts.values()) < 1:
        raise ValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing of {n} "
            f"examples to train on."
        )
    return counts


def _split(
    n: int, counts: dict[str, int], target: Decision, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Which examples each part has; stratified by class where there are enough."""
    from sklearn.model_selection import train_test_split

    rest = np.arange(n)
    split: dict[str, NDArray[np.int64]] = {}
    for name in ("test", "val"):
        if counts[name] == 0:
            split[name] = rest[:0]
            continue
        labels = None if target.classes is None else target.values[rest]
        if labels is not None:
            # Too few of a class, or room for fewer examples than classes: not stratified.
            sizes = np.unique(labels, return_counts=True)[1]
            if sizes.min() < 2 or min(counts[name], len(rest) - counts[name]) < len(sizes):
                labels = None
        rest, picked = train_test_split(
            rest, test_size=counts[name], random_state=seed, stratify=labels
        )
        split[name] = np.sort(picked)
        rest = np.sort(rest)
    return {"train": rest, **split}


def _check_as_many(of: str, n: int, targets: Any) -> None:
    if len(targets) != n:
        raise ValueError(
            f"Expected one target for each example{of}. Received: {n} examples and {len(targets)} "
            f"targets."
        )


def _digest(*parts: Any) -> str:
    """Twelve hexadecimal digits that tell tensors and plain values apart."""
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(np.ascontiguousarray(part.numpy()).data.cast("B"))
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
