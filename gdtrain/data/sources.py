"""Where examples come from: embedded, synthetic, arrays, files, torchvision."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import logging
from pathlib import Path
from typing import Any, ClassVar, Literal
from zipfile import is_zipfile

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from gdtrain.data.frames import check_aligned, feature_names, features
from gdtrain.data.module import DataModule, Raw
from gdtrain.data.reading import check_array_file, check_unpacked, printable, read_arrays
from gdtrain.data.sparse import rows_of
from gdtrain.data.targets import Task, check_task

__all__ = [
    "ArrayDataModule",
    "EmbeddedDataModule",
    "LIBSVMDataModule",
    "NPYDataModule",
    "SyntheticDataModule",
    "TorchvisionDataModule",
]

_log = logging.getLogger("gdtrain")

# Below this share of entries that are not zero, CSR takes less than half of the dense memory, and
# its indexed sums beat the dense ones.
_SPARSE_BELOW = 0.25
_LINE = 2**20  # bytes of a line that are looked at, where one is wrong
_DENSE_BYTES = 8e9  # the most that a file may take as a dense array


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
        name: Which.
        **options: As for `DataModule`.

    Raises:
        ValueError: Unknown name.

    Example:
        >>> data = EmbeddedDataModule("digits")
        >>> data.setup()
        >>> data.num_train, data.input_shape, data.num_classes
        (1258, (1, 8, 8), 10)
    """

    def __init__(
        self,
        name: Literal["digits", "breast_cancer", "wine", "iris", "diabetes"],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if name not in ("digits", "breast_cancer", "wine", "iris", "diabetes"):
            raise ValueError(
                f"name must be one of digits, breast_cancer, wine, iris, diabetes. "
                f"Received: {name!r}."
            )
        self.name = name

    def load(self) -> Raw:
        """Read it from scikit-learn."""
        from sklearn import datasets

        bunch = getattr(datasets, f"load_{self.name}")()
        if self.name == "digits":
            return Raw(bunch.images[:, None], bunch.target, "classification")
        classify = self.name != "diabetes"
        targets = bunch.target_names[bunch.target] if classify else bunch.target
        names = [str(name) for name in bunch.feature_names]  # NumPy's str_ would not unpickle
        return Raw(bunch.data, targets, "classification" if classify else "regression", names)


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
        if num_examples < 1 or num_features < 1:
            raise ValueError(
                f"num_examples and num_features must be at least 1. "
                f"Received: {num_examples} and {num_features}."
            )
        if not (noise >= 0 and condition >= 1):
            raise ValueError(
                f"noise must be >= 0 and condition >= 1. Received: {noise} and {condition}."
            )
        self.num_examples, self.num_features = num_examples, num_features
        self.noise, self.condition, self.data_seed = noise, condition, data_seed

    def load(self) -> Raw:
        """Draw it."""
        rng = np.random.default_rng(self.data_seed)
        n, d = self.num_examples, self.num_features
        rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
        eigenvalues = np.logspace(0, -np.log10(self.condition), d)
        x = rng.normal(size=(n, d)) * np.sqrt(eigenvalues) @ rotation.T
        w, b = rng.normal(size=d), rng.normal()
        self.true_weights = torch.from_numpy(w).to(self.dtype)
        self.true_bias = float(b)
        return Raw(x, x @ w + b + self.noise * rng.normal(size=n), "regression")


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
        >>> data = ArrayDataModule(np.random.rand(50, 2), np.arange(50) % 3)
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
        FileNotFoundError: There is no such file.
        ValueError: The file holds no such array.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder) / "table.npy", np.random.rand(20, 3))
        ...     data = NPYDataModule(Path(folder) / "table.npy", batch_size=4)
        ...     data.setup()
        >>> data.input_shape, data.num_classes
        ((2,), None)
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
        self.path, self.target, self.task = _existing(path), target, check_task(task)
        self.memory_map = memory_map
        self.target_path = None if target_path is None else _existing(target_path)

    def load(self) -> Raw:
        """Read it."""
        sparse = self.path.suffix.lower() == ".npz" and self.target_path is not None
        x = _load_npz(self.path) if sparse else _load_npy(self.path, self.memory_map)
        if self.target_path is not None:
            y = _load_npy(self.target_path)
        else:
            if x.ndim != 2 or not -x.shape[1] <= self.target < x.shape[1]:
                raise ValueError(
                    f"{self.path} must be a table with a column {self.target} for the target, or "
                    f"target_path must name a file of targets. Received: shape {x.shape}."
                )
            y = x[:, self.target]
            x = np.delete(x, self.target, axis=1)
        return Raw(features(x), y, self.task)


class LIBSVMDataModule(DataModule):
    r"""A LIBSVM (svmlight) file, plain or compressed; held as a dense or a sparse array.

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
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, would take more than 8 GB as a dense array, or is to
            be sparse and standardised.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "table.svm"
        ...     _ = path.write_text("+1 1:0.5 3:2\n-1 2:1\n" * 10)
        ...     data = LIBSVMDataModule(path, batch_size=4)
        ...     data.setup()
        >>> data.input_shape, data.preprocessing.classes
        ((3,), [-1.0, 1.0])
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
        self.path, self.task = _existing(path), check_task(task)
        self.test_path = None if test_path is None else _existing(test_path)
        if not isinstance(sparse, bool) and sparse != "auto":
            raise ValueError(f"sparse must be true, false or auto. Received: sparse={sparse!r}.")
        if sparse is True and self.standardize:
            raise ValueError(
                "sparse=true needs standardize=false: centring would fill in the zeros. "
                "Received: standardize=true."
            )
        self.sparse = sparse

    def load(self) -> Raw:
        """Read it with scikit-learn."""
        paths = [self.path] if self.test_path is None else [self.path, self.test_path]
        tables, targets, first = _load_libsvm(paths, self._number)
        if not self._stays_sparse(tables[0]):
            for i, (path, x) in enumerate(zip(paths, tables, strict=True)):
                if _dense_bytes(x) > _DENSE_BYTES:
                    raise ValueError(
                        f"{path} has {x.shape[0]} examples of {x.shape[1]} features, more than "
                        f"8 GB as a dense array. Select features first, or keep them sparse: "
                        f"standardize=false."
                    )
                tables[i] = x.toarray()
        y = targets[0]
        return Raw(
            tables[0],
            y,
            self.task,
            test=(tables[1], targets[1]) if len(tables) > 1 else None,
            first_feature=first,
        )

    @property
    def _number(self) -> type[np.floating]:
        """What is standardised is read in float64."""
        single = self.dtype == torch.float32 and not self.standardize
        return np.float32 if single else np.float64

    def _stays_sparse(self, x: Any) -> bool:
        if self.sparse == "auto":
            density = x.nnz / (x.shape[0] * x.shape[1])
            return not self.standardize and (
                density < _SPARSE_BELOW or _dense_bytes(x) > _DENSE_BYTES
            )
        return self.sparse


_IDX = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte (or these with .gz)"
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

    _classes: ClassVar = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    _places: ClassVar = {
        "mnist": _IDX,
        "fashion_mnist": _IDX,
        "cifar10": "cifar-10-python.tar.gz, or the folder cifar-10-batches-py that is in it,",
    }
    _folders: ClassVar = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw", "cifar10": ""}

    def __init__(
        self,
        name: Literal["mnist", "fashion_mnist", "cifar10"],
        root: str | Path = "data",
        download: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if name not in self._classes:
            raise ValueError(f"name must be one of {', '.join(self._classes)}. Received: {name!r}.")
        self.name: str = name
        self.root, self.download = Path(root), download

    def prepare_data(self) -> None:
        """Fetch what is missing, on one process."""
        for train in (True, False):
            self._read(train)

    def load(self) -> Raw:
        """Read the training and the test set."""
        train, test = self._read(True), self._read(False)
        return Raw(*train, "classification", test=test)

    def _read(self, train: bool) -> tuple[NDArray[Any], NDArray[Any]]:
        from torchvision import datasets

        cls = getattr(datasets, self._classes[self.name])
        for packed in (self.root / cls.__name__ / "raw").glob("*-ubyte.gz"):
            if not packed.with_suffix("").exists():
                datasets.utils.extract_archive(str(packed), str(packed.parent))
        noise = io.StringIO()  # torchvision prints while it downloads
        try:
            dataset = cls(root=self.root, train=train, download=False)
        except (RuntimeError, ValueError, AssertionError) as error:
            if not str(error).startswith("Dataset not found"):
                raise ValueError(
                    f"The files of {self.name} in {self.root} could not be read: {error}"
                ) from None
            problem = "download is off"
            try:
                if not self.download:
                    raise OSError(problem) from None
                made = [path for path in (self.root, *self.root.parents) if not path.exists()]
                with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                    dataset = cls(root=self.root, train=train, download=True)
            except (OSError, RuntimeError) as error:
                problem = " ".join(str(error).split()) or type(error).__name__
                if self.download:
                    _remove_empty(self.root, made)
                raise FileNotFoundError(
                    f"The files of {self.name} are not in {self.root} and could not be fetched "
                    f"({problem}). Put {self._places[self.name]} into "
                    f"{self.root / self._folders[self.name]}/, or set data.root to the folder that "
                    f"has them."
                ) from None
        images = np.asarray(dataset.data)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        return images, np.asarray(dataset.targets)


# ---------------------------------------------------------------------- reading


def _remove_empty(root: Path, made: list[Path]) -> None:
    """Take away the empty folders that a failed download has left."""
    for path in (root / "MNIST" / "raw", root / "FashionMNIST" / "raw"):
        for folder in (path, path.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    for folder in made:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _existing(path: str | Path) -> Path:
    if path is None:
        raise ValueError("data.path must name the file of examples. Received: null.")
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Set data.path to one that exists.")
    return path


def _load_npy(path: Path, memory_map: bool = False) -> NDArray[Any]:
    if is_zipfile(path):
        raise ValueError(f"{path} must hold one array (.npy). Received: several (.npz).")
    check_array_file(path)
    try:
        loaded: NDArray[Any] = np.load(
            path, mmap_mode="r" if memory_map else None, allow_pickle=False
        )
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} could not be read as an array of numbers in NumPy's format "
            f"({type(error).__name__})."
        ) from None
    return loaded


def _load_npz(path: Path) -> Any:
    """A matrix as `scipy.sparse.save_npz` keeps it, made of arrays that were checked."""
    from scipy import sparse

    try:
        found = read_arrays(path)
        kind = found["format"].item()
        kind = kind.decode() if isinstance(kind, bytes) else kind
        names = _SPARSE_ARRAYS[kind]
        shape = tuple(int(n) for n in found["shape"])
        numbers = tuple(found[name] for name in names)
        whole = all(array.dtype.kind in "iu" for array in (found["shape"], *numbers[1:]))
        if not whole or numbers[0].dtype.kind not in "fiub":
            raise TypeError("its values are no numbers, or its indices not whole ones")
        # SciPy makes offsets fit its type of index, and so another matrix.
        if kind == "dia" and (abs(numbers[1].astype(float)) >= max(shape)).any():
            raise ValueError("an offset is out of range")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} could not be read as a matrix of scipy.sparse.save_npz ({error})."
        ) from None
    stored = sum(a.nbytes for a in numbers)
    if len(shape) != 2 or shape[0] > stored + 2**20 or not _is_wide_enough(shape[1], stored):
        raise ValueError(
            f"{path} could not be read as a matrix of scipy.sparse.save_npz: it claims the shape "
            f"{shape}, and has {stored:,} bytes of entries."
        )
    parts: Any = (numbers[0], tuple(numbers[1:])) if kind == "coo" else numbers
    try:
        return rows_of(getattr(sparse, f"{kind}_array")(parts, shape=shape))
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} could not be read as a matrix: {error}") from None


# The arrays of each format in such a file, as SciPy's constructors take them.
_SPARSE_ARRAYS = {
    "csr": ("data", "indices", "indptr"),
    "csc": ("data", "indices", "indptr"),
    "bsr": ("data", "indices", "indptr"),
    "coo": ("data", "row", "col"),
    "dia": ("data", "offsets"),
}


def _is_wide_enough(width: int, stored: int) -> bool:
    """Whether a file of so many bytes may have so many features: a weight is made for each."""
    return width <= _widest(stored)


def _widest(stored: int) -> int:
    return max(2**25, 8 * stored)


def _load_libsvm(
    paths: list[Path], number: type[np.floating], first: int | None = None, width: int | None = None
) -> tuple[list[Any], list[NDArray[Any]], int]:
    """CSR arrays and targets of files with features counted alike, and from which number.

    `first`: from which; None: from 0 if one of the files has a feature 0, else from 1.
    `width`: how many features there are; None: as many as in the first file. Further ones are left
    out.
    """
    from scipy.sparse import csr_array
    from sklearn.datasets import load_svmlight_file

    tables, targets = [], []
    for path in paths:
        check_unpacked(path)
        try:
            x, y = load_svmlight_file(str(path), zero_based=True, dtype=number)
        except (ValueError, OSError, OverflowError, EOFError) as error:
            raise _bad_libsvm(path, error) from None
        if not _is_wide_enough(x.shape[1], path.stat().st_size):
            raise _bad_libsvm(path)
        tables.append(csr_array(x))
        targets.append(y)
    has_zero = any((x.indices == 0).any() for x in tables)
    if first is None:
        first = 0 if has_zero else 1
    elif first == 1 and has_zero:
        raise ValueError(
            f"{paths[0]} has a feature 0. Expected features counted from 1, as in training."
        )
    width = tables[0].shape[1] - first if width is None else width
    if width < 1 or not tables[0].shape[0]:
        raise ValueError(f"{paths[0]} could not be read as LIBSVM: it has no examples or features.")
    for i, (path, x) in enumerate(zip(paths, tables, strict=True)):
        unseen = np.unique(x.indices[x.indices >= first + width])
        if len(unseen):  # no weight was learnt for them
            _log.info(
                f"{path}: features that training did not have are left out: "
                + (
                    f"{unseen[0]}."
                    if len(unseen) == 1
                    else f"{len(unseen)}, from {unseen[0]} to {unseen[-1]}."
                )
            )
            x = x[:, : first + width]
        columns = x.indices - np.asarray(first, dtype=x.indices.dtype)
        tables[i] = csr_array((x.data, columns, x.indptr), shape=(x.shape[0], width))
    return tables, targets, first


def _bad_libsvm(path: Path, error: Exception | None = None) -> ValueError:
    """What is wrong with a file, by its first line that no LIBSVM file has."""
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
    opened = openers.get(path.suffix.lower(), open)
    widest = _widest(path.stat().st_size)
    with contextlib.suppress(OSError, EOFError), opened(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE), b""), 1):
            if why := _wrong_in(line.partition(b"#")[0].split(), widest):
                shown = printable(line[:60].decode(errors="replace").rstrip())
                return ValueError(
                    f"{path} could not be read as LIBSVM: {why}. Received, in line {number}: "
                    f"{shown}{'…' if len(line) > 60 else ''} Mend that line."
                )
    return ValueError(
        f"{path} could not be read as LIBSVM, lines of a label and feature:value "
        f"({type(error).__name__}). Is it damaged, or of another kind?"
    )


def _wrong_in(words: list[bytes], widest: int) -> str:
    """Why no line of a LIBSVM file has these words; nothing, where one may."""
    before = -1
    try:
        if words:
            float(words[0])
    except ValueError:
        return "expected a number as label at the start of each line"
    for word in words[1:]:
        feature, _, value = word.partition(b":")
        if feature == b"qid":
            continue
        try:
            number = int(feature)
            float(value)
        except ValueError:
            return "expected whole_number:number for each feature"
        if not 0 <= number < widest:
            return f"expected features from 0 to {widest - 1:,} in a file of this size"
        if number <= before:
            return "expected the features of a line in ascending order, none twice"
        before = number
    return ""


def _dense_bytes(x: Any) -> float:
    return float(x.shape[0]) * x.shape[1] * x.dtype.itemsize
