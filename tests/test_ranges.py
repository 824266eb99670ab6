"""Ranges: what belongs to one, and what the message says."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from gdtrain.ranges import Interval, Whole


@pytest.mark.parametrize(
    ("closed", "ends"),
    [("neither", (False, False)), ("left", (True, False)), ("right", (False, True)),
     ("both", (True, True))],
)  # fmt: skip
def test_ends_belong_to_an_interval_where_it_is_closed(closed, ends):
    interval = Interval(0, 1, closed)
    assert (0.0 in interval, 1.0 in interval) == ends
    assert 0.5 in interval
    assert -1e-300 not in interval


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, 1j, [1.0],
                                   np.bool_(True), torch.tensor(True), b"1", 10**400])  # fmt: skip
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match=r"^lr must be a number in \(−∞, ∞\)\. Received: lr="):
        Interval(-math.inf, math.inf, "both").check("lr", value)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), torch.tensor(1.0),
                                   Fraction(1)])  # fmt: skip
def test_numbers_of_any_library_are_taken(value):
    got = Interval(0, math.inf).check("lr", value)
    assert (got, type(got)) == (1.0, float)


@pytest.mark.parametrize("value", [0, True, 1.0, "2", None, math.nan, np.bool_(True), [1]])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match=r"^n must be a whole number of at least 1\. Received: n="):
        Whole(1).check("n", value)


@pytest.mark.parametrize("value", [2, np.int8(2), torch.tensor(2)])
def test_whole_numbers_of_any_library_are_taken(value):
    got = Whole(1, 2).check("n", value)
    assert (got, type(got)) == (2, int)
    with pytest.raises(ValueError, match=r"a whole number from 1 to 2\. Received: n=3"):
        Whole(1, 2).check("n", 3)
