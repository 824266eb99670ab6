"""Each private name of torch exists, and does what we rely on."""

import pickletools
import warnings
import zipfile

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gdtrain._compat import torch_foreach as foreach
from gdtrain._compat import torch_kernels as kernels
from gdtrain._compat.torch_dispatch import TorchDispatchMode
from gdtrain._compat.torch_modules import (
    BATCH_NORMS,
    DROPOUTS,
    NORMS,
    TRANSPOSED_CONVOLUTIONS,
    buffers_in,
    children_in,
    has_hooks,
    parameters_in,
    tensor_has_hooks,
)
from gdtrain._compat.torch_optimizer import (
    LightOptimizer,
    check_fused,
    has_step_hooks,
    mark_stepped,
    with_hooks_if_there_are_any,
)
from gdtrain._compat.torch_saving import REBUILD_PARAMETER, REBUILD_TENSOR
from gdtrain.data.checkpoint_reading import check_checkpoint


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


def plain_sgd():
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_a_hook_on_the_step_is_seen(register):
    optimizer = plain_sgd()
    assert not has_step_hooks(optimizer)
    getattr(optimizer, register)(lambda *_: None)
    assert has_step_hooks(optimizer)


def test_a_scheduler_believes_that_updates_were_plain_sgd():
    optimizer = plain_sgd()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="optimizer.step"):
        scheduler.step()
    optimizer = plain_sgd()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    mark_stepped(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


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


# ---------------------------------------------------------------------- torch_modules


def test_what_is_put_into_the_mapping_is_used():
    layer = nn.BatchNorm1d(1)
    buffers_in(layer)["running_mean"] = torch.tensor([3.0])
    assert layer.running_mean.item() == 3.0
    assert parameters_in(layer)["weight"] is layer.weight
    twice = nn.ReLU()
    assert list(children_in(nn.Sequential(twice, twice)).values()) == [twice, twice]


@pytest.mark.parametrize(
    ("bases", "layers", "others"),
    [
        (
            BATCH_NORMS,
            [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)],
            [nn.GroupNorm(1, 2), nn.InstanceNorm1d(2)],
        ),
        (NORMS, [nn.BatchNorm1d(2), nn.InstanceNorm2d(2), nn.LayerNorm(2)], [nn.Linear(1, 1)]),
        (DROPOUTS, [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout()], [nn.ReLU()]),
        (TRANSPOSED_CONVOLUTIONS, [nn.ConvTranspose1d(1, 1, 1)], [nn.Conv1d(1, 1, 1)]),
    ],
)
def test_the_layers_of_a_kind_and_no_others(bases, layers, others):
    assert all(isinstance(layer, bases) for layer in layers)
    assert not any(isinstance(layer, bases) for layer in others)


def test_what_is_read_of_layers():
    norm = nn.BatchNorm1d(3)
    assert norm.track_running_stats
    assert norm.running_mean.shape == norm.running_var.shape == (3,)
    assert nn.ConvTranspose2d(4, 6, 3, groups=2).groups == 2
    assert nn.Dropout(0.3).p == 0.3


def test_each_kind_of_hook_is_seen():
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        layer = nn.Linear(1, 1)
        assert not has_hooks(layer)
        getattr(layer, register)(lambda *_: None)
        assert has_hooks(layer), register
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        weight = nn.Linear(1, 1).weight
        assert not tensor_has_hooks(weight)
        getattr(weight, register)(lambda *_: None)
        assert tensor_has_hooks(weight), register


# ---------------------------------------------------------------------- dispatch and saving


def test_the_mode_is_called_before_each_operation():
    class NoOnes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "ones" in str(func):
                raise ValueError(str(func))
            return func(*args, **(kwargs or {}))

    with NoOnes():
        torch.zeros(2)
        with pytest.raises(ValueError, match="ones"):
            torch.ones(2)
    torch.ones(2)


def test_torch_save_asks_for_these_functions(tmp_path):
    path = tmp_path / "saved.ckpt"
    torch.save({"a": torch.ones(3), "b": torch.nn.Parameter(torch.ones(2))}, path)
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        opcodes = list(pickletools.genops(archive.read(name)))
    asked = {argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"}
    assert {REBUILD_TENSOR, REBUILD_PARAMETER} <= asked
    check_checkpoint(path)  # which knows what they are called with
