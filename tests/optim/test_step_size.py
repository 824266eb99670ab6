"""The optimizers with a step-size rule: closures, random numbers, state, schedules, refusals."""

import copy
import math
import pickle

import pytest
import torch
from optimizers import EVERY, STEP_SIZES, through_a_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from gdtrain.optim import GD, SGD, MiniBatchSGD
from gdtrain.step_sizes import (
    Armijo,
    BarzilaiBorwein,
    DoG,
    DoWG,
    InverseSmoothness,
    Needs,
    Polyak,
    PolyakDoG,
    ScheduleFree,
    StepSize,
    StochasticLineSearch,
    StochasticPolyak,
)


class Fixed(StepSize):
    """η = 0.5, after looking at other points."""

    def __init__(self, *others):
        self.others = others
        self.seen = []

    needs = Needs(values=True)

    def rate(self, context, memory):
        self.seen = [context.evaluate(rate) for rate in self.others]
        return 0.5


def parabola(optimizer, theta):
    """A closure of ½‖θ‖²."""

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (theta**2).sum()
        loss.backward()
        return loss

    return closure


def one(rule, optimizer=GD, value=4.0, **arguments):
    theta = nn.Parameter(torch.tensor([value]))
    made = optimizer([theta], step_size=rule, **arguments)
    return theta, made, parabola(made, theta)


# ------------------------------------------------------------ lr="auto"


def test_auto_is_barzilai_borwein_for_gd_and_distance_over_gradients_for_the_others():
    theta = nn.Parameter(torch.ones(1))
    made = GD([theta], lr="auto")
    assert repr(made.step_size) == repr(BarzilaiBorwein(memory=30))
    assert made.param_groups[0]["lr"] == 1.0
    for optimizer in (SGD, MiniBatchSGD):
        made = optimizer([theta], lr="auto", total_updates=10)
        assert repr(made.step_size) == repr(PolyakDoG(decay=True))
        assert made.param_groups[0]["lr"] == 1.0
        made = optimizer([theta], lr="auto", momentum=0.5, nesterov=True, total_updates=10)
        assert repr(made.step_size) == repr(PolyakDoG(gain=2.0, decay=True))
        with pytest.raises(ValueError, match="needs total_updates"):
            optimizer([theta], lr="auto")


# ------------------------------------------------------------ refusals


@EVERY
def test_a_step_without_a_closure_is_refused_and_nothing_changes(optimizer):
    theta, made, _ = one(DoWG(), optimizer)
    theta.grad = torch.ones(1)
    with pytest.raises(ValueError, match=r"step\(\) needs a closure with DoWG.*Received: none"):
        made.step()
    assert theta.item() == 4
    assert not made.state


@pytest.mark.parametrize("rule", [Armijo, BarzilaiBorwein, Polyak, InverseSmoothness])
@pytest.mark.parametrize("optimizer", [SGD, MiniBatchSGD])
def test_full_batch_rules_are_refused_on_batches(rule, optimizer):
    with pytest.raises(ValueError, match=f"{rule.__name__} is a rule for full-batch.*Use it with"):
        one(rule(), optimizer)


@pytest.mark.parametrize(
    "rule", [Armijo, BarzilaiBorwein, Polyak, DoG, DoWG, StochasticLineSearch, ScheduleFree]
)
def test_momentum_is_refused_where_the_rule_does_not_allow_it(rule):
    with pytest.raises(ValueError, match=f"{rule.__name__} does not go with momentum.*0.9"):
        one(rule(), momentum=0.9)
    theta = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="does not go with momentum"):
        GD([{"params": [theta], "momentum": 0.9}], step_size=rule())


def test_nesterov_is_refused_by_stochastic_polyak_and_allowed_by_a_given_smoothness():
    one(StochasticPolyak(1.0), momentum=0.9)
    with pytest.raises(ValueError, match="StochasticPolyak does not go with Nesterov"):
        one(StochasticPolyak(1.0), momentum=0.9, nesterov=True)
    theta, made, closure = one(InverseSmoothness(2.0), momentum=0.5, nesterov=True)
    made.step(closure)
    assert theta.item() == 4 - 0.5 * (4 + 0.5 * 4)


@EVERY
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_size": DoWG(), "maximize": True}, "DoWG descends: maximize=True is refused"),
        ({"step_size": DoWG(), "differentiable": True}, "does not go with differentiable"),
        ({"step_size": DoWG(), "lr": 0.1}, "two owners: DoWG computes it, and lr=0.1 sets it"),
        ({"step_size": DoWG(), "lr": torch.tensor(1.0)}, "lr must be a number. Received: a tensor"),
        ({"step_size": DoWG(), "lr": "auto"}, "two owners. Leave one out"),
        ({"step_size": "dowg"}, "must be a gdtrain.step_sizes.StepSize. Received: 'dowg'"),
        ({"step_size": DoWG}, "must be a gdtrain.step_sizes.StepSize"),
        ({"lr": "fast"}, "lr must be a number or 'auto'. Received: lr='fast'"),
        ({"step_size": DoWG(decay="linear")}, "needs total_updates"),
        ({"step_size": DoWG(), "total_updates": 0}, "total_updates must be a whole number"),
        ({"step_size": DoWG(), "total_updates": 1.5}, "total_updates must be a whole number"),
    ],
    ids=str,
)
def test_arguments_that_contradict_the_rule_are_refused(optimizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        optimizer([nn.Parameter(torch.ones(1))], **arguments)


def test_lr_may_be_left_out_or_one():
    for lr in ({}, {"lr": 1.0}, {"lr": 1}, {"lr": 1e-3}):
        _, made, _ = one(Armijo(), **lr)
        assert made.param_groups[0]["lr"] == 1.0
    _, made, _ = one(StochasticPolyak(), lr=0.3)  # lr is its cap
    assert made.param_groups[0]["lr"] == 0.3


def test_groups_share_one_lr():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"one lr\. Received: a group with lr=0\.1"):
        SGD([{"params": [a]}, {"params": [b], "lr": 0.1}], step_size=DoWG())
    made = SGD([{"params": [a]}, {"params": [b]}], step_size=DoWG())
    made.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match="one lr"):
        made.step(parabola(made, a))
    with pytest.raises(ValueError, match="lr='auto' is for all groups"):
        SGD([{"params": [a], "lr": "auto"}])


def test_a_grad_scaler_is_refused_and_left_usable():
    for mode, message in (
        ({}, r"needs a closure.*A GradScaler gives none"),
        ({"fused": True}, "DoWG does not go with a GradScaler"),  # then the scaler leaves marks
    ):
        theta, made, _ = one(DoWG(), **mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale((theta**2).sum()).backward()
        with pytest.raises(ValueError, match=message):
            scaler.step(made)
        assert not hasattr(made, "found_inf")
        assert theta.item() == 4


def test_step_by_rule_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="needs a rule"):
        GD([nn.Parameter(torch.ones(1))]).step_by_rule(1.0, lambda: 1.0)


# ------------------------------------------------------------ the closure


@EVERY
def test_the_closure_runs_once_and_its_loss_is_returned(optimizer):
    theta, made, closure = one(Fixed(), optimizer)
    assert made.step(closure).item() == 8.0
    assert theta.item() == 2.0
    assert made.last_rate == 0.5


def test_last_rate_is_nan_before_the_first_update_and_lr_without_a_rule():
    _, made, _ = one(Fixed())
    assert math.isnan(made.last_rate)
    assert GD([nn.Parameter(torch.ones(1))], lr=0.25).last_rate == 0.25


@pytest.mark.parametrize("set_to_none", [True, False])
def test_looking_elsewhere_leaves_gradients_that_a_closure_zeroes_in_place(set_to_none):
    theta = nn.Parameter(torch.tensor([4.0]))
    rule = Fixed(1.0, 0.25)
    made = GD([theta], step_size=rule)

    def closure():
        made.zero_grad(set_to_none=set_to_none)
        loss = 0.5 * (theta**2).sum()
        loss.backward()
        return loss

    for at, after in ((4.0, 2.0), (2.0, 1.0)):
        made.step(closure)
        assert rule.seen == [0.0, 0.5 * (0.75 * at) ** 2]
        assert theta.item() == after
        assert theta.grad.item() == at


def test_trials_have_the_dropout_of_the_gradient_and_leave_the_stream_alone():
    layer, x = nn.Dropout(0.5), torch.randn(64)
    theta = nn.Parameter(torch.randn(64))
    rule = Fixed(0.0, 0.0)
    states = []
    for others in ((0.0, 0.0), ()):
        rule = Fixed(*others)
        made = SGD([theta], step_size=rule)

        def closure(made=made):
            made.zero_grad()
            loss = (layer(x * theta) ** 2).sum()
            loss.backward()
            return loss

        torch.manual_seed(1)
        value = made.step(closure).item()
        assert rule.seen == [value] * len(others)  # at θ itself: the same numbers
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(1)
    masks = [layer(torch.ones(64)) for _ in range(2)]
    assert not torch.equal(*masks)  # other numbers would have shown


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_is_updated_from_what_is_not_finite(bad):
    theta, made, closure = one(DoWG(), SGD)
    made.step(closure)
    before, state = theta.item(), copy.deepcopy(made.state_dict())

    def broken():
        return closure() * bad

    made.step(broken)
    assert theta.item() == before
    assert math.isnan(made.last_rate)

    def broken_gradient():
        loss = closure()
        theta.grad.fill_(bad)
        return loss

    made.step(broken_gradient)
    assert theta.item() == before
    made.step(closure)
    assert theta.item() != before
    assert math.isfinite(made.last_rate)
    assert state["param_groups"][0]["step_size"]["updates"] == 1
    assert made.param_groups[0]["step_size"]["updates"] == 4


def test_hooks_run_around_an_update_by_a_rule():
    _, made, closure = one(Fixed())
    seen = []
    made.register_step_pre_hook(lambda *_: seen.append("before"))
    made.register_step_post_hook(lambda *_: seen.append("after"))
    made.step(closure)
    made.step_by_rule(1.0, lambda: 1.0)
    assert seen == ["before", "after"] * 2


def test_parameters_without_a_gradient_are_left_and_none_at_all_is_no_error():
    theta, other = nn.Parameter(torch.tensor([4.0])), nn.Parameter(torch.ones(2))
    made = GD([theta, other], step_size=BarzilaiBorwein(), weight_decay=0.5)
    for _ in range(3):
        made.step(parabola(made, theta))
    assert other.tolist() == [1.0, 1.0]
    assert other not in made.state
    lonely = GD([other], step_size=BarzilaiBorwein())
    lonely.step(parabola(lonely, theta))
    assert other.tolist() == [1.0, 1.0]


def test_a_parameter_that_is_unfrozen_later_joins():
    a, b = nn.Parameter(torch.tensor([4.0])), nn.Parameter(torch.tensor([2.0]))
    for rule in (BarzilaiBorwein(), DoWG(), ScheduleFree(Armijo()), InverseSmoothness(every=1)):
        made = GD([a, b], step_size=rule)

        def closure(which, made=made):
            made.zero_grad()
            loss = sum(0.5 * (p**2).sum() for p in which)
            loss.backward()
            return loss

        made.step(lambda closure=closure: closure([a]))
        made.step(lambda closure=closure: closure([a, b]))
        first = closure([a, b]).item()
        made.step(lambda closure=closure: closure([a, b]))
        assert closure([a, b]).item() <= first
        with torch.no_grad():
            a.fill_(4.0)
            b.fill_(2.0)


# ------------------------------------------------------------ schedules


def test_a_schedule_is_a_factor_on_the_rules_step():
    theta, made, closure = one(Fixed(), value=1.0)
    scheduler = LambdaLR(made, lambda t: [1.0, 0.5, 0.0][t])
    rates = []
    for _ in range(2):
        made.step(closure)
        rates.append(made.last_rate)
        scheduler.step()
        assert made.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    made.step(closure)
    assert [*rates, made.last_rate] == [0.5, 0.25, 0.0]
    assert theta.item() == 0.5 * 0.75


def test_a_schedule_is_a_factor_on_the_cap_that_lr_is():
    _, made, closure = one(StochasticPolyak(c=1.0), SGD, lr=0.25)  # Polyak's step is ½
    scheduler = LambdaLR(made, lambda t: 0.5**t)
    rates = []
    for _ in range(3):
        made.step(closure)
        rates.append(made.last_rate)
        scheduler.step()
    assert rates == [0.25, 0.125, 0.0625]


def test_a_schedule_with_a_peak_of_its_own_is_a_second_owner():
    _, made, closure = one(DoWG(), SGD)
    OneCycleLR(made, max_lr=0.5, total_steps=10)
    with pytest.raises(ValueError, match=r"two owners: DoWG computes it, and lr=0\.02"):
        made.step(closure)
    _, made, closure = one(DoWG(), SGD)
    made.param_groups[0]["lr"] = 0.1  # by hand
    with pytest.raises(ValueError, match="two owners"):
        made.step(closure)


# ------------------------------------------------------------ gathering


def test_gathering_goes_with_step_by_rule_only():
    x = torch.tensor([1.0, 2.0, 6.0])
    theta = nn.Parameter(torch.tensor(0.0))
    made = GD([theta], num_samples=3, step_size=Polyak(f_star=7 / 3))  # f* of the mean, 3
    value = 0.0
    for part in x.split(2):
        made.zero_grad()
        loss = (0.5 * (theta - part) ** 2).mean()
        loss.backward()
        value += loss.item() * len(part) / 3
        if made.gather(num_samples=len(part)):
            made.step_by_rule(value, lambda: (0.5 * (theta.item() - x) ** 2).mean())
    # f = 41/6, f − f* = 4.5, d = −3: η = ½
    assert made.last_rate == pytest.approx(0.5)
    assert theta.item() == pytest.approx(1.5)
    (0.5 * (theta - x[:2]) ** 2).mean().backward()
    with pytest.raises(ValueError, match=r"loss of the whole batch.*step_by_rule"):
        made.step(num_samples=2)
    with pytest.raises(ValueError, match="loss of the whole batch"):
        made.step(parabola(made, theta))
    made.gather(num_samples=2)
    with pytest.raises(ValueError, match="2 of the 3 examples of this update are in"):
        made.step_by_rule(value, lambda: 0.0)
    assert theta.item() == pytest.approx(1.5)


def test_num_samples_means_nothing_to_a_rule_that_does_not_gather():
    _, made, closure = one(Armijo())
    with pytest.raises(ValueError, match="loss of the whole batch"):
        made.step(closure, num_samples=3)


# ------------------------------------------------------------ state


class Training:
    """A small net with dropout on one batch after another, everything from one seed."""

    def __init__(self, rule, dtype=torch.float32):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)).to(
            dtype
        )
        self.x, self.y = torch.randn(24, 5).to(dtype), torch.randn(24, 1).to(dtype)
        groups = [
            {"params": [p for p in self.model.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in self.model.parameters() if p.ndim == 1]},
        ]
        lr = 1.0 if rule is None or not rule.needs.lr else 0.05
        self.optimizer = GD(groups, lr=lr, step_size=rule, total_updates=24)

    def closure(self):
        self.optimizer.zero_grad()
        loss = 0.5 * ((self.model(self.x) - self.y).float() ** 2).mean()
        loss.backward()
        return loss

    def step(self, times):
        rates = []
        for _ in range(times):
            self.optimizer.step(self.closure)
            rates.append(self.optimizer.last_rate)
        return rates

    def tensors(self):
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "shown"),  # whether saved while the average is shown
    [*((n, False) for n in STEP_SIZES), *((n, True) for n in STEP_SIZES if STEP_SIZES[n].average)],
)
def test_a_run_saved_in_the_middle_goes_on_to_the_last_bit(name, shown, dtype):
    rule = STEP_SIZES[name]  # shared, for it remembers nothing itself
    whole, half, resumed = (Training(rule, dtype) for _ in range(3))
    torch.manual_seed(9)
    rates = whole.step(14)
    torch.manual_seed(9)
    half.step(7)
    if shown:
        half.optimizer.step_size.eval(half.optimizer)
    saved = through_a_file([half.model.state_dict(), half.optimizer.state_dict()])
    untouched = copy.deepcopy(saved)
    resumed.model.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    stream = torch.get_rng_state()
    for run in (resumed, copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        torch.set_rng_state(stream)
        assert repr(run.optimizer.step_size) == repr(rule)
        assert run.optimizer.last_rate == rates[6]
        run.optimizer.step_size.train(run.optimizer)
        assert run.step(7) == rates[7:]
        assert all(map(torch.equal, run.tensors(), whole.tensors()))
    for state in resumed.optimizer.state.values():
        assert all(t.dtype == torch.promote_types(dtype, torch.float32) for t in state.values())
    assert pickle.dumps(saved[1]["param_groups"]) == pickle.dumps(untouched[1]["param_groups"])
    for p, state in saved[1]["state"].items():
        assert all(torch.equal(t, untouched[1]["state"][p][k]) for k, t in state.items())


def test_a_saved_state_does_not_change_while_the_run_goes_on():
    run = Training(BarzilaiBorwein())
    run.step(3)
    saved = run.optimizer.state_dict()["param_groups"][0]["step_size"]
    before = copy.deepcopy(saved)
    run.step(3)
    assert saved == before


def test_no_rule_leaves_groups_and_state_as_they_are_in_torch():
    theta = nn.Parameter(torch.ones(2))
    ours, theirs = SGD([theta], lr=0.1), torch.optim.SGD([theta], lr=0.1)
    assert ours.state_dict() == theirs.state_dict()
    assert set(ours.__getstate__()) == set(theirs.__getstate__())
    assert ours.step_size is None


@EVERY
def test_states_are_exchanged_with_torch_and_with_optimizers_without_a_rule(optimizer):
    theta, made, closure = one(DoWG(), optimizer)
    for _ in range(3):
        made.step(closure)
    state = copy.deepcopy(made.state_dict())
    torch.optim.SGD([theta], lr=0.5).load_state_dict(state)
    plain = optimizer([theta], lr=0.5)
    plain.load_state_dict(state)
    assert "step_size" not in plain.param_groups[0]
    assert not plain.state
    theta.grad = torch.ones(1)
    plain.step()
    # And back: lr was η there; what a schedule had left of it stays.
    theirs = torch.optim.SGD([theta], lr=0.5, momentum=0.9)
    LambdaLR(theirs, lambda t: 0.25)
    plain_state = theirs.state_dict()
    plain_state["param_groups"][0]["momentum"] = 0
    made.load_state_dict(plain_state)
    group = made.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["step_size"]) == (0.25, 1.0, {})
    made.step(closure)
    assert math.isfinite(made.last_rate)


def test_a_state_of_another_rule_is_refused():
    _, made, closure = one(DoWG(), SGD)
    made.step(closure)
    _, other, _ = one(DoG(), SGD)
    with pytest.raises(ValueError, match=r"saved with the rule DoWG.*has DoG.*step_size=DoWG"):
        other.load_state_dict(made.state_dict())


def test_momentum_buffers_and_a_rules_tensors_live_side_by_side():
    theta, made, closure = one(InverseSmoothness(every=2), momentum=0.5)
    for _ in range(3):
        made.step(closure)
    assert set(made.state[theta]) == {"momentum_buffer", "step_size_vector"}
    saved = through_a_file(made.state_dict())
    made.load_state_dict(saved)
    made.step(closure)


@pytest.mark.parametrize("mode", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_every_way_of_updating_takes_the_rules_step(mode):
    theta, made, closure = one(Polyak(), **mode)
    made.step(closure)
    made.step(closure)
    assert theta.item() == 1.0
