import contenders
import numpy as np
import pytest
import torch
from contenders import fit, plain_lightning, plain_loop, scikit_learn
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from throughput import resident
from torch.nn import functional as F

from gdtrain.callbacks import LossCurves, ProgressLine
from gdtrain.losses import CrossEntropy
from gdtrain.models import MLP


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator)
    y = torch.arange(24) % 3
    torch.manual_seed(0)
    return MLP((5,), 3, hidden=(7,)), x, y


@pytest.fixture
def trainers(monkeypatch):
    made = []

    class Noted(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(contenders, "Trainer", Noted)
    return made


def by_hand(model, x, y, lr, momentum, updates):
    """Full-batch descent in float64."""
    weights = [p.detach().double().clone().requires_grad_() for p in model.parameters()]
    buffers = [torch.zeros_like(w) for w in weights]
    for _ in range(updates):
        w1, b1, w2, b2 = weights
        scores = torch.relu(x.double() @ w1.T + b1) @ w2.T + b2
        loss = F.cross_entropy(scores, y)
        for w, v, g in zip(weights, buffers, torch.autograd.grad(loss, weights), strict=True):
            v.mul_(momentum).add_(g)
            w.data -= lr * v
    return torch.cat([w.detach().reshape(-1) for w in weights])


def flat(model):
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def test_all_contenders_do_the_same_work(problem):
    model, x, y = problem
    start = flat(model)
    expected = by_hand(model, x, y, 0.2, 0.9, 5)
    options = {"lr": 0.2, "momentum": 0.9, "updates": 5}
    data = resident(x.numpy(), y.numpy(), "full")
    data.updates_per_sweep = 1  # as the others: what comes after the first step is timed
    made = [
        plain_lightning(model, F.cross_entropy, x, y, batch_size=24, **options),
        plain_loop(model, F.cross_entropy, x, y, batch_size=24, **options),
        fit(model, CrossEntropy(), data, **options),
    ]
    for timing in made:
        torch.testing.assert_close(flat(timing.model), expected, rtol=1e-5, atol=1e-6)
        assert timing.whole_updates == 5
        assert timing.updates == 4  # after the first
        assert 0 < timing.seconds < timing.whole_seconds
    assert torch.equal(flat(model), start)


def test_plain_lightning_is_what_people_write(problem, trainers):
    model, x, y = problem
    plain_lightning(model, F.cross_entropy, x, y, batch_size=1, lr=0.1, updates=60)
    (trainer,) = trainers
    assert trainer.lightning_module.automatic_optimization
    assert isinstance(trainer.logger, TensorBoardLogger)
    assert trainer.progress_bar_callback.is_enabled
    assert "loss" in trainer.logged_metrics
    loader = trainer.train_dataloader
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)
    assert loader.batch_size == 1
    assert len(loader.dataset) == 24


@pytest.mark.parametrize("logged", [True, False])
def test_ours_is_an_ordinary_fit(problem, trainers, logged):
    model, x, y = problem
    data = resident(x.numpy(), y.numpy(), 1)
    timing = fit(model, CrossEntropy(), data, lr=0.1, epochs=3, logged=logged, engine="eager")
    (trainer,) = trainers
    assert trainer.fit_loop.epoch_loop.total_batch_idx + 1 < trainer.global_step / 4  # sweeps
    assert timing.whole_updates == trainer.global_step == 72
    assert timing.engine == "eager"
    assert bool(trainer.loggers) == logged
    assert any(isinstance(c, LossCurves) for c in trainer.callbacks) == logged
    assert any(isinstance(c, ProgressLine) for c in trainer.callbacks)


def test_seconds_end_a_run(problem):
    model, x, y = problem
    data = resident(x.numpy(), y.numpy(), 1)
    for timing in (
        plain_lightning(model, F.cross_entropy, x, y, batch_size=1, lr=0.1, seconds=0.05),
        plain_loop(model, F.cross_entropy, x, y, batch_size=1, lr=0.1, seconds=0.05),
        fit(model, CrossEntropy(), data, lr=0.1, seconds=0.05),
    ):
        assert 0.05 <= timing.seconds < 5
        assert timing.updates > 1


def test_the_loop_visits_every_example_of_a_pass(problem):
    model, _, _ = problem
    x = torch.eye(5)
    seen = []

    def loss(scores, y):
        seen.extend(y.tolist())
        return F.cross_entropy(scores, y % 3)

    plain_loop(model, loss, x, torch.arange(5), batch_size=2, lr=0.1, updates=6)
    assert len(seen) == 10
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))


@pytest.mark.parametrize("classes", [2, 3])
def test_scikit_learn_makes_all_its_passes_in_float32(classes):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)).astype(np.float32), np.arange(60) % classes
    seconds, estimator = scikit_learn(x, y, loss="log_loss", lr=0.01, weight_decay=0.1, epochs=7)
    assert seconds > 0
    assert estimator.n_iter_ == 7
    assert estimator.coef_.dtype == np.float32
    assert estimator.coef_.shape == (1 if classes == 2 else classes, 4)
    assert not estimator.average
    # λ/2 ‖w‖² pulls: without it the weights are longer.
    _, free = scikit_learn(x, y, loss="log_loss", lr=0.01, weight_decay=0.0, epochs=7)
    assert np.linalg.norm(free.coef_) > np.linalg.norm(estimator.coef_)
