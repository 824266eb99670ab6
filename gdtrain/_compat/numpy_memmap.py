"""NumPy's `_mmap`: the map of the file that a memory-mapped array reads."""

from __future__ import annotations

import mmap
from typing import Any

__all__ = ["file_map"]


def file_map(array: Any) -> mmap.mmap | None:
    """The map of the file under an array, or under the array that it is a view of."""
    while array is not None and getattr(array, "_mmap", None) is None:
        array = getattr(array, "base", None)
    return None if array is None else array._mmap
