"""What is kept from one step to the next is never stale, and what is not paid for still works."""

import copy
import itertools
import warnings
import weakref
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from optimizers import EVERY, EVERY_RULE, RULES, twin_of
from torch.testing import assert_close

from gdtrain import rules
from gdtrain._compat import torch_kernels
from gdtrain.optim import SGD
from gdtrain.optim.plan import Plan


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def kernels(monkeypatch):
    """How many tensors each call of the fused kernel updated."""
    kernel, seen = torch._fused_sgd_, []

    def counted(params, *arguments, **keywords):
        seen.append(len(params))
        kernel(params, *arguments, **keywords)

    rules.fused_is_exact(torch.float32)  # calls it too
    rules.fused_is_exact(torch.float64)
    monkeypatch.setattr(torch_kernels, "fused_sgd_", counted)
    return seen


def parameter(*shape, dtype=torch.float32):
    p = torch.nn.Parameter(torch.randn(*shape, dtype=dtype))
    p.grad = torch.randn(*shape, dtype=dtype)
    return p


class Pair:
    """The same parameters under our SGD and under torch's loop."""

    def __init__(self, params, **arguments):
        self.ours = list(params)
        self.theirs = [with_gradient_of(p, twin_of(p.detach())) for p in self.ours]
        self.sgd = SGD(self.ours, **arguments)
        self.torch_sgd = torch.optim.SGD(self.theirs, **{**arguments, "foreach": False})

    def step(self):
        self.sgd.step()
        self.torch_sgd.step()
        self.check()

    def check(self):
        for p, q in zip(self.ours, self.theirs, strict=True):
            assert_close(p, q, rtol=0, atol=0)
            states = [o.state.get(r, {}) for o, r in ((self.sgd, p), (self.torch_sgd, q))]
            assert states[0].keys() == states[1].keys()
            assert_close(*(s.get("momentum_buffer") for s in states), rtol=0, atol=0)

    def new_gradients(self, indices=None):
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            if indices is None or i in indices:
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            else:
                p.grad = q.grad = None

    def both(self):
        """Each optimizer with its parameters."""
        return (self.sgd, self.ours), (self.torch_sgd, self.theirs)

    def set(self, **values):
        for o, _ in self.both():
            o.param_groups[0].update(values)


def with_gradient_of(p, tensor):
    twin = torch.nn.Parameter(tensor)
    twin.grad = None if p.grad is None else p.grad.clone()
    return twin


SHAPES = [(16,), (10,), (4, 8), (3, 5), (128,), (1037,), (784, 128)]


# ------------------------------------------------------------ which way is taken


def test_a_tensor_that_fills_no_vector_is_updated_apart_with_momentum(kernels):
    pair = Pair([parameter(784, 128), parameter(10)], lr=0.1, momentum=0.9)
    pair.step()
    assert kernels == []  # the first buffers
    pair.new_gradients()
    pair.step()
    assert kernels == [1, 1]


@pytest.mark.parametrize(
    "arguments",
    [{"foreach": False}, {"foreach": True}, {"fused": False}, {"differentiable": True}],
    ids=str,
)
def test_who_asks_for_another_way_gets_it(kernels, arguments):
    p = parameter(16)
    p = p.detach().requires_grad_(not arguments.get("differentiable"))
    p.grad = torch.ones(16)
    SGD([p], lr=0.1, **arguments).step()
    assert kernels == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_half_and_complex_numbers_are_not_given_to_the_kernel_unasked(kernels, dtype):
    pair = Pair([parameter(16, dtype=dtype)], lr=0.1)
    pair.step()
    assert kernels == []


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [
        ([16] * 8, [8]),
        ([32768, 16, 128], [3]),  # two more parallel regions cost less than another call
        ([32768] * 2 + [128] * 8 + [16] * 8, [10]),
        ([32768] * 2 + [128] * 8, [2]),
        ([128] * 8 + [16] * 8, [8]),
        ([7840, 16], []),
        ([128] * 20, []),
    ],
    ids=str,
)
def test_with_several_threads_the_kernel_opens_no_parallel_regions_for_little(
    kernels, sizes, calls
):
    pair = Pair([parameter(n) for n in sizes], lr=0.1)
    with threads(2):
        pair.step()
    assert kernels == calls
    pair.step()
    assert kernels == [*calls, len(sizes)]


@EVERY_RULE
@pytest.mark.parametrize("count", [1, 2])
def test_every_size_has_the_bits_of_torchs_loop(rule, count):
    sizes = [*range(70), 1000, 32767, 32768, 70001]
    with threads(count):
        pair = Pair([parameter(n) for n in sizes], lr=0.0317, **rule)
        for _ in range(3):
            pair.step()
            pair.new_gradients()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_is_tried_before_it_is_trusted(dtype, monkeypatch):
    kernel = torch._fused_sgd_

    def off_by_a_bit(params, *arguments, **keywords):
        kernel(params, *arguments, **keywords)
        for p in params:
            p.view(-1)[7] *= 1 + torch.finfo(p.dtype).eps

    monkeypatch.setattr(torch_kernels, "fused_sgd_", off_by_a_bit)
    assert not rules.fused_is_exact.__wrapped__(dtype)


def test_without_the_kernel_and_without_guards_the_numbers_are_the_same(monkeypatch):
    monkeypatch.setattr(torch_kernels, "TensorGuards", None)
    pair = Pair([parameter(*s) for s in SHAPES], lr=0.1, momentum=0.9)
    for _ in range(3):
        pair.step()


def test_an_error_changes_nothing():
    dense = parameter(16)
    sparse = torch.nn.Parameter(torch.ones(3, 2))
    sparse.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2), check_invariants=True)
    before = dense.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        SGD([dense, sparse], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(dense.detach(), before)


# ------------------------------------------------------------ what changes between the steps


def change_data(o, ps):
    ps[0].data = torch.full_like(ps[0], 2.0)


def change_layout(o, ps):
    ps[2].data = ps[2].data.t().contiguous().t()


def change_layout_of_gradients(o, ps):
    ps[2].grad = ps[2].grad.t().contiguous().t()


def view_of_the_same_memory(o, ps):
    p = ps[3]
    p.grad, p.data = None, p.data.t()
    p.grad = torch.ones_like(p)
    o.state.pop(p, None)


def fewer_entries(o, ps):
    p = ps[5]
    p.grad, p.data = None, p.data[:16]
    p.grad = torch.ones_like(p)
    if p in o.state:
        o.state[p]["momentum_buffer"] = torch.ones(16)


def to_double(o, ps):
    p = ps[0]
    p.grad, p.data = None, p.data.double()
    p.grad = torch.ones_like(p)
    if p in o.state:
        o.state[p]["momentum_buffer"] = o.state[p]["momentum_buffer"].double()


def expanded_gradient(o, ps):
    ps[4].grad = torch.tensor(0.5).expand(ps[4].shape)


def freeze(o, ps):
    ps[1].requires_grad_(False)
    ps[1].grad = None


def no_gradient_at_all(o, ps):
    o.zero_grad()


def one_gradient_for_two(o, ps):
    ps[2].data, ps[2].grad = torch.ones(16), None
    ps[2].grad = ps[0].grad
    o.state.pop(ps[2], None)


def another_buffer(o, ps):
    if ps[0] in o.state:
        o.state[ps[0]]["momentum_buffer"] = torch.ones(32)[::2]


def no_buffer(o, ps):
    o.state.pop(ps[0], None)


def reload(o, ps):
    o.load_state_dict(copy.deepcopy(o.state_dict()))


def another_parameter(o, ps):
    o.state.pop(ps[0], None)
    values = torch.linspace(-1, 1, ps[0].numel(), dtype=ps[0].dtype).reshape(ps[0].shape)
    o.param_groups[0]["params"][0] = ps[0] = torch.nn.Parameter(values)
    ps[0].grad = values.clone().cos()


def one_parameter_less(o, ps):
    o.state.pop(ps.pop(), None)
    o.param_groups[0]["params"].pop()


def another_group(o, ps):
    ps.append(parameter(16))
    ps[-1].data, ps[-1].grad = torch.linspace(-1, 1, 16), torch.linspace(2, 3, 16)
    o.add_param_group({"params": ps[-1:], "lr": 0.5})


def exchange_states(pair):
    states = [copy.deepcopy(o.state_dict()) for o, _ in reversed(pair.both())]
    for (o, _), state in zip(pair.both(), states, strict=True):
        state["param_groups"][0]["foreach"] = o.param_groups[0]["foreach"]
        o.load_state_dict(state)


def make(change, pair):
    if isinstance(change, dict):
        pair.set(**change)
    elif change is exchange_states:
        change(pair)
    else:
        for o, ps in pair.both():
            change(o, ps)


CHANGES = [
    change_data,
    change_layout,
    change_layout_of_gradients,
    view_of_the_same_memory,
    fewer_entries,
    to_double,
    expanded_gradient,
    freeze,
    no_gradient_at_all,
    one_gradient_for_two,
    another_buffer,
    no_buffer,
    reload,
    exchange_states,
    another_parameter,
    one_parameter_less,
    another_group,
]
CHANGED_ARGUMENTS = [
    {"lr": 0.3},
    {"lr": 1},
    {"momentum": 0.9},
    {"momentum": 0.5},
    {"momentum": 0, "nesterov": False},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"momentum": 0.9, "nesterov": True, "dampening": 0},
    {"dampening": 0.3, "nesterov": False},
    {"lr": torch.tensor(0.3)},
    {"lr": 0.2, "weight_decay": torch.tensor(0.5)},
]


@EVERY_RULE
@pytest.mark.parametrize(
    "change", [*CHANGES, *CHANGED_ARGUMENTS], ids=lambda c: getattr(c, "__name__", str(c))
)
def test_a_change_between_the_steps_is_seen(rule, change):
    pair = Pair([parameter(*s) for s in SHAPES], lr=0.1, **rule)
    for _ in range(3):
        pair.step()
    make(change, pair)
    for _ in range(3):
        pair.step()
        pair.new_gradients()


OPERATIONS = st.one_of(
    st.sampled_from(CHANGES[:-1]),
    st.sampled_from(CHANGED_ARGUMENTS),
    st.lists(st.integers(0, len(SHAPES) - 1), max_size=len(SHAPES)).map(set),
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rule=st.sampled_from(list(RULES.values())), operations=st.lists(OPERATIONS, max_size=12))
def test_any_sequence_of_changes_makes_the_updates_of_torch(rule, operations):
    pair = Pair([parameter(*s) for s in SHAPES], lr=0.1, **rule)
    pair.step()
    done = set()
    for operation in operations:
        if isinstance(operation, dict):
            pair.set(**operation)
            if pair.sgd.param_groups[0]["momentum"] == 0:
                pair.set(nesterov=False)
        elif isinstance(operation, set):
            pair.new_gradients(operation)
        elif operation not in done and all(p.grad is not None for p in pair.ours):
            done.add(operation)  # once: the second would find other shapes
            if len(done & {view_of_the_same_memory, change_layout, one_gradient_for_two}) > 1:
                continue
            if operation is another_parameter and to_double in done:
                continue
            try:
                make(operation, pair)
            except IndexError:
                continue  # of a parameter that is gone
        pair.step()
    pair.new_gradients()
    pair.step()


def test_a_parameter_cut_short_without_its_gradient_is_an_error_and_not_written_beside():
    memory = torch.zeros(64)
    p = torch.nn.Parameter(memory[:32])
    p.grad = torch.ones(32)
    optimizer = SGD([p], lr=1.0)
    optimizer.step()
    p.data = memory[:16]
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert memory.tolist() == [-1] * 32 + [0] * 32


def test_a_plan_keeps_no_tensor_alive():
    p = parameter(16)
    optimizer = SGD([p], lr=0.1)
    optimizer.step()
    gone = weakref.ref(p.grad)
    optimizer.zero_grad()
    assert gone() is None


@pytest.mark.parametrize("mode", [{}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_autograd_notices_that_parameters_were_updated(mode, momentum):
    p = parameter(16)
    optimizer = SGD([p], lr=0.1, momentum=momentum, **mode)
    for _ in range(3):
        loss = (p**2).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_fused_step_under_a_scaler_unscales_after_steps_without():
    p, q = parameter(16), parameter(16)
    optimizer = SGD([p, q], lr=0.5, fused=True)
    optimizer.step()
    start = p.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale((p + q).sum()).backward()
    scaler.step(optimizer)
    assert_close(p.detach(), start - 0.5)


def test_plan_by_hand():
    theta = torch.tensor([1.0, 2.0])
    theta.grad = torch.tensor([1.0, 6.0])
    group = torch.optim.SGD([theta], lr=0.5, momentum=0.5).param_groups[0]
    state = {theta: {"momentum_buffer": torch.tensor([2.0, 0.0])}}
    made = Plan(group, state)
    assert made.descend_(group, state)
    assert theta.tolist() == [1 - 0.5 * 2, 2 - 0.5 * 6]
    assert state[theta]["momentum_buffer"].tolist() == [2, 6]
    assert not made.descend_({**group, "nesterov": True}, state)
    assert not made.descend_({**group, "momentum": 0}, state)
    assert not made.descend_(group, {})
    assert theta.tolist() == [0, -1]


# ------------------------------------------------------------ hooks, the profiler, schedules


@EVERY
def test_hooks_see_the_arguments_as_given_and_may_change_them(optimizer):
    opt, seen = optimizer([parameter(16)], lr=0.1), []

    def closure():
        return torch.tensor(3.0)

    def pre(o, args, kwargs):
        seen.append((args, kwargs))
        return (*args, closure), {}

    opt.register_step_post_hook(lambda o, args, kwargs: seen.append((args, kwargs)))
    opt.step(closure=closure)
    assert seen == [((opt,), {"closure": closure})]
    opt.step()
    assert seen[1:] == [((opt,), {})]
    opt.register_step_pre_hook(pre)
    assert opt.step().item() == 3
    assert seen[2:] == [((opt,), {}), ((opt, closure), {})]


def test_hooks_of_a_subclass_with_its_own_step_run_once_and_around_it():
    events = []

    class Loud(SGD):
        def step(self, closure=None):
            events.append("step")
            return super().step(closure)

    class Louder(Loud):
        pass

    for cls in (Loud, Louder, SGD):
        opt = cls([parameter(16)])
        opt.register_step_pre_hook(lambda *_: events.append("pre"))
        opt.register_step_post_hook(lambda *_: events.append("post"))
        opt.step()
        assert events == ["pre", *(["step"] if cls is not SGD else []), "post"]
        events.clear()


@EVERY
def test_the_profiler_sees_every_step_by_its_name(optimizer):
    opt = optimizer([parameter(16)])
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        opt.step()
        opt.step()
    counts = {e.key: e.count for e in profiler.key_averages()}
    assert counts[f"Optimizer.step#{optimizer.__name__}.step"] == 2
    before = sum(counts.values())
    opt.step()
    assert sum(e.count for e in profiler.key_averages()) == before


@EVERY
def test_a_schedule_knows_that_the_optimizer_has_stepped(optimizer):
    opt = optimizer([parameter(16)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            opt.step()
            schedule.step()
    assert opt.param_groups[0]["lr"] == 0.125
    late = optimizer([parameter(16)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(late, 0.5)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        schedule.step()


@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize(("mode", "inside"), [*itertools.product([True, False], repeat=2)])
def test_the_grad_mode_is_that_of_the_caller_afterwards(raised, mode, inside):
    p = parameter(16).detach().requires_grad_(not inside)
    opt = SGD([p], differentiable=inside)

    def closure():
        if raised:
            raise KeyError("of the user")
        return 1.0

    with torch.set_grad_enabled(mode):
        if raised:
            with pytest.raises(KeyError):
                opt.step(closure)
        else:
            opt.step(closure)
        assert torch.is_grad_enabled() == mode


COMPILED = [(rule, lr, "eager") for rule in RULES.values() for lr in (0.1, torch.tensor(0.1))]
COMPILED += [
    pytest.param(RULES["nesterov, decay"], torch.tensor(0.1), "inductor", marks=pytest.mark.slow)
]


@pytest.mark.parametrize(("rule", "lr", "backend"), COMPILED, ids=str)
def test_a_compiled_step_and_an_eager_one_may_alternate(rule, lr, backend):
    pair = Pair([parameter(4, 4), parameter(5)], lr=lr, **rule)
    pair.new_gradients({0})  # the other's first comes late
    torch._dynamo.reset()
    compiled = torch.compile(pair.sgd.step, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (pair.sgd.step, compiled, compiled, pair.sgd.step, compiled):
            step()
            pair.torch_sgd.step()
            assert_close(pair.ours, pair.theirs)
            pair.new_gradients()
