"""`gdtrain-compare`: what it starts, what it says of a wrong word, and what its page promises."""

import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor
from known_runs import leave_run

from gdtrain import cli
from gdtrain.cli import compare as compare_command
from gdtrain.reporting.comparison import compare
from gdtrain.reporting.finished import find_runs
from gdtrain.reporting.text import Report

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _no_processes_are_left():
    yield
    get_reusable_executor().shutdown(wait=True)  # joblib's wait for more work otherwise


def command(words, monkeypatch):
    """In this process; the exit code, 0 where none was given."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    try:
        cli.compare_main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data=iris modle=linear", "Unknown key modle. Did you mean model?"),
        ("sedes=2", "Unknown argument sedes. Did you mean seeds?"),
        ("seeds=0", "seeds must be a whole number from 1 to 10000. Received: seeds=0"),
        ("jobs=two", "jobs must be a whole number from 1 to 1024. Received: jobs=two"),
        ("target=nan", "target must be a number in (−∞, ∞). Received: target=nan"),
        ("optimizer=sgd", "set contenders='optimizer=…;…'. Received: optimizer=sgd"),
        ("seed=1", "set seeds=COUNT. Received: seed=1"),
        ("contenders=optimizer=gd;optimizer=sgd,seed=5", "set seeds=COUNT. Received: sgd seed=5"),
        ("contenders=optimizer=gd", "contenders must name at least two, separated by a semicolon"),
        ("contenders=", "contenders must be at least two contenders, separated by a semicolon"),
        ("contenders=optimizer=gd;optimizer=gd", "Contenders must differ."),
        ("contenders=optimizer=gd;optimizer=sdg", "There is no optimizer=sdg. Did you mean sgd?"),
        ("contenders=optimizer=gd;optimizer=sgd,data.batch_size=3", "data.batch_size must be 1"),
        ("logger=none", "logger must be csv or tensorboard. Received: logger=none"),
        ("trainer=ddp", "Received: trainer=ddp"),
        ("runs=nowhere", "There is no folder nowhere."),
        ("runs=empty", "There is no finished run in empty"),
        ("runs=single", "Received: gd alone"),
        ("runs=single seeds=3", "trains none, so it takes target=… and output=… only. Received"),
        ("output=single", "single exists already; choose another output=…"),
        ("-m", "Unknown argument -m"),
    ],
)
def test_a_wrong_word_ends_with_one_message(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    leave_run(tmp_path / "single", "gd", [2, 1])
    before = sorted(tmp_path.rglob("*"))
    assert command(words.split(" "), monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert sorted(tmp_path.rglob("*")) == before


def test_contenders_are_lists_of_overrides():
    text = "optimizer=sgd; optimizer=minibatch,model.hidden=[64, 32] +x={a: 1};optimizer.lr=0.1"
    assert compare_command._contenders(text) == {
        "sgd": ["optimizer=sgd"],
        "minibatch model.hidden=[64, 32] +x={a: 1}": [
            *("optimizer=minibatch", "model.hidden=[64, 32]", "+x={a: 1}")
        ],
        "lr=0.1": ["optimizer.lr=0.1"],
    }


def test_a_run_that_fails_is_named_and_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["data=iris", "model=linear", "seeds=1", "jobs=1", "epochs=2", "output=out"]
    words += ["logger=csv", "instruments=off"]
    failing = "optimizer=minibatch data.batch_size=9999"
    with monkeypatch.context() as patch:
        patch.setattr(
            compare_command,
            "_train_all",
            lambda jobs, *_: {job.folder: "Too few." for job in jobs},
        )
        assert command([*words, f"contenders={failing};optimizer=gd"], monkeypatch) == 2
    _, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("error: Comparing needs two contenders with a finished run each.")
    assert "minibatch data.batch_size=9999, seed 0: Too few." in last
    assert not Path("out").exists()
    three = f"optimizer=gd;{failing};optimizer=sgd"
    assert command([*words, f"contenders={three}"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "Left out: minibatch data.batch_size=9999, seed 0: " in out
    assert out.splitlines()[-1] == "Report: out/report.html"
    assert sorted(p.name for p in (tmp_path / "out" / "runs").iterdir()) == ["gd", "sgd"]
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Left out" in text
    assert "One run was trained after another." in text
    assert str(tmp_path) not in text


def test_a_killed_process_does_not_end_what_had_to_wait(tmp_path, monkeypatch):
    names = ("finished", "running", "waiting")
    jobs = [compare_command._Job(name, 0, [], tmp_path / name) for name in names]
    calls = []

    def parallel(**_):
        def run(tasks):
            calls.append([arguments[0].contender for _, arguments, _ in tasks])
            if len(calls) > 1:
                return ["ValueError: no such thing"]
            for job in jobs[:2]:
                job.folder.mkdir()
            (jobs[0].folder / "summary.json").touch()
            raise BrokenExecutor

        return run

    monkeypatch.setattr("joblib.Parallel", parallel)
    failed = compare_command._train_all(jobs, 2, None)
    assert calls == [["finished", "running", "waiting"], ["waiting"]]
    assert failed == {
        tmp_path / "running": "A process was killed; perhaps memory ran out.",
        tmp_path / "waiting": "ValueError: no such thing",
    }


@pytest.mark.slow
def test_the_script(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compare.py", "runs=nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: There is no folder nowhere.\n"


def close(first, second):
    """The same words, and numbers within 3%."""
    number = r"\d[\d,]*\.?\d*"
    values = [
        [float(n.replace(",", "")) for n in re.findall(number, text)] for text in (first, second)
    ]
    return re.sub(number, "", first) == re.sub(number, "", second) and values[0] == pytest.approx(
        values[1], rel=0.03
    )


def test_what_the_commands_of_the_page_start(tmp_path, monkeypatch, capsys):
    started = []

    def stop(jobs, *_):
        started.append(jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_command, "_train_all", stop)
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^python scripts/compare.py (.*)$", PAGE, re.MULTILINE)
    trained = [shlex.split(line) for line in lines if "runs=" not in line]
    assert [command(words, monkeypatch) for words in trained] == [130] * 3
    assert "Compare the runs that were finished with runs=rates/runs" in capsys.readouterr().err
    digits, iris, rates = started
    assert (len(digits), len(iris), len(rates)) == (9, 6, 6)
    assert digits[0].overrides == [
        *("data=digits", "model=mlp", "trainer.max_epochs=20", "optimizer=gd", "seed=0")
    ]
    assert rates[-1].overrides[-3:] == ["optimizer=sgd", "optimizer.lr=0.01", "seed=2"]
    assert rates[-1].folder == Path("rates/runs/sgd-lr-0.01-2/seed-2")
    assert [job.seed for job in digits] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    assert (ROOT / "docs" / "compare.png").read_bytes().startswith(b"\x89PNG")
    first, third = re.findall(
        r"^python scripts/compare.py (data=iris.*seeds.*|runs=.*)$", PAGE, re.M
    )
    monkeypatch.chdir(tmp_path)
    assert command([*first.split(), "jobs=2"], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = re.search(r"```\n(Counted in updates.*?)```", PAGE, re.DOTALL).group(1).splitlines()
    said = [line for line in lines if line.startswith(tuple(s.split(",")[0] for s in shown))]
    for want, got in zip(shown, said, strict=False):
        assert close(want, got), got
    text = (tmp_path / "iris" / "report.html").read_text(encoding="utf-8")
    assert "gd: gdtrain data=iris model=linear trainer.max_epochs=20 optimizer=gd seed=…" in text
    assert "2 processes ran side by side" in text
    prints = {
        json.loads(path.read_text())["data"]["split_fingerprint"]
        for path in tmp_path.glob("iris/runs/*/*/summary.json")
    }
    assert len(prints) == 1
    # The finished runs give the same numbers.
    runs, left_out = find_runs("iris/runs")
    assert left_out == []
    assert Report(compare(runs)).sentences() == lines[:-1]
    assert command(third.split(), monkeypatch) == 0
    out, _ = capsys.readouterr()
    assert "to a training loss of 0.3:" in out
    assert "Report: again/report.html" in out


def test_the_python_of_the_page(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(code, "docs/compare.md", "exec"), found)
    assert (tmp_path / "comparison" / "report.html").is_file()
    compared = compare(found["runs"])
    for c in compared.contenders:
        (run,) = c.runs
        made = json.loads((run.folder / "summary.json").read_text())
        assert run.train.updates[-1] == made["updates"]
        assert c.metrics("loss/train")[0] == made["metrics"]["loss/train"]
    assert [row["contender"] for row in Report(compared).ends()] == ["gd", "sgd"]
