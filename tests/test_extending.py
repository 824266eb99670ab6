"""The recipes of docs/extending.md run as they stand: in Python, and on the command line."""

import json
import re
from pathlib import Path

import pytest
from commands import command

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)


def blocks(language):
    return [code for kind, code in BLOCKS if kind == language]


@pytest.mark.filterwarnings("ignore")
def test_each_recipe_does_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n\n".join(blocks("python")), "docs/extending.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    (native,) = [line for line in lines if "SignDescent" in line]
    refusal = "the native engine has the rule of SGD, GD, MiniBatchSGD and torch.optim.SGD alone"
    assert native.startswith(f"engine=native does not apply: {refusal}; that of SignDescent is for")


def test_an_optimizer_of_ones_own_is_one_file_and_one_choice(tmp_path, monkeypatch):
    (source,) = [code for code in blocks("python") if "class SignDescent" in code]
    (choice,) = blocks("yaml")
    (tmp_path / "sign_descent.py").write_text(source, "utf-8")
    (tmp_path / "own" / "optimizer").mkdir(parents=True)
    (tmp_path / "own" / "optimizer" / "sign_descent.yaml").write_text(choice, "utf-8")
    (line,) = re.findall(r"`PYTHONPATH=\. gdtrain (.*)`", PAGE)
    monkeypatch.syspath_prepend(tmp_path)
    words = [*line.split(), "optimizer.lr=0.05", "trainer.max_epochs=20", "hydra.run.dir=run"]
    done = command(tmp_path, "train", *words)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["variant"] == "sign_descent"
    assert summary["updates"] == 80  # 20 epochs of ⌈105/32⌉
    assert "not native: the native engine has the rule of SGD" in summary["engine_reason"]
    refused = command(tmp_path, "train", *line.split(), "engine=native")
    assert refused.returncode == 2
    assert "that of SignDescent is for engine=eager and compiled." in refused.stderr
