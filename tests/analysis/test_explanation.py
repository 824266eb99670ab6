"""One update by hand, against autograd and torch.optim.SGD; and inside a run, against the run."""

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import command
from lightning import Trainer
from torch import nn
from torch.nn.utils import vector_to_parameters

from gdtrain import GD, SGD, MiniBatchSGD
from gdtrain.analysis.explanation import explain, explain_made
from gdtrain.callbacks import ExplainUpdate
from gdtrain.data import EmbeddedDataModule
from gdtrain.engines import Eager
from gdtrain.engines.native.arguments import LOSS
from gdtrain.engines.native.engine import Native
from gdtrain.lightning.module import SupervisedModule
from gdtrain.losses import CrossEntropy, SquaredError
from gdtrain.models import MLP, Linear
from gdtrain.models.activations import ACTIVATIONS
from gdtrain.objective import Objective
from gdtrain.schedules import Cosine

RULES = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
]


def problem(loss, examples=7, features=4):
    torch.manual_seed(1)
    x = torch.randn(examples, features, dtype=torch.float64)
    outputs = {"regression": 2, "binary": 1, "multiclass": 3}[loss.task]
    if loss.task == "regression":
        return x, torch.randn(examples, outputs, dtype=torch.float64), outputs
    return x, torch.arange(examples) % max(outputs, 2), outputs


def check(model, loss, x, y, indices, rule, updates=3):
    """Each update by hand, then by autograd and torch.optim.SGD; weights are compared."""
    objective = Objective(model, loss, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, **rule)
    for _ in range(updates):
        found = explain(objective, optimizer, indices)
        values = loss(model(x[indices]), y[indices])
        optimizer.zero_grad()
        values.mean().backward()
        near = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
        near(found.losses, values.detach())
        for step, p in zip(found.steps, model.parameters(), strict=True):
            near(step.before, p.detach())
            near(step.gradient, p.grad)
        optimizer.step()
        for step, p in zip(found.steps, model.parameters(), strict=True):
            near(step.after, p.detach())
            if rule.get("momentum"):
                near(step.buffer, optimizer.state[p]["momentum_buffer"])
        near(found.losses_after, loss(model(x[indices]), y[indices]).detach())
    return found


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_model(rule, bias):
    x, y, outputs = problem(SquaredError())
    model = Linear((4,), outputs, bias=bias).double()
    check(model, SquaredError(), x, y, torch.tensor([2, 5, 3]), rule)


@pytest.mark.parametrize("kind", LOSS, ids=lambda kind: kind.__name__)
def test_each_loss(kind):
    loss = kind()
    x, y, outputs = problem(loss)
    model = MLP((4,), outputs, hidden=[3], activation="tanh").double()
    check(model, loss, x, y, torch.arange(7), {"momentum": 0.9})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(activation):
    x, y, outputs = problem(CrossEntropy())
    model = MLP((4,), outputs, hidden=[5, 3], activation=activation).double()
    check(model, CrossEntropy(), x, y, torch.tensor([6, 1]), {"weight_decay": 0.01})


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_rule_on_a_deep_model_and_every_worked_line_adds_up(rule):
    x, y, outputs = problem(CrossEntropy())
    model = MLP((2, 2), outputs, hidden=[4, 3]).double()
    found = check(model, CrossEntropy(), x.reshape(7, 2, 2), y, torch.arange(4), rule)
    worked = re.findall(r"^ +([dbθ]) = (.*\d.*) = (\S+)$", found.text(digits=8), re.MULTILINE)
    assert len(worked) >= len(found.steps)
    for _, left, right in worked:
        value = eval(left.replace("−", "-").replace("·", "*"))
        assert value == pytest.approx(float(right), rel=1e-5, abs=1e-7)


def test_nothing_is_changed():
    x, y, outputs = problem(CrossEntropy())
    model = MLP((4,), outputs, hidden=[3]).double()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    objective = Objective(model, CrossEntropy(), x, y)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    explain(objective, optimizer, torch.arange(7))
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("engine", [Eager, Native])
def test_what_an_engine_makes_is_compared_and_taken_back(engine):
    x, y, outputs = problem(CrossEntropy())
    model = MLP((4,), outputs, hidden=[3])
    groups = [{"params": [*model.parameters()], "initial_lr": 0.1}]
    optimizer = SGD(groups, lr=0.1, momentum=0.9)
    objective = Objective(model, CrossEntropy(), x.float(), y)
    made_by = engine(objective, optimizer)

    def make(*rows):
        made_by(torch.tensor(rows)[:, None], torch.full((len(rows),), 0.5, dtype=torch.float64))
        return float(made_by.rates[-1])

    make(2, 4)  # there is momentum
    before = [p.detach().clone() for p in model.parameters()]
    found = explain_made(objective, optimizer, torch.tensor([2]), partial(make, 2))
    assert found.rate == 0.05
    assert found.gap < 1e-6
    assert all(step.old_buffer.any() for step in found.steps)
    with pytest.raises(ValueError, match="in another way"):  # two updates are not one
        explain_made(objective, optimizer, torch.tensor([2]), partial(make, 2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# ---------------------------------------------------------------------- what it prints

NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"


def small():
    x = torch.tensor([[2.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    model = MLP((2,), 1, hidden=[2], activation="relu").double()
    flat = torch.tensor([1, -1, 0.5, 0.5, 0, -2, 2, 1, 0.5], dtype=torch.float64)
    vector_to_parameters(flat, model.parameters())  # W₁, b₁, W₂, b₂
    return Objective(model, SquaredError(), x, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_the_text_of_an_update_that_was_made_on_paper():
    # z₁ = (1, −½), h₁ = (1, 0), p = 2½, ℓ = ½ 1.5² = 1.125; δ₂ = 1.5, δ₁ = (1.5 · 2, 0) = (3, 0)
    objective = small()
    optimizer = GD(objective.params, lr=0.1)
    text = explain(objective, optimizer, torch.tensor([0])).text()
    lines = [line.strip() for line in text.splitlines()]
    for line in (
        "z₁ = W₁ x + b₁,   h₁ = relu(z₁)",
        "Example 0 (1 of 1), y = 1",
        "x = [ 2  1 ]",
        "z₁ = [ 1  -0.5 ]",
        "h₁ = [ 1  0 ]",
        "p = [ 2.5 ]",
        "ℓ = ½ Σ (p − y)² = 1.125",
        "δ₂ = ∂ℓ/∂p = p − y",
        "δ₂ = [ 1.5 ]",
        "a′(z₁) = [ 1  0 ]",
        "δ₁ = [ 3  0 ]",
        "The objective: J = ℓ = 1.125",
        "∂J/∂W₁ = δ₁ xᵀ",
        "[ 6  3 ]",
        "The rule: d = g,   θ ← θ − ηd",
        "W₁, for one the entry [1, 1]:",
        "θ = 1 − 0.1 · 6 = 0.4",
        "new W₁ = [ 0.4  -1.3 ]",
        "new W₂ = [ 1.85  1 ]",
        "new b₂ = [ 0.35 ]",
    ):
        assert line in lines, line


def test_the_rule_is_shown_with_decay_and_momentum():
    objective = small()
    optimizer = torch.optim.SGD(
        objective.params, lr=0.1, momentum=0.5, dampening=0.25, weight_decay=0.5
    )
    for p in objective.params:
        optimizer.state[p]["momentum_buffer"] = torch.full_like(p, 2.0)
    text = explain(objective, optimizer, torch.tensor([0])).text()
    assert "The rule: d = g + λθ,   b ← μb + (1 − τ) d (b = d at first),   θ ← θ − ηb" in text
    assert "d = 6 + 0.5 · 1 = 6.5\n" in text
    assert "b = 0.5 · 2 + 0.75 · 6.5 = 5.875\n" in text
    assert "θ = 1 − 0.1 · 5.875 = 0.4125\n" in text


@pytest.mark.parametrize("digits", [1, 4, 12])
def test_it_fits_in_a_hundred_columns_and_tells_what_was_cut(digits):
    torch.manual_seed(0)
    x, y = torch.randn(40, 64), torch.arange(40) % 10
    model = MLP((64,), 10, hidden=[128])
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    found = explain(Objective(model, CrossEntropy(), x, y), optimizer, torch.arange(40))
    text = found.text(digits=digits, title="A title")
    assert text.startswith("A title\n\nThe model")
    assert max(map(len, text.splitlines())) <= 100
    assert "… 38 examples more" in text
    assert text.count("Example ") == 2
    assert len(found.text(digits=digits, examples=5).split("Example ")) == 6
    norm = torch.linalg.vector_norm(model.layers[1].weight.double()).item()
    assert f"(128 × 64 in all, norm {norm:.{digits}g})" in text


def test_options_out_of_range():
    found = explain(small(), GD(small().params), torch.tensor([0]))
    for digits in (0, 13, 2.5):
        with pytest.raises(ValueError, match=f"from 1 to 12. Received: digits={digits}"):
            found.text(digits=digits)
    with pytest.raises(ValueError, match=r"of at least 0\. Received: examples=-1"):
        found.text(examples=-1)


class OwnError(SquaredError):
    """States nothing of its own."""


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (nn.Linear(4, 1), SquaredError(), "gdtrain's Linear and MLP.*Received: Linear"),
        (Linear((4,), 1), OwnError(), "gdtrain's own losses.*Received: OwnError"),
    ],
)
def test_what_cannot_be_explained_is_said(model, loss, message):
    objective = Objective(model, loss, torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        explain(objective, GD(model.parameters()), torch.arange(2))


# ---------------------------------------------------------------------- in a run


def fit(module, data, *callbacks, **options):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {"max_epochs": 2, "accelerator": "cpu", **dict.fromkeys(quiet, False), **options}
    Trainer(callbacks=[*callbacks], **options).fit(module, datamodule=data)


def explained(module, data, update, **options):
    callback = ExplainUpdate(update)
    fit(module, data, callback, **options)
    assert module.updates == update + 1  # the run ends after it
    return callback.found


def make(optimizer, batch_size, model=None, schedule=None, **options):
    data = EmbeddedDataModule("iris", batch_size=batch_size)
    torch.manual_seed(0)
    model = Linear((4,), 3) if model is None else model()
    return SupervisedModule(model, CrossEntropy(), optimizer, schedule, **options), data


@pytest.mark.parametrize("engine", ["native", "eager"])
@pytest.mark.parametrize("update", [0, 1, 20, 130])
def test_an_update_of_a_run_is_that_of_the_run(engine, update):
    """The run that goes on by itself has, after it, the weights that were worked out."""
    rule = partial(SGD, lr=0.05, momentum=0.8, weight_decay=0.01)
    module, data = make(rule, 1, schedule=Cosine(), engine=engine)
    found = explained(module, data, update)
    assert found.gap < 1e-6
    again, data = make(rule, 1, schedule=Cosine(), engine=engine)
    again.state.rate_factors = module.state.rate_factors  # of the whole run, not of the short one
    fit(again, data, max_steps=update + 1)
    for p, made in zip(module.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, made)  # the run makes it as it would have without
    for step, p in zip(found.steps, again.model.parameters(), strict=True):
        torch.testing.assert_close(step.after.float(), p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "batch_size", "examples"),
    [
        (partial(GD, lr=0.5), "full", 105),
        (partial(MiniBatchSGD, lr=0.1, momentum=0.9, nesterov=True), 16, 16),
        (partial(torch.optim.SGD, lr=0.1, weight_decay=0.1), 16, 16),
    ],
)
def test_the_variants(optimizer, batch_size, examples):
    module, data = make(optimizer, batch_size, model=partial(MLP, (4,), 3, hidden=[4]))
    found = explained(module, data, 1)
    assert found.gap < 1e-6
    assert len(found.indices) == examples


def test_dropout_is_that_of_the_update():
    model = partial(MLP, (4,), 3, hidden=[8, 6], dropout=0.5)
    module, data = make(partial(MiniBatchSGD, lr=0.1), 16, model=model)
    found = explained(module, data, 2)
    assert found.gap < 1e-6
    assert all(set(layer.mask.unique().tolist()) == {0.0, 2.0} for layer in found.layers[:2])
    assert "h₁ = m₁ ∘ relu(z₁)" in found.text()


def test_a_rate_that_a_rule_computes_is_the_one_shown():
    module, data = make(partial(GD), "full", step_size="auto")
    found = explained(module, data, 5, max_epochs=50)
    assert found.gap < 1e-6
    assert found.rate == float(module.loop.engine.rates[0])
    assert found.rate != 1.0


# ---------------------------------------------------------------------- the command


def test_without_words_it_is_small_enough_to_read(tmp_path):
    done = command(tmp_path, "explain")
    assert done.returncode == 0
    assert done.stdout.startswith("Update 0 of sgd on iris, linear\n")
    assert "η = 0.1\n" in done.stdout
    assert len(done.stdout.splitlines()) < 60
    assert list(tmp_path.iterdir()) == []


def test_the_page_shows_what_the_command_prints(capsys, tmp_path):
    page = (Path(__file__).parent.parent.parent / "docs" / "explain.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"^python scripts/explain.py (.*)$", page, re.MULTILINE)
    done = command(tmp_path, "explain", *words.split())
    assert done.returncode == 0
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert done.stdout.splitlines()[:-1] == shown.splitlines()[:-1]  # the last tells of rounding
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert "Example 1 (2 of 3), y = 4" in capsys.readouterr().out


def test_words_are_those_of_training(tmp_path):
    words = (
        "model.hidden=[2] optimizer=minibatch optimizer.momentum=0.9 optimizer.lr=0.05 "
        "optimizer.weight_decay=0.01 update=5 examples=3 digits=3"
    )
    said = command(tmp_path, "explain", *words.split()).stdout
    assert said.startswith("Update 5 of minibatch on iris, mlp\n")
    assert "η = 0.05,   μ = 0.9,   λ = 0.01 (not on b₁, b₂)\n" in said
    assert said.count("Example ") == 3
    gap = re.search(r"largest difference is (\S+)\.\n", said)
    assert float(gap.group(1)) < 1e-6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("update=first", "update must be a whole number of at least 0. Received: update=first"),
        ("update=2100", "range [0, 2099]"),
        ("model=cnn data=digits", "model=linear, model=mlp). Received: CNN."),
        ("optimizer=adam", "(optimizer=gd, sgd or minibatch)"),
        ("-m optimizer=gd,sgd", "one update at a time"),
        (f"ckpt_path={__file__}", f"Received: ckpt_path={__file__}. Leave it out"),
        ("trainer.precision=bf16-mixed", "precision=bf16-mixed. Set trainer=default"),
        ("data=iris model=linear step_size=schedule_free update=40", "Set step_size=none."),
    ],
)
def test_bad_words_end_with_one_message_and_code_2(tmp_path, words, message):
    done = command(tmp_path, "explain", *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("error")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
