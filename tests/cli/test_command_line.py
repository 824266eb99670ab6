"""The command as a user types it: what it leaves, what it says, and its exit code."""

import json
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import command, process
from sklearn.datasets import load_diabetes, load_digits


def only_run(folder):
    (run,) = Path(folder).glob("outputs/*/*")
    return run


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(
    "name", ["compare", "evaluate", "explain", "find_lr", "landscape", "predict", "train"]
)
def test_each_script_is_its_command(tmp_path, name):
    done = process(tmp_path, name, "runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == command(tmp_path, name, "runs").stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_main_job_leaves_what_the_contract_says(tmp_path):
    done = process(tmp_path, "train", "optimizer=sgd")
    assert done.returncode == 0, done.stderr
    target, rate, engine = done.stderr.splitlines()
    assert target.startswith("target: 10 classes (0, 1, 2")
    assert engine == "engine: native (a linear model or MLP on CPU, written by hand)"
    assert rate.startswith("lr: auto is PolyakDoG(")
    assert done.stdout.splitlines()[-1] == "finished: all 25,160 updates made"
    assert "BUDGET" not in done.stdout + done.stderr
    run = only_run(tmp_path)
    assert re.fullmatch(r"digits-mlp-sgd", run.parent.name)
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "checkpoints", "metrics.csv", "summary.json", "split.npz"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    summary = summary_of(run)
    assert summary["variant"] == "sgd"
    assert summary["updates"] == summary["examples_seen"] == 20 * 1258
    assert summary["metrics"]["metric/accuracy/test"] >= 0.95
    assert "tensorboard --logdir outputs" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "tag", "least"),
    [
        (["optimizer=minibatch", "model=cnn"], "metric/accuracy/test", 0.96),
        (["optimizer=gd", "model=linear"], "metric/accuracy/test", 0.93),
        (["optimizer=gd", "model=linear", "data=diabetes", "schedule=constant"], None, 0),
    ],
)
def test_default_runs_reach_their_accuracy(tmp_path, words, tag, least):
    done = command(tmp_path, "train", *words)
    assert done.returncode == 0, done.stderr
    summary = summary_of(only_run(tmp_path))
    if tag is not None:
        assert summary["metrics"][tag] >= least
    else:
        X, y = load_diabetes(return_X_y=True)
        train = np.load(only_run(tmp_path) / "split.npz")["train"]
        design = np.column_stack([X[train], np.ones(len(train))])
        y = (y[train] - y[train].mean()) / y[train].std()
        residual = design @ np.linalg.lstsq(design, y, rcond=None)[0] - y
        best = 0.5 * np.mean(residual**2)
        assert best <= summary["metrics"]["loss/train"] <= best * 1.01


@pytest.mark.slow
def test_one_bad_job_does_not_end_the_others(tmp_path):
    words = "-m optimizer=sgd,minibatch data.batch_size=32 trainer.max_epochs=1"
    done = command(tmp_path, "train", *words.split())
    assert done.returncode == 2
    assert "optimizer=minibatch" in done.stderr
    (run,) = tmp_path.glob("outputs/*/*")
    assert run.parent.name == "digits-mlp-minibatch"


@pytest.mark.slow
def test_a_finished_folder_is_not_overwritten(tmp_path):
    words = ("optimizer=gd", "model=linear", "trainer.max_epochs=2", "hydra.run.dir=my run")
    assert command(tmp_path, "train", *words).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    again = command(tmp_path, "train", *words)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


BAD_AT_BUILD = [
    ("optimizer=minibatch data.batch_size=5000", "at most 1258, the number of training examples"),
    ("loss=hinge", "Hinge is a loss for two classes, and the targets have 10"),
    ("loss=squared_error", "use loss=cross_entropy"),
    ("data=diabetes loss=cross_entropy", "use loss=squared_error or loss=huber"),
    ("model.hidden=128", "hidden must be a list of whole widths"),
    ("model.activation=step", "activation must be one of"),
    ("model.init=zeros", "init=zeros is for linear models"),
    ("model=cnn data=iris", "model=cnn is for images"),
    ("data.sampling=sorted", "sampling must be one of"),
    ("schedule=linear schedule.final=7", "final must lie in [0, 1]"),
    ("schedule=one_cycle +schedule.warmup=5", "set rise instead of warmup"),
    ("optimizer.nesterov=true", "Nesterov momentum requires a momentum"),
    ("data=mnist data.download=false data.root=none", "into none/MNIST/raw/"),
    ("optimizer=minibatch trainer.devices=2", "Several devices train together with trainer=ddp"),
    ("callbacks=early_stopping data.val_fraction=0", "needs a validation part"),
    ("callbacks=early_stopping callbacks.early_stopping.monitor=foo", "can monitor loss/val"),
    ("schedule=reduce_on_plateau data.val_fraction=0", "needs a validation part"),
    ("+optimizer.differentiable=true optimizer.lr=0.1", "steps are not differentiable"),
    ("+optimizer.differentiable=true", "does not go with optimizer.differentiable=True"),
    ("optimizer=adam optimizer.lr=auto", "work with GD, SGD and MiniBatchSGD"),
    ("step_size=armijo", "Armijo is a rule for full-batch descent"),
    ("optimizer=gd step_size=armijo loss=hinge data=breast_cancer", "Hinge"),
    ("+loss._target_=torch.nn.CrossEntropyLoss", "must be a gdtrain.losses.Loss"),
    ("model.hidden=null", "The model cannot be built from its configuration"),
    ("+trainer.limit_train_batches=1", "limit_train_batches counts Lightning steps"),
    ("+trainer.no_such_argument=1", "no_such_argument"),
    ("callbacks.curves.points=0", "points must be"),
    ("model._target_=gdtrain.models.Nothing", "Nothing"),
]


@pytest.mark.parametrize(("words", "message"), BAD_AT_BUILD)
def test_what_only_the_data_shows_ends_before_training_too(tmp_path, words, message):
    done = command(tmp_path, "train", *words.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/x"):
        words = f"data=iris optimizer=gd hydra.run.dir={place}"
        done = command(tmp_path, "train", *words.split())
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "words",
    [
        ["callbacks=default", "callbacks.divergence.action=stop"],
        ["callbacks=none", "+callbacks.divergence.action=stop"],
    ],
)
def test_a_diverging_run_ends_with_code_3(tmp_path, words):
    diverging = ("optimizer=gd", "model=linear", "data=diabetes", "optimizer.lr=1000")
    done = command(tmp_path, "train", *diverging, *words)
    assert done.returncode == 3
    assert "Set optimizer.lr" in done.stdout
    run = only_run(tmp_path)
    assert summary_of(run)["stop_reason"] in ("NON_FINITE", "DIVERGED")
    last = run / "checkpoints" / "last.ckpt"
    assert last.exists() == ("callbacks=default" in words)  # the last good state


@pytest.mark.slow
def test_a_checkpoint_is_resumed_evaluated_and_predicts(tmp_path):
    words = ("optimizer=sgd", "model.dropout=0.2", "trainer.max_epochs=3")
    # The schedule knows the budget, so a shorter run is another run: end the same one early.
    timer = "+callbacks.stop._target_=lightning.pytorch.callbacks.Timer"
    for name, more in (
        ("whole", ()),
        ("early", (timer, "+callbacks.stop.duration.seconds=1")),
        ("rest", ("ckpt_path=early/checkpoints/last.ckpt",)),
    ):
        done = command(tmp_path, "train", *words, f"hydra.run.dir={name}", *more)
        assert done.returncode == 0, done.stderr
        assert summary_of(tmp_path / name)["updates"] > 0
    summaries = [summary_of(tmp_path / name) for name in ("whole", "rest")]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "rest")
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])

    evaluated = command(tmp_path, "evaluate", "ckpt_path=whole/checkpoints/last.ckpt")
    assert evaluated.returncode == 0, evaluated.stderr
    values = dict(line.split() for line in evaluated.stdout.splitlines())
    for tag in ("loss/test", "metric/accuracy/test"):
        assert float(values[tag]) == pytest.approx(summaries[0]["metrics"][tag], rel=1e-5)

    digits = load_digits()
    np.save(tmp_path / "new.npy", digits.data[:100])
    words = ("ckpt_path=whole/checkpoints/last.ckpt", "input=new.npy", "output=out.csv")
    predicted = command(tmp_path, "predict", *words)
    assert predicted.returncode == 0, predicted.stderr
    answers = pd.read_csv(tmp_path / "out.csv")["prediction"]
    assert (answers.to_numpy() == digits.target[:100]).mean() > 0.9
    again = command(tmp_path, "predict", *words)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.slow
def test_a_table_of_ones_own_from_training_to_predictions(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(300, 3)) * [1, 50, 0.01], columns=["a", "b", "c"])
    table["price"] = 1000 + 200 * table["a"] + 3 * table["b"] + rng.normal(size=300)
    table.to_csv(tmp_path / "table with spaces.csv", index=False)
    words = ["optimizer=gd", "model=linear", "data=csv", "data.target=price", "hydra.run.dir=run"]
    done = command(tmp_path, "train", *words, "data.path='table with spaces.csv'")
    assert done.returncode == 0, done.stderr
    new = table.drop(columns="price")[["c", "b", "a"]]
    new.to_csv(tmp_path / "new.csv", index=False)
    words = ("ckpt_path=run/checkpoints/best.ckpt", "input=new.csv", "output=out.csv")
    done = command(tmp_path, "predict", *words)
    assert done.returncode == 0, done.stderr
    answers = pd.read_csv(tmp_path / "out.csv")["prediction"]
    assert np.abs(answers - table["price"]).max() < 10
    new.drop(columns="b").to_csv(tmp_path / "new.csv", index=False)
    done = command(tmp_path, "predict", *words[:2], "output=other.csv")
    assert done.returncode == 2
    assert "lacks the feature 'b'" in done.stderr


@pytest.mark.slow
def test_the_command_and_fit_give_the_same_result(tmp_path):
    import gdtrain

    for variant in ("gd", "sgd", "minibatch"):
        words = (f"optimizer={variant}", "trainer.max_epochs=2", f"hydra.run.dir={variant}")
        done = command(tmp_path, "train", *words)
        assert done.returncode == 0, done.stderr
        digits = load_digits()
        result = gdtrain.fit(
            "mlp", digits.images[:, None], digits.target, variant=variant, epochs=2
        )
        summary = summary_of(tmp_path / variant)
        state = torch.load(tmp_path / variant / "checkpoints" / "last.ckpt", weights_only=True)
        ours = result.module.state_dict()
        assert result.metrics == summary["metrics"]
        assert all(torch.equal(ours[k], state["state_dict"][k]) for k in ours)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_in_good_order(tmp_path, number):
    folder, over = tmp_path / "run" / "checkpoints", threading.Event()

    def interrupt():
        while not over.wait(0.05):
            if (folder / "best.ckpt").exists():
                os.kill(os.getpid(), number)
                return

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    words = ("optimizer=sgd", "trainer.max_epochs=1000", "hydra.run.dir=run")
    done = command(tmp_path, "train", *words)
    over.set()
    watcher.join()
    assert done.returncode == 130, done.stderr
    assert "ckpt_path=" in done.stdout
    summary = summary_of(tmp_path / "run")
    assert summary["stop_reason"] == "INTERRUPTED"
    assert 0 < summary["updates"] < 1258 * 1000
    assert (folder / "last.ckpt").exists()
