import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import EVERY, parameter, through_a_file
from torch.testing import assert_close

from gdtrain.optim import GD, SGD, MiniBatchSGD

GATHERERS = {
    "GD": lambda params, count, **more: GD(params, num_samples=count, **more),
    "MiniBatchSGD": lambda params, count, **more: MiniBatchSGD(params, batch_size=count, **more),
}
EITHER = pytest.mark.parametrize("make", GATHERERS.values(), ids=GATHERERS)


def data(N):
    generator = torch.Generator().manual_seed(N)
    return torch.randn(N, 3, generator=generator, dtype=torch.float64)


def loss_of(theta, x):
    """A mean over examples, curved in θ."""
    return torch.log1p(torch.exp(-(x @ theta))).mean()


def three():
    return parameter(0.3, -0.2, 0.1, dtype=torch.float64)


def full_gradient(theta, x):
    (g,) = torch.autograd.grad(loss_of(theta, x), theta)
    return g


def feed(optimizer, theta, x, set_to_none=True):
    """One micro-batch, forward, backward and step."""
    optimizer.zero_grad(set_to_none=set_to_none)
    loss_of(theta, x).backward()
    optimizer.step(num_samples=len(x))


def snapshot(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((params, [p.grad for p in params], optimizer.state_dict()))


def assert_unchanged(optimizer, before):
    assert_close(snapshot(optimizer), before, rtol=0, atol=0)


# ------------------------------------------------------------ the exact mean


@EITHER
@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_an_update_from_micro_batches_of_any_sizes_is_the_update_of_the_whole(make, sizes):
    x = data(sum(sizes))
    parts, whole = three(), three()
    optimizer = make([parts], len(x), lr=0.5)
    for micro in x.split(sizes):
        assert torch.equal(parts, whole)
        feed(optimizer, parts, micro)
    loss_of(whole, x).backward()
    SGD([whole], lr=0.5).step()
    assert not torch.equal(whole, three())
    assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert not optimizer.state


@EITHER
def test_a_batch_that_comes_whole_is_used_as_it_is(make):
    p = parameter(1.0, grad=[0.1])
    g = p.grad
    optimizer = make([p], 7, lr=0.5)
    optimizer.step(num_samples=7)
    assert p.grad is g
    assert p.item() == torch.tensor(1.0).sub(g, alpha=0.5).item()
    assert not optimizer.state


@EITHER
def test_micro_batches_never_write_into_their_gradients(make):
    p = parameter(0.0)
    optimizer = make([p], 6, momentum=0.9, weight_decay=0.1)
    gradients = [torch.tensor([float(k)]) for k in (1, 2, 3)]
    for g in gradients:
        p.grad = g
        optimizer.step(num_samples=2)
    assert [g.item() for g in gradients] == [1, 2, 3]


@EITHER
def test_groups_gather_together_and_step_apart(make):
    a, b = parameter(0.0), parameter(0.0)
    optimizer = make([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.5}], 4)
    for g, m in ((1.0, 1), (5.0, 3)):
        a.grad, b.grad = torch.tensor([g]), torch.tensor([2 * g])
        optimizer.step(num_samples=m)
    assert [a.item(), b.item()] == [-4, -4]


@EITHER
def test_complex_and_sparse_gradients_are_gathered(make):
    z = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    e = torch.nn.Parameter(torch.zeros(3, 1))
    optimizer = make([z, e], 4, lr=1.0)
    for row, m in ((0, 1), (2, 3)):
        z.grad = torch.full((2,), row + 1j, dtype=torch.complex64)
        e.grad = torch.sparse_coo_tensor([[row]], torch.ones(1, 1), (3, 1), check_invariants=True)
        optimizer.step(num_samples=m)
    assert z.tolist() == [-1.5 - 1j] * 2
    assert e.flatten().tolist() == [-0.25, 0, -0.75]


# ------------------------------------------------------------ half precision


@EITHER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reloaded", [False, True])
def test_half_precision_gradients_are_summed_in_float32(make, dtype, reloaded):
    # a sum in bfloat16 stops growing at 256, one in float16 at 2048
    N = 4096
    p = parameter(0.0, dtype=dtype)
    optimizer = make([p], N, lr=1.0)
    for i in range(N):
        if reloaded and i == N // 2:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make([p], N, lr=1.0)
            optimizer.load_state_dict(state)
        p.grad = torch.ones(1, dtype=dtype)
        if i == N - 1:
            (total,) = optimizer.state[p].values()
            assert total.dtype == torch.float32
        optimizer.step(num_samples=1)
    assert p.item() == -1
    assert p.grad.dtype == dtype


# ------------------------------------------------------------ late and missing gradients


@EITHER
@pytest.mark.parametrize(
    ("gradients", "mean"),
    [
        ([4.0, None], 4.0 / 4),
        ([None, 4.0], 4.0 * 3 / 4),
        ([4.0, 8.0], (4.0 + 8.0 * 3) / 4),
    ],
)
def test_a_micro_batch_without_a_gradient_counts_as_zero(make, gradients, mean):
    p, other = parameter(0.0), parameter(0.0)
    optimizer = make([p, other], 4, lr=1.0)
    for g, m in zip(gradients, (1, 3), strict=True):
        p.grad = None if g is None else torch.tensor([g])
        other.grad = torch.ones(1)
        optimizer.step(num_samples=m)
    assert p.item() == -mean
    assert other.item() == -1


@EITHER
@pytest.mark.parametrize("mode", [{}, {"foreach": False}, {"fused": True}], ids=str)
def test_a_parameter_without_any_gradient_is_left_alone(make, mode):
    frozen, moving = parameter(1.0), parameter(1.0)
    optimizer = make([frozen, moving], 4, lr=1.0, momentum=0.9, weight_decay=0.1, **mode)
    for _ in range(2):
        moving.grad = torch.ones(1)
        optimizer.step(num_samples=2)
    assert frozen.item() == 1
    assert frozen.grad is None
    assert set(optimizer.state) == {moving}


# ------------------------------------------------------------ what is refused

COUNTS = [0, -1, True, False, 1.0, 2.5, math.nan, "3", None]
COUNTS += [np.float32(2), np.True_, np.int64(0), np.array([1, 2])]
COUNTS += [torch.tensor(2.0), torch.tensor(True), torch.tensor(-1), torch.tensor([1, 2])]


@pytest.mark.parametrize("count", [c for c in COUNTS if c is not None], ids=repr)
@EITHER
def test_a_number_of_examples_that_is_no_count_is_refused_at_construction(make, count):
    with pytest.raises(ValueError, match=r"must be a whole number.*Received: "):
        make([parameter(1.0)], count)


@EITHER
@pytest.mark.parametrize(
    "integer",
    [int, np.int64, np.uint8, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int16)],
)
def test_micro_batches_weigh_by_their_examples_integers_of_any_kind(make, integer):
    p = parameter(0.0)
    optimizer = make([p], integer(4), lr=1.0)
    for g, m in ((8.0, 1), (4.0, 3)):
        p.grad = torch.tensor([g])
        optimizer.step(num_samples=integer(m))
    assert p.item() == -(8 * 1 + 4 * 3) / 4
    p.grad = torch.tensor([1.0])
    optimizer.gather(num_samples=integer(3))
    group = optimizer.param_groups[0]
    own = next(group[name] for name in ("num_samples", "batch_size") if name in group)
    assert (type(own), type(group["gathered"])) == (int, int)
    through_a_file(optimizer.state_dict())


REFUSED = [(already, count, "num_samples") for already in (0, 2) for count in COUNTS]
REFUSED += [(2, None, "needs num_samples.* 5 .*2 are in"), (2, 4, "at most 3: 2 .*Received: 4")]
REFUSED += [(0, 6, "at most 5: 0 .*Received: 6"), (4, 5, "at most 1: 4 .*Received: 5")]


TAKE = {
    "step": lambda o, m: o.step(num_samples=m),
    "step by closure": lambda o, m: o.step(lambda: pytest.fail("called"), num_samples=m),
    "gather": lambda o, m: o.gather(num_samples=m),
}


@EITHER
@pytest.mark.parametrize("take", TAKE.values(), ids=TAKE)
@pytest.mark.parametrize(("already", "count", "message"), REFUSED, ids=repr)
def test_what_cannot_be_taken_in_is_refused_and_nothing_changes(
    make, take, already, count, message
):
    p = parameter(1.0, grad=[1.0])
    optimizer = make([p], 5, lr=1.0, momentum=0.9)
    if already:
        optimizer.step(num_samples=already)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        take(optimizer, count)
    assert_unchanged(optimizer, before)
    optimizer.step(num_samples=5 - already)
    assert p.item() == 0


@EITHER
def test_gathering_on_before_the_update_is_made_is_refused(make):
    optimizer = make([parameter(1.0, grad=[1.0])], 5)
    assert optimizer.gather(num_samples=5)
    before = snapshot(optimizer)
    for take in TAKE.values():
        with pytest.raises(ValueError, match=r"All 5 examples .* are in"):
            take(optimizer, 1)
    assert_unchanged(optimizer, before)


@EVERY
@pytest.mark.parametrize("count", [1, 0, None])
def test_an_optimizer_that_gathers_nothing_refuses_to(optimizer, count):
    opt = optimizer([parameter(1.0, grad=[1.0])])
    before = snapshot(opt)
    with pytest.raises(ValueError, match="gathers nothing"):
        opt.gather(count)
    if count is not None:
        with pytest.raises(ValueError, match=f"num_samples={count}.*gathers nothing"):
            opt.step(num_samples=count)
    assert_unchanged(opt, before)


@EVERY
def test_without_a_number_of_examples_every_step_is_an_update(optimizer):
    p = parameter(1.0, grad=[1.0])
    opt = optimizer([p], lr=0.25)
    opt.step()
    opt.step()
    assert p.item() == 0.5
    assert (opt.close(), opt.discard(), opt.flush()) == (False, 0, False)
    assert p.item() == 0.5


@EITHER
def test_parameters_are_not_added_in_the_middle_of_an_update(make):
    p, q = parameter(1.0, grad=[1.0]), parameter(1.0, grad=[1.0])
    optimizer = make([p], 4, lr=1.0)
    optimizer.step(num_samples=2)
    with pytest.raises(ValueError, match="2 of 4 examples are in"):
        optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 1
    optimizer.step(num_samples=2)
    optimizer.add_param_group({"params": [q]})
    optimizer.step(num_samples=2)
    optimizer.step(num_samples=2)
    assert [p.item(), q.item()] == [-1, 0]


# ------------------------------------------------------------ closures


@EITHER
def test_closures_are_called_once_for_each_micro_batch(make):
    x, theta = data(7), three()
    expected = theta.detach() - 0.5 * full_gradient(theta, x)
    optimizer, losses = make([theta], 7, lr=0.5), []
    for micro in x.split(3):

        def closure(micro=micro):
            optimizer.zero_grad()
            loss = loss_of(theta, micro)
            loss.backward()
            losses.append(loss.item())
            return loss

        returned = optimizer.step(closure, num_samples=len(micro))
        assert returned.item() == losses[-1]
    assert len(losses) == 3
    assert_close(theta.detach(), expected, rtol=1e-12, atol=1e-12)


@EITHER
def test_a_closure_that_raises_takes_nothing_in(make):
    optimizer = make([parameter(1.0, grad=[1.0])], 5)
    optimizer.step(num_samples=2)
    before = snapshot(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0, num_samples=3)
    assert_unchanged(optimizer, before)


# ------------------------------------------------------------ gather, flush


@EITHER
@pytest.mark.parametrize("count", [4, 100])
def test_the_whole_mean_and_that_of_a_smaller_last_batch_can_be_clipped(make, count):
    p = parameter(0.0, 0.0)
    optimizer = make([p], count, lr=1.0)
    assert optimizer.close() is False
    for g, m in (([0.0, 16.0], 1), ([4.0, 0.0], 3)):
        p.grad = torch.tensor(g)
        assert optimizer.gather(num_samples=m) is (count == 4 and m == 3)
    for _ in range(2):
        assert optimizer.close() is True
    assert p.grad.tolist() == [3, 4]
    torch.nn.utils.clip_grad_norm_([p], max_norm=1.0)
    optimizer.step()
    assert_close(p.detach(), torch.tensor([-0.6, -0.8]))
    assert optimizer.close() is False
    assert not optimizer.state
    p.grad = torch.zeros(2)
    assert optimizer.gather(num_samples=count)  # the next update has begun


@EITHER
def test_flush_after_a_complete_gather_makes_the_update_once(make):
    p = parameter(0.0, grad=[2.0])
    optimizer = make([p], 4, lr=1.0)
    assert optimizer.gather(num_samples=4)
    assert optimizer.flush() is True
    assert optimizer.flush() is False
    assert p.item() == -2


@EITHER
def test_flush_ignores_a_gradient_that_is_not_in(make):
    p, q = parameter(0.0, grad=[2.0]), parameter(0.0)
    optimizer = make([p, q], 4, lr=1.0)
    optimizer.step(num_samples=3)
    p.grad, q.grad = torch.tensor([100.0]), torch.tensor([100.0])
    optimizer.flush()
    assert [p.item(), q.item()] == [-2, 0]


@EITHER
@pytest.mark.parametrize("set_to_none", [False, True])
def test_an_epoch_of_batches_with_a_smaller_last_one(make, set_to_none):
    x, theta, twin = data(13), three(), three()
    optimizer, sgd = make([theta], 5, lr=0.5, momentum=0.9), SGD([twin], lr=0.5, momentum=0.9)
    for _ in range(3):
        for batch in x.split(5):
            for micro in batch.split(2):
                feed(optimizer, theta, micro, set_to_none)
            sgd.zero_grad()
            loss_of(twin, batch).backward()
            sgd.step()
        assert optimizer.flush() is True
        assert optimizer.flush() is False
        assert_close(theta, twin, rtol=1e-12, atol=1e-12)
        assert_close(optimizer.state_dict()["state"], sgd.state_dict()["state"])


# ------------------------------------------------------------ saved in the middle


def reloaded(optimizer, theta, make, **more):
    twin, state = through_a_file([theta, optimizer.state_dict()])
    other = make([twin], 7, **more)
    other.load_state_dict(state)
    return other, twin


def deep_copied(optimizer, theta, make, **more):
    return copy.deepcopy((optimizer, theta))


def pickled(optimizer, theta, make, **more):
    return pickle.loads(pickle.dumps((optimizer, theta)))


@EITHER
@pytest.mark.parametrize("copied", [reloaded, deep_copied, pickled])
@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("stop", range(1, 9))
def test_a_run_saved_in_the_middle_of_an_update_goes_on_bit_for_bit(make, copied, rule, stop):
    rule = {"lr": 0.3, **rule}
    micros = data(7).split(2) * 3
    theta = three()
    optimizer = make([theta], 7, **rule)
    for micro in micros[:stop]:
        feed(optimizer, theta, micro)
    other, twin = copied(optimizer, theta, make, **rule)
    assert torch.equal(theta, twin)
    for micro in micros[stop:]:
        feed(optimizer, theta, micro)
        feed(other, twin, micro)
        assert torch.equal(theta, twin)
    assert_close(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert not torch.equal(theta, three())


@EITHER
def test_a_loaded_sum_is_apart_from_the_one_it_was_loaded_from(make):
    p, q = parameter(0.0, grad=[1.0]), parameter(0.0, grad=[1.0])
    first, second = make([p], 4, lr=1.0), make([q], 4, lr=1.0)
    first.step(num_samples=2)
    second.load_state_dict(first.state_dict())
    second.step(num_samples=1)
    first.step(num_samples=2)
    second.step(num_samples=1)
    assert [p.item(), q.item()] == [-1, -1]


@EITHER
@pytest.mark.parametrize("other", [3, 8, None, SGD])
def test_an_unfinished_update_of_another_size_is_refused(make, other):
    optimizer = make([parameter(1.0, grad=[1.0])], 7)
    optimizer.step(num_samples=2)
    params = [parameter(1.0, grad=[1.0])]
    target = SGD(params) if other is SGD else make(params, other)
    before = snapshot(target)
    with pytest.raises(ValueError, match="2 of 7 examples of an unfinished update"):
        target.load_state_dict(optimizer.state_dict())
    assert_unchanged(target, before)


@EITHER
@pytest.mark.parametrize("torchs", [False, True])
def test_a_state_between_updates_moves_to_another_size_and_is_saved_there(make, torchs):
    params = [parameter(1.0, grad=[1.0])]
    first = torch.optim.SGD(params) if torchs else make(params, 7)
    first.step(**({} if torchs else {"num_samples": 7}))
    second = make([parameter(0.0, grad=[1.0])], 4, lr=1.0)
    second.load_state_dict(first.state_dict())
    second.step(num_samples=3)
    p = parameter(0.0, grad=[5.0])
    third = make([p], 4)
    third.load_state_dict(second.state_dict())
    third.param_groups[0]["lr"] = 1.0
    third.step(num_samples=1)
    assert p.item() == -(3 * 1 + 5) / 4


@EITHER
def test_groups_taken_from_an_optimizer_in_the_middle_start_a_new_update(make):
    p = parameter(0.0, grad=[1.0])
    first = make([p], 4, lr=1.0)
    first.step(num_samples=2)
    second = make(first.param_groups, 4, lr=1.0)
    second.step(num_samples=2)
    assert p.item() == 0
    second.step(num_samples=2)
    assert p.item() == -1


# ------------------------------------------------------------ between gather() and step()


@EITHER
@pytest.mark.parametrize("copied", [reloaded, deep_copied, pickled])
@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("M", [2, 7])
@pytest.mark.parametrize("clipped", [False, True])
def test_a_run_saved_between_gather_and_step_goes_on_bit_for_bit(make, copied, rule, M, clipped):
    rule = {"lr": 0.3, **rule}
    theta = three()
    optimizer = make([theta], 7, **rule)
    for _ in range(2):
        for micro in data(7).split(M):
            optimizer.zero_grad()
            loss_of(theta, micro).backward()
            complete = optimizer.gather(num_samples=len(micro))
        assert complete
        if clipped:
            torch.nn.utils.clip_grad_norm_([theta], max_norm=0.1)
        other, twin = copied(optimizer, theta, make, **rule)
        assert torch.equal(twin.grad, theta.grad)
        assert twin.grad is not theta.grad
        optimizer.step()
        other.step()
        assert torch.equal(twin, theta)
        assert_close(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert not torch.equal(theta, three())
    assert optimizer.state.get(theta, {}).keys() <= {"momentum_buffer"}


@EITHER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_other_dtypes_and_absent_gradients_survive_a_save_between_gather_and_step(make, dtype):
    params = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for _ in range(2)]
    optimizer = make(params, 4, lr=1.0)
    for m in (1, 3):
        params[0].grad = torch.ones(2, dtype=dtype)
        complete = optimizer.gather(num_samples=m)
    assert complete
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twins[1].grad = torch.ones(2, dtype=dtype)  # left over
    other = make(twins, 4)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert twins[1].tolist() == [0, 0]
    assert twins[0].tolist() == [-1, -1]
    assert params[0].tolist() == [0, 0]


# ------------------------------------------------------------ close, discard


@EITHER
@pytest.mark.parametrize("count", [2, 5])
def test_what_is_discarded_takes_no_part(make, count):
    p = parameter(0.0, grad=[100.0])
    optimizer = make([p], 5, lr=1.0)
    assert optimizer.discard() == 0
    optimizer.gather(num_samples=count)
    assert optimizer.discard() == count
    assert not optimizer.state
    p.grad = torch.tensor([2.0])
    optimizer.step(num_samples=2)
    p.grad = torch.tensor([4.0])
    optimizer.step(num_samples=3)
    assert_close(p.item(), -(2 * 2 + 4 * 3) / 5)
