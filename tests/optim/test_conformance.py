"""What PyTorch's test_optim.py asks of an optimizer, for each of its inputs of SGD in each mode."""

import copy
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
from optimizers import EVERY, through_a_file
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

FLAGS = ("foreach", "differentiable", "fused")
FUSED_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCHEDULES = [
    [lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10)],
    [lambda o: lr_scheduler.LinearLR(o, start_factor=0.4, total_iters=4)],
    [
        lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.4, total_iters=4),
    ],
    [
        lambda o: lr_scheduler.StepLR(o, gamma=0.99, step_size=10),
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.99),
        lambda o: lr_scheduler.ReduceLROnPlateau(o),
    ],
    [lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=4)],
    [lambda o: lr_scheduler.PolynomialLR(o, power=0.9, total_iters=4)],
]


@pytest.fixture
def inputs(conformance):
    """Arguments of the constructor, without flags."""
    return [copy.deepcopy(arguments) for _, arguments in conformance[0]]


@pytest.fixture
def flagged(inputs):
    """The same, in a loop, with foreach, with fused."""
    return [
        {**copy.deepcopy(arguments), **dict.fromkeys(FLAGS, False), **flag}
        for arguments in inputs
        for flag in ({}, {"foreach": True}, {"fused": True})
    ]


def parameters(*shapes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in shapes or ((10, 5), (10,))]


def quadratic(optimizer, params, x):
    def closure():
        optimizer.zero_grad()
        loss = ((params[0].mv(x) + params[1]) ** 2).sum()
        loss.backward()
        return loss

    return closure


def stepped(optimizer, arguments):
    """An optimizer after one step."""
    params = parameters()
    opt = optimizer(params, **arguments)
    opt.step(quadratic(opt, params, torch.randn(5)))
    return opt


def advance(schedules, loss):
    for schedule in schedules:
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(loss.detach())
        else:
            schedule.step()


def assert_right_direction(arguments, before, after):
    assert after > before if arguments.get("maximize") else after < before


# ------------------------------------------------------------ direction


@EVERY
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedules", [[], *SCHEDULES])
def test_the_loss_goes_in_the_right_direction(optimizer, flagged, contiguous, schedules):
    for arguments in flagged:
        if contiguous:
            params = parameters()
        else:
            params = [torch.nn.Parameter(p.data[..., 0]) for p in parameters((10, 5, 2), (10, 2))]
        opt = optimizer(params, **arguments)
        running = [make(opt) for make in schedules]
        closure = quadratic(opt, params, torch.randn(5))
        before = closure().item()
        for _ in range(20):
            advance(running, opt.step(closure))
        assert_right_direction(arguments, before, closure().item())


@EVERY
@pytest.mark.parametrize("schedules", SCHEDULES)
def test_a_schedule_drives_a_group_with_its_own_lr(optimizer, schedules):
    params = parameters()
    opt = optimizer([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}])
    running = [make(opt) for make in schedules]
    closure = quadratic(opt, params, torch.randn(5))
    before = closure().item()
    for _ in range(20):
        advance(running, opt.step(closure))
    assert closure().item() < before


@EVERY
def test_groups_with_another_weight_decay_and_with_a_negligible_lr(optimizer, flagged):
    for arguments in flagged:
        params, still = parameters(), torch.nn.Parameter(torch.randn(2))
        untouched = still.detach().clone()
        opt = optimizer(
            [
                {"params": params[:1], **arguments},
                {"params": params[1:], **{**arguments, "weight_decay": 0.0}},
                {"params": [still], "fused": arguments["fused"]},
            ],
            lr=1e-28,
        )
        opt.param_groups[0].setdefault("lr", 1e-3)
        for group in opt.param_groups[:2]:
            group["lr"] = arguments.get("lr", 1e-3)
        closure = quadratic(opt, params, torch.randn(5))
        before = closure().item()
        for _ in range(20):
            closure()
            still.grad = torch.rand(2)
            opt.step()
        assert_right_direction(arguments, before, closure().item())
        assert torch.equal(still, untouched)


@EVERY
@pytest.mark.parametrize("dimensions", [0, 1, 2])
def test_a_tensor_lr_gives_the_numbers_of_the_float(optimizer, flagged, dimensions):
    for arguments in flagged:
        params = parameters()
        twins = copy.deepcopy(params)
        one = optimizer(params, **{**arguments, "lr": 1e-3})
        other = optimizer(twins, **{**arguments, "lr": torch.full((1,) * dimensions, 1e-3)})
        x = torch.randn(5)
        for _ in range(5):
            one.step(quadratic(one, params, x))
            other.step(quadratic(other, twins, x))
            assert_close(twins, params)


# ------------------------------------------------------------ mode against mode


def network(dtype):
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    ).to(dtype)


@EVERY
@pytest.mark.parametrize(
    ("flag", "dtype"), [("foreach", torch.float64), *(("fused", d) for d in FUSED_DTYPES)]
)
def test_a_mode_gives_the_numbers_and_state_of_the_loop(optimizer, inputs, flag, dtype):
    x = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=dtype)
    for arguments in inputs:
        models, optimizers = [], []
        for value in (False, True):
            model = network(dtype)
            scalar = torch.tensor(0.5, dtype=dtype, requires_grad=True)
            scalar.grad = torch.tensor(0.25, dtype=dtype)
            flags = {"foreach": False, **{flag: value}}
            models.append(model)
            optimizers.append(optimizer([*model.parameters(), scalar], **arguments, **flags))
        for t in range(7):
            for model, opt in zip(models, optimizers, strict=True):
                opt.zero_grad()
                model[2].requires_grad_(t not in (3, 4))  # frozen, then unfrozen
                if t != 2:  # a step without any gradient
                    model(x).sum().backward()
                opt.step()
            pairs = zip(*(m.parameters() for m in models), strict=True)
            for p, q in pairs:
                assert_close(p, q)
                states = [opt.state.get(r) for opt, r in zip(optimizers, (p, q), strict=True)]
                assert_close(*states)
                q.data.copy_(p.data)  # roundings are not to add up
                if states[0]:
                    states[1]["momentum_buffer"].copy_(states[0]["momentum_buffer"])


@EVERY
def test_complex_parameters_move_as_their_parts(optimizer, flagged):
    for arguments in flagged:
        if arguments["fused"]:
            continue
        z, real = parameters((5, 2))[0], parameters((4,))[0]  # complex and real beside each other
        z = torch.nn.Parameter(torch.view_as_complex(z.detach()).clone())
        parts = [torch.nn.Parameter(torch.view_as_real(z.detach()).clone()), copy.deepcopy(real)]
        one, other = optimizer([z, real], **arguments), optimizer(parts, **arguments)
        for _ in range(3):
            z.grad, real.grad = torch.randn(5, dtype=z.dtype), torch.randn(4)
            parts[0].grad, parts[1].grad = torch.view_as_real(z.grad).clone(), real.grad.clone()
            one.step()
            other.step()
            assert_close([torch.view_as_real(z.detach()), real], parts)


@EVERY
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_rosenbrock_by_sparse_gradients_of_one_coordinate_in_turn(optimizer, foreach, maximize):
    """Uncoalesced, in two precisions at once, with a schedule."""
    arguments = {"lr": 1e-5 if maximize else 4e-4, "foreach": foreach, "maximize": maximize}
    params = [torch.nn.Parameter(torch.tensor([1.5, 1.5], dtype=d)) for d in FUSED_DTYPES[:2]]
    dense = copy.deepcopy(params)
    optimizers = [optimizer(ps, **arguments) for ps in (params, dense)]
    schedules = [lr_scheduler.StepLR(o, gamma=0.99999, step_size=20) for o in optimizers]

    def distance():
        return sum(p.dist(torch.ones(2, dtype=p.dtype)).item() for p in params)

    before = distance()
    for t in range(60):
        i = t % 2
        for p, q in zip(params, dense, strict=True):
            x, y = p.detach()
            g = (-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2))[i]
            parts = torch.stack([g / 4, g - g / 4])
            p.grad = torch.sparse_coo_tensor(
                torch.tensor([[i, i]]), parts, (2,), check_invariants=True
            )
            q.grad = p.grad.to_dense()
        for opt, schedule in zip(optimizers, schedules, strict=True):
            opt.step()
            schedule.step()
        assert_close(params, dense, atol=5e-6, rtol=5e-6)
    assert distance() > before if maximize else distance() < before


@EVERY
def test_fused_waits_for_parameters_that_are_only_announced(optimizer):
    with torch.device("meta"):
        model = torch.nn.Linear(2, 3)
        opt = optimizer(model.parameters(), fused=True)
        for p in model.parameters():
            p.grad = torch.rand_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating"):
        opt.step()
    opt.zero_grad()
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    opt.step()


@EVERY
@pytest.mark.parametrize("grad_scale", [None, torch.ones(1)])
def test_fused_does_not_step_when_an_overflow_was_found(optimizer, inputs, grad_scale):
    for arguments in inputs:
        params = [torch.ones(1) for _ in range(5)]
        for p in params:
            p.grad = torch.ones_like(p)
        opt = optimizer(params, fused=True, **arguments)
        opt.grad_scale, opt.found_inf = grad_scale, torch.ones(())
        opt.step()
        assert_close(params, [torch.ones(1)] * 5, rtol=0, atol=0)


@EVERY
@pytest.mark.parametrize("unscaled_before", [False, True])
def test_fused_under_a_scaler_gives_the_numbers_state_and_gradients_of_unfused(
    optimizer, inputs, unscaled_before
):
    batches = torch.randn(4, 6, 4)
    for arguments in inputs:
        models = [torch.nn.Linear(4, 2)]
        models.append(copy.deepcopy(models[0]))
        optimizers = [
            optimizer(m.parameters(), **arguments, fused=fused)
            for m, fused in zip(models, (False, True), strict=True)
        ]
        scalers = [torch.amp.GradScaler("cpu", init_scale=128.0) for _ in models]
        for t, x in enumerate(batches):
            for model, opt, scaler in zip(models, optimizers, scalers, strict=True):
                opt.zero_grad()
                with torch.autocast("cpu", torch.float16):
                    loss = (model(x).float() ** 2).mean()
                scaler.scale(loss).backward()
                if t == 2:
                    model.weight.grad[0, 0] = torch.inf
                if unscaled_before:
                    scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
            for p, q in zip(*(m.parameters() for m in models), strict=True):
                assert_close(p, q)
                assert_close(optimizers[0].state.get(p), optimizers[1].state.get(q))
                if t != 2:
                    assert_close(p.grad, q.grad)


# ------------------------------------------------------------ nothing to do


@EVERY
def test_a_step_of_zero_gradients_or_none_changes_nothing(optimizer, flagged):
    for arguments, g in itertools.product(flagged, (None, 0.0)):
        if g == 0 and arguments.get("weight_decay"):
            continue
        p = torch.randn(5, 1)
        before = p.clone()
        opt = optimizer([p], **arguments)
        p.grad = None if g is None else torch.zeros_like(p)
        assert opt.step(lambda: torch.tensor([1.0])).item() == 1
        assert torch.equal(p, before)


@EVERY
def test_no_state_is_empty(optimizer, inputs):
    for arguments in inputs:
        opt = stepped(optimizer, arguments)
        assert all(len(state) > 0 for state in opt.state.values())


# ------------------------------------------------------------ state


@EVERY
@pytest.mark.parametrize("named", list(itertools.product([False, True], repeat=2)))
def test_a_loaded_state_goes_on_alike_with_names_or_without(optimizer, flagged, named):
    x = torch.randn(5)

    def given(params, with_names):
        return [(f"name{i}", p) for i, p in enumerate(params)] if with_names else params

    def nameless(state):
        groups = [dict(group) for group in state["param_groups"]]
        for group in groups:
            group.pop("param_names", None)
        return {**state, "param_groups": groups}

    for arguments in flagged:
        params = parameters()
        one = optimizer(given(params, named[0]), **arguments)
        for _ in range(3):
            one.step(quadratic(one, params, x))
        twins = copy.deepcopy(params)
        other = optimizer(given(twins, named[1]), **arguments)
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        for _ in range(3):
            one.step(quadratic(one, params, x))
            other.step(quadratic(other, twins, x))
            assert_close(twins, params, rtol=0, atol=0)
        assert_close(nameless(one.state_dict()), nameless(other.state_dict()), rtol=0, atol=0)
        if any(named):
            names = other.state_dict()["param_groups"][0]["param_names"]
            assert names == ["name0", "name1"]
        # a group twice in the list is described twice alike
        other.param_groups.extend(other.param_groups)
        described = nameless(other.state_dict())["param_groups"]
        assert described[-1] == nameless(one.state_dict())["param_groups"][-1]


@EVERY
def test_a_state_without_the_newer_flags_is_loaded_and_stepped(optimizer, flagged, conformance):
    newer = {*conformance[2], "num_samples", "batch_size", "gathered", "overflow"}
    for arguments in flagged:
        opt = stepped(optimizer, arguments)
        state = copy.deepcopy(opt.state_dict())
        for group in state["param_groups"]:
            for flag in newer & group.keys():
                del group[flag]
        opt.load_state_dict(state)
        params = opt.param_groups[0]["params"]
        opt.step(quadratic(opt, params, torch.randn(5)))
        repr(opt)


@EVERY
def test_a_state_is_the_same_after_a_file(optimizer, flagged):
    for arguments in flagged:
        opt = stepped(optimizer, arguments)
        assert_close(through_a_file(opt.state_dict()), opt.state_dict(), rtol=0, atol=0)


@EVERY
def test_a_copy_has_all_public_attributes_and_is_printed_alike(optimizer, flagged):
    for arguments in flagged:
        opt = stepped(optimizer, arguments)
        twin = copy.deepcopy(pickle.loads(pickle.dumps(opt)))
        public = [{k for k in vars(o) if not k.startswith("_")} for o in (opt, twin)]
        assert public[0] == public[1]
        assert repr(opt) == repr(twin)
        assert repr(opt).startswith(optimizer.__name__)
        scaling = [o._step_supports_amp_scaling for o in (opt, twin)]
        assert scaling == [arguments["fused"]] * 2


# ------------------------------------------------------------ hooks


@EVERY
def test_step_hooks_run_in_order_and_can_be_removed(optimizer, flagged):
    def note(mark):
        return lambda *_: seen.append(mark)

    for arguments in flagged:
        opt, seen = optimizer([torch.ones(2)], **arguments), []
        handles = [
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
            opt.register_step_pre_hook(note("pre")),
            opt.register_step_post_hook(note("post")),
        ]
        try:
            opt.step(None)
            opt.step()
        finally:
            for handle in handles:
                handle.remove()
        opt.step()
        assert seen == ["global pre", "pre", "post", "global post"] * 2


@EVERY
def test_state_dict_hooks_may_add_entries_of_their_own(optimizer):
    opt = optimizer([torch.nn.Parameter(torch.ones(2))], momentum=0.9)
    opt.register_state_dict_pre_hook(lambda o: o.state.update(test=1))
    assert opt.state_dict()["state"]["test"] == 1

    def after(_, state):
        return {**state, "ran": state["state"].pop("test") == 1}

    opt.register_state_dict_post_hook(after)
    assert opt.state_dict()["ran"]
    opt.load_state_dict({k: v for k, v in opt.state_dict().items() if k != "ran"})
    assert opt.discard() == 0


@EVERY
def test_load_state_dict_hooks_run_in_order(optimizer):
    opt = optimizer([torch.nn.Parameter(torch.ones(2))])

    def in_place(_, state):
        state["param_groups"][0]["lr"] = 0.002

    def by_a_copy(_, state):
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        return state

    def after(o):
        o.state["seen"] = o.param_groups[0]["lr"]

    opt.register_load_state_dict_post_hook(after)
    opt.register_load_state_dict_pre_hook(in_place)
    opt.load_state_dict(opt.state_dict())
    assert (opt.param_groups[0]["lr"], opt.state["seen"]) == (0.002, 0.002)
    opt.register_load_state_dict_pre_hook(by_a_copy, prepend=True)
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr"] == 0.002
    opt.register_load_state_dict_pre_hook(by_a_copy)
    opt.load_state_dict(opt.state_dict())
    assert opt.state["seen"] == 0.003


# ------------------------------------------------------------ differentiable


@EVERY
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
@pytest.mark.parametrize("tensors", [set(), {"lr"}, {"weight_decay"}, {"lr", "weight_decay"}])
def test_a_loss_after_two_steps_has_gradients_by_the_hyperparameters(
    optimizer, tensors, rule, foreach
):
    double = {"dtype": torch.float64, "requires_grad": True}
    names = sorted(tensors)

    def loss_after_two_steps(start, g, buffer, *hyperparameters):
        theta = start.clone()
        theta.grad = g
        arguments = dict(zip(names, hyperparameters, strict=True))
        arguments = {"lr": 0.9, "weight_decay": 0.1, **arguments}
        opt = optimizer([theta], differentiable=True, foreach=foreach, **rule, **arguments)
        opt.state[theta]["momentum_buffer"] = buffer.clone()
        for _ in range(2):
            opt.step()
            loss = (theta.sum() - 2) ** 2
            (theta.grad,) = torch.autograd.grad(loss, theta, create_graph=True)
        return loss, opt.state[theta]["momentum_buffer"]

    given = [torch.rand(5, **double) for _ in range(3)]
    given += [torch.tensor(0.1, **double) for _ in names]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True")
        assert torch.autograd.gradcheck(loss_after_two_steps, given)


# ------------------------------------------------------------ memory


class Alive(TorchDispatchMode):
    """Counts the tensors that a computation has made and still holds."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (list, tuple)) else [out]
        self.made.update(t for t in made if isinstance(t, torch.Tensor))
        self.peak = max(self.peak, len(self.made))
        return out


@EVERY
def test_foreach_holds_one_temporary_for_each_parameter(optimizer, inputs):
    for arguments in inputs:
        params = parameters(*[(16, 8)] * 10)
        opt = optimizer(params, foreach=True, **arguments)
        for p in params:
            p.grad = torch.rand_like(p)
        opt.step()
        with Alive() as alive:
            opt.step()
        assert alive.peak <= len(params) + 1, arguments
