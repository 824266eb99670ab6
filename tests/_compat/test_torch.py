"""Each private name of torch that optimizers use does what they rely on."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gdtrain._compat import torch_foreach as foreach
from gdtrain._compat import torch_kernels as kernels
from gdtrain._compat.torch_optimizer import (
    LightOptimizer,
    check_fused,
    with_hooks_if_there_are_any,
)


class Still(LightOptimizer):
    """Changes nothing, and tells whether autograd looks on."""

    def __init__(self, differentiable=False):
        super().__init__([torch.ones(1)], {"differentiable": differentiable})

    @with_hooks_if_there_are_any
    def step(self, closure=None):
        return torch.is_grad_enabled()


# ---------------------------------------------------------------------- torch_optimizer


@pytest.mark.parametrize("differentiable", [False, True])
def test_the_grad_mode_is_that_of_differentiable_and_comes_back(differentiable):
    for before in (False, True):
        with torch.set_grad_enabled(before):
            assert Still(differentiable).step() is differentiable
            assert torch.is_grad_enabled() is before


def test_hooks_of_the_optimizer_and_global_ones_are_seen():
    optimizer, seen = Still(), []
    optimizer.step()
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("own, before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("own, after")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("global")),
    ]
    assert optimizer.step() is False
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert sorted(seen) == ["global", "own, after", "own, before"]


def test_the_profiler_is_seen():
    optimizer = Still()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    assert "Optimizer.step#Still.step" in {e.key for e in profiler.key_averages()}


def test_torch_wraps_the_step_of_a_subclass_and_not_the_light_one(monkeypatch):
    class Own(Still):
        def step(self, closure=None):
            return super().step()

    light = Still.step
    Still()
    assert Still.step is light
    seen, optimizer = [], Own()
    assert Own._watched_step is Own.step
    assert Still._watched_step is None
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    optimizer.step()
    assert seen == [1]
    with monkeypatch.context() as patch:  # a step that torch wraps, and that goes again
        patch.setattr(Still, "step", lambda self, closure=None: None)
        Still()
    again = Still()
    again.register_step_pre_hook(lambda *_: seen.append(2))
    again.step()
    assert seen == [1, 2]


def test_the_fused_check_refuses_integers():
    check_fused(torch.ones(1))
    with pytest.raises(RuntimeError, match="floating point"):
        check_fused(torch.ones(1, dtype=torch.int64))


def test_a_grad_scaler_asks_for_the_name_and_then_sets_the_two_attributes():
    class Asked(Still):
        _step_supports_amp_scaling = True

        def step(self, closure=None):
            return float(self.grad_scale), float(self.found_inf)

    optimizer = Asked()
    theta = optimizer.param_groups[0]["params"][0]
    theta.grad = torch.tensor([torch.inf])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    assert scaler.step(optimizer) == (4.0, 1.0)
    assert not hasattr(optimizer, "found_inf")


# ---------------------------------------------------------------------- torch_kernels


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_fused_kernel_makes_the_update(momentum):
    theta, g, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 6.0]), torch.tensor([2.0, 4.0])
    kernels.fused_sgd_(
        [theta], [g], [b] if momentum else [], lr=0.5, momentum=momentum, dampening=0.0,
        weight_decay=0.0, nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip
    assert theta.tolist() == ([0.0, -2.0] if momentum else [0.5, -1.0])
    assert b.tolist() == ([2.0, 8.0] if momentum else [2.0, 4.0])


def test_the_kernel_is_reachable_below_autograd_and_the_version_counted_by_hand():
    theta = nn.Parameter(torch.ones(1))
    with torch.no_grad(), kernels.BelowAutograd():
        theta.add_(1)
    before = theta._version
    kernels.increment_version([theta])
    assert (theta.item(), theta._version) == (2.0, before + 1)


def test_guards_notice_another_kind_of_tensor():
    tensors = [torch.ones(2, 3), torch.ones(4)]
    guards = kernels.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    assert guards.check(*tensors)
    assert guards.check(torch.zeros(2, 3), torch.zeros(4))
    for other in (torch.ones(3, 2).T, torch.ones(2, 2), torch.ones(2, 3).double(), None):
        assert not guards.check(other, tensors[1])


def test_dense_is_without_gaps_and_overlaps():
    assert kernels.is_dense(torch.ones(2, 3))
    assert kernels.is_dense(torch.ones(2, 3).T)
    assert not kernels.is_dense(torch.ones(4)[::2])
    assert not kernels.is_dense(torch.ones(1).expand(3))


# ---------------------------------------------------------------------- torch_foreach

A, B = [1.0, 2.0], [3.0, 8.0]
BINARY = {
    "add": [7.0, 18.0], "sub": [-5.0, -14.0], "mul": [3.0, 16.0], "div_": [1 / 3, 0.25],
    "copy_": B, "lerp": [2.0, 5.0],
}  # fmt: skip


@pytest.mark.parametrize("name", foreach.__all__)
def test_foreach_is_the_operation_on_each_tensor(name):
    a, b = [torch.tensor(A), torch.tensor(2.0)], [torch.tensor(B), torch.tensor(2.0)]
    operation = getattr(foreach, name)
    if name == "norm":
        assert [t.item() for t in operation(b)] == pytest.approx([73**0.5, 2.0])
    elif name == "neg":
        assert operation(a)[0].tolist() == [-1.0, -2.0]
    else:
        options = {"alpha": 2} if name.startswith(("add", "sub")) else {}
        made = operation(a, b, *([0.5] if name.startswith("lerp") else []), **options)
        expected = BINARY.get(name) or BINARY[name.removesuffix("_")]
        assert (a if name.endswith("_") else made)[0].tolist() == pytest.approx(expected)
        if not name.endswith("_"):
            assert a[0].tolist() == A
