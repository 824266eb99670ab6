"""Curvature: what it logs and when, what it costs, and that it changes nothing."""

import csv
import math
from functools import partial

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.analysis.curvature import sharpness, stability_limit
from gdtrain.callbacks.curvature import Curvature
from gdtrain.data import EmbeddedDataModule
from gdtrain.losses import CrossEntropy
from gdtrain.models import MLP, Linear
from gdtrain.objective import Objective
from gdtrain.schedules import Cosine

N = 105  # training examples of iris
QUIET = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(*callbacks, batch="full", updates=40, model=None, logger=False, schedule=None,
        ckpt_path=None, sweep="auto", optimizer=None, **rule):  # fmt: skip
    torch.manual_seed(0)
    kind = optimizer or {"full": GD, 1: SGD}.get(batch, MiniBatchSGD)
    made = partial(kind, **{"lr": 0.1, **rule})
    model = model or MLP((4,), 3, hidden=[6], activation="tanh")
    module = SupervisedModule(model, CrossEntropy(), made, schedule)
    data = EmbeddedDataModule("iris", batch_size=batch, updates_per_sweep=sweep)
    trainer = Trainer(
        max_epochs=-1, max_steps=updates, callbacks=list(callbacks), logger=logger, **QUIET
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, module, data


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


def columns(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {
        key: {int(row["step"]): float(row[key]) for row in rows if row[key]}
        for key in rows[0]
        if key.startswith("curvature/")
    }


# ------------------------------------------------------------------ what is logged


def test_on_a_full_batch_it_logs_the_sharpness_of_the_state_and_the_limit_beside_the_rate(tmp_path):
    logger = CSVLogger(tmp_path)
    rule = {"momentum": 0.5, "weight_decay": 0.2}
    schedule = Cosine(final=0.5)
    curvature = Curvature(every=10)
    _, module, data = fit(
        curvature, logger=logger, schedule=schedule, model=Linear((4,), 3), sweep=10, **rule
    )
    found = columns(logger)
    assert set(found) == {
        "curvature/sharpness",
        "curvature/limit",
        "curvature/lr",
        "curvature/two_over_lr",
    }
    assert list(found["curvature/sharpness"]) == [0, 10, 20, 30, 40]
    inputs, targets = data.examples("train")
    objective = Objective(module.model, CrossEntropy(), inputs, targets)
    own = sharpness(objective, optimizer=module.trainer.optimizers[0], tolerance=1e-4)
    assert found["curvature/sharpness"][40] == pytest.approx(own.value, rel=0.02)
    assert own.value > 0.2  # the decay is in it
    for update, value in found["curvature/sharpness"].items():
        limit = stability_limit(value, momentum=0.5)
        assert found["curvature/limit"][update] == pytest.approx(limit, rel=1e-6)
        lr = found["curvature/lr"][update]
        used = max(update - 1, 0)  # the number of the last update, or of the first
        factor = schedule(torch.tensor([float(used)]).double(), 40, 1).item()
        assert lr == pytest.approx(0.1 * factor, rel=1e-6)
        assert found["curvature/two_over_lr"][update] == pytest.approx(2 / lr, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 16])
def test_below_the_full_batch_it_logs_the_batch_sharpness_and_no_limit(tmp_path, batch):
    logger = CSVLogger(tmp_path)
    curvature = Curvature(every=5)
    fit(curvature, batch=batch, logger=logger, updates=14, sweep=5)
    found = columns(logger)
    assert set(found) == {
        "curvature/batch_sharpness",
        "curvature/lr",
        "curvature/two_over_lr",
    }
    steps = list(found["curvature/batch_sharpness"])
    assert steps[0] == 0
    assert len(steps) >= 2
    assert set(found["curvature/two_over_lr"].values()) == {20.0}
    assert [update for update, _ in curvature.looks] == steps
    for _, look in curvature.looks:
        assert (look.iterations, look.examples) == (16, 16 * batch)
        assert look.value > 0
        assert math.isfinite(look.error)


def test_tensorboard_gets_the_number_of_updates_as_step(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(Curvature(every=20), logger=logger, sweep=20)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for tag in ("sharpness", "limit", "lr", "two_over_lr"):
        assert [event.step for event in events.Scalars(f"curvature/{tag}")] == [0, 20, 40]


def test_other_optimizers_have_no_limit(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Curvature(every=20), logger=logger, optimizer=torch.optim.Adam, sweep=20)
    assert "curvature/limit" not in columns(logger)
    assert list(columns(logger)["curvature/sharpness"]) == [0, 20, 40]


def test_a_stated_sample_is_the_same_at_each_look():
    curvature = Curvature(every=20, examples=30)
    fit(curvature, sweep=20, lr=0.0)
    assert [look.examples for _, look in curvature.looks] == [30, 30, 30]
    assert len({look.value for _, look in curvature.looks}) == 1
    whole = Curvature(every=20)
    fit(whole, sweep=20, lr=0.0)
    assert whole.looks[0][1].examples == N
    assert whole.looks[0][1].value != curvature.looks[0][1].value


def test_sweeps_end_soon_after_each_multiple():
    curvature = Curvature(every=7)
    fit(curvature, updates=60)
    looks = [update for update, _ in curvature.looks]
    assert looks[0] == 0
    assert len(looks) == 1 + 60 // 7
    assert [update // 7 for update in looks] == list(range(9))


# ------------------------------------------------------------------ that it changes nothing


def noisy():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("batch", ["full", 15])
def test_the_run_is_the_same_with_and_without_it(batch):
    runs = []
    for callbacks in ((), (Curvature(every=5),)):
        _, module, _ = fit(*callbacks, batch=batch, model=noisy(), momentum=0.9, sweep=5)
        runs.append((weights(module), dict(module.model.named_buffers())))
        assert module.model.training
    assert torch.equal(runs[0][0], runs[1][0])
    for name, buffer in runs[0][1].items():
        assert torch.equal(buffer, runs[1][1][name])


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


def test_a_run_that_is_too_short_for_it_is_not_looked_at(counted):
    curvature = Curvature()
    fit(curvature, updates=500)
    assert curvature.looks == []


def test_an_endless_run_is_looked_at_from_the_start(counted):
    class End(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = True

    curvature = Curvature()
    fit(curvature, End(), updates=-1)
    assert [update for update, _ in curvature.looks] == [0]


# ------------------------------------------------------------------ state, and what is refused


def test_a_resumed_run_goes_on_looking_where_it_would_have(tmp_path):
    whole = Curvature(every=10)
    fit(whole, updates=40, sweep=10)
    first = Curvature(every=10)
    trainer, _, _ = fit(first, updates=20, sweep=10)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    (own,) = [value for key, value in state.items() if key.startswith("Curvature")]
    assert own["products"] == sum(found.iterations for _, found in first.looks)
    second = Curvature(every=10)
    fit(second, updates=40, sweep=10, ckpt_path=tmp_path / "half.ckpt")
    assert first.looks + second.looks == whole.looks
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("argument", ["every", "examples"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "often"])
def test_arguments_out_of_range(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be a whole number.*{value}"):
        Curvature(**{argument: value})


def test_more_examples_than_there_are():
    with pytest.raises(
        ValueError, match=rf"examples must lie in \[1, {N}\].*Received: examples=999"
    ):
        fit(Curvature(examples=999))


def test_ascent_is_refused():
    with pytest.raises(ValueError, match=r"minimised\. Received: maximize=True"):
        fit(Curvature(), maximize=True)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
def test_batches_from_elsewhere_are_refused():
    examples = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
    module = SupervisedModule(MLP((4,), 3), CrossEntropy(), partial(SGD, lr=0.1))
    trainer = Trainer(max_epochs=1, callbacks=[Curvature()], logger=False, **QUIET)
    with pytest.raises(ValueError, match="needs the resident examples of a gdtrain data module"):
        trainer.fit(module, torch.utils.data.DataLoader(examples, 4))


def test_where_the_run_has_diverged_it_logs_nothing_and_goes_on():
    class Explodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) ** 5

    torch.manual_seed(0)
    curvature = Curvature(every=10)
    trainer, module, _ = fit(curvature, model=Explodes(), lr=1e4, sweep=10)
    assert trainer.global_step == 40
    assert not weights(module).isfinite().all()
    assert [update for update, _ in curvature.looks] == [0]
