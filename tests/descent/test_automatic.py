"""What lr=auto stands for, in a run."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning import Trainer
from watched_runs import QUIET

import gdtrain
from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.analysis.guard import DivergenceGuard
from gdtrain.data import EmbeddedDataModule
from gdtrain.descent.training import train
from gdtrain.losses import CrossEntropy, Hinge, Logistic, Loss, SquaredError
from gdtrain.models import MLP, Linear
from gdtrain.schedules import Constant, Cosine
from gdtrain.step_sizes import BarzilaiBorwein, PolyakDoG
from gdtrain.step_sizes.automatic import SCHEDULE


def fitted(kind, batch_size, loss=None, schedule="auto", epochs=5, **options):
    data = EmbeddedDataModule("breast_cancer", batch_size=batch_size, val_fraction=0, seed=1)
    data.setup()
    torch.manual_seed(0)
    loss = CrossEntropy() if loss is None else loss
    model = Linear(data.input_shape, loss.outputs(data.num_classes))
    module = SupervisedModule(model, loss, partial(kind, **options), schedule, step_size="auto")
    trainer = Trainer(max_epochs=epochs, limit_val_batches=0, **QUIET)
    trainer.fit(module, datamodule=data)
    return module, trainer.optimizers[0].step_size


@pytest.mark.parametrize(
    ("kind", "size", "loss", "options", "gain"),
    [
        (SGD, 1, None, {}, 1.0),
        (MiniBatchSGD, 32, None, {"momentum": 0.9, "nesterov": True}, 10.0),
        (MiniBatchSGD, 32, None, {"momentum": 0.5, "dampening": 0.5}, 1.0),
        (GD, "full", Hinge(), {}, 1.0),
        (GD, "full", None, {"momentum": 0.5}, 2.0),
    ],
)
def test_auto_is_distance_over_gradients(kind, size, loss, options, gain):
    module, rule = fitted(kind, size, loss, **options)
    assert isinstance(rule, PolyakDoG)
    assert rule.gain == pytest.approx(gain)
    assert module.schedule == SCHEDULE


def test_on_the_full_batch_auto_is_barzilai_and_borweins():
    module, rule = fitted(GD, "full", epochs=30)
    assert isinstance(rule, BarzilaiBorwein)
    assert isinstance(module.schedule, Constant)


def test_a_schedule_of_ones_own_takes_the_place_of_the_automatic_one():
    module, _ = fitted(MiniBatchSGD, 32, schedule=Cosine())
    assert isinstance(module.schedule, Cosine)


def test_what_auto_cannot_have_is_told():
    model, loss = Linear((2,), 1), SquaredError()
    with pytest.raises(ValueError, match="must be a factory"):
        SupervisedModule(model, loss, SGD(model.parameters()), step_size="auto")
    with pytest.raises(ValueError, match="step_size must be a rule"):
        SupervisedModule(model, loss, SGD, step_size="fast")


def test_a_loss_below_zero_is_told_before_anything_has_moved():
    class Below(Loss):
        task = "regression"

        def __call__(self, prediction, target):
            return 0.5 * (prediction[:, 0] - target) ** 2 - 100

    model, x = Linear((2,), 1), torch.ones(8, 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="never below 0"):
        train(model, Below(), x, x[:, 0], SGD, step_size="auto", batch_size=1, epochs=2)
    assert all(map(torch.equal, model.parameters(), before))


def test_a_user_needs_no_rate():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((300, 3)) * [0.01, 1.0, 100.0]
    y = (x[:, 0] * 100 + x[:, 1] > 0).astype(int)
    for variant in ("gd", "sgd", "minibatch"):
        result = gdtrain.fit("linear", x, y, variant=variant)
        assert result.metrics["metric/accuracy/test"] > 0.9, variant
        rule = "BarzilaiBorwein" if variant == "gd" else "PolyakDoG"
        assert result.summary["lr"].startswith(rule)


# ---------------------------------------------------------------------------- hard for a rule


def objective_at_the_end(model, loss, x, y, batch_size, epochs, seed, step_size="auto", **options):
    torch.manual_seed(seed)
    made = model()
    made_by = partial(MiniBatchSGD, **options)
    schedule = "auto" if step_size == "auto" else None
    train(
        made, loss, x, y, made_by, schedule, batch_size=batch_size, epochs=epochs, seed=seed,
        step_size=step_size, guard=DivergenceGuard(),
    )  # fmt: skip
    with torch.no_grad():
        return float(loss(made(x), y).mean())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_few_updates_on_noisy_labels(momentum):
    from sklearn.datasets import make_classification

    x, y = make_classification(1000, 60, n_informative=8, flip_y=0.3, random_state=1)
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    run = partial(
        objective_at_the_end, lambda: Linear((60,), 1), Logistic(), x, torch.tensor(y), 8, 5
    )
    best = np.mean(
        [run(seed, None, momentum=momentum, lr=0.0316 * (1 - momentum)) for seed in (0, 1)]
    )
    ends = [run(seed, momentum=momentum) for seed in range(5)]
    assert max(ends) < best + 0.01
    assert max(ends) - min(ends) < 0.005


def test_rare_large_losses():
    r = np.random.default_rng(14)
    x = r.normal(size=(1500, 20))
    y = x @ r.normal(size=20) + r.normal(size=1500)
    y[r.permutation(1500)[:15]] *= 100
    y = (y - y.mean()) / y.std()
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    for seed in range(6):
        end = objective_at_the_end(lambda: Linear((20,), 1), SquaredError(), x, y, 128, 3, seed)
        assert end < 0.49  # 0 predicted for each: ½


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "bound"), [("tanh", 0.35), ("relu", 0.5)])
def test_deep_narrow_nets(activation, bound):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / (x.std(0) + 1e-9), dtype=torch.float32)
    model = partial(MLP, (64,), 10, hidden=[16] * 6, activation=activation)
    run = partial(objective_at_the_end, model, CrossEntropy(), x, torch.tensor(y), 32, 20)
    assert max(run(seed) for seed in range(3)) < bound
