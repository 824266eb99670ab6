"""NumPy's files: arrays of numbers, and matrices as SciPy keeps them.

N examples, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
from numpy.typing import NDArray

from gdtrain.data.frames import features
from gdtrain.data.prepared import Raw
from gdtrain.data.reading import check_array_file, existing, most_features, read_arrays
from gdtrain.data.sparse import rows_of
from gdtrain.data.targets import Task, check_task

__all__ = ["read_npy"]


def read_npy(
    path: str | Path,
    target: int = -1,
    *,
    target_path: str | Path | None = None,
    memory_map: bool = False,
    task: Task = "auto",
) -> Raw:
    """The examples of a NumPy file of numbers.

    Args:
        path: As for `NPYDataModule`, and so the following.
        target: Column of the target.
        target_path: `.npy` with the targets; then `target` is not used.
        memory_map: Whether the inputs stay in the file; needs `target_path`.
        task: "classification", "regression" or "auto".

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder) / "table.npy", np.arange(6.0).reshape(2, 3))
        ...     raw = read_npy(Path(folder) / "table.npy")
        >>> raw.inputs, raw.targets
        (array([[0., 1.],
               [3., 4.]]), array([2., 5.]))
    """
    path = existing(path)
    sparse = path.suffix.lower() == ".npz" and target_path is not None
    x = load_npz(path) if sparse else load_npy(path, memory_map)
    if target_path is not None:
        y = load_npy(existing(target_path))
    else:
        if x.ndim != 2 or not -x.shape[1] <= target < x.shape[1]:
            raise ValueError(
                f"{path} must be a table with a column {target} for the target, or "
                f"target_path must name a file of targets. Received: shape {x.shape}."
            )
        y = x[:, target]
        x = np.delete(x, target, axis=1)
    return Raw(features(x), y, check_task(task))


def load_npy(path: Path, memory_map: bool = False) -> NDArray[Any]:
    """The array of a `.npy` file, or a map of it."""
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


def load_npz(path: Path) -> Any:
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
    if len(shape) != 2 or shape[0] > stored + 2**20 or shape[1] > most_features(stored):
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
