"""The way back, on a run of a dozen lines of plain PyTorch."""

import copy

import pytest
import torch
from torch import nn

from gdtrain.descent.recovery import Recovery
from gdtrain.schedules import Constant, ReduceOnPlateau


class Plain:
    """θ ← θ − 0.5 ∇(½ θ²), with momentum and noise; `bad` spoils θ in one update."""

    def __init__(self, bad=None, schedule=None):
        self.model = nn.Linear(1, 1, bias=False)
        self.model.register_buffer("count", torch.zeros(1))
        nn.init.ones_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.5)
        self.schedule = schedule or Constant()
        self.updates, self.bad, self.made = 0, bad, []

    def repeat(self, update, count):
        count = min(count, 3)  # as a block that ends
        for t in range(update, update + count):
            theta = self.model.weight
            theta.grad = theta.detach() + 0.1 * torch.randn(1, 1)
            self.optimizer.step()
            self.model.count += 1
            if t == self.bad:
                with torch.no_grad():
                    theta.fill_(torch.nan)
            self.made.append(t)
        return count

    def advance(self, count):
        while count:
            made = self.repeat(self.updates, count)
            self.updates, count = self.updates + made, count - made

    def is_finite(self):
        return bool(torch.isfinite(self.model.weight).all())

    def state(self):
        states = [v["momentum_buffer"].clone() for v in self.optimizer.state.values()]
        return [self.model.weight.detach().clone(), self.model.count.clone(), *states]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_going_back_is_the_same_run_once_more():
    torch.manual_seed(0)
    run, recovery = Plain(), Recovery()
    run.advance(4)
    assert recovery.keep(run, length=8, renew=False)
    before = run.state()
    run.advance(5)
    after = run.state()
    assert recovery.go_back(run) == 4
    assert_equal(run.state(), before)
    assert run.repeat(4, 3) + run.repeat(7, 2) == 5  # with the same noise
    assert_equal(run.state(), after)
    recovery.go_back(run)
    assert_equal(run.state(), before)


@pytest.mark.parametrize("bad", range(2, 12))
def test_the_update_that_failed_is_found(bad):
    torch.manual_seed(0)
    run, recovery = Plain(bad), Recovery()
    run.advance(2)
    recovery.keep(run, length=100, renew=False)
    run.advance(10)
    assert not run.is_finite()
    assert recovery.locate(run, 12) == bad
    assert run.is_finite()  # in the state before it
    assert run.model.count.item() == bad


def test_where_nothing_else_is_spoilt_it_is_the_update_itself():
    run, recovery = Plain(), Recovery()
    recovery.keep(run, length=100, renew=False)
    run.advance(9)
    assert recovery.locate(run, 7) == 7
    assert run.model.count.item() == 7
    run = Plain()
    nn.init.constant_(run.model.weight, torch.nan)  # from the start
    recovery.forget()
    recovery.keep(run, length=100, renew=False)
    run.advance(9)
    assert recovery.locate(run, 9) == 0


def test_which_states_are_kept():
    run, recovery = Plain(), Recovery()
    assert recovery.keep(run, length=8, renew=False)
    run.advance(4)
    assert not recovery.keep(run, length=8, renew=False)  # no stretch is over
    assert recovery.latest.update == 0
    assert not recovery.keep(run, length=8, renew=True)
    assert recovery.latest.update == 4
    run.advance(4)
    assert recovery.keep(run, length=8, renew=False)
    places = recovery.first, recovery.good, recovery.pending, recovery.latest
    assert [kept.update for kept in places] == [0, 0, 8, 8]
    recovery.promote()
    assert recovery.go_back(run) == 8
    assert recovery.go_back(run, to_the_first=True) == recovery.go_back(run) == 0
    recovery.begin_again(run)
    assert recovery.first is recovery.good is recovery.pending is recovery.latest
    assert recovery.first.update == 8


def test_a_schedule_that_remembers_is_kept_with_the_state():
    run, recovery = Plain(schedule=ReduceOnPlateau(patience=0)), Recovery()
    recovery.keep(run, length=100, renew=False)
    run.advance(3)
    recovery.keep(run, length=100, renew=False)
    assert recovery.latest.update == 3  # what it was cannot be asked again
    mine = run.schedule
    recovery.locate(run, 5)
    assert run.schedule is mine


def test_its_state_is_plain_and_goes_on(tmp_path):
    torch.manual_seed(0)
    run, recovery = Plain(), Recovery()
    run.advance(3)
    recovery.keep(run, length=4, renew=False)
    run.advance(5)
    recovery.keep(run, length=4, renew=False)
    torch.save(recovery.state_dict(), tmp_path / "state.pt")
    rest = Recovery()
    rest.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert rest.good is rest.first
    assert rest.pending is rest.latest
    other = copy.deepcopy(run)
    for one, way in ((run, recovery), (other, rest)):
        assert way.go_back(one) == 3
        one.repeat(3, 2)
    assert_equal(other.state(), run.state())
