"""The hand-written engine against the eager reference, update by update."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from gdtrain import GD, SGD, MiniBatchSGD
from gdtrain.data.mapped import MappedInputs
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.sparse import SparseInputs
from gdtrain.descent.preparation import parameter_groups
from gdtrain.engines import Eager, Native, NotApplicableError
from gdtrain.losses import (
    CrossEntropy,
    Hinge,
    Huber,
    Logistic,
    OneHotSquaredError,
    SquaredError,
    SquaredHinge,
)
from gdtrain.models import CNN, MLP, Linear
from gdtrain.models.activations import ACTIVATIONS
from gdtrain.objective import Objective

N, D = 60, 13

RULES = [
    {},
    {"weight_decay": 0.02},
    {"momentum": 0.8},
    {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
]
TASKS = {
    "squared error": (SquaredError(), 2, "numbers"),
    "huber": (Huber(0.5), 1, "numbers"),
    "cross-entropy": (CrossEntropy(), 3, "classes"),
    "one-hot squared error": (OneHotSquaredError(), 3, "classes"),
    "logistic": (Logistic(), 1, "binary"),
    "hinge": (Hinge(), 1, "binary"),
    "squared hinge": (SquaredHinge(), 1, "binary"),
}


def data(kind, outputs, dtype=torch.float64, shape=(D,)):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, *shape, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "numbers":
        y = torch.randn(N, outputs, generator=generator, dtype=torch.float64).to(dtype)
        return x, y if outputs > 1 else y[:, 0]
    return x, torch.randint(0, 2 if kind == "binary" else outputs, (N,), generator=generator)


def trained(engine, model, loss, x, y, updates=1000, batch=1, cuts=(), optimizer=SGD, **rule):
    """Losses, parameters and momentum buffers after updates with a falling step size."""
    model = copy.deepcopy(model).to(rule.pop("dtype", torch.float64))
    micro = rule.pop("micro", None)
    made = optimizer(parameter_groups(model), **{"lr": 0.02, **rule})
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]
    sweep = engine(Objective(model, loss, x, y, micro), made)
    indices = torch.randint(0, N, (updates, batch), generator=torch.Generator().manual_seed(5))
    factors = torch.linspace(1, 0.1, updates, dtype=torch.float64)
    edges = [0, *cuts, updates]
    losses = [sweep(indices[a:b], factors[a:b], a) for a, b in itertools.pairwise(edges)]
    assert made.param_groups[0]["lr"] == pytest.approx(0.1 * made.param_groups[0]["initial_lr"])
    return {
        "losses": torch.cat(losses),
        **{name: p.detach() for name, p in model.named_parameters()},
        **{
            f"{name}: momentum": made.state[p]["momentum_buffer"]
            for name, p in model.named_parameters()
            if p in made.state
        },
    }


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        gap = ((found[name] - value).abs() / (1 + value.abs())).max()
        assert gap <= tolerance, f"{name}: {gap}"  # NaN fails too


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_every_loss_and_rule_makes_the_updates_of_the_reference(task, rule, batch):
    loss, outputs, kind = TASKS[task]
    x, y = data(kind, outputs)
    torch.manual_seed(0)
    model = Linear((D,), outputs) if batch == 1 else MLP((D,), outputs, hidden=[5])
    # The squared hinge's slope is not bounded: a shorter step keeps it from diverging.
    arguments = (model, loss, x, y, 1000 if batch == 1 else 300, batch)
    rule = {**rule, "lr": 0.002}
    expected = trained(Eager, *arguments, **rule)
    assert expected["losses"].isfinite().all()
    assert_close(trained(Native, *arguments, **rule), expected, 1e-9)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_makes_the_updates_of_the_reference(activation, batch):
    x, y = data("classes", 3)
    torch.manual_seed(0)
    model = MLP((D,), 3, hidden=[10, 6], activation=activation)
    rule = {"momentum": 0.5, "weight_decay": 0.01}
    expected = trained(Eager, model, CrossEntropy(), x, y, 150, batch, **rule)
    assert_close(trained(Native, model, CrossEntropy(), x, y, 150, batch, **rule), expected, 1e-10)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("rule", [RULES[0], RULES[4]], ids=str)
def test_in_single_precision_a_thousand_updates_agree_to_rounding(rule, batch):
    x, y = data("classes", 3, torch.float32)
    torch.manual_seed(0)
    model = MLP((D,), 3, hidden=[12])
    arguments = (model, CrossEntropy(), x, y, 1000, batch)
    rule = {**rule, "dtype": torch.float32, "lr": 0.005}
    assert_close(trained(Native, *arguments, **rule), trained(Eager, *arguments, **rule), 2e-5)


@pytest.mark.parametrize("optimizer", [GD, MiniBatchSGD, torch.optim.SGD])
@pytest.mark.parametrize("batch", [1, 4])
def test_ascent_and_other_optimizers(optimizer, batch):
    x, y = data("numbers", 1)
    arguments = (Linear((D,), 1, init="zeros"), Huber(), x, y, 50, batch)
    rule = {"maximize": True, "weight_decay": 0.5, "optimizer": optimizer}
    assert_close(trained(Native, *arguments, **rule), trained(Eager, *arguments, **rule), 1e-12)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(D, 3, bias=False),
        nn.Sequential(nn.Linear(D, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)),
        nn.Sequential(
            nn.Sequential(nn.Linear(D, 4), nn.LeakyReLU(0.3)), nn.Linear(4, 3, bias=False)
        ),
        nn.Sequential(
            nn.Identity(), nn.Linear(D, 5), nn.ELU(0.7), nn.Dropout(0.0), nn.Linear(5, 3)
        ),
        nn.Sequential(nn.Linear(D, 5), nn.Linear(5, 3)),
        MLP((D,), 3, hidden=[]),
        MLP((D,), 3, hidden=[7, 1, 5], activation="tanh"),
    ],
    ids=lambda model: " ".join(type(m).__name__ for m in model.modules()),
)
@pytest.mark.parametrize("batch", [1, 4])
def test_models_of_all_shapes(model, batch):
    x, y = data("classes", 3)
    rule = {"momentum": 0.5, "weight_decay": 0.01}
    arguments = (model, CrossEntropy(), x, y, 200, batch)
    assert_close(trained(Native, *arguments, **rule), trained(Eager, *arguments, **rule), 1e-11)


@pytest.mark.parametrize("batch", [1, 5])
def test_images_are_flattened(batch):
    x, y = data("classes", 3, shape=(2, 3, 4))
    arguments = (MLP((2, 3, 4), 3, hidden=[6]), CrossEntropy(), x, y, 100, batch)
    assert_close(trained(Native, *arguments), trained(Eager, *arguments), 1e-11)
    turned = (
        *arguments[:2],
        x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        *arguments[3:],
    )
    assert_close(trained(Native, *turned), trained(Eager, *arguments), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rule", [RULES[0], RULES[1], RULES[3], RULES[4]], ids=str)
@pytest.mark.parametrize("hidden", [None, [9], [8, 3]], ids=str)
def test_where_a_sweep_is_cut_changes_no_bit(hidden, rule, batch, dtype):
    x, y = data("classes", 3, dtype)
    model = Linear((D,), 3) if hidden is None else MLP((D,), 3, hidden=hidden)
    arguments = (model, CrossEntropy(), x, y, 60, batch)
    whole = trained(Native, *arguments, dtype=dtype, **rule)
    for cuts in ((1,), (20, 21, 22), tuple(range(1, 60))):
        parts = trained(Native, *arguments, dtype=dtype, cuts=cuts, **rule)
        assert parts.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(parts[name], value), name


@pytest.mark.parametrize("micro", [1, 4, 5, "auto"])
@pytest.mark.parametrize("rule", [RULES[0], RULES[4]], ids=str)
def test_the_size_of_a_pass_changes_nothing_but_rounding(micro, rule):
    x, y = data("classes", 3)
    arguments = (MLP((D,), 3, hidden=[6]), CrossEntropy(), x, y, 100, 9)
    whole = trained(Native, *arguments, **rule)
    assert_close(trained(Native, *arguments, micro=micro, **rule), whole, 1e-11)


def test_a_full_batch_is_read_where_it_lies(monkeypatch):
    x, y = data("classes", 3)
    model = Linear((D,), 3).double()
    optimizer = GD([{"params": model.parameters(), "initial_lr": 0.1}])
    reference = copy.deepcopy(model)
    sweep = Native(Objective(model, CrossEntropy(), x, y, 16), optimizer)

    def copied(*_, **__):
        raise AssertionError("the examples were copied")

    monkeypatch.setattr(torch, "index_select", copied)
    (loss,) = sweep(torch.arange(N)[None], torch.ones(1))
    expected = nn.functional.cross_entropy(reference(x), y)
    torch.testing.assert_close(loss, expected.detach())
    expected.backward()
    step = reference.linear.weight - 0.1 * reference.linear.weight.grad
    torch.testing.assert_close(model.linear.weight, step)


@pytest.mark.parametrize("batch", [1, 6, N])
@pytest.mark.parametrize("rule", [*RULES, {"maximize": True, "momentum": 0.5}], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_sparse_inputs_make_the_updates_of_dense_ones(task, rule, batch):
    loss, outputs, kind = TASKS[task]
    x, y = data(kind, outputs)
    x = x * (x > 0.8)
    x[3] = 0  # an example without non-zeros
    inputs = SparseInputs.from_scipy(sparse.csr_array(x.numpy()), dtype=torch.float64)
    arguments = (loss, inputs, y, 150, batch)
    model = Linear((D,), outputs, bias=task != "huber")
    rule = {**rule, "lr": 0.002}
    expected = trained(Eager, model, loss, x, y, 150, batch, **rule)
    found = trained(Native, model, *arguments, **rule)
    assert_close(found, expected, 1e-11)
    parts = trained(Native, model, *arguments, cuts=(1, 50, 51), **rule)
    assert all(torch.equal(parts[name], value) for name, value in found.items())


@pytest.mark.parametrize("batch", [1, 4])
def test_rows_of_a_file_are_read_in_parts(tmp_path, monkeypatch, batch):
    x, y = data("classes", 3)
    np.save(tmp_path / "x.npy", x.numpy())
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = np.arange(N)
    mapped = MappedInputs(array, rows, Preprocessing(), torch.float64)
    model = MLP((D,), 3, hidden=[4])
    expected = trained(Native, model, CrossEntropy(), x, y, 100, batch)
    monkeypatch.setattr("gdtrain.engines.native.dense._GATHERED", 10 * D * 8)  # ten examples
    found = trained(Native, model, CrossEntropy(), mapped, y, 100, batch)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("batch", [1, 4])
def test_a_loss_that_is_no_number_stays_none(batch):
    x, y = data("numbers", 1)
    model = MLP((D,), 1, hidden=[4])
    for engine in (Eager, Native):
        losses = trained(engine, model, SquaredError(), x, y, 400, batch, lr=5.0)["losses"]
        first = int((~losses.isfinite()).nonzero()[0])
        assert 2 < first < 300
        assert not losses[first + 1 :].isfinite().any()


def test_extreme_margins_neither_overflow_nor_lose_their_slope():
    x = torch.tensor([[1.0], [-1.0]])
    for scale, expected in ((1000.0, 0.0), (-1000.0, 1000.0)):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, scale)
        optimizer = SGD([{"params": model.parameters(), "initial_lr": 1.0}])
        sweep = Native(Objective(model, Logistic(), x, torch.tensor([1, 0])), optimizer)
        losses = sweep(torch.tensor([[0], [1]]), torch.ones(2))
        assert losses[0] == expected
        assert model.weight.item() == (scale if scale > 0 else scale + 2)  # slope 0, or −1 each


def applied(model=None, loss=None, optimizer=None, x=None, groups=None):
    model = nn.Linear(D, 3) if model is None else model
    x = torch.zeros(4, D) if x is None else x
    objective = Objective(model, loss or CrossEntropy(), x, torch.zeros(len(x), dtype=torch.int64))
    optimizer = optimizer or (lambda params: SGD(params, lr=0.1))
    return Native(objective, optimizer(groups or model.parameters()))


class Custom(nn.Linear):
    pass


class OwnLoss(CrossEntropy):
    pass


def hooked():
    model = nn.Sequential(nn.Linear(D, 3))
    model[0].register_forward_hook(lambda *_: None)
    return model


def frozen():
    model = nn.Sequential(nn.Linear(D, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    return model


def replaced():
    model = nn.Linear(D, 3)
    model.forward = lambda x: x @ torch.ones(D, 3)
    return model


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"model": Custom(D, 3)}, "Custom"),
        (
            {"model": CNN((1, 8, 8), 3), "x": torch.zeros(4, 1, 8, 8)},
            "hand-written backward pass of CNN",
        ),
        ({"model": nn.Sequential(nn.Linear(D, 3), nn.Softmax(1))}, "Softmax"),
        ({"model": nn.Sequential(nn.ReLU(), nn.Linear(D, 3))}, "ReLU stands behind no linear"),
        ({"model": nn.Sequential(nn.Linear(D, 3), nn.GELU("tanh"))}, "GELU"),
        ({"model": MLP((D,), 3, dropout=0.5)}, "dropout"),
        ({"model": hooked()}, "Linear has hooks"),
        ({"model": frozen()}, "all parameters"),
        ({"model": replaced()}, "forward of a Linear was replaced"),
        ({"model": nn.Linear(D, 3).bfloat16(), "x": torch.zeros(4, D).bfloat16()}, "bfloat16"),
        ({"loss": OwnLoss()}, "OwnLoss is no loss of gdtrain's"),
        (
            {"optimizer": lambda params: torch.optim.Adam(params)},
            "that of Adam is for engine=eager",
        ),
        ({"optimizer": lambda params: GD(params, num_samples=4)}, "gathers"),
        ({"x": torch.zeros(4, 2, D)}, "applied to a part of an example"),
        ({"x": torch.zeros(4, D).double()}, "precision"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_do_is_refused_with_the_reason(arguments, reason):
    with pytest.raises(NotApplicableError, match=reason):
        applied(**arguments)


def test_it_applies_to_what_those_are_changes_of():
    assert applied().name == "native"


def test_under_autocast_it_is_refused():
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(NotApplicableError, match="precision"),
    ):
        applied()


def test_the_decay_of_the_step_size_is_applied_update_by_update():
    x, y = torch.ones(1, 1), torch.ones(1)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = SGD([{"params": model.parameters(), "initial_lr": 0.5}])
    sweep = Native(Objective(model, SquaredError(), x, y), optimizer)
    losses = sweep(torch.zeros(3, 1, dtype=torch.int64), torch.tensor([1.0, 0.5, 0.0]))
    # w: 0, 0.5, 0.5 + 0.25·0.5 = 0.625, 0.625
    assert losses.tolist() == [0.5, 0.125, pytest.approx(0.5 * 0.375**2)]
    assert math.isclose(model.weight.item(), 0.625)
