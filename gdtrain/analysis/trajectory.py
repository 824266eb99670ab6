"""The path of a run through parameter space: its snapshots, their file, and the plane they lie in.

θ parameters (P of them, flat), θ* those of the end.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from gdtrain.data.reading import read_arrays

__all__ = ["Plane", "Snapshots", "Spacing", "as_snapshot", "plane_of"]

_CHUNK = 2**20  # parameters that are in double precision at once


@dataclass
class Snapshots:
    """Parameters of a run at some of its updates. K snapshots, P parameters."""

    updates: NDArray[np.int64]  # (K,), ascending: how many had been made
    parameters: NDArray[Any]  # (K, P), those that train, flat, in the model's order
    names: list[str] = field(default_factory=list)  # of the parameters' tensors; empty: not known
    sizes: list[int] = field(default_factory=list)  # how many numbers each tensor has

    def save(self, path: str | Path) -> None:
        """Write an `.npz`, all of it or nothing; a file that is there is replaced."""
        path = Path(path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            with (Path(folder) / "new").open("wb") as file:
                np.savez(
                    file,
                    allow_pickle=False,
                    updates=self.updates,
                    parameters=self.parameters,
                    names=np.asarray(self.names, dtype=np.str_),
                    sizes=np.asarray(self.sizes, dtype=np.int64),
                )
            os.replace(file.name, path)

    @classmethod
    def load(cls, path: str | Path) -> Snapshots:
        """Read what `save` wrote; ValueError: the file holds something else, or is damaged."""
        try:
            file = read_arrays(path)
            updates, parameters = file["updates"], file["parameters"]
            names, sizes = file["names"], file["sizes"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} cannot be read as the path of a run ({error}).") from None
        if (
            parameters.ndim != 2
            or parameters.dtype.kind != "f"
            or updates.dtype.kind not in "iu"
            or updates.shape != parameters.shape[:1]
            or bool((np.diff(updates) <= 0).any())
            or names.dtype.kind != "U"
            or sizes.dtype.kind not in "iu"
            or not names.ndim == sizes.ndim == 1
            or len(names) != len(sizes)
        ):
            raise ValueError(f"{path} cannot be read as the path of a run (of another shape).")
        return cls(updates, parameters, names.tolist(), sizes.tolist())

    def check(self, model: nn.Module, path: str | Path) -> None:
        """Raise a ValueError where they, of a file, are of another model, by names and sizes."""
        own = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        then = dict(zip(self.names, self.sizes, strict=True))
        if own != then or self.parameters.shape[1] != sum(own.values()):
            raise ValueError(
                f"{path} is the path of another model: expected {sum(own.values()):,} parameters "
                f"in {', '.join(own)}. Received: {self.parameters.shape[1]:,} in "
                f"{', '.join(then)}."
            )

    def until(self, update: int, end: Tensor | None = None) -> Snapshots:
        """Those up to an update, without any that is not finite; `end` (P,) becomes the last."""
        kept = (self.updates <= update) & np.isfinite(self.parameters).all(axis=1)
        updates, parameters = self.updates[kept], self.parameters[kept]
        if end is not None:
            before = updates < update
            parameters = np.vstack([parameters[before], as_snapshot(parameters, end.detach())])
            updates = np.append(updates[before], update)
        return Snapshots(updates, parameters, self.names, self.sizes)


def as_snapshot(like: NDArray[Any], theta: Tensor) -> NDArray[Any]:
    """Flat parameters as an array, in the precision of a path."""
    return theta.to("cpu", torch.float64).numpy().astype(like.dtype)


@dataclass(frozen=True)
class Spacing:
    """After which updates a path has a snapshot: the first ones, then evenly, ever further apart.

    Beside the start and the end, a path has at most `count` − 2 snapshots. Those after the first
    ones stand at multiples of `every`, which doubles whenever there would be too many.
    """

    count: int  # snapshots at most, range [3, ∞)
    every: int  # updates from one to the next at first, range [1, ∞)
    first: int = 0  # how many of the first updates have one each, range [0, count − 3]

    def at(self, update: int) -> int:
        """Updates from one snapshot to the next, when so many are made."""
        room = self.count - 2 - self.first
        return self.every << (max(-(-update // (self.every * room)), 1) - 1).bit_length()

    def next(self, update: int) -> int:
        """The smallest update number above one that has a snapshot."""
        every = self.at(update)
        return update + 1 if update < self.first else (update // every + 1) * every

    def __contains__(self, update: int) -> bool:
        return update <= self.first or update % self.at(update) == 0

    def kept(self, updates: Iterable[int], now: int) -> list[int]:
        """Those of a path that still stand where they should: no closer, and no end that was none.

        The lowest is the start; `now`, updates made, is the end for now.
        """
        updates, every = sorted(updates), self.at(now)
        return [u for u in updates if u in (updates[0], now) or u <= self.first or u % every == 0]


class Plane(NamedTuple):
    """The plane of a path's two principal components."""

    first: Tensor  # (P,), of length 1
    second: Tensor  # (P,), of length 1, orthogonal to the first
    coordinates: NDArray[np.float64]  # (K, 2), ⟨θ_i − θ*, first⟩ and ⟨θ_i − θ*, second⟩
    shares: tuple[float, float]  # of the variance of the path, each in [0, 1]


def plane_of(path: ArrayLike | Tensor, end: ArrayLike | Tensor) -> Plane:
    """The two principal components of a path θ_i, (K, P), and the path in the plane through θ*.

    They are the first two right singular vectors of the matrix with the rows θ_i − θ*, i = 1 … K,
    and 0 (for θ* itself), less their mean; found from its (K+1, K+1) Gram matrix, so that nothing
    larger than the path itself is made. The start lies to the left of the end.

    Li, Xu, Taylor, Studer and Goldstein, Visualizing the loss landscape of neural nets, 2018,
    arXiv 1712.09913, section 7.
    """
    end = torch.as_tensor(end)
    points = torch.as_tensor(path).to(end.device)
    count = len(points)

    def differences() -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, len(end), _CHUNK):
            part = slice(first, first + _CHUNK)
            yield part, points[:, part].double() - end[part].double()

    gram = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    for _, d in differences():
        gram[:count, :count] += (d @ d.T).cpu()
    if not gram.diagonal().max() > 0:
        raise ValueError("A plane needs a path. Received: points that are all equal to the end.")
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    values, vectors = torch.linalg.eigh(centred)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    found: list[Tensor] = []
    coordinates = np.zeros((count, 2))
    for k in range(2):
        # A path on a line, to rounding, has one component.
        if values[k] > 1e-12 * values[0]:
            u = vectors[:count, k].to(end.device) / values[k].sqrt()
            direction = torch.cat([u @ d for _, d in differences()])
        else:
            values[k] = 0.0
            drawn = torch.randn(len(end), generator=torch.Generator().manual_seed(0))
            direction = drawn.to(end.device, torch.float64)
            direction -= (direction @ found[0].double()) * found[0].double()
        direction = (direction / direction.norm()).to(end.dtype)
        for part, d in differences():
            coordinates[:, k] += (d @ direction[part].double()).cpu().numpy()
        furthest = np.abs(coordinates[:, k]).argmax()
        if (coordinates[0, k] or coordinates[furthest, k]) > 0:
            coordinates[:, k] *= -1
            direction = -direction
        found.append(direction)
    shares = (values[:2] / values.sum()).tolist()
    return Plane(found[0], found[1], coordinates, (shares[0], shares[1]))
