"""The path of a run through parameter space: its snapshots, their file, and the plane they lie in.

θ parameters (P of them, flat), θ* those of the end.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from gdtrain.data.reading import read_arrays

__all__ = ["Plane", "Snapshots", "Spacing", "as_snapshot", "plane_of"]

_CHUNK = 2**20  # parameters that are in double precision at once


@dataclass
class Snapshots:
    """Parameters of a run at some of its updates. K snapshots, P parameters.

    Args:
        updates: (K,), ascending: how many updates had been made.
        parameters: (K, P), the trainable parameters, flat, in the model's order.
        names: Of the parameters' tensors; empty: not known.
        sizes: How many numbers each tensor has.

    Example:
        >>> Snapshots(np.array([0, 1]), np.zeros((2, 3), np.float32)).parameters.shape
        (2, 3)
    """

    updates: NDArray[np.int64]
    parameters: NDArray[Any]
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write an `.npz`, all of it or nothing.

        Args:
            path: Of the file; one that is there is replaced.
        """
        path = Path(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    allow_pickle=False,
                    updates=self.updates,
                    parameters=self.parameters,
                    names=np.asarray(self.names, dtype=np.str_),
                    sizes=np.asarray(self.sizes, dtype=np.int64),
                )
            Path(name).chmod(0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Snapshots:
        """Read what `save` wrote.

        Args:
            path: Of the file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds something else, or is damaged.
        """
        try:
            file = read_arrays(path)
            found = cls(
                file["updates"],
                file["parameters"],
                file["names"].tolist(),
                file["sizes"].tolist(),
            )
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} cannot be read as the path of a run ({error}).") from None
        if (
            found.parameters.ndim != 2
            or found.parameters.dtype.kind != "f"
            or found.updates.dtype.kind not in "iu"
            or found.updates.shape != found.parameters.shape[:1]
            or bool((np.diff(found.updates) <= 0).any())
            or file["names"].dtype.kind != "U"
            or file["sizes"].dtype.kind not in "iu"
            or not file["names"].ndim == file["sizes"].ndim == 1
            or len(found.names) != len(found.sizes)
        ):
            raise ValueError(f"{path} cannot be read as the path of a run (of another shape).")
        return found

    def check(self, model: nn.Module, path: str | Path) -> None:
        """Raise where the snapshots are those of another model.

        Args:
            model: Its trainable parameters are compared by name and size.
            path: For the message.

        Raises:
            ValueError: They differ.
        """
        own = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        then = dict(zip(self.names, self.sizes, strict=True))
        if own != then or self.parameters.shape[1] != sum(own.values()):
            raise ValueError(
                f"{path} is the path of another model: expected {sum(own.values()):,} parameters "
                f"in {', '.join(own)}. Received: {self.parameters.shape[1]:,} in "
                f"{', '.join(then)}."
            )

    def until(self, update: int, end: Tensor | None = None) -> Snapshots:
        """Those up to an update, without any that is not finite.

        Args:
            update: The last that counts.
            end: (P,), the parameters after it, which become the last snapshot; None: none does.
        """
        kept = (self.updates <= update) & np.isfinite(self.parameters).all(axis=1)
        updates, parameters = self.updates[kept], self.parameters[kept]
        if end is not None:
            before = updates < update
            parameters = np.vstack([parameters[before], as_snapshot(parameters, end.detach())])
            updates = np.append(updates[before], update)
        return Snapshots(updates, parameters, self.names, self.sizes)


def as_snapshot(like: NDArray[Any], theta: Tensor) -> NDArray[Any]:
    """Flat parameters as an array, in the precision of a path.

    Args:
        like: Parameters of a path.
        theta: (P,).

    Returns:
        (P,).

    Example:
        >>> as_snapshot(np.zeros((1, 2), np.float32), torch.ones(2, dtype=torch.float64)).dtype
        dtype('float32')
    """
    return theta.to("cpu", torch.float64).numpy().astype(like.dtype)


@dataclass(frozen=True)
class Spacing:
    """After which updates a path has a snapshot: the first ones, then evenly, ever further apart.

    Beside the start and the end, a path has at most `count` − 2 snapshots. Those after the first
    ones stand at multiples of `every`, which doubles whenever there would be too many.

    Args:
        count: Snapshots at most, range [3, ∞).
        every: Updates from one to the next at first, range [1, ∞).
        first: How many of the first updates have one each, range [0, count − 3].

    Example:
        >>> spacing = Spacing(count=6, every=10, first=1)
        >>> [update for update in range(1, 90) if update in spacing]
        [1, 10, 20, 30, 40, 60, 80]
        >>> spacing.kept([0, 1, 10, 20, 30, 35], now=40)
        [0, 1, 20]
    """

    count: int
    every: int
    first: int = 0

    def at(self, update: int) -> int:
        """Updates from one snapshot to the next, when so many are made.

        Args:
            update: How many.
        """
        room = self.count - 2 - self.first
        return self.every << (max(-(-update // (self.every * room)), 1) - 1).bit_length()

    def next(self, update: int) -> int:
        """The smallest update number above one that has a snapshot.

        Args:
            update: Updates made, range [0, ∞).
        """
        every = self.at(update)
        return update + 1 if update < self.first else (update // every + 1) * every

    def __contains__(self, update: int) -> bool:
        return update <= self.first or update % self.at(update) == 0

    def kept(self, updates: Iterable[int], now: int) -> list[int]:
        """Those of a path that still stand where they should: no closer, and no end that was none.

        Args:
            updates: Of the snapshots; the lowest is the start.
            now: Updates made; its snapshot is the end for now.
        """
        updates, every = sorted(updates), self.at(now)
        return [u for u in updates if u in (updates[0], now) or u <= self.first or u % every == 0]


@dataclass
class Plane:
    """The plane of a path's two principal components.

    Args:
        first: (P,), of length 1.
        second: (P,), of length 1, orthogonal to the first.
        coordinates: (K, 2), ⟨θ_i − θ*, first⟩ and ⟨θ_i − θ*, second⟩.
        shares: Of the variance of the path, each in [0, 1].

    Example:
        >>> plane = plane_of([[4.0, 0.0, 0.0], [1.0, 1.0, 0.0]], [0.0, 0.0, 0.0])
        >>> round(sum(plane.shares), 6)
        1.0
    """

    first: Tensor
    second: Tensor
    coordinates: NDArray[np.float64]
    shares: tuple[float, float]


def plane_of(path: ArrayLike | Tensor, end: ArrayLike | Tensor) -> Plane:
    """The two principal components of a path, and the path in them.

    They are the first two right singular vectors of the matrix with the rows θ_i − θ*, i = 1 … K,
    and 0 (for θ* itself), less their mean; found from its (K+1, K+1) Gram matrix, so that nothing
    larger than the path itself is made. The start lies to the left of the end.

    Args:
        path: (K, P), points θ_i.
        end: (P,), θ*.

    Returns:
        The plane through θ* that these directions span.

    Raises:
        ValueError: No point differs from the end.

    Example:
        >>> plane = plane_of([[3.0, 0.0, 0.0]], [0.0, 0.0, 0.0])
        >>> plane.coordinates.round(6).tolist()[0][0], plane.shares
        (-3.0, (1.0, 0.0))

    References:
        Li, Xu, Taylor, Studer and Goldstein, Visualizing the loss landscape of neural nets, 2018,
        arXiv 1712.09913, section 7.
    """
    end = torch.as_tensor(end)
    points = torch.as_tensor(path).to(end.device)
    count = len(points)
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(end), _CHUNK)]
    gram = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    for part in chunks:
        d = points[:, part].double() - end[part].double()
        gram[:count, :count] += (d @ d.T).cpu()
    if not gram.diagonal().max() > 0:
        raise ValueError("A plane needs a path. Received: points that are all equal to the end.")
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    values, vectors = torch.linalg.eigh(centred)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    found: list[Tensor] = []
    for k in range(2):
        # A path on a line, to rounding, has one component.
        if k < len(values) and values[k] > 1e-12 * values[0]:
            u = vectors[:count, k].to(end.device) / values[k].sqrt()
            direction = torch.cat(
                [u @ (points[:, part].double() - end[part].double()) for part in chunks]
            )
        else:
            values[k] = 0.0
            drawn = torch.randn(len(end), generator=torch.Generator().manual_seed(0))
            direction = drawn.to(end.device, torch.float64)
            direction -= (direction @ found[0].double()) * found[0].double()
        direction /= direction.norm()
        found.append(direction.to(end.dtype))
    coordinates = np.zeros((count, 2))
    for part in chunks:
        d = points[:, part].double() - end[part].double()
        for k in range(2):
            coordinates[:, k] += (d @ found[k][part].double()).cpu().numpy()
    for k in range(2):
        furthest = np.abs(coordinates[:, k]).argmax()
        start = coordinates[0, k]
        if (start or coordinates[furthest, k]) > 0:
            coordinates[:, k] *= -1
            found[k] = -found[k]
    total = float(values.sum())
    shares = (float(values[0]) / total, float(values[1]) / total)
    return Plane(found[0], found[1], coordinates, shares)
