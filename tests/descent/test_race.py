"""The race that finds η where an update sees only some of the examples."""

import copy
import logging
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import nn
from watched_runs import QUIET

import gdtrain
from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.data import EmbeddedDataModule
from gdtrain.data.loader import IndexLoader
from gdtrain.descent.race import race
from gdtrain.engines import Eager, Native
from gdtrain.generators import RandomStates
from gdtrain.losses import CrossEntropy, Hinge, SquaredError
from gdtrain.models import Linear
from gdtrain.objective import Objective
from gdtrain.schedules import Constant, Cosine, WarmupStableDecay
from gdtrain.step_sizes import BarzilaiBorwein, StochasticPolyak


def problem(momentum=0.0, engine=Native, model=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 3.0]) + 0.1 * torch.randn(200, generator=generator)
    torch.manual_seed(0)
    model = Linear((4,), 1) if model is None else model
    objective = Objective(model, SquaredError(), x, y)
    optimizer = SGD(model.parameters(), lr=1.0, momentum=momentum, step_size=StochasticPolyak())
    optimizer.param_groups[0]["initial_lr"] = 1.0
    return objective, optimizer, engine(objective, optimizer)


def raced(objective, optimizer, engine, planned=2000, batch_size=1):
    block = IndexLoader(200, batch_size).block
    return race(engine, objective, optimizer, block, planned, batch_size)


def watched(optimizer, engine, runs):
    """The engine, which notes its runs: η, the first update, examples, factors and losses."""

    def run(indices, factors, draw):
        losses = engine(indices, factors, draw)
        runs.append((optimizer.param_groups[0]["initial_lr"], draw, indices, factors, losses))
        return losses

    return run


def test_the_scale_is_the_median_of_f_over_the_squared_gradient_norm():
    objective, optimizer, engine = problem()
    found = raced(objective, optimizer, engine)
    ratios = []
    for row in IndexLoader(200, 1).block(0, 20):  # a tenth of the race's 200 examples
        value, gradient = objective.value_and_grad(row)
        ratios.append(float(value / sum(g.square().sum() for g in gradient)))
    assert found.scale == pytest.approx(np.median(ratios), rel=1e-5)
    assert found.rates == pytest.approx([found.scale * 10**p for p in np.arange(-2, 0.6, 0.5)])


@pytest.mark.parametrize(("planned", "factor"), [(2000, 2), (600, 4)])
def test_the_winner_is_multiplied_the_more_the_shorter_the_race(planned, factor):
    objective, optimizer, engine = problem()
    found = raced(objective, optimizer, engine, planned)
    assert found.rate == pytest.approx(factor * found.best)
    assert optimizer.param_groups[0]["initial_lr"] == found.rate


def test_legs_by_hand():
    # A tenth of 4,000 examples: 32 tell the scale, and each leg gets a third of the other 368: 20
    # for each of six candidates, 40 for three, 61 for two.
    objective, optimizer, engine = problem()
    runs, by_rate = [], {}
    found = raced(objective, optimizer, watched(optimizer, engine, runs), 4000)
    for rate, draw, indices, factors, losses in runs:
        done, seen = by_rate.setdefault(rate, ([], []))
        assert draw == len(done)
        assert bool((factors == 1).all())
        done += indices.flatten().tolist()
        seen += losses.tolist()
    assert [len(by_rate[rate][0]) for rate in found.rates].count(20) == 3
    assert sorted(len(done) for done, _ in by_rate.values()) == [20, 20, 20, 60, 121, 121]
    same = IndexLoader(200, 1).block(0, 121).flatten().tolist()
    assert all(done == same[: len(done)] for done, _ in by_rate.values())
    scores = {rate: np.mean(seen[len(seen) // 2 :]) for rate, (_, seen) in by_rate.items()}
    assert found.losses == pytest.approx([scores[rate] for rate in found.rates], rel=1e-6)
    best = min((r for r in found.rates if len(by_rate[r][0]) == 121), key=scores.get)
    assert found.rate == pytest.approx(2 * best)
    assert (found.updates, found.examples) == (121, 32 + 3 * 120 + 2)


def test_a_leg_goes_on_where_the_last_ended():
    # The winner's 121 updates in three legs have the losses of a run of 121 with its rate.
    objective, optimizer, engine = problem(momentum=0.9)
    runs = []
    found = raced(objective, optimizer, watched(optimizer, engine, runs), 4000)
    legs = torch.cat([losses for rate, *_, losses in runs if rate == found.best])
    _, fresh, engine = problem(momentum=0.9)
    fresh.param_groups[0]["initial_lr"] = found.best
    assert torch.equal(legs, engine(IndexLoader(200, 1).block(0, 121), torch.ones(121).double()))
    grown = np.mean([1 - 0.9**k for k in range(1, 122)])
    assert found.rate == pytest.approx(2 * grown * found.best)


@pytest.mark.parametrize("batch_size", [1, 16, 200])
@pytest.mark.parametrize("planned", [3, 40, 500, 4000])
def test_it_takes_at_most_a_tenth_of_the_examples_of_the_run(planned, batch_size):
    objective, optimizer, engine = problem()
    runs = []
    engine = watched(optimizer, engine, runs)
    found = raced(objective, optimizer, engine, planned, batch_size)
    # At least one batch tells the scale.
    assert found.examples <= max(0.1 * planned * batch_size, batch_size)
    assert sum(indices.numel() for _, _, indices, *_ in runs) <= found.examples
    assert (found.updates == 0) == (not found.rates)


def test_a_race_leaves_no_trace_but_the_rate():
    noisy = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
    objective, optimizer, engine = problem(engine=Eager, momentum=0.5, model=noisy)
    before, states = copy.deepcopy(objective.model.state_dict()), RandomStates.now()
    raced(objective, optimizer, engine, 1000, 10)
    for name, value in objective.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert RandomStates.now() == states
    assert not optimizer.state
    assert all(p.grad is None for p in objective.params)
    assert optimizer.param_groups[0]["step_size"] == {}


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [(1.0, torch.inf, "not finite at the start"), (0.0, 0.0, "stationary")],
)
def test_a_start_that_is_not_finite_or_stationary_is_told(inputs, targets, message):
    objective, optimizer, engine = problem()
    objective.inputs[:], objective.targets[:] = inputs, targets
    objective.params[1].data.zero_()
    with pytest.raises(ValueError, match=message):
        raced(objective, optimizer, engine)


# ---------------------------------------------------------------------------- in a module


def fitted(kind, batch_size, loss=None, schedule="auto", step_size="auto", epochs=5, **options):
    data = EmbeddedDataModule("breast_cancer", batch_size=batch_size, val_fraction=0, seed=1)
    data.setup()
    torch.manual_seed(0)
    loss = CrossEntropy() if loss is None else loss
    model = Linear(data.input_shape, loss.outputs(data.num_classes))
    module = SupervisedModule(model, loss, partial(kind, **options), schedule, step_size=step_size)
    trainer = Trainer(max_epochs=epochs, limit_val_batches=0, **QUIET)
    trainer.fit(module, datamodule=data)
    return module, data, trainer


def test_auto_is_a_race_for_stochastic_variants_and_bb_for_the_full_batch(caplog):
    caplog.set_level(logging.INFO, "gdtrain")
    module, _, _ = fitted(SGD, 1)
    assert module.race is not None
    assert repr(module.schedule) == repr(WarmupStableDecay(warmup=0.1, decay=0.5))
    assert "lr: auto found" in caplog.text
    module, _, trainer = fitted(GD, "full", epochs=30)
    assert module.race is None
    assert isinstance(trainer.optimizers[0].step_size, BarzilaiBorwein)
    assert isinstance(module.schedule, Constant)
    module, _, _ = fitted(GD, "full", loss=Hinge(), epochs=100)
    assert module.race is not None
    assert isinstance(module.schedule, WarmupStableDecay)
    module, _, _ = fitted(MiniBatchSGD, 32, schedule=Cosine())
    assert isinstance(module.schedule, Cosine)


def test_the_data_and_the_start_of_the_run_are_those_of_a_run_without_a_race():
    module, data, _ = fitted(MiniBatchSGD, 32, epochs=10)
    torch.manual_seed(0)
    model = Linear(data.input_shape, 2)
    optimizer = MiniBatchSGD(model.parameters(), lr=module.race.rate, step_size=StochasticPolyak())
    optimizer.param_groups[0]["initial_lr"] = module.race.rate
    inputs, targets = data.examples("train")
    engine = Native(Objective(model, CrossEntropy(), inputs, targets), optimizer)
    loader = IndexLoader(len(inputs), 32, seed=1)
    total = 10 * loader.updates_per_epoch
    factors = WarmupStableDecay(warmup=0.1, decay=0.5)(torch.arange(total).double(), total)
    for done in range(total):
        engine(loader.block(done, 1), factors[done : done + 1])
    for p, q in zip(model.parameters(), module.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_what_auto_cannot_have_is_told():
    model, loss = Linear((2,), 1), SquaredError()
    with pytest.raises(ValueError, match="must be a factory"):
        SupervisedModule(model, loss, SGD(model.parameters()), step_size="auto")
    with pytest.raises(ValueError, match="step_size must be a rule"):
        SupervisedModule(model, loss, SGD, step_size="fast")


def test_a_user_needs_no_rate():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((300, 3)) * [0.01, 1.0, 100.0]
    y = (x[:, 0] * 100 + x[:, 1] > 0).astype(int)
    for variant in ("gd", "sgd", "minibatch"):
        result = gdtrain.fit("linear", x, y, variant=variant)
        assert result.metrics["metric/accuracy/test"] > 0.9, variant
        assert (result.summary["lr"] is None) == (variant == "gd")


@pytest.mark.parametrize("kind", [GD, MiniBatchSGD])
def test_with_momentum_the_bound_holds_for_the_sum_of_the_buffer(kind):
    size = "full" if kind is GD else 32
    module, _, trainer = fitted(kind, size, epochs=40, momentum=0.9)
    rule = trainer.optimizers[0].step_size
    assert isinstance(rule, StochasticPolyak)
    assert rule.c == pytest.approx(0.5 / (1 - 0.9))
    assert module.race is not None
