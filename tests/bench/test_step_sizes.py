"""The comparison of step-size rules with the best constant rate."""

import json

import pytest
import step_sizes
import torch
from step_sizes import Score, Task


def test_a_gap_is_relative_to_the_way_from_the_start_to_the_optimum():
    score = Score("a task", 1, optimum=1.0, start=5.0, best_rate=0.1, chosen=1.9, best=2.0)
    assert score.gap(3.0) == 0.25
    assert score.noise == pytest.approx(0.025)


def test_the_optimum_of_linear_models_is_exact():
    for data, model in (("breast_cancer", "linear"), ("breast_cancer", "svm"), ("wine", "linear")):
        best = step_sizes.optimum(data, "standard", model)
        watch = step_sizes.train(Task(data, "standard", model, "full"), 0, 1.0)
        assert best - 1e-7 <= watch.values[-1] < best + 0.1
    assert step_sizes.optimum("digits", "standard", "relu") == 0


def test_a_third_of_the_tasks_is_unseen():
    assert len(set(step_sizes.TASKS)) == len(step_sizes.TASKS) > 90
    assert len(step_sizes.UNSEEN) == len(step_sizes.TASKS) // 3


def test_generated_data_are_what_they_are_said_to_be():
    assert len(set(step_sizes.MORE)) == len(step_sizes.MORE) == 6 * 12 + 9
    for name, outputs in (("noisy", 1), ("five classes", 5), ("moons", 1), ("iris", 3)):
        task = Task(name, "standard", "linear", "full")
        data, model, _, _ = step_sizes._problem(task, 0)
        assert model(data.examples("train")[0][:2]).shape == (2, outputs)
        best = step_sizes.optimum(name, "standard", "linear")
        watch = step_sizes.train(task, 0, "auto")
        assert best - 1e-7 <= watch.values[-1] < best + 1e-3 * watch.values[0]


@pytest.mark.parametrize("how", ["auto", "bb", 1.0])
def test_passes_are_counted_with_what_a_rule_looks_at(how):
    task = Task("wine", "standard", "linear", "full")
    watch = step_sizes.train(task, 0, how)
    assert watch.at[0] == 0
    assert watch.at == sorted(watch.at)
    assert task.passes - 3 <= watch.at[-1] <= task.passes + 2
    assert watch.values[-1] < watch.values[0]
    task = Task("wine", "standard", "linear", 32)
    if how == "auto":
        watch = step_sizes.train(task, 0, how)
        assert 0 < watch.at[0] <= 0.1 * task.passes  # the race
        assert watch.at[-1] <= task.passes + 1


def test_a_table_a_plot_and_numbers(tmp_path, capsys):
    task = "wine, standard, linear, B = 32"
    numbers, plot = tmp_path / "n.json", tmp_path / "p.png"
    arguments = ["--only", task, "--rules", "auto,sps,bb", "--choosing", "1", "--scoring", "1"]
    assert step_sizes.main([*arguments, "--json", str(numbers), "--plot", str(plot)]) == 0
    (row,) = json.loads(numbers.read_text())["rows"]
    assert row["ends"].keys() == {"auto", "sps"}
    assert row["ends"]["auto"][0] < row["start"]
    assert plot.stat().st_size > 10_000
    assert "stochastic" in capsys.readouterr().out


def test_unknown_rules_and_tasks_are_told(capsys):
    for arguments in (["--rules", "newton"], ["--only", "imagenet"]):
        with pytest.raises(SystemExit) as error:
            step_sizes.main(arguments)
        assert error.value.code == 2
    assert "Received: newton" in capsys.readouterr().err
    assert torch.is_grad_enabled()
