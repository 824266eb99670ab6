"""The data modules: what `gdtrain.data` reads and prepares, for a Lightning trainer.

N examples, B examples per update, D features, C classes, W worker processes.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from gdtrain.data.dataset import FetchedData, check_dataset
from gdtrain.data.files import read_libsvm, read_npy
from gdtrain.data.frames import check_aligned, feature_names, features
from gdtrain.data.loader import IndexLoader, PairLoader
from gdtrain.data.module import DataModule, whole_or
from gdtrain.data.prepared import Raw
from gdtrain.data.reading import existing
from gdtrain.data.sources import (
    Embedded,
    TorchvisionName,
    embedded,
    synthetic,
    torchvision_images,
)
from gdtrain.data.tables import Header, read_csv
from gdtrain.data.targets import Task, check_task
from gdtrain.ranges import Interval, Whole

__all__ = [
    "ArrayDataModule",
    "CSVDataModule",
    "DataModule",
    "DatasetDataModule",
    "EmbeddedDataModule",
    "LIBSVMDataModule",
    "NPYDataModule",
    "SyntheticDataModule",
    "TorchvisionDataModule",
]

_log = logging.getLogger("gdtrain")


class EmbeddedDataModule(DataModule):
    """A data set that comes inside scikit-learn: nothing is downloaded.

    | name | examples | features | target |
    | --- | --- | --- | --- |
    | digits | 1797 | images 1×8×8 | 10 classes |
    | breast_cancer | 569 | 30 | 2 classes |
    | wine | 178 | 13 | 3 classes |
    | iris | 150 | 4 | 3 classes |
    | diabetes | 442 | 10 | a number |

    Args:
        name: Which; a ValueError if it is none of these.
        **options: As for `DataModule`.

    Example:
        >>> data = EmbeddedDataModule("digits")
        >>> data.setup()
        >>> data.num_train, data.input_shape, data.num_classes
        (1258, (1, 8, 8), 10)
    """

    def __init__(self, name: Embedded, **options: Any) -> None:
        super().__init__(**options)
        self.name: Embedded = _known(name, Embedded)

    def load(self) -> Raw:
        """Read it from scikit-learn."""
        return embedded(self.name)


class SyntheticDataModule(DataModule):
    """Linear regression with a known answer: y = X w* + b* + noise.

    X is Gaussian with a covariance whose eigenvalues run from 1 down to 1/condition, evenly in the
    logarithm. `true_weights` and `true_bias` hold w* and b*. Nothing is standardised by default,
    so that w* is the answer.

    Args:
        num_examples: Range [1, ∞).
        num_features: D, range [1, ∞).
        noise: Standard deviation of the noise, range [0, ∞); with 0, w* is the exact minimum.
        condition: Condition number of the covariance, range [1, ∞).
        data_seed: Of X, w* and the noise.
        **options: As for `DataModule`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> data = SyntheticDataModule(num_examples=200, num_features=5)
        >>> data.setup()
        >>> x, y = data.examples("train")
        >>> float((x @ data.true_weights + data.true_bias - y).abs().max()) < 0.5
        True
    """

    def __init__(
        self,
        num_examples: int = 1000,
        num_features: int = 10,
        noise: float = 0.1,
        condition: float = 10.0,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**{"standardize": False, "standardize_targets": False, **options})
        self.num_examples = Whole(1).check("num_examples", num_examples)
        self.num_features = Whole(1).check("num_features", num_features)
        self.noise = Interval(0, math.inf, "left").check("noise", noise)
        self.condition = Interval(1, math.inf, "left").check("condition", condition)
        self.data_seed = data_seed

    def load(self) -> Raw:
        """Draw it."""
        raw, weights, self.true_bias = synthetic(
            self.num_examples, self.num_features, self.noise, self.condition, self.data_seed
        )
        self.true_weights = torch.from_numpy(weights).to(self.dtype)
        return raw


class ArrayDataModule(DataModule):
    """Your own arrays or tensors, dense or sparse.

    Args:
        inputs: (N, D), or images (N, C, H, W). What `numpy.load(…, mmap_mode="r")` returns stays
            in its file. A matrix or array of `scipy.sparse`, (N, D) in any format, stays sparse
            (see `SparseInputs`) and needs `standardize=False`. An array of the module's dtype that
            is neither standardised nor split is used where it lies, not copied.
            A DataFrame of pandas or polars keeps the names of its columns.
        targets: (N,) classes of any kind, or numbers (N,) or (N, K); one-hot (N, C) is classes.
        task: "classification", "regression", or "auto": what `gdtrain.data.targets.decide` says,
            which also stands in the log.
        test: Inputs and targets of a test set of its own (a table's columns are matched by name);
            else `test_fraction` holds one out.
        **options: As for `DataModule`.

    Raises:
        ValueError: The arrays are not of these shapes; later, sparse inputs are to be standardised.

    Example:
        >>> data = ArrayDataModule(torch.rand(50, 2), torch.arange(50) % 3)
        >>> data.setup()
        >>> data.num_classes
        3
    """

    def __init__(
        self,
        inputs: Any,
        targets: ArrayLike,
        *,
        task: Task = "auto",
        test: tuple[Any, ArrayLike] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_aligned(inputs, targets)
        self.inputs, self.targets, self.task = features(inputs), targets, check_task(task)
        self.feature_names = feature_names(inputs)
        self.test = None
        if test is not None:
            check_aligned(*test)
            self.test = features(test[0], self.feature_names), test[1]

    def load(self) -> Raw:
        """Hand them over."""
        return Raw(self.inputs, self.targets, self.task, self.feature_names, self.test)


class NPYDataModule(DataModule):
    """A NumPy file of numbers, the targets in a column or in a file of their own.

    Args:
        path: `.npy` with (N, D), or (N, D + 1) with the target in it, or images (N, C, H, W); or
            `.npz` of `scipy.sparse.save_npz`, which stays sparse, and needs `target_path` and
            `standardize=False`.
        target: Column of the target, counted from 0, negative from the end.
        target_path: `.npy` with the targets; then `target` is not used.
        memory_map: Leave the inputs in the file, and read them as they are needed: for files that
            are large against memory. Needs `target_path`.
        task: As for `ArrayDataModule`.
        **options: As for `DataModule`.

    Raises:
        ValueError: The file holds no such array.

    Example:
        >>> NPYDataModule("table.npy", batch_size=4)
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no file table.npy. Set data.path to one that exists.
    """

    def __init__(
        self,
        path: str | Path,
        target: int = -1,
        *,
        target_path: str | Path | None = None,
        memory_map: bool = False,
        task: Task = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if memory_map and target_path is None:
            raise ValueError(
                "memory_map=true needs the targets in a file of their own: target_path=…"
            )
        self.path, self.target, self.task = existing(path), target, check_task(task)
        self.memory_map = memory_map
        self.target_path = None if target_path is None else existing(target_path)

    def load(self) -> Raw:
        """Read it."""
        return read_npy(self.path, self.target, self.target_path, self.memory_map, self.task)


class CSVDataModule(DataModule):
    """A CSV file with a header; numeric features and one target column.

    What is read as a table is written at `gdtrain.data.tables.Table`. Booleans are taken as 0 and
    1. A first column without a name, as R and pandas write for the rows, is left out.

    Args:
        path: The file: `.csv`, or `.tsv` with tabs; plain, `.gz`, `.bz2`, `.xz` or `.zip`.
        target: Name of the target column; None: the last.
        columns: Names of the feature columns; None: all others.
        header: Whether the first line holds names; if not, the columns are called 0, 1, …. "auto":
            a ValueError where it looks like an example.
        task: As for `ArrayDataModule`.
        **options: As for `DataModule`.

    Raises:
        ValueError: No such column, rows of several lengths, text in a feature, or missing values.

    Example:
        >>> CSVDataModule("table.csv", target="price", batch_size=4)
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no file table.csv. Set data.path to one that exists.
    """

    def __init__(
        self,
        path: str | Path,
        target: str | None = None,
        *,
        columns: list[str] | None = None,
        header: Header = "auto",
        task: Task = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path, self.target, self.task = existing(path), target, check_task(task)
        if isinstance(columns, str) or (columns is not None and not columns):
            raise ValueError(
                f"columns must be a list of names, such as [age,height], or null for all. "
                f"Received: {columns!r}."
            )
        self.columns = None if columns is None else [str(name).strip() for name in columns]
        self.header = header

    def load(self) -> Raw:
        """Read it."""
        return read_csv(self.path, self.target, self.columns, self.header, self.task)


class LIBSVMDataModule(DataModule):
    """A LIBSVM (svmlight) file, plain or compressed; held as a dense or a sparse array.

    Features are divided by their standard deviation and centred like others; pass
    `standardize=False` for one-hot data such as a9a, which then stays sparse.

    Args:
        path: The training file.
        test_path: A test file of its own; features that `path` does not have are left out.
        sparse: Whether to hold the features as `SparseInputs`, which cannot be standardised;
            "auto": if `standardize` is False and less than a quarter of the entries of `path` is
            not zero (or a dense array would take more than 8 GB).
        task: As for `ArrayDataModule`.
        **options: As for `DataModule`.

    Raises:
        ValueError: The file cannot be read, would take more than 8 GB as a dense array, or is to
            be sparse and standardised.

    Example:
        >>> LIBSVMDataModule("a9a.svm", standardize=False)
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no file a9a.svm. Set data.path to one that exists.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        test_path: str | Path | None = None,
        sparse: bool | Literal["auto"] = "auto",
        task: Task = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path, self.task = existing(path), check_task(task)
        self.test_path = None if test_path is None else existing(test_path)
        if not isinstance(sparse, bool) and sparse != "auto":
            raise ValueError(f"sparse must be true, false or auto. Received: sparse={sparse!r}.")
        if sparse is True and self.standardize:
            raise ValueError(
                "sparse=true needs standardize=false: centring would fill in the zeros. "
                "Received: standardize=true."
            )
        self.sparse = sparse

    def load(self) -> Raw:
        """Read it."""
        return read_libsvm(
            self.path, self.test_path, self.sparse, self.standardize, self.dtype, self.task
        )


class TorchvisionDataModule(DataModule):
    """MNIST, Fashion-MNIST or CIFAR-10, decoded once into one tensor.

    Args:
        name: "mnist", "fashion_mnist" or "cifar10".
        root: Folder of the files, laid out as torchvision does.
        download: Whether to fetch what is missing.
        **options: As for `DataModule`; the test set is torchvision's own.

    Raises:
        ValueError: Unknown name.
        FileNotFoundError: The files are not there and cannot be fetched.

    Example:
        >>> data = TorchvisionDataModule("mnist", root="data", batch_size=64)
        >>> data.examples_per_update
        64
    """

    def __init__(
        self,
        name: TorchvisionName,
        root: str | Path = "data",
        download: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.name: TorchvisionName = _known(name, TorchvisionName)
        self.root, self.download = Path(root), download

    def prepare_data(self) -> None:
        """Fetch what is missing, on one process."""
        self.load()

    def load(self) -> Raw:
        """Read the training and the test set."""
        return torchvision_images(self.name, self.root, self.download)


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
        >>> squares = [(i / 100, (i / 100) ** 2) for i in range(100)]
        >>> data = DatasetDataModule(squares, batch_size=10)
        >>> data.setup()
        >>> data.num_train, data.input_shape, data.num_classes
        (100, (1,), None)
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
        self._sets = {"train": check_dataset(train, "train")}
        for name, dataset in (("val", val), ("test", test)):
            if dataset is not None:
                self._sets[name] = check_dataset(dataset, name)
        self._given_classes: int | None = whole_or("num_classes", num_classes, 2, None)
        self.num_workers: int | Literal["auto"] = whole_or("num_workers", num_workers, 0, "auto")
        self._task = check_task(task)

    def load(self) -> Raw:
        """Not for a Dataset, whose examples are fetched when they are needed."""
        raise NotImplementedError("The examples of a Dataset are fetched one by one.")

    def setup(self, stage: str | None = None) -> None:
        """Split, look at a few examples, count the classes; once, whatever the stage."""
        if self._prepared is None:
            super().setup(stage)
            _log.info(self.prepared.how_fetched(self.examples_per_update))

    def _prepare(self) -> FetchedData:
        data = FetchedData(
            self._sets,
            num_classes=self._given_classes,
            task=self._task,
            num_workers=self.num_workers,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
            seed=self.seed,
            dtype=self.dtype,
            loss=self._loss,
        )
        if self.micro_batch_size == "auto" and not data.is_resident:
            raise ValueError(
                "micro_batch_size=auto is chosen for resident examples: for a Dataset it must be "
                "a number or null."
            )
        return data

    @property
    def prepared(self) -> FetchedData:
        """The examples and what is known of them, without Lightning; from `setup` on."""
        return cast(FetchedData, super().prepared)

    def train_dataloader(self) -> IndexLoader | PairLoader:  # type: ignore[override]
        """Batches of pairs, one for each update; blocks of example numbers if they are resident."""
        plan = super().train_dataloader()
        if self.is_resident:
            return plan
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1:
            raise ValueError(
                f"The examples of a Dataset are fetched for one device. Received: "
                f"{trainer.world_size} processes. Put them into tensors (ArrayDataModule)."
            )
        cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return self.prepared.train_loader(plan, pin_memory=cuda)

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        if self._prepared is not None:
            self.prepared.close()


def _known(name: Any, names: Any) -> Any:
    """The name, if it is one of a `Literal`."""
    if name not in get_args(names):
        raise ValueError(f"name must be one of {', '.join(get_args(names))}. Received: {name!r}.")
    return name
