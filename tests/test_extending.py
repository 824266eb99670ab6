"""The recipes of docs/extending.md run as they stand: in Python, and on the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)


def blocks(language):
    return [code for kind, code in BLOCKS if kind == language]


def run(words, folder):
    path = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_each_recipe_does_what_it_says(tmp_path):
    done = run(["-c", "\n\n".join(blocks("python"))], tmp_path)
    assert done.returncode == 0, done.stderr
    (native,) = [line for line in done.stdout.splitlines() if "SignDescent" in line]
    refusal = "the native engine has the rule of SGD, GD, MiniBatchSGD and torch.optim.SGD alone"
    assert native.startswith(f"engine=native does not apply: {refusal}; that of SignDescent is for")


@pytest.mark.slow
def test_an_optimizer_of_ones_own_is_one_file_and_one_choice(tmp_path):
    (source,) = [code for code in blocks("python") if "class SignDescent" in code]
    (choice,) = blocks("yaml")
    (tmp_path / "sign_descent.py").write_text(source, "utf-8")
    (tmp_path / "own" / "optimizer").mkdir(parents=True)
    (tmp_path / "own" / "optimizer" / "sign_descent.yaml").write_text(choice, "utf-8")
    (command,) = re.findall(r"`PYTHONPATH=\. gdtrain (.*)`", PAGE)
    words = [str(ROOT / "scripts" / "train.py"), *command.split()]
    short = ["optimizer.lr=0.05", "trainer.max_epochs=20", "hydra.run.dir=run"]
    done = run([*words, *short], tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["variant"] == "sign_descent"
    assert summary["updates"] == 80  # 20 epochs of ⌈105/32⌉
    assert "not native: the native engine has the rule of SGD" in summary["engine_reason"]
    refused = run([*words, "engine=native"], tmp_path)
    assert refused.returncode == 2
    assert "that of SignDescent is for engine=eager and compiled." in refused.stderr
