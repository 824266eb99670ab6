"""What TensorBoard itself answers about a sweep of the three variants."""

import json
import urllib.parse
import urllib.request

import pytest
from tensorboard import program

from gdtrain.experiment import train


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    from hydra import compose, initialize_config_dir

    from gdtrain.configuration import conf_directory

    root = tmp_path_factory.mktemp("runs with spaces, ü")
    for variant in ("gd", "sgd", "minibatch"):
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            config = compose("train", [f"optimizer={variant}", "trainer.max_epochs=10"])
        train(config, root / f"digits-mlp-{variant}" / "now")
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", "--logdir", str(root), "--port", "0", "--load_fast=false"])
    url = board.launch()

    def ask(path, body=None, **query):
        address = f"{url}data/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(address, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())

    import time

    for _ in range(60):
        if len(ask("plugin/scalars/tags")) == 3:
            break
        time.sleep(0.5)
    return ask


def test_runs_have_readable_names(answer):
    assert sorted(answer("runs")) == [
        "digits-mlp-gd/now",
        "digits-mlp-minibatch/now",
        "digits-mlp-sgd/now",
    ]


def test_losses_of_the_variants_lie_over_each_other_by_examples(answer):
    last = {}
    for run in answer("runs"):
        points = answer("plugin/scalars/scalars", run=run, tag="by_sample/loss/train")
        steps = [step for _, step, _ in points]
        assert steps == sorted(set(steps))
        last[run] = steps[-1]
    assert set(last.values()) == {10 * 1258}
    updates = {
        run: answer("plugin/scalars/scalars", run=run, tag="loss/train")[-1][1] for run in last
    }
    assert updates == {
        "digits-mlp-gd/now": 10,
        "digits-mlp-minibatch/now": 400,
        "digits-mlp-sgd/now": 12580,
    }


def test_no_tag_but_those_of_the_contract(answer):
    for tags in answer("plugin/scalars/tags").values():
        assert set(tags) == {
            "loss/train",
            "loss/val",
            "loss/test",
            "lr",
            "metric/accuracy/val",
            "metric/accuracy/test",
            "by_sample/loss/train",
            "by_sample/loss/val",
        }


def test_training_and_validation_loss_share_a_chart(answer):
    layout = answer("plugin/custom_scalars/layout")
    charts = [chart for category in layout["category"] for chart in category["chart"]]
    assert ["loss/train", "loss/val"] in [chart["multiline"]["tag"] for chart in charts]


def test_hyperparameters_stand_beside_the_final_metrics(answer):
    experiment = answer("plugin/hparams/experiment", body={"experimentName": ""})
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"variant", "optimizer.lr", "data.batch_size", "schedule", "seed"} <= names
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
