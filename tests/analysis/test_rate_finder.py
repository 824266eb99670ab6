"""The rate finder: what it finds on problems with known limits, and that it leaves no trace."""

import json
import math
import random
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset

from gdtrain import GD, SGD, MiniBatchSGD
from gdtrain.analysis.rate_finder import _smooth, find_lr, suggest
from gdtrain.cli.composition import compose
from gdtrain.data import ArrayDataModule, EmbeddedDataModule
from gdtrain.losses import CrossEntropy, SquaredError
from gdtrain.models import MLP
from gdtrain.models.dropout import Dropout
from gdtrain.objective import Objective
from gdtrain.runs import tools
from gdtrain.step_sizes import Armijo


def regression(scales=(1.0, 0.5, 0.2), n=120, batch_size="full", noise=0.1, seed=0, val=0):
    """Least squares whose Hessian is known: XᵀX/N; and its largest eigenvalue."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(n, len(scales))) * scales
    y = X @ np.ones(len(scales)) + noise * generator.normal(size=n)
    options = {"standardize": False, "standardize_targets": False, "test_fraction": 0}
    data = ArrayDataModule(
        X, y, batch_size=batch_size, dtype="float64", val_fraction=val, **options
    )
    return data, float(np.linalg.eigvalsh(X.T @ X / n)[-1])


def find(model, loss, make, data, **options):
    """A range test on the training part of some data."""
    data.setup()
    objective = Objective(model, loss, *data.examples("train"))
    optimizer = make if isinstance(make, torch.optim.Optimizer) else make(model.parameters())
    return find_lr(objective, optimizer, data.train_dataloader(), **options)


def zero_model(features=3):
    model = nn.Linear(features, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model


# ---------------------------------------------------------------------- the curve


def test_smoothing_keeps_a_quadratic_and_its_slope_and_weights_take_a_noisy_point_out():
    x, alike = np.linspace(-3, 1, 40), np.ones(40)
    y = 2 - x + 0.5 * x**2
    noisy, unsure = np.where(x == x[10], 100.0, y), np.where(x == x[10], 1e-12, alike)
    for values, weights, near in ((y, alike, 1e-10), (noisy, unsure, 1e-9)):
        value, slope = _smooth(x, values, weights)
        # Within the bounds of what it smooths: the values at the ends are themselves such bounds.
        assert value == pytest.approx(y, abs=near)
        assert slope == pytest.approx(-1 + x, abs=10 * near)


RATES = np.geomspace(1e-3, 1e3, 61)
# J = 2 − log₁₀ η down to η = 1, and up again at three times the slope.
LOSSES = np.where(RATES < 1, 2 - np.log10(RATES), 2 + 3 * np.log10(RATES))


@pytest.mark.parametrize(
    ("losses", "start", "full", "turn", "words"),
    [
        (LOSSES, 6.0, True, 1, "the turn divided by 4"),
        (LOSSES, 6.0, False, 1, "the turn divided by 2"),
        # A lucky place, far beyond.
        (np.where(RATES > 300, 0.1, LOSSES), 6.0, True, 1, "the turn divided by 4"),
        (1 / (1 + 1000 * RATES), 1.0, True, 0.1, "below 1% of that"),  # at η = 0.099
        (1 - 5e-4 * RATES, 1.0, True, 1e3, "raise max_lr"),
    ],
    ids=["full batch", "mini-batch", "only the first turn", "gone", "not turned"],
)
def test_suggestion_by_hand(losses, start, full, turn, words):
    curve = suggest(RATES, losses, start, full_batch=full)
    assert curve.turn == pytest.approx(turn, rel=0.3)  # rounding a corner moves it a little
    assert words in curve.basis
    if "divided" in words:
        assert curve.suggestion == pytest.approx(curve.turn / int(words[-1]), rel=0.06)
        assert curve.slopes[5] == pytest.approx(-1)


def test_a_steep_fall_close_to_the_turn_bounds_the_suggestion_from_below():
    rates = np.geomspace(1e-3, 1e1, 81)
    losses = 1 - 0.9 / (1 + np.exp(-20 * (np.log10(rates) + 0.2))) + (rates > 1) * 5
    curve = suggest(rates, losses, 1.0, full_batch=True)
    assert curve.suggestion == pytest.approx(curve.turn / 2, rel=0.06)
    assert "half of the turn" in curve.basis


@pytest.mark.parametrize("full_batch", [True, False])
def test_noise_moves_the_suggestion_by_less_than_a_factor_of_three(full_batch):
    rates = np.geomspace(1e-6, 1e2, 100)
    clean = 0.2 + 0.8 / (1 + 30 * rates) + np.minimum(rates / 2, 30) ** 3
    exact = suggest(rates, clean, 1.0, full_batch=full_batch).suggestion
    found = []
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=100) * 0.05
        curve = suggest(rates, clean + noise, 1.0, errors=np.full(100, 0.05), full_batch=full_batch)
        found.append(curve.suggestion)
    assert exact / 3 < min(found) <= max(found) < 3 * exact


def test_no_fall_no_suggestion():
    rates = np.geomspace(1e-6, 1, 50)
    flat = suggest(rates, np.ones(50), 1.0)
    rising = suggest(rates, 1 + rates, 1.0)
    noisy = suggest(rates, 1 - 0.02 * np.sin(9 * np.log(rates)), 1.0, errors=np.full(50, 0.1))
    assert flat.suggestion is rising.suggestion is noisy.suggestion is None
    assert all(c.basis.startswith("No suggestion") for c in (flat, rising, noisy))
    assert "lower min_lr" in rising.basis
    assert flat.rows()  # tables and pictures are made all the same
    flat.plot()


def test_values_that_are_not_finite_count_as_the_highest():
    rates = np.geomspace(1e-3, 1e1, 60)
    losses = np.where(rates < 1, 1 / (1 + 20 * rates), np.nan)
    curve = suggest(rates, losses, 1.0)
    assert 0.5 < curve.turn < 1  # a jump is smoothed over 0.35 decades
    text = json.dumps(curve.to_dict(), allow_nan=False)
    assert json.loads(text)["losses"][-1] is None


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="at least 10 points"):
        suggest(np.geomspace(1, 2, 9), np.ones(9), 1.0)


# ---------------------------------------------------------------------- known problems


@pytest.mark.parametrize(
    ("momentum", "nesterov", "scale"), [(0.0, False, 1), (0.9, False, 30), (0.9, True, 30)]
)
def test_a_quadratic_turns_at_its_limit(momentum, nesterov, scale):
    data, largest = regression(scales=(scale, 0.5 * scale, 0.2 * scale))
    make = partial(GD, lr=1.0, momentum=momentum, nesterov=nesterov)
    curve = find(zero_model(), SquaredError(), make, data)
    expected = 2 / largest * (1 + momentum) / ((1 + 2 * momentum) if nesterov else 1)
    assert curve.sharpness == pytest.approx(largest, rel=0.01)
    assert curve.limit == pytest.approx(expected, rel=0.01)
    # With momentum the loss rings, and the first swing back counts as the turn.
    least, factor = (0.2, 20) if momentum else (0.5, 8)
    assert least * expected < curve.turn < 3 * expected
    assert expected / factor < curve.suggestion < expected
    assert "Stability limit" in curve.basis


def test_weight_decay_belongs_to_the_limit():
    data, largest = regression()
    curve = find(zero_model(), SquaredError(), partial(GD, lr=1.0, weight_decay=2.0), data)
    assert curve.limit == pytest.approx(2 / (largest + 2), rel=0.01)


@pytest.mark.parametrize(
    ("kind", "size"), [(SGD, 1), (MiniBatchSGD, 8), (torch.optim.Adam, "full")]
)
def test_no_limit_is_shown_where_there_is_none(kind, size):
    data, _ = regression(batch_size=size)
    curve = find(zero_model(), SquaredError(), partial(kind, lr=1.0), data, updates=200)
    assert curve.limit is None
    assert curve.sharpness is None
    assert curve.suggestion > 0
    assert all("limit" not in words for words in curve.rows().values())


@pytest.mark.parametrize("size", [1, 32])
def test_orders_and_weights_move_the_suggestion_by_less_than_a_factor_of_three(size):
    found = []
    for seed in range(5):
        data = EmbeddedDataModule("digits", batch_size=size, seed=100 * seed)
        data.setup()
        torch.manual_seed(seed)
        model = MLP(data.input_shape, 10, hidden=[32])
        found.append(find(model, CrossEntropy(), partial(MiniBatchSGD, lr=1.0), data).suggestion)
    assert max(found) < 3 * min(found)


def test_equal_calls_are_equal_and_the_lr_of_the_optimizer_is_only_a_unit():
    data, _ = regression(batch_size=4)
    first, *others = (
        find(zero_model(), SquaredError(), partial(MiniBatchSGD, lr=lr), data, updates=100)
        for lr in (1.0, 1.0, 0.25)  # powers of two: the same rates to the last bit
    )
    assert all(first.to_dict() == other.to_dict() for other in others)


def test_an_overflow_ends_the_test_and_not_the_suggestion():
    data, _ = regression()
    data.dtype = torch.float32
    options = {"min_lr": 1e-3, "max_lr": 1e30, "updates": 300, "curvature": False}
    model = zero_model().float()
    curve = find(model, SquaredError(), partial(GD, lr=1.0), data, **options)
    assert len(curve.rates) < 50
    assert math.isinf(curve.losses[-1]) or curve.losses[-1] > curve.start
    assert curve.suggestion is not None
    json.dumps(curve.to_dict(), allow_nan=False)


# ---------------------------------------------------------------------- no trace


class Busy(nn.Module):
    """Buffers that passes change, and layers that draw from each generator."""

    def __init__(self, bears):
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.own, self.torchs = Dropout(0.2), nn.Dropout(0.2)
        self.last = nn.Linear(8, 1)
        self.register_buffer("passes", torch.zeros(()))
        self.bears = bears

    def forward(self, x):
        self.passes += 1
        if self.passes > self.bears:
            raise KeyboardInterrupt
        shift = random.random() + np.random.rand()  # noqa: NPY002
        return self.last(self.torchs(self.own(self.norm(self.first(x))))) + 0.01 * shift


@pytest.mark.parametrize(
    ("size", "training", "bears"),
    [("full", True, 1e9), (8, True, 1e9), (8, False, 1e9), (8, True, 20)],
)
def test_everything_is_as_it_was(size, training, bears):
    data, _ = regression(batch_size=size)
    data.dtype = torch.float32
    data.setup()
    model = Busy(bears).train(training)
    optimizer = MiniBatchSGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()

    def state():
        return {
            "weights": {k: v.clone() for k, v in model.state_dict().items()},
            "gradients": [p.grad.clone() for p in model.parameters()],
            "momentum": [optimizer.state[p]["momentum_buffer"].clone() for p in optimizer.state],
            "groups": [
                {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
            ],
            "modes": [m.training for m in model.modules()],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
            "python": random.getstate(),
            "order": [b.clone() for b in data.train_dataloader()],
            "examples": [t.clone() for t in data.examples("train")],
        }

    before = state()
    with pytest.raises(KeyboardInterrupt) if bears == 20 else nullcontext():
        curve = find(model, SquaredError(), optimizer, data, updates=100)
        assert curve.losses[-1] != curve.start  # something was done
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 0}, r"min_lr must be a number in \(0, ∞\)\. Received: min_lr=0\."),
        ({"max_lr": math.inf}, r"max_lr must be a number in .*\. Received: max_lr=inf\."),
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr must be below max_lr. Received: min_lr=1, max"),
        ({"updates": 19}, "updates must be a whole number of at least 20. Received: updates=19"),
    ],
)
def test_bad_options(options, message):
    data, _ = regression()
    with pytest.raises(ValueError, match=message):
        find(zero_model(), SquaredError(), partial(GD, lr=1.0), data, **options)


@pytest.mark.parametrize(
    ("features", "weight", "trains", "options", "message"),
    [
        (3, math.nan, True, {"lr": 1.0}, r"finite before any update\. Received: nan"),
        (3, 0.0, False, {"lr": 1.0}, "no parameter to train"),
        (3, 0.0, True, {"lr": 0.0}, r"lr must be > 0 in each .*Received: lr=\[0.0\]"),
        (3, 0.0, True, {"step_size": Armijo()}, "no rate to find where a rule .*Armijo"),
        (4, 0.0, True, {"lr": 1.0}, r"does not take examples of shape \(3,\)"),
    ],
)
def test_what_cannot_be_tested_is_told(features, weight, trains, options, message):
    data, _ = regression()
    model = zero_model(features)
    nn.init.constant_(model.weight, weight)
    optimizer = GD(model.parameters(), **options)
    model.weight.requires_grad_(trains)
    with pytest.raises(ValueError, match=message):
        find(model, SquaredError(), optimizer, data)


def test_a_layer_without_second_derivative_costs_the_limit_only(monkeypatch):
    def refuse(objective, **options):
        raise ValueError("It bends nowhere.")

    monkeypatch.setattr("gdtrain.analysis.rate_finder.sharpness", refuse)
    data, _ = regression()
    curve = find(zero_model(), SquaredError(), partial(GD, lr=1.0), data)
    assert curve.limit is curve.sharpness is None
    assert curve.basis.endswith(" No stability limit: It bends nowhere.")
    assert curve.suggestion > 0


# ---------------------------------------------------------------------- the command


class Lines(Dataset):
    def __len__(self):
        return 90

    def __getitem__(self, i):
        return torch.tensor([math.sin(i), math.cos(3 * i)]), torch.tensor([math.sin(i)])


@pytest.mark.parametrize("variant", ["gd", "sgd"])
def test_examples_of_a_dataset_are_fetched(monkeypatch, tmp_path, variant):
    monkeypatch.setitem(sys.modules, "lines", SimpleNamespace(Lines=Lines))
    words = f"data=dataset data.train._target_=lines.Lines model=linear optimizer={variant}"
    words += " data.val_fraction=0 data.test_fraction=0"
    curve = tools.find_lr(compose(words.split(), None), tmp_path / "found", updates=200)
    assert curve.details["examples"] == 90
    assert 0.01 < curve.suggestion < 10


@pytest.mark.parametrize("variant", ["gd", "sgd"])
def test_the_command_leaves_table_picture_and_numbers(tmp_path, variant):
    words = ["data=diabetes", "model=linear", f"optimizer={variant}", "updates=200"]
    done = command(tmp_path, "find_lr", *words)
    assert done.returncode == 0
    (folder,) = tmp_path.glob("outputs/find_lr/*/*")
    assert folder.parent.name == f"diabetes-linear-{variant}"
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    found = json.loads((folder / "find_lr.json").read_text())
    assert "suggestion" in done.stdout
    assert f"Train with optimizer.lr={found['suggestion']:g}" in done.stdout
    assert f"tensorboard --logdir outputs/find_lr/diabetes-linear-{variant}" in done.stdout
    assert (found["limit"] is not None) == (variant == "gd")
    assert ("Stability limit" in done.stdout) == (variant == "gd")
    assert found["rates"][0] == pytest.approx(1e-6, rel=0.3)
    assert (folder / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder)).Reload()
    scalars = events.Scalars("find_lr/loss")
    assert [e.step for e in scalars] == list(range(len(found["rates"])))
    assert [e.value for e in scalars] == pytest.approx(found["losses"], rel=1e-5)
    assert events.Tags()["images"] == ["find_lr/curve"]
    (text,) = events.Tensors("find_lr/suggestion/text_summary")
    assert text.tensor_proto.string_val[0].decode() == found["basis"]


def test_the_command_takes_a_folder_and_refuses_a_full_one(tmp_path):
    words = ["data=iris", "model=linear", "optimizer=gd", "updates=50", "max_lr=10", "output=a/b"]
    assert command(tmp_path, "find_lr", *words).returncode == 0
    names = {p.name for p in (tmp_path / "a" / "b").iterdir()}
    assert {"find_lr.json", "find_lr.png"} < names
    done = command(tmp_path, "find_lr", *words)
    assert done.returncode == 2
    assert done.stderr == "error: a/b exists already; choose another output=…\n"
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("min_lr=fast", "min_lr must be a number in (0, ∞). Received: min_lr=fast"),
        ("updates=1.5", "from 20 to 1000000000. Received: updates=1.5"),
        ("output=", "output must be a folder"),
        ("min_lr=1 max_lr=0.1", "min_lr must be below max_lr"),
        ("loss=hinge", "Hinge is a loss for two classes"),
        ("trainer.devices=2", "one device"),
        ("-m optimizer=gd,sgd", "one test at a time"),
        ("optimizer=gd +step_size._target_=gdtrain.step_sizes.Armijo", "step_size=none"),
    ],
)
def test_bad_words_end_with_one_message_and_code_2(tmp_path, words, message):
    done = command(tmp_path, "find_lr", *words.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_curve_is_drawn_with_names_and_units():
    data, _ = regression()
    curve = find(zero_model(), SquaredError(), partial(GD, lr=1.0), data)
    above, below = curve.plot().axes
    assert above.get_ylabel() == "mean training loss"
    assert "step size η" in below.get_xlabel()
    assert "loss per decade" in below.get_ylabel()
    assert below.get_xscale() == "log"
    assert "B = 120" in above.get_title()
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert any("stability limit" in label for label in labels)
    styles = {line.get_linestyle() for line in above.lines}
    assert {"-", "--", ":", "-."} <= styles  # apart without colour
