"""What is said of runs with known curves: sentences, portraits and tables."""

import numpy as np
import pytest
from known_runs import falling, leave_run

from gdtrain.reporting.comparison import compare
from gdtrain.reporting.finished import find_runs
from gdtrain.reporting.page import plot_costs
from gdtrain.reporting.text import Report, rounded


def test_costs_and_words_of_known_curves(two):
    compared = compare(find_runs(two)[0])
    # The worst run's best: gd with seed 2.
    assert compared.target == pytest.approx(1.02 / 10)
    gd, sgd = compared.contenders
    reached = gd.reached(compared.target)
    # Between updates 9 and 10 on a line from f/9 to f/10.
    expected = [9 + (f / 9 - 0.102) / (f / 9 - f / 10) for f in (1, 1.01, 1.02)]
    assert reached["updates"] == pytest.approx(expected)
    ratio = np.median(sgd.reached(compared.target)["updates"]) / np.median(expected)
    by_updates, by_examples, by_seconds, end, _ = [*Report(compared).sentences(), ""]
    assert by_updates.startswith("Counted in updates, gd is the cheapest way to a training loss of")
    assert f"sgd needs {ratio:.0f} times as many." in by_updates
    assert by_examples.startswith("Counted in examples, sgd is the cheapest")
    assert f"gd needs {100 / ratio:.2g} times as many." in by_examples
    assert f"gd needs {100 / ratio:.2g} times as many." in by_seconds
    assert "gd has the lowest loss over all training examples" in end
    told = Report(compared).portraits()
    assert "all examples, so an epoch of 100 has 1 update." in told["gd"]
    assert f"It buys the fewest updates (sgd needs {ratio:.0f} times as many)." in told["gd"]
    assert f"It costs {100 / ratio:.2g} times the examples of sgd" in told["gd"]
    assert "one example, so an epoch of 100 has 100 updates" in told["sgd"]


def test_ranges_that_overlap_are_not_told_apart(tmp_path):
    for seed, factor in enumerate((1.0, 1.2, 1.4)):
        leave_run(tmp_path / f"a{seed}", "gd", falling(factor, 20), seed=seed)
        leave_run(tmp_path / f"b{seed}", "minibatch", falling(1.1 * factor, 20), seed=seed)
    compared = compare(find_runs(tmp_path)[0])
    assert "minibatch is within the seeds' spread of it." in Report(compared).sentences()[0]
    assert (
        "do not tell it from the best of the others in updates (gd)"
        in (Report(compared).portraits()["minibatch"])
    )


def test_a_target_that_not_all_reach(two):
    compared = compare(find_runs(two)[0], target=0.1005)
    gd, sgd = Report(compared).costs()
    assert gd["updates"] == gd["seconds"] == "1 of 3 did"
    assert "did" not in sgd["updates"]
    assert Report(compared).sentences()[0].endswith(" gd did not come to it with every seed.")
    assert "1 of its 3 runs came to a training loss of 0.101" in Report(compared).portraits()["gd"]
    nobody = compare(find_runs(two)[0], target=1e-9)
    assert Report(nobody).sentences()[0].startswith("Counted in updates: nobody came to")
    assert Report(nobody).costs()[0]["updates"] == "0 of 3 did"
    (axes,) = plot_costs(nobody, "updates").axes
    assert [text.get_text() for text in axes.texts] == ["not reached by every seed"] * 2
    assert [rounded(v) for v in (np.nan, 0, 1234.5, 0.012345)] == ["–", "0", "1,234", "0.0123"]


def test_a_run_that_recovered_is_told(tmp_path):
    for seed in range(3):
        numbers = {"recoveries": [{"update": 3, "lr": 1.0}] * (seed > 0)}
        summary = {"stop_numbers": numbers}
        leave_run(tmp_path / f"a{seed}", "gd", falling(1, 5), seed=seed, summary=summary)
        leave_run(tmp_path / f"b{seed}", "sgd", falling(1, 5), seed=seed)
    told = [s for s in Report(compare(find_runs(tmp_path)[0])).sentences() if "diverged" in s]
    assert told == [
        "2 of 3 runs of gd diverged on the way and went on with a smaller step size than was set."
    ]


def test_one_seed_shows_no_spread(tmp_path):
    leave_run(tmp_path / "a", "gd", falling(1, 5))
    leave_run(tmp_path / "b", "sgd", falling(1, 5), each=1)
    said = Report(compare(find_runs(tmp_path)[0])).sentences()
    assert said[-1].startswith("With one seed a contender shows no spread")


def test_noise_stands_in_the_table_where_it_was_measured(tmp_path):
    noise = {"summary": {"instruments": {"noise_scale": {"value": 45.0}}}}
    leave_run(tmp_path / "a", "gd", [2, 1])
    leave_run(tmp_path / "b", "sgd", [2, 1], **noise)
    first, second = Report(compare(find_runs(tmp_path)[0])).ends()
    assert (first["gradient noise scale"], second["gradient noise scale"]) == ("–", "45")
    leave_run(tmp_path / "other" / "a", "gd", [2, 1])
    leave_run(tmp_path / "other" / "b", "sgd", [2, 1])
    assert "gradient noise scale" not in Report(compare(find_runs(tmp_path / "other")[0])).ends()[0]


@pytest.mark.parametrize(
    ("name", "best"), [("accuracy", "highest"), ("r2", "highest"), ("mae", "lowest")]
)
def test_the_direction_of_a_metric(tmp_path, name, best):
    for folder, value in (("gd", 0.9), ("sgd", 0.5)):
        metrics = {"loss/train": 1.0, f"metric/{name}/test": value}
        leave_run(tmp_path / folder, folder, [2, 1], metrics=metrics)
    said = Report(compare(find_runs(tmp_path)[0])).sentences()[4]
    winner = "gd" if best == "highest" else "sgd"
    assert said.startswith(f"At the end, {winner} has the {best} test {name}:")


def test_a_lost_run_is_named_and_does_not_count(two):
    leave_run(two / "sgd-9", "sgd", [9.0], each=1, seed=9, reason="DIVERGED")
    leave_run(two / "sgd-8", "sgd", [], each=1, seed=8, reason="NON_FINITE")
    compared = compare(find_runs(two)[0])
    assert [len(c.runs) for c in compared.contenders] == [3, 3]
    assert Report(compared).absent() == [
        "sgd, seed 8: NON_FINITE. Words.",
        "sgd, seed 9: DIVERGED. Words.",
    ]
