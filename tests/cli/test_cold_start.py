"""What is imported before anything is trained: a wrong word is told without torch or Lightning."""

import subprocess
import sys

import pytest

# What a fresh interpreter has must be told by name: large packages, and Hydra with its omegaconf.
TOLD = {
    *("torch", "lightning", "pytorch_lightning", "sklearn", "pandas", "matplotlib"),
    *("tensorboard", "torchvision", "hydra", "omegaconf"),
}
HYDRA = {"hydra", "omegaconf"}
RUN = """
import sys
for code in sys.argv[2:]:
    exec(code)
    print(*sorted(set(sys.argv[1].split()) & sys.modules.keys()))
"""


def imported(*codes):
    """After each of some codes, one after the other in an interpreter of their own."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, " ".join(TOLD), *codes],
        capture_output=True,
        text=True,
        check=True,
    )
    return [set(line.split()) for line in done.stdout.splitlines()[-len(codes) :]]


# Modules are never forgotten, so each has imported no more than there is after it.
@pytest.mark.parametrize(
    ("codes", "needed"),
    [
        (["import gdtrain.optim", "from gdtrain import GD, SGD, MiniBatchSGD"], [{"torch"}] * 2),
        (
            [
                "import gdtrain",
                "import gdtrain.cli",
                "import gdtrain.runs.configuration, gdtrain.runs.folder",
                "import gdtrain.cli.train, gdtrain.cli.tools, gdtrain.cli.compare",
            ],
            [set(), set(), {"omegaconf"}, HYDRA],
        ),
    ],
)
def test_a_module_imports_no_more_than_it_needs(codes, needed):
    assert imported(*codes) == needed


COMMANDS = [
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
]
CALL = """
import contextlib, io
from unittest import mock
from gdtrain import cli
with mock.patch.object(sys, "argv", {words}), contextlib.redirect_stdout(io.StringIO()):
    try:
        cli.{command}_main()
    except SystemExit as end:
        assert end.code == {code}
    else:
        raise AssertionError
"""


def test_a_command_is_refused_before_torch_is_imported():
    codes = [
        CALL.format(command=command, words=[command, *words], code=0 if words == ["--help"] else 2)
        for command, words in COMMANDS
    ]
    assert dict(zip(map(str, COMMANDS), imported(*codes), strict=True)) == {
        str(command): HYDRA for command in COMMANDS
    }
