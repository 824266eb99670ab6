"""Torch's mode sees every operation of a block, and may end it."""

import pytest
import torch

from gdtrain._compat.torch_dispatch import TorchDispatchMode


def test_the_mode_is_called_before_each_operation():
    class NoOnes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "ones" in str(func):
                raise ValueError(str(func))
            return func(*args, **(kwargs or {}))

    with NoOnes():
        torch.zeros(2)
        with pytest.raises(ValueError, match="ones"):
            torch.ones(2)
    torch.ones(2)
