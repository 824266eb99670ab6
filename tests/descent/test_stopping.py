import json

import pytest

from gdtrain.descent.minimization import minimize
from gdtrain.descent.stopping import Stop, StopReason


def test_the_reasons():
    assert {reason.value for reason in StopReason} == {
        "BUDGET",
        "CONVERGED",
        "DIVERGED",
        "INTERRUPTED",
        "NOISE_FLOOR",
        "NON_FINITE",
        "STALLED",
    }


def test_a_stop_in_one_line():
    stop = Stop(StopReason.DIVERGED, "The loss grew.", {"update": 3}, "Set optimizer.lr=0.1.")
    assert str(stop) == "DIVERGED: The loss grew. Set optimizer.lr=0.1."
    assert str(Stop(StopReason.BUDGET, "Done.")) == "BUDGET: Done."
    assert Stop(StopReason.BUDGET, "Done.").numbers == {}


def test_minimize_gives_numbers_and_advice():
    bowl = lambda x: (x**2).sum()  # noqa: E731
    found = minimize(bowl, [1.0], lr=0.25, updates=100, tolerance=1e-6)
    # x halves: |∇f| = 2·2^(−t) <= 2e-6 from t = 20 on
    assert (found.stop.reason, found.updates) == (StopReason.CONVERGED, 20)
    assert found.stop.numbers == {
        "gradient_norm": pytest.approx(2.0**-19),
        "first_gradient_norm": 2.0,
        "tolerance": 1e-6,
    }
    short = minimize(bowl, [1.0], lr=0.25, updates=1)
    assert short.stop.reason is StopReason.BUDGET
    assert short.stop.numbers["gradient_norm"] == 1.0
    assert short.stop.advice
    lost = minimize(bowl, [1.0], lr=1e6, updates=100)
    assert lost.stop.reason is StopReason.NON_FINITE
    assert lost.stop.numbers["lr"] == 1e6
    assert lost.stop.advice == "Try lr=100000."
    json.dumps([dict(f.stop.numbers) for f in (found, short, lost)], allow_nan=False)
