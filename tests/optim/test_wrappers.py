"""Under wrappers, which ask the optimizer only for what its class does not have."""

import copy
import inspect
import pickle

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

import gdtrain
from gdtrain.optim import GD, SGD, MiniBatchSGD
from gdtrain.step_sizes import Armijo

X = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
Y = 2 * X


def fabric():
    return Fabric(accelerator="cpu", devices=1)


def by_fabric(optimizer):
    return fabric().setup_optimizers(optimizer)


WRAPPERS = {"Fabric": by_fabric, "Lightning": LightningOptimizer}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("optimizer", [GD, SGD, MiniBatchSGD])
def test_no_attribute_of_the_class_hides_one_of_the_optimizer(optimizer, wrap):
    theta = nn.Parameter(torch.ones(1))
    made = optimizer([theta], lr="auto", total_updates=5)
    made.batch_fraction = 0.25
    wrapped = wrap(made)
    theta.grad = torch.ones(1)
    made.step_by_rule(1.0, theta.item)
    assert wrapped.last_rate == made.last_rate > 0
    for name in vars(made):
        if not name.startswith("_optimizer_") and name not in ("_optimizer", "__class__"):
            assert getattr(wrapped, name) is getattr(made, name), name
    own = inspect.get_annotations(gdtrain.optim.stepping.Stepping)
    for name in ("step_size", "total_updates", "batch_fraction"):
        assert name in own
        assert not any(name in vars(c) for c in optimizer.__mro__)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_what_the_optimizer_was_told(copied):
    for made, fraction in (
        (GD([nn.Parameter(torch.ones(1))], step_size=Armijo(), total_updates=3), 1.0),
        (MiniBatchSGD([nn.Parameter(torch.ones(1))], lr=0.1), 0.5),
        (GD([nn.Parameter(torch.ones(1))], lr=0.1), 1.0),
    ):
        made.batch_fraction = fraction
        other = copied(made)
        assert repr(other.step_size) == repr(made.step_size)
        assert (other.total_updates, other.batch_fraction) == (made.total_updates, fraction)


def test_a_pickle_from_before_these_were_attributes_of_the_instance_is_taken():
    made = GD([nn.Parameter(torch.ones(1))], lr=0.1)
    other = GD.__new__(GD)
    other.__setstate__({n: getattr(made, n) for n in ("defaults", "state", "param_groups")})
    assert (other.step_size, other.total_updates, other.batch_fraction) == (None, None, 1.0)


def test_gather_then_step_is_the_exact_mean_under_fabric():
    theta = nn.Linear(1, 1, bias=False)
    nn.init.constant_(theta.weight, 0.5)
    run = fabric()
    model, optimizer = run.setup(theta, GD(theta.parameters(), lr=0.1, num_samples=len(X)))
    updates = []
    for x, y in zip(X.split(2), Y.split(2), strict=True):  # 2, 2 and 1 examples
        optimizer.zero_grad()
        run.backward((0.5 * (model(x) - y) ** 2).mean())
        if optimizer.gather(num_samples=len(x)):
            optimizer.step()
            updates.append(theta.weight.item())
    # the mean of x²(θ − 2) over all five: 11 · (0.5 − 2)
    assert updates == [pytest.approx(0.5 - 0.1 * 11 * (0.5 - 2))]
