"""A rule of one's own is one short class: in a plain loop, in each engine, in a checkpoint."""

import pytest
import torch
from scipy.sparse import csr_array
from torch import nn

from gdtrain.data.sparse import SparseInputs
from gdtrain.engines.compiled import Compiled
from gdtrain.engines.eager import Eager
from gdtrain.engines.engine import NotApplicableError
from gdtrain.engines.native.engine import Native
from gdtrain.losses import SquaredError
from gdtrain.objective import Objective
from gdtrain.optim import GD
from gdtrain.step_sizes import Needs, StepSize


class AdaGradNorm(StepSize):
    """η = η₀ / √(Σ_{i≤t} ‖d_i‖²), halved while that climbs. Ward, Wu and Bottou, 2019."""

    needs = Needs(values=True, no_momentum="the norms are those of steps along −d")

    def __init__(self, scale=1.0):
        self.scale = scale

    def rate(self, context, memory):
        total = memory.numbers["total"] = memory.numbers.get("total", 0.0) + context.squared_norm
        rate = self.scale / total**0.5 if total > 0 else 0.0
        while context.evaluate(rate) > context.value + context.resolution:
            rate /= 2
        return rate


X, Y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])


def model():
    made = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(made.weight)
    return made


def by_hand(updates):
    """Of ½·mean (xθ − y)², whose curvature is 14/3 and whose minimum is 2."""
    theta, total, rates = 0.0, 0.0, []
    for _ in range(updates):
        d = 14 / 3 * (theta - 2)
        total += d * d
        rate = 4 / total**0.5
        while 7 / 3 * (theta - rate * d - 2) ** 2 > 7 / 3 * (theta - 2) ** 2 + 1e-6:
            rate /= 2
        theta -= rate * d
        rates.append(rate)
    return theta, rates


def engine(kind, inputs=X, rule=None):
    made = model()
    optimizer = GD(
        [{"params": made.parameters(), "initial_lr": 1.0}], step_size=rule or AdaGradNorm(4.0)
    )
    return made, kind(Objective(made, SquaredError(), inputs, Y[:, 0]), optimizer)


def test_in_a_plain_loop_and_over_a_checkpoint():
    theta, rates = by_hand(6)
    made, seen = model(), []
    optimizer = GD(made.parameters(), step_size=AdaGradNorm(4.0))
    for update in range(6):
        if update == 3:
            state, optimizer = (
                optimizer.state_dict(),
                GD(made.parameters(), step_size=AdaGradNorm(4.0)),
            )
            optimizer.load_state_dict(state)

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = (0.5 * (made(X) - Y) ** 2).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        seen.append(optimizer.last_rate)
    assert seen == pytest.approx(rates, rel=1e-5)
    assert made.weight.item() == pytest.approx(theta, rel=1e-5)


@pytest.mark.parametrize("kind", [Eager, Native])
def test_engines_that_give_it_what_it_needs(kind):
    theta, rates = by_hand(6)
    made, sweep = engine(kind)
    sweep(torch.arange(3).expand(6, 3), torch.ones(6))
    assert sweep.rates.tolist() == pytest.approx(rates, rel=1e-5)
    assert made.weight.item() == pytest.approx(theta, rel=1e-5)


def test_what_cannot_give_it_that_refuses_with_the_reason():
    with pytest.raises(NotApplicableError, match="AdaGradNorm looks at more than the loss"):
        engine(Compiled)
    with pytest.raises(NotApplicableError, match="on sparse inputs, AdaGradNorm needs the"):
        engine(Native, SparseInputs.from_scipy(csr_array(X.numpy())))
    with pytest.raises(ValueError, match="AdaGradNorm does not go with momentum: the norms"):
        GD(model().parameters(), step_size=AdaGradNorm(), momentum=0.9)


def test_a_rule_that_looks_elsewhere_says_so_beforehand():
    class Silent(AdaGradNorm):
        needs = Needs()

    theta = nn.Parameter(torch.ones(1))
    optimizer = GD([theta], step_size=Silent())
    theta.grad = torch.ones(1)
    with pytest.raises(ValueError, match=r"let it have Needs\(values=True\)"):
        optimizer.step_by_rule(1.0, lambda: 0.0)
