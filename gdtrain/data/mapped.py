"""Examples that stay in a file: read by index, standardised as they are read.

N examples in the file, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdtrain.data.frames import give_back
from gdtrain.data.preprocessing import Preprocessing

__all__ = ["MappedInputs"]

_RESIDENT = 128 * 2**20  # bytes that may be in memory before the file's pages are given back
_FAULT = 2 * 2**20  # bytes that may come along when one of them is touched (Linux, large folios)


class MappedInputs:
    """Rows of a memory-mapped array, standardised in `dtype`, as tensors of type `out`.

    Pages that were read are given back to the system now and then, so that a pass over a file
    larger than memory needs little of it.
    """

    def __init__(
        self,
        array: NDArray[Any],
        rows: NDArray[np.int64],
        preprocessing: Preprocessing,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        out: torch.dtype | None = None,
    ) -> None:
        self.array, self.rows, self.preprocessing = array, rows, preprocessing
        self.dtype, self.device, self.out = dtype, torch.device(device), out or dtype
        self._read = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, …)."""
        return (len(self.rows), *self.array.shape[1:])

    def is_floating_point(self) -> bool:
        """True: features are numbers."""
        return True

    def __getitem__(self, indices: Any) -> Tensor:
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        raw = self._rows(self.rows[indices])
        return self.preprocessing.inputs(raw, self.dtype).to(self.device, self.out)

    def _rows(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        each = self.array[:1].nbytes
        blocks = rows * each // _FAULT
        # Bytes in memory after each row, if its block was not that of the row before.
        new = np.diff(blocks, prepend=-1) != 0
        taken = self._read + np.cumsum(np.where(new, max(each, _FAULT), 0))
        self._read = int(taken[-1]) if len(taken) else self._read
        if self._read <= _RESIDENT:
            return self.array[rows]
        made = np.empty((len(rows), *self.array.shape[1:]), self.array.dtype)
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(taken // _RESIDENT)) + 1):
            made[part] = self.array[rows[part]]
            give_back(self.array)
        self._read = 0
        return made

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> MappedInputs:
        """The same rows, as tensors elsewhere or of another type (None: as they are)."""
        return MappedInputs(
            self.array, self.rows, self.preprocessing, self.dtype, device, dtype or self.out
        )
