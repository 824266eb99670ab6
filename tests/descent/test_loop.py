"""The descent by itself: by hand, in pieces, tried and taken back, and as through Lightning."""

import copy
from contextlib import suppress
from functools import partial

import pytest
import torch
from lightning import Trainer
from torch import nn
from watched_runs import QUIET

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.data import EmbeddedDataModule
from gdtrain.descent.loop import Loop
from gdtrain.descent.plan import Plan
from gdtrain.descent.preparation import make_optimizer
from gdtrain.descent.training import make_loop, train
from gdtrain.generators import RandomStates
from gdtrain.losses import CrossEntropy, SquaredError
from gdtrain.models import MLP
from gdtrain.models.dropout import Dropout
from gdtrain.objective import Objective
from gdtrain.schedules import Cosine, ReduceOnPlateau
from gdtrain.step_sizes import BarzilaiBorwein, ScheduleFree

OPTIMIZERS = {"full": GD, 1: SGD, 8: MiniBatchSGD}


def examples(n=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] + 0.5 * torch.randn(n, generator=generator) > 0).long()


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def made(batch_size=8, engine="auto", updates=50, model=None, **options):
    torch.manual_seed(0)
    options = {"updates_per_sweep": 10, **options}
    model = MLP((4,), 2, hidden=[6]) if model is None else model()
    rate = {} if "step_size" in options else {"lr": 0.05, "momentum": 0.9}
    return make_loop(
        model,
        CrossEntropy(),
        *examples(),
        partial(OPTIMIZERS[batch_size], **rate),
        batch_size=batch_size,
        engine=engine,
        updates=updates,
        **options,
    )


def run(loop, until=None):
    """Losses and rates of the updates up to one."""
    losses, rates = [], []
    while not loop.done and (until is None or loop.updates < until):
        output = loop.advance()
        losses.append(output.losses)
        rates.append(output.rates)
    return torch.cat(losses), torch.cat(rates)


# --------------------------------------------------------------------------- by hand


def test_three_updates_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    x, y = torch.tensor([[1.0]]), torch.tensor([1.0])
    optimizer = make_optimizer(lambda groups: GD(groups, lr=0.5), model, SquaredError())
    objective = Objective(model, SquaredError(), x, y)
    loop = Loop(objective, optimizer, Plan(1, 1, total=3, updates_per_sweep=2))
    first = loop.advance()
    assert (first.first, first.updates, first.examples) == (0, 2, 1)
    assert first.losses.tolist() == [0.5, 0.125]  # ½r² at w = 0, ½
    assert first.rates.tolist() == [0.5, 0.5]
    assert (loop.updates, loop.state.examples_seen, loop.done) == (2, 2, False)
    last = loop.advance()
    assert (last.first, last.losses.tolist()) == (2, [0.03125])  # at w = ¾
    assert model.weight.item() == 0.875
    assert loop.done
    with pytest.raises(ValueError, match="3 updates made of 3"):
        loop.advance()


def test_the_schedule_is_a_function_of_the_update_number():
    loop = made("full", updates=4, schedule=Cosine())
    _, rates = run(loop)
    expected = 0.05 * Cosine()(torch.arange(4, dtype=torch.float64), 4, 1)
    assert rates.tolist() == expected.tolist()
    loop.state.rate_cut = 0.5
    assert loop.rate_factors(0, 4).tolist() == (0.5 * expected / 0.05).tolist()


def test_without_an_end_a_schedule_that_asks_for_one_is_refused():
    loop = made(updates=None, schedule=Cosine())
    with pytest.raises(ValueError, match="is a function of the planned updates"):
        loop.advance()


def test_a_run_needs_an_end():
    with pytest.raises(ValueError, match="A run needs an end"):
        train(nn.Linear(4, 2), CrossEntropy(), *examples(), GD)


def test_there_is_no_such_engine():
    with pytest.raises(ValueError, match="engine must be one of auto, eager"):
        made(engine="fast")


# --------------------------------------------------------------------------- trial and state


class Noisy(nn.Module):
    """Draws from PyTorch's generator, and from gdtrain's dropout."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 2), Dropout(0.3)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.linear(self.dropout(self.norm(x)) + 0.1 * torch.randn_like(x))


KINDS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"engine": "eager", "model": Noisy},
        {"schedule": ReduceOnPlateau(patience=1)},
        {"batch_size": "full", "step_size": BarzilaiBorwein()},
        {"step_size": "auto", "updates": 200},
    ],
    ids=["plain", "noisy", "plateau", "rule", "auto"],
)


@KINDS
def test_a_trial_leaves_no_trace(options):
    loop, other = made(**options), made(**options)
    torch.manual_seed(3)
    run(loop, 20)
    torch.manual_seed(3)
    run(other, 20)
    states = RandomStates.now()
    with suppress(ArithmeticError), loop.trial():
        run(loop, 40)
        if isinstance(loop.schedule, ReduceOnPlateau):
            for value in (1.0, 2.0, 3.0):
                loop.schedule.observe(value)
        loop.state.rate_cut = 0.1
        raise ArithmeticError
    assert RandomStates.now() == states
    assert loop.updates == other.updates
    rest = run(loop)
    states.restore()
    for one, expected in zip(rest, run(other), strict=True):
        assert torch.equal(one, expected)


@KINDS
def test_a_run_that_goes_on_from_its_state_is_the_same_run(options, tmp_path):
    whole = made(**options)
    run(whole, 20)
    saved = {
        "loop": whole.state_dict(),
        "model": whole.objective.model.state_dict(),
        "optimizer": whole.optimizer.state_dict(),
    }
    torch.save(saved, tmp_path / "run.pt")
    expected = run(whole)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again = made(**options)
    again.objective.model.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["loop"])
    for one, other in zip(run(again), expected, strict=True):
        assert torch.equal(one, other)
    assert again.updates == whole.updates
    assert again.state.examples_seen == whole.state.examples_seen
    assert torch.equal(parameters(again.objective.model), parameters(whole.objective.model))


def test_an_average_is_shown_within_and_at_the_end():
    loop = made("full", step_size=ScheduleFree())
    run(loop)
    at = parameters(loop.objective.model)
    assert loop.average.is_hidden
    with loop.average.shown():
        average = parameters(loop.objective.model)
    assert not torch.equal(at, average)
    assert torch.equal(parameters(loop.objective.model), at)
    loop.finish()
    assert torch.equal(parameters(loop.objective.model), average)
    assert not loop.average.is_hidden


def test_a_parameter_that_is_frozen_is_left_alone():
    loop = made()
    run(loop, 10)
    assert loop.state.engine == "native"
    first, *_ = loop.objective.model.parameters()
    first.requires_grad_(False)
    before = first.detach().clone()
    run(loop, 20)
    assert torch.equal(first, before)
    first.requires_grad_(True)
    run(loop)
    assert not torch.equal(first, before)


# --------------------------------------------------------------------------- Lightning


VARIANTS = {
    "gd": (GD, "full", 6),
    "sgd": (SGD, 1, 2),
    "minibatch": (MiniBatchSGD, 32, 3),
}


def both(data, batch_size, epochs, model, factory, schedule, **options):
    """The module of a run through Lightning, and the loop of the same run without."""
    data = EmbeddedDataModule(data, batch_size=batch_size, seed=7)
    plain = copy.deepcopy(model)
    module = SupervisedModule(model, CrossEntropy(), factory, schedule, **options)
    trainer = Trainer(max_epochs=epochs, **QUIET)
    trainer.fit(module, datamodule=data)
    arguments = plain, CrossEntropy(), *data.examples("train"), factory, schedule
    found = train(*arguments, batch_size=batch_size, epochs=epochs, seed=7, **options)
    assert found.loop.updates == module.updates == trainer.global_step
    assert found.loop.state.examples_seen == module.examples_seen
    assert torch.equal(parameters(plain), parameters(model))
    return module, found.loop


@pytest.mark.parametrize("engine", ["eager", "native", "compiled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_run_as_through_lightning(variant, engine):
    kind, batch_size, epochs = VARIANTS[variant]
    factory = partial(kind, lr=0.05, momentum=0.9, weight_decay=1e-3)
    torch.manual_seed(0)
    model = MLP((64,), 10, hidden=[16])
    module, loop = both("digits", batch_size, epochs, model, factory, Cosine(), engine=engine)
    assert loop.state.engine == module.engine_in_use == engine


@pytest.mark.parametrize("variant", VARIANTS)
def test_lr_auto_is_the_same_run_as_through_lightning(variant):
    kind, batch_size, epochs = VARIANTS[variant]
    torch.manual_seed(0)
    model = MLP((4,), 3, hidden=[8])
    both("iris", batch_size, 5 * epochs, model, kind, "auto", step_size="auto")
