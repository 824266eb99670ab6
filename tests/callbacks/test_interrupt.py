"""Whose the signals are while `fit` trains."""

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from torch import nn

import gdtrain

X, Y = np.random.default_rng(0).normal(size=(2, 40, 3))
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


class Signalling(nn.Linear):
    """Sends a signal to its own process at its twentieth pass."""

    def __init__(self, number):
        super().__init__(3, 1)
        self.number, self.passes = number, 0

    def forward(self, x):
        self.passes += 1
        if self.passes == 20 and self.number is not None:
            signal.raise_signal(self.number)
        return super().forward(x)


def fit(number, **arguments):
    return gdtrain.fit(
        Signalling(number),
        X,
        Y[:, 0],
        variant="gd",
        lr=1e-3,
        epochs=60,
        engine="eager",
        progress=False,
        **arguments,
    )


@pytest.fixture(autouse=True)
def _handlers():
    """Those of the program are there again after every run."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def test_ctrl_c_is_a_keyboard_interrupt():
    with pytest.raises(KeyboardInterrupt):
        fit(signal.SIGINT)


def test_a_handler_of_the_program_sees_sigterm_at_once_and_the_run_goes_on():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        result = fit(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (seen, result.stop.reason.value, result.summary["updates"]) == ([1], "BUDGET", 60)


@BOTH
def test_a_run_that_was_asked_to_ends_in_good_order(number):
    result = fit(number, interruptible=True)
    assert str(result.stop) == "INTERRUPTED: Interrupted."  # no checkpoint to go on with
    assert 0 < result.summary["updates"] < 60


@pytest.mark.parametrize("interruptible", [False, True])
def test_a_run_in_a_thread_leaves_signals_alone(interruptible):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(fit(None, interruptible=interruptible).summary["updates"])
    )
    thread.start()
    thread.join()
    assert found == [60]


LOOP = """
import signal, sys
sys.path.insert(0, {folder!r})
from test_interrupt import fit
for _ in range(3):
    fit(signal.SIGTERM)
    print("went on", flush=True)
"""


def test_a_script_that_loops_over_fit_dies_of_sigterm():
    done = subprocess.run(
        [sys.executable, "-c", LOOP.format(folder=__file__.rpartition("/")[0])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == ""
