import numpy as np
import pytest
import torch
from optimizers import EVERY_RULE, MODES
from problems import PROBLEMS
from reference import mean_gradient, trajectory

from gdtrain.optim import GD, SGD, MiniBatchSGD

UPDATES = 200
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
@EVERY_RULE
@pytest.mark.parametrize(("optimizer", "B"), [(SGD, 1), (MiniBatchSGD, 4), (GD, N)])
def test_every_update_is_the_oracles(optimizer, B, rule, mode):
    plan, path = batches(B), []
    theta, opt = make(optimizer, rule, **MODES[mode])
    for batch in plan:
        backward(theta, batch, rule)
        opt.step()
        path.append(theta.tolist())
    assert_on_the_path(path, oracle(plan, rule))


@pytest.mark.parametrize("mode", ["default", "loop", "fused"])
@EVERY_RULE
@pytest.mark.parametrize(
    ("optimizer", "count", "B"), [(MiniBatchSGD, "batch_size", 5), (GD, "num_samples", N)]
)
def test_every_update_gathered_from_micro_batches_is_the_oracles(optimizer, count, B, rule, mode):
    plan, path = batches(B), []
    theta, opt = make(optimizer, rule, **{count: B}, **MODES[mode])
    for t, batch in enumerate(plan):
        M = 1 + t % B
        for start in range(0, B, M):
            before = theta.tolist()
            micro = batch[start : start + M]
            backward(theta, micro, rule)
            opt.step(num_samples=len(micro))
            if start + M < B:
                assert theta.tolist() == before
        path.append(theta.tolist())
    assert_on_the_path(path, oracle(plan, rule))


def test_the_oracle_by_hand():
    path = trajectory(lambda theta, t: [theta[0]], [8.0], 3, lr=0.5, momentum=0.5)
    # b: 8, 0.5·8 + 4 = 8, 0.5·8 + 0 = 4
    assert path.ravel().tolist() == [4.0, 0.0, -2.0]


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
    def __init__(self, problem, optimizer, arguments):
        self.problem = problem
        self.theta = torch.nn.Parameter(problem.start.clone())
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
