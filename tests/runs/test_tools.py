"""From a checkpoint to predictions and metrics of new files, as the commands make them."""

import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris

import gdtrain
from gdtrain import cli
from gdtrain.cli.composition import compose
from gdtrain.runs.checkpoints import load_trained
from gdtrain.runs.tools import evaluate, landscape, predict_file
from gdtrain.runs.train import in_keys, train


@pytest.fixture(scope="module")
def table():
    iris = load_iris(as_frame=True)
    frame = iris.data.set_axis(list("abcd"), axis="columns")
    frame["kind"] = np.array(["NA", "None", "virginica"])[iris.target]
    return frame


@pytest.fixture(scope="module")
def checkpoint(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    table.to_csv(folder / "table.csv.gz", index=False)
    words = "optimizer=gd model=linear data=csv optimizer.lr=1.0 trainer.max_epochs=30 logger=none"
    words += f" instruments=off data.path={folder}/table.csv.gz"
    train(compose(words.split(), None), folder / "run")
    return folder / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture
def said(monkeypatch, capsys, checkpoint):
    """From a command and its words to its exit code, output and errors."""

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["command", f"ckpt_path={checkpoint}", *words])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return run


def scores(checkpoint, table):
    """Softmax regression by hand, on the columns as they were trained on."""
    trained = load_trained(checkpoint)
    w, b = (p.detach().double().numpy() for p in trained.module.model.parameters())
    learnt = trained.data.preprocessing
    return (table[list("abcd")].to_numpy() - learnt.mean) / learnt.scale @ w.T + b


def test_predictions_of_a_table_in_another_order(checkpoint, table, tmp_path, said):
    new = table[["d", "c", "kind", "b", "a"]]
    new.to_csv(tmp_path / "NEW.TSV", sep="\t")  # with pandas' row names
    expected = np.array(["NA", "None", "virginica"])[scores(checkpoint, table).argmax(1)]
    assert set(expected) == set(table["kind"])
    for name in ("out.csv", "out.tsv", "sub/out.csv.gz"):
        words = f"input={tmp_path}/NEW.TSV", f"output={tmp_path / name}"
        code, out, _ = said(cli.predict_main, *words)
        assert code == 0
        assert out == f"150 predictions in {tmp_path / name}\n"
        answers = pd.read_csv(tmp_path / name, keep_default_na=False)["prediction"]
        assert answers.tolist() == expected.tolist()


def test_an_output_that_cannot_be_is_told_before_any_work(checkpoint, table, tmp_path, monkeypatch):
    table.to_csv(tmp_path / "new.csv", index=False)
    monkeypatch.setattr("gdtrain.runs.tools.load_trained", None)  # nothing is called
    for output, error, message in (
        (tmp_path, ValueError, "output must name a new file. Received: .*, a folder"),
        (tmp_path / "new.csv", FileExistsError, "exists already"),
        (tmp_path / "new.csv" / "out.csv", ValueError, "cannot be written"),
    ):
        with pytest.raises(error, match=message):
            predict_file(checkpoint, tmp_path / "new.csv", output)
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]


def test_nothing_is_left_of_predictions_that_fail(checkpoint, table, tmp_path, monkeypatch):
    table.to_csv(tmp_path / "new.csv", index=False)

    def full(self, path, **options):
        path.write_text("prediction\nNA\n")
        raise OSError("No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="No space"):
        predict_file(checkpoint, tmp_path / "new.csv", tmp_path / "deep" / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]


def test_all_bad_columns_are_on_the_screen(table, tmp_path, said):
    new = table.astype(object)
    new.loc[3, "a"], new.loc[4, "c"] = "red", None
    new.to_csv(tmp_path / "new.csv", index=False)
    words = f"input={tmp_path}/new.csv", f"output={tmp_path}/out.csv"
    code, out, err = said(cli.predict_main, *words)
    assert (code, out) == (2, "")
    assert "column 'a', line 5: 'red', which is text" in err
    assert "column 'c', line 6: empty" in err
    code, _, err = said(cli.predict_main, *words, "header=maybe")
    assert code == 2
    assert "header must be true, false or auto. Received: header=maybe" in err


def test_metrics_of_a_new_labelled_file(checkpoint, table, tmp_path, said):
    new = table.sample(40, random_state=0)[["kind", "c", "d", "a", "b"]]
    new.to_csv(tmp_path / "new.csv", index=False)
    code, out, _ = said(cli.evaluate_main, f"input={tmp_path}/new.csv")
    assert code == 0
    values = {tag: float(value) for tag, value in map(str.split, out.splitlines())}
    predict_file(checkpoint, tmp_path / "new.csv", tmp_path / "out.csv")
    answers = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)["prediction"].to_numpy()
    assert values["metric/accuracy/test"] == pytest.approx((answers == new["kind"]).mean())
    z = scores(checkpoint, new)
    own = z[np.arange(40), new["kind"].map({"NA": 0, "None": 1, "virginica": 2})]
    expected = (np.log(np.exp(z).sum(1)) - own).mean()
    assert values["loss/test"] == pytest.approx(expected, rel=1e-5)


def test_metrics_of_a_new_file_for_a_model_made_in_python(table, tmp_path):
    numbers = table[list("abcd")]
    result = gdtrain.fit("linear", numbers, table["kind"], variant="gd", epochs=20, progress=False)
    table.to_csv(tmp_path / "new.csv", index=False)
    metrics = evaluate(result.save(tmp_path / "model.pt"), input_path=tmp_path / "new.csv")
    right = (result.predict(numbers) == table["kind"].to_numpy()).mean()
    assert metrics["metric/accuracy/test"] == pytest.approx(right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "sort"}, "has no column 'sort'"),
        ({"overrides": {"root": "data"}}, "set one of them. Received: both, data.root"),
        ({"input_path": None, "target": "kind"}, r"target=… and header=… are of a new file"),
        ({"header": False}, "lacks the features 'a', 'b', 'c', 'd'"),
        ({"input_path": "away.csv"}, "There is no file away.csv. Set input to"),
    ],
)
def test_a_new_file_that_cannot_be_evaluated(checkpoint, table, tmp_path, options, message):
    table.to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(checkpoint, **{"input_path": tmp_path / "new.csv", **options})


def test_other_data_in_place_of_the_training_data_leads_to_input(checkpoint, table, tmp_path):
    table[:100].to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(ValueError, match="A new file is tested on with input=FILE"):
        evaluate(checkpoint, {"path": str(tmp_path / "new.csv")})


def test_a_label_that_training_did_not_have_is_named_with_its_line(checkpoint, table, tmp_path):
    new = table.copy()
    new.loc[7, "kind"] = "rose"
    new.to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(ValueError, match=r"new\.csv, line 9: Labels must be among .*'rose'"):
        evaluate(checkpoint, input_path=tmp_path / "new.csv")


def test_a_change_that_the_data_does_not_take_is_told_with_what_it_takes(said):
    code, out, err = said(cli.evaluate_main, "data.pathh=x.csv")
    assert (code, out) == (2, "")
    assert "data.pathh: CSVDataModule has no option pathh. Did you mean path?" in err


def test_a_small_amount_of_memory_is_told_as_it_is(checkpoint):
    with pytest.raises(ValueError, match=r"take about 0\.0\d+ MB of memory, more than megabytes="):
        landscape(checkpoint, megabytes=0.001)


def test_a_message_is_said_with_the_keys_that_were_typed():
    plain = {"seed": 1, "callbacks": {"a": {"share": 0.1}, "b": {"share": 7}}, "data": {"seed": 1}}
    found = in_keys("share must lie in (0, 1]. Received: 7.", plain)
    assert found == "callbacks.b.share must lie in (0, 1]. Received: callbacks.b.share=7."
    for text in (
        "share must lie in (0, 1]. Received: 3.",  # which of two, nobody knows
        "seed must be a whole number. Received: seed=1.",
        "data.seed must be a whole number. Received: data.seed=1.",
        "other must be > 0. Received: other=1.",
    ):
        assert in_keys(text, plain) == text
