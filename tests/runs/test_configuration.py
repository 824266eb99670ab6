"""Every YAML file composes, names something that exists, and trains."""

import gzip
import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.datasets import dump_svmlight_file

from gdtrain import cli
from gdtrain.cli.composition import compose
from gdtrain.runs.configuration import check, conf_directory
from gdtrain.runs.train import train

CONF = conf_directory()
MNIST = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "data" / "mnist"
GROUPS = {
    "callbacks": 5,
    "data": 13,
    "experiment": 21,
    "instruments": 3,
    "logger": 3,
    "loss": 8,
    "model": 4,
    "optimizer": 4,
    "schedule": 12,
    "step_size": 11,
    "trainer": 2,
}
CHOICES = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml"))]


def composed(*overrides):
    return compose(list(overrides), None)


def trained(words, folder):
    """The run that words of the command line make, without what is written beside it."""
    return train(composed(*words.split(), "callbacks=none", "logger=none"), folder / "run")


def own_file(kind, folder):
    """A small file of one's own, for the data sets that ask for a path."""
    x, y = np.random.default_rng(0).normal(size=(60, 3)), np.arange(60) % 2
    path = folder / f"table.{kind}"
    if kind == "npy":
        np.save(path, np.column_stack([x, y]))
    elif kind == "csv":
        pd.DataFrame(x, columns=list("abc")).assign(y=y).to_csv(path, index=False)
    else:
        dump_svmlight_file(x, y, str(path), zero_based=False)
    return path


def test_each_group_has_the_choices_that_it_should():
    assert {name: sum(g == name for g, _ in CHOICES) for name in GROUPS} == GROUPS
    assert len(CHOICES) == sum(GROUPS.values())


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_each_file_composes_and_instantiates(group, choice, tmp_path):
    overrides = [f"{group}={choice}"]
    if group == "data" and choice in ("csv", "npy", "libsvm"):
        overrides.append(f"data.path={own_file(choice, tmp_path)}")
    if (group, choice) == ("data", "dataset"):
        overrides += [
            "data.train._target_=torchvision.datasets.FakeData",
            "+data.train.transform._target_=torchvision.transforms.ToTensor",
        ]
    config = composed(*overrides)
    check(OmegaConf.to_container(config, resolve=True))
    for name in GROUPS:
        if name in ("experiment", "callbacks", "instruments", "logger") or not config[name]:
            continue
        assert instantiate(config[name], _convert_="all") is not None
    for name in ("callbacks", "instruments", "logger"):
        for entry in (config[name] or {}).values():
            assert instantiate(entry, _convert_="all") is not None


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_each_file_opens_with_its_purpose_and_a_command_that_composes(group, choice):
    lines = (CONF / group / f"{choice}.yaml").read_text(encoding="utf-8").splitlines()
    comments = [line[1:].strip() for line in lines if line.startswith("#")]
    comments = [line for line in comments if line and not line.startswith("@package")]
    assert comments[0].endswith((".", ":")) or len(comments[0]) > 20
    commands = [line for line in comments if line.startswith("python scripts/train.py")]
    assert commands
    for line in commands:
        words = re.split(r"\s+(?:&&|#)\s+", line)[0].split()[2:]
        assert composed(*words).variant in ("gd", "sgd", "minibatch", "adam")


def tiny_mnist(root):
    """A hundred random images in MNIST's files."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        images = rng.integers(0, 256, (100, 28, 28), dtype=np.uint8)
        labels = (np.arange(100) % 10).astype(np.uint8)
        head = struct.pack(">IIII", 2051, 100, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">II", 2049, 100)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "experiment"])
def test_each_experiment_trains(choice, tmp_path):
    overrides = [f"experiment={choice}", "trainer.max_epochs=1", "callbacks=none", "logger=csv"]
    if "mnist" in choice:
        tiny_mnist(tmp_path)
        overrides.append(f"data.root={tmp_path}")
    result = train(composed(*overrides), tmp_path / "run")
    assert result.summary["stop_reason"] == "BUDGET"
    assert result.summary["variant"] == choice.rsplit("_", 1)[-1]
    assert result.summary["updates"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="the real MNIST is not beside the checkout")
@pytest.mark.parametrize(
    ("choice", "least"), [("mnist_mlp_minibatch", 0.975), ("mnist_cnn_minibatch", 0.985)]
)
def test_real_mnist_is_learnt(choice, least, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in MNIST.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    overrides = [f"experiment={choice}", f"data.root={tmp_path}", "data.download=false"]
    if "cnn" in choice:
        overrides.append("trainer.max_epochs=2")  # of 5: enough
    config = composed(*overrides)
    result = train(config, tmp_path / "run")
    assert result.metrics["metric/accuracy/test"] >= least


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "schedule"])
@pytest.mark.parametrize("variant", ["gd", "sgd", "minibatch"])
def test_each_schedule_trains_with_each_variant(choice, variant, tmp_path):
    words = f"schedule={choice} optimizer={variant} optimizer.lr=0.1 data=iris model=linear"
    result = trained(f"{words} trainer.max_epochs=2", tmp_path)
    rates = result.history.array("train", "lr")
    assert (rates > 0).all()
    assert (rates <= 0.1 * (1 + 1e-12)).all()


@pytest.mark.parametrize("choice", ["csv", "npy", "libsvm"])
def test_each_file_of_ones_own_trains(choice, tmp_path):
    words = f"data={choice} data.path={own_file(choice, tmp_path)} optimizer=gd model=linear"
    result = trained(f"{words} trainer.max_epochs=2", tmp_path)
    assert result.summary["data"]["train"] == 42


@pytest.mark.parametrize(
    "loss",
    ["logistic", "hinge", "squared_hinge", "cross_entropy", "one_hot_squared_error", "huber"],
)
def test_each_loss_trains(loss, tmp_path):
    data = "diabetes" if loss == "huber" else "breast_cancer"
    words = f"loss={loss} data={data} model=linear optimizer=gd trainer.max_epochs=200"
    metrics = trained(words, tmp_path).metrics
    tag = "metric/r2/test" if loss == "huber" else "metric/accuracy/test"
    assert metrics[tag] > (0.2 if loss == "huber" else 0.9)


def test_any_torch_optimizer_can_stand_in(tmp_path):
    words = "optimizer=adam optimizer._target_=torch.optim.RMSprop ~optimizer.betas data=iris"
    assert trained(f"{words} trainer.max_epochs=2", tmp_path).summary["updates"] == 8


def test_a_module_of_ones_own_needs_no_sizes(tmp_path):
    words = "data=iris optimizer=gd trainer.max_epochs=2 model._target_=torch.nn.Linear"
    words += " ~model.hidden ~model.activation ~model.dropout ~model.init ~model.std"
    result = trained(f"{words} +model.in_features=4 +model.out_features=3", tmp_path)
    assert result.summary["parameters"] == 15


def test_ones_own_folder_of_configs(tmp_path, monkeypatch):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "tiny.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /data: iris\n  - override /optimizer: gd\n"
        "trainer:\n  max_epochs: 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["gdtrain", "experiment=tiny", "hydra.run.dir=run", "--config-dir=mine"]
    )
    with pytest.raises(SystemExit) as end:
        cli.train_main()
    assert end.value.code == 0
    assert json.loads(Path("run/summary.json").read_text())["updates"] == 3


def test_config_yaml_holds_the_whole_configuration(tmp_path):
    config = composed("data=iris", "optimizer=gd", "trainer.max_epochs=1", "seed=7")
    train(config, tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved == OmegaConf.to_container(config, resolve=True)
    assert saved["data"]["seed"] == 7
