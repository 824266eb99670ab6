"""GradScaler with optimizers that gather: in every order, the exact mean or no update at all."""

import copy
import math

import pytest
import torch
from optimizers import parameter
from torch.testing import assert_close

from gdtrain.optim import GD, SGD, MiniBatchSGD

EVERY_MODE = pytest.mark.parametrize("mode", [{}, {"foreach": False}, {"fused": True}], ids=str)
EITHER = pytest.mark.parametrize(
    ("optimizer", "count"), [(GD, "num_samples"), (MiniBatchSGD, "batch_size")]
)


def step_by_scaler(scaler, optimizer, m):
    scaler.step(optimizer, num_samples=m)
    scaler.update()


def unscale_then_step_by_scaler(scaler, optimizer, m):
    scaler.unscale_(optimizer)
    step_by_scaler(scaler, optimizer, m)


def unscale_and_gather(scaler, optimizer, m):
    scaler.unscale_(optimizer)
    if optimizer.gather(num_samples=m):
        scaler.step(optimizer)
    scaler.update()


def gather_and_unscale_the_mean(scaler, optimizer, m):
    if optimizer.gather(num_samples=m):
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


def gather_and_leave_unscaling_to_the_scaler(scaler, optimizer, m):
    if optimizer.gather(num_samples=m):
        scaler.step(optimizer)
        scaler.update()


EVERY_ORDER = pytest.mark.parametrize(
    "order",
    [
        step_by_scaler,
        unscale_then_step_by_scaler,
        unscale_and_gather,
        gather_and_unscale_the_mean,
        gather_and_leave_unscaling_to_the_scaler,
    ],
)


def scaler_of(scale=8.0, **arguments):
    return torch.amp.GradScaler("cpu", init_scale=scale, **arguments)


def feed(order, scaler, optimizer, p, micro_batches):
    """Micro-batches of m examples whose gradient is g."""
    for g, m in micro_batches:
        optimizer.zero_grad()
        scaler.scale((torch.tensor(g) * p).sum()).backward()
        order(scaler, optimizer, m)


@EITHER
@EVERY_MODE
@EVERY_ORDER
def test_every_order_makes_the_update_of_the_exact_mean(optimizer, count, mode, order):
    p = parameter(0.0)
    opt = optimizer([p], lr=1.0, momentum=0.5, **{count: 4}, **mode)
    scaler = scaler_of(growth_interval=1)  # as often as it may, the scale changes
    feed(order, scaler, opt, p, [(8.0, 1), (4.0, 3)])
    assert p.item() == -5
    feed(order, scaler, opt, p, [(2.0, 4)])
    assert p.item() == -5 - (2 + 2.5)
    assert scaler.get_scale() > 8


@EITHER
@EVERY_MODE
@EVERY_ORDER
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_an_overflow_anywhere_cancels_the_whole_update(optimizer, count, mode, order, bad, where):
    p = parameter(1.0)
    opt = optimizer([p], lr=1.0, momentum=0.5, weight_decay=0.1, **{count: 6}, **mode)
    twin = parameter(1.0)
    sgd = SGD([twin], lr=1.0, momentum=0.5, weight_decay=0.1)
    scaler = scaler_of()
    micro_batches = [(2.0, 1), (4.0, 2), (6.0, 3)]
    overflowed = [(bad if i == where else g, m) for i, (g, m) in enumerate(micro_batches)]
    for plan, whole in (
        (overflowed, None),
        (micro_batches, 28 / 6),
        (overflowed, None),
        (overflowed, None),
        (micro_batches, 28 / 6),
    ):
        before = p.item()
        scale = scaler.get_scale()
        feed(order, scaler, opt, p, plan)
        if whole is None:
            assert p.item() == before
            assert scaler.get_scale() < scale
        else:
            twin.grad = torch.tensor([whole])
            sgd.step()
        assert_close(p, twin)
        assert opt.gathered == 0
        assert "gathered_sum" not in opt.state.get(p, {})


@EITHER
@EVERY_MODE
@pytest.mark.parametrize(
    ("gradients", "expected"), [([3.0, 1.0], 0.0), ([math.inf, 1.0], 1.0), ([1.0, math.inf], 1.0)]
)
def test_clipping_the_mean_counts_and_hides_no_overflow(
    optimizer, count, mode, gradients, expected
):
    p = parameter(1.0)
    opt = optimizer([p], lr=1.0, **{count: 2}, **mode)
    scaler = scaler_of()
    for g in gradients:
        opt.zero_grad()
        scaler.scale((g * p).sum()).backward()
        scaler.unscale_(opt)
        if opt.gather(num_samples=1):
            torch.nn.utils.clip_grad_value_([p], 1.0)
            assert p.grad.item() == 1
            scaler.step(opt)
        scaler.update()
    assert p.item() == expected


@EITHER
def test_an_overflow_before_the_end_of_an_epoch_cancels_its_smaller_batch(optimizer, count):
    p = parameter(0.0)
    opt = optimizer([p], lr=1.0, **{count: 64})
    scaler = scaler_of()
    feed(step_by_scaler, scaler, opt, p, [(math.inf, 1), (4.0, 3)])
    assert opt.flush() is False
    assert p.item() == 0
    feed(step_by_scaler, scaler, opt, p, [(8.0, 1), (4.0, 3)])
    assert opt.flush() is True
    assert p.item() == -5


@EITHER
@pytest.mark.parametrize(("first", "expected"), [(8.0, -5.0), (math.inf, 0.0)])
def test_the_smaller_batch_of_an_epoch_is_closed_under_a_scaler(optimizer, count, first, expected):
    p = parameter(0.0)
    opt = optimizer([p], lr=1.0, **{count: 64})
    scaler = scaler_of()
    for g, m, last in ((first, 1, False), (4.0, 3, True)):
        opt.zero_grad()
        scaler.scale((g * p).sum()).backward()
        scaler.unscale_(opt)
        if opt.gather(num_samples=m) or (last and opt.close()):
            scaler.step(opt)
        scaler.update()
    assert p.item() == expected
    assert opt.gathered == 0


@EITHER
@pytest.mark.parametrize("order", [step_by_scaler, gather_and_leave_unscaling_to_the_scaler])
def test_scaled_float16_gradients_are_gathered_in_float32(optimizer, count, order):
    # unscaled in float16 they would vanish: 2⁻²⁵ is below its smallest number
    p = parameter(1.0, dtype=torch.float16)
    opt = optimizer([p], lr=1.0, **{count: 2})
    scaler = scaler_of(2.0**20)
    for _ in range(2):
        opt.zero_grad()
        p.grad = torch.full((1,), 2.0**-5, dtype=torch.float16)
        scaler.scale(torch.zeros(()))
        if order is step_by_scaler:
            scaler.step(opt, num_samples=1)
            total = opt.state[p]["gathered_sum"] if opt.state else None
            assert total is None or total.item() == 2.0**-25
            scaler.update()
        else:
            order(scaler, opt, 1)
    assert p.item() == 1  # the update is below float16's resolution; nothing overflowed
    assert scaler.get_scale() == 2.0**20


@EITHER
def test_a_disabled_scaler_stands_aside(optimizer, count):
    p = parameter(0.0)
    opt = optimizer([p], lr=1.0, **{count: 4})
    feed(step_by_scaler, scaler_of(enabled=False), opt, p, [(8.0, 1), (4.0, 3)])
    assert p.item() == -5


@EITHER
def test_a_refused_step_leaves_no_scale_behind(optimizer, count):
    # GradScaler multiplies the next scale by a grad_scale that it finds
    p = parameter(0.0)
    opt = optimizer([p], lr=1.0, **{count: 4})
    scaler = scaler_of()
    scaler.scale((8.0 * p).sum()).backward()
    for wrong in (5, 0, None):
        with pytest.raises(ValueError, match="num_samples"):
            scaler.step(opt, num_samples=wrong)
    with pytest.raises(ValueError, match="A closure makes gradients after the GradScaler"):
        scaler.step(opt, lambda: pytest.fail("called"), num_samples=1)
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")
    step_by_scaler(scaler, opt, 4)
    assert p.item() == -8


@EITHER
@pytest.mark.parametrize("bad", [1.0, math.inf])
def test_a_cancelled_update_goes_on_cancelled_after_a_reload(optimizer, count, bad):
    p, scaler = parameter(0.0), scaler_of()
    opt = optimizer([p], lr=1.0, **{count: 4})
    feed(step_by_scaler, scaler, opt, p, [(bad, 1)])
    other = optimizer([p], lr=1.0, **{count: 4})
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    feed(step_by_scaler, scaler, other, p, [(1.0, 3)])
    assert p.item() == (-1 if bad == 1 else 0)


@EITHER
def test_without_a_scaler_an_infinite_gradient_is_applied_as_by_torch(optimizer, count):
    p = parameter(0.0)
    opt = optimizer([p], lr=1.0, **{count: 2})
    p.grad = torch.tensor([math.inf])
    opt.step(num_samples=1)
    p.grad = torch.tensor([1.0])
    assert opt.gather(num_samples=1)
    opt.step()
    assert p.item() == -math.inf
