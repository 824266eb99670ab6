"""The way back, inside the loop: states kept and put back, and the update that failed found."""

from functools import partial

import pytest
import torch
from lightning import Trainer
from torch import nn
from watched_runs import QUIET

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.analysis.guard import DivergenceGuard
from gdtrain.callbacks import Divergence
from gdtrain.data import EmbeddedDataModule
from gdtrain.descent.recovery import Recovery
from gdtrain.descent.stopping import StopReason
from gdtrain.descent.training import make_loop, train
from gdtrain.losses import CrossEntropy, SquaredError
from gdtrain.models import MLP
from gdtrain.schedules import ReduceOnPlateau


class Noisy(nn.Module):
    """Draws, and counts its updates; that of number `bad` has no finite gradient."""

    def __init__(self, bad=None):
        super().__init__()
        self.weight, self.bad = nn.Parameter(torch.ones(1, 1)), bad
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        root = (self.weight - self.weight.detach()).abs().sqrt()  # 0, with an infinite slope
        spoilt = self.training and self.count == self.bad
        self.count += self.training
        return (x + 0.1 * torch.randn_like(x)) @ self.weight + (root if spoilt else 0)


def made(updates=0, bad=None, schedule=None):
    """A loop after some updates."""
    torch.manual_seed(0)
    x = torch.ones(4, 1)
    kind, cut = partial(GD, lr=0.5, momentum=0.5), {"updates": 100, "updates_per_sweep": 3}
    loop = make_loop(Noisy(bad), SquaredError(), x, x[:, 0], kind, schedule, engine="eager", **cut)
    advance(loop, updates)
    return loop, Recovery()


def advance(loop, to):
    while loop.updates < to:
        loop.advance(loop.plan.block(loop.updates, min(3, to - loop.updates)))


def keep(recovery, loop, length=100, renew=False):
    return recovery.keep(loop, loop.objective, length, renew)


def state(loop):
    states = [v["momentum_buffer"].clone() for v in loop.optimizer.state.values()]
    return [*(t.clone() for t in loop.objective.model.state_dict().values()), *states]


def test_going_back_is_the_same_run_once_more():
    loop, recovery = made(4)
    assert keep(recovery, loop)
    before = state(loop)
    advance(loop, 9)
    after = state(loop)
    for _ in range(2):
        assert recovery.go_back() == 4
        assert state(loop) == before
        assert recovery.locate(loop, loop.objective, 9) == 9  # nothing fails: with the same noise
        assert state(loop) == after


@pytest.mark.parametrize("bad", range(2, 12))
def test_the_update_that_failed_is_found(bad):
    loop, recovery = made(2, bad)
    keep(recovery, loop)
    advance(loop, 12)
    assert not loop.watched.is_finite()
    assert recovery.locate(loop, loop.objective, 12) == bad
    assert loop.watched.is_finite()  # in the state before it
    assert loop.objective.model.count.item() == bad


def test_what_is_spoilt_from_the_start_is_found_there():
    loop, recovery = made(3)
    nn.init.constant_(loop.objective.model.weight, torch.nan)
    keep(recovery, loop)
    advance(loop, 9)
    assert recovery.locate(loop, loop.objective, 9) == 3


def test_which_states_are_kept():
    loop, recovery = made(1)
    assert keep(recovery, loop, 8)
    advance(loop, 5)
    assert not keep(recovery, loop, 8)  # no stretch is over
    assert recovery.latest.update == 1
    assert not keep(recovery, loop, 8, renew=True)
    assert recovery.latest.update == 5
    advance(loop, 9)
    assert keep(recovery, loop, 8)
    places = recovery.first, recovery.good, recovery.pending, recovery.latest
    assert [kept.update for kept in places] == [1, 1, 9, 9]
    recovery.good = recovery.pending
    assert recovery.go_back() == 9
    assert recovery.go_back(to_the_first=True) == recovery.go_back() == 1
    recovery.begin_again(loop, loop.objective)
    assert recovery.first is recovery.good is recovery.pending is recovery.latest
    assert recovery.first.update == 9


def test_a_schedule_that_remembers_is_never_asked_what_it_was():
    loop, recovery = made(1, schedule=ReduceOnPlateau(patience=0))
    keep(recovery, loop)
    advance(loop, 3)
    keep(recovery, loop)
    assert recovery.latest.update == 3


def test_its_state_is_plain_and_goes_on(tmp_path):
    loop, recovery = made(3)
    keep(recovery, loop, 4)
    advance(loop, 8)
    keep(recovery, loop, 4)
    torch.save(recovery.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other, rest = made(1)
    rest.load_state_dict(saved)
    assert rest.state_dict() == saved  # before there is a model, too
    rest.resume(other.objective, other.optimizer)
    assert rest.good is rest.first
    assert rest.pending is rest.latest
    for one, way in ((loop, recovery), (other, rest)):
        assert way.go_back() == 3
        one.state.updates = 3
        advance(one, 5)
    assert state(other) == state(loop)


# ---------------------------------------------------------------------- with and without Lightning

KINDS = {"full": (GD, 100.0, 80), 1: (SGD, 10.0, 3), 16: (MiniBatchSGD, 100.0, 20)}


def flowers(batch_size, engine="auto"):
    """Model, loss and optimizer of a run that diverges, its data, and arguments of both ways."""
    kind, lr, epochs = KINDS[batch_size]
    torch.manual_seed(0)
    parts = MLP((4,), 3, hidden=[16]), CrossEntropy(), partial(kind, lr=lr, momentum=0.5)
    options = {"batch_size": batch_size, "seed": 7}
    data = EmbeddedDataModule("iris", val_fraction=0, test_fraction=0, **options)
    data.setup()
    return parts, data, options | {"engine": engine, "epochs": epochs}


def alone(batch_size, engine="auto", **guard):
    (model, loss, optimizer), data, options = flowers(batch_size, engine)
    options["guard"] = DivergenceGuard(**guard)
    options["guard"].rows = data.split["train"]  # for messages alone
    return (model, loss, *data.examples("train"), optimizer), options


def left(loop):
    parameters = [p.tolist() for p in loop.objective.model.parameters()]
    return parameters, loop.state.rate_cut, loop.updates, loop.state.examples_seen


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
@pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero")
@pytest.mark.parametrize(
    ("batch_size", "engine"),
    [*((size, engine) for size in KINDS for engine in ("eager", "native")), (16, "compiled")],
)
def test_a_run_that_recovers_is_the_same_without_lightning(batch_size, engine):
    parts, data, options = flowers(batch_size, engine)
    module, watch = SupervisedModule(*parts, engine=engine), Divergence()
    trainer = Trainer(max_epochs=options["epochs"], callbacks=[watch], **QUIET)
    trainer.fit(module, datamodule=data)
    arguments, options = alone(batch_size, engine)
    run = train(*arguments, **options)
    assert left(run.loop) == left(module.loop)
    assert run.loop.state.rate_cut < 1
    assert run.loop.state.engine == module.engine_in_use == engine
    assert repr(options["guard"].events) == repr(watch.events)
    assert len(run.losses) == run.loop.updates == trainer.global_step


@pytest.mark.parametrize("at", [5, 40, 100])
def test_it_goes_on_from_its_state_as_the_same_run(at, tmp_path):
    """Before, between and after recoveries."""
    arguments, options = alone(16)
    whole = train(*arguments, **options).loop
    model, *_ = arguments
    arguments, options = alone(16)
    half = make_loop(*arguments, **options)
    while half.updates < at:
        half.advance()
    optimizer, model = half.optimizer.state_dict(), half.objective.model.state_dict()
    torch.save([half.state_dict(), optimizer, model], tmp_path / "run.pt")
    saved, optimizer, model = torch.load(tmp_path / "run.pt", weights_only=True)
    arguments, options = alone(16)
    rest = make_loop(*arguments, **options)
    rest.objective.model.load_state_dict(model)
    rest.optimizer.load_state_dict(optimizer)
    rest.load_state_dict(saved)
    while not rest.done:
        rest.advance()
    rest.finish()
    assert left(rest) == left(whole)
    assert repr(rest.guard.events) == repr(whole.guard.events)
    assert len(whole.guard.events) == 2


def test_a_guard_that_stops_ends_the_loop():
    arguments, options = alone(16, action="stop")
    loop = train(*arguments, **options).loop
    assert loop.state.stop.reason is StopReason.NON_FINITE
    assert loop.updates < loop.total_updates
    assert loop.done
    with pytest.raises(ValueError, match="Received: NON_FINITE: The loss was nan at update"):
        loop.advance()


def test_a_trial_is_not_guarded():
    arguments, options = alone(16)
    loop = make_loop(*arguments, **options)
    loop.advance()
    with loop.trial():
        while loop.updates < 200:
            loop.advance()
    assert not loop.guard.events
    assert loop.state.rate_cut == 1.0
