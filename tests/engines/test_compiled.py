"""The compiled engine against the eager one, and what it refuses."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch._inductor as inductor
import torch._inductor.config
from torch import nn
from torch._dynamo.utils import counters

from gdtrain import GD, SGD, MiniBatchSGD
from gdtrain.engines.compiled import Compiled
from gdtrain.engines.eager import Eager
from gdtrain.engines.engine import NotApplicableError
from gdtrain.engines.program import GraphRule, descend
from gdtrain.losses import CrossEntropy, Loss
from gdtrain.models import CNN
from gdtrain.objective import Objective
from gdtrain.rules import descend_


class Gated(nn.Module):
    """A layer of the user's own."""

    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return torch.tanh(x * self.scale) * torch.sigmoid(x + self.shift)


class Rows:
    """Inputs that can only be asked for rows."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, indices):
        return self.x[indices]


class Tied(nn.Module):
    """Shares a weight, holds a frozen bias, and gives its buffer a new tensor at each pass."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outer.weight = self.inner.weight
        self.inner.bias.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.outer(h - self.mean)


def groups(model, lr):
    """Weight decay on weights only."""
    biases = [p for p in model.parameters() if p.ndim < 2]
    weights = [p for p in model.parameters() if p.ndim >= 2]
    return [
        {"params": weights, "initial_lr": lr},
        {"params": biases, "initial_lr": 2 * lr, "weight_decay": 0.0},
    ]


class Problem:
    """A model, its start, and the two engines on copies of it."""

    def __init__(self, model, shape, optimizer, n=40, dtype=torch.float64, rows=False, **rule):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, *shape, generator=generator, dtype=dtype)
        self.y = torch.randint(3, (n,), generator=generator)
        self.model = model.to(dtype)
        self.start = copy.deepcopy(self.model.state_dict())
        self.optimizer = optimizer(groups(self.model, 0.05), **rule)
        inputs = Rows(self.x) if rows else self.x
        self.engine = Compiled(
            Objective(self.model, CrossEntropy(), inputs, self.y), self.optimizer
        )
        twin = copy.deepcopy(self.model)
        self.eager = Eager(
            Objective(twin, CrossEntropy(), self.x, self.y), optimizer(groups(twin, 0.05), **rule)
        )

    def restart(self):
        for engine in (self.engine, self.eager):
            engine.objective.model.load_state_dict(self.start)
            engine.optimizer.state.clear()

    def indices(self, updates, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(self.x), (updates, size), generator=generator)

    def state(self, engine):
        """All that the next update depends on."""
        model, state = engine.objective.model, engine.optimizer.state
        tensors = [*model.state_dict().values()]
        return tensors + [state[p]["momentum_buffer"] for p in model.parameters() if p in state]

    def assert_same(self, tolerance):
        ours, theirs = self.state(self.engine), self.state(self.eager)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(
            self.engine.optimizer.param_groups, self.eager.optimizer.param_groups, strict=True
        ):
            assert a["lr"] == b["lr"]


def factors(updates):
    return 1 / (1 + torch.arange(updates, dtype=torch.float64) / 100)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), Gated(8), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def one_by_one():
    rule = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    return Problem(mlp(), (5,), SGD, **rule)


# --------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"weight_decay": 0.3},
        {"maximize": True, "weight_decay": 0.3},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.3, "maximize": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
    ],
    ids=str,
)
def test_the_rule_is_that_of_rules(rule):
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(4, generator=generator, dtype=torch.float64)
    want, buffers = [theta.clone()], [None]
    constant = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    constant.update({name: value for name, value in rule.items() if name in constant})
    b = torch.zeros_like(theta) if "momentum" in rule else None
    for t in range(5):
        g = torch.randn(4, generator=generator, dtype=torch.float64)
        descend_(want, [g], buffers, lr=0.1 / (t + 1), **rule)
        share = 1.0 if t == 0 else 1 - rule.get("dampening", 0.0)
        rate, share = torch.tensor([0.1 / (t + 1), share], dtype=torch.float64)
        theta, b = descend(theta, g, b, rate, share, GraphRule(**constant))
        torch.testing.assert_close(theta, want[0], rtol=1e-12, atol=0)


# --------------------------------------------------------------------------- against eager


@pytest.mark.slow
def test_a_thousand_single_example_updates_of_a_custom_layer(one_by_one):
    one_by_one.restart()
    indices = one_by_one.indices(1000, 1)
    losses = one_by_one.engine(indices, factors(1000))
    torch.testing.assert_close(
        losses, one_by_one.eager(indices, factors(1000)), rtol=1e-9, atol=1e-9
    )
    one_by_one.assert_same(1e-9)
    assert losses[-100:].mean() < 0.9 * losses[:100].mean()


class Lion(MiniBatchSGD):
    """A user's rule, whose buffer is no sum of gradients (Chen et al., 2023)."""

    @staticmethod
    def rule(params, grads, buffers, *, lr, momentum, weight_decay, **others):
        for k, (p, g) in enumerate(zip(params, grads, strict=True)):
            d = g if buffers[k] is None else 0.9 * buffers[k] + 0.1 * g
            if buffers[k] is None:
                buffers[k] = g.clone()
            else:
                buffers[k].mul_(momentum).add_(g, alpha=1 - momentum)
            p -= lr * (d.sign() + weight_decay * p)


@pytest.mark.slow
def test_a_rule_of_ones_own_however_its_updates_are_cut():
    problem = Problem(mlp(), (5,), Lion, momentum=0.99, weight_decay=0.01)
    indices, eta = problem.indices(300, 4), factors(300)
    theirs = problem.eager(indices, eta)
    for cuts in ([300], [1, 299], [150, 150]):
        problem.engine.objective.model.load_state_dict(problem.start)
        problem.optimizer.state.clear()
        ours = [
            problem.engine(*part) for part in zip(indices.split(cuts), eta.split(cuts), strict=True)
        ]
        torch.testing.assert_close(torch.cat(ours), theirs, rtol=1e-12, atol=1e-12)
        problem.assert_same(1e-12)
    assert problem.engine.rates.tolist() == (0.05 * eta[150:]).tolist()


@pytest.mark.slow
def test_a_rule_of_ones_own_that_cannot_be_compiled_changes_nothing():
    class Branching(Lion):
        @staticmethod
        def rule(params, grads, buffers, **options):
            Lion.rule(params, grads, buffers, **options)
            if params[0].sum() > 0:
                params[0].mul_(0.5)

    problem = Problem(mlp(), (5,), Branching, momentum=0.99)
    with pytest.raises(NotApplicableError, match="Detected data-dependent"):
        problem.engine(problem.indices(4, 2), factors(4))
    assert not problem.optimizer.state
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, problem.start[name])


@pytest.mark.slow
def test_parameters_stay_where_they_are_and_keep_no_gradient(one_by_one):
    one_by_one.restart()
    params = one_by_one.engine.objective.params
    places = [p.data_ptr() for p in params]
    one_by_one.engine(one_by_one.indices(3, 1), factors(3))
    buffers = [one_by_one.optimizer.state[p]["momentum_buffer"] for p in params]
    one_by_one.engine(one_by_one.indices(3, 1), factors(3))
    assert [p.data_ptr() for p in params] == places
    assert all(p.grad is None and p.requires_grad for p in params)
    now = [one_by_one.optimizer.state[p]["momentum_buffer"] for p in params]
    assert all(a is b for a, b in zip(now, buffers, strict=True))


@pytest.mark.slow
def test_however_updates_are_cut_they_are_the_same_to_the_bit_and_compiled_once(one_by_one):
    indices = one_by_one.indices(1300, 1)
    eta = factors(1300)
    one_by_one.restart()
    whole = one_by_one.engine(indices, eta)
    state = [t.clone() for t in one_by_one.state(one_by_one.engine)]
    compiled = counters["stats"]["unique_graphs"]
    for cuts in ([1, 1299], [7] * 185 + [5], [64] * 20 + [20], [512, 1, 511, 276]):
        assert sum(cuts) == 1300
        one_by_one.restart()
        ends = list(itertools.accumulate(cuts))
        parts = [
            one_by_one.engine(indices[e - k : e], eta[e - k : e])
            for e, k in zip(ends, cuts, strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)
        for a, b in zip(one_by_one.state(one_by_one.engine), state, strict=True):
            assert torch.equal(a, b)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.slow
def test_a_sweep_that_fails_changes_nothing(one_by_one):
    one_by_one.restart()
    indices = one_by_one.indices(600, 1)
    one_by_one.engine(indices[:1], factors(1))
    before = [t.clone() for t in one_by_one.state(one_by_one.engine)]
    indices[-1] = 40  # there are 40 examples; this is in the second chunk
    with pytest.raises(IndexError):
        one_by_one.engine(indices, factors(600))
    with pytest.raises(ValueError, match=r"Invalid learning rate: nan\. Expected lr finite"):
        one_by_one.engine(indices[:2], torch.tensor([1.0, float("nan")]))
    for a, b in zip(one_by_one.state(one_by_one.engine), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_nan_comes_back_as_a_loss(one_by_one):
    one_by_one.restart()
    one_by_one.x[3] = float("nan")
    try:
        losses = one_by_one.engine(torch.tensor([[1], [3], [2]]), factors(3))
    finally:
        one_by_one.x[3] = 0.0
    assert losses.isnan().tolist() == [False, True, True]


@pytest.mark.slow
def test_batches_with_a_tail_in_float32_from_rows_of_a_model_with_tied_and_frozen_parameters():
    torch.manual_seed(0)
    rule = {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02}
    problem = Problem(
        Tied(), (3,), torch.optim.SGD, n=19, dtype=torch.float32, rows=True, lr=0.05, **rule
    )
    generator = torch.Generator().manual_seed(3)
    compiled = counters["stats"]["unique_graphs"]
    for epoch in range(333):  # 999 updates: 8, 8 and 3 examples
        order = torch.randperm(19, generator=generator)
        eta = factors(1000)[3 * epoch : 3 * epoch + 3]
        for part, f in ((order[:16].view(2, 8), eta[:2]), (order[16:].view(1, 3), eta[2:])):
            a, b = problem.engine(part, f), problem.eager(part, f)
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    problem.assert_same(1e-4)
    assert counters["stats"]["unique_graphs"] == compiled + 2
    assert torch.equal(problem.model.inner.bias, problem.start["inner.bias"])


@pytest.mark.slow
def test_a_cnn_with_batch_norm_and_dropout():
    torch.manual_seed(0)
    model = CNN((2, 8, 8), 3, channels=[4], hidden=8, norm="batch", dropout=0.3)
    problem = Problem(model, (2, 8, 8), MiniBatchSGD, lr=0.05)
    indices = problem.indices(1000, 4)
    compiled = counters["stats"]["unique_graphs"]
    ours = [
        problem.engine(indices[a:b], factors(1000)[a:b], draw=10 + a)
        for a, b in ((0, 700), (700, 1000))
    ]
    theirs = problem.eager(indices, factors(1000), draw=10)
    torch.testing.assert_close(torch.cat(ours), theirs, rtol=1e-9, atol=1e-9)
    problem.assert_same(1e-9)
    assert counters["stats"]["unique_graphs"] == compiled + 1
    assert problem.model.layers[1].num_batches_tracked == 1000
    assert not torch.equal(problem.model.layers[1].running_mean, torch.zeros(4).double())


# --------------------------------------------------------------------------- refusals


def linear(optimizer=None, model=None, micro=None, loss=None, **rule):
    model = nn.Linear(4, 3) if model is None else model
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "initial_lr": 0.1}]
    x = torch.randn(10, 4, dtype=next(model.parameters()).dtype)
    objective = Objective(model, loss or CrossEntropy(), x, torch.zeros(10).long(), micro)
    return objective, (optimizer or SGD)(groups, **rule)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: linear(torch.optim.Adam), "the step of Adam"),
        (lambda: linear(type("Mine", (SGD,), {"step": lambda self: None})), "the step of Mine"),
        (lambda: linear(GD, num_samples=10), "gathers micro-batches"),
        (lambda: linear(differentiable=True), "differentiable"),
        (lambda: linear(weight_decay=torch.tensor(0.1)), "weight_decay is a tensor"),
        (lambda: linear(model=nn.Linear(4, 3).bfloat16()), "bfloat16"),
        (lambda: (linear()[0], linear()[1]), "not the trainable ones"),
    ],
)
def test_refuses_at_once(make, reason):
    with pytest.raises(NotApplicableError, match=reason):
        Compiled(*make())


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Branching(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else 2 * y


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) * float(np.random.rand())  # noqa: NPY002


class Unused(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.extra = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), "draws random numbers"),
        (Noisy(4, 3), "draws random numbers"),
        (Unused(4, 3), "does not depend on parameter extra"),
        (Counting(4, 3), "torch.compile cannot take the update: Attribute 'calls'"),
        (Branching(4, 3), "torch.compile cannot take the update: Detected data-dependent"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refuses_a_model_at_the_first_sweep_and_changes_nothing(model, reason):
    engine = Compiled(*linear(model=model, momentum=0.9))
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(NotApplicableError, match=reason) as refused:
        engine(torch.tensor([[1, 2], [3, 4]]), torch.ones(2))
    assert "\n" not in str(refused.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not engine.optimizer.state


def test_refuses_hooks_that_come_later():
    engine = Compiled(*linear())
    engine.objective.model.register_forward_hook(lambda *_: None)
    with pytest.raises(NotApplicableError, match="Linear has hooks"):
        engine(torch.arange(4)[None], torch.ones(1))


def test_refuses_micro_batches_and_mixed_precision():
    engine = Compiled(*linear(micro=4))
    with pytest.raises(NotApplicableError, match="8 examples is gathered from micro-batches of 4"):
        engine(torch.arange(8)[None], torch.ones(1))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(NotApplicableError, match="mixed precision"),
    ):
        engine(torch.arange(4)[None], torch.ones(1))


def test_the_models_own_error_is_not_hidden():
    engine = Compiled(*linear(model=nn.Linear(5, 3)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine(torch.arange(4)[None], torch.ones(1))


@pytest.mark.slow
def test_a_missing_compiler_is_a_refusal():
    engine = Compiled(*linear(loss=SquaredSum()))
    # Its own way: what monkeypatch puts back, later compilations do not find.
    with (
        inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(NotApplicableError, match=r"torch\.compile cannot take the update"),
    ):
        engine(torch.arange(4)[None], torch.ones(1))


class SquaredSum(Loss):
    """A graph that no other test has compiled."""

    task = "multiclass"

    def forward(self, prediction, target):
        return (prediction * 1.2345).square().sum(1)
