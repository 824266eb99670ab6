"""The order of the examples: a permutation, that looks random, any part of which can be had."""

import numpy as np
import pytest

from gdtrain.data.order import Draws, Order

LONG = [65_537, 100_003, 2**17, 2**17 + 1, 3 * 2**17 - 1, 1_000_000]


@pytest.mark.parametrize("count", [1, 2, 5, 1000, 65_536, *LONG])
def test_each_number_occurs_once(count):
    found = np.sort(Order(count, (3, 4))(0, count))
    assert np.array_equal(found, np.arange(count))


@pytest.mark.parametrize("count", [5, 65_536, 65_537, 1_000_000])
def test_any_part_is_that_of_the_whole(count):
    order = Order(count, 7)
    whole = order(0, count)
    for first, length in ((0, 1), (count // 3, 2), (count // 2, min(40_000, count // 2)), (1, 0)):
        assert np.array_equal(order(first, length), whole[first : first + length])
    assert np.array_equal(Order(count, 7)(0, count), whole)
    assert not np.array_equal(Order(count, 8)(0, count), whole) or count < 3


def test_a_short_one_is_numpys():
    expected = np.random.default_rng((3, 5)).permutation(100)
    assert np.array_equal(Order(100, (3, 5))(0, 100), expected)


def squared_excess(table):
    """(χ² − degrees of freedom) in standard deviations, of counts expected to be equal."""
    mean = table.mean()
    chi = ((table - mean) ** 2 / mean).sum()
    return (chi - table.size) / (2 * table.size) ** 0.5


@pytest.mark.parametrize("count", LONG)
def test_a_long_one_passes_for_random(count):
    positions = np.arange(count)
    first, second = (Order(count, (0, epoch))(0, count) for epoch in (0, 1))
    pairs = {
        "place and number": (positions, first),
        "a number and the next": (first[1:], first[:-1]),
        "a number and the second next": (first[2:], first[:-2]),
        "two epochs": (first, second),
        "low bits of both": ((positions % 32 + 0.5) * count / 32, (first % 32 + 0.5) * count / 32),
    }
    for name, (a, b) in pairs.items():
        counts = np.histogram2d(a, b, bins=32, range=[[0, count], [0, count]])[0]
        # The marginals of a permutation are fixed, which makes χ² a little smaller than free.
        assert abs(squared_excess(counts)) < 5, name
        assert abs(np.corrcoef(a, b)[0, 1]) * len(a) ** 0.5 < 4.5, name
    assert (first == positions).sum() < 10  # one is expected, by Poisson
    assert (np.diff(first) == 1).sum() < 10


@pytest.mark.parametrize("count", [3, 70_000, 10**9])
def test_draws_are_independent_of_where_they_are_asked_for(count):
    draws = Draws(count, (1, 2))
    whole = draws(0, 200_000)
    assert whole.min() >= 0
    assert whole.max() < count
    for first, length in ((0, 0), (65_530, 20), (131_072, 5), (199_999, 1), (10, 150_000)):
        assert np.array_equal(draws(first, length), whole[first : first + length])
    counts = np.histogram(whole, bins=min(count, 50), range=(0, count))[0]
    assert abs(squared_excess(counts)) < 6
    assert not np.array_equal(whole[:1000], whole[65_536:66_536])
