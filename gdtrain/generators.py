"""The generators that a user's layers may draw from: PyTorch's, Python's and NumPy's."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomStates", "same_after", "seed_all"]


@dataclass(frozen=True, eq=False)
class RandomStates:
    """The states of all generators at one moment; `now` reads them, `restore` goes back to them.

    `cuda` has those of PyTorch's generators on GPUs, by the device's index.
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]

    @classmethod
    def now(cls, devices: Iterable[torch.device] | None = None) -> RandomStates:
        """The states as they are; `devices`, where a model draws, spares the other GPUs."""
        if devices is None:
            indices = set(range(torch.cuda.device_count() if torch.cuda.is_available() else 0))
        else:
            gpus = [device for device in devices if device.type == "cuda"]
            indices = {torch.cuda.current_device() if d.index is None else d.index for d in gpus}
        cuda = {index: torch.cuda.get_rng_state(index) for index in sorted(indices)}
        numpy = np.random.get_state()  # noqa: NPY002 (user code may draw from it)
        return cls(torch.get_rng_state(), cuda, random.getstate(), tuple(numpy))

    def restore(self) -> None:
        """Go back to these states."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            if index < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, index)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002

    def __eq__(self, other: object) -> bool:
        """Whether the same numbers would be drawn."""
        if not isinstance(other, RandomStates):
            return NotImplemented
        return (
            torch.equal(self.cpu, other.cpu)
            and self.cuda.keys() == other.cuda.keys()
            and all(torch.equal(state, other.cuda[index]) for index, state in self.cuda.items())
            and self.python == other.python
            and np.array_equal(self.numpy[1], other.numpy[1])
            and self.numpy[2:] == other.numpy[2:]
        )

    __hash__ = None  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint."""
        version, numbers, gauss = self.python
        name, keys, *rest = self.numpy
        return {
            "torch": self.cpu,
            "cuda": list(self.cuda.values()),
            "python": [version, list(numbers), gauss],
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RandomStates:
        """The inverse of `state_dict`, of all devices."""
        version, numbers, gauss = state["python"]
        name, keys, *rest = state["numpy"]
        return cls(
            state["torch"].cpu(),
            {index: cuda.cpu() for index, cuda in enumerate(state["cuda"])},
            (version, tuple(numbers), gauss),
            (name, keys.cpu().numpy().astype(np.uint32), *rest),
        )


@contextmanager
def same_after(devices: Iterable[torch.device] | None = None) -> Iterator[RandomStates]:
    """After it, the generators are in the states that they were in before, which it yields.

    `devices` are as for `RandomStates.now`.
    """
    before = RandomStates.now(devices)
    try:
        yield before
    finally:
        before.restore()


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed PyTorch's generator on CPU, that of the device if it is a GPU, Python's and NumPy's."""
    torch.default_generator.manual_seed(seed % 2**63)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed % 2**63)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
