"""Dropout whose numbers do not depend on how a batch is cut.

An example's mask is a hash of (draw, layer, position in the batch, unit): the same whether the
batch runs at once, in micro-batches of any size, or spread over processes. PyTorch's `Dropout`
draws from one stream in the order of the passes, and so depends on the cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from gdtrain.ranges import Interval

__all__ = ["Dropout", "drawing", "example_seeds"]

_current: ContextVar[tuple[int, int] | None] = ContextVar("gdtrain_draw", default=None)

# Multipliers and shifts of SplitMix64 (Steele, Lea and Flood, 2014), as signed 64-bit numbers.
_GOLDEN, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


@contextmanager
def drawing(draw: int, first: int) -> Iterator[None]:
    """Names the random numbers of the passes inside.

    The same `draw`, the update number in training, gives the same numbers; `first` is the position
    in the batch of the first example of the pass.
    """
    token = _current.set((draw, first))
    try:
        yield
    finally:
        _current.reset(token)


class Dropout(nn.Module):
    """Sets each unit to 0 with probability p in training, and scales the others by 1/(1 − p).

    Outside gdtrain's objective each call draws from PyTorch's generator, as `torch.nn.Dropout`.
    Layers of an equal `layer` get equal masks.
    """

    seeds: Tensor | None

    def __init__(self, p: float = 0.5, layer: int = 0) -> None:
        super().__init__()
        self.p, self.layer = Interval(0, 1, closed="left").check("dropout", p), layer
        # (B,), in the place of `drawing` in a compiled graph, where they are an input; no state.
        self.register_buffer("seeds", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) to (B, …)."""
        if not self.training or self.p == 0:
            return x
        seeds = self.seeds
        if seeds is None:
            draw, first = _current.get() or (int(torch.randint(2**62, ())), 0)
            position = torch.arange(first, first + len(x), device=x.device)
            seeds = example_seeds(torch.tensor(draw), self.layer, position)
        units = x[0].numel() if len(x) else 1
        number = _hash(seeds[:, None] + torch.arange(units, device=x.device))
        uniform = (number >> 11 & (2**53 - 1)).to(torch.float64) * 2.0**-53
        keep = (uniform >= self.p).reshape(x.shape).to(x.dtype)
        return x * keep / (1 - self.p)


def example_seeds(draw: Tensor, layer: int | Tensor, position: Tensor) -> Tensor:
    """The numbers from which the masks of examples follow: all int64, broadcast together."""
    return _hash(_hash(_hash(draw) + layer) + position)


def _hash(x: Tensor) -> Tensor:
    """SplitMix64: a bijection of 64-bit numbers that looks random."""
    x = x + _GOLDEN
    x = (x ^ (x >> 30 & (2**34 - 1))) * _MIX_1
    x = (x ^ (x >> 27 & (2**37 - 1))) * _MIX_2
    return x ^ (x >> 31 & (2**33 - 1))
