"""Files that may come from anybody: no code of theirs runs, and little memory is taken.

Each attempt is a file and an entrance, and must end in a ValueError: with nothing started, written
or fetched, and with less than 300 MB of memory.
"""

import copy
import functools
import gzip
import io
import json
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from torchvision.models import resnet18

import gdtrain
from gdtrain import cli
from gdtrain.analysis.trajectory import Snapshots
from gdtrain.callbacks import BestAndLast
from gdtrain.cli.composition import compose
from gdtrain.data import LIBSVMDataModule, NPYDataModule
from gdtrain.data.checkpoint_reading import load_checkpoint
from gdtrain.data.files import read_features
from gdtrain.reporting import comparison, finished
from gdtrain.reporting.page import page
from gdtrain.reporting.text import Report
from gdtrain.runs import tools
from gdtrain.runs.checkpoints import load_trained
from gdtrain.runs.descriptions import build_model
from gdtrain.runs.train import train

MEMORY = 300 * 2**10  # KiB


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: an MLP with one hidden layer of 4 on irises."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    words = ["data=iris", "model=mlp", "model.hidden=[4]", "optimizer=gd", "optimizer.lr=0.1"]
    words += ["trainer.max_epochs=3", "logger=csv", "instruments=off"]
    train(compose(words, None), folder)
    return folder


@pytest.fixture(scope="module")
def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(autouse=True)
def nothing_happens(run, state, tmp_path, monkeypatch):
    """What an attempt would do, if it could, fails the test."""

    def forbidden(*_, **__):
        pytest.fail("The file has reached outside.")

    monkeypatch.setenv("CANARY", "read from the environment")
    monkeypatch.chdir(tmp_path)
    for owner, name in (
        (socket.socket, "connect"),
        (socket, "create_connection"),
        (subprocess, "Popen"),
        (os, "system"),
        (os, "popen"),
    ):
        monkeypatch.setattr(owner, name, forbidden)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < MEMORY, f"{taken / 2**10:.0f} MB were taken"
    assert not list(tmp_path.rglob("canary*"))
    assert "canary" not in sys.modules


@pytest.fixture
def refusal(monkeypatch, capsys):
    """From the words of a command to what it says when it ends with code 2."""

    def run(command, *words):
        monkeypatch.setattr(sys, "argv", [command, *words])
        with pytest.raises(SystemExit) as ended:
            getattr(cli, f"{command}_main")()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "run"))


# ---------------------------------------------------------------------- what a checkpoint names


def evaluate(path):
    return tools.evaluate(path)


def predict(path):
    np.save("new.npy", np.zeros((2, 4)))
    return tools.predict_file(path, "new.npy", "answers.csv")


def landscape(path):
    return tools.landscape(path, examples=10, points=3)


def load(path):
    return load_trained(path)


ENTRANCES = [evaluate, predict, landscape, load]
MLP = "gdtrain.models.MLP"
DATA = "gdtrain.data.EmbeddedDataModule"
ITSELF = {"_target_": "pathlib.Path", "_args_": ["canary"]}


def _oc(target, *arguments):
    return f"${{oc.create:{{_target_: {target}, _args_: [{','.join(arguments)}]}}}}"


def _at(place, target, **options):
    return place, {"_target_": target, **options}


_model, _loss, _source = (functools.partial(_at, place) for place in ("model", "loss", "data"))
_NET = "torchvision.models"
_CALLED = ("os.system", "torch.load", "torch.nn.functional.torch.hub.load", "builtins.eval")
_DRAWN = {"_target_": "torchvision.datasets.FakeData"}
_WINDOW = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}


def _layers(child, place="model"):
    return _at(place, "torch.nn.Sequential", children={"0": child})


# Where in the description, and what stands there. A part "a.b" is description["a"]["b"].
DESCRIPTIONS = {
    "sympify": ("model.hidden", _oc("sympy.sympify", "'open(1)'")),
    "made by oc.create": ("model.hidden", _oc("os.mkdir", "canary")),
    "made in the loss": _loss("gdtrain.losses.Huber", delta=_oc("os.mkdir", "canary")),
    "made in the data": ("data.name", _oc("os.mkdir", "canary")),
    "environment": ("data.name", "${oc.env:CANARY}"),
    "environment in the model": ("model.activation", "${oc.env:CANARY,relu}"),
    "another key": ("model.activation", "${data.name}"),
    "decoded": ("model.hidden", "${oc.decode:'[4]'}"),
    "resolver in a list": ("model.hidden", ["${oc.env:CANARY}"]),
    "resolver as a key": ("model", {"_target_": MLP, "${oc.env:CANARY}": 1}),
    "resolver in a target": ("model._target_", "${oc.env:CANARY}"),
    "escaped resolver": ("model.activation", "\\${oc.env:CANARY}"),
    "os.mkdir": _model("os.mkdir", path="canary"),
    "Path.touch": _model("pathlib.Path.touch", _args_=[ITSELF]),
    "os.system": _model("os.system", command="touch canary"),
    "eval": _model("builtins.eval", _args_=["open('canary', 'w')"]),
    "exec in a list": ("model.hidden", [_at("", "builtins.exec", _args_=["import canary"])[1]]),
    "subprocess": _model("subprocess.Popen", args=["touch", "canary"]),
    "import of a module": _model("canary.Model"),
    "our own folders": _model("gdtrain.runs.folder.reserve", folder="canary", config={}),
    "our own data's folders": _source("gdtrain.data.sources.Path.mkdir", _args_=[ITSELF]),
    "torch.load by a re-export": _model("torch.nn.functional.torch.load", f="x"),
    "torch by a re-export": _model("torch.nn.modules.module.torch.load", f="x"),
    "torch of our models": _model("gdtrain.models.cnn.nn.Linear", in_features=4, out_features=3),
    "inner module": _model("gdtrain.models.mlp.MLP", _partial_=True),
    "read_pickle": _source("gdtrain.data.sources.pd.read_pickle", filepath_or_buffer="x"),
    "a function of our data": _source("gdtrain.data.files.read_features", path="x"),
    "a function of our models": _model("gdtrain.models.exact_batch_norm_"),
    "a method": _model("torch.nn.Module.register_parameter"),
    "dunder": _model("gdtrain.models.MLP.__init__.__globals__"),
    "private": _model("torch.nn.modules._functions.SyncBatchNorm"),
    **{f"{name} in a layer": _layers({"_target_": name, "x": 1}) for name in _CALLED},
    **{f"{name} in the loss": _layers({"_target_": name, "x": 1}, "loss") for name in _CALLED},
    "a list as a layer": _layers([1]),
    "a list as a model": ("model", [1]),
    "data as a model": _model(DATA, name="iris"),
    "a model as a loss": _loss("torch.nn.CrossEntropyLoss"),
    "a model as data": _source("torch.nn.Linear", in_features=1, out_features=1),
    "weights of torchvision": _model(f"{_NET}.get_weight", name="x"),
    "any model of torchvision": _model(f"{_NET}.get_model", name="resnet18", weights="DEFAULT"),
    "download of weights": _model(f"{_NET}.resnet18", weights="DEFAULT"),
    "older download of weights": _model(f"{_NET}.resnet18", pretrained=True),
    "backbone's weights": _model(f"{_NET}.segmentation.fcn_resnet50"),
    "args": _model(MLP, _args_=[[4], 3]),
    "recursive": ("model._recursive_", False),
    "convert": ("model._convert_", "all"),
    "mode": ("model._mode_", "x"),
    "partial in the data": ("data._partial_", True),
    "partial of another kind": ("model._partial_", "yes"),
    "nested in the data": ("data.name", {"_target_": "gdtrain.losses.Huber"}),
    "nested dataset": _source("gdtrain.data.DatasetDataModule", train=_DRAWN),
    "an argument that there is not": ("model.device", "cuda:99"),
    "a name with a line": ("model._target_", "gdtrain.models.MLP\nos.system"),
    "no name": ("model._target_", 3),
    "no model": ("model", None),
    "no description": (None, "text"),
    "a tensor as an argument": ("model.hidden", torch.ones(1)),
    "deep": ("model.hidden", functools.reduce(lambda inner, _: [inner], range(100), 1)),
    "shared lists": ("model.hidden", functools.reduce(lambda inner, _: [inner] * 9, range(12), 1)),
    "endless": ("model.hidden", "itself"),
    # ------------------------------------------------------------------ memory
    "a wide layer": ("model.hidden", [10**11]),
    "many wide layers": ("model.hidden", [60_000] * 50),
    "many layers": ("model.hidden", [1] * 50_000),
    "beyond 64 bits": ("model.hidden", [10**30]),
    "layers without end": _model("torch.nn.LSTM", input_size=1, hidden_size=1, num_layers=60_000),
    "copies without end": _model(
        "torch.nn.Transformer", d_model=8, nhead=1, num_encoder_layers=60_000
    ),
    "a wide embedding": _model("torch.nn.Embedding", num_embeddings=10**10, embedding_dim=100),
    "a wide window": _model(f"{_NET}.SwinTransformer", window_size=[60_000, 60_000], **_WINDOW),
    "text without end": ("model.activation", "x" * 10**6),
}


def _put(state, place, value):
    changed = copy.deepcopy(state)
    if place is None:
        changed["gdtrain"]["description"] = value
        return changed
    node = changed["gdtrain"]["description"]
    *parents, last = place.split(".")
    for name in parents:
        node = node[name]
    if value == "itself":
        value = []
        value.append(value)  # torch.save keeps that, too
    node[last] = value
    return changed


def _save(state):
    torch.save(state, "hostile.ckpt")
    return Path("hostile.ckpt")


@pytest.mark.parametrize("attempt", DESCRIPTIONS)
def test_a_description_only_names_what_is_trusted(attempt, state):
    place, value = DESCRIPTIONS[attempt]
    path = _save(_put(state, place, copy.deepcopy(value)))
    entrance = ENTRANCES[list(DESCRIPTIONS).index(attempt) % len(ENTRANCES)]
    with pytest.raises(ValueError, match=r"\w") as caught:
        entrance(path)
    assert "CANARY" not in os.environ or os.environ["CANARY"] not in str(caught.value)
    assert not Path("answers.csv").exists()
    assert not Path("landscape").exists()


def test_what_a_checkpoint_may_be_is_still_built(run, state):
    path = run / "checkpoints" / "last.ckpt"
    assert evaluate(path).keys() == {"loss/test", "metric/accuracy/test"}
    assert predict(path) == 2
    loss = {"_target_": "gdtrain.losses.CrossEntropy"}
    assert load(_save(_put(state, "loss", loss))).module.loss.task == "multiclass"


def test_pretrained_weights_are_not_fetched():
    weights = resnet18().state_dict()
    for words in ({"weights": "DEFAULT"}, {"pretrained": True}):
        words = {"_target_": "torchvision.models.resnet18", **words}
        assert build_model(words, (3, 64, 64), 1000, weights).state_dict().keys() == weights.keys()
    for name in ("googlenet", "inception_v3"):
        words = {"_target_": f"torchvision.models.{name}", "weights": "DEFAULT"}
        with pytest.raises(ValueError, match="cannot be built again from a checkpoint"):
            build_model(words, (3, 64, 64), 1000, weights)


def test_a_package_that_is_named_follows_the_same_rules(state, tmp_path, monkeypatch):
    (tmp_path / "mine_is_trusted.py").write_text(
        "import os\nfrom torch import nn\nfrom gdtrain.models import MLP\n"
        "class Net(MLP):\n    pass\n"
        "def make(input_shape, num_outputs, hidden) -> nn.Module:\n"
        "    return Net(input_shape, num_outputs, hidden)\n"
        "def other(path):\n    os.mkdir(path)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Net", "make"):
        words = {"_target_": f"mine_is_trusted.{name}", "_partial_": True, "hidden": [4]}
        path = _save(_put(state, "model", words))
        with pytest.raises(ValueError, match="trust=mine_is_trusted"):
            load(path)
        assert type(load_trained(path, ("mine_is_trusted",)).module.model).__name__ == ("Net")
    for words in (
        {"_target_": "mine_is_trusted.other", "path": "canary"},
        {"_target_": "mine_is_trusted.os.mkdir", "path": "canary"},
        {"_target_": "mine_is_trusted.MLP", "_partial_": True},
    ):
        path = _save(_put(state, "model", words))
        with pytest.raises(ValueError, match="asks to call"):
            load_trained(path, ("mine_is_trusted",))


# ---------------------------------------------------------------------- what else it holds


def _rewritten(path, change):
    """A copy of a checkpoint's archive; `change` gets each part's name and content."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile("hostile.ckpt", "w") as new:
        for info in old.infolist():
            for name, content in change(info.filename, old.read(info)):
                new.writestr(name, content)
    return Path("hostile.ckpt")


def _pickled(content):
    """A checkpoint whose pickle is another."""

    def change(name, old):
        return [(name, content if name.endswith("data.pkl") else old)]

    return functools.partial(_rewritten, change=change)


def _write_zeros(archive, name, megabytes, head=b""):
    with archive.open(name, "w") as part:
        part.write(head)
        for _ in range(megabytes):
            part.write(bytes(2**20))


@functools.cache
def _packed_checkpoint(path):
    _rewritten(path, lambda name, old: [(name, old)])
    options = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 1}
    with zipfile.ZipFile("hostile.ckpt", "a", **options) as file:
        _write_zeros(file, "archive/data/99", 400)
    return Path("hostile.ckpt").read_bytes()


def _packed(path):
    return _of_bytes(_packed_checkpoint(path))(path)


def _twice(path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        return _rewritten(path, lambda name, old: [(name, old)] * (1 + name.endswith("data.pkl")))


def _claiming(path):
    state = torch.load(path, weights_only=True)
    torch.save(state, "hostile.ckpt")
    content = zipfile.ZipFile("hostile.ckpt").read("hostile/data.pkl")
    at = content.index(b"FloatStorage")
    number = content.index(b"K", content.index(b"cpu", at))
    bad = content[:number] + b"J\x00\x00\x00\x40" + content[number + 2 :]
    return _pickled(bad)(path)


class _Calls:
    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def _calls(function, *arguments, protocol=2):
    return pickle.dumps({"state_dict": {}, "gdtrain": _Calls(function, *arguments)}, protocol)


def _calling(function, *arguments):
    return _pickled(_calls(function, *arguments))


def _hex(path):
    """A text that doubles forty times."""
    call = b"c_codecs\nencode\n"
    inner = call + b"X\x04\x00\x00\x00xxxxX\x06\x00\x00\x00latin1\x86R"
    for _ in range(40):
        inner = call + inner + b"X\x03\x00\x00\x00hex\x86R"
    return _pickled(b"\x80\x02" + inner + b".")(path)


def _nested_keys(path):
    """A key whose hash takes 2⁶⁰ steps."""
    pairs = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    return _pickled(b"\x80\x02}(K\x01q\x00" + pairs + b"K\x01u.")(path)


def _with(change):
    def make(path):
        state = torch.load(path, weights_only=True)
        change(state)
        return _save(state)

    return make


def _first(state):
    return next(k for k in state["state_dict"] if k.endswith("weight"))


def _expanded(state):
    state["state_dict"][_first(state)] = torch.zeros(1).expand(10**6, 10**5)


def _shared(state):
    one = torch.zeros(2**20)
    state["state_dict"] |= {f"model.w{i}": one.view(2**10, 2**10) for i in range(2000)}


def _wide(state):
    description = state["gdtrain"]["description"]
    description["model"]["hidden"] = [10**5]
    weights = state["state_dict"]
    first, last = (k for k in weights if k.endswith("weight"))
    weights[first], weights[last] = (torch.zeros(1).expand(s) for s in ((10**5, 4), (3, 10**5)))


def _data(name, value):
    return _with(lambda state: state["EmbeddedDataModule"].update({name: value}))


def _learnt(name, value):
    part = "preprocessing"
    return _with(lambda state: state["EmbeddedDataModule"][part].update({name: value}))


def _other_data(state, kind, **options):
    """The same checkpoint, as if it had been trained on another source."""
    changed = _put(state, *_source(f"gdtrain.data.{kind}", **options))
    return {**changed, kind: state["EmbeddedDataModule"]}


def _named(kind, **options):
    return lambda path: _save(_other_data(torch.load(path, weights_only=True), kind, **options))


def _of_bytes(content):
    def make(path):
        Path("hostile.ckpt").write_bytes(content)
        return Path("hostile.ckpt")

    return make


def _surrounded(before=b"", behind=b""):
    return lambda path: _of_bytes(before + path.read_bytes() + behind)(path)


def _outside(path):
    return _rewritten(path, lambda name, old: [(name, old), ("../canary/" + name, old)])


def _cased(path):
    """torch.load takes the first of parts that differ in upper case alone."""
    evil = _calls(bytearray, 10**9)

    def change(name, old):
        other = [(name.replace("data.pkl", "DATA.PKL"), evil)] if name.endswith("data.pkl") else []
        return [*other, (name, old)]

    return _rewritten(path, change)


def _renamed(path):
    """A part whose name ends at a zero for Python, and goes on for others."""

    def change(name, old):
        info = zipfile.ZipInfo(name)
        info.filename = name + "\0x" * name.endswith("/version")
        return [(info, old)]

    return _rewritten(path, change)


CHECKPOINTS = {
    "a part in upper case": _cased,
    "a part of two names": _renamed,
    "a call in the pickle": _calling(os.mkdir, "canary"),
    "eval in the pickle": _calling(eval, "open('canary', 'w')"),
    "a long text in the pickle": _calling(bytearray, 10**9),
    "a tensor of nothing in the pickle": _calling(torch.Tensor, 10**9),
    "text that doubles": _hex,
    "keys in keys": _nested_keys,
    "an old pickle": _of_bytes(_calls(os.mkdir, "canary", protocol=None)),
    "packed": _packed,
    "a part twice": _twice,
    "a part outside": _outside,
    "something behind": _surrounded(behind=b"PK\x03\x04 and more"),
    "something before": _surrounded(b"#!/bin/sh\n"),
    "a storage that claims more": _claiming,
    "a number for all weights": _with(_expanded),
    "weights of a number that fit": _with(_wide),
    "one storage for all weights": _with(_shared),
    "examples without end": _data("input_shape", [10**12]),
    "classes without end": _data("num_classes", 10**12),
    "targets of another kind": _data("num_targets", "${oc.env:CANARY}"),
    "statistics of another shape": _learnt("mean", torch.zeros(1).expand(10**6, 4).double()),
    "a field that there is not": _learnt("__class__", "x"),
    "labels of another kind": _learnt("classes", [[]] * 3),
    "names of another number": _learnt("feature_names", ["a"] * 10**5),
    "files that are to be fetched": _named("TorchvisionDataModule", name="mnist", root="canary"),
    "data that are to be drawn": _named(
        "SyntheticDataModule", num_examples=3 * 10**6, num_features=4
    ),
    "weights that are texts": _with(lambda s: s["state_dict"].update({_first(s): "x"})),
    "text": _of_bytes(b"state_dict: 1"),
    "nothing": _of_bytes(b""),
}


@pytest.mark.parametrize("attempt", CHECKPOINTS)
def test_a_checkpoint_is_checked_before_it_is_read(attempt, run):
    path = CHECKPOINTS[attempt](run / "checkpoints" / "last.ckpt")
    with pytest.raises((ValueError, FileNotFoundError)):
        evaluate(path)


def _resume(path):
    Path("best.ckpt").write_bytes(path.read_bytes())
    BestAndLast("checkpoints").take_over(Path(path))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.tensor(float("nan")), "not finite"),
        (torch.tensor(float("inf")), "not finite"),
        (torch.tensor(1), "floating point"),
        (torch.tensor(1j), "real numbers"),
    ],
)
def test_weights_that_cannot_answer_are_refused(value, said, state):
    changed = copy.deepcopy(state)
    weights = changed["state_dict"]
    weights[_first(changed)] = value.repeat(weights[_first(changed)].shape)
    with pytest.raises(ValueError, match=rf"hostile\.ckpt cannot be used.*{said}"):
        load(_save(changed))


@pytest.mark.parametrize("entrance", [load_checkpoint, _resume, landscape, predict])
@pytest.mark.parametrize("attempt", ["packed", "text that doubles", "a number for all weights"])
def test_every_entrance_checks(attempt, entrance, run):
    path = CHECKPOINTS[attempt](run / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint|is damaged"):
        entrance(path)


def _layer(name, **options):
    return {"_target_": f"torch.nn.{name}", **options}


GROWING = {
    "size": _layer("Upsample", size=[6000, 6000]),
    "factor": _layer("Upsample", scale_factor=20_000.0),
    "padding": _layer("ZeroPad2d", padding=[30_000] * 4),
}


@pytest.mark.parametrize("entrance", [evaluate, predict, landscape])
@pytest.mark.parametrize("growing", GROWING)
def test_a_layer_that_makes_much_of_an_example_is_not_run(growing, entrance, state):
    layers = [
        _layer("Unflatten", dim=1, unflattened_size=[1, 2, 2]),
        GROWING[growing],
        _layer("AdaptiveAvgPool2d", output_size=1),
        _layer("Flatten"),
        _layer("Linear", in_features=1, out_features=3),
    ]
    children = {str(i): layer for i, layer in enumerate(layers)}
    changed = _put(state, "model", _layer("Sequential", children=children))
    changed["state_dict"] = {
        "model.4.weight": torch.zeros(3, 1),
        "model.4.bias": torch.zeros(3),
    }
    with pytest.raises(ValueError, match="one of its layers makes more than"):
        entrance(_save(changed))


def _itself():
    value = []
    value.append(value)
    return value


_SHARED_LISTS = functools.reduce(lambda inner, _: [inner, inner], range(30), ["x"])
PARTS = {
    "a number as a name": ("state_dict", 3, torch.zeros(3, 4), "state_dict"),
    "a list as a setting": ("gdtrain", "settings", {"model": ["x"]}, r"gdtrain\.settings"),
    "a list as updates": ("gdtrain", "updates", [1], r"gdtrain\.updates"),
    "numbers as optimizers": (None, "optimizer_states", 3, "optimizer_states"),
    "lists in each other": ("gdtrain", "settings", {"model": _SHARED_LISTS}, "without end"),
    "a list in itself": ("callbacks", "Divergence", _itself(), "without end"),
}


@pytest.mark.parametrize("attempt", PARTS)
def test_a_part_of_another_kind_is_named(attempt, state):
    place, key, value, said = PARTS[attempt]
    changed = {k: dict(v) if isinstance(v, dict) else v for k, v in state.items()}
    (changed[place] if place else changed)[key] = value
    with pytest.raises(ValueError, match=said) as caught:
        load_checkpoint(_save(changed))
    assert "hostile.ckpt" in str(caught.value)


def test_a_checkpoint_names_only_ordinary_files(run, state):
    os.mkfifo("pipe.csv")
    for name in ("pipe.csv", "/dev/zero", "http://127.0.0.1/x.csv", "file:///etc/passwd", "."):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            evaluate(_save(_other_data(state, "CSVDataModule", path=name)))


def test_evaluate_says_which_file_it_reads(state, caplog):
    Path("table.csv").write_text("a,b,c,d,e\n" + "1,2,3,4,x\n5,6,7,8,y\n" * 30)
    caplog.set_level("INFO", "gdtrain")
    with pytest.raises(ValueError, match="split"):
        evaluate(_save(_other_data(state, "CSVDataModule", path="table.csv")))
    assert "read from table.csv" in caplog.text


# ---------------------------------------------------------------------- arrays and tables


def _npy(shape, dtype="<f8", content=b""):
    """A file of NumPy's whose header claims what it likes."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


ZEROS = object()  # 400 MB of them, packed


def _npz(**parts):
    with zipfile.ZipFile("hostile.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, part in parts.items():
            if part is ZEROS:
                shape = (50 * 2**20,) if name == "data" else (5, 10 * 2**20)
                _write_zeros(file, f"{name}.npy", 400, _npy(shape))
                continue
            if not isinstance(part, bytes):
                whole = io.BytesIO()
                np.save(whole, np.asarray(part))
                part = whole.getvalue()
            file.writestr(f"{name}.npy", part)
    return "hostile.npz"


ONES, FOUR = np.ones(4), np.arange(4)
# Parts of matrices that are whole.
_ROWS = {"data": ONES, "indices": [0, 1, 2, 0], "indptr": range(5)}
_PAIRS = {"data": ONES, "row": FOUR, "col": [0, 1, 2, 0]}
_BLOCKS = {"data": np.ones((2, 2, 3)), "indices": [0, 0], "indptr": [0, 1, 2]}
_WHOLE = {"csr": _ROWS, "csc": {**_ROWS, "indptr": [0, 1, 2, 4]}, "coo": _PAIRS, "bsr": _BLOCKS}


def _matrix(kind="csr", shape=(4, 3), **changes):
    parts = {**_WHOLE.get(kind, _ROWS), **changes}
    return functools.partial(_npz, format=kind, shape=shape, **parts)


def _objects():
    np.save("hostile.npy", np.array([_Calls(os.mkdir, "canary")], dtype=object), allow_pickle=True)
    return "hostile.npy"


def _file(name, content):
    def make():
        Path(name).write_bytes(content)
        return name

    return make


ARRAYS = {
    "column beyond": _matrix(indices=[0, 1, 2, 10**9]),
    "column below": _matrix(indices=[0, 1, 2, -(10**9)]),
    "row starts beyond": _matrix(indptr=[0, 1, 2, 3, 10**9]),
    "row starts fall": _matrix(indptr=[0, 3, 1, 10**8, 4]),
    "row starts below": _matrix(indptr=[-(10**8), 1, 2, 3, 4]),
    "indices of 2⁶³ and more": _matrix(indices=np.array([0, 1, 2, 2**64 - 1], np.uint64)),
    "indices with a point": _matrix(indices=[0, 1, 2, 1e18]),
    "fewer columns than values": _matrix(indices=[0]),
    "fewer row starts than rows": _matrix(indptr=[0, 4]),
    "another shape": _matrix(shape=(10**6, 3)),
    "a shape below 0": _matrix(shape=(-4, 3)),
    "three axes": _matrix(shape=(4, 3, 1)),
    "CSC, row beyond": _matrix("csc", indices=[0, 1, 2, 10**9]),
    "CSC, starts fall": _matrix("csc", indices=FOUR, indptr=[0, 3, 10**8, 4]),
    "COO, row beyond": _matrix("coo", row=[0, 1, 2, 10**9]),
    "COO, column below": _matrix("coo", col=[0, 1, 2, -1]),
    "COO, rows without end": _matrix("coo", shape=(10**10, 3)),
    "BSR, block beyond": _matrix("bsr", indices=[0, 10**8]),
    "BSR, starts fall": _matrix("bsr", indptr=[0, 10**8, 2]),
    "DIA, offset beyond": functools.partial(
        _npz, format="dia", shape=(4, 3), data=np.ones((1, 3)), offsets=[2**62]
    ),
    "columns without end": _matrix(indices=[0, 1, 2, 10**12], shape=(4, 2 * 10**12)),
    "another format": _matrix("os.system", indices=FOUR),
    "a header of 10¹² in a matrix": _matrix(data=_npy((10**12,)), indices=FOUR),
    "objects in a matrix": _matrix(data=_npy((4,), "|O", pickle.dumps([1])), indices=FOUR),
    "a packed matrix": _matrix(data=ZEROS, indices=FOUR),
    "10¹² rows": _file("hostile.npy", _npy((10**12, 3))),
    "rows below 0": _file("hostile.npy", _npy((-1, 3), content=bytes(24))),
    "more than 64 bits": _file("hostile.npy", _npy((2**40, 2**40))),
    "objects": _objects,
    "a structure": _file("hostile.npy", _npy((1,), [("a", "<f8")], bytes(8))),
    "nothing, 10¹² times": _file("hostile.npy", _npy((10**12,), "<U0")),
    "a header in brackets": _file(
        "hostile.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000
    ),
    "a long header": _file(
        "hostile.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31 - 1) + b" " * 100
    ),
    "a feature of 10¹⁸": _file("hostile.svm", b"1 1:1 1000000000000000000:2\n0 1:1\n"),
    "a feature of 2³²": _file("hostile.svm", b"1 1:1 4294967296:2\n0 1:1\n"),
    "a feature of 2⁸⁰": _file("hostile.svm", b"1 1:1 1208925819614629174706176:2\n"),
    "a feature below 0": _file("hostile.svm", b"1 -1:1 2:2\n0 1:1\n"),
    "a packed table": _file("hostile.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 2**24, 1)),
    "packed examples": _file("hostile.svm.gz", gzip.compress(b"1 1:1\n" * 2**24, 1)),
    "damaged packing": _file("hostile.svm.gz", gzip.compress(b"1 1:1\n")[:-9]),
}


def _train(path):
    options = {"standardize": False, "batch_size": 1}
    if path.endswith((".npy", ".npz")):
        np.save("targets.npy", np.arange(4) % 2)
        NPYDataModule(path, target_path="targets.npy", **options).setup()
    else:
        LIBSVMDataModule(path, **options).setup()


@pytest.mark.parametrize("attempt", ARRAYS)
def test_arrays_are_checked_before_they_are_read(attempt, tmp_path):
    path = ARRAYS[attempt]()
    for entrance in (_train, read_features):
        with pytest.raises(ValueError, match=r"\w") as caught:
            entrance(path)
        assert "format.npy" not in str(caught.value)  # it is another part that is bad


LINES = (
    "1 99999999999999999999:1, 1 3000000000:1, 1 1:x, 1 -3:1, 1 1:1 1:2, 1 2:1 1:2, 1 two:1, 1 3"
)


@pytest.mark.parametrize("line", [*LINES.split(", "), "hello world"])
def test_a_bad_line_of_a_sparse_table_is_named(line):
    Path("hostile.svm").write_text(f"1 1:1 # fine\n{line}\n0 1:2\n")
    for entrance in (_train, read_features):
        with pytest.raises(ValueError, match="line 2: ") as caught:
            entrance("hostile.svm")
        assert str(caught.value).startswith("hostile.svm could not be read as LIBSVM: expected")


@pytest.mark.parametrize("kind", ["csr", "csc", "bsr", "coo", "dia", "lil"])
def test_a_matrix_in_memory_is_checked(kind):
    whole = sparse.eye_array(6, format=kind)
    answers = np.arange(6) % 2
    if kind == "coo":
        whole.coords[1][2] = 10**8
    elif kind == "dia":
        whole.offsets = np.array([2**40])
    elif kind == "lil":
        whole.rows[2][0] = 10**8
    else:
        whole.indices[2] = 10**8
    with pytest.raises(ValueError, match="The sparse matrix is damaged"):
        gdtrain.fit("linear", whole, answers, standardize=False, epochs=1)


def test_sparse_files_that_are_whole_are_read():
    whole = sparse.random_array((6, 5), density=0.5, rng=np.random.default_rng(0))
    for kind in ("csr", "csc", "bsr", "coo", "dia"):
        sparse.save_npz("whole.npz", whole.asformat(kind))
        assert abs(read_features("whole.npz") - whole).max() == 0


# ---------------------------------------------------------------------- a run's folder


def _text(name, content):
    def change(folder):
        (folder / name).write_text(content)

    return change


def _summary(**changes):
    def change(folder):
        path = folder / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _link(name, to):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return change


def _pipe(folder):
    (folder / "summary.json").unlink()
    os.mkfifo(folder / "summary.json")


_LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)
_HEAD = "step,examples,seconds,loss/train\n"

FOLDERS = {
    "an object in YAML": _text("config.yaml", "a: !!python/object/apply:os.mkdir [canary]"),
    "aliases": _text("config.yaml", _LAUGHS),
    "an alias of itself": _text("config.yaml", "a: &a\n  b: *a\n"),
    "brackets in YAML": _text("config.yaml", "a: " + "[" * 10**5),
    "braces in YAML": _text("config.yaml", "{a: " * 10**5),
    "steps in YAML": _text("config.yaml", "".join(" " * i + "a:\n" for i in range(1500))),
    "long YAML": _text("config.yaml", "a: " + "x" * 10**7),
    "a number of 10⁵ digits": _text("config.yaml", "a: 0x" + "f" * 10**5),
    "no settings": lambda folder: (folder / "config.yaml").unlink(),
    "10⁵ digits in JSON": _text("summary.json", '{"updates": ' + "1" * 10**5 + "}"),
    "JSON that ends": _text("summary.json", '{"updates": '),
    "bytes in JSON": lambda folder: (folder / "summary.json").write_bytes(b"\xff\x00" * 100),
    "a month 13": _text("config.yaml", "a: 2024-13-01"),
    "a text as a loss": _text("metrics.csv", _HEAD + "1,10,1,abc\n"),
    "a number of base 60": _text("config.yaml", "a: 1" + ":1" * 10**5),
    "a list of settings": _text("config.yaml", "[1, 2]"),
    "brackets in JSON": _text("summary.json", "[" * 10**5),
    "steps in JSON": _text("summary.json", '{"a":' * 900 + "1" + "}" * 900),
    "long JSON": _text("summary.json", '"' + "x" * 10**7 + '"'),
    "text as a time": _summary(fit_seconds="<script>"),
    "markup as a variant": _summary(variant="<script>alert(1)</script>"),
    "a formula as a variant": _summary(variant="=HYPERLINK(1)"),
    "control characters as a reason": _summary(stop_reason="\x1b[2J"),
    "10⁴⁰⁰ updates": _summary(updates=10**400),
    "10⁴⁰⁰ as a loss": _summary(metrics={"loss/train": 10**400}),
    "a list as a metric": _summary(metrics={"loss/train": [1]}),
    "a formula as a metric": _summary(metrics={"=1+1": 1.0}),
    "no examples": _summary(data={"train": -1}),
    "versions of another kind": _summary(versions=["x"]),
    "a field of 300 kB": _text("metrics.csv", _HEAD + '1,10,1,"' + "1" * 300_000 + '"\n'),
    "10⁷ columns": _text("metrics.csv", _HEAD[:-1] + ",x" * 10**7 + "\n"),
    "one long line": _text("metrics.csv", _HEAD + "1" * 5_000_000),
    "more fields than names": _text("metrics.csv", _HEAD + "1,10,1,0.5" + ",1" * 10**5 + "\n"),
    "no end of a quotation": _text("metrics.csv", _HEAD + '1,10,1,"' + "1\n" * 10**5),
    "steps of 10⁴⁰⁰": _text("metrics.csv", _HEAD + "1" + "0" * 400 + ",10,1,0.5\n"),
    "no examples at a step": _text("metrics.csv", _HEAD + "1,0,1,0.5\n"),
    "not a number": _text("metrics.csv", _HEAD + "nan,nan,nan,0.5\n"),
    "bytes": lambda folder: (folder / "metrics.csv").write_bytes(b"\xff\x00" * 100),
    "an endless file": _link("summary.json", "/dev/zero"),
    "an endless table": _link("metrics.csv", "/dev/zero"),
    "a link to itself": _link("summary.json", "summary.json"),
    "a pipe": _pipe,
}


@pytest.fixture
def runs(run, tmp_path):
    """Two runs that can be compared, and one to be changed."""
    for i, name in enumerate(("a", "b", "hostile")):
        folder = tmp_path / "runs" / name
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "*.npz"))
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("lr: 0.1", f"lr: 0.{i + 1}"))
    return tmp_path / "runs"


@pytest.mark.parametrize("attempt", FOLDERS)
def test_a_bad_run_is_left_out_by_its_name(attempt, runs):
    FOLDERS[attempt](runs / "hostile")
    found, left_out = finished.find_runs(runs)
    assert [run.folder.name for run in found] == ["a", "b"]
    (reason,) = left_out
    assert "runs/hostile" in reason
    assert len(reason) < 1000
    assert reason.isprintable()
    assert not re.search(r"Errno|sys\.|codec|column 1|char |could not|limit|literal", reason)
    assert len(comparison.compare(found).usable) == 2


def test_bad_runs_are_named_where_too_few_are_left(runs, refusal):
    (runs / "hostile" / "summary.json").write_text("{")
    (runs / "b" / "config.yaml").unlink()
    said = refusal("compare", f"runs={runs}", "output=report")
    assert "needs two contenders" in said
    assert "b holds no finished run: it has no config.yaml" in said
    assert "hostile cannot be read" in said


def test_names_of_a_run_are_shown_as_text(runs):
    name = "<img src=x onerror=alert(1)>\x1b[2J"
    folder = runs / "hostile"
    text = (folder / "config.yaml").read_text()
    words = json.dumps("<script>alert(1)</script> $\\frac{$ \x1b[2J" + "x" * 10**5)
    (folder / "config.yaml").write_text(text.replace("lr: 0.3", f"lr: {words}"))
    folder.rename(runs / name)
    shutil.copytree(runs / name, runs / f"{name} again")
    found, _ = finished.find_runs(runs)
    compared = comparison.compare(found)
    report = Report(compared)
    said = [*report.sentences(), *report.absent(), *(c.name for c in compared.contenders)]
    assert all(line.isprintable() and len(line) < 2000 for line in said)
    html = page(compared)
    assert "<script" not in html
    assert "<img" not in html


class _Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.add((tag, *sorted(name for name, _ in attrs)))

    def handle_data(self, data):
        self.text += data


def test_whatever_a_run_says_is_shown_as_text(runs):
    plain = _Page(page(comparison.compare(finished.find_runs(runs)[0])))
    said = {i: f"</p></td>'\"><script>alert({i})</script>{{{{ 7 * 7 }}}}" for i in range(9)}
    for folder in runs.iterdir():
        _summary(
            device=f"{said[0]}\x1b[2J",
            engine=f"{said[1]}\x1b[2J",
            versions={f"{said[2]}\x1b[2J": f"{said[3]}\x1b[2J"},
            stop_message=f"{said[4]}\x1b[2J",
        )(folder)
        text = (folder / "config.yaml").read_text()
        found = re.search(r"model:\n *_target_: (\S+)", text)
        model = json.dumps(f"{said[5]}\x1b[2J")
        (folder / "config.yaml").write_text(text.replace(found[1], model))
    _summary(stop_reason="DIVERGED")(runs / "hostile")
    found, _ = finished.find_runs(runs)
    compared = comparison.compare(
        found, names={r.folder: f"{r.folder.name} {said[6]}" for r in found}
    )
    compared.left_out += [said[7]]
    compared.made += [said[8]]
    text = page(compared)
    assert "\x1b" not in text
    shown = _Page(text)
    assert shown.elements == plain.elements
    for words in said.values():
        assert words in shown.text


@pytest.mark.parametrize("tag", ["metric/", "metric/a", "metric/a/b/c", "metric/a/sideways"])
def test_a_metric_of_no_part_is_no_metric(tag, runs):
    for folder in runs.iterdir():
        _summary(metrics={"loss/train": 1.0, tag: 2.0})(folder)
    compared = comparison.compare(finished.find_runs(runs)[0])
    assert compared.metric is None


# ---------------------------------------------------------------------- the path of a run


def _path(**changes):
    parts = {
        "updates": np.arange(3),
        "parameters": np.zeros((3, 35), np.float32),
        "names": np.array(["a"]),
        "sizes": np.array([35]),
    }
    return functools.partial(_npz, **parts | changes)


PATHS = {
    "10¹² updates": _path(parameters=_npy((10**12, 35), "<f4")),
    "objects": _path(names=_npy((1,), "|O", pickle.dumps([1]))),
    "numbers as names": _path(names=np.zeros(1)),
    "names of another number": _path(names=np.array(["a", "b"])),
    "updates that fall": _path(updates=np.array([2, 1, 0])),
    "whole numbers": _path(parameters=np.zeros((3, 35), np.int64)),
    "packed": _path(parameters=ZEROS),
}


@pytest.mark.parametrize("attempt", PATHS)
def test_the_path_of_a_run_is_checked(attempt):
    with pytest.raises(ValueError, match="cannot be read as the path of a run"):
        Snapshots.load(PATHS[attempt]())


@pytest.mark.parametrize("summary", ["/dev/zero", "pipe", "deep"])
def test_a_model_is_loaded_whatever_lies_beside_it(summary, copied):
    os.mkfifo("pipe")
    Path("deep").write_text("[" * 10**5)
    _link("summary.json", Path(summary).absolute())(copied)
    assert gdtrain.load(copied / "checkpoints" / "last.ckpt").summary["metrics"] == {}


@pytest.mark.parametrize("words", [["evaluate"], ["predict", "input=x.npy", "output=answers.csv"]])
def test_a_refusal_ends_a_command_with_code_2(words, state, refusal):
    path = _save(_put(state, "model.hidden", _oc("os.mkdir", "canary")))
    assert "asks to be resolved" in refusal(words[0], f"ckpt_path={path}", *words[1:])


def test_the_unpacked_size_counts_for_the_landscape(copied):
    np.savez(copied / "trajectory.npz", parameters=np.zeros((2, 2**20)))
    with pytest.raises(ValueError, match="more than megabytes=8"):
        tools.landscape(copied / "checkpoints" / "last.ckpt", megabytes=8)
