"""The order of the examples in an epoch, of which any part can be had without the rest.

N examples. Up to 65,536 it is a uniform permutation. A longer one would be a table that outgrows
the processor's caches, and takes more time for each example the more there are. Then a Feistel
network takes its place: a permutation that is computed. A number is written as b·l + r, with b a
power of two near √N, 0 ≤ l < a = ⌈N/b⌉ and 0 ≤ r < b, and the two parts hide each other in turn,

    l ← (l + F_1(r)) mod a,  r ← r ⊕ F_2(l),  l ← (l + F_3(r)) mod a,  …

with functions F that mix bits by multiplication. It is a permutation of 0 … ab−1 whatever F is, for
each step can be undone. The few results from N on are fed in again until they are below N ("cycle
walking"), which makes it a permutation of 0 … N−1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Draws", "Order"]

_TABLE = 2**16  # examples
_CHUNK = 2**14  # numbers that are mixed together, in the nearest cache
_ROUNDS = 6


class Order:
    """A random permutation of 0 … N−1, 1 ≤ N ≤ 2^60, equal for equal seeds.

    Luby and Rackoff, How to construct pseudorandom permutations from pseudorandom functions, SIAM
    Journal on Computing, 1988; Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA
    2002 (cycle walking).
    """

    def __init__(self, count: int, seed: int | tuple[int, ...]) -> None:
        self.count = count
        generator = np.random.default_rng(seed)
        self._table: NDArray[np.int64] | None = None
        if count <= _TABLE:
            self._table = generator.permutation(count)
            return
        self._bits = (count - 1).bit_length() // 2
        self._parts = np.uint32(-(-count // 2**self._bits))  # a
        self._mask = np.uint32(2**self._bits - 1)  # b − 1
        self._keys = generator.integers(2**32, size=_ROUNDS, dtype=np.uint32)

    def __call__(self, first: int, count: int) -> NDArray[np.int64]:
        """The numbers at positions first … first + count − 1, all of them below N."""
        if self._table is not None:
            return self._table[first : first + count]
        made = np.arange(first, first + count)
        for start in range(0, count, _CHUNK):
            part = made[start : start + _CHUNK]
            part[:] = self._mixed(part)
            outside = np.flatnonzero(part >= self.count)
            while len(outside):
                part[outside] = self._mixed(part[outside])
                outside = outside[part[outside] >= self.count]
        return made

    def _mixed(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        left = (numbers >> self._bits).astype(np.uint32)
        right = numbers.astype(np.uint32) & self._mask
        for i, key in enumerate(self._keys):
            hidden = (right if i % 2 == 0 else left) + key
            hidden *= np.uint32(0x7FEB352D)
            hidden ^= hidden >> np.uint32(15)
            hidden *= np.uint32(0x846CA68B)
            if i % 2 == 0:  # the high bits, scaled to 0 … a−1
                left += (hidden.astype(np.uint64) * self._parts >> np.uint64(32)).astype(np.uint32)
                np.minimum(left, left - self._parts, out=left)  # the one that did not wrap around
            else:
                right ^= hidden >> np.uint32(32 - self._bits)
        return (left.astype(np.int64) << self._bits) | right


class Draws:
    """Independent draws from 0 … N−1, equal for equal seeds; any part can be had without the rest.

    Each block of 65,536 has a generator of its own.
    """

    def __init__(self, count: int, seed: tuple[int, ...]) -> None:
        self.count, self.seed = count, seed
        self._kept: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __call__(self, first: int, count: int) -> NDArray[np.int64]:
        """The draws at positions first … first + count − 1, of which there is no end."""
        blocks = [self._block(b) for b in range(first // _TABLE, -(-(first + count) // _TABLE))]
        start = first % _TABLE
        return np.concatenate([*blocks, np.empty(0, np.int64)])[start : start + count]

    def _block(self, number: int) -> NDArray[np.int64]:
        if self._kept[0] != number:
            seed = self.seed if number == 0 else (*self.seed, number)
            made = np.random.default_rng(seed).integers(0, self.count, _TABLE)
            self._kept = number, made
        return self._kept[1]
