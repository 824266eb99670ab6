"""Runs with known curves compared: medians, bands, contenders and their names, what is refused."""

import math
import re
import shutil

import numpy as np
import pytest
from known_runs import falling, leave_run

from gdtrain.reporting.comparison import compare
from gdtrain.reporting.finished import find_runs, read_run
from gdtrain.reporting.text import Report


def test_tables_of_another_name_or_target_are_other_data(tmp_path):
    for i, data in enumerate(
        ({"path": "a.csv"}, {"path": "b.csv"}, {"path": "a.csv", "target": "z"})
    ):
        leave_run(tmp_path / f"{i}", "gd" if i else "sgd", falling(1, 5), settings={"data": data})
    runs = [read_run(tmp_path / f"{i}") for i in range(3)]
    for pair, said in (((0, 1), "a.csv (100 examples); b.csv"), ((0, 2), "a.csv, z (100")):
        with pytest.raises(ValueError, match=re.escape(said)):
            compare([runs[i] for i in pair])


def test_median_and_band_from_where_all_seeds_have_begun(tmp_path):
    curves = [np.linspace(9 - seed, 1 + seed / 2, 20 + 3 * seed) for seed in range(3)]
    for seed, losses in enumerate(curves):
        leave_run(tmp_path / f"a{seed}", "gd", losses, seed=seed, pace=1 + seed)
        leave_run(tmp_path / f"b{seed}", "sgd", losses, seed=seed)
    first, _ = compare(find_runs(tmp_path)[0]).contenders
    x, middle, low, high = first.band("seconds")
    assert (x[0], x[-1]) == pytest.approx((3, 78))  # the last begins at 3 s and ends at 26 · 3 s
    values = [
        np.interp(x, (1 + seed) * np.arange(1, len(c) + 1), c) for seed, c in enumerate(curves)
    ]
    assert middle == pytest.approx(np.sort(values, axis=0)[1])
    assert low == pytest.approx(np.min(values, axis=0))
    assert high == pytest.approx(np.max(values, axis=0))


def test_a_validation_curve_is_as_it_was_measured(tmp_path):
    for seed in range(3):
        val = [3.0 + seed, 1.0 + seed, 2.0 + 2 * seed]
        leave_run(tmp_path / f"a{seed}", "gd", falling(1, 5), seed=seed, val=val)
        leave_run(tmp_path / f"b{seed}", "sgd", falling(1, 5), seed=seed, val=val[: 2 + seed])
    compared = compare(find_runs(tmp_path)[0])
    first, second = compared.contenders
    assert first.runs[1].val.losses.tolist() == [4, 2, 4]
    assert first.runs[1].val.examples.tolist() == [100, 200, 300]
    x, middle, low, high = first.band("updates", "val")
    assert x.tolist() == [1, 2, 3]
    assert (middle.tolist(), low.tolist(), high.tolist()) == ([4, 2, 4], [3, 1, 2], [5, 3, 6])
    assert second.band("updates", "val")[1].tolist() == [4, 2, 4]  # one ended before
    assert len(first.band("updates", "val", points=2)[0]) == 2
    assert compared.validated
    (told,) = [s for s in Report(compared).sentences() if s.startswith("The validation loss")]
    assert told == (
        "The validation loss of gd was lowest at update 2, 2 (1–3), and rose to 4 (2–6): what it "
        "learned later did not help on held-out examples."
    )
    assert second.runs[0].val.losses.tolist() == [3, 1]  # has not risen, so nothing is said


def test_contenders_are_named_by_what_they_differ_in(tmp_path):
    for lr in (0.1, 0.01):
        for seed in range(2):
            settings = {"optimizer": {"lr": lr}, "callbacks": {"curves": {"points": seed + 1}}}
            leave_run(tmp_path / f"s{lr}-{seed}", "sgd", [2, 1], seed=seed, settings=settings)
    automatic = {"optimizer": {"lr": "auto"}}
    leave_run(tmp_path / "gd", "gd", [2, 1], settings=automatic)
    rule = {"step_size": {"_target_": "gdtrain.step_sizes.Armijo", "c": 1e-4}}
    leave_run(tmp_path / "gd-armijo", "gd", [2, 1], settings=automatic | rule)
    compared = compare(find_runs(tmp_path)[0])
    names = {c.name: len(c.runs) for c in compared.contenders}
    assert names == {"gd": 1, "gd step_size=Armijo": 1, "sgd lr=0.01": 2, "sgd lr=0.1": 2}


def test_a_run_that_was_made_twice_counts_once(two):
    shutil.copytree(two / "gd-1", two / "gd-again")
    compared = compare(find_runs(two)[0])
    assert [len(c.runs) for c in compared.contenders] == [3, 3]
    (said,) = Report(compared).absent()
    assert re.search(r"gd-again: the settings and the seed of .*gd-1, again\.$", said)


def test_runs_made_in_python_are_told_apart_by_what_their_summary_says(tmp_path):
    leave_run(tmp_path / "a", "minibatch", [2, 1], each=10, summary={"parameters": 15})
    leave_run(tmp_path / "b", "minibatch", [2, 1], each=50, summary={"parameters": 15})
    names = [c.name for c in compare(find_runs(tmp_path)[0]).contenders]
    assert names == ["minibatch batch_size=10", "minibatch batch_size=50"]


def test_what_is_refused(two, tmp_path):
    runs, _ = find_runs(two)
    with pytest.raises(ValueError, match="Received: gd alone"):
        compare([run for run in runs if run.variant == "gd"])
    with pytest.raises(ValueError, match="target must be a number in"):
        compare(runs, target=math.inf)
    other = leave_run(tmp_path / "other", "sgd", [2, 1], settings={"data": {"name": "another"}})
    with pytest.raises(ValueError, match=r"another \(100 examples\); known \(100 examples\)"):
        compare([*runs, read_run(other)])
    hinge = {"loss": {"_target_": "gdtrain.losses.Hinge"}}
    other = leave_run(tmp_path / "hinge", "sgd", [2, 1], settings=hinge)
    with pytest.raises(ValueError, match=r"different losses.*Hinge"):
        compare([*runs, read_run(other)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There is no finished run in"):
        find_runs(tmp_path / "empty")
