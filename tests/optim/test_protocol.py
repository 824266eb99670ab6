"""What is asked of an optimizer: gdtrain's, torch's, and a fourth one of somebody's own."""

import copy

import pytest
import torch
from torch import nn

from gdtrain.engines.compiled import Compiled
from gdtrain.engines.eager import Eager
from gdtrain.engines.engine import NotApplicableError
from gdtrain.engines.native.engine import Native
from gdtrain.losses import SquaredError
from gdtrain.objective import Objective
from gdtrain.optim import GD, SGD, MiniBatchSGD
from gdtrain.optim.protocol import (
    gathers,
    is_full_batch,
    step_size_of,
    takes_step_size,
    update_rules,
)
from gdtrain.step_sizes import Armijo, StepSize


def sign_descend_(params, grads, buffers, *, lr, weight_decay=0.0, **rule):
    """θ ← θ − η sign(g + λθ)."""
    for p, g in zip(params, grads, strict=True):
        p.sub_((g + weight_decay * p).sign(), alpha=lr)


class SignSGD(SGD):
    """A rule of its own: Bernstein et al., 2018, arXiv 1802.04434."""

    rule = staticmethod(sign_descend_)


class Batches(MiniBatchSGD):
    """A fourth optimizer with the rule of the others."""


class Doubled(SGD):
    """Its step is not that of the rule."""

    def step(self, closure=None):
        super().step()
        return super().step()


class Renamed(torch.optim.SGD):
    """torch's, under another name."""


class Lookahead(torch.optim.SGD):
    """torch's, with a step of its own."""

    def step(self, closure=None):
        return super().step(closure)


def of(kind, **arguments):
    return kind([nn.Parameter(torch.ones(2))], lr=0.1, **arguments)


@pytest.mark.parametrize("kind", [GD, SGD, MiniBatchSGD, Batches, torch.optim.SGD, Renamed])
def test_the_rule_is_told_as_data(kind):
    optimizer = of(kind, momentum=0.9, nesterov=True, weight_decay=0.01)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0})
    optimizer.step()
    first, second = update_rules(optimizer)
    assert first == (0.1, 0.9, 0, 0.01, True, False)
    assert second == first._replace(weight_decay=0)
    assert first == update_rules(copy.deepcopy(optimizer))[0]


@pytest.mark.parametrize("kind", [SignSGD, Doubled, Lookahead, torch.optim.Adam, torch.optim.ASGD])
def test_a_step_of_its_own_is_no_rule_that_is_restated(kind):
    optimizer = of(kind)
    optimizer.step()
    assert update_rules(optimizer) is None


def test_a_hook_or_a_schedule_does_not_make_another_rule():
    for kind in (SGD, torch.optim.SGD):
        optimizer = of(kind)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        optimizer.register_step_post_hook(lambda *_: None)
        assert update_rules(optimizer) is not None


def test_what_else_is_asked():
    rule = Armijo()
    theta = [nn.Parameter(torch.ones(1))]
    assert step_size_of(GD(theta, step_size=rule)) is rule
    for optimizer in (of(GD), of(torch.optim.SGD), of(torch.optim.Adam)):
        assert step_size_of(optimizer) is None
    asked = {
        kind: (is_full_batch(of(kind)), takes_step_size(of(kind)), gathers(of(kind)))
        for kind in (GD, SGD, MiniBatchSGD, SignSGD, torch.optim.SGD, torch.optim.Adam)
    }
    ours, theirs = (False, True, False), (False, False, False)
    assert asked == {
        GD: (True, True, False),
        SGD: ours,
        MiniBatchSGD: ours,
        SignSGD: ours,
        torch.optim.SGD: theirs,
        torch.optim.Adam: theirs,
    }
    assert gathers(GD(theta, num_samples=4))
    assert gathers(MiniBatchSGD(theta, batch_size=4))
    assert gathers(Batches(theta, batch_size=4))


X, Y = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 4.0])


def sweep(engine, kind):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = kind([{"params": model.parameters(), "initial_lr": 0.125}])
    engine(Objective(model, SquaredError(), X, Y), optimizer)(
        torch.tensor([[0], [1]]), torch.ones(2)
    )
    return model.weight.item()


@pytest.mark.parametrize("engine", [Eager, Native])
def test_engines_make_the_updates_of_any_optimizer_with_the_rule(engine):
    # θ: 0 → 0 + ⅛·1·2 = ¼ → ¼ + ⅛·2·(4 − ½) = 9/8
    for kind in (SGD, Batches, torch.optim.SGD, Renamed):
        assert sweep(engine, kind) == 1.125


def test_a_rule_of_ones_own_works_eagerly_and_is_refused_elsewhere_with_the_reason():
    assert sweep(Eager, SignSGD) == 0.25
    with pytest.raises(NotApplicableError, match="that of SignSGD is for engine=eager and"):
        sweep(Native, SignSGD)
    # There η is a tensor: it may be a factor, but no `alpha`.
    with pytest.raises(NotApplicableError, match="compile cannot take the update: GuardOnData"):
        sweep(Compiled, SignSGD)
    theta = nn.Parameter(torch.ones(1))
    theta.grad = torch.ones(1)
    optimizer = SignSGD([theta], fused=True)
    with pytest.raises(RuntimeError, match="no kernel for SignSGD"):
        optimizer.step()


class Half(StepSize):
    """η = ½."""

    def rate(self, context, memory):
        return 0.5


def test_a_rule_of_ones_own_goes_with_a_step_size_rule():
    theta = nn.Parameter(torch.tensor([1.0]))
    optimizer = SignSGD([theta], step_size=Half())
    theta.grad = torch.tensor([3.0])
    optimizer.step_by_rule(3.0, theta.item)
    assert theta.item() == 0.5
