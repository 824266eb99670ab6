"""The monitor of divergence on written losses: no model, no training."""

import json
import math
from unittest import mock

import numpy as np
import pytest

from gdtrain.descent.monitors import (
    Cause,
    Failure,
    Health,
    LossMonitor,
    Verdict,
    next_station,
    stretch_length,
)


def monitor(start=1.0, growth=10.0, **units):
    made = LossMonitor(growth=growth)
    made.begin(0, Health(start, **units))
    return made


def failed(watch, losses, first=0, **options):
    return watch.read(first, np.asarray(losses, dtype=np.float64), **options).failure


def test_growth_by_hand():
    # J₀ = 1, bound 10, each loss counts up to 40. Windows of 16:
    #   1 … 1                 mean 1
    #   12 ones, 4 times 37   (12 + 148)/16 = 10, not above
    #   12 ones, 4 times 38   (12 + 152)/16 = 10.25, above: after update 47
    losses = [1.0] * 16 + [1.0] * 12 + [37.0] * 4 + [1.0] * 12 + [38.0] * 4
    assert failed(monitor(), losses) == Failure(47, Cause.GROWTH)
    # One loss alone counts 40 at most: (15 + 40)/16 < 10.
    assert failed(monitor(), [1.0] * 15 + [1e30], units=lambda: Health(1.0)) is None


@pytest.mark.parametrize("lengths", [(48,), (16, 32), (5, 11, 20, 12), (1,) * 48])
def test_what_is_found_does_not_depend_on_the_cuts(lengths):
    losses, watch, first = np.array([1.0] * 40 + [1e3] * 8), monitor(), 0
    for length in lengths:
        found = failed(watch, losses[first : first + length], first)
        first += length
    assert found == Failure(47, Cause.GROWTH)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_loss_that_is_not_finite(value):
    assert failed(monitor(), [1.0, 1.0, value, 1.0, math.nan], first=7) == Failure(9)
    # Growth before it comes first.
    assert failed(monitor(), [100.0] * 16 + [value]) == Failure(15, Cause.GROWTH)
    assert failed(monitor(), [1.0] * 4, finite=False) == Failure(4)  # of the parameters


def test_states_are_compared_by_the_mean_of_a_stretch():
    watch, found = monitor(), []
    for losses in ([0.5] * 4, [0.6] * 4, [0.1, 0.7, 0.1, 0.7], [0.1]):  # the last is not over
        watch.stretch = (0.0, 0)
        found.append(watch.read(0, np.array(losses), stretch=4).lowest)
    assert found == [True, False, True, False]
    assert watch.good_mean == pytest.approx(0.4)


def test_without_a_probe_the_first_stretch_is_the_start():
    watch = LossMonitor(growth=10.0)
    assert failed(watch, [2.0] * 64) is None
    assert watch.start == 2.0
    assert failed(watch, [30.0] * 16, first=64) == Failure(79, Cause.GROWTH)


def test_a_start_is_at_least_a_tenth_of_the_loss_of_predicting_zero():
    assert monitor(start=1e-9, value_of_zero=0.5).start == 0.05


def test_looks_are_at_16_32_64_updates():
    units, watch = mock.Mock(return_value=Health(1.0)), monitor()
    for first in range(0, 128, 8):
        failed(watch, [1.0] * 8, first, units=units)
    assert [age for age, _ in watch.looks] == [16, 32, 64, 128]
    assert units.call_count == 4
    # Of units that cannot die nothing is asked, unless the loss is above the start's.
    failed(monitor(), [1.0] * 16, units=units, rectifies=False)
    assert units.call_count == 4
    failed(monitor(), [1.3] * 16, units=units, rectifies=False)
    assert units.call_count == 5


@pytest.mark.parametrize(
    ("units", "cause"),
    [
        (Health(1.0, dead={"1": 0.95}), Cause.DEAD),
        (Health(1.0, dead={"1": 0.85}), None),
        (Health(0.3, dead={"1": 0.95}), None),  # and falls
        (Health(0.3, dead={"1": 1.0}, constant=True), Cause.DEAD),
        (Health(3.0, saturated={"1": 0.97}), Cause.SATURATED),
        (Health(1.5, saturated={"1": 0.97}), None),
        (Health(11.0), Cause.GROWTH),
        (Health(3.0), None),
    ],
)
def test_a_look_at_the_units(units, cause):
    found = failed(monitor(), [1.3] * 16, total=10_000, units=lambda: units)
    # At a fall as 1/t the saturated net would end at 3 · 16/10000 of the start's: not too high.
    slow = failed(monitor(), [1.3] * 16, total=100, units=lambda: units)
    expected = None if cause is None else Failure(15, cause, units)
    assert slow == expected
    assert found == (None if cause is Cause.SATURATED else expected)
    before = monitor(dead=units.dead)  # is no failure where it was so at the start
    assert cause is not Cause.DEAD or failed(before, [1.3] * 16, units=lambda: units) is None


def test_a_loss_that_stays_above_the_start():
    watch, found = monitor(), []
    for first, count in ((0, 16), (16, 16), (32, 32)):
        units = Health(1.6)
        found.append(failed(watch, [1.6] * count, first, total=400, units=lambda u=units: u))
    assert found == [None, None, Failure(63, Cause.ABOVE_START, Health(1.6))]


@pytest.mark.parametrize(("value", "cause"), [(1.4, None), (1.6, Cause.ABOVE_START)])
def test_the_end(value, cause):
    found = failed(monitor(), [1.0] * 5, total=5, units=lambda: Health(value))
    assert (found and found.cause) == cause
    assert failed(monitor(), [1.0] * 5, total=6, units=lambda: Health(value)) is None


def test_after_a_recovery_ages_count_anew():
    watch = monitor()
    watch.read(0, np.full(24, 0.5), stretch=16)
    watch.begin_again(24)
    assert (watch.origin, watch.start, watch.good_mean, watch.looks) == (24, 1.0, 0.5, [])
    assert failed(watch, [100.0] * 16, first=24) == Failure(39, Cause.GROWTH)


def test_its_state_is_plain_and_goes_on():
    losses = np.random.default_rng(0).uniform(size=100)
    whole, part = monitor(), monitor()
    whole.read(0, losses[:37])
    part.read(0, losses[:37])
    state = json.loads(json.dumps(part.state_dict()))
    rest = LossMonitor(growth=10.0)
    rest.load_state_dict(state)
    for watch in (whole, rest):
        assert watch.read(37, losses[37:]) == Verdict(lowest=True)
    assert json.dumps(rest.state_dict()) == json.dumps(whole.state_dict())


def test_stations():
    stations, update = [], 0
    while update < 4096:
        stations.append(update := next_station(update, 2**16, 4096))
    # Powers of two from 16, then multiples of 4096/16.
    assert stations[:7] == [16, 32, 64, 128, 256, 512, 768]
    assert stations[-2:] == [3840, 4096]
    assert next_station(0, 3, None) == 2  # a power of two, not above the bound
    assert next_station(10**9, 10**9, None) == 10**9 - 10**9 % 2**16 + 2**16
    assert [stretch_length(size) for size in (1, 3, 4, 1000, None)] == [256, 128, 64, 64, 64]
