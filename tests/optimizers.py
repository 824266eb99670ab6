"""What the tests of optimizers share: classes, ways of updating, rules, parameters and copies."""

import io

import pytest
import torch

from gdtrain.optim import GD, SGD, MiniBatchSGD
from gdtrain.step_sizes import (
    Armijo,
    BarzilaiBorwein,
    DoG,
    DoWG,
    InverseSmoothness,
    Polyak,
    PolyakDoG,
    ScheduleFree,
    StochasticLineSearch,
    StochasticPolyak,
)

EVERY = pytest.mark.parametrize("optimizer", [GD, SGD, MiniBatchSGD])
MODES = {
    "default": {},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused": {"fused": True},
}
EVERY_MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
RULES = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "maximize, decay": {"maximize": True, "weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "dampening, decay": {"momentum": 0.5, "dampening": 0.5, "weight_decay": 0.1, "maximize": True},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov, decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "all": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
}
EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
STEP_SIZES = {
    "Armijo": Armijo(),
    "BB": BarzilaiBorwein(),
    "BB with f*": BarzilaiBorwein(f_star=0.0, memory=2),
    "Polyak": Polyak("estimate"),
    "SPS": StochasticPolyak(max_lr=0.5, smoothing=2.0),
    "SPS below lr": StochasticPolyak(),
    "SLS": StochasticLineSearch(),
    "DoG": DoG(),
    "DoG averaged": DoG(start=1e-2, averaging=True),
    "DoWG": DoWG(cap=0.5, decay="linear"),
    "PolyakDoG": PolyakDoG(),
    "PolyakDoG with momentum": PolyakDoG(gain=2.0),
    "1/L": InverseSmoothness(every=4),
    "schedule-free": ScheduleFree(beta=0.8),
    "schedule-free BB": ScheduleFree(BarzilaiBorwein()),
    "schedule-free DoWG": ScheduleFree(DoWG()),
}
WITH_MOMENTUM = {name: rule for name, rule in RULES.items() if "momentum" in rule}


def parameter(*values, grad=None, dtype=torch.float32):
    p = torch.nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = None if grad is None else torch.tensor(grad, dtype=dtype)
    return p


def twin_of(tensor):
    """A copy at the same strides, gaps included."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
