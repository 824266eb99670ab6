"""Examples that are mostly zeros: kept as compressed rows (CSR), made dense a batch at a time.

N examples, D features, Z entries that are not zero.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ARRAYS", "SparseInputs", "check_entries", "is_sparse", "rows_of"]

# The values of each format and its indices, as SciPy's constructors take them.
ARRAYS = {
    "csr": ("data", "indices", "indptr"),
    "csc": ("data", "indices", "indptr"),
    "bsr": ("data", "indices", "indptr"),
    "coo": ("data", "row", "col"),
    "dia": ("data", "offsets"),
}

_MOST_FEATURES = 2**31 - 1  # columns are kept as int32
_DENSE_BYTES = 64 * 2**20  # of rows that are made dense together, where nobody says how many


def is_sparse(x: Any) -> bool:
    """Whether this is a matrix or array of `scipy.sparse`."""
    scipy_sparse = sys.modules.get("scipy.sparse")  # imported, if anybody has made one
    return scipy_sparse is not None and bool(scipy_sparse.issparse(x))


def rows_of(matrix: Any) -> Any:
    """A matrix (N, D) of `scipy.sparse` as CSR, once its indices are known to lie in it.

    SciPy's own conversions, and our kernels, read where the indices say.
    """
    try:
        _check_structure(matrix)
        made = matrix if matrix.format == "csr" else matrix.tocsr()
        if matrix.format not in ARRAYS:
            _check_structure(made)
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"The sparse matrix is damaged: expected indices within its shape {matrix.shape}, and "
            f"arrays that belong together ({error})."
        ) from None
    if made.shape[1] > _MOST_FEATURES:
        raise ValueError(
            f"A sparse matrix may have {_MOST_FEATURES:,} features at most. Received: "
            f"{made.shape[1]:,}."
        )
    return made


def _check_structure(matrix: Any) -> None:
    if matrix.ndim != 2 or min(matrix.shape) < 0:
        raise ValueError("not two axes")
    kind = matrix.format
    for name in ARRAYS.get(kind, ())[1:]:
        found = getattr(matrix, name)
        if found.dtype.kind not in "iu" or found.ndim != 1:
            raise ValueError(f"{name} are not whole numbers")
        if found.dtype.kind == "u" and len(found) and int(found.max()) >= 2**63:
            raise ValueError(f"{name} are not whole numbers of 64 bits")
    if kind in ("csr", "csc", "bsr"):
        # A copy of the frame, since SciPy trims the arrays that it checks.
        starts, least = matrix.indptr, len(matrix.indices)
        if not len(starts) or int(starts[0]) != 0 or int(starts[-1]) > least:
            raise ValueError("indptr does not fit the indices")
        type(matrix)(
            (matrix.data, matrix.indices, starts), shape=matrix.shape, copy=False
        ).check_format(full_check=True)
    elif kind == "coo":
        for places, size in zip((matrix.row, matrix.col), matrix.shape, strict=True):
            if len(places) != len(matrix.data):
                raise ValueError("as many indices as values are needed")
            if len(places) and not 0 <= int(places.min()) <= int(places.max()) < size:
                raise ValueError("index out of range")
    elif kind == "dia":
        if matrix.data.ndim != 2 or len(matrix.offsets) != len(matrix.data):
            raise ValueError("as many offsets as diagonals are needed")
        if len(matrix.offsets) and int(np.abs(matrix.offsets).max()) >= max(matrix.shape):
            raise ValueError("offset out of range")


class SparseInputs:
    """Rows of a sparse matrix, as dense tensors when they are indexed.

    Example i has `values[row_starts[i]:row_starts[i + 1]]` in the `columns` of the same places,
    which ascend, none twice, and zeros elsewhere: memory is O(Z + N), never N·D. The arrays are
    contiguous and stay in main memory, for engines that use them as they are; `device` is that of
    the tensors.
    """

    def __init__(
        self,
        values: NDArray[Any],
        columns: NDArray[np.int32],
        row_starts: NDArray[np.int64],
        num_features: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.values, self.columns, self.row_starts = values, columns, row_starts
        self.num_features = num_features
        self.device = torch.device(device)
        self.dtype = torch.from_numpy(values[:0]).dtype if dtype is None else dtype

    @classmethod
    def from_scipy(
        cls,
        matrix: Any,
        rows: NDArray[np.int64] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> SparseInputs:
        """Copy rows of a matrix; its duplicates are added up, and its explicit zeros left out."""
        from scipy.sparse import csr_array

        matrix = rows_of(matrix)
        kept = csr_array(matrix if rows is None else matrix[rows])
        with np.errstate(over="ignore"):  # infinite then, which the caller looks for
            own = np.float64 if dtype == torch.float64 else np.float32
            kept = kept.astype(own, copy=rows is None)
        kept.sum_duplicates()
        kept.eliminate_zeros()
        return cls(
            np.ascontiguousarray(kept.data),
            np.ascontiguousarray(kept.indices, dtype=np.int32),
            np.ascontiguousarray(kept.indptr, dtype=np.int64),
            kept.shape[1],
        )

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return len(self), self.num_features

    def is_floating_point(self) -> bool:
        """True: features are numbers."""
        return True

    def __getitem__(self, indices: Any) -> Tensor:
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        starts = np.atleast_1d(self.row_starts[:-1][indices])
        counts = np.atleast_1d(self.row_starts[1:][indices]) - starts
        before = np.cumsum(counts) - counts  # entries of the rows before, here and in the matrix
        entries = np.arange(counts.sum()) + np.repeat(starts - before, counts)
        b, d = len(starts), self.num_features
        places = np.repeat(np.arange(0, b * d, d), counts)
        places += self.columns.take(entries)
        dense = torch.zeros(b * d, dtype=self.dtype, device=self.device)
        values = torch.from_numpy(self.values.take(entries)).to(self.device, self.dtype)
        return dense.scatter_(0, torch.from_numpy(places).to(self.device), values).view(b, d)

    @property
    def rows_at_once(self) -> int:
        """How many rows take 64 MB when they are dense; at least 1."""
        return max(1, _DENSE_BYTES // max(1, self.num_features * self.dtype.itemsize))

    def split(self, size: int) -> Iterator[Tensor]:
        """The rows in their order, as dense pieces of `size` rows (of `rows_at_once`, if less)."""
        size = min(size, self.rows_at_once)
        for first in range(0, len(self), size):
            yield self[first : first + size]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SparseInputs:
        """The same rows, as tensors elsewhere or of another type (None: as they are).

        The values become float32 or float64 where that is the type: an engine on them computes in
        it.
        """
        dtype = self.dtype if dtype is None else dtype
        own = {torch.float32: np.float32, torch.float64: np.float64}.get(dtype, self.values.dtype)
        return SparseInputs(
            self.values.astype(own, copy=False),
            self.columns,
            self.row_starts,
            self.num_features,
            device,
            dtype,
        )


def check_entries(matrix: Any, feature_names: list[str] | None = None) -> None:
    """Raise, with its place, on an entry of CSR or of `SparseInputs` that is not finite."""
    if isinstance(matrix, SparseInputs):
        values, columns, starts = matrix.values, matrix.columns, matrix.row_starts
    else:
        values, columns, starts = matrix.data, matrix.indices, matrix.indptr
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    entry = int(np.argmin(np.isfinite(values)))
    example = int(np.searchsorted(starts, entry, side="right")) - 1
    column = int(columns[entry])
    raise ValueError(
        f"Features must be finite numbers. Received: {values[entry]} in example {example} "
        f"(counted from 0), feature {feature_names[column] if feature_names else column}. Fill in "
        f"or drop missing values first."
    )
