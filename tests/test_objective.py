"""Hessian-vector products and per-example gradients, against explicit float64 references."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian as explicit_hessian

from gdtrain.generators import RandomStates
from gdtrain.losses import CrossEntropy, Hinge, Loss, OneHotSquaredError, SquaredError
from gdtrain.models import CNN, MLP
from gdtrain.models.dropout import Dropout
from gdtrain.objective import Objective, untouched

N = 11  # a prime: every M < N leaves a ragged last pass


class Odd(nn.Module):
    """Shared weights, control flow over the data, a parameter that is not used, a frozen one."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.head = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        h = torch.sin(self.shared(x)) * self.frozen
        h = torch.exp(-self.shared(h).square()) if x.sum() > -100 else h
        return h @ self.head


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x[:, None] * torch.tensor([1.0, -0.5, 2.0], dtype=x.dtype)[:, None]
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cell(x.reshape(len(x), 2, 2))[0][:, -1])


MODELS = {
    "mlp": lambda: MLP((4,), 3, hidden=[5, 3], activation="gelu"),
    "cnn": lambda: CNN((1, 6, 6), 3, channels=[2], hidden=4, norm="batch"),
    "odd": Odd,
    "attention": Attention,
    "recurrent": Recurrent,
}


def problem(name, loss=None, micro=None, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    x = torch.randn(N, *((1, 6, 6) if name == "cnn" else (4,)), dtype=torch.float64)
    y = torch.randint(3, (N,))
    return Objective(model, loss or CrossEntropy(), x.to(dtype), y, micro)


def explicit(objective):
    """H of the mean loss over all examples in one pass, by autograd.functional."""
    model, params = objective.model, objective.params
    names = [n for n, p in model.named_parameters() if p.requires_grad]

    def value(flat):
        parts = flat.split([p.numel() for p in params])
        state = {n: part.view_as(p) for n, part, p in zip(names, parts, params, strict=True)}
        prediction = torch.func.functional_call(model, state, (objective.inputs,))
        return objective.loss(prediction, objective.targets).mean()

    flat = torch.cat([p.detach().reshape(-1) for p in params])
    with untouched(model):
        return explicit_hessian(value, flat)


def vector(objective, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for p in objective.params]  # fmt: skip


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


# ------------------------------------------------------------------ Hessian-vector products


def test_the_product_by_hand():
    # J = ¼ Σ (w·x − y)²: H = ½ Σ x xᵀ = ½ [[1, 0], [0, 0]] + ½ [[4, 2], [2, 1]]
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    objective = Objective(model, SquaredError(), x, torch.zeros(2))
    (product,) = objective.hessian_vector(torch.arange(2), [torch.tensor([[1.0, 2.0]])])
    assert product.tolist() == [[4.5, 2.0]]


@pytest.mark.filterwarnings("ignore:BatchNorm normalises each pass")
@pytest.mark.parametrize("loss", [CrossEntropy(), OneHotSquaredError()], ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_explicit_hessian(name, loss):
    objective = problem(name, loss)
    objective.model.eval()  # BatchNorm then acts on each example by itself
    v = vector(objective)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = explicit(objective) @ flat(v)
    assert wanted.norm() > 1e-3
    for micro in (1, 4, N, None):
        objective.micro_batch_size = micro
        found = objective.hessian_vector(torch.arange(N), v)
        assert [h.shape for h in found] == [p.shape for p in objective.params]
        torch.testing.assert_close(flat(found), wanted, rtol=1e-11, atol=1e-13)
        product = objective.hessian(torch.arange(N))
        for _ in range(2):  # of the graph that is kept, too
            torch.testing.assert_close(flat(product(v)), wanted, rtol=1e-11, atol=1e-13)


def test_in_training_mode_batch_norm_has_the_hessian_of_batch_statistics():
    objective = problem("cnn")
    v = vector(objective)
    wanted = explicit(objective) @ flat(v)
    found = flat(objective.hessian_vector(torch.arange(N), v))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
    objective.model.eval()
    other = flat(objective.hessian_vector(torch.arange(N), v))
    assert (found - other).norm() > 0.1 * found.norm()


def test_where_the_gradient_is_constant_the_hessian_is_zero():
    objective = Objective(nn.Linear(2, 1), Hinge(), torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))
    found = objective.hessian_vector(torch.arange(4), vector(objective))
    assert [h.tolist() for h in found] == [[[0.0, 0.0]], [0.0]]


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Unbent(nn.Linear):
    def forward(self, x):
        return OnceOnly.apply(super().forward(x))


def test_a_model_without_second_derivatives_is_named():
    objective = Objective(Unbent(2, 3), CrossEntropy(), torch.randn(4, 2), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"differentiated twice\. Received: Unbent with .*once"):
        objective.hessian_vector(torch.arange(4), vector(objective))


class Noisy(nn.Module):
    """Draws from every generator, keeps a count and a mean, one of them by assignment."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        h = self.norm(self.layer(x))
        with torch.no_grad():
            self.seen += len(x)
            self.mean = 0.9 * self.mean + h.mean(0)
        noise = random.random() + np.random.rand()  # noqa: NPY002
        return torch.sin(self.dropout(h) * (1 + noise))


def test_measuring_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = Noisy()
    objective = Objective(model, CrossEntropy(), torch.randn(N, 4), torch.randint(3, (N,)))
    v = vector(objective)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = {k: b.clone() for k, b in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    states = RandomStates.now()
    first = objective.hessian_vector(torch.arange(N), v)
    product = objective.hessian(torch.arange(N))
    assert all(map(torch.equal, first, product(v)))  # the same numbers were drawn
    assert all(map(torch.equal, first, product(v)))
    model.norm.eval()
    objective.per_example_gradients(torch.arange(N))
    assert model.training
    assert all(torch.equal(before[k], b) for k, b in model.state_dict().items())
    assert all(buffers[k] is b for k, b in model.named_buffers())
    assert all((p.grad == 7).all() for p in model.parameters())
    assert RandomStates.now() == states


def test_memory_that_runs_out_halves_the_pass_and_changes_nothing_else(monkeypatch):
    objective = problem("mlp", micro="auto")
    v = vector(objective)
    wanted = flat(objective.hessian_vector(torch.arange(N), v))
    original = torch.autograd.grad

    def short(outputs, *arguments, **options):
        if isinstance(outputs, list) and len(seen[-1]) > 3:  # the second derivative
            raise torch.OutOfMemoryError("out of memory")
        return original(outputs, *arguments, **options)

    seen = []
    losses = objective._losses
    monkeypatch.setattr(objective, "_losses", lambda part: seen.append(part) or losses(part))
    monkeypatch.setattr(torch.autograd, "grad", short)
    before = objective.micro_batch_size
    product = objective.hessian(torch.arange(N))
    for _ in range(2):
        torch.testing.assert_close(flat(product(v)), wanted, rtol=1e-12, atol=1e-14)
    assert [len(part) for part in seen[:3]] == [11, 5, 2]
    assert objective.micro_batch_size == before


def rank_main(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    one = problem("mlp")
    two = Objective(one.model, one.loss, one.inputs, one.targets, 2, rank=rank, ranks=2)
    indices = torch.arange(N)
    found = [flat(two.hessian_vector(indices[:count], vector(two))) for count in (N, 1)]
    wanted = [flat(one.hessian_vector(indices[:count], vector(one))) for count in (N, 1)]
    torch.save([found, wanted], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_add_their_shares(tmp_path):
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found, wanted = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------ gradients of examples


def by_loop(objective, draw=0):
    rows = []
    for i in range(N):
        _, gradient = objective.value_and_grad(torch.tensor([i]), draw)
        pairs = zip(objective.params, gradient, strict=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in pairs])
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.filterwarnings("ignore:Gradients of examples are made one after the other")
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_examples_are_those_of_a_loop(name):
    objective = problem(name)
    objective.model.eval()
    wanted = by_loop(objective)
    for micro in (1, 4, None):
        objective.micro_batch_size = micro
        found = objective.per_example_gradients(torch.arange(N))
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("micro", [None, 3])
def test_gradients_of_examples_have_the_masks_of_the_batch(micro):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 20), Dropout(0.5), nn.Linear(20, 3)).double()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))
    objective = Objective(model, CrossEntropy(), x, y, micro)
    found = objective.per_example_gradients(torch.arange(N), draw=5)
    _, wanted = objective.value_and_grad(torch.arange(N), draw=5)
    torch.testing.assert_close([g.mean(0) for g in found], list(wanted))
    _, other = objective.value_and_grad(torch.arange(N), draw=6)
    assert (wanted[0] - other[0]).norm() > 1e-3


def test_what_vmap_cannot_do_is_done_in_turn_and_said_once():
    objective = problem("odd")  # which decides by the data
    with pytest.warns(UserWarning, match=r"one after the other.*torch\.func\.vmap says"):
        objective.per_example_gradients(torch.arange(N))
    objective.per_example_gradients(torch.arange(N))  # a warning would be an error


@pytest.mark.parametrize("loss", [kind() for kind in Loss.__subclasses__()
                                  if kind.__module__ == "gdtrain.losses"], ids=repr)  # fmt: skip
def test_every_loss_of_ours_is_done_side_by_side(loss):
    torch.manual_seed(0)
    outputs = 3 if loss.task == "multiclass" else 1
    model = nn.Linear(4, outputs).double()
    y = torch.randn(N, dtype=torch.float64) if loss.task == "regression" else torch.arange(N) % 2
    objective = Objective(model, loss, torch.randn(N, 4, dtype=torch.float64), y)
    found = objective.per_example_gradients(torch.arange(N))  # a warning would be an error
    torch.testing.assert_close(found, by_loop(objective))


def test_batch_norm_leaves_no_gradient_of_an_example():
    objective = problem("cnn")
    with pytest.raises(ValueError, match=r"BatchNorm in training mode mixes the examples"):
        objective.per_example_gradients(torch.arange(N))
