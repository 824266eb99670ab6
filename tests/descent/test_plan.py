"""Which examples make which update, and where sweeps end, worked by hand."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from gdtrain.descent.plan import Every, Plan
from gdtrain.descent.work import Places


def sweeps(plan, start=0):
    """First and last update of each sweep, as [first, end)."""
    found = []
    while start < plan.total:
        count = len(plan.sweep(start))
        found.append((start, start + count))
        start += count
    return found


def test_the_examples_of_each_update_by_hand():
    plan = Plan(5, 2, sampling="sequential", total=7, updates_per_sweep=4)
    assert plan.updates_per_epoch == 3
    assert plan.block(0, 9).tolist() == [[0, 1], [2, 3]]  # the ragged batch comes alone
    assert plan.block(2, 9).tolist() == [[4]]
    assert plan.block(3, 1).tolist() == [[0, 1]]
    assert sweeps(plan) == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]


def test_sweeps_go_on_over_the_end_of_an_epoch():
    plan = Plan(4, 2, sampling="sequential", total=7, updates_per_sweep=3)
    assert plan.sweep(0).tolist() == [[0, 1], [2, 3], [0, 1]]
    assert sweeps(plan) == [(0, 3), (3, 6), (6, 7)]
    assert plan.sweep(0, before=2).tolist() == [[0, 1], [2, 3]]


def test_a_full_batch_is_read_as_stored():
    plan = Plan(4, 4, total=5, updates_per_sweep=3)
    assert plan.sweep(0).tolist() == 3 * [[0, 1, 2, 3]]


def test_the_next_update_that_somebody_must_see():
    every = Every(100)
    assert [every.next_update(t) for t in (0, 99, 100, 250)] == [100, 100, 200, 300]
    assert [Every(10, 9).next_update(t) for t in (0, 8, 9, 19)] == [9, 9, 19, 29]
    plan = Plan(10, 1, watchers=[Every(7), Every(5)])
    assert [plan.next_update(t) for t in range(11)] == [5, 5, 5, 5, 5, 7, 7, 10, 10, 10, 14]
    assert Plan(10, 1).next_update(3) is None


@pytest.mark.parametrize("length", [1, 7, 64, 4096, "auto"])
@pytest.mark.parametrize(("n", "batch_size"), [(150, 1), (150, 8), (150, 150), (64, 8)])
def test_every_100_updates_is_exactly_that(n, batch_size, length):
    plan = Plan(n, batch_size, total=1000, updates_per_sweep=length, watchers=[Every(100)])
    assert set(range(100, 1001, 100)) <= {end for _, end in sweeps(plan)}
    longest = plan.updates_per_sweep
    if batch_size != 8 or n % 8 == 0:  # no ragged batches
        whole = -(-100 // longest)  # and no more cuts than there must be
        assert len(sweeps(plan)) == 10 * whole


def test_no_example_depends_on_the_cuts():
    def rows(**options):
        plan = Plan(23, 3, seed=5, total=60, **options)
        return list(itertools.chain(*(plan.sweep(first).tolist() for first, _ in sweeps(plan))))

    whole = rows(updates_per_sweep=4096)
    assert rows(updates_per_sweep=1) == rows(updates_per_sweep=7) == whole
    assert rows(watchers=[Every(4), Every(9, 2)]) == whole


def test_a_watcher_may_have_seen_enough_but_names_no_update_that_is_over():
    once = SimpleNamespace(next_update=lambda update: 5 if update < 5 else None)
    plan = Plan(4, 1, total=20, updates_per_sweep=100, watchers=[once])
    assert sweeps(plan) == [(0, 5), (5, 20)]
    plan.watchers = [SimpleNamespace(next_update=lambda update: update)]
    with pytest.raises(ValueError, match=r"next_update\(3\) must be above 3, or None.*: 3"):
        plan.sweep(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6}, r"batch_size must lie in \[1, 5\].*Received: batch_size=6"),
        ({"batch_size": 2, "seed": -1}, "seed must be a whole number of at least 0.*seed=-1"),
        ({"batch_size": 2, "updates_per_sweep": True}, "updates_per_sweep must be a whole number"),
        ({"batch_size": 2, "sampling": "random"}, "sampling must be one of reshuffle"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plan(5, **arguments)


def test_where_there_are_looks():
    places = Places(total=10, count=4)
    assert [update for update in range(11) if update in places] == [0, 2, 5, 7, 10]
    assert places.next(10) is None
    endless = Places(total=None, count=3, every=2)  # three in each doubling
    wanted = [0, 2, 4, 6, 8, 10, 12, 16, 20, 24]
    assert [update for update in range(28) if update in endless] == wanted


def test_replacement_draws_any_example_again():
    plan = Plan(50, 5, sampling="replacement", total=10)
    assert len(torch.unique(plan.order(0))) < 50
