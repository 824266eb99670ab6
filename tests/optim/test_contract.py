import copy
import inspect
import itertools
import math
import pickle
import warnings

import pytest
import torch
from optimizers import EVERY, EVERY_MODE, MODES, parameter
from torch.testing import assert_close

from gdtrain.optim import GD, SGD, MiniBatchSGD

UNFUSED = pytest.mark.parametrize("foreach", [None, False, True])
RULE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


def parameters():
    return [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))]


def steps(optimizer, times):
    """So many steps on Σ¼θ⁴, whose gradient is θ³."""
    for _ in range(times):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.detach() ** 3
        optimizer.step()


def values(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


# ------------------------------------------------------------ arguments

INVALID = [
    ({"lr": -0.1}, "Invalid learning rate: -0.1"),
    ({"lr": math.nan}, "Invalid learning rate: nan"),
    ({"lr": math.inf}, "Invalid learning rate: inf"),
    ({"lr": torch.tensor(-0.1)}, "Invalid learning rate: -0.1"),
    ({"lr": torch.tensor(math.nan)}, "Invalid learning rate: nan"),
    ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element"),
    ({"lr": torch.tensor([])}, "Tensor lr must be 1-element"),
    ({"momentum": -0.5}, "Invalid momentum value: -0.5"),
    ({"momentum": math.nan}, "Invalid momentum value: nan"),
    ({"momentum": math.inf}, "Invalid momentum value: inf"),
    ({"dampening": math.nan}, "Invalid dampening value: nan"),
    ({"dampening": -math.inf}, "Invalid dampening value: -inf"),
    ({"weight_decay": -0.5}, "Invalid weight_decay value: -0.5"),
    ({"weight_decay": math.nan}, "Invalid weight_decay value: nan"),
    ({"weight_decay": torch.tensor(math.inf)}, "Invalid weight_decay value: inf"),
    ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "Nesterov momentum requires a momentum and zero dampening",
    ),
]


@EVERY
@pytest.mark.parametrize(("arguments", "message"), INVALID, ids=str)
def test_invalid_arguments_are_refused_and_named(optimizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        optimizer([parameter(1.0)], **arguments)
    with pytest.raises(ValueError, match=message):  # of one group
        optimizer([{"params": [parameter(1.0)]}, {"params": [parameter(2.0)], **arguments}])


@EVERY
def test_a_group_without_momentum_under_a_default_of_nesterov_is_refused(optimizer):
    groups = [{"params": [parameter(1.0)], "momentum": 0}]
    with pytest.raises(ValueError, match="Nesterov momentum requires"):
        optimizer(groups, momentum=0.9, nesterov=True)


@EVERY
@pytest.mark.parametrize("other", ["foreach", "differentiable"])
def test_fused_excludes_foreach_and_differentiable(optimizer, other):
    with pytest.raises(RuntimeError, match=f"`fused`.*`{other}`"):
        optimizer([parameter(1.0)], fused=True, **{other: True})


@EVERY
@pytest.mark.parametrize(
    "arguments",
    [{"lr": 0}, {"lr": 0.0}, {"momentum": 1.5}, {"dampening": -1}, {"lr": torch.tensor([[0.1]])}],
    ids=str,
)
def test_the_ends_of_the_ranges_are_taken(optimizer, arguments):
    group = optimizer([parameter(1.0)], **arguments).param_groups[0]
    assert all(group[name] is value for name, value in arguments.items())


BY_RULE = ["step_size", "total_updates"]  # ours alone


def test_sgd_takes_the_arguments_of_torch_with_the_same_defaults_and_two_of_its_own():
    ours = inspect.signature(SGD).parameters
    theirs = inspect.signature(torch.optim.SGD).parameters
    described = [[(p.name, p.kind, p.default) for p in s.values()] for s in (ours, theirs)]
    own = [(name, inspect.Parameter.KEYWORD_ONLY, None) for name in BY_RULE]
    assert described[0] == described[1] + own


@pytest.mark.parametrize(("optimizer", "own"), [(GD, "num_samples"), (MiniBatchSGD, "batch_size")])
def test_gd_and_minibatch_sgd_add_one_keyword(optimizer, own):
    ours = inspect.signature(optimizer).parameters
    theirs = list(inspect.signature(torch.optim.SGD).parameters)
    assert [n for n in ours if n != own] == theirs + BY_RULE
    assert ours[own].kind is inspect.Parameter.KEYWORD_ONLY
    assert ours[own].default is None


@EVERY
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", [0, 1])
def test_an_lr_that_ceases_to_be_finite_is_refused_and_nothing_changes(optimizer, value, group):
    opt = optimizer([{"params": [p]} for p in parameters()], lr=0.1, momentum=0.9)
    steps(opt, 2)
    before = copy.deepcopy((values(opt), opt.state_dict()["state"]))
    opt.param_groups[group]["lr"] = value
    with pytest.raises(ValueError, match=f"Invalid learning rate: {value}"):
        steps(opt, 1)
    assert_close((values(opt), opt.state_dict()["state"]), before, rtol=0, atol=0)
    opt.param_groups[group]["lr"] = 0.1
    steps(opt, 1)


# ------------------------------------------------------------ groups


@EVERY_MODE
def test_each_group_uses_its_own_hyperparameters(mode):
    a, b, c = (parameter(1.0, grad=[1.0]) for _ in range(3))
    optimizer = SGD(
        [
            {"params": [a], "lr": 0.5},
            {"params": [b], "weight_decay": 1.0},
            {"params": [c], "maximize": True, "momentum": 0.5},
        ],
        lr=0.25,
        **mode,
    )
    optimizer.step()
    assert [a.item(), b.item(), c.item()] == [0.5, 0.5, 1.25]
    assert set(optimizer.state) == {c}


def test_a_group_that_is_refused_is_not_added():
    optimizer = SGD([parameter(1.0)])
    optimizer.add_param_group({"params": [parameter(1.0)], "lr": 0.05})
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optimizer.add_param_group({"params": [parameter(1.0)], "lr": -1})
    assert len(optimizer.param_groups) == 2


@EVERY
def test_an_added_group_gets_every_key_of_the_others(optimizer):
    opt = optimizer([parameter(1.0)])
    opt.add_param_group({"params": [parameter(2.0)]})
    assert opt.param_groups[0].keys() == opt.param_groups[1].keys()


# ------------------------------------------------------------ state


@EVERY_MODE
@pytest.mark.parametrize("rule", [{}, RULE], ids=["plain", "momentum"])
def test_state_dict_has_the_keys_of_torch(mode, rule):
    ours, theirs = SGD(parameters(), **rule, **mode), torch.optim.SGD(parameters(), **rule, **mode)
    steps(ours, 1)
    steps(theirs, 1)
    mine, its = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == its["param_groups"]
    assert {i: set(s) for i, s in mine["state"].items()} == {
        i: set(s) for i, s in its["state"].items()
    }


@EVERY_MODE
@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.optim.SGD, o) for o in (SGD, GD, MiniBatchSGD)]
    + [(o, torch.optim.SGD) for o in (SGD, GD, MiniBatchSGD)],
)
def test_a_run_moves_between_torch_and_gdtrain_with_its_momentum(before, after, mode):
    first = before(parameters(), **RULE, **mode)
    steps(first, 5)
    second = after([torch.nn.Parameter(p) for p in values(first)], lr=7.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(first, 5)
    steps(second, 5)
    assert second.param_groups[0]["lr"] == 0.1
    assert_close(values(second), values(first))


@EVERY
@EVERY_MODE
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_in_the_middle_goes_on_alike_and_apart(optimizer, mode, copied):
    opt = optimizer(parameters(), **RULE, **mode)
    steps(opt, 3)
    twin = copied(opt)
    assert_close(values(twin), values(opt), rtol=0, atol=0)
    steps(opt, 3)
    ahead = values(opt)
    assert not torch.equal(values(twin)[0], ahead[0])
    steps(twin, 3)
    assert_close(values(twin), ahead, rtol=0, atol=0)


@EVERY_MODE
def test_a_momentum_buffer_of_none_is_a_buffer_not_yet_made(mode):
    fresh = SGD(parameters(), **RULE, **mode)
    loaded = SGD([torch.nn.Parameter(p) for p in values(fresh)], **RULE, **mode)
    state = loaded.state_dict()
    state["state"] = {0: {"momentum_buffer": None}, 1: {"momentum_buffer": None}}
    loaded.load_state_dict(state)
    steps(fresh, 3)
    steps(loaded, 3)
    assert_close(values(loaded), values(fresh), rtol=0, atol=0)


@EVERY
def test_a_load_state_dict_pre_hook_may_adapt_a_smaller_state(optimizer):
    old, new = parameters()
    smaller, larger = optimizer([old], **RULE), optimizer([old, new], **RULE)
    steps(smaller, 1)

    def adapt(_, state):
        return {**state, "param_groups": [{**state["param_groups"][0], "params": [0, 1]}]}

    larger.register_load_state_dict_pre_hook(adapt)
    larger.load_state_dict(smaller.state_dict())
    assert set(larger.state) == {old}


@EVERY
def test_a_state_of_other_groups_is_refused(optimizer):
    one, two = optimizer(parameters()), optimizer([{"params": [p]} for p in parameters()])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        one.load_state_dict(two.state_dict())


# ------------------------------------------------------------ the step


@EVERY
def test_a_closure_is_called_once_with_gradients_enabled(optimizer):
    p, calls = parameter(3.0), []
    opt = optimizer([p], lr=0.5)

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    assert loss.item() == 9
    assert p.item() == 0
    assert opt.step() is None


@EVERY_MODE
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_weight_decay_may_be_a_tensor(mode, shape):
    opt = SGD(parameters(), lr=0.1, weight_decay=torch.full(shape, 0.5), **mode)
    twin = SGD([torch.nn.Parameter(p) for p in values(opt)], lr=0.1, weight_decay=0.5)
    steps(opt, 3)
    steps(twin, 3)
    assert_close(values(opt), values(twin))


@EVERY_MODE
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_tensors_for_numbers_give_the_bits_of_torch(mode, dtype):
    """lr and weight_decay as tensors, with 1,000 entries that round in all ways."""
    if mode == {"foreach": True} and dtype.itemsize < 4:
        pytest.skip("torch._foreach_mul_ rounds the momentum itself there")
    start, *grads = torch.randn(4, 1000).to(dtype)
    cases = itertools.product(
        (0.0317, torch.tensor(0.0317)),
        (0.0, 0.0137, torch.tensor(0.0137), torch.tensor(0.0137, dtype=torch.float64)),
        ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
        (False, True),
    )
    for lr, weight_decay, momentum, maximize in cases:
        found = []
        for optimizer in (SGD, torch.optim.SGD):
            theta = torch.nn.Parameter(start.clone())
            arguments = {"lr": lr, "weight_decay": weight_decay, **momentum, **mode}
            opt = optimizer([theta], maximize=maximize, **arguments)
            for g in grads:
                theta.grad = g.clone()
                opt.step()
            found.append(theta.detach())
        assert torch.equal(*found), (lr, weight_decay, momentum, maximize)


# check_invariants, here and below: left open, it makes torch warn
@UNFUSED
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"maximize": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=str,
)
def test_sparse_gradients_beside_dense_ones_are_taken_as_by_torch(rule, foreach):
    ours = [torch.nn.Parameter(torch.randn(5, 2)), torch.nn.Parameter(torch.ones(3))]
    theirs = copy.deepcopy(ours)
    sgd = SGD(ours, lr=0.1, foreach=foreach, **rule)
    torch_sgd = torch.optim.SGD(theirs, lr=0.1, foreach=False, **rule)
    for t in range(5):
        for (p, dense), o in ((ours, sgd), (theirs, torch_sgd)):
            dense.grad = torch.full((3,), t + 1.0)
            p.grad = torch.sparse_coo_tensor(
                torch.tensor([[0, t, 0]]),
                torch.arange(6.0).reshape(3, 2) + t,
                (5, 2),
                check_invariants=True,
            )
            o.step()
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"weight_decay": 0.1}, "sparse"), ({"fused": True}, "does not support sparse gradients")],
)
def test_sparse_gradients_are_refused_with_weight_decay_and_by_the_fused_kernel(arguments, message):
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match=message):
        SGD([p], lr=0.1, **arguments).step()
    assert torch.equal(p.detach(), torch.ones(3, 2))


def test_complex_parameters_are_refused_by_the_fused_kernel():
    z = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match="fused"):
        SGD([z], fused=True).step()


@EVERY_MODE
def test_dtypes_may_be_mixed_in_a_group(mode):
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    mixed = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in dtypes]
    optimizer = SGD(mixed, lr=0.5, momentum=0.5, **mode)
    for _ in range(2):
        for p in mixed:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p, dtype in zip(mixed, dtypes, strict=True):
        assert torch.equal(p.detach(), torch.full((3,), -0.25, dtype=dtype))
        assert optimizer.state[p]["momentum_buffer"].dtype == dtype


@EVERY_MODE
def test_a_parameter_may_be_a_view_with_gaps(mode):
    memory = torch.randn(4, 6)
    view = memory[:, ::2]
    p, twin = torch.nn.Parameter(view), torch.nn.Parameter(view.contiguous().clone())
    outside = memory[:, 1::2].clone()
    optimizer, other = SGD([p], **RULE, **mode), SGD([twin], **RULE)
    for _ in range(3):
        p.grad, twin.grad = (q.detach().contiguous() ** 3 for q in (p, twin))
        optimizer.step()
        other.step()
    assert_close(p, twin)
    assert torch.equal(memory[:, 1::2], outside)


# ------------------------------------------------------------ differentiable


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_hyperparameter_that_requires_grad_raises_no_warning(name):
    t = torch.tensor(0.1, requires_grad=True)
    torch.set_warn_always(True)  # else torch warns once in a process
    try:
        with pytest.warns(UserWarning, match="Converting a tensor with requires_grad=True"):
            float(t)
        SGD([torch.ones(1)], differentiable=True, **{name: t})
    finally:
        torch.set_warn_always(False)


def test_the_step_is_not_seen_by_autograd_otherwise():
    p = parameter(1.0, grad=[1.0])
    SGD([p], lr=torch.tensor(0.1)).step()
    assert p.grad_fn is None
    assert p.is_leaf


# ------------------------------------------------------------ GradScaler


@EVERY
@EVERY_MODE
def test_an_overflow_at_the_first_scaled_step_leaves_no_trace(optimizer, mode):
    p = parameter(1.0, 2.0)
    opt = optimizer([p], lr=0.5, momentum=0.5, **mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=0.5)

    def scaled_step(gradient):
        opt.zero_grad()
        scaler.scale((p * torch.tensor(gradient)).sum()).backward()
        scaler.step(opt)
        scaler.update()

    scaled_step([math.inf, 1.0])
    assert p.tolist() == [1, 2]
    assert opt.state.get(p, {}).get("momentum_buffer") is None
    assert scaler.get_scale() == 2

    scaled_step([1.0, 2.0])
    scaled_step([math.nan, 1.0])
    scaled_step([1.0, 2.0])
    # b: 1, 1.5 times the gradient
    assert p.tolist() == [1 - 0.5 - 0.75, 2 - 1 - 1.5]
    assert opt.state[p]["momentum_buffer"].tolist() == [1.5, 3]


# ------------------------------------------------------------ torch.compile


@UNFUSED
def test_a_compiled_step_with_a_tensor_lr_is_compiled_once_and_right(foreach):
    optimizer = SGD(parameters(), **{**RULE, "lr": torch.tensor(0.1)}, foreach=foreach)
    twin = SGD([torch.nn.Parameter(p) for p in values(optimizer)], **RULE)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step, counts = torch.compile(lambda: optimizer.step(), backend=backend), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(5):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.detach() ** 3
            step()
            steps(twin, 1)
            optimizer.param_groups[0]["lr"].fill_(0.1 / (t + 2))
            twin.param_groups[0]["lr"] = 0.1 / (t + 2)
            counts.append(len(compilations))
    assert_close(values(optimizer), values(twin))
    # once without buffers, once with them, then never again
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * 4


# ------------------------------------------------------------ torch's own optimizer tests


@EVERY
def test_the_inputs_of_torchs_optimizer_tests_give_torchs_numbers(optimizer, conformance):
    inputs, _, _ = conformance
    assert len(inputs) >= 9
    for (description, arguments), (mode, flags) in itertools.product(inputs, MODES.items()):
        start = parameters()
        ours = optimizer([torch.nn.Parameter(p.detach().clone()) for p in start], **arguments)
        theirs = torch.optim.SGD(start, **arguments)
        ours.param_groups[0].update(flags)
        for reloaded in (False, True):
            steps(ours, 10)
            steps(theirs, 10)
            for p, q in zip(values(ours), values(theirs), strict=True):
                assert_close(p, q, msg=f"{description}, {mode}, {reloaded=}")
            for opt in (ours, theirs):
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))


@EVERY
def test_the_error_inputs_of_torchs_optimizer_tests_give_torchs_errors(optimizer, conformance):
    _, errors, _ = conformance
    assert len(errors) >= 7
    for _, params, arguments, error, message in errors:
        expected = pytest.warns if issubclass(error, Warning) else pytest.raises
        with expected(error, match=message):
            optimizer([parameter(1.0)] if params is None else params, **arguments)
