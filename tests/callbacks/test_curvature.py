"""Curvature: what it logs and when, what it costs, and that it changes nothing."""

import math
from functools import partial

import pytest
import torch
from lightning import Trainer
from torch import nn
from watched_runs import QUIET, N, Numbers, StopAt, fit, small, weights

from gdtrain import SGD, SupervisedModule
from gdtrain.analysis.curvature import sharpness, stability_limit
from gdtrain.callbacks.curvature import Curvature
from gdtrain.losses import CrossEntropy
from gdtrain.models import Linear
from gdtrain.objective import Objective
from gdtrain.schedules import Cosine

fit = partial(fit, batch="full", updates=40)


# ------------------------------------------------------------------ what is logged


def test_on_a_full_batch_it_logs_the_sharpness_of_the_state_and_the_limit_beside_the_rate():
    logger, schedule = Numbers(), Cosine(final=0.5)
    options = {"momentum": 0.5, "weight_decay": 0.2, "schedule": schedule}
    module = fit(
        Curvature(every=7), logger=logger, model=partial(Linear, (4,), 3), updates=42, **options
    )
    found = {tag: values for tag, values in logger.found.items() if tag.startswith("curvature/")}
    names = ("sharpness", "limit", "lr", "two_over_lr")
    assert set(found) == {f"curvature/{name}" for name in names}
    assert list(found["curvature/sharpness"]) == list(range(0, 43, 7))  # where sweeps end
    inputs, targets = module.trainer.datamodule.examples("train")
    objective = Objective(module.model, CrossEntropy(), inputs, targets)
    own = sharpness(objective, optimizer=module.trainer.optimizers[0], tolerance=1e-4)
    assert found["curvature/sharpness"][42] == pytest.approx(own.value, rel=0.02)
    assert own.value > 0.2  # the decay is in it
    for update, value in found["curvature/sharpness"].items():
        limit = stability_limit(value, momentum=0.5)
        assert found["curvature/limit"][update] == pytest.approx(limit, rel=1e-6)
        lr = found["curvature/lr"][update]
        used = max(update - 1, 0)  # the number of the last update, or of the first
        factor = schedule(torch.tensor([float(used)]).double(), 42, 1).item()
        assert lr == pytest.approx(0.1 * factor, rel=1e-6)
        assert found["curvature/two_over_lr"][update] == pytest.approx(2 / lr, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 16])
def test_below_the_full_batch_it_logs_the_batch_sharpness_and_no_limit(batch):
    logger, curvature = Numbers(), Curvature(every=5)
    fit(curvature, batch=batch, logger=logger, updates=14)
    found = {tag for tag in logger.found if tag.startswith("curvature/")}
    assert found == {f"curvature/{name}" for name in ("batch_sharpness", "lr", "two_over_lr")}
    steps = list(logger.found["curvature/batch_sharpness"])
    assert steps == [update for update, _ in curvature.looks] == [0, 5, 10]
    assert set(logger.found["curvature/two_over_lr"].values()) == {20.0}
    for _, look in curvature.looks:
        assert (look.iterations, look.examples) == (16, 16 * batch)
        assert look.value > 0
        assert math.isfinite(look.error)


def test_other_optimizers_have_no_limit():
    logger = Numbers()
    fit(Curvature(every=20), logger=logger, optimizer=torch.optim.Adam)
    assert "curvature/limit" not in logger.found
    assert list(logger.found["curvature/sharpness"]) == [0, 20, 40]


def test_a_stated_sample_is_the_same_at_each_look():
    curvature, whole = Curvature(every=20, examples=30), Curvature(every=20)
    for callback in (curvature, whole):
        fit(callback, lr=0.0)
    assert [look.examples for _, look in curvature.looks] == [30, 30, 30]
    assert len({look.value for _, look in curvature.looks}) == 1
    assert whole.looks[0][1].examples == N
    assert whole.looks[0][1].value != curvature.looks[0][1].value


# ------------------------------------------------------------------ that it changes nothing


def noisy():
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("batch", ["full", 15])
def test_the_run_is_the_same_with_and_without_it(batch):
    runs = []
    for callbacks in ((), (Curvature(every=5),)):
        runs.append(fit(*callbacks, batch=batch, model=noisy, momentum=0.9, sweep=5).model)
        assert runs[-1].training
    torch.testing.assert_close(runs[0].state_dict(), runs[1].state_dict(), rtol=0, atol=0)


# ------------------------------------------------------------------ what it costs


@pytest.fixture
def counted(monkeypatch):
    """Only examples count, so that work is in passes over them."""
    monkeypatch.setattr("gdtrain.descent.work._PASS", 0)
    monkeypatch.setattr("gdtrain.callbacks.curvature.FREE", 0)


@pytest.mark.parametrize(("batch", "updates"), [("full", 4000), (16, 6000)])
def test_by_default_looks_take_at_most_four_percent_of_the_passes(counted, batch, updates):
    curvature = Curvature()
    fit(curvature, batch=batch, updates=updates, lr=0.01)
    assert len(curvature.looks) >= 3
    made = 0
    for update, found in curvature.looks:
        made += 3 * found.iterations  # a product takes as long as three gradients
        # The first is in advance; what the later ones will take, the last has told.
        assert update == 0 or made <= 0.04 * update + 3 * 8
        assert update % (updates // 100) == 0
    assert made >= 0.02 * updates  # and they use what they have


@pytest.mark.parametrize(("callbacks", "updates", "looks"), [([], 500, []), ([StopAt(1)], -1, [0])])
def test_a_run_too_short_for_it_is_not_looked_at_an_endless_one_from_the_start(
    counted, callbacks, updates, looks
):
    curvature = Curvature()
    fit(curvature, *callbacks, updates=updates)
    assert [update for update, _ in curvature.looks] == looks


# ------------------------------------------------------------------ state, and what is refused


def test_a_resumed_run_goes_on_looking_where_it_would_have(tmp_path):
    whole, first, second = (Curvature(every=10) for _ in range(3))
    fit(whole)
    fit(first, updates=20).trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    (own,) = [value for key, value in state.items() if key.startswith("Curvature")]
    assert own["products"] == sum(found.iterations for _, found in first.looks)
    fit(second, ckpt_path=tmp_path / "half.ckpt")
    assert first.looks + second.looks == whole.looks
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("argument", ["every", "examples"])
@pytest.mark.parametrize("value", [0, 2.5, True])
def test_arguments_out_of_range(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be a whole number.*{value}"):
        Curvature(**{argument: value})


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"examples": 999}, {}, rf"examples must lie in \[1, {N}\].*Received: examples=999"),
        ({}, {"maximize": True}, r"minimised\. Received: maximize=True"),
    ],
)
def test_what_it_refuses_of_a_run(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        fit(Curvature(**arguments), **options)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
def test_batches_from_elsewhere_are_refused():
    examples = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
    module = SupervisedModule(small(), CrossEntropy(), partial(SGD, lr=0.1))
    trainer = Trainer(max_epochs=1, callbacks=[Curvature()], **QUIET)
    with pytest.raises(ValueError, match="needs the resident examples of a gdtrain data module"):
        trainer.fit(module, torch.utils.data.DataLoader(examples, 4))


def test_where_the_run_has_diverged_it_logs_nothing_and_goes_on():
    class Explodes(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 5

    curvature = Curvature(every=10)
    module = fit(curvature, model=partial(Explodes, 4, 3), lr=1e4)
    assert module.updates == 40
    assert not weights(module).isfinite().all()
    assert [update for update, _ in curvature.looks] == [0]
