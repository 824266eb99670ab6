"""What TensorBoard itself answers, and shows, about a sweep of the three variants."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
from commands import SCRIPTS, command
from hydra.core.hydra_config import HydraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gdtrain._compat.hydra import parse_override
from gdtrain.cli.composition import compose
from gdtrain.runs.checkpoints import find_checkpoint
from gdtrain.runs.tools import landscape

LOOKS = ("gradient_norms", "update_ratio", "gradient_cosine", "gradient_noise", "distance")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A multirun of the three, as one types it, and pictures of one of them."""
    folder = tmp_path_factory.mktemp("runs with spaces, ü")
    words = ["optimizer=gd,sgd,minibatch", "trainer.max_epochs=10"]
    words += [f"instruments.{name}.every=100" for name in LOOKS]
    done = command(folder, "train", "-m", *words)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "outputs").glob("digits-mlp-sgd/*")
    landscape(find_checkpoint(run), points=5, examples=64)
    return folder / "outputs"


@contextmanager
def board(folder, *options):
    """TensorBoard's address; by default it reads with its fast loader, where that is installed."""
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
    with subprocess.Popen([*words, *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            found = (re.search(r" at (http://\S+)", line) for line in process.stderr)
            yield next(match[1] for match in found if match)
        finally:
            process.terminate()


def asking(url):
    """From a path to what TensorBoard answers, when it has read all runs."""

    def ask(path, body=None, **query):
        address = f"{url}data/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(address, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())

    for _ in range(60):
        if len(ask("plugin/scalars/tags")) == 3 and len(ask("plugin/images/tags")) == 1:
            break
        time.sleep(0.5)
    return ask


@pytest.fixture(scope="module")
def url(outputs):
    with board(outputs) as address:
        yield address


@pytest.fixture(scope="module")
def answer(url):
    return asking(url)


@pytest.fixture(scope="module")
def runs(answer):
    """The run of each variant, by TensorBoard's name."""
    names = [name for name in answer("runs") if not name.endswith("/landscape")]
    return {name.split("/")[0].rpartition("-")[2]: name for name in names}


@pytest.fixture(scope="module")
def steps(answer, runs):
    """The steps of a tag, of the run of a variant."""

    def ask(variant, tag):
        return [at for _, at, _ in answer("plugin/scalars/scalars", run=runs[variant], tag=tag)]

    return ask


def test_losses_of_the_variants_lie_over_each_other_by_examples_and_epochs(runs, steps, answer):
    assert len(answer("runs")) == 4
    assert runs.keys() == {"gd", "sgd", "minibatch"}
    for variant in runs:
        by_sample = steps(variant, "by_sample/loss/train")
        assert by_sample == sorted(set(by_sample))
        assert by_sample[-1] == 10 * 1258
        assert steps(variant, "by_epoch/loss/train") == list(range(1, 11))
        validated = [10] if variant == "gd" else list(range(1, 11))
        assert steps(variant, "by_epoch/loss/val") == validated
    updates = {variant: steps(variant, "loss/train")[-1] for variant in runs}
    assert updates == {"gd": 10, "minibatch": 400, "sgd": 12580}


def test_no_tag_but_those_of_the_contract_their_axes_and_the_instruments(answer, runs):
    contract = {
        "loss/train",
        "loss/val",
        "loss/test",
        "lr",
        "metric/accuracy/val",
        "metric/accuracy/test",
        "time/updates_per_second",
        *(
            f"{axis}/loss/{part}"
            for axis in ("by_sample", "by_epoch", "by_millisecond")
            for part in ("train", "val")
        ),
    }
    of_each = ("layers.1", "layers.3")
    seen = {
        *("gradient/cosine", "gradient/norm", "step/norm", "step/ratio"),
        *(f"{what}/{layer}" for what in ("gradient/norm", "step/ratio") for layer in of_each),
        *("distance/from_start", "distance/relative", "noise/variance", "noise/gradient_square"),
    }
    for variant, run in runs.items():
        tags = answer("plugin/scalars/tags")[run]
        band = {f"spread/loss/train/{name}" for name in ("mean", "min", "max")}
        signal = set() if variant == "gd" else {"noise/signal_to_noise"}
        # The others make fewer updates than there are points.
        expected = contract | seen | signal | (band if variant == "sgd" else set())
        scale = {f"noise/scale{end}" for end in ("", "_low", "_high")}  # where it is defined
        assert set(tags) - scale == expected
        assert all(tag["description"].startswith("<p>") for tag in tags.values())


def test_the_slow_loader_reads_the_same(answer, outputs):
    with board(outputs, "--load_fast=false") as address:
        slow = asking(address)
        assert slow("plugin/scalars/tags") == answer("plugin/scalars/tags")
        assert slow("plugin/images/tags").keys() == answer("plugin/images/tags").keys()


def test_the_page_of_custom_scalars_shows_what_the_runs_have(answer, runs):
    layout = answer("plugin/custom_scalars/layout")
    titles = [category["title"] for category in layout["category"]]
    assert titles == ["loss", "rate", "gradient", "time"]  # once, not once for each run
    charts = [chart for category in layout["category"] for chart in category["chart"]]
    lines = {c["title"]: "|".join(c["multiline"]["tag"]) for c in charts if "multiline" in c}
    run = runs["sgd"]
    shown = {
        title: set(answer("plugin/custom_scalars/scalars", run=run, tag=tags)["tag_to_events"])
        for title, tags in lines.items()
    }
    assert shown["against updates"] == {"loss/train", "loss/val"}
    axes = {"examples seen": "by_sample", "epochs": "by_epoch", "milliseconds": "by_millisecond"}
    for title, axis in axes.items():
        assert shown[f"against {title}"] == {f"{axis}/loss/train", f"{axis}/loss/val"}
    assert shown["step size η, and from where on descent is unstable"] == {"lr"}
    assert shown["length of a step, relative to the parameters"] == {"step/ratio"}
    assert shown["norm"] == {"gradient/norm"}
    assert shown["norm, by layer"] == {"gradient/norm/layers.1", "gradient/norm/layers.3"}
    assert shown["cosine of one gradient with the next"] == {"gradient/cosine"}
    assert shown["signal to noise"] == {"noise/signal_to_noise"}
    assert shown["updates per second"] == {"time/updates_per_second"}
    (band,) = (c["margin"]["series"][0] for c in charts if "margin" in c)
    edges = {name: answer("plugin/scalars/scalars", run=run, tag=tag) for name, tag in band.items()}
    steps = {name: [step for _, step, _ in points] for name, points in edges.items()}
    assert steps["value"] == steps["lower"] == steps["upper"]  # else TensorBoard draws nothing
    numbers = {name: np.array([v for *_, v in points]) for name, points in edges.items()}
    assert (numbers["lower"] <= numbers["value"]).all()
    assert (numbers["value"] <= numbers["upper"]).all()


def test_images_are_the_landscapes(answer, url, outputs, runs):
    ((run, tags),) = answer("plugin/images/tags").items()
    assert run == f"{runs['sgd']}/landscape"
    assert set(tags) == {f"landscape/{n}" for n in ("landscape-1d", "landscape-2d", "trajectory")}
    for tag in tags:
        (image,) = answer("plugin/images/images", run=run, tag=tag, sample=0)
        assert image["step"] == 12580
        with urllib.request.urlopen(
            f"{url}data/plugin/images/individualImage?{image['query']}", timeout=30
        ) as png:
            assert png.read() == (outputs / run / f"{tag.split('/')[1]}.png").read_bytes()


def test_text_holds_the_configuration_and_the_end(answer, runs):
    for variant, run in runs.items():
        tags = answer("plugin/text/tags")[run]
        assert {tag.split("/")[0] for tag in tags} == {"configuration", "result"}
        texts = {
            tag.split("/")[0]: answer("plugin/text/text", run=run, tag=tag)[0]["text"]
            for tag in tags
        }
        assert f"variant: {variant}" in texts["configuration"]
        assert "max_epochs: 10" in texts["configuration"]
        assert "<strong>BUDGET</strong>: All" in texts["result"]
        tested = answer("plugin/scalars/scalars", run=run, tag="metric/accuracy/test")[-1][-1]
        row = texts["result"].partition("<td>accuracy</td>")[2].partition("</tr>")[0]
        assert float(row.split("<td>")[-1].partition("<")[0]) == pytest.approx(tested, rel=1e-5)


def test_hyperparameters_stand_beside_the_final_metrics(answer):
    experiment = answer("plugin/hparams/experiment", body={"experimentName": ""})
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"variant", "optimizer.lr", "data.batch_size", "schedule", "seed"} <= names
    first = [info["name"] for info in experiment["hparamInfos"]][:5]
    assert first == ["data.batch_size", "optimizer.lr", "schedule", "seed", "variant"]
    metrics = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert {"loss/test", "metric/accuracy/test", "loss/val"} <= metrics
    body = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING"],
        "colParams": [
            {"metric": {"tag": "loss/test"}, "includeInResult": True},
            {"hparam": "variant", "includeInResult": True},
        ],
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = answer("plugin/hparams/session_groups", body=body)["sessionGroups"]
    assert {group["hparams"]["variant"] for group in groups} == {"gd", "sgd", "minibatch"}
    assert all(group["metricValues"][0]["value"] > 0 for group in groups)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "digits-mlp-sgd/lr-auto_batch-1_seed-0_"),
        (["optimizer.lr=1e-05", "seed=3"], "digits-mlp-sgd/lr-1e-05_batch-1_seed-3_"),
        (["optimizer=gd", "data=csv"], "csv-mlp-gd/lr-auto_batch-full_seed-0_"),
        (["optimizer=minibatch", "~optimizer.lr"], "digits-mlp-minibatch/lr-own_batch-32_seed-0_"),
    ],
)
def test_the_runs_of_a_sweep_have_telling_names(words, name):
    config = compose([*words, "hydra.job.num=7"], None, whole=True)
    HydraConfig.instance().set_config(config)
    folder = config.hydra.sweep.subdir
    assert folder.startswith(name)
    assert re.fullmatch(r"[\d_-]+-7", folder.removeprefix(name))
    assert not set(folder) & set(':=,*?"<>|\\ ')  # for Windows, and for ckpt_path=…
    assert parse_override(f"ckpt_path={folder}/last.ckpt").value() == f"{folder}/last.ckpt"


@pytest.mark.slow
def test_a_killed_run_leaves_readable_curves(tmp_path):
    folder = tmp_path / "läufe mit leerzeichen"
    folder.mkdir()
    words = ["optimizer=sgd", "data=iris", "model=linear", "trainer.max_epochs=100000"]
    with subprocess.Popen(
        [sys.executable, str(SCRIPTS / "train.py"), *words, "instruments=off"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("outputs/*/*/metrics.csv")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        os.kill(process.pid, signal.SIGKILL)
    (run,) = folder.glob("outputs/*/*")
    assert not (run / "summary.json").exists()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    points = events.Scalars("by_epoch/loss/val")
    killed = max(path.stat().st_mtime for path in run.iterdir())
    assert len(points) > 10
    assert killed - 2 < points[-1].wall_time <= killed
    assert (
        b"max_epochs: 100000"
        in events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]
    )
    assert len(pd.read_csv(run / "metrics.csv")) > 10
