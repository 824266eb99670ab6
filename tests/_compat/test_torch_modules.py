"""torch.nn's private names exist, and do what we rely on."""

import torch
from torch import nn

from gdtrain._compat.torch_modules import (
    BATCH_NORMS,
    DROPOUTS,
    NORMS,
    buffers_in,
    children_in,
    has_hooks,
    parameters_in,
    tensor_has_hooks,
)


def test_what_is_put_into_the_mapping_is_used():
    layer = nn.BatchNorm1d(1)
    buffers_in(layer)["running_mean"] = torch.tensor([3.0])
    assert layer.running_mean.item() == 3.0
    assert parameters_in(layer)["weight"] is layer.weight
    twice = nn.ReLU()
    assert list(children_in(nn.Sequential(twice, twice)).values()) == [twice, twice]


def test_base_classes():
    assert isinstance(nn.BatchNorm2d(1), BATCH_NORMS)
    assert isinstance(nn.SyncBatchNorm(1), BATCH_NORMS)
    assert not isinstance(nn.InstanceNorm1d(1), BATCH_NORMS)
    assert isinstance(nn.InstanceNorm1d(1), NORMS)
    assert isinstance(nn.LayerNorm(1), NORMS)
    assert all(isinstance(kind(0.1), DROPOUTS) for kind in (nn.Dropout, nn.Dropout2d))
    assert not isinstance(nn.Linear(1, 1), (*NORMS, DROPOUTS))


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
