"""`gdtrain-compare`: what it starts, what it says of a wrong word, and what its page promises."""

import json
import re
import shlex
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest
from commands import command
from joblib.externals.loky import get_reusable_executor
from known_runs import leave_run

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
def test_a_wrong_word_ends_with_one_message(words, said, tmp_path):
    (tmp_path / "empty").mkdir()
    leave_run(tmp_path / "single", "gd", [2, 1])
    before = sorted(tmp_path.rglob("*"))
    done = command(tmp_path, "compare", *words.split(" "))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
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


def test_a_run_that_fails_is_named_and_does_not_end_the_others(tmp_path, monkeypatch):
    words = ["data=iris", "model=linear", "seeds=1", "jobs=1", "epochs=2", "output=out"]
    words += ["logger=csv", "instruments=off"]
    failing = "optimizer=minibatch data.batch_size=9999"
    with monkeypatch.context() as patch:
        patch.setattr(
            compare_command,
            "_train_all",
            lambda jobs, *_: {job.folder: "Too few." for job in jobs},
        )
        done = command(tmp_path, "compare", *words, f"contenders={failing};optimizer=gd")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: Comparing needs two contenders with a finished run each.")
    assert "minibatch data.batch_size=9999, seed 0: Too few." in last
    assert not (tmp_path / "out").exists()
    three = f"optimizer=gd;{failing};optimizer=sgd"
    done = command(tmp_path, "compare", *words, f"contenders={three}")
    assert done.returncode == 0
    assert "Left out: minibatch data.batch_size=9999, seed 0: " in done.stdout
    assert done.stdout.splitlines()[-1] == "Report: out/report.html"
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


def test_runs_are_trained_in_processes_of_their_own(tmp_path, capfd):
    jobs = [compare_command._Job(f"{i}", 0, ["data=irs"], tmp_path / f"{i}") for i in range(2)]
    failed = compare_command._train_all(jobs, 2, None)
    assert failed.keys() == {job.folder for job in jobs}
    assert all("irs" in why for why in failed.values())
    assert "1, seed 0: " in capfd.readouterr().err
    assert not any(job.folder.exists() for job in jobs)


def close(first, second):
    """The same words, and numbers within 3%."""
    number = r"\d[\d,]*\.?\d*"
    values = [
        [float(n.replace(",", "")) for n in re.findall(number, text)] for text in (first, second)
    ]
    return re.sub(number, "", first) == re.sub(number, "", second) and values[0] == pytest.approx(
        values[1], rel=0.03
    )


def test_what_the_commands_of_the_page_start(tmp_path, monkeypatch):
    started = []

    def stop(jobs, *_):
        started.append(jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_command, "_train_all", stop)
    lines = re.findall(r"^python scripts/compare.py (.*)$", PAGE, re.MULTILINE)
    trained = [shlex.split(line) for line in lines if "runs=" not in line]
    done = [command(tmp_path, "compare", *words) for words in trained]
    assert [one.returncode for one in done] == [130] * 3
    assert "Compare the runs that were finished with runs=rates/runs" in done[-1].stderr
    digits, iris, rates = started
    assert (len(digits), len(iris), len(rates)) == (9, 6, 6)
    assert digits[0].overrides == [
        *("data=digits", "model=mlp", "trainer.max_epochs=20", "optimizer=gd", "seed=0")
    ]
    assert rates[-1].overrides[-3:] == ["optimizer=sgd", "optimizer.lr=0.01", "seed=2"]
    assert rates[-1].folder == Path("rates/runs/sgd-lr-0.01-2/seed-2")
    assert [job.seed for job in digits] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch):
    assert (ROOT / "docs" / "compare.png").read_bytes().startswith(b"\x89PNG")
    first, third = re.findall(
        r"^python scripts/compare.py (data=iris.*seeds.*|runs=.*)$", PAGE, re.M
    )
    done = command(tmp_path, "compare", *first.split(), "jobs=1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    shown = re.search(r"```\n(Counted in updates.*?)```", PAGE, re.DOTALL).group(1).splitlines()
    said = [line for line in lines if line.startswith(tuple(s.split(",")[0] for s in shown))]
    for want, got in zip(shown, said, strict=False):
        assert close(want, got), got
    text = (tmp_path / "iris" / "report.html").read_text(encoding="utf-8")
    assert "gd: gdtrain data=iris model=linear trainer.max_epochs=20 optimizer=gd seed=…" in text
    assert "One run was trained after another." in text
    prints = {
        json.loads(path.read_text())["data"]["split_fingerprint"]
        for path in tmp_path.glob("iris/runs/*/*/summary.json")
    }
    assert len(prints) == 1
    # The finished runs give the same numbers.
    runs, left_out = find_runs(tmp_path / "iris" / "runs")
    assert left_out == []
    assert Report(compare(runs)).sentences() == lines[:-1]
    again = command(tmp_path, "compare", *third.split())
    assert again.returncode == 0, again.stderr
    assert "to a training loss of 0.3:" in again.stdout
    assert "Report: again/report.html" in again.stdout


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
        assert c.numbers("loss/train")[0] == made["metrics"]["loss/train"]
    assert [row["contender"] for row in Report(compared).ends()] == ["gd", "sgd"]
