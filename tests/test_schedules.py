"""Schedules as written lists, and as torch schedulers."""

import math

import pytest
import torch
from optimizers import through_a_file

from gdtrain import SGD
from gdtrain.schedules import (
    Constant,
    Cosine,
    Exponential,
    InverseSquareRoot,
    InverseTime,
    OneCycle,
    Polynomial,
    ReduceOnPlateau,
    Schedule,
    Step,
    WarmupStableDecay,
)

HALF = math.sqrt(0.5)

ALL = [
    Constant(),
    Constant(warmup=3),
    Step(every=3, gamma=0.5),
    Step(),
    Exponential(final=0.01),
    Polynomial(),
    Polynomial(power=2, final=0.1, warmup=0.25),
    Cosine(),
    Cosine(final=0.1, warmup=2),
    OneCycle(),
    InverseTime(k=0.5),
    InverseSquareRoot(k=0.5, warmup=2),
    WarmupStableDecay(),
    WarmupStableDecay(warmup=0.2, decay=0.5, final=0.1),
    ReduceOnPlateau(warmup=2),
    Cosine(per="epoch", warmup=1),
    Polynomial(per="epoch"),
]


def rates(schedule, total, updates_per_epoch=1):
    return schedule(torch.arange(total), total, updates_per_epoch).tolist()


def optimizer(*lrs):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs]
    return SGD(groups)


# ------------------------------------------------------------------- written lists


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (Constant(), [1, 1, 1, 1]),
        (Constant(warmup=2), [0.5, 1, 1, 1]),
        (Constant(warmup=1), [1, 1, 1, 1]),
        (Constant(warmup=0.5), [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        (Step(every=2, gamma=0.5), [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8]),
        (Step(), [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8]),
        (Step(every=0.5, gamma=0.1), [1, 1, 1, 0.1, 0.1, 0.1]),
        (Step(every=1, gamma=0.5, warmup=2), [1 / 2, 1, 1, 1 / 2, 1 / 4]),
        (Exponential(final=1 / 16), [1, 1 / 2, 1 / 4, 1 / 8]),
        (Exponential(final=1 / 16, warmup=2), [1 / 2, 1, 1, 1 / 2, 1 / 4, 1 / 8]),
        (Polynomial(), [1, 3 / 4, 1 / 2, 1 / 4]),
        (Polynomial(warmup=2), [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]),
        (Polynomial(power=2), [1, 9 / 16, 1 / 4, 1 / 16]),
        (Polynomial(power=0.5), [1, math.sqrt(3) / 2, HALF, 1 / 2]),
        (Polynomial(final=0.2), [1, 0.8, 0.6, 0.4]),
        (Cosine(), [1, (1 + HALF) / 2, 1 / 2, (1 - HALF) / 2]),
        (Cosine(final=0.5), [1, (3 + HALF) / 4, 3 / 4, (3 - HALF) / 4]),
        (Cosine(warmup=1), [1, 1, 3 / 4, 1 / 4]),
        (OneCycle(rise=2, start=0.2, final=0), [0.2, 0.6, 1, 0.5]),
        (OneCycle(rise=0.5, start=0, final=0.2), [0, 1 / 2, 1, 0.6]),
        (OneCycle(rise=0, final=0), [1, (1 + HALF) / 2, 1 / 2, (1 - HALF) / 2]),
        (InverseTime(k=1), [1, 1 / 2, 1 / 3, 1 / 4]),
        (InverseTime(k=0.5, warmup=2), [1 / 2, 1, 1, 2 / 3, 1 / 2]),
        (InverseSquareRoot(k=3), [1, 1 / 2, 1 / math.sqrt(7), 1 / math.sqrt(10)]),
        (InverseSquareRoot(k=0.5, warmup=2), [1 / 2, 1, 1, math.sqrt(2 / 3), HALF]),
        (WarmupStableDecay(warmup=2, decay=2), [1 / 2, 1, 1, 1, 1, 1 / 2]),
        (WarmupStableDecay(warmup=0, decay=0.5, final=0.2), [1, 1, 1, 0.6]),
        (WarmupStableDecay(warmup=0, decay=0), [1, 1, 1]),
        (ReduceOnPlateau(warmup=2), [1 / 2, 1, 1, 1]),
    ],
    ids=repr,
)
def test_factors_are_the_written_numbers(schedule, wanted):
    assert rates(schedule, len(wanted)) == pytest.approx(wanted, abs=1e-15)


def test_a_fraction_means_the_count_that_it_rounds_to():
    total = 10
    for fraction, count in ((0.2, 2), (0.5, 5), (0.99, 10)):
        assert rates(Constant(warmup=fraction), total) == rates(Constant(warmup=count), total)
        assert rates(Step(every=fraction), total) == rates(Step(every=count), total)
        assert rates(OneCycle(rise=fraction), total) == rates(OneCycle(rise=count), total)
        by_share = WarmupStableDecay(warmup=0, decay=fraction)
        by_count = WarmupStableDecay(warmup=0, decay=count)
        assert rates(by_share, total) == rates(by_count, total)


@pytest.mark.parametrize("tiny", [Step(every=0.01), OneCycle(rise=0.01)], ids=repr)
def test_a_fraction_that_rounds_to_no_update_stays_finite(tiny):
    assert all(0 <= factor <= 1 for factor in rates(tiny, 5))


def test_a_warm_up_longer_than_the_run_only_rises():
    assert rates(Cosine(warmup=10), 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (Step(every=1, gamma=0.5, per="epoch"), [1, 1, 1, 1 / 2, 1 / 2, 1 / 2, 1 / 4]),
        (Polynomial(per="epoch"), [1, 1, 1, 2 / 3, 2 / 3, 2 / 3, 1 / 3]),
        (Constant(warmup=2, per="epoch"), [1 / 2, 1 / 2, 1 / 2, 1, 1, 1, 1]),
        (Cosine(warmup=1, per="epoch"), [1, 1, 1, 1, 1, 1, 1 / 2]),
    ],
    ids=repr,
)
def test_per_epoch_counts_started_epochs_of_three_updates(schedule, wanted):
    assert rates(schedule, 7, updates_per_epoch=3) == pytest.approx(wanted, abs=1e-15)


def test_per_update_takes_no_notice_of_epochs():
    assert rates(Cosine(), 12, updates_per_epoch=5) == rates(Cosine(), 12)


# ------------------------------------------------------------------------- vectors


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_a_vector_of_updates_gives_the_same_as_one_at_a_time(schedule):
    together = schedule(torch.arange(12), 12, 4)
    assert together.dtype == torch.float64
    assert together.tolist() == [schedule(t, 12, 4).item() for t in range(12)]
    assert schedule(range(12), 12, 4).tolist() == together.tolist()
    assert schedule(list(range(12)), 12, 4).tolist() == together.tolist()
    square = schedule(torch.arange(12).reshape(3, 4), 12, 4)
    assert square.tolist() == together.reshape(3, 4).tolist()
    assert schedule(3, 12, 4).shape == ()


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_factors_lie_between_zero_and_one_in_the_run_and_after_its_end(schedule, total):
    factors = schedule(torch.arange(3 * total), total, 3)
    assert ((factors >= 0) & (factors <= 1)).all()
    assert factors[:total].max() > 0


def test_long_runs_keep_their_precision():
    total = 10**9
    assert Polynomial()(total - 1, total).item() == pytest.approx(1e-9, rel=1e-6)


# -------------------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(warmup=-1), r"warmup must lie in \[0, inf\)\. Received: warmup=-1"),
        (lambda: Constant(warmup=1.5), "warmup must be a whole number of updates, or a fraction"),
        (lambda: Constant(warmup=math.nan), "Received: warmup=nan"),
        (lambda: Constant(warmup=math.inf), "Received: warmup=inf"),
        (lambda: Constant(warmup="2"), "Received: warmup='2'"),
        (lambda: Constant(warmup=True), "Received: warmup=True"),
        (lambda: Constant(per="step"), "per must be 'update' or 'epoch'. Received: per='step'"),
        (lambda: Step(every=0), r"every must lie in \(0, inf\)"),
        (lambda: Step(every=2.5), "every must be a whole number"),
        (lambda: Step(gamma=0), r"gamma must lie in \(0, 1\]"),
        (lambda: Step(gamma=1.1), r"gamma must lie in \(0, 1\]"),
        (lambda: Exponential(final=0), r"final must lie in \(0, 1\]"),
        (lambda: Polynomial(power=0), r"power must lie in \(0, inf\)"),
        (lambda: Polynomial(final=-0.1), r"final must lie in \[0, 1\]"),
        (lambda: Cosine(final=2), r"final must lie in \[0, 1\]"),
        (lambda: OneCycle(rise=-1), r"rise must lie in \[0, inf\)"),
        (lambda: OneCycle(start=1.5), r"start must lie in \[0, 1\]"),
        (lambda: OneCycle(warmup=3), "set rise instead of warmup. Received: warmup=3"),
        (lambda: InverseTime(k=-1), r"k must lie in \[0, inf\)"),
        (lambda: InverseSquareRoot(k=math.nan), "Received: k=nan"),
        (lambda: WarmupStableDecay(decay=-0.1), r"decay must lie in \[0, inf\)"),
        (lambda: WarmupStableDecay(final=math.nan), r"final must lie in \[0, 1\]"),
        (lambda: ReduceOnPlateau(gamma=1), r"gamma must lie in \(0, 1\)"),
        (lambda: ReduceOnPlateau(patience=-1), r"patience must lie in \[0, inf\)"),
        (lambda: ReduceOnPlateau(threshold=1), r"threshold must lie in \[0, 1\)"),
        (lambda: ReduceOnPlateau(floor=2), r"floor must lie in \[0, 1\]"),
    ],
)
def test_an_argument_out_of_range_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_ends_of_closed_ranges_are_allowed():
    assert rates(Step(gamma=1), 4) == [1] * 4
    assert rates(Exponential(final=1), 4) == [1] * 4
    assert rates(Polynomial(final=1), 4) == [1] * 4
    assert rates(InverseTime(k=0), 4) == [1] * 4


def test_a_schedule_of_ones_own_needs_shape():
    with pytest.raises(ValueError, match=r"must define shape\(t, total\)"):
        Schedule()


# ------------------------------------------------------------------ torch schedulers

TORCH = [s for s in ALL if not isinstance(s, ReduceOnPlateau)]


@pytest.mark.parametrize("schedule", TORCH, ids=repr)
def test_the_torch_scheduler_sets_the_same_rate_in_each_group(schedule):
    total = 12
    opt = optimizer(0.4, 0.02)
    scheduler = schedule.scheduler(opt, total, updates_per_epoch=4)
    got = []
    for _ in range(total):
        got.append([group["lr"] for group in opt.param_groups])
        assert scheduler.get_last_lr() == got[-1]
        opt.step()
        scheduler.step()
    factors = rates(schedule, total, 4)
    assert got == [[0.4 * f, 0.02 * f] for f in factors]
    for _ in range(total):  # after the end
        opt.step()
        scheduler.step()
        assert 0 <= opt.param_groups[0]["lr"] <= 0.4


def plain(value):
    if isinstance(value, list | tuple):
        return all(plain(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)


@pytest.mark.parametrize("schedule", TORCH, ids=repr)
def test_a_saved_scheduler_goes_on_exactly(schedule):
    def advance(opt, scheduler, count):
        got = []
        for _ in range(count):
            got.append(opt.param_groups[0]["lr"])
            opt.step()
            scheduler.step()
        return got

    opt = optimizer(0.3)
    scheduler = schedule.scheduler(opt, 12, 4)
    advance(opt, scheduler, 5)
    saved = through_a_file({"opt": opt.state_dict(), "scheduler": scheduler.state_dict()})
    rest = advance(opt, scheduler, 7)
    assert plain(saved["scheduler"])
    other = optimizer(0.3)
    resumed = schedule.scheduler(other, 12, 4)
    other.load_state_dict(saved["opt"])
    resumed.load_state_dict(saved["scheduler"])
    assert advance(other, resumed, 7) == rest


# -------------------------------------------------------------------------- plateau


@pytest.mark.parametrize(
    ("options", "losses", "factors"),
    [
        (
            {"gamma": 0.5, "patience": 2, "threshold": 0},
            [3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.5, 1.5, 1.5, 1.5],
            [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25],
        ),
        ({"threshold": 0.1}, [10.0, 9.5, 8.9, 8.1], [1, 0.5, 0.5, 0.25]),
        ({"threshold": 0.1}, [-1.0, -1.2, -1.5, -1.6], [1, 1, 1, 0.5]),
        ({"gamma": 0.1, "floor": 0.05}, [1.0] * 4, [1, 0.1, 0.05, 0.05]),
    ],
    ids=["patience", "relative threshold", "below zero", "floor"],
)
def test_plateau_multiplies_by_gamma_where_the_loss_does_not_fall(options, losses, factors):
    schedule, seen = ReduceOnPlateau(**{"gamma": 0.5, "patience": 0, **options}), []
    for loss in losses:
        schedule.observe(loss)
        seen.append(schedule(0, 1).item())
    assert seen == factors


def test_plateau_recovers_from_a_loss_that_was_no_number():
    schedule = ReduceOnPlateau(gamma=0.5, patience=0)
    schedule.observe(math.nan)
    assert not math.isnan(schedule.best)
    for loss in (3.0, 2.0, 1.0):
        schedule.observe(loss)
    assert schedule.best == 1.0
    assert schedule.bad_looks == 0


def test_a_saved_plateau_goes_on_exactly():
    schedule = ReduceOnPlateau(gamma=0.5, patience=1)
    for loss in (3.0, 3.0, 3.0, 2.0, 2.0):
        schedule.observe(loss)
    state = through_a_file(schedule.state_dict())
    assert state == {"factor": 0.5, "best": 2.0, "bad_looks": 1}
    other = ReduceOnPlateau(gamma=0.5, patience=1)
    other.load_state_dict(state)
    for one in (schedule, other):
        one.observe(2.0)
    assert schedule == other
    assert other.factor == 0.25


def test_plateau_and_its_torch_scheduler_agree():
    schedule = ReduceOnPlateau(gamma=0.5, patience=1, threshold=0.01, floor=0.2)
    opt = optimizer(0.4, 0.02)
    scheduler = schedule.scheduler(opt, total=0)
    for loss in (3.0, 2.0, 1.99, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5):
        schedule.observe(loss)
        scheduler.step(loss)
        wanted = [0.4 * schedule.factor, 0.02 * schedule.factor]
        assert [g["lr"] for g in opt.param_groups] == pytest.approx(wanted)
    assert schedule.factor == 0.2


def test_plateau_with_warm_up_has_no_torch_scheduler():
    with pytest.raises(ValueError, match="no warm-up: use warmup=0"):
        ReduceOnPlateau(warmup=2).scheduler(optimizer(0.1), total=10)
