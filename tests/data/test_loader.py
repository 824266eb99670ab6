"""The index loader: which examples make which update."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdtrain.data.loader import EvaluationLoader, IndexLoader

unhurried = settings(deadline=None, max_examples=60)
SAMPLINGS = ["reshuffle", "shuffle_once", "replacement", "sequential"]


def run(loader, start=0, epochs=None, total=None):
    """Blocks from `start` on, as Lightning draws them: an iteration for each epoch."""
    position = start
    loader.start = lambda: position
    loader.total = total
    blocks = []
    while (total is None or position < total) and (
        epochs is None or position < epochs * loader.updates_per_epoch
    ):
        for block in loader:
            blocks.append(block)
            position += len(block)
    return blocks


def updates(blocks):
    """The examples of each update."""
    return [row for block in blocks for row in block.tolist()]


@st.composite
def cases(draw):
    n = draw(st.integers(1, 40))
    return {
        "num_examples": n,
        "batch_size": draw(st.integers(1, n)),
        "updates_per_sweep": draw(st.integers(1, 12)),
        "seed": draw(st.integers(0, 5)),
    }


# --------------------------------------------------------------------------- an epoch


@unhurried
@given(cases(), st.sampled_from(["reshuffle", "shuffle_once", "sequential"]))
def test_every_example_comes_exactly_once_per_epoch(case, sampling):
    loader = IndexLoader(**case, sampling=sampling)
    rows = updates(run(loader, epochs=3))
    per_epoch = loader.updates_per_epoch
    assert len(rows) == 3 * per_epoch
    for epoch in range(3):
        seen = list(itertools.chain(*rows[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert (seen if sampling == "sequential" else sorted(seen)) == list(range(len(seen)))
        assert len(seen) == case["num_examples"]


@unhurried
@given(cases(), st.sampled_from(SAMPLINGS))
def test_all_updates_have_b_examples_but_the_ragged_last_of_an_epoch(case, sampling):
    n, b = case["num_examples"], case["batch_size"]
    loader = IndexLoader(**case, sampling=sampling)
    sizes = [len(row) for row in updates(run(loader, epochs=2))]
    assert sizes == ([b] * (n // b) + ([n % b] if n % b else [])) * 2


@unhurried
@given(cases(), st.sampled_from(SAMPLINGS), st.integers(0, 60))
def test_blocks_hold_at_most_k_updates_and_end_with_their_epoch(case, sampling, start):
    loader = IndexLoader(**case, sampling=sampling)
    per_epoch, position = loader.updates_per_epoch, start
    for block in run(loader, start=start, epochs=start // per_epoch + 2):
        assert block.dtype == torch.int64
        assert 1 <= len(block) <= case["updates_per_sweep"]
        assert position // per_epoch == (position + len(block) - 1) // per_epoch
        position += len(block)
    assert position % per_epoch == 0


@unhurried
@given(cases(), st.sampled_from(SAMPLINGS), st.integers(0, 30), st.integers(0, 40))
def test_from_any_start_the_updates_go_on_as_they_would_and_end_at_the_total(
    case, sampling, start, more
):
    blocks = run(IndexLoader(**case, sampling=sampling), start=start, total=start + more)
    assert sum(map(len, blocks)) == more
    loader = IndexLoader(**case, sampling=sampling)
    whole = updates(run(loader, epochs=(start + more) // loader.updates_per_epoch + 1))
    assert updates(blocks) == whole[start : start + more]


@unhurried
@given(cases(), st.sampled_from(SAMPLINGS), st.integers(1, 12))
def test_the_updates_do_not_depend_on_how_many_share_a_sweep(case, sampling, other):
    one = updates(run(IndexLoader(**case, sampling=sampling), epochs=2))
    case = {**case, "updates_per_sweep": other}
    assert updates(run(IndexLoader(**case, sampling=sampling), epochs=2)) == one


def test_blocks_are_as_large_as_they_can_be_and_come_again_without_progress():
    loader = IndexLoader(23, 3, updates_per_sweep=4)
    assert [tuple(block.shape) for block in loader] == [(4, 3), (3, 3), (1, 2)]
    assert updates(loader) == updates(loader)
    full = IndexLoader(23, 23, updates_per_sweep=4)
    assert [tuple(block.shape) for block in full] == [(1, 23)]


def test_a_start_at_or_after_the_total_gives_nothing_and_there_is_no_length():
    for start in (5, 6, 9):
        assert run(IndexLoader(6, 2), start=start, total=5) == []
    assert list(IndexLoader(6, 2, total=0)) == []
    with pytest.raises(TypeError):  # Lightning must not fix a length
        len(IndexLoader(5, 2))


# -------------------------------------------------------------------------- the order


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return IndexLoader(100, 7, seed=seed).order(epoch).tolist()

    assert order(3, 5) == order(3, 5)
    assert order(3, 5) != order(3, 6)
    assert order(3, 5) != order(4, 5)


def test_the_order_neither_uses_nor_moves_torchs_generator():
    loader = IndexLoader(50, 5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = loader.order(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(loader.order(0), first)


def test_reshuffle_changes_with_the_epoch_and_shuffle_once_does_not():
    again = IndexLoader(50, 5, sampling="reshuffle")
    assert not torch.equal(again.order(0), again.order(1))
    once = IndexLoader(50, 5, sampling="shuffle_once")
    assert torch.equal(once.order(0), once.order(7))
    assert not torch.equal(once.order(0), torch.arange(50))
    assert torch.equal(once.order(0), again.order(0))


# -------------------------------------------------------------------------- evaluation


@unhurried
@given(st.integers(1, 50), st.integers(1, 60))
def test_the_evaluation_loader_gives_all_examples_in_order(n, size):
    x, y = torch.arange(n * 2).reshape(n, 2), torch.arange(n)
    loader = EvaluationLoader(x, y, batch_size=size)
    for _ in range(2):
        parts = list(loader)
        assert len(parts) == len(loader)
        assert all(len(a) == len(b) <= size for a, b in parts)
        assert parts[0][0].data_ptr() == x.data_ptr()  # nothing is copied
        assert torch.equal(torch.cat([a for a, _ in parts]), x)
        assert torch.equal(torch.cat([b for _, b in parts]), y)
