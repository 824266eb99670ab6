"""What turns raw features and targets into tensors, and predictions back into answers.

N examples, D features. Statistics come from the training part only.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Preprocessing"]

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

    @classmethod
    def learn(
        cls,
        inputs: NDArray[Any],
        targets: NDArray[Any],
        *,
        classify: bool,
        classes: list[Any] | None = None,
        standardize: bool = True,
        standardize_targets: bool = True,
        feature_names: list[str] | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> Preprocessing:
        """Learn the statistics of a training set.

        Args:
            inputs: (N, D), or images (N, C, H, W); may be memory-mapped.
            targets: (N,) or (N, K).
            classify: Whether the targets are classes.
            classes: All labels; those in `targets` if None.
            standardize: Whether to standardise features.
            standardize_targets: Whether to standardise the targets of a regression.
            feature_names: Names of the D columns.
            rows: The examples to learn from; None: all.

        Returns:
            The transformation.
        """
        made = cls(feature_names=feature_names, input_shape=list(inputs.shape[1:]))
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

    def inputs(self, raw: NDArray[Any], dtype: torch.dtype = torch.float32) -> Tensor:
        """Raw features, (N, D) or (N, C, H, W), as a standardised tensor.

        Args:
            raw: Numbers, finite. Images may be flat, (N, C·H·W).
            dtype: Of the result.

        Raises:
            ValueError: Another shape than in training, or values that are not finite.
        """
        shape = tuple(self.input_shape or raw.shape[1:])
        if raw.ndim == 2 and raw.shape[1] == math.prod(shape):
            raw = raw.reshape(-1, *shape)
        if raw.shape[1:] != shape:
            raise ValueError(
                f"Expected examples of shape {shape}, as in training ({math.prod(shape)} features "
                f"each). Received: {raw.shape[1:]}."
            )
        x = np.array(raw, dtype=np.float64 if dtype == torch.float64 else np.float32)
        check_features(x, self.feature_names)
        if self.mean is not None and self.scale is not None:
            x -= self.mean.astype(x.dtype)
            x /= self.scale.astype(x.dtype)
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
            number = {label: i for i, label in enumerate(self.classes)}
            try:
                return torch.tensor(
                    [number[label] for label in raw.ravel().tolist()], dtype=torch.int64
                )
            except KeyError as error:
                raise ValueError(
                    f"Labels must be among those of the training data, "
                    f"{_shortened(self.classes)}. Received: {error.args[0]!r}."
                ) from None
        y = np.array(raw, dtype=np.float64)
        check_targets(y)
        if self.target_mean is not None and self.target_scale is not None:
            shape = (1,) * (y.ndim - 1) + (-1,) if y.ndim > 1 else (-1,)
            y = (y - self.target_mean.reshape(shape)) / self.target_scale.reshape(shape)
        return torch.from_numpy(y).to(dtype)

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
        lists = {name: getattr(self, name) for name in ("classes", "feature_names", "input_shape")}
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


def check_features(x: NDArray[Any], feature_names: list[str] | None = None) -> None:
    """Raise, with its place, on a feature that is not finite.

    Args:
        x: (N, D) or (N, C, H, W).
        feature_names: Names of the D columns.

    Raises:
        ValueError: There is one.
    """
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
        f"Features must be finite numbers. Received: {x[place]} in example {place[0]} "
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
