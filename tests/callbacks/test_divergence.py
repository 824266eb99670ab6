"""Divergence: each cause found where it was put in, recoveries, and no alarm on healthy runs."""

import itertools
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Trainer, seed_everything
from sklearn.datasets import load_iris
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from watched_runs import SILENT, weights

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule, fit
from gdtrain.callbacks import BestAndLast, Divergence, LossCurves
from gdtrain.data import ArrayDataModule, DatasetDataModule, EmbeddedDataModule
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.losses import CrossEntropy, Hinge, SquaredError
from gdtrain.models import MLP, Linear
from gdtrain.runs.run import run
from gdtrain.schedules import Constant, Cosine

OPTIMIZERS = {1: SGD, "full": GD}


def make(name="digits", model=None, batch_size=32, lr=0.1, schedule=None, engine="auto", **options):
    seed_everything(options.pop("weights", 0), verbose=False)
    data = EmbeddedDataModule(name, batch_size=batch_size, **options)
    data.setup()
    loss = SquaredError() if data.num_classes is None else CrossEntropy()
    outputs = loss.outputs(data.num_classes, data.num_targets)
    built = (model or partial(MLP, hidden=[32]))(data.input_shape, outputs)
    kind = partial(OPTIMIZERS.get(batch_size, MiniBatchSGD), lr=lr)
    return SupervisedModule(built, loss, kind, schedule or Constant(), engine=engine), data


def train(module, data, watch=None, folder=None, **arguments):
    watch = Divergence() if watch is None else watch
    return run(
        module,
        data,
        trainer=partial(Trainer, **{"max_epochs": 3, **SILENT, **arguments}),
        callbacks=[watch, LossCurves(), *([BestAndLast] if folder else [])],
        directory=folder,
    )


def causes(watch):
    return [(event["update"], event["cause"]) for event in watch.events]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("action", "retry"),
        ("recoveries", -1),
        ("recoveries", 1.5),
        ("recoveries", True),
        ("growth", 1.0),
        ("growth", math.inf),
        ("growth", math.nan),
    ],
)
def test_arguments(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .*Received: {argument}="):
        Divergence(**{argument: value})


# ---------------------------------------------------------------------- by hand


def ones(target):
    """32 times the same example x = 1."""
    raw = {"standardize": False, "standardize_targets": False, "dtype": "float64"}
    whole = {"batch_size": "full", "val_fraction": 0, "test_fraction": 0}
    return ArrayDataModule(np.ones((32, 1)), np.full(32, target), task="regression", **raw, **whole)


def bowl(lr, epochs, optimizer=GD):
    """J = ½ (θ − 1)², from θ = 0, by GD: 32 times the same example x = y = 1."""
    data = ones(1.0)
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    module = SupervisedModule(model, SquaredError(), partial(optimizer, lr=lr))
    return module, data, {"max_epochs": epochs, "precision": "64-true"}


def test_recoveries_on_a_bowl_by_hand():
    module, data, budget = bowl(lr=30.0, epochs=80)
    watch = Divergence()
    result = train(module, data, watch, **budget)
    # θ − 1 is multiplied by 1 − η each update, J by its square: 841 for η = 30, 4 for η = 3. After
    # 16 updates it is 841^16 and 4^16 = 4·10⁹ times the start's, above 10⁴.
    assert causes(watch) == [(15, "GROWTH"), (31, "GROWTH")]
    assert [event["good_update"] for event in watch.events] == [0, 16]
    assert [event["lr"] for event in watch.events] == [30.0, 3.0]
    assert module.rate_cut == 0.01
    # 80 − 32 updates with η = 0.3
    assert module.model.weight.item() == pytest.approx(1 - 0.7**48, abs=1e-12)
    assert (result.summary["updates"], result.summary["examples_seen"]) == (80, 80 * 32)
    # λ = 1, so the limit is 2
    assert [event["lr_limit"] for event in watch.events] == pytest.approx([2.0, 2.0])
    assert result.stop.reason is StopReason.BUDGET
    assert result.summary["stop_advice"].startswith("Set optimizer.lr=0.3.")
    assert len(result.summary["stop_numbers"]["recoveries"]) == 2
    # The curves show what happened: J of η = 30 at update 1, and of η = 0.3 from update 32 on.
    loss = result.history.array("train", "loss")
    assert loss[:2] == pytest.approx([0.5, 0.5 * 29**2])
    assert loss[32:] == pytest.approx(0.5 * 0.49 ** np.arange(48), abs=1e-12)
    assert result.history.array("train", "lr")[[0, 16, 32]] == pytest.approx([30, 3, 0.3])


def test_a_slower_growth_is_told_by_a_tighter_bound():
    # η = 2.1: J grows by 1.21 each update, after 16 to 21.11 times the start's
    for growth, expected in ((21.1, [(15, "GROWTH")]), (21.2, [])):
        module, data, budget = bowl(lr=2.1, epochs=17)
        watch = Divergence(growth=growth)
        train(module, data, watch, **budget)
        assert causes(watch) == expected


def test_what_ends_above_the_start_ends_with_the_good_state():
    # Twelve updates: too few for a window. (1.21^12 = 9.8)
    module, data, budget = bowl(lr=2.1, epochs=12)
    result = train(module, data, **budget)
    assert result.stop.reason is StopReason.DIVERGED
    assert result.summary["stop_numbers"]["cause"] == "ABOVE_START"
    assert result.stop.advice == "Set optimizer.lr=0.21 or less."
    assert module.model.weight.item() == 0.0
    assert result.metrics["loss/train"] == 0.5


def test_stopping_by_hand():
    module, data, budget = bowl(lr=30.0, epochs=80)
    result = train(module, data, Divergence(action="stop"), **budget)
    assert result.stop.reason is StopReason.DIVERGED
    assert module.model.weight.item() == 0.0
    assert "at update 15 (counted from 0) with lr=30" in result.stop.message
    assert "stable below lr=2 at the last good state (sharpness 1)" in result.stop.message
    assert result.stop.advice == "Set optimizer.lr=1 or less."
    numbers = result.summary["stop_numbers"]
    assert (numbers["update"], numbers["lr"], numbers["cause"]) == (15, 30.0, "GROWTH")
    assert json.loads(json.dumps(result.summary, allow_nan=False)) == result.summary


def test_recoveries_are_bounded():
    watch = Divergence(recoveries=1)
    for _ in range(2):  # a second run of the callback starts anew
        module, data, budget = bowl(lr=30.0, epochs=80)
        result = train(module, data, watch, **budget)
        assert len(watch.events) == 1
    assert result.stop.reason is StopReason.DIVERGED
    assert "It had recovered once before" in result.stop.message
    assert module.model.weight.item() == 0.0


@pytest.mark.parametrize(("lr", "bounces"), [(0.5, False), (1.5, True)])
def test_oscillation_is_named(lr, bounces):
    module, data, budget = bowl(lr=lr, epochs=40)
    with torch.no_grad():
        module.model.weight.fill_(1e6)
    stop = train(module, data, **budget).stop
    # λ = 1: from η = 1 on the parameter jumps over the minimum; the loss falls all the same
    assert stop.reason is StopReason.BUDGET
    assert ("oscillate" in stop.message) == bounces
    if bounces:
        assert stop.numbers["oscillation"] == pytest.approx(1.5)
        assert stop.numbers["turns"] == 0
        assert "lr=1 would step onto the floor" in stop.advice


class Signs(GD):
    """θ ← θ − η sign(g): not along −g, so the curvature says nothing of η."""

    @staticmethod
    def rule(params, grads, buffers, *, lr, **others):
        for p, g in zip(params, grads, strict=True):
            p -= lr * g.sign()


@pytest.mark.parametrize(("lr", "reason"), [(1.5, "BUDGET"), (300.0, "DIVERGED")])
def test_nothing_is_said_of_the_curvature_where_steps_do_not_follow_the_gradient(lr, reason):
    module, data, budget = bowl(lr=lr, epochs=40, optimizer=Signs)
    stop = train(module, data, Divergence(action="stop"), **budget).stop
    assert stop.reason.value == reason
    assert not re.search("oscillate|stable below|sharpness", str(stop))


def test_a_loss_that_bounces_is_named():
    """J = ¼ Σ… by η at which a two-cycle is stable: tanh units on one example."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
    for p in model.double().parameters():
        nn.init.constant_(p, 0.6)
    module = SupervisedModule(model, SquaredError(), partial(GD, lr=3.0))
    stop = train(module, ones(0.5), max_epochs=400, precision="64-true").stop
    assert stop.numbers["oscillation"] > 1
    assert stop.numbers["turns"] > 20
    assert f"the loss turned {stop.numbers['turns']} times" in stop.message


# ---------------------------------------------------------------------- causes, put in by hand


def spoil(data, what, example, column=0, value=math.nan):
    inputs, targets = data.examples("train")
    (inputs if what == "input" else targets).reshape(len(inputs), -1)[example, column] = value


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("batch_size", [1, 32, "full"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_input_is_named(tmp_path, engine, batch_size, value):
    module, data = make("diabetes", Linear, batch_size, lr=0.01, engine=engine)
    spoil(data, "input", 77, 3, value)
    data.preprocessing.feature_names = [f"column {i}" for i in range(10)]
    result = train(module, data, folder=tmp_path)
    assert result.stop.reason is StopReason.NON_FINITE
    numbers = result.stop.numbers
    row = int(data.split["train"][77])
    assert numbers["cause"] == "INPUT"
    assert (numbers["examples"], numbers["rows"], numbers["features"]) == ([77], [row], [3])
    at = next(
        t for t in range(500) if 77 in data.train_dataloader().block(t, 1)[0].tolist()
    )  # the first update that has it
    assert numbers["update"] == at
    assert (
        f"at update {at} (counted from 0) with lr=0.01: feature 3 (column 3) of training example "
        f"77 (row {row} of the data) is {value}." in result.stop.message
    )
    assert "no step size helps" in result.stop.advice
    # Not recovered from, for that cannot help; the model that is left and saved is sound.
    assert torch.isfinite(weights(module)).all()
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(t).all() for t in saved["state_dict"].values())


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize(
    ("spoilt", "cause", "said"),
    [
        (("target", 200), "TARGET", "the target of training example 200 (row"),
        # Its square overflows: no fault of the step size.
        (("input", 200, 3, 1e30), "LOSS", "scale of these examples"),
    ],
)
def test_an_example_is_named(engine, spoilt, cause, said):
    module, data = make("diabetes", Linear, 32, lr=0.01, engine=engine)
    spoil(data, *spoilt)
    stop = train(module, data).stop
    assert (stop.numbers["cause"], stop.numbers["examples"]) == (cause, [200])
    assert said in str(stop)


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_a_weight_is_named(tmp_path, engine):
    module, data = make("iris", batch_size=1, engine=engine)
    with torch.no_grad():
        module.model.layers[3].bias[1] = math.nan
    result = train(module, data, folder=tmp_path)
    assert result.stop.reason is StopReason.NON_FINITE
    numbers = result.stop.numbers
    assert (numbers["cause"], numbers["update"]) == ("WEIGHT", 0)
    assert numbers["parameters"] == ["layers.3.bias"]
    assert "1 of 3 in layers.3.bias is not finite" in result.stop.message
    assert "finite initial parameters" in result.stop.advice
    assert not (tmp_path / "checkpoints").exists()  # there is no good state


class Root(nn.Module):
    """√|w·x|, whose slope at 0 is infinite."""

    def __init__(self, input_shape, outputs):
        super().__init__()
        self.inner, self.out = nn.Linear(*input_shape, 4, bias=False), nn.Linear(4, outputs)

    def forward(self, x):
        return self.out(self.inner(x).abs().sqrt())


@pytest.mark.parametrize("updates_per_sweep", [1, 7, 64])
def test_a_gradient_is_named(updates_per_sweep):
    module, data = make("iris", Root, 8, lr=1e-3, updates_per_sweep=updates_per_sweep)
    inputs, _ = data.examples("train")
    inputs[50] = 0.0
    result = train(module, data)
    numbers = result.stop.numbers
    assert (numbers["cause"], numbers["examples"]) == ("GRADIENT", [50])
    assert numbers["parameters"] == ["inner.weight"]
    assert 50 in data.train_dataloader().block(numbers["update"], 1)[0].tolist()
    assert "look for a square root" in result.stop.advice
    assert torch.isfinite(weights(module)).all()


def test_a_step_that_overflows_is_named():
    module, data = make("diabetes", Linear, "full", lr=3e38, val_fraction=0.0)
    watch = Divergence(recoveries=0)
    with torch.no_grad():
        for p in module.model.parameters():
            p.fill_(3.0)
    result = train(module, data, watch)
    numbers = result.stop.numbers
    assert (numbers["cause"], numbers["update"]) == ("STEP", 0)
    assert result.stop.message.startswith("The parameters became infinite or not a number at upd")


def high(input_shape, outputs):
    """Predicts 16, far above the targets' 0: a step too long kills all units at once.

    8 units of about 2 each; the gradient of their biases is 16, so that lr = 0.2 takes them to
    −1.2.
    """
    model = nn.Sequential(nn.Linear(*input_shape, 8), nn.ReLU(), nn.Linear(8, outputs))
    with torch.no_grad():
        model[0].weight.mul_(0.1)
        model[0].bias.fill_(2.0)
        model[2].weight.fill_(1.0)
        model[2].bias.zero_()
    return model


def test_dead_units_are_found_and_revived():
    """The loss of a dead net is below the start's 128 here: 0.5, of the mean of the targets."""
    module, data = make("diabetes", high, "full", lr=0.2)
    watch = Divergence()
    result = train(module, data, watch, max_epochs=1000, check_val_every_n_epoch=1000)
    assert [event["cause"] for event in watch.events] == ["DEAD"]
    assert watch.events[0]["layers"] == ["1"]
    assert watch.events[0]["good_update"] == 0
    assert (module.model[:2](data.examples("train")[0]) > 0).any()
    assert result.metrics["loss/train"] < 0.45


# ---------------------------------------------------------------------- 1000 times too large


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(
    ("batch_size", "lr", "epochs"), [(1, 0.01, 20), (32, 0.1, 40), ("full", 0.3, 400)]
)
def test_a_rate_1000_times_too_large_ends_near_a_well_set_one(activation, batch_size, lr, epochs):
    model = partial(MLP, hidden=[128], activation=activation)
    losses = []
    for factor in (1, 1000):
        module, data = make("digits", model, batch_size, lr * factor, Cosine())
        watch = Divergence()
        with torch.no_grad():
            inputs, targets = data.examples("train")
            start = CrossEntropy()(module.model(inputs), targets).mean().item()
        result = train(module, data, watch, max_epochs=epochs, check_val_every_n_epoch=epochs)
        assert result.stop.reason is StopReason.BUDGET
        assert bool(watch.events) == (factor == 1000)
        losses.append(result.metrics["loss/train"])
    assert (losses[1] - losses[0]) / start <= 0.05
    assert "cut to" in result.stop.message


# ---------------------------------------------------------------------- other loaders


def pairs():
    x = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()


@pytest.mark.parametrize(("batch_size", "lr", "epochs"), [(1, 30.0, 3), (32, 300.0, 30)])
def test_examples_of_a_dataset(batch_size, lr, epochs):
    seed_everything(0, verbose=False)
    fetched = [*zip(*pairs(), strict=True)]  # one by one
    data = DatasetDataModule(fetched, batch_size=batch_size, num_workers=0)
    model = MLP((4,), 2, hidden=[16])
    module = SupervisedModule(model, CrossEntropy(), partial(MiniBatchSGD, lr=lr))
    watch = Divergence()
    result = train(module, data, watch, max_epochs=epochs)
    assert watch.events
    assert result.stop.reason is StopReason.BUDGET
    assert result.metrics["loss/train"] < 0.3


@pytest.mark.parametrize("retained", [2**20, 0], ids=["kept", "too large to be kept"])
def test_a_plain_loader(monkeypatch, retained):
    monkeypatch.setattr("gdtrain.descent.recovery._RETAINED", retained)
    seed_everything(0, verbose=False)
    x, y = pairs()
    loader = DataLoader(TensorDataset(x, y), 32)

    def fit():
        make_optimizer = partial(SGD, lr=100.0)
        module = SupervisedModule(MLP((4,), 2, hidden=[16]), CrossEntropy(), make_optimizer)
        watch = Divergence()
        options = {"max_epochs": 30, "logger": False, "enable_checkpointing": False}
        trainer = Trainer(callbacks=[watch], log_every_n_steps=1, **options, **SILENT)
        trainer.fit(module, loader, loader)
        return module, watch

    module, watch = fit()
    assert watch.events
    assert module.stop is None
    assert CrossEntropy()(module.model(x), y).mean().item() < 0.3
    x[99, 2] = math.nan
    module, watch = fit()
    assert not watch.events
    assert (module.stop.numbers["cause"], module.stop.numbers["update"]) == ("INPUT", 3)
    # All that is known of it is its place in the batch.
    assert "feature 2 of example 3 of the batch is nan" in module.stop.message
    assert torch.isfinite(weights(module)).all()


# ---------------------------------------------------------------------- healthy runs


@pytest.mark.parametrize("name", ["digits", "wine", "iris", "breast_cancer", "diabetes"])
@pytest.mark.parametrize(
    ("batch_size", "lr", "epochs"), [(1, 0.01, 8), (32, 0.1, 20), ("full", 0.3, 100)]
)
@pytest.mark.parametrize(
    "seeds", [range(1), pytest.param(range(1, 4), marks=pytest.mark.slow)], ids=["one", "more"]
)
def test_healthy_runs_raise_no_alarm(name, batch_size, lr, epochs, seeds):
    models = Linear, *(partial(MLP, hidden=[32], activation=a) for a in ("relu", "tanh"))
    for seed, model, rate in itertools.product(seeds, models, (lr, lr / 100)):
        module, data = make(name, model, batch_size, rate, weights=seed, seed=seed)
        budget = {"max_epochs": epochs, "check_val_every_n_epoch": epochs}
        result = train(module, data, Divergence(action="stop"), **budget)
        assert result.stop.reason is StopReason.BUDGET, result.stop
        assert module.rate_cut == 1.0


def test_heavy_tails_raise_no_alarm():
    """One example in a hundred has a loss thousands of times the others'."""
    generator = np.random.default_rng(0)
    X = generator.normal(size=(2000, 5))
    y = X @ np.arange(5.0) + generator.standard_t(1.5, size=2000)
    y[::100] += 300
    data = ArrayDataModule(X, y, batch_size=1)
    module = SupervisedModule(Linear((5,), 1), SquaredError(), partial(SGD, lr=1e-3))
    watch = Divergence(action="stop")
    result = train(module, data, watch)
    losses = result.history.array("train", "loss")
    assert losses.max() > 20 * np.median(losses)
    assert result.stop.reason is StopReason.BUDGET


def test_a_start_at_the_optimum_raises_no_alarm():
    """The loss can only rise from there, and the bound does not shrink to nothing."""
    module, data = make("iris", Linear, 1, lr=0.05)
    train(module, data, max_epochs=100)
    again = SupervisedModule(module.model, CrossEntropy(), partial(SGD, lr=0.3))
    result = train(again, data, Divergence(action="stop"), max_epochs=5)
    assert result.stop.reason is StopReason.BUDGET


def test_other_losses():
    seed_everything(0, verbose=False)
    data = EmbeddedDataModule("breast_cancer", batch_size="full")
    module = SupervisedModule(Linear((30,), 1), Hinge(), partial(GD, lr=0.1, weight_decay=0.01))
    result = train(module, data, Divergence(action="stop"), max_epochs=50)
    assert result.stop.reason is StopReason.BUDGET


def test_annotate_leaves_a_healthy_end_alone():
    stop = Stop(StopReason.CONVERGED, "The gradient is small.", {"norm": 1e-9}, "Nothing.")
    assert Divergence().annotate(stop) == stop


def test_a_rule_that_finds_the_rate_is_not_said_to_oscillate():
    result = fit("linear", *load_iris(return_X_y=True), variant="gd", epochs=100)
    assert result.stop.reason is StopReason.BUDGET
    assert "oscillate" not in result.stop.message
