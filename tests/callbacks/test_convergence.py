"""Convergence: by hand, what it must say, and what it must not."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from watched_runs import QUIET, Losses, StopAt

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.callbacks import Convergence
from gdtrain.convex.certificate import certify
from gdtrain.convex.problem import LinearProblem
from gdtrain.data import ArrayDataModule, EmbeddedDataModule
from gdtrain.descent.stationarity import Slopes
from gdtrain.descent.stopping import StopReason
from gdtrain.losses import CrossEntropy, Hinge, SquaredError
from gdtrain.models import MLP, Linear
from gdtrain.schedules import Constant, Polynomial, ReduceOnPlateau, Step
from gdtrain.step_sizes import ScheduleFree

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]


def fit(module, data, *callbacks, checkpoint=None, **arguments):
    trainer = Trainer(
        callbacks=list(callbacks), **{**QUIET, "num_sanity_val_steps": 0, **arguments}
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return trainer


def linear(data, loss, optimizer, schedule=None, *, dtype=torch.float64):
    """A linear model of the right size, from zero."""
    data.setup()
    outputs = loss.outputs(data.num_classes, data.num_targets)
    model = Linear(data.input_shape, outputs, init="zeros").to(dtype)
    return SupervisedModule(model, loss, optimizer, schedule)


def regression(n=200, noise=1.0, **options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3))
    y = x @ [1.0, -2.0, 0.5] + noise * rng.normal(size=n)
    options = {"val_fraction": 0, "test_fraction": 0, "dtype": "float64", **options}
    return ArrayDataModule(x, y, **options)


def diabetes():
    data = EmbeddedDataModule("diabetes", batch_size="full", dtype="float64")
    return data, linear(data, SquaredError(), partial(GD, lr=0.3, weight_decay=0.1))


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1.0}, r"tolerance must be a number in \[0, ∞\)"),
        ({"tolerance": math.inf}, "tolerance must be a number"),
        ({"tolerance": "small"}, "tolerance must be a number"),
        ({"gap": 0.0}, r"gap must be a number in \(0, 1\)"),
        ({"gap": 1.0}, r"gap must be a number in \(0, 1\)"),
        ({"confidence": 0.5}, "confidence must be a number"),
        ({"confidence": True}, "confidence must be a number"),
        ({"noise_floor": 1}, "noise_floor must be true or false"),
        ({"patience": 0}, "patience must be a whole number"),
        ({"every": 2.5}, "every must be a whole number"),
        ({"share": 0.0}, r"share must be a number in \(0, 0.5\]"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message + r"[\s\S]*Received"):
        Convergence(**options)


def test_a_gap_needs_a_linear_model_with_decay():
    data = EmbeddedDataModule("iris", batch_size="full")
    for model, message in (
        (MLP((4,), 3), r"gap=0.01 needs a linear model.*not linear"),
        (Linear((4,), 3), "without weight decay"),
    ):
        module = SupervisedModule(model, CrossEntropy(), partial(GD, lr=0.1))
        with pytest.raises(ValueError, match=message):
            fit(module, data, Convergence(gap=0.01), max_epochs=3)


# ---------------------------------------------------------------------- full batch


def test_full_batch_converges_and_says_by_what():
    data, module = diabetes()
    fit(module, data, Convergence(1e-4, every=10), max_epochs=3000, precision="64-true")
    stop = module.stop
    assert stop.reason is StopReason.CONVERGED
    assert stop.numbers["update"] == module.updates < 3000
    x, y = data.examples("train")
    w, b = (p.detach() for p in module.model.parameters())
    r = x.flatten(1) @ w.T + b - y.reshape(len(x), -1)
    norm = torch.cat([(r.T @ x / len(x) + 0.1 * w).flatten(), r.mean(0)]).norm().item()
    assert stop.numbers["gradient_norm"] == pytest.approx(norm, rel=1e-9)
    start = (y.reshape(len(x), -1).T @ x / len(x)).norm().item()  # the mean of y is 0, nearly
    assert stop.numbers["gradient_norm_at_start"] == pytest.approx(start, rel=1e-3)
    assert norm <= stop.numbers["threshold"] == 1e-4 * max(1, start) or start < 1
    assert f"{norm:.3g}" in stop.message
    assert "tolerance" in stop.advice
    assert module.certificate["relative_gap"] == stop.numbers["relative_gap"] < 1e-6


@pytest.mark.parametrize(("size", "optimizer"), [("full", GD), (32, MiniBatchSGD)])
def test_a_small_decrease_of_the_loss_is_no_reason(size, optimizer):
    """At η = 10⁻⁴ softmax regression decreases by less than 10⁻⁴ of the loss an update."""
    data = EmbeddedDataModule("digits", batch_size=size)
    optimizer = partial(optimizer, lr=1e-4)
    module = linear(data, CrossEntropy(), optimizer, Constant(), dtype=torch.float32)
    callback, losses = Convergence(every=20), Losses()
    fit(module, data, callback, losses, max_steps=600)
    assert module.stop is None
    assert module.updates == 600
    # It did look.
    seen = callback.state_dict()["gradient_turn"]["examples"]
    assert seen >= 560 * data.examples_per_update
    if size == "full":
        decrease = -np.diff(losses.seen) / losses.seen[:-1]
        assert 0 < decrease.min() < decrease.max() < 2e-4
        assert losses.seen[-1] > 2.0


def test_switched_off_it_only_certifies():
    data, module = diabetes()
    fit(module, data, Convergence(0, noise_floor=False), max_epochs=500, precision="64-true")
    assert module.stop is None
    assert module.updates == 500
    assert 0 <= module.certificate["gap"] < 1e-3
    assert module.certificate["weight_decay"] == 0.1
    without = linear(data, Doubled(), partial(GD, lr=0.3, weight_decay=0.1))
    fit(without, data, Convergence(0), max_epochs=5, precision="64-true")
    assert without.certificate is None


class Doubled(SquaredError):  # noqa: N818
    """A loss of somebody's own."""

    def forward(self, prediction, target):
        return 2 * super().forward(prediction, target)


def test_it_leaves_the_run_as_it_is():
    """Dropout, shuffling and parameters are the same, bit for bit, with and without it."""

    def train(*callbacks):
        seed_everything(0, verbose=False)
        data = EmbeddedDataModule("iris", batch_size=7)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(16, 3),
        )  # fmt: skip
        module = SupervisedModule(model, CrossEntropy(), partial(MiniBatchSGD, lr=0.05))
        fit(module, data, *callbacks, max_epochs=8)
        return module

    with_it, without = train(Convergence(every=5)), train()
    assert with_it.updates == without.updates
    for name, value in without.state_dict().items():
        assert torch.equal(value, with_it.state_dict()[name]), name


# ---------------------------------------------------------------------- stochastic


def test_interpolation_by_sgd_converges_by_the_confidence_bound():
    data = regression(n=4000, noise=0.0, batch_size=4)
    module = linear(data, SquaredError(), partial(MiniBatchSGD, lr=0.05), Constant())
    callback = Convergence(1e-4, every=100)
    fit(module, data, callback, max_epochs=20, precision="64-true")
    stop = module.stop
    assert stop.reason is StopReason.CONVERGED
    assert stop.numbers["confidence"] == 0.95
    inputs, targets = data.examples("train")
    r = module.model(inputs) - targets.reshape(len(inputs), -1)
    gradient = torch.cat([(r.T @ inputs / len(r)).flatten(), r.mean(0)])
    assert gradient.norm().item() <= stop.numbers["threshold"]
    assert gradient.norm().item() <= stop.numbers["gradient_norm"]


def noisy(schedule, lr=0.1, epochs=60, momentum=0.0, optimizer=SGD, **options):
    data = regression(batch_size=1, updates_per_sweep=100)
    optimizer = partial(optimizer, lr=lr, momentum=momentum)
    module = linear(data, SquaredError(), optimizer, schedule)
    fit(module, data, Convergence(every=500, **options), max_epochs=epochs, precision="64-true")
    return module


def test_noise_floor_at_a_constant_rate():
    module = noisy(Constant())
    stop = module.stop
    assert stop.reason is StopReason.NOISE_FLOOR
    assert module.updates < 60 * 200
    assert "not the optimum" in stop.message
    assert "0.01" in stop.advice
    assert "schedule" in stop.advice
    numbers = stop.numbers
    assert numbers["lr"] == 0.1
    assert numbers["rise_by_noise"] > 0.5 * numbers["fall_by_gradient"]
    # The gradient is far from what convergence asks.
    assert numbers["gradient_norm_squared"] > 1e-6


class Signs(SGD):
    @staticmethod
    def rule(params, grads, buffers, *, lr, **others):
        for p, g in zip(params, grads, strict=True):
            p -= lr * g.sign()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1.0, "epochs": 40, "optimizer": Signs},  # another rule
        {"lr": 2e-5, "epochs": 30},  # still makes progress
        {"noise_floor": False, "epochs": 20},
        {"schedule": Step(every=0.9), "epochs": 20},  # is still to fall
    ],
    ids=["signs", "small", "off", "falls"],
)
def test_no_noise_floor(options):
    module = noisy(**{"schedule": Constant(), **options})
    assert module.stop is None
    assert module.updates == options["epochs"] * 200


def test_noise_floor_with_momentum():
    assert noisy(Constant(), lr=0.01, momentum=0.9).stop.reason is StopReason.NOISE_FLOOR


def test_no_noise_floor_while_a_plateau_may_still_lower_the_rate():
    data = regression(batch_size=1, val_fraction=0.2)
    module = linear(data, SquaredError(), partial(SGD, lr=0.1), ReduceOnPlateau())
    fit(module, data, Convergence(every=500), max_epochs=20, precision="64-true")
    assert module.stop is None
    assert module.updates == 20 * 160


# ---------------------------------------------------------------------- patience


def test_stalled_after_so_many_validations_without_a_lower_loss():
    data = EmbeddedDataModule("wine", batch_size=1)
    module = linear(data, CrossEntropy(), partial(SGD, lr=0.5), Constant(), dtype=torch.float32)
    losses = []

    class Validations(Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(pl_module.validation["loss/val"])

    callback = Convergence(None, noise_floor=False, patience=3)
    fit(module, data, Validations(), callback, max_epochs=200)
    assert module.stop.reason is StopReason.STALLED
    best = int(np.argmin(losses))
    assert len(losses) - 1 - best == 3
    assert module.stop.numbers["best"] == min(losses)
    assert module.stop.numbers["validations"] == 3


# ---------------------------------------------------------------------- certificates


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "loss", "momentum", "schedule"),
    [
        ("digits", CrossEntropy(), 0.9, Constant()),
        ("breast_cancer", Hinge(), 0.0, Polynomial(power=2)),
    ],
    ids=["softmax", "svm"],
)
def test_a_linear_model_ends_where_its_gap_is_small_enough(source, loss, momentum, schedule):
    data = EmbeddedDataModule(source, batch_size="full", dtype="float64")
    optimizer = partial(GD, lr=0.3, weight_decay=0.01, momentum=momentum, nesterov=momentum > 0)
    module = linear(data, loss, optimizer, schedule)
    fit(
        module, data, Convergence(None, gap=1e-6), max_epochs=20_000, precision="64-true",
        check_val_every_n_epoch=20_000,
    )  # fmt: skip
    certificate, (x, y) = module.certificate, data.examples("train")
    assert module.stop.reason is StopReason.CONVERGED
    assert certificate["relative_gap"] == module.stop.numbers["relative_gap"] <= 1e-6
    # The last search for the bound, in passes over the data.
    assert certificate["work"] <= max(0.05 * module.updates, 2**26 / x.numel())
    with torch.no_grad():
        value = float(loss(module.model(x), y).mean())
        value += 0.005 * float(module.model.linear.weight.square().sum())
    assert certificate["primal"] == pytest.approx(value, rel=1e-12)
    assert value * (1 - 1e-6) <= certificate["dual"] <= value


def test_the_certificate_is_the_averages_and_leaves_the_parameters():
    data = EmbeddedDataModule("diabetes", batch_size="full", dtype="float64")
    optimizer = partial(GD, lr=0.3, weight_decay=0.1, step_size=ScheduleFree())
    module = linear(data, SquaredError(), optimizer, Constant())
    trainer = fit(module, data, Convergence(0), max_epochs=30, precision="64-true")
    made = trainer.optimizers[0]

    def gap():
        problem = LinearProblem.of(module.objective, made)
        return certify(problem, *module.model.parameters())

    average = gap().primal  # a run ends with it
    made.step_size.train(made)
    in_training = gap().primal
    assert module.certificate["primal"] == average != in_training


# ---------------------------------------------------------------------- resumed runs


def test_a_resumed_run_is_the_same_run(tmp_path):
    def start():
        seed_everything(0, verbose=False)
        data = regression(batch_size=1, updates_per_sweep=100)
        optimizer = partial(SGD, lr=0.1, weight_decay=0.01)
        return linear(data, SquaredError(), optimizer, Constant()), data

    whole, data = start()
    through = Convergence(every=500)
    fit(whole, data, through, max_epochs=60, precision="64-true")
    assert whole.stop.reason is StopReason.NOISE_FLOOR
    part, data = start()
    path = tmp_path / "part.ckpt"
    # The callback that saves comes last, as checkpoint callbacks do.
    fit(part, data, Convergence(every=500), StopAt(700, path), max_epochs=60, precision="64-true")
    assert part.updates == 700
    state = torch.load(path, weights_only=True)
    assert any("Convergence" in key for key in state["callbacks"])
    resumed, data = start()
    second = Convergence(every=500)
    fit(resumed, data, second, max_epochs=60, precision="64-true", checkpoint=path)
    assert resumed.updates == whole.updates
    for name, value in whole.stop.numbers.items():
        if name != "seconds":
            assert resumed.stop.numbers[name] == value, name
    assert second._test.first_norm == through._test.first_norm
    assert second._test.balances == through._test.balances


def test_the_search_for_a_bound_goes_on_in_a_resumed_run(tmp_path):
    def certificate(*callbacks, **options):
        data = EmbeddedDataModule("iris", batch_size="full", dtype="float64")
        module = linear(data, CrossEntropy(), partial(GD, lr=0.1, weight_decay=0.1))
        gap = Convergence(None, gap=1e-12, every=20)
        fit(module, data, gap, *callbacks, max_epochs=70, precision="64-true", **options)
        return {k: v for k, v in module.certificate.items() if not k.startswith("seconds")}

    path = tmp_path / "part.ckpt"
    whole, _ = certificate(), certificate(StopAt(50, path))
    assert torch.load(path, weights_only=True)["callbacks"]["Convergence"]["lower"] > 0
    assert certificate(checkpoint=path) == whole


@pytest.mark.parametrize("batch_size", [16, "full"])
def test_checks_keep_to_their_share_of_the_examples(batch_size, monkeypatch):
    """And stand at multiples of the updates that pay for the cheapest of them."""
    passed, at = [0], []
    gradient, look = Slopes.gradient, Convergence._look

    def counted(self, indices, draw):
        passed[0] += len(indices)
        return gradient(self, indices, draw)

    def noted(self, **options):
        at.append(self._module.updates)
        return look(self, **options)

    monkeypatch.setattr(Slopes, "gradient", counted)
    monkeypatch.setattr(Convergence, "_look", noted)
    data = EmbeddedDataModule("digits", batch_size=batch_size)
    kind = GD if batch_size == "full" else MiniBatchSGD
    module = SupervisedModule(MLP((8, 8), 10), CrossEntropy(), partial(kind, lr=0.01))
    callback = Convergence(share=0.05)
    fit(module, data, callback, max_steps=2600 if batch_size == 16 else 101, max_epochs=-1)
    assert module.stop is None
    if batch_size == "full":
        assert at == [0, 20, 40, 60, 80, 100, 101]  # and at the end
    else:
        # 1024 examples cost as many updates as 20 · 1024 / 16
        assert set(at) <= set(range(0, 4001, 1280))
        assert at == [0, 2560]
        assert passed[0] <= 0.05 * module.examples_seen + 16 * 32


def test_pairs_of_a_dataset_are_left_alone():
    pairs = TensorDataset(torch.randn(20, 3), torch.randn(20))
    module = SupervisedModule(Linear((3,), 1), SquaredError(), partial(SGD, lr=0.1))
    trainer = Trainer(callbacks=[Convergence()], max_epochs=2, **QUIET)
    trainer.fit(module, DataLoader(pairs, batch_size=5))
    assert module.stop is None
    assert module.certificate is None


@pytest.mark.parametrize("batch_size", [16, "full"])
def test_an_optimizer_without_momentum_options_is_watched_too(batch_size):
    data = EmbeddedDataModule("iris", batch_size=batch_size)
    module = SupervisedModule(
        Linear((4,), 3), CrossEntropy(), partial(torch.optim.Adam, lr=0.01), Constant()
    )
    trainer = fit(module, data, Convergence(every=10), max_epochs=40)
    assert trainer.global_step == module.total_updates > 0
