"""The Lightning shell over the data: it prepares them for a trainer, and hands out indices.

N training examples, B examples per update, D features, C classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor

from gdtrain.data.loader import IndexLoader
from gdtrain.data.prepared import Inputs, Part, PreparedData, Raw, prepare
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.descent.plan import Sampling
from gdtrain.ranges import Interval, Whole

if TYPE_CHECKING:
    from gdtrain.losses import Loss

__all__ = ["DataModule"]


class DataModule(LightningDataModule):
    """Base of the data modules; a subclass defines `load() -> Raw`.

    The split is drawn once from `split_seed`, stratified by class. Features (images: channels), and
    the targets of a regression, are standardised with the statistics of the training part. The
    tensors stay resident (sparse inputs stay sparse); the training loader yields blocks of indices
    (see `IndexLoader`).

    Args:
        batch_size: B, examples per update, range [1, N], or "full" for N.
        micro_batch_size: Examples in one forward and backward pass, range [1, ∞); "auto":
            chosen by bytes (see `Objective`); None: B, or "auto" where the inputs are mapped from
            a file. It changes memory and speed, not the update (but for rounding).
        sampling: "reshuffle", "shuffle_once", "replacement" or "sequential".
        val_fraction: Share of all examples (or count, if ≥ 1) held out for validation.
        test_fraction: Likewise for the test, where the source has no test set of its own.
        standardize: Whether to standardise features. Sparse ones cannot be.
        standardize_targets: Whether to standardise the targets of a regression; metrics and
            predictions are in the target's own units all the same.
        split_seed: Of the split, range [0, ∞).
        seed: Of the order of the examples, range [0, ∞).
        updates_per_sweep: K, most updates done in one Lightning step, range [1, ∞); "auto": as many
            as take a tenth of a second. The updates are the same.
        dtype: Of the tensors: "float32" or "float64".

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from gdtrain.data import ArrayDataModule
        >>> data = ArrayDataModule(torch.rand(100, 3), torch.arange(100) % 2, batch_size=10)
        >>> data.setup()
        >>> data.num_train, data.input_shape, data.num_classes
        (70, (3,), 2)
    """

    def __init__(
        self,
        *,
        batch_size: int | Literal["full"] = 32,
        micro_batch_size: int | Literal["auto"] | None = None,
        sampling: Sampling = "reshuffle",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        standardize: bool = True,
        standardize_targets: bool = True,
        split_seed: int = 0,
        seed: int = 0,
        updates_per_sweep: int | Literal["auto"] = "auto",
        dtype: Literal["float32", "float64"] = "float32",
    ) -> None:
        super().__init__()
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64. Received: dtype={dtype!r}.")
        self.batch_size: int | Literal["full"] = whole_or("batch_size", batch_size, 1, "full")
        self.micro_batch_size: int | Literal["auto"] | None = whole_or(
            "micro_batch_size", micro_batch_size, 1, "auto", None
        )
        self.sampling: Sampling = sampling
        self.val_fraction = _fraction("val_fraction", val_fraction)
        self.test_fraction = _fraction("test_fraction", test_fraction)
        self.standardize = standardize
        self.standardize_targets = standardize_targets
        self.split_seed = Whole(0).check("split_seed", split_seed)
        self.seed = Whole(0).check("seed", seed)
        self.updates_per_sweep = updates_per_sweep
        self.dtype = getattr(torch, dtype)
        self._loss: Loss | None = None
        self._prepared: PreparedData | None = None

    @abstractmethod
    def load(self) -> Raw:
        """Read the source."""

    def setup(self, stage: str | None = None) -> None:
        """Load, split and standardise; once, whatever the stage."""
        if self._prepared is not None:
            return
        trainer = self.trainer
        if trainer is not None:  # it knows the loss and the precision, where nobody has told them
            if self._loss is None:
                self._loss = getattr(trainer.lightning_module, "loss", None)
            if str(trainer.precision) == "64-true":
                self.dtype = torch.float64
        prepared = self._prepare()
        count = prepared.num_train
        if self.batch_size != "full" and self.batch_size > count:
            raise ValueError(
                f"batch_size must be at most {count}, the number of training examples. "
                f"Received: batch_size={self.batch_size}. batch_size=full takes them all."
            )
        self._prepared = prepared

    def _prepare(self) -> PreparedData:
        return prepare(
            self.load(),
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            standardize=self.standardize,
            standardize_targets=self.standardize_targets,
            split_seed=self.split_seed,
            dtype=self.dtype,
            loss=self._loss,
        )

    @property
    def prepared(self) -> PreparedData:
        """The examples and what is known of them, without Lightning; from `setup` on."""
        if self._prepared is None:
            raise RuntimeError("The data are not there yet: call setup() first.")
        return self._prepared

    def use_loss(self, loss: Loss | None) -> None:
        """Let a loss say what the targets are, where `task` does not; before `setup`."""
        self._loss = loss

    @property
    def preprocessing(self) -> Preprocessing:
        """What has made tensors of the examples; before `setup`, nothing is learnt."""
        return Preprocessing() if self._prepared is None else self._prepared.preprocessing

    # What `PreparedData` tells of the examples, from `setup` on.
    target_said = property(attrgetter("prepared.target_said"))
    split = property(attrgetter("prepared.split"))
    split_fingerprint = property(attrgetter("prepared.split_fingerprint"))
    is_resident = property(attrgetter("prepared.is_resident"))
    num_train = property(attrgetter("prepared.num_train"))
    input_shape = property(attrgetter("prepared.input_shape"))
    num_classes = property(attrgetter("prepared.num_classes"))
    num_targets = property(attrgetter("prepared.num_targets"))

    def examples(self, part: Part) -> tuple[Inputs, Tensor]:
        """Inputs and targets of one part, standardised: see `PreparedData.examples`."""
        return self.prepared.examples(part)

    def count(self, part: Part) -> int:
        """Number of examples of one part."""
        return self.prepared.count(part)

    @property
    def examples_per_update(self) -> int:
        """B."""
        return self.prepared.num_train if self.batch_size == "full" else self.batch_size

    def train_dataloader(self) -> IndexLoader:
        """Blocks of example numbers, from the trainer's update on."""
        trainer = self.trainer
        loader = IndexLoader(
            self.prepared.num_train,
            self.examples_per_update,
            sampling=self.sampling,
            seed=self.seed,
            updates_per_sweep=self.updates_per_sweep,
        )
        if trainer is not None:
            loader.start = lambda: trainer.global_step
            loader.total = self.planned_updates(trainer)
        return loader

    def planned_updates(self, trainer: Any) -> int | None:
        """T, from the epochs and steps that a trainer is allowed; None: no end."""
        per_epoch = -(-self.prepared.num_train // self.examples_per_update)
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs * per_epoch
        limits = [limit for limit in (epochs, trainer.max_steps) if limit >= 0]
        return min(limits) if limits else None

    def val_dataloader(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Slices of the validation part (of this rank); empty without one."""
        return self._evaluation("val")

    def test_dataloader(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Slices of the test part (of this rank); empty without one."""
        return self._evaluation("test")

    def evaluation_loader(
        self, part: Part, rank: int = 0, ranks: int = 1, batch_size: int = 1024
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """All examples of one part, in order: see `PreparedData.evaluation_loader`."""
        return self.prepared.evaluation_loader(part, rank, ranks, batch_size)

    def _evaluation(self, part: Literal["val", "test"]) -> Iterable[tuple[Tensor, Tensor]]:
        trainer = self.trainer
        if trainer is None:
            return self.evaluation_loader(part)
        return self.evaluation_loader(part, trainer.global_rank, trainer.world_size)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the trainer."""
        return {**self.__dict__, "trainer": None}

    def settings(self) -> dict[str, str]:
        """What a run on these data depends on, by argument; fingerprints stand for the examples."""
        names = ["micro_batch_size", "sampling", "seed", "standardize", "standardize_targets"]
        names += ["val_fraction", "test_fraction", "split_seed"]
        return {
            "batch_size": repr(self.examples_per_update),
            **{name: repr(getattr(self, name)) for name in names},
            "dtype": str(self.dtype).removeprefix("torch."),
            **self.prepared.fingerprints(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: the preprocessing and the split's fingerprint."""
        order = [self.examples_per_update, self.sampling, self.seed]
        return {**self.prepared.state_dict(), "order": order}

    def check_same_data(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if the split or the preprocessing is not that of a checkpoint."""
        self.prepared.check_same_data(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if a run is resumed on other data, or in another order of them."""
        if getattr(getattr(self.trainer, "lightning_module", None), "checks_data", False):
            return  # it tells all that differs at once
        self.check_same_data(state_dict)
        now, then = [self.examples_per_update, self.sampling, self.seed], state_dict["order"]
        if now != list(then):
            raise ValueError(
                f"The checkpoint was trained in another order of the examples: resume with "
                f"batch_size={then[0]}, sampling={then[1]} and seed={then[2]}. Received: "
                f"batch_size={now[0]}, sampling={now[1]} and seed={now[2]}."
            )


def whole_or(name: str, value: Any, low: int, *words: str | None) -> Any:
    """The value, if it is one of some words or a whole number of at least `low`."""
    if (value is None or isinstance(value, str)) and value in words:
        return value
    try:
        return Whole(low).check(name, value)
    except ValueError:
        others = " or ".join("null" if word is None else word for word in words)
        raise ValueError(
            f"{name} must be {Whole(low)}, or {others}. Received: {name}={value!r}."
        ) from None


def _fraction(name: str, value: Any) -> Any:
    """The value, if it is a share of the examples or a number of them."""
    with suppress(ValueError):
        amount = Interval(0, math.inf, "left").check(name, value)
        if amount <= 1 or amount % 1 == 0:
            return value
    raise ValueError(
        f"{name} must be a fraction in [0, 1) or a whole number of examples. "
        f"Received: {name}={value!r}."
    )
