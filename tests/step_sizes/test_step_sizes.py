"""The rules by hand-worked numbers, against scipy, and on problems with known minima."""

import inspect
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from problems import PROBLEMS, Problem, quadratic, vector
from scipy.optimize._linesearch import line_search_armijo
from torch import nn

from gdtrain import step_sizes
from gdtrain.losses import CrossEntropy, Hinge, Logistic, SquaredHinge
from gdtrain.optim import GD, SGD, MiniBatchSGD
from gdtrain.step_sizes import (
    Armijo,
    BarzilaiBorwein,
    Context,
    DoG,
    DoWG,
    Evaluations,
    InverseSmoothness,
    Needs,
    Polyak,
    PolyakDoG,
    ScheduleFree,
    StepSize,
    StochasticLineSearch,
    StochasticPolyak,
)

PUBLIC = [getattr(step_sizes, name) for name in step_sizes.__all__]
RULES = [c for c in PUBLIC if inspect.isclass(c) and issubclass(c, StepSize) and c is not StepSize]


class Run:
    """f minimised by an optimizer with a rule; counts what the rule asks for."""

    def __init__(self, loss, start, rule, optimizer=GD, **arguments):
        self.theta = nn.Parameter(torch.as_tensor(start, dtype=torch.float64).clone())
        self.loss, self.calls = loss, 0
        self.optimizer = optimizer([self.theta], step_size=rule, **arguments)

    def closure(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.loss(self.theta)
        loss.backward()
        return loss

    def step(self, times=1):
        """So many updates; the η of each."""
        rates = []
        for _ in range(times):
            self.optimizer.step(self.closure)
            rates.append(self.optimizer.last_rate)
        return rates

    def values(self):
        return self.theta.detach().tolist()


def parabola(*curvatures):
    """½ Σ λ_i θ_i²."""
    return lambda theta: 0.5 * (vector(*curvatures) * theta**2).sum()


# ---------------------------------------------------------------------- by hand


def test_armijo_halves_until_f_decreases_enough():
    # f = 2θ² at 1 is 2, slope 4. η = 1: θ = −3, f = 18. ½: −1, 2 > 2 − c·½·16. ¼: 0, f = 0.
    run = Run(parabola(4), [1.0], Armijo(shrink=0.5))
    assert run.step() == [0.25]
    assert run.values() == [0.0]
    assert run.calls == 1 + 3


def test_armijo_goes_on_from_the_last_step_times_growth():
    # λ = 1, η₀ = ½ is good at once: θ = ½; then 1.5·½ = ¾: θ = ⅛.
    run = Run(parabola(1), [1.0], Armijo(initial=0.5, growth=1.5))
    assert run.step(2) == [0.5, 0.75]
    assert run.values() == [0.125]
    assert run.calls == 2 * 2


def test_armijos_constant_is_the_least_decrease():
    # f(1 − η) = ½(1 − η)² ≤ ½ − cη  ⟺  η ≤ 2(1 − c): with c = 0.4 the bound is 1.2.
    for initial, expected in ((1.25, 0.625), (1.1875, 1.1875)):
        run = Run(parabola(1), [1.0], Armijo(initial=initial, c=0.4, shrink=0.5))
        assert run.step() == [expected]


def test_interpolation_goes_to_the_least_of_the_parabola_within_bounds():
    # 1/λ is the minimum: 1/4 of the trial of 1; 1/50 is held at 0.1, and then 0.2 · 0.1 is it.
    assert Run(parabola(4), [1.0], Armijo()).step() == [0.25]
    assert Run(parabola(50), [1.0], Armijo()).step() == pytest.approx([0.02], rel=1e-12)
    # λ = 20/11: steps above 1.1 climb; 1/λ = 0.55 is 0.46 of the trial of 1.2.
    run = Run(parabola(20 / 11), [1.0], Armijo(initial=1.2))
    assert run.step() == pytest.approx([0.55], rel=1e-12)


def test_a_trial_that_is_not_finite_is_no_step():
    # f = θ − log θ at 5, slope 0.8: η = 10 leads to −3, where there is no f; 5 to 1, 1 to 4.2.
    for shrink, expected in ((0.5, 5.0), ("interpolate", 1.0)):
        rule = Armijo(initial=10.0, shrink=shrink)
        assert Run(lambda theta: (theta - torch.log(theta)).sum(), [5.0], rule).step() == [expected]

    def only_here(theta):
        return torch.where(theta == 1.0, theta, math.inf).sum()

    nowhere = Run(only_here, [1.0], Armijo(shrink=0.5))
    assert nowhere.step() == [0.0]
    assert nowhere.values() == [1.0]
    assert nowhere.calls == 1 + 31


@pytest.mark.parametrize(("short", "second"), [(False, 11 / 101), (True, 101 / 1001)])
def test_barzilai_borwein_by_hand(short, second):
    # H = diag(1, 10), θ = (1, 1), d = (1, 10). η = 0.1: s = −(0.1, 1), y = Hs = −(0.1, 10).
    # ⟨s,s⟩ = 1.01, ⟨s,y⟩ = 10.01, ⟨y,y⟩ = 100.01
    run = Run(parabola(1, 10), [1.0, 1.0], BarzilaiBorwein(short=short, initial=0.1))
    rates = run.step(2)
    expected = 10.01 / 100.01 if short else 1.01 / 10.01
    assert rates == pytest.approx([0.1, expected], rel=1e-12)
    assert run.values() == pytest.approx([0.9 * (1 - expected), 0.0], abs=1e-12)


def test_barzilai_borwein_looks_back_over_ten_values_and_with_memory_one_over_none():
    # H = diag(1, 100) from (1, 1): after BB1 has found 1/100 and then nearly 1, f rises.
    losses = {}
    for memory in (1, 10):
        run = Run(parabola(1, 100), [1.0, 0.1], BarzilaiBorwein(initial=0.01, memory=memory))
        seen = []
        for _ in range(30):
            seen.append(run.loss(run.theta).item())
            run.step()
        losses[memory] = seen
    rises = {m: sum(b > a for a, b in pairwise(v)) for m, v in losses.items()}
    assert rises[1] == 0
    assert rises[10] > 0
    for k in range(1, 30):  # Grippo, Lampariello and Lucidi's test
        assert losses[10][k] <= max(losses[10][max(0, k - 10) : k])


def test_barzilai_borwein_with_the_curvature_of_a_saddle_takes_the_ratio_of_norms():
    # f = −½·3θ², θ: 1 → 1 + 0.1·3 = 1.3; s = 0.3, y = −0.9: ‖s‖/‖y‖ = 1/3.
    run = Run(parabola(-3), [1.0], BarzilaiBorwein(initial=0.1))
    assert run.step(2) == pytest.approx([0.1, 1 / 3], rel=1e-12)


def test_barzilai_borwein_tries_polyaks_step_where_it_is_longer():
    # f = ½θ², θ = 4, g = 4: f/g² = ½ is longer than 0.1 and holds, θ = 2; then the secant's 1.
    run = Run(parabola(1), [4.0], BarzilaiBorwein(initial=0.1, f_star=0.0))
    assert run.step(2) == [0.5, 1.0]
    assert run.values() == [0.0]


def test_barzilai_borwein_waits_twice_as_long_after_each_polyak_step_that_fails():
    # f = 100 + ½(θ₁² + 2θ₂²) at (2, 1): 103/8 overshoots, and is cut. s ∝ (1, 1): 1/η = 3/2.
    rule = BarzilaiBorwein(initial=0.1, f_star=0.0, memory=1)
    run = Run(lambda theta: 100 + parabola(1, 2)(theta), [2.0, 1.0], rule)
    numbers, seen = run.optimizer.param_groups[0], []
    for _ in range(5):
        before = run.calls
        (rate,) = run.step()
        seen.append((run.calls - before > 2, numbers["step_size"]["wait"]))
        if len(seen) == 2:
            assert rate == pytest.approx(2 / 3, rel=1e-9)
    assert seen == [(True, 2), (False, 1), (False, 0), (True, 4), (False, 3)]


def test_barzilai_borwein_on_a_slope_without_curvature_grows_tenfold():
    run = Run(lambda theta: 2 * theta.sum(), [1.0], BarzilaiBorwein(initial=0.5))
    assert run.step(3) == [0.5, 5.0, 50.0]


def test_polyak_by_hand():
    # f = ½θ² − 3 with f* = −3: η = ½θ²/θ² = ½ always.
    run = Run(lambda theta: 0.5 * (theta**2).sum() - 3, [4.0], Polyak(f_star=-3.0))
    assert run.step(2) == [0.5, 0.5]
    assert run.values() == [1.0]
    assert Run(parabola(1), [4.0], Polyak(c=0.5)).step() == [1.0]
    assert Run(parabola(1), [4.0], Polyak(max_lr=0.25)).step() == [0.25]


def test_polyaks_estimate_by_hand():
    # f = ½θ², θ = 2: f = 2, δ = 1, target 1: η = 1/4, θ = 1.5, f = 1.125 ≤ 2 − ½: reached.
    # δ = 2, target −0.875: η = 2/2.25 = 8/9, θ = 1/6, f = 1/72 ≤ 1.125 − 1: reached, δ = 4.
    # η = 4/(1/36) = 144, θ = 1/6 − 24 = −143/6, f = 284.01: missed, δ = 2, best 1/72:
    # η = (f − 1/72 + 2)/(2f)
    run = Run(parabola(1), [2.0], Polyak(f_star="estimate"))
    f = 0.5 * (143 / 6) ** 2
    expected = [0.25, 8 / 9, 144.0, (f - 1 / 72 + 2) / (2 * f)]
    assert run.step(4) == pytest.approx(expected, rel=1e-9)


def test_a_value_below_f_star_is_an_error_and_rounding_is_none():
    with pytest.raises(ValueError, match=r"f_star must be the least value of f.*f=2.*estimate"):
        Run(parabola(1), [2.0], Polyak(f_star=3.0)).step()
    # f ends at −1e-16 rather than 0.
    run = Run(lambda theta: quadratic(theta) + 21.0, [0.0, 0.0], Polyak(f_star=0.0))
    run.step(300)
    assert abs(run.loss(run.theta).item()) < 1e-14


@pytest.mark.parametrize(
    ("start", "options", "rate"),
    [  # f = 2, ‖d‖² = 4
        (2.0, {"max_lr": 2.0, "c": 1.0}, 0.5),
        (2.0, {"max_lr": 2.0}, 1.0),  # c = ½
        (2.0, {"max_lr": 0.25}, 0.25),
        (2.0, {"max_lr": 2.0, "c": 1.0, "f_star": 1.0}, 0.25),
        (2.0, {"max_lr": 2.0, "f_star": 5.0}, 0.0),
        (0.0, {"max_lr": 2.0}, 2.0),  # d = 0
        (2.0, {"c": 1.0}, 0.125),  # lr is the cap
    ],
)
def test_stochastic_polyak_by_hand(start, options, rate):
    lr = 1.0 if "max_lr" in options else 0.125
    run = Run(parabola(1), [start], StochasticPolyak(**options), SGD, lr=lr)
    assert run.step() == [rate]
    assert run.optimizer.param_groups[0]["lr"] == lr


def test_smoothing_bounds_the_growth_and_passes_over_zero():
    # γ^{B/N} = 4^½ = 2; the bound is 0.1, 0.2, then 0.4, Polyak's step 1.
    run = Run(parabola(1), [8.0], StochasticPolyak(0.1, 0.5, smoothing=4.0, batch_fraction=0.5))
    assert run.step(3) == pytest.approx([0.1, 0.2, 0.4])
    run.loss = lambda theta: theta.sum() - 100  # below f* = 0
    assert run.step() == [0.0]
    run.loss = parabola(1)
    assert run.step() == pytest.approx([0.8])


def test_bound_and_remember_continue_what_rate_does():
    rule = StochasticPolyak(0.1, 0.5, smoothing=4.0, batch_fraction=0.5)
    run = Run(parabola(1), [8.0], rule, SGD)
    run.optimizer.param_groups[0]["initial_lr"] = 1.0
    assert rule.bound(run.optimizer)[:4] == pytest.approx((2.0, 0.0, 2.0, 0.1))
    run.step()
    assert rule.bound(run.optimizer)[:4] == pytest.approx((2.0, 0.0, 2.0, 0.2))
    for share in (0.2, 0.0):  # an engine made an update, and one that was passed over
        rule.remember(run.optimizer, torch.ones(1), torch.tensor([share]).double(), 1.0)
    assert rule.bound(run.optimizer)[:4] == pytest.approx((2.0, 0.0, 2.0, 0.4))
    assert run.step() == pytest.approx([0.4])


def test_the_line_search_on_a_batch_grows_by_gamma_in_a_pass():
    # η_max = 10 is never reached; 2^¼ per update while f decreases (λ tiny, all trials good).
    rule = StochasticLineSearch(initial=0.5, batch_fraction=0.25)
    rates = Run(parabola(1e-3), [1.0], rule, SGD).step(5)
    assert rates == pytest.approx([0.5 * 2 ** (k / 4) for k in range(5)])
    capped = StochasticLineSearch(initial=0.5, max_lr=0.75, batch_fraction=1)
    assert Run(parabola(1e-3), [1.0], capped, SGD).step(3) == [0.5, 0.75, 0.75]
    # λ = 1, c = ½: good up to η = 1: 2 → 1.8 → … → 2·0.9⁷ = 0.9565938
    rule = StochasticLineSearch(initial=2.0, c=0.5, batch_fraction=1)
    assert Run(parabola(1), [1.0], rule, SGD).step() == pytest.approx([2 * 0.9**7])


def test_dog_by_hand():
    # f = 2|θ|, ‖d‖² = 4. r_ε = ¼·(1 + 3) = 1: η = 1/√4 = ½, θ = 2. r̄ = 1: η = 1/√8.
    run = Run(lambda theta: 2 * theta.abs().sum(), [3.0], DoG(start=0.25), SGD)
    rates = run.step(3)
    second = 1 / math.sqrt(8)
    third = (1 + 2 * second) / math.sqrt(12)  # θ₂ = 2 − 2η: 1 + 2η from the start
    assert rates == pytest.approx([0.5, second, third])


def test_dogs_average_by_hand():
    # w = 9/(t + 9): 1 at first, then 9/10, then 9/11.
    run = Run(lambda theta: 2 * theta.abs().sum(), [3.0], DoG(start=0.25, averaging=True), SGD)
    seen = []
    for _ in range(3):
        run.step()
        seen.append(run.values()[0])
    mean = seen[0]
    mean += 0.9 * (seen[1] - mean)
    mean += 9 / 11 * (seen[2] - mean)
    run.optimizer.step_size.eval(run.optimizer)
    assert run.values() == pytest.approx([mean])
    run.optimizer.step_size.train(run.optimizer)
    assert run.values() == [seen[2]]


def test_dowg_by_hand():
    # f = 2|θ|, ‖d‖² = 4. r̄ = 1: v = 4, η = ½, θ = 2. r̄ = 1: v = 8, η = 1/√8, θ = 2 − 2/√8.
    # r̄ = 1 + 2/√8 = r: v = 8 + 4r², η = r²/√v.
    run = Run(lambda theta: 2 * theta.abs().sum(), [3.0], DoWG(start=0.25), SGD)
    r = 1 + 2 / math.sqrt(8)
    assert run.step(3) == pytest.approx([0.5, 1 / math.sqrt(8), r**2 / math.sqrt(8 + 4 * r**2)])


def test_dowgs_cap_and_decay_by_hand():
    # f = ½θ²: cap·f/‖d‖² = ½·½ = ¼ at each update, of which 1, ¾, ½, ¼ are left.
    rule = DoWG(start=10.0, cap=0.5, decay="linear")
    run = Run(parabola(1), [3.0], rule, SGD, total_updates=4)
    assert run.step(4) == [0.25, 0.1875, 0.125, 0.0625]
    with pytest.raises(ValueError, match="All 4 planned updates are made"):
        run.step()
    capped = DoWG(start=10.0, cap=0.5, f_star=1.0)
    assert Run(parabola(1), [2.0], capped, SGD).step() == [0.125]  # ½·(2 − 1)/4


@pytest.mark.parametrize("curvatures", [(1.0, 8.0), (-8.0, 1.0), (0.5, 0.25, 16.0)])
def test_inverse_smoothness_finds_the_largest_curvature(curvatures):
    start = [1.0] * len(curvatures)
    run = Run(parabola(*curvatures), start, InverseSmoothness(tolerance=1e-6, iterations=100))
    largest = max(abs(c) for c in curvatures)
    assert run.step() == pytest.approx([1 / largest], rel=1e-4)
    assert Run(parabola(*curvatures), start, InverseSmoothness(8.0)).step() == [0.125]


def test_inverse_smoothness_measures_every_so_many_updates_and_goes_on_from_where_it_was():
    run = Run(parabola(1, 8), [1.0, 1.0], InverseSmoothness(every=3))
    calls = []
    for _ in range(7):
        before = run.calls
        run.step()
        calls.append(run.calls - before)
    assert calls[1] == calls[2] == calls[4] == calls[5] == 1
    assert 2 < calls[0] < 32
    assert calls[3] == calls[6] == 1 + 2  # the vector is found already
    state = torch.get_rng_state()
    Run(parabola(1, 8), [1.0, 1.0], InverseSmoothness()).step()
    assert torch.equal(state, torch.get_rng_state())


def test_schedule_free_is_the_papers_three_sequences():
    # x, y, z of arXiv 2405.15682, eq. (3)–(5), as loops over numbers.
    beta, rate, curvature = 0.75, 0.3, 2.0
    x = z = 1.0
    for t in range(20):
        y = (1 - beta) * z + beta * x
        z = z - rate * curvature * y
        x = (1 - 1 / (t + 1)) * x + z / (t + 1)
    run = Run(parabola(curvature), [1.0], ScheduleFree(beta=beta), SGD, lr=rate)
    run.step(20)
    assert run.values() == pytest.approx([(1 - beta) * z + beta * x], rel=1e-12)
    run.optimizer.step_size.eval(run.optimizer)
    assert run.values() == pytest.approx([x], rel=1e-12)


def test_schedule_free_weights_by_the_square_of_the_largest_step():
    # η = 1, ½ of a schedule, then 2: the largest is 1, 1, 2, so w = 1, 1, 4.
    run = Run(lambda theta: theta.sum(), [0.0], ScheduleFree(beta=0.0), SGD, lr=1.0)
    z, x, weights = 0.0, 0.0, 0.0
    run.optimizer.param_groups[0]["initial_lr"] = 1.0
    for rate, weight in ((1.0, 1), (0.5, 1), (2.0, 4)):
        run.optimizer.param_groups[0]["lr"] = rate
        run.step()
        z -= rate
        weights += weight
        x += weight / weights * (z - x)
    run.optimizer.step_size.eval(run.optimizer)
    assert run.values() == pytest.approx([x])


def test_eval_and_train_change_nothing_and_a_step_in_between_is_refused():
    paths = []
    for looks in (False, True):
        run = Run(quadratic, [0.0, 0.0], ScheduleFree(Armijo()))
        rule, optimizer = run.optimizer.step_size, run.optimizer
        for _ in range(5):
            run.step()
            if looks:
                rule.eval(optimizer)
                rule.eval(optimizer)
                with pytest.raises(ValueError, match=r"hold the average.*train\(optimizer\)"):
                    run.step()
                rule.train(optimizer)
                rule.train(optimizer)
        paths.append(run.values())
    assert paths[0] == paths[1]


# ---------------------------------------------------------------------- f has its penalty


@pytest.mark.parametrize(
    "rule",
    [Armijo(), BarzilaiBorwein(), Polyak(), DoWG(cap=0.5), InverseSmoothness(tolerance=1e-9)],
    ids=repr,
)
def test_weight_decay_is_the_penalty_written_out(rule):
    paths = []
    for loss, decay in (
        (lambda theta: quadratic(theta) + 30 + 0.5 * 0.7 * (theta**2).sum(), 0.0),
        (lambda theta: quadratic(theta) + 30, 0.7),
    ):
        run = Run(loss, [1.0, -1.0], rule, weight_decay=decay)
        paths.append(torch.tensor([run.step(6), [*run.values(), 0, 0, 0, 0]]))
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-8, atol=1e-8)


def test_each_group_has_its_own_penalty():
    # f = ½(2 + 1)·1 + ½·4·1: group decays 1 and 3 on curvatures 2 and 1, θ = 1.
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [a], "weight_decay": 1.0}, {"params": [b], "weight_decay": 3.0}]
    optimizer = GD(groups, step_size=Polyak(c=1.0))
    loss = (a**2 + 0.5 * b**2).sum()
    loss.backward()
    optimizer.step_by_rule(loss, lambda: loss)
    # d = (2 + 1, 1 + 3), ‖d‖² = 25, f = 1 + ½ + ½ + 3/2 = 3.5
    assert optimizer.last_rate == pytest.approx(3.5 / 25)


# ---------------------------------------------------------------------- scipy


def rosenbrock(theta):
    return (1 - theta[0]) ** 2 + 100 * (theta[1] - theta[0] ** 2) ** 2


def quartic(theta):
    return (theta**4).sum() + (theta**2).sum()


@pytest.mark.parametrize("loss", [quadratic, rosenbrock, quartic])
def test_armijos_interpolation_is_scipys_where_scipy_is_within_the_bounds(loss):
    """scipy tries η₀, then the parabola's minimum; then it goes over to a cubic."""
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for _ in range(200):
        start = torch.randn(2, generator=generator, dtype=torch.float64)
        theta = start.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(theta), theta)
        initial = 10 ** torch.empty(1).uniform_(-3, 0.5, generator=generator).item()
        found, calls, _ = line_search_armijo(
            lambda x: loss(torch.from_numpy(x)).item(),
            start.numpy(),
            -slope.numpy(),
            slope.numpy(),
            loss(start).item(),
            c1=1e-4,
            alpha0=initial,
        )
        if calls > 2 or not 0.1 * initial <= found or 0.5 * initial < found < initial:
            continue
        compared += 1
        assert Run(loss, start, Armijo(initial=initial)).step() == pytest.approx([found], rel=1e-9)
    assert compared > 50


# ---------------------------------------------------------------------- known minima


def minimum_of(problem):
    return problem.loss(problem.minimum).item()


SOLVERS = {
    "Armijo": lambda p: Armijo(),
    "Armijo halving": lambda p: Armijo(shrink=0.5, c=0.3),
    "BB1": lambda p: BarzilaiBorwein(),
    "BB2": lambda p: BarzilaiBorwein(short=True),
    "Polyak": lambda p: Polyak(minimum_of(p)),
    "Polyak estimate": lambda p: Polyak("estimate"),
    "SPS": lambda p: StochasticPolyak(10 * p.lr, f_star=minimum_of(p)),
    "SLS": lambda p: StochasticLineSearch(),
    "DoG": lambda p: DoG(start=1e-2),
    "DoG averaged": lambda p: DoG(start=1e-2, averaging=True),
    "DoWG": lambda p: DoWG(),
    "DoWG decayed": lambda p: DoWG(cap=2.0, decay="linear", f_star=minimum_of(p)),
    "PolyakDoG": lambda p: PolyakDoG(f_star=minimum_of(p)),
    "1/L": lambda p: InverseSmoothness(),
    "schedule-free": lambda p: ScheduleFree(Armijo()),
    "schedule-free lr": lambda p: ScheduleFree(),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name != "rosenbrock"], ids=str)
def test_every_rule_finds_the_known_minimum(solver, problem: Problem):
    updates = problem.updates
    lr = problem.lr if solver == "schedule-free lr" else 1.0
    rule = SOLVERS[solver](problem)
    run = Run(problem.loss, problem.start, rule, lr=lr, total_updates=updates)
    first = problem.loss(problem.start).item()
    run.step(updates)
    run.optimizer.step_size.eval(run.optimizer)
    gap = run.loss(run.theta).item() - minimum_of(problem)
    slow = solver in ("DoG averaged", "DoG", "schedule-free lr")
    assert abs(gap) <= (1e-4 if slow else 1e-12) * (first - minimum_of(problem))


@pytest.mark.parametrize("solver", ["BB1", "BB2", "Polyak"])
def test_rosenbrocks_valley(solver):
    problem = next(p for p in PROBLEMS if p.name == "rosenbrock")
    run = Run(problem.loss, problem.start, SOLVERS[solver](problem))
    run.step(500)
    assert (run.theta - problem.minimum).norm().item() < problem.tolerance


def test_stochastic_rules_fit_what_can_be_fitted():
    """Consistent least squares, one example an update: f* = 0 on each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    wanted = vector(1, -2, 3)
    for rule in (
        StochasticPolyak(max_lr=1.0),
        StochasticPolyak(max_lr=1.0, smoothing=2.0, batch_fraction=1 / 40),
        StochasticLineSearch(batch_fraction=1 / 40),
        DoWG(cap=0.5),
        PolyakDoG(),
    ):
        run = Run(None, [0.0, 0.0, 0.0], rule, SGD)
        for _ in range(15):
            for i in torch.randperm(40, generator=generator).tolist():
                run.loss = lambda theta, i=i: 0.5 * (x[i] @ (theta - wanted)) ** 2
                run.step()
        assert (run.theta - wanted).norm().item() < 0.01, rule


# ---------------------------------------------------------------------- what a rule asks and allows


def test_the_table_of_what_holds_where():
    def where(holds):
        return {r.__name__ for r in RULES if holds(r())}

    search, full = {"Armijo", "BarzilaiBorwein"}, {"Polyak", "InverseSmoothness"}
    assert where(lambda r: r.needs.full_batch) == search | full
    assert where(lambda r: r.needs.values) == search | {"StochasticLineSearch"}
    assert where(lambda r: r.needs.gradients) == {"InverseSmoothness"}
    smooth = {"StochasticLineSearch", "InverseSmoothness"}
    assert where(lambda r: r.needs.smooth) == search | smooth
    anyhow = {"PolyakDoG", "InverseSmoothness"}
    assert where(lambda r: not r.needs.no_momentum) == anyhow | {"StochasticPolyak"}
    nesterov = where(lambda r: not (r.needs.no_momentum or r.needs.no_nesterov))
    assert nesterov == anyhow
    assert where(lambda r: r.needs.lr) == {"StochasticPolyak", "ScheduleFree"}
    assert where(lambda r: r.average) == {"ScheduleFree"}
    assert InverseSmoothness(2.0).needs.full_batch is None
    assert not StochasticPolyak(1.0).needs.lr
    assert DoG(averaging=True).average


def test_schedule_free_asks_and_allows_what_its_rule_does():
    for inner in (BarzilaiBorwein(), DoWG(decay="linear"), InverseSmoothness()):
        own = {"no_momentum": "the averaging is momentum (β) already", "no_nesterov": None}
        assert ScheduleFree(inner).needs == replace(inner.needs, **own)


@pytest.mark.parametrize("rule", RULES)
def test_losses_with_kinks_are_refused_where_the_rule_needs_none(rule):
    made = rule()
    for loss in (SquaredHinge(), Logistic(), CrossEntropy(), nn.MSELoss()):
        made.check_loss(loss)
    if made.needs.smooth:
        with pytest.raises(ValueError, match=f"{rule.__name__} needs a smooth loss.*SquaredHinge"):
            made.check_loss(Hinge())
    else:
        made.check_loss(Hinge())


OUT_OF_RANGE = [
    (Armijo, {"initial": 0}, "initial"),
    (Armijo, {"initial": math.inf}, "initial"),
    (Armijo, {"c": 0}, "c must"),
    (Armijo, {"c": 1}, "c must"),
    (Armijo, {"shrink": 1}, "shrink"),
    (Armijo, {"shrink": "halve"}, "shrink"),
    (Armijo, {"growth": 0.5}, "growth"),
    (Armijo, {"max_backtracks": 0}, "max_backtracks"),
    (BarzilaiBorwein, {"memory": 0}, "memory"),
    (BarzilaiBorwein, {"f_star": math.nan}, "f_star"),
    (BarzilaiBorwein, {"initial": math.nan}, "initial"),
    (Polyak, {"f_star": "guess"}, "f_star"),
    (Polyak, {"f_star": math.nan}, "f_star"),
    (Polyak, {"c": 0}, "c must"),
    (Polyak, {"max_lr": 0}, "max_lr"),
    (StochasticPolyak, {"max_lr": -1}, "max_lr"),
    (StochasticPolyak, {"smoothing": 0.5}, "smoothing"),
    (StochasticPolyak, {"batch_fraction": 2}, "batch_fraction"),
    (StochasticPolyak, {"f_star": math.inf}, "f_star"),
    (StochasticLineSearch, {"max_lr": 0}, "max_lr"),
    (StochasticLineSearch, {"batch_fraction": 0}, "batch_fraction"),
    (DoG, {"start": 0}, "start"),
    (DoWG, {"cap": 0}, "cap"),
    (PolyakDoG, {"scale": 0}, "scale"),
    (PolyakDoG, {"gain": 0.5}, "gain"),
    (DoWG, {"decay": "cosine"}, "decay"),
    (InverseSmoothness, {"smoothness": 0}, "smoothness"),
    (InverseSmoothness, {"every": 1.5}, "every"),
    (InverseSmoothness, {"tolerance": 0}, "tolerance"),
    (ScheduleFree, {"beta": 1}, "beta"),
    (ScheduleFree, {"beta": -0.1}, "beta"),
]


@pytest.mark.parametrize(("rule", "options", "name"), OUT_OF_RANGE, ids=str)
def test_options_out_of_range_are_refused_and_named(rule, options, name):
    with pytest.raises(ValueError, match=rf"^{name}.*Received: "):
        rule(**options)


def test_two_averages_are_refused():
    with pytest.raises(ValueError, match="Leave one average out"):
        ScheduleFree(DoG(averaging=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_rules_name_and_options_are_its_repr(rule):
    assert repr(eval(repr(rule()), vars(step_sizes))) == repr(rule())


def test_gradients_elsewhere_are_asked_for_by_name():
    theta = nn.Parameter(torch.ones(1))
    optimizer = GD([theta], step_size=InverseSmoothness())
    theta.grad = torch.ones(1)
    with pytest.raises(ValueError, match="needs gradients at other points"):
        optimizer.step_by_rule(1.0, lambda: 1.0)
    assert theta.item() == 1


def test_the_part_of_the_data_in_an_update_is_asked_for_by_name():
    for rule in (StochasticLineSearch(), StochasticPolyak(1.0, smoothing=2.0)):
        run = Run(parabola(1), [4.0], rule, MiniBatchSGD)
        with pytest.raises(ValueError, match="batch_fraction=B/N"):
            run.step(2)
        run.optimizer.batch_fraction = 0.5
        run.step(2)
    plain = SGD([{"params": [run.theta], "initial_lr": 1.0}])
    with pytest.raises(ValueError, match="batch_fraction=B/N"):
        StochasticPolyak(smoothing=2.0).bound(plain)


# ------------------------------------------------------------- what a look elsewhere leaves behind


def test_a_look_elsewhere_leaves_parameters_and_gradients_as_they_were():
    theta = nn.Parameter(torch.tensor([0.1, 0.7]))
    other = nn.Parameter(torch.tensor([3.0]))  # has no gradient
    optimizer = SGD([theta, other], lr=1.0, weight_decay=0.3)
    grad = theta.grad = torch.tensor([0.3, 0.9])
    before = theta.detach().clone()

    def gradient():
        assert theta.grad is None
        theta.grad = 2 * theta.detach()

    evaluations = Evaluations(lambda: theta.detach().sum(), gradient)
    context = Context.of(optimizer.param_groups, 1.0, evaluations)
    value = context.evaluate(0.1)
    moved = before - 0.1 * (grad + 0.3 * before)
    assert value == pytest.approx(moved.sum().item() + 0.15 * moved.square().sum().item())
    (there,) = context.direction_at([torch.tensor([1.0, 0.0])])
    torch.testing.assert_close(there, 2.3 * (before + torch.tensor([1.0, 0.0])))
    assert torch.equal(theta, before)
    assert theta.grad is grad
    assert torch.equal(grad, torch.tensor([0.3, 0.9]))
    assert other.grad is None

    def broken():
        raise RuntimeError("out of memory")

    context = Context.of(optimizer.param_groups, 1.0, Evaluations(broken))
    with pytest.raises(RuntimeError, match="out of memory"):
        context.evaluate(0.1)
    assert torch.equal(theta, before)
    assert theta.grad is grad


def test_the_trial_point_is_where_the_update_leads():
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(1000))
    seen = []

    class Looks(StepSize):
        needs = Needs(values=True)

        def rate(self, context, memory):
            context.evaluate(0.0317)
            return 0.0317

    optimizer = GD([theta], step_size=Looks(), weight_decay=0.1)
    theta.grad = torch.randn(1000)
    optimizer.step_by_rule(1.0, lambda: seen.append(theta.detach().clone()) or 1.0)
    assert torch.equal(seen[0], theta)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = SGD(table.parameters(), step_size=DoWG())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="needs dense gradients"):
        optimizer.step_by_rule(1.0, lambda: 1.0)


def test_barzilai_borwein_does_not_end_a_planned_run_on_a_rise():
    # As above, f rises on the way; the last step of a run of T updates must not.
    for total in range(5, 30):
        rule = BarzilaiBorwein(initial=0.01, memory=30)
        run = Run(parabola(1, 100), [1.0, 0.1], rule, total_updates=total)
        values = [run.loss(run.theta).item()]
        for _ in range(total):
            run.step()
            values.append(run.loss(run.theta).item())
        assert values[-1] <= values[-2] + 1e-12, total
        assert values[-2] <= max(values[-4:-2]) + 1e-12, total
