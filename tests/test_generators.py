"""All generators together: read, restored, and through a checkpoint."""

import random

import numpy as np
import pytest
import torch

from gdtrain.generators import RandomStates, same_after, seed_all


def draw():
    return torch.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.randn()  # noqa: NPY002


@pytest.mark.parametrize(
    "one", [lambda: torch.rand(1), random.random, np.random.rand, lambda: random.gauss(0, 1)]
)
def test_a_draw_from_any_of_them_is_seen(one):
    with same_after() as before:
        one()
        assert RandomStates.now() != before
    assert RandomStates.now() == before


def test_a_checkpoint_holds_them(tmp_path):
    np.random.randn()  # noqa: NPY002 of two that are made together: one is kept
    states = RandomStates.now()
    torch.save(states.state_dict(), tmp_path / "states.pt")
    first = draw()
    saved = torch.load(tmp_path / "states.pt", weights_only=True)
    RandomStates.from_state_dict(saved).restore()
    assert draw() == first


def test_an_error_does_not_keep_them_from_going_back():
    before = RandomStates.now()

    def fails():
        with same_after():
            draw()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fails()
    assert RandomStates.now() == before


def test_seeds_of_any_size():
    with same_after():
        seed_all(-3)
        seed_all(2**70 + 1)
        one = draw()
        seed_all(2**70 + 1)
        assert draw() == one
