"""What turns raw features and targets into tensors, and predictions back into answers.

N examples, D features. Statistics come from the training part only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdtrain.data.frames import CHUNK, check_features, give_back, shortened
from gdtrain.data.sparse import SparseInputs, check_entries, is_sparse
from gdtrain.data.targets import check_numbers, class_numbers, label_array, read

__all__ = ["Preprocessing"]

_HALF = (torch.bfloat16, torch.float16)  # NumPy has no bfloat16


@dataclass
class Preprocessing:
    """x ← (x − mean)/scale, classes ← 0 … C−1, numbers ← (y − target_mean)/target_scale.

    All of it is computed in float64, and then rounded to the type of the tensors. Statistics are
    per feature (D,), per channel of images (C, 1, 1), or per target column; None: left as they are.
    `first_feature`: from which number a LIBSVM file counted its features; None: it is of no such
    file.
    """

    mean: NDArray[Any] | None = None
    scale: NDArray[Any] | None = None
    target_mean: NDArray[Any] | None = None
    target_scale: NDArray[Any] | None = None
    classes: list[Any] | None = None
    feature_names: list[str] | None = None
    input_shape: list[int] | None = None
    first_feature: int | None = None

    @classmethod
    def learn(
        cls,
        inputs: Any,
        targets: NDArray[Any],
        rows: NDArray[np.int64] | None = None,
        *,
        standardize: bool = True,
        standardize_targets: bool = True,
        **known: Any,
    ) -> Preprocessing:
        """Learn the statistics of some rows, or all; `known`: other attributes, as they are."""
        made = cls(input_shape=[int(size) for size in inputs.shape[1:]], **known)
        if standardize and is_sparse(inputs):
            raise ValueError(
                "Sparse inputs cannot be standardised: centring would fill in their zeros. Pass "
                "standardize=False (data.standardize=false), after scaling them where they need "
                "it, or dense inputs (inputs.toarray())."
            )
        if standardize:
            made.mean, made.scale = _statistics("features", inputs, rows)
        if standardize_targets and made.classes is None:
            columns = targets.reshape(len(targets), -1)
            made.target_mean, made.target_scale = _statistics("targets", columns, rows)
        return made

    def inputs(
        self, raw: Any, dtype: torch.dtype = torch.float32, rows: NDArray[np.int64] | None = None
    ) -> Any:
        """Raw features, (N, D) or (N, C, H, W), as a standardised tensor, or as `SparseInputs`.

        Images may be flat, (N, C·H·W). What is of `scipy.sparse` stays sparse, unless it is to be
        standardised or reshaped.
        """
        shape = tuple(self.input_shape or raw.shape[1:])
        if is_sparse(raw):
            if self.mean is None and raw.shape[1:] == shape:
                kept = SparseInputs.from_scipy(raw, rows, dtype)
                check_entries(kept, self.feature_names)
                return kept if kept.dtype == dtype else kept.to("cpu", dtype)
            raw, rows = (raw if rows is None else raw[rows]).toarray(), None
        if raw.ndim == 2 and raw.shape[1] == math.prod(shape):
            raw = raw.reshape(-1, *shape)
        if raw.shape[1:] != shape:
            raise ValueError(
                f"Expected examples of shape {shape}, as in training ({math.prod(shape)} features "
                f"each). Received: {raw.shape[1:]}."
            )
        number = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        whole = rows is None or (len(rows) == len(raw) and bool((rows[1:] > rows[:-1]).all()))
        if whole and self.mean is None and raw.dtype == number and _is_shareable(raw):
            check_features(raw, self.feature_names)
            return torch.from_numpy(raw).to(dtype)
        # By chunks: what is needed beside the result does not grow with N.
        count = len(raw) if rows is None else len(rows)
        x = np.empty((count, *shape), number)
        size = max(1, CHUNK // max(math.prod(shape) * number.itemsize, 1))
        for first in range(0, count, size):
            part = slice(first, min(first + size, count))
            taken = np.asarray(raw[part if rows is None else rows[part]])
            if self.mean is not None and self.scale is not None:
                taken = taken.astype(np.float64)
                check_features(taken, self.feature_names, first)
                taken -= self.mean
                taken /= self.scale
            with np.errstate(over="ignore"):  # told as an infinite feature
                x[part] = taken
            check_features(x[part], self.feature_names, first)
        return torch.from_numpy(x).to(dtype)

    def targets(self, raw: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """Raw targets as class numbers (N,), int64, or as standardised numbers (N,) or (N, K)."""
        if self.classes is not None:
            return torch.from_numpy(class_numbers(raw, self.classes))
        number = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        y = read(raw)
        if y.dtype.kind not in "biuf":
            raise ValueError(
                f"Targets must be numbers, as in training. Received: {shortened(y.ravel()[0])}."
            )
        check_numbers(y)
        if self.target_mean is None and y.dtype == number and _is_shareable(y):
            return torch.from_numpy(y).to(dtype)
        y = y.astype(np.float64)
        if self.target_mean is not None and self.target_scale is not None:
            columns = 1 if y.ndim == 1 else y.shape[1]
            if columns != len(self.target_mean):
                raise ValueError(
                    f"Expected {len(self.target_mean)} target(s) for each example, as in training. "
                    f"Received: {columns}."
                )
            y = (y - self.target_mean) / self.target_scale
        return torch.from_numpy(y).to(dtype)

    def answers(self, decided: Tensor) -> NDArray[Any]:
        """Of `Loss.decide`: class numbers as labels, standardised numbers in the target's units."""
        decided = decided.detach().cpu()
        if self.classes is not None:
            return label_array(self.classes)[decided.numpy()]
        if self.target_mean is not None and self.target_scale is not None:
            values = decided.double().numpy() * self.target_scale + self.target_mean
        else:
            values = (decided.float() if decided.dtype in _HALF else decided).numpy()
        return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values

    def state_dict(self) -> dict[str, Any]:
        """As plain containers and tensors, for a checkpoint."""
        return {
            name: torch.from_numpy(np.ascontiguousarray(value))
            if isinstance(value, np.ndarray)
            else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Preprocessing:
        """The inverse of `state_dict`."""
        plain: dict[str, Any] = {
            name: value.numpy() if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        return cls(**plain)


def _is_shareable(array: NDArray[Any]) -> bool:
    """Whether a tensor may use its memory: torch has none that is read-only."""
    return array.flags.c_contiguous and array.flags.writeable and array.dtype.isnative


def _statistics(
    what: str, array: NDArray[Any], rows: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and scale: 1 where a column is constant (to the rounding of its own numbers)."""
    mean, deviation = _moments(array, rows)
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all()):
        raise ValueError(f"The {what} are too large to be standardised in float64: rescale them.")
    varies = deviation > 4 * np.finfo(np.float64).eps * np.abs(mean)
    return mean, np.where(varies, deviation, 1.0)


def _moments(
    inputs: NDArray[Any], rows: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation per feature (per channel of images), in two passes by chunks.

    The mean is that of the differences to one example, which are small where the mean is large.
    """
    axes = (0, *range(2, inputs.ndim))
    rows = np.arange(len(inputs)) if rows is None else rows
    size = max(1, CHUNK // max(inputs[0].nbytes, 1))

    def total(f: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[np.float64]:
        sums = 0.0
        for first in range(0, len(rows), size):
            part = np.asarray(inputs[rows[first : first + size]], dtype=np.float64)
            sums = sums + f(part).sum(axis=axes, keepdims=True)[0]
            give_back(inputs)
        return np.asarray(sums) / (len(rows) * math.prod(inputs.shape[2:]))

    one = np.asarray(inputs[rows[0]], dtype=np.float64)
    one = one.reshape(*one.shape[:1], -1)[:, 0].reshape(-1, *(1,) * (inputs.ndim - 2))
    mean = one + total(lambda part: part - one)
    variance = total(lambda part: (part - mean) ** 2)
    if (variance > 1e-250).all() or not np.isfinite(variance).all():
        return mean, np.sqrt(variance)
    # The squares may be too small for float64: in units of the mean distance they are not.
    unit = total(lambda part: np.abs(part - mean))
    unit = np.where(unit > 0, unit, 1.0)
    return mean, unit * np.sqrt(total(lambda part: ((part - mean) / unit) ** 2))
