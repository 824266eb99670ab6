"""What turns raw features and targets into tensors, and predictions back into answers.

N examples, D features. Statistics come from the training part only.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdtrain.data.sparse import SparseInputs, check_entries, is_sparse

__all__ = ["Preprocessing"]

_PLAIN = ("classes", "feature_names", "input_shape", "first_feature")
_CHUNK = 32 * 2**20  # bytes of raw features that are looked at together


@dataclass
class Preprocessing:
    """x ← (x − mean)/scale, classes ← 0 … C−1, numbers ← (y − target_mean)/target_scale.

    Args:
        mean: Per feature (D,), or per channel of images (C, 1, 1). None: left as they are.
        scale: Standard deviation likewise; 1 where a feature is constant.
        target_mean: Per target column, for regression. None: left as they are.
        target_scale: Likewise.
        classes: The labels, sorted; None for regression.
        feature_names: Names of the D columns, where they have any.
        input_shape: Shape of one example.
        first_feature: From which number the LIBSVM file counted its features, 0 or 1; None: the
            data came from elsewhere.

    Example:
        >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
        >>> preprocessing = Preprocessing.learn(x, np.array(["no", "yes"]), classify=True)
        >>> preprocessing.inputs(x)
        tensor([[-1.,  0.],
                [ 1.,  0.]])
        >>> preprocessing.targets(np.array(["yes", "no"]))
        tensor([1, 0])
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
        *,
        classify: bool,
        classes: list[Any] | None = None,
        standardize: bool = True,
        standardize_targets: bool = True,
        feature_names: list[str] | None = None,
        rows: NDArray[np.int64] | None = None,
        first_feature: int | None = None,
    ) -> Preprocessing:
        """Learn the statistics of a training set.

        Args:
            inputs: (N, D), or images (N, C, H, W); may be memory-mapped, or of `scipy.sparse`.
            targets: (N,) or (N, K).
            classify: Whether the targets are classes.
            classes: All labels; those in `targets` if None.
            standardize: Whether to standardise features.
            standardize_targets: Whether to standardise the targets of a regression.
            feature_names: Names of the D columns.
            rows: The examples to learn from; None: all.
            first_feature: As for the class.

        Returns:
            The transformation.

        Raises:
            ValueError: Sparse features are to be standardised, or statistics are not finite.
        """
        made = cls(
            feature_names=feature_names,
            input_shape=[int(size) for size in inputs.shape[1:]],
            first_feature=first_feature,
        )
        if standardize and is_sparse(inputs):
            raise ValueError(
                "Sparse inputs cannot be standardised: centring would fill in their zeros. Pass "
                "standardize=False (data.standardize=false), after scaling them where they need "
                "it, or dense inputs (inputs.toarray())."
            )
        if standardize:
            mean, scale = _moments(inputs, rows)
            made.mean, made.scale = mean, _nonzero(scale, mean)
            _check_finite("features", mean, scale)
        targets = targets if rows is None else targets[rows]
        if classify:
            made.classes = classes if classes is not None else np.unique(targets).tolist()
        elif standardize_targets:
            target_mean = np.atleast_1d(targets.mean(axis=0, dtype=np.float64))
            target_scale = np.atleast_1d(targets.std(axis=0, dtype=np.float64))
            _check_finite("targets", target_mean, target_scale)
            made.target_mean = target_mean
            made.target_scale = _nonzero(target_scale, target_mean)
        return made

    @overload
    def inputs(
        self, raw: NDArray[Any], dtype: torch.dtype = ..., rows: NDArray[np.int64] | None = ...
    ) -> Tensor: ...

    @overload
    def inputs(
        self, raw: Any, dtype: torch.dtype = ..., rows: NDArray[np.int64] | None = ...
    ) -> Tensor | SparseInputs: ...

    def inputs(
        self, raw: Any, dtype: torch.dtype = torch.float32, rows: NDArray[np.int64] | None = None
    ) -> Tensor | SparseInputs:
        """Raw features, (N, D) or (N, C, H, W), as a standardised tensor.

        Args:
            raw: Numbers, finite. Images may be flat, (N, C·H·W). What is of `scipy.sparse` stays
                sparse, unless it is to be standardised or reshaped.
            dtype: Of the result.
            rows: Which of them; None: all.

        Raises:
            ValueError: Another shape than in training, or values that are not finite.
        """
        shape = tuple(self.input_shape or raw.shape[1:])
        if is_sparse(raw) and self.mean is None and raw.shape[1:] == shape:
            kept = SparseInputs.from_scipy(raw, rows, dtype)
            check_entries(kept, self.feature_names)
            return kept if kept.dtype == dtype else kept.to("cpu", dtype)
        if is_sparse(raw):
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
        size = max(1, _CHUNK // max(math.prod(shape) * number.itemsize, 1))
        for first in range(0, count, size):
            part = slice(first, min(first + size, count))
            with np.errstate(over="ignore"):  # told as an infinite feature below
                x[part] = raw[part if rows is None else rows[part]]
            check_features(x[part], self.feature_names, first)
            if self.mean is not None and self.scale is not None:
                x[part] -= self.mean.astype(number)
                x[part] /= self.scale.astype(number)
        return torch.from_numpy(x).to(dtype)

    def targets(self, raw: NDArray[Any], dtype: torch.dtype = torch.float32) -> Tensor:
        """Raw targets as class numbers (N,), int64, or as standardised numbers (N,) or (N, K).

        Args:
            raw: Labels or numbers.
            dtype: Of numbers.

        Raises:
            ValueError: A label that training did not have, or a number that is not finite.
        """
        if self.classes is not None:
            return torch.from_numpy(self._class_numbers(raw.ravel()))
        number = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        if self.target_mean is None and raw.dtype == number and _is_shareable(raw):
            check_targets(raw)
            return torch.from_numpy(raw).to(dtype)
        y = np.array(raw, dtype=np.float64)
        check_targets(y)
        if self.target_mean is not None and self.target_scale is not None:
            shape = (1,) * (y.ndim - 1) + (-1,) if y.ndim > 1 else (-1,)
            y = (y - self.target_mean.reshape(shape)) / self.target_scale.reshape(shape)
        return torch.from_numpy(y).to(dtype)

    def _class_numbers(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        assert self.classes is not None
        classes = np.asarray(self.classes)
        if classes.dtype.kind in "biuf" and labels.dtype.kind in "biuf":
            found = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
            wrong = np.flatnonzero(classes[found] != labels)
            if not len(wrong):
                return found.astype(np.int64, copy=False)
            unknown = labels[wrong[0]].item()
        else:
            number = {label: i for i, label in enumerate(self.classes)}
            try:
                return np.array([number[label] for label in labels.tolist()], dtype=np.int64)
            except KeyError as error:
                unknown = error.args[0]
        raise ValueError(
            f"Labels must be among those of the training data, {_shortened(self.classes)}. "
            f"Received: {unknown!r}."
        )

    def answers(self, decided: Tensor) -> NDArray[Any]:
        """Class numbers as labels, standardised numbers in the units of the target.

        Args:
            decided: (N,) classes, or (N, K) numbers, from `Loss.decide`.

        Returns:
            (N,) labels, or (N, K) numbers, (N,) if K = 1.
        """
        values = decided.detach().cpu().numpy()
        if self.classes is not None:
            return np.asarray(self.classes)[values]
        if self.target_mean is not None and self.target_scale is not None:
            values = values * self.target_scale + self.target_mean
        return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values

    def state_dict(self) -> dict[str, Any]:
        """As plain containers and tensors, for a checkpoint."""
        arrays = {
            name: None if value is None else torch.from_numpy(np.ascontiguousarray(value))
            for name in ("mean", "scale", "target_mean", "target_scale")
            for value in [getattr(self, name)]
        }
        lists = {name: getattr(self, name) for name in _PLAIN}
        return {**arrays, **lists}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Preprocessing:
        """The inverse of `state_dict`.

        Args:
            state: What `state_dict` returned.
        """
        plain: dict[str, Any] = {
            name: value.numpy() if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        return cls(**plain)


def _is_shareable(array: NDArray[Any]) -> bool:
    """Whether a tensor may use its memory: torch has none that is read-only."""
    return array.flags.c_contiguous and array.flags.writeable and array.dtype.isnative


def check_features(x: Any, feature_names: list[str] | None = None, number: int = 0) -> None:
    """Raise, with its place, on a feature that is not finite.

    Args:
        x: (N, D) or (N, C, H, W), or CSR of `scipy.sparse`.
        feature_names: Names of the D columns.
        number: Of the first example, for the message.

    Raises:
        ValueError: There is one.
    """
    if is_sparse(x):
        check_entries(x, feature_names)
        return
    if x.dtype.kind != "f" or not len(x):
        return
    size = max(1, _CHUNK // max(x[0].nbytes, 1))
    for first in range(0, len(x), size):
        bad = np.argwhere(~np.isfinite(x[first : first + size])).tolist()
        give_back(x)
        if bad:
            place = (first + bad[0][0], *bad[0][1:])
            break
    else:
        return
    feature = place[1] if len(place) == 2 else place[1:]
    name = feature_names[place[1]] if feature_names else feature
    raise ValueError(
        f"Features must be finite numbers. Received: {x[place]} in example {number + place[0]} "
        f"(counted from 0), feature {name}. Fill in or drop missing values first."
    )


def give_back(array: NDArray[Any]) -> None:
    """Tell the system that the pages of a memory-mapped file need not stay in memory.

    Args:
        array: Mapped, or not: then nothing happens.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        mapped = getattr(base, "_mmap", None)
        if mapped is not None:
            if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
                mapped.madvise(mmap.MADV_DONTNEED)
            return
        base = base.base


def check_targets(y: NDArray[Any]) -> None:
    """Raise, with its row, on a number that is not finite.

    Args:
        y: (N,) or (N, K).

    Raises:
        ValueError: There is one.
    """
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        row = int(np.argwhere(~np.isfinite(y))[0][0])
        raise ValueError(
            f"Targets must be finite numbers. Received: {y[row]} in example {row} (counted from 0)."
        )


def _moments(
    inputs: NDArray[Any], rows: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation per feature (per channel of images), in two passes by chunks."""
    axes = (0, *range(2, inputs.ndim))
    rows = np.arange(len(inputs)) if rows is None else rows
    size = max(1, _CHUNK // max(inputs[0].nbytes, 1))

    def total(f: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[np.float64]:
        sums = 0.0
        for first in range(0, len(rows), size):
            part = np.asarray(inputs[rows[first : first + size]], dtype=np.float64)
            sums = sums + f(part).sum(axis=axes, keepdims=True)[0]
            give_back(inputs)
        return np.asarray(sums) / (len(rows) * math.prod(inputs.shape[2:]))

    mean = total(lambda part: part)
    return mean, np.sqrt(total(lambda part: (part - mean) ** 2))


def _check_finite(what: str, mean: NDArray[Any], scale: NDArray[Any]) -> None:
    if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
        raise ValueError(f"The {what} are too large to be standardised in float64: rescale them.")


def _nonzero(scale: NDArray[Any], mean: NDArray[Any]) -> NDArray[Any]:
    """The scale, 1 where a column is constant (to rounding)."""
    return np.where(scale > 1e-12 * np.maximum(1.0, np.abs(mean)), scale, 1.0)


def _shortened(labels: list[Any], most: int = 10) -> str:
    shown = ", ".join(repr(label) for label in labels[:most])
    return shown + (f", … ({len(labels)} in all)" if len(labels) > most else "")
