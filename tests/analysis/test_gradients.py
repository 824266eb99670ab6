"""The mathematics of the instruments, against float64 loops and distributions that are known."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from gdtrain.analysis.gradients import (
    NoiseEstimate,
    StepTrial,
    cosine,
    gram,
    judge,
    layers,
    noise,
    noise_scale,
    norms,
)
from gdtrain.cli.composition import compose
from gdtrain.runs.train import train


class Odd(nn.Module):
    """A parameter of its own, a shared one, a frozen one, and one that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        self.body[2].weight = self.body[0].weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.idle = nn.Parameter(torch.ones(2))


def test_layers_are_the_modules_that_have_parameters_of_their_own():
    # The order of nn.Module.parameters(): own first, then those of children; shared ones once.
    assert layers(Odd()) == {"scale": [0], "idle": [1], "body.0": [2, 3], "body.2": [4]}


def test_norms_are_those_of_numpy():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=s) for s in ((3, 2), (4,), (1, 2, 2))]
    tensors = [torch.from_numpy(p) for p in parts]
    whole, by_layer = norms([*tensors, None], {"a": [0, 2], "b": [1], "c": [3]})
    assert whole == pytest.approx(math.hypot(*(np.linalg.norm(p) for p in parts)), rel=1e-14)
    assert by_layer["a"] == pytest.approx(math.hypot(*parts[0].ravel(), *parts[2].ravel()))
    assert (by_layer["b"], by_layer["c"]) == (pytest.approx(np.linalg.norm(parts[1])), 0.0)


def test_the_cosine_is_that_of_numpy_and_none_where_a_gradient_is_zero():
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    split = [torch.from_numpy(v).split([3, 4]) for v in (a, b)]
    expected = a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)
    assert cosine(*split) == pytest.approx(expected, rel=1e-14)
    assert cosine(split[0], [torch.zeros(3), None]) is None


# ------------------------------------------------------------------ gradient noise


def sample(rng, population, groups, size):
    """Means over groups of rows that are drawn without replacement."""
    rows = rng.permutation(len(population))[: groups * size].reshape(groups, size)
    return population[rows].mean(axis=1)


def products(means):
    return gram([[torch.from_numpy(m)] for m in means])


@pytest.mark.parametrize(("groups", "size"), [(4, 3), (12, 1), (6, 2)])
def test_numerator_and_denominator_are_unbiased_for_a_finite_set(groups, size):
    rng = np.random.default_rng(0)
    population = rng.normal(size=(12, 3)) + np.array([0.3, 0.0, -0.1])
    trace = population.var(axis=0, ddof=1).sum()
    square = (population.mean(axis=0) ** 2).sum()
    found = [noise(products(sample(rng, population, groups, size)), size, 12) for _ in range(3000)]
    for name, truth in (("variance", trace), ("square", square)):
        values = np.array([getattr(e, name) for e in found])
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - truth) <= 4 * error + 1e-12
    if size == 1:  # all that there are, each by itself: exact, every time
        assert found[0].variance == pytest.approx(trace, rel=1e-12)
        assert found[0].square == pytest.approx(square, rel=1e-12)


def test_on_a_distribution_with_known_variance_the_interval_covers_the_noise_scale():
    # Gradients N(G, σ²I) in D dimensions: tr Σ = Dσ², B_simple = Dσ²/‖G‖².
    rng, d, sigma, groups, size = np.random.default_rng(1), 40, 0.5, 16, 8
    mean = np.full(d, 0.1)
    truth = d * sigma**2 / (mean @ mean)  # 25
    inside, values = 0, []
    for _ in range(400):
        means = mean + sigma / math.sqrt(size) * rng.normal(size=(groups, d))
        estimate = noise(products(means), size, math.inf)
        scale = noise_scale([estimate])
        assert scale.value is not None
        inside += scale.low <= truth <= scale.high
        values.append((estimate.variance, estimate.square))
    variance, square = np.mean(values, axis=0)
    assert variance == pytest.approx(d * sigma**2, rel=0.01)
    assert square == pytest.approx(mean @ mean, rel=0.03)
    assert inside / 400 == pytest.approx(0.95, abs=0.03)


def test_without_a_gradient_the_scale_is_undefined_and_not_infinite():
    rng, undefined = np.random.default_rng(3), 0
    for _ in range(400):
        scale = noise_scale([noise(products(rng.normal(size=(16, 40))), 1, math.inf)])
        undefined += scale.value is None
        if scale.value is None:
            assert (scale.low, scale.high) == (None, None)
            assert "undefined" in scale.words
        else:
            assert math.isfinite(scale.high)
    assert undefined / 400 > 0.95


def test_the_jackknife_is_that_of_a_loop_that_leaves_each_group_out():
    rng, size, population = np.random.default_rng(4), 3, 60
    means = rng.normal(size=(6, 5)) + 0.4

    def by_definition(rows):
        k = len(rows)
        pairs = [rows[i] @ rows[j] for i in range(k) for j in range(k) if i != j]
        between = sum(pairs) / (k * (k - 1))
        variance = size * (sum(r @ r for r in rows) / k - between)
        return variance, between + variance / population

    found = noise(products(means), size, population)
    assert (found.variance, found.square) == pytest.approx(by_definition(means), rel=1e-12)
    left = np.array([by_definition(np.delete(means, i, axis=0)) for i in range(6)])
    error = 5 / 6 * (left - left.mean(axis=0)).T @ (left - left.mean(axis=0))
    assert found.error == pytest.approx((error[0, 0], error[0, 1], error[1, 1]), rel=1e-10)
    assert found.degrees == 5


def test_fiellers_interval_is_where_the_t_test_changes_its_mind():
    estimate = NoiseEstimate(10.0, 2.0, (1.0, 0.1, 0.2), 15)
    scale = noise_scale([estimate, estimate])
    t = stats.t.ppf(0.975, 30)
    for end in (scale.low, scale.high):
        spread = math.sqrt((1.0 - 2 * end * 0.1 + end**2 * 0.2) / 2)
        assert abs(10.0 - end * 2.0) / spread == pytest.approx(t, rel=1e-9)
    assert scale.low < scale.value == 5.0 < scale.high


# ------------------------------------------------------------------ the step test


@pytest.mark.parametrize(
    ("share", "alpha"), [(0.5, -0.5), (1.0, 0.0), (2.0, 1.0), (3.0, 2.0), (1e-9, -1 + 1e-9)]
)
def test_alpha_on_a_quadratic(share, alpha):
    # J = ½ Σ h θ²; the lowest point along −g is at η = ‖g‖²/⟨g, Hg⟩, here in binary fractions.
    h, theta = np.array([1.0, 4.0]), np.array([4.0, 1.0])
    g = h * theta  # (4, 4): η* = 32/80
    step = -share * (g @ g) / (g @ (h * g)) * g
    trial = StepTrial(float(g @ step), float((h * (theta + step)) @ step))
    assert trial.alpha == pytest.approx(alpha, abs=1e-12)
    height = 0.5 * (h * (theta + step) ** 2).sum() - 0.5 * (h * theta**2).sum()
    assert trial.rise == pytest.approx(height, rel=1e-9)
    lowest = StepTrial(start=-9.0, end=0.0).alpha
    assert math.copysign(1, lowest) == 1  # 0, and not −0


def test_a_step_that_begins_uphill_has_no_alpha_but_counts():
    trials = [StepTrial(1.0, 2.0)] * 4 + [StepTrial(-2.0, 1.0)] * 4
    verdict = judge(trials)
    assert (verdict.higher, verdict.uphill, verdict.median) == (4, 4, 0.5)
    assert verdict.state == "undecided"


def test_the_verdict_rests_on_stability_and_not_on_alpha():
    short, long = StepTrial(-1.0, -0.99), StepTrial(-1.0, 0.9)  # α = −0.99, far from 0; 0.9
    for trial in (short, StepTrial(-1.0, 0.0), long):
        assert judge([trial] * 10).state == "stable"
    assert judge([StepTrial(-1.0, 1.1)] * 10).state == "unstable"
    assert judge([long, StepTrial(-1.0, 1.1)] * 5).state == "undecided"
    assert judge([short] * 20 + [StepTrial(-1.0, 1e6)]).state == "stable"  # no single one decides
    assert judge([short] * 5).words(64).endswith("for a verdict: 5, and 6 are the least.")
    assert "is too large" in judge([StepTrial(-1.0, 1.1)] * 10).words(64)
    assert "64 probe examples 0 of the last 10" in judge([short] * 10).words(64)


def test_the_verdict_is_wilcoxons():
    rng = np.random.default_rng(5)
    for shift in (-0.8, -0.5, 0.0, 0.5):
        rises = rng.normal(size=24) + shift
        p = stats.wilcoxon(rises, correction=False, method="asymptotic").pvalue
        state = judge([StepTrial(-1.0, 1.0 + 2 * r) for r in rises]).state
        assert (state == "undecided") == (p > 0.05)


# ------------------------------------------------------------------ the page


PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "instruments.md"


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers")
def test_the_pages_examples_print_what_it_says(capsys):
    text = PAGE.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    shown = text.splitlines()
    for line in printed:
        assert line in shown


COMMANDS = re.findall(r"^python scripts/train\.py (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS)
def test_the_pages_commands_run(words, tmp_path):
    short = ["trainer.max_epochs=3", "callbacks=none", "data=iris"]
    result = train(compose([*words.split(), *short], None), tmp_path / "run")
    assert result.summary["stop_reason"] == "BUDGET"
    written = EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    assert ("gradient/norm" in written["scalars"]) == ("instruments=off" not in words)
    drawn = [tag for tag in written["histograms"] if tag.startswith("weights/")]
    assert bool(drawn) == ("histograms" in words)
