"""torch.optim's private names exist, and do what we rely on."""

import warnings

import pytest
import torch

from gdtrain._compat.torch_optimizer_hooks import has_step_hooks, mark_stepped


def made():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_a_hook_on_the_step_is_seen(register):
    optimizer = made()
    assert not has_step_hooks(optimizer)
    getattr(optimizer, register)(lambda *_: None)
    assert has_step_hooks(optimizer)


def test_a_scheduler_believes_that_updates_were_made():
    optimizer = made()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="optimizer.step"):
        scheduler.step()
    optimizer = made()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    mark_stepped(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
