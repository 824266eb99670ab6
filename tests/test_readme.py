"""What the README shows is run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.split("  #")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
]


def test_there_are_examples():
    assert len(PYTHON) == 7
    assert "pip install -e . && python scripts/train.py optimizer=sgd" in COMMANDS
    assert "pip install -e '.[test]' && pytest" in COMMANDS


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_each_python_example_runs(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "line", [c for c in COMMANDS if c.startswith("python scripts/train.py") and "…" not in c]
)
def test_each_command_composes(line, tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    from gdtrain.cli.composition import compose
    from gdtrain.cli.overrides import flags, jobs
    from gdtrain.runs.configuration import check

    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").touch()
    for overrides in jobs(flags(line.split()[2:])[0]):
        check(OmegaConf.to_container(compose(overrides, None), resolve=True))


def test_the_message_that_is_shown_is_the_message_that_comes(tmp_path):
    (session,) = [code for language, code in BLOCKS if language == "console"]
    command, message = session.strip().split("\n", 1)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *command.split()[3:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == message


def test_every_file_of_the_map_is_there_and_every_choice_is_listed():
    for name in re.findall(r"^((?:gdtrain|conf)/\S*)", README, re.MULTILINE):
        assert (ROOT / name).exists(), name
    for group, shown in re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.MULTILINE):
        if group == "experiment":
            continue
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert path.stem in shown, f"{group}={path.stem}"
