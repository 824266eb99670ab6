import copy
import io
from itertools import product

import numpy as np
import pytest
import torch
from problems import PROBLEMS
from reference import mean_gradient, trajectory
from torch.testing import assert_close

from gdtrain.optim import GD, SGD, MiniBatchSGD

UPDATES = 200
MODES = {
    "default": {},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused": {"fused": True},
}
RULES = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "dampening": 0.5, "weight_decay": 0.1, "maximize": True},
]


@pytest.fixture(autouse=True)
def _one_seed_one_thread():
    # the fused kernel wakes all threads for the smallest tensor
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------ against the float64 oracle

N, D = 13, 3
X = np.random.default_rng(0).normal(size=(N, D))
Y = np.random.default_rng(1).normal(size=N)


def example_gradient(theta, i):
    """∇ of ½(x_iᵀθ − y_i)²"""
    return X[i] * (X[i] @ theta - Y[i])


def batches(B):
    """B examples for each update, ever new ones."""
    order = np.random.default_rng(2)
    return [order.permutation(N)[:B] for _ in range(UPDATES)]


def oracle(plan, arguments):
    # ascent on ½(…)² has no maximum: climb −½(…)² instead
    sign = -1 if arguments.get("maximize") else 1
    return trajectory(
        lambda theta, t: sign * mean_gradient(example_gradient, theta, plan[t]),
        np.zeros(D),
        UPDATES,
        lr=0.02,
        **arguments,
    )


def make(optimizer, arguments, **more):
    theta = torch.nn.Parameter(torch.zeros(D, dtype=torch.float64))
    return theta, optimizer([theta], lr=0.02, **arguments, **more)


def backward(theta, batch, arguments):
    x, y = torch.from_numpy(X[batch]), torch.from_numpy(Y[batch])
    loss = 0.5 * ((x @ theta - y) ** 2).mean()
    theta.grad = None
    (-loss if arguments.get("maximize") else loss).backward()


def assert_on_the_path(path, expected):
    assert len(path) == UPDATES
    np.testing.assert_allclose(np.array(path), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", ["default", "loop", "fused"])
@pytest.mark.parametrize("arguments", RULES, ids=str)
@pytest.mark.parametrize(("optimizer", "B"), [(SGD, 1), (MiniBatchSGD, 4), (GD, N)])
def test_every_update_is_the_oracles(optimizer, B, arguments, mode):
    plan, path = batches(B), []
    theta, opt = make(optimizer, arguments, **MODES[mode])
    for batch in plan:
        backward(theta, batch, arguments)
        opt.step()
        path.append(theta.tolist())
    assert_on_the_path(path, oracle(plan, arguments))


@pytest.mark.parametrize("arguments", RULES, ids=str)
@pytest.mark.parametrize(
    ("optimizer", "count", "B"), [(MiniBatchSGD, "batch_size", 5), (GD, "num_samples", N)]
)
def test_every_update_gathered_from_micro_batches_is_the_oracles(optimizer, count, B, arguments):
    plan, path = batches(B), []
    theta, opt = make(optimizer, arguments, **{count: B})
    for t, batch in enumerate(plan):
        M = 1 + t % B
        for start in range(0, B, M):
            before = theta.tolist()
            micro = batch[start : start + M]
            backward(theta, micro, arguments)
            opt.step(num_samples=len(micro))
            if start + M < B:
                assert theta.tolist() == before
        path.append(theta.tolist())
    assert_on_the_path(path, oracle(plan, arguments))


def test_the_oracle_by_hand():
    path = trajectory(lambda theta, t: [theta[0]], [8.0], 3, lr=0.5, momentum=0.5)
    # b: 8, 0.5·8 + 4 = 8, 0.5·8 + 0 = 4
    assert path.ravel().tolist() == [4.0, 0.0, -2.0]


# ------------------------------------------------------------ against torch.optim.SGD

GRID = [
    {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    for lr, momentum, dampening, weight_decay, nesterov, maximize in product(
        (0.05,), (0, 0.9), (0, 0.3), (0, 0.1), (False, True), (False, True)
    )
    if (momentum or not (dampening or nesterov)) and not (nesterov and dampening)
]
SHAPES = [(), (7,), (3, 5), (2, 3, 2, 2), (0, 4), (129,)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arguments", GRID, ids=lambda a: ",".join(map(str, a.values())))
def test_sgd_makes_the_updates_of_torch(arguments, mode):
    start = [torch.randn(shape) for shape in SHAPES]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    sgd = SGD(ours, **arguments, **MODES[mode])
    torch_sgd = torch.optim.SGD(theirs, **arguments, **MODES[mode])
    sign = -1 if arguments["maximize"] else 1
    noise = [torch.randn(UPDATES, *shape) for shape in SHAPES]
    for t in range(UPDATES):
        for params in (ours, theirs):
            for p, e in zip(params, noise, strict=True):
                p.grad = sign * (p.detach() + e[t])
        sgd.step()
        torch_sgd.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_close(p, q)
    for p, q in zip(ours, theirs, strict=True):
        assert_close(sgd.state.get(p), torch_sgd.state.get(q))


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.bfloat16])
def test_sgd_makes_the_updates_of_torch_in_other_dtypes(dtype, foreach):
    arguments = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    start = torch.randn(11, dtype=dtype)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    sgd = SGD([ours], foreach=foreach, **arguments)
    # torch's loop, for its foreach rounds the momentum itself to half precision on a CPU
    torch_sgd = torch.optim.SGD([theirs], foreach=False, **arguments)
    for _ in range(UPDATES):
        g = torch.randn(11, dtype=dtype)
        ours.grad, theirs.grad = g.clone(), g.clone()
        sgd.step()
        torch_sgd.step()
        assert torch.equal(ours, theirs)


def test_sgd_follows_a_torch_schedule_as_torch_does():
    start = torch.randn(5)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    sgd, torch_sgd = SGD([ours], lr=0.1), torch.optim.SGD([theirs], lr=0.1)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=UPDATES)
        for o in (sgd, torch_sgd)
    ]
    for t in range(UPDATES):
        for p, o in ((ours, sgd), (theirs, torch_sgd)):
            p.grad = p.detach() - 1
            o.step()
        if t + 1 < UPDATES:
            for schedule in schedules:
                schedule.step()
        assert sgd.param_groups[0]["lr"] == torch_sgd.param_groups[0]["lr"]
        assert sgd.param_groups[0]["momentum"] == torch_sgd.param_groups[0]["momentum"]
        assert_close(ours, theirs)


# ------------------------------------------------------------ every optimizer, every problem

TABLE = [
    (SGD, {}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "nesterov": True, "foreach": False}),
    (SGD, {"momentum": 0.9, "dampening": 0.5, "fused": True}),
    (GD, {"momentum": 0.9}),
    (GD, {"momentum": 0.9, "nesterov": True, "num_samples": 12}),
    (GD, {"momentum": 0.9, "maximize": True, "fused": True}),
    (MiniBatchSGD, {"momentum": 0.9}),
    (MiniBatchSGD, {"momentum": 0.9, "dampening": 0.5, "batch_size": 12}),
    (MiniBatchSGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
]
CASES = pytest.mark.parametrize(
    ("optimizer", "arguments"), TABLE, ids=[f"{o.__name__} {a}" for o, a in TABLE]
)


class Run:
    def __init__(self, problem, optimizer, arguments, start=None):
        self.problem = problem
        self.theta = torch.nn.Parameter((problem.start if start is None else start).clone())
        self.optimizer = optimizer([self.theta], lr=problem.lr, **arguments)
        self.gathers = {"num_samples", "batch_size"} & arguments.keys()
        self.sign = -1 if arguments.get("maximize") else 1

    def update(self):
        self.optimizer.zero_grad()
        (self.sign * self.problem.loss(self.theta)).backward()
        if self.gathers:
            self.optimizer.step(num_samples=5)
            self.optimizer.step(num_samples=7)
        else:
            self.optimizer.step()

    def distance(self):
        return torch.linalg.vector_norm(self.theta.detach() - self.problem.minimum).item()


def saved_and_reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@CASES
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_optimizer_reaches_the_minimum_of_every_problem(problem, optimizer, arguments):
    run = Run(problem, optimizer, arguments)
    assert run.distance() > 1
    for t in range(problem.updates):
        run.update()
        if t % 100 == 99 and run.distance() < problem.tolerance:
            break
    assert run.distance() < problem.tolerance


@CASES
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_run_saved_and_reloaded_goes_on_exactly_as_if_never_stopped(
    problem, optimizer, arguments
):
    run = Run(problem, optimizer, arguments)
    for _ in range(10):
        run.update()
    saved = saved_and_reloaded({"theta": run.theta, "optimizer": run.optimizer.state_dict()})
    resumed = Run(problem, optimizer, arguments, start=saved["theta"].detach())
    resumed.optimizer.load_state_dict(saved["optimizer"])
    for _ in range(10):
        before = run.theta.detach().clone()
        run.update()
        resumed.update()
        assert not torch.equal(run.theta, before)
        assert torch.equal(run.theta, resumed.theta)
    assert_close(run.optimizer.state_dict(), resumed.optimizer.state_dict(), rtol=0, atol=0)


def test_a_run_reloaded_without_its_state_goes_elsewhere():
    run = Run(PROBLEMS[0], SGD, {"momentum": 0.9})
    for _ in range(5):
        run.update()
    resumed = Run(PROBLEMS[0], SGD, {"momentum": 0.9}, start=copy.deepcopy(run.theta.detach()))
    run.update()
    resumed.update()
    assert not torch.allclose(run.theta, resumed.theta)
