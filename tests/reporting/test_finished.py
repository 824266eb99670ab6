"""Finished runs as they are read: known rows become known curves; what is damaged is named."""

import shutil

import numpy as np
import pytest
from known_runs import falling, leave_run

from gdtrain.reporting.finished import find_runs, read_run


def test_points_are_means_over_the_last_quarter_and_at_most_a_pass(tmp_path):
    generator = np.random.default_rng(0)
    losses = generator.uniform(1, 2, 200)
    run = read_run(leave_run(tmp_path / "run", "sgd", losses, each=1, every=3, size=90))
    assert run.train.examples[0] == 33  # the first row at which 32 were seen
    for i in range(10, 200):
        end = 3 * (i + 1)
        start = end - min(90, max(end / 4, 32))
        inside = [losses[j] for j in range(i + 1) if 3 * j >= start]
        assert run.train.losses[i - 10] == pytest.approx(sum(inside) / len(inside), rel=1e-9)
    assert run.train.losses[-50:].std() < losses[-50:].std() / 3


def test_small_losses_are_not_lost_beside_large_ones(tmp_path):
    losses = [1e3 * 0.7**t for t in range(200)]
    run = read_run(leave_run(tmp_path / "run", "gd", losses))
    assert run.train.losses == pytest.approx(np.array(losses), rel=1e-12, abs=0)


def test_a_folder_with_brackets_in_its_name_is_a_folder(tmp_path):
    leave_run(tmp_path / "model.hidden=[8]" / "gd", "gd", falling(1, 5))
    assert len(find_runs(tmp_path / "model.hidden=[8]")[0]) == 1
    assert len(find_runs(tmp_path / "model*")[0]) == 1


def test_a_few_easy_examples_are_no_loss(tmp_path):
    losses = np.full(100, 3.0)
    losses[2:7] = 0.0  # of an unstable run, for one
    run = read_run(leave_run(tmp_path / "run", "sgd", losses, each=1, size=90))
    assert run.train.reach(2.0) is None
    short = read_run(leave_run(tmp_path / "short", "sgd", losses[:10], each=1, size=90))
    assert short.train.losses == pytest.approx([1.5])  # all that there is
    tiny = read_run(leave_run(tmp_path / "tiny", "sgd", losses[:20], each=1, size=4))
    assert tiny.train.examples[0] == 4


def test_rows_of_a_resumed_run_count_once_and_end_before_what_is_not_finite(tmp_path):
    folder = leave_run(tmp_path / "run", "gd", [4.0, 2.0, 1.0])
    with open(folder / "metrics.csv", "a") as file:
        file.write("300,0.5,,0.4,3\n400,nan,,0.5,4\n500,0.1,,0.6,5\n")
    run = read_run(folder)
    assert run.train.updates.tolist() == [1, 2, 3]
    assert run.train.losses.tolist() == [4, 2, 0.5]


def test_a_target_is_reached_on_a_straight_line_between_two_points(tmp_path):
    run = read_run(leave_run(tmp_path / "run", "gd", [4.0, 2.0, 1.0], pace=0.5))
    assert run.train.reach(1.5) == pytest.approx({"updates": 2.5, "examples": 250, "seconds": 1.25})
    assert run.train.reach(5) == {"updates": 1, "examples": 100, "seconds": 0.5}
    assert run.train.reach(0.5) is None


def test_runs_that_cannot_be_read_are_named_and_left_out(two):
    (two / "unfinished").mkdir()
    (two / "unfinished" / "config.yaml").write_text("variant: gd\n")
    shutil.copytree(two / "gd-0", two / "damaged")
    (two / "damaged" / "summary.json").write_text("{")
    shutil.copytree(two / "gd-0", two / "uncurved")
    (two / "uncurved" / "metrics.csv").unlink()
    shutil.copytree(two / "gd-0", two / "older")
    (two / "older" / "metrics.csv").write_text("step,loss/train\n1,2.0\n")
    runs, left_out = find_runs(two)
    assert len(runs) == 6
    damaged, older, uncurved, unfinished = left_out
    assert "damaged" in damaged
    assert older.endswith("has no column examples.")
    assert "logger=csv" in uncurved
    assert "has no summary.json" in unfinished
