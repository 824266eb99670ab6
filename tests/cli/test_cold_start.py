"""What is imported before anything is trained: a wrong word is told without torch or Lightning."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "lightning", "sklearn", "pandas", "matplotlib", "tensorboard", "torchvision"}


def imported(code):
    """The large packages, and Hydra, that a fresh interpreter has after some lines."""
    tail = f"\nimport sys; print(*sorted(({HEAVY} | {{'hydra'}}) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "needed"),
    [
        ("import gdtrain", set()),
        ("import gdtrain.optim", {"torch"}),
        ("from gdtrain import GD, SGD, MiniBatchSGD", {"torch"}),
        ("import gdtrain.cli", set()),
        ("import gdtrain.runs.configuration, gdtrain.runs.folder", set()),
        ("import gdtrain.cli.train, gdtrain.cli.tools, gdtrain.cli.compare", {"hydra"}),
    ],
)
def test_a_module_imports_no_more_than_it_needs(code, needed):
    assert imported(code) == needed


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["optimizer=sdg"]),
        ("train", ["optimizer.lr=-1"]),
        ("train", ["--help"]),
        ("train", ["-m", "seed=0,-1", "optimizer.lr=0"]),
        ("compare", ["seeds=0"]),
        ("evaluate", ["ckpt_path=x", "trust=../x"]),
        ("explain", ["digits=99"]),
        ("find_lr", ["data=csv"]),
        ("landscape", ["run=x", "points=1"]),
        ("predict", ["ckpt_path=x"]),
    ],
)
def test_a_command_is_refused_before_torch_is_imported(command, words):
    code = (
        f"import sys\nfrom gdtrain import cli\nsys.argv = {['command', *words]}\n"
        f"try:\n    cli.{command}_main()\n"
        f"except SystemExit as end:\n    assert end.code == {0 if '--help' in words else 2}\n"
        "else:\n    raise AssertionError"
    )
    assert imported(code) == {"hydra"}
