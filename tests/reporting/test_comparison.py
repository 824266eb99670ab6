"""Comparing runs: curves, costs and words on runs with known curves; the report; the command."""

import csv
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import BrokenExecutor
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from gdtrain import cli
from gdtrain.cli import compare as compare_command
from gdtrain.reporting.comparison import CLOCKS, compare, find_runs, read_run
from gdtrain.reporting.page import page, plot, plot_costs, save

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")


def leave_run(
    folder,
    variant,
    losses,
    *,
    each=100,
    pace=0.1,
    seed=0,
    size=100,
    every=1,
    reason="BUDGET",
    val=(),
    **more,
):
    """A run's folder with known curves: row i after (i + 1)·every updates of `each` examples."""
    folder.mkdir(parents=True)
    config = {"variant": variant, "seed": seed, "data": {"name": "known", "seed": seed}}
    config |= more.get("settings", {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    updates = len(losses) * every
    summary = {
        "variant": variant,
        "updates": updates,
        "examples_seen": updates * each,
        "epochs": updates * each / size,
        "fit_seconds": updates * pace,
        "stop_reason": reason,
        "stop_message": "Words.",
        "metrics": more.get("metrics", {"loss/train": losses[-1] if len(losses) else None}),
        "seed": seed,
        "batch_size": each,
        "data": {"train": size, "val": 0, "test": 0},
        "versions": {"gdtrain": "0"},
        **more.get("summary", {}),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["examples", "loss/train", "loss/val", "seconds", "step"])
        for i, loss in enumerate(losses):
            done = (i + 1) * every
            writer.writerow([done * each, loss, "", round(done * pace, 4), done])
            if i < len(val):
                writer.writerow([done * each, "", val[i], round(done * pace, 4), done])
    return folder


def falling(factor, count):
    return [factor / (i + 1) for i in range(count)]


@pytest.fixture
def two(tmp_path):
    """gd comes to 0.1 at update 10; sgd, of which a pass has 100 updates, ten times as fast."""
    for seed in range(3):
        slower = 1 + 0.01 * seed
        leave_run(tmp_path / "runs" / f"gd-{seed}", "gd", falling(slower, 10), seed=seed)
        rows = [slower * 0.8**i for i in range(20)]
        leave_run(
            tmp_path / "runs" / f"sgd-{seed}", "sgd", rows, each=1, pace=0.001, every=40, seed=seed
        )
    return tmp_path / "runs"


# ---------------------------------------------------------------------- curves


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


def test_tables_of_another_name_or_target_are_other_data(tmp_path):
    for i, data in enumerate(
        ({"path": "a.csv"}, {"path": "b.csv"}, {"path": "a.csv", "target": "z"})
    ):
        leave_run(tmp_path / f"{i}", "gd" if i else "sgd", falling(1, 5), settings={"data": data})
    runs = [read_run(tmp_path / f"{i}") for i in range(3)]
    for pair, said in (((0, 1), "a.csv (100 examples); b.csv"), ((0, 2), "a.csv, z (100")):
        with pytest.raises(ValueError, match=re.escape(said)):
            compare([runs[i] for i in pair])


def test_a_few_easy_examples_are_no_loss(tmp_path):
    losses = np.full(100, 3.0)
    losses[2:7] = 0.0  # of an unstable run, for one
    run = read_run(leave_run(tmp_path / "run", "sgd", losses, each=1, size=90))
    assert run.train.reach(2.0) is None
    short = read_run(leave_run(tmp_path / "short", "sgd", losses[:10], each=1, size=90))
    assert short.train.losses == pytest.approx([1.5])  # all that there is
    tiny = read_run(leave_run(tmp_path / "tiny", "sgd", losses[:20], each=1, size=4))
    assert tiny.train.examples[0] == 4


def test_full_batch_rows_stay_as_they_are(tmp_path):
    run = read_run(leave_run(tmp_path / "run", "gd", falling(1, 30)))
    assert run.train.losses == pytest.approx(np.array(falling(1, 30)), rel=1e-12)


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
    (told,) = [s for s in compared.sentences() if s.startswith("The validation loss")]
    assert told == (
        "The validation loss of gd was lowest at update 2, 2 (1–3), and rose to 4 (2–6): what it "
        "learned later did not help on held-out examples."
    )
    assert second.runs[0].val.losses.tolist() == [3, 1]  # has not risen, so nothing is said


def test_without_validation_there_is_no_such_curve(two):
    compared = compare(find_runs(two)[0])
    assert not compared.validated
    assert not len(compared.contenders[0].band("updates", "val")[0])
    assert "Validation loss" not in page(compared)
    for i, folder in enumerate(sorted(two.iterdir())):  # of one contender only
        if i < 3:
            with open(folder / "metrics.csv", "a") as file:
                file.write("100,,2.0,0.1,1\n200,,1.0,0.2,2\n")
    text = page(compare(find_runs(two)[0]))
    assert text.count("<svg") == 9
    assert "Validation loss against updates: gd from 2 at 1 to 1 at 2." in text


# ---------------------------------------------------------------------- costs and words


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
    by_updates, by_examples, by_seconds, end, _ = [*compared.sentences(), ""]
    assert by_updates.startswith("Counted in updates, gd is the cheapest way to a training loss of")
    assert f"sgd needs {ratio:.0f} times as many." in by_updates
    assert by_examples.startswith("Counted in examples, sgd is the cheapest")
    assert f"gd needs {100 / ratio:.2g} times as many." in by_examples
    assert f"gd needs {100 / ratio:.2g} times as many." in by_seconds
    assert "gd has the lowest loss over all training examples" in end
    told = compared.portraits()
    assert "all examples, so an epoch of 100 has 1 update." in told["gd"]
    assert f"It buys the fewest updates (sgd needs {ratio:.0f} times as many)." in told["gd"]
    assert f"It costs {100 / ratio:.2g} times the examples of sgd" in told["gd"]
    assert "one example, so an epoch of 100 has 100 updates" in told["sgd"]


def test_ranges_that_overlap_are_not_told_apart(tmp_path):
    for seed, factor in enumerate((1.0, 1.2, 1.4)):
        leave_run(tmp_path / f"a{seed}", "gd", falling(factor, 20), seed=seed)
        leave_run(tmp_path / f"b{seed}", "minibatch", falling(1.1 * factor, 20), seed=seed)
    compared = compare(find_runs(tmp_path)[0])
    assert "minibatch is within the seeds' spread of it." in compared.sentences()[0]
    assert (
        "do not tell it from the best of the others in updates (gd)"
        in (compared.portraits()["minibatch"])
    )


def test_a_target_that_not_all_reach(two):
    compared = compare(find_runs(two)[0], target=0.1005)
    gd, sgd = compared.costs()
    assert gd["updates"] == gd["seconds"] == "1 of 3 did"
    assert "did" not in sgd["updates"]
    assert compared.sentences()[0].endswith(" gd did not come to it with every seed.")
    assert "1 of its 3 runs came to a training loss of 0.101" in compared.portraits()["gd"]
    nobody = compare(find_runs(two)[0], target=1e-9)
    assert nobody.sentences()[0].startswith("Counted in updates: nobody came to")
    assert "0 of 3 did" in page(nobody)


def test_a_run_that_recovered_is_told(tmp_path):
    for seed in range(3):
        numbers = {"recoveries": [{"update": 3, "lr": 1.0}] * (seed > 0)}
        summary = {"stop_numbers": numbers}
        leave_run(tmp_path / f"a{seed}", "gd", falling(1, 5), seed=seed, summary=summary)
        leave_run(tmp_path / f"b{seed}", "sgd", falling(1, 5), seed=seed)
    told = [s for s in compare(find_runs(tmp_path)[0]).sentences() if "diverged" in s]
    assert told == [
        "2 of 3 runs of gd diverged on the way and went on with a smaller step size than was set."
    ]


def test_one_seed_shows_no_spread(tmp_path):
    leave_run(tmp_path / "a", "gd", falling(1, 5))
    leave_run(tmp_path / "b", "sgd", falling(1, 5), each=1)
    said = compare(find_runs(tmp_path)[0]).sentences()
    assert said[-1].startswith("With one seed a contender shows no spread")


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
    (said,) = compared.absent()
    assert re.search(r"gd-again: the settings and the seed of .*gd-1, again\.$", said)


def test_runs_made_in_python_are_told_apart_by_what_their_summary_says(tmp_path):
    leave_run(tmp_path / "a", "minibatch", [2, 1], each=10, summary={"parameters": 15})
    leave_run(tmp_path / "b", "minibatch", [2, 1], each=50, summary={"parameters": 15})
    names = [c.name for c in compare(find_runs(tmp_path)[0]).contenders]
    assert names == ["minibatch batch_size=10", "minibatch batch_size=50"]


def test_noise_stands_in_the_table_where_it_was_measured(tmp_path):
    noise = {"summary": {"instruments": {"noise_scale": {"value": 45.0}}}}
    leave_run(tmp_path / "a", "gd", [2, 1])
    leave_run(tmp_path / "b", "sgd", [2, 1], **noise)
    first, second = compare(find_runs(tmp_path)[0]).ends()
    assert (first["gradient noise scale"], second["gradient noise scale"]) == ("–", "45")
    leave_run(tmp_path / "other" / "a", "gd", [2, 1])
    leave_run(tmp_path / "other" / "b", "sgd", [2, 1])
    assert "gradient noise scale" not in compare(find_runs(tmp_path / "other")[0]).ends()[0]


@pytest.mark.parametrize(
    ("name", "best"), [("accuracy", "highest"), ("r2", "highest"), ("mae", "lowest")]
)
def test_the_direction_of_a_metric(tmp_path, name, best):
    for folder, value in (("gd", 0.9), ("sgd", 0.5)):
        metrics = {"loss/train": 1.0, f"metric/{name}/test": value}
        leave_run(tmp_path / folder, folder, [2, 1], metrics=metrics)
    said = compare(find_runs(tmp_path)[0]).sentences()[4]
    winner = "gd" if best == "highest" else "sgd"
    assert said.startswith(f"At the end, {winner} has the {best} test {name}:")


# ---------------------------------------------------------------------- what cannot be compared


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


def test_a_lost_run_is_named_and_does_not_count(two):
    leave_run(two / "sgd-9", "sgd", [9.0], each=1, seed=9, reason="DIVERGED")
    leave_run(two / "sgd-8", "sgd", [], each=1, seed=8, reason="NON_FINITE")
    compared = compare(find_runs(two)[0])
    assert [len(c.runs) for c in compared.contenders] == [3, 3]
    assert compared.absent() == ["sgd, seed 8: NON_FINITE. Words.", "sgd, seed 9: DIVERGED. Words."]
    assert "seed 9: DIVERGED" in page(compared)


def test_what_is_refused(two, tmp_path):
    runs, _ = find_runs(two)
    with pytest.raises(ValueError, match="Received: gd alone"):
        compare([run for run in runs if run.variant == "gd"])
    with pytest.raises(ValueError, match="target must be a finite loss"):
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


# ---------------------------------------------------------------------- the report


class Reader(HTMLParser):
    """Elements, ids and references; raises where tags do not close."""

    VOID = ("meta", "br", "path", "use")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.found, self.labels = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "srcset", "data"):
                self.links.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value or "")
            if name == "aria-label":
                self.labels.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_beside_it(two):
    text = page(compare(find_runs(two)[0]))
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe"} & set(reader.found)
    assert "http" not in text
    assert "@import" not in text
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.links
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    assert len(reader.labels) == reader.found.count("svg") == 6
    for clock, label in zip(CLOCKS, reader.labels, strict=False):
        assert f"Training loss against {clock}: gd from 1.01 at " in label


def test_names_are_escaped(two):
    runs, _ = find_runs(two)
    names = {run.folder: f"<b>{run.variant}</b> & co" for run in runs}
    text = page(compare(runs, names=names))
    assert "<b>" not in text
    assert "&lt;b&gt;sgd&lt;/b&gt; &amp; co" in text


def test_charts_have_titles_axes_and_units_and_do_without_colour(tmp_path):
    for i in range(6):
        settings = {"optimizer": {"lr": 0.1 * (i + 1)}}
        leave_run(tmp_path / f"{i}", "sgd", falling(i + 1, 9), each=1, settings=settings)
    compared = compare(find_runs(tmp_path)[0])
    for figure in (plot(compared), plot_costs(compared)):
        for axes, unit in zip(figure.axes, ("updates", "examples seen", "seconds"), strict=True):
            assert axes.get_title()
            assert axes.get_xlabel().startswith(unit)
    lines = plot(compared, "updates").axes[0].get_lines()[:6]
    assert plot(compared).axes[0].get_ylabel() == "training loss (mean per example)"
    assert len({line.get_marker() for line in lines}) == 6
    assert len({str(line._dash_pattern) for line in lines}) == 6
    legend = plot(compared).legends[0]
    assert [text.get_text() for text in legend.get_texts()[:2]] == ["sgd lr=0.1", "sgd lr=0.2"]


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_what_is_saved(two, tmp_path):
    for folder in two.iterdir():
        with open(folder / "metrics.csv", "a") as file:
            file.write("100,,2.0,0.1,1\n200,,1.0,0.2,2\n")
    compared = compare(find_runs(two)[0])
    compared.made = ["gdtrain-compare runs=…"]
    save(compared, tmp_path / "out")
    pictures = ("costs", "loss", "validation")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["curves.csv", "report.html", "runs.csv"]
        + [f"{name}.{kind}" for name in pictures for kind in ("pdf", "png")]
    )
    for name in pictures:
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    rows = table(tmp_path / "out" / "runs.csv")
    assert len(rows) == 6
    assert float(rows[0]["updates_to_target"]) == pytest.approx(
        compared.contenders[0].runs[0].train.reach(compared.target)["updates"]
    )
    assert rows[0]["noise_scale"] == ""
    curve = [
        [float(row[key]) for key in ("at", "median", "lowest", "highest")]
        for row in table(tmp_path / "out" / "curves.csv")
        if (row["contender"], row["loss"], row["clock"]) == ("sgd", "training", "seconds")
    ]
    expected = np.stack(compared.contenders[1].band("seconds"), axis=1)
    assert np.array(curve) == pytest.approx(expected)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "gdtrain-compare runs=…" in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_nothing_is_cut_off_at_desktop_and_phone_width(two, tmp_path):
    runs, _ = find_runs(two)
    names = {run.folder: f"{run.variant} schedule=cosine momentum=0.9" for run in runs}
    text = page(compare(runs, names=names))
    # A frame of each width, so that one browser measures both.
    frames = "".join(
        f'<iframe style="width:{w}px;height:900px;border:0" src="page.html"></iframe>'
        for w in (1280, 375)
    )
    measure = """<script>onload = () => {
        document.title = [...document.querySelectorAll('iframe')].map(frame => {
            const page = frame.contentDocument, width = frame.contentWindow.innerWidth;
            const outside = [...page.body.querySelectorAll('*:not(svg *)')].filter(element => {
                const box = element.getBoundingClientRect();
                return box.right > width + 1 || box.left < -1;
            });
            return [width, page.documentElement.scrollWidth, outside.length].join(':');
        }).join(' ');
    }</script>"""
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    (tmp_path / "frames.html").write_text(f"<title></title>{frames}{measure}", encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --allow-file-access-from-files --dump-dom"
    done = subprocess.run(
        [
            *("chromium", *flags.split(), "--window-size=1400,1000"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'frames.html'}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    wide, narrow = found.group(1).split()
    assert re.fullmatch(r"1280:12\d\d:0", wide)
    assert narrow in ("375:375:0", "375:360:0")


# ---------------------------------------------------------------------- the command


def command(words, monkeypatch):
    """In this process; the exit code, 0 where none was given."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    try:
        cli.compare_main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data=iris modle=linear", "Unknown key modle. Did you mean model?"),
        ("sedes=2", "Unknown argument sedes. Did you mean seeds?"),
        ("seeds=0", "seeds must be a whole number from 1 to 10000. Received: seeds=0"),
        ("jobs=two", "jobs must be a whole number from 1 to 1024. Received: jobs=two"),
        ("target=nan", "target must be a number in (−∞, ∞). Received: target=nan"),
        ("optimizer=sgd", "set contenders='optimizer=…;…'. Received: optimizer=sgd"),
        ("seed=1", "set seeds=COUNT. Received: seed=1"),
        ("contenders=optimizer=gd;optimizer=sgd,seed=5", "set seeds=COUNT. Received: sgd seed=5"),
        ("contenders=optimizer=gd", "contenders must name at least two, separated by a semicolon"),
        ("contenders=", "contenders must be at least two contenders, separated by a semicolon"),
        ("contenders=optimizer=gd;optimizer=gd", "Contenders must differ."),
        ("contenders=optimizer=gd;optimizer=sdg", "There is no optimizer=sdg. Did you mean sgd?"),
        ("contenders=optimizer=gd;optimizer=sgd,data.batch_size=3", "data.batch_size must be 1"),
        ("logger=none", "logger must be csv or tensorboard. Received: logger=none"),
        ("trainer=ddp", "Received: trainer=ddp"),
        ("runs=nowhere", "There is no folder nowhere."),
        ("runs=empty", "There is no finished run in empty"),
        ("runs=single", "Received: gd alone"),
        ("runs=single seeds=3", "trains none, so it takes target=… and output=… only. Received"),
        ("output=single", "single exists already; choose another output=…"),
        ("-m", "Unknown argument -m"),
    ],
)
def test_a_wrong_word_ends_with_one_message(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    leave_run(tmp_path / "single", "gd", [2, 1])
    before = sorted(tmp_path.rglob("*"))
    assert command(words.split(" "), monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert sorted(tmp_path.rglob("*")) == before


def test_contenders_are_lists_of_overrides():
    text = "optimizer=sgd; optimizer=minibatch,model.hidden=[64, 32] +x={a: 1};optimizer.lr=0.1"
    assert compare_command._contenders(text) == {
        "sgd": ["optimizer=sgd"],
        "minibatch model.hidden=[64, 32] +x={a: 1}": [
            *("optimizer=minibatch", "model.hidden=[64, 32]", "+x={a: 1}")
        ],
        "lr=0.1": ["optimizer.lr=0.1"],
    }


def test_a_run_that_fails_is_named_and_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["data=iris", "model=linear", "seeds=1", "jobs=1", "epochs=2", "output=out"]
    words += ["logger=csv", "instruments=off"]
    failing = "optimizer=minibatch data.batch_size=9999"
    with monkeypatch.context() as patch:
        patch.setattr(
            compare_command, "_launch", lambda _, places, *__: dict.fromkeys(places, "Too few.")
        )
        assert command([*words, f"contenders={failing};optimizer=gd"], monkeypatch) == 2
    _, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("error: Comparing needs two contenders with a finished run each.")
    assert "minibatch data.batch_size=9999, seed 0: Too few." in last
    assert not Path("out").exists()
    three = f"optimizer=gd;{failing};optimizer=sgd"
    assert command([*words, f"contenders={three}"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "Left out: minibatch data.batch_size=9999, seed 0: " in out
    assert out.splitlines()[-1] == "Report: out/report.html"
    assert sorted(p.name for p in (tmp_path / "out" / "runs").iterdir()) == ["gd", "sgd"]
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Left out" in text
    assert "One run was trained after another." in text
    assert str(tmp_path) not in text


def test_a_killed_process_does_not_end_what_had_to_wait(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("finished", "running", "waiting")]
    calls = []

    class Launcher:
        def launch(self, jobs, first):
            calls.append([job[0] for job in jobs])
            if len(calls) == 1:
                for folder in folders[:2]:
                    folder.mkdir()
                (folders[0] / "summary.json").touch()
                raise BrokenExecutor
            return [SimpleNamespace(_return_value=ValueError("no such thing"))]

    monkeypatch.setattr(compare_command.Plugins, "instantiate_launcher", lambda *_: Launcher())
    failed = compare_command._launch([[folder.name] for folder in folders], folders, 2, None)
    assert calls == [["finished", "running", "waiting"], ["waiting"]]
    assert failed == {
        folders[1]: "A process was killed; perhaps memory ran out.",
        folders[2]: "ValueError: no such thing",
    }


@pytest.mark.slow
def test_the_script(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compare.py", "runs=nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: There is no folder nowhere.\n"


def close(first, second):
    """The same words, and numbers within 3%."""
    number = r"\d[\d,]*\.?\d*"
    values = [
        [float(n.replace(",", "")) for n in re.findall(number, text)] for text in (first, second)
    ]
    return re.sub(number, "", first) == re.sub(number, "", second) and values[0] == pytest.approx(
        values[1], rel=0.03
    )


def test_what_the_commands_of_the_page_start(tmp_path, monkeypatch, capsys):
    started = []

    def stop(jobs, *_):
        started.append(jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_command, "_launch", stop)
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^python scripts/compare.py (.*)$", PAGE, re.MULTILINE)
    trained = [shlex.split(line) for line in lines if "runs=" not in line]
    assert [command(words, monkeypatch) for words in trained] == [130] * 3
    assert "Compare the runs that were finished with runs=rates/runs" in capsys.readouterr().err
    digits, iris, rates = started
    assert (len(digits), len(iris), len(rates)) == (9, 6, 6)
    assert digits[0][:-1] == [
        *("data=digits", "model=mlp", "trainer.max_epochs=20", "optimizer=gd", "seed=0")
    ]
    assert rates[-1][-4:] == [
        *("optimizer=sgd", "optimizer.lr=0.01", "seed=2"),
        "hydra.sweep.subdir='rates/runs/sgd-lr-0.01-2/seed-2'",
    ]
    seeds = [[word for word in job if word.startswith("seed=")] for job in digits]
    assert seeds == [[f"seed={seed}"] for seed in (0, 0, 0, 1, 1, 1, 2, 2, 2)]


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    assert (ROOT / "docs" / "compare.png").read_bytes().startswith(b"\x89PNG")
    first, third = re.findall(
        r"^python scripts/compare.py (data=iris.*seeds.*|runs=.*)$", PAGE, re.M
    )
    monkeypatch.chdir(tmp_path)
    assert command([*first.split(), "jobs=2"], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = re.search(r"```\n(Counted in updates.*?)```", PAGE, re.DOTALL).group(1).splitlines()
    said = [line for line in lines if line.startswith(tuple(s.split(",")[0] for s in shown))]
    for want, got in zip(shown, said, strict=False):
        assert close(want, got), got
    text = (tmp_path / "iris" / "report.html").read_text(encoding="utf-8")
    assert "gd: gdtrain data=iris model=linear trainer.max_epochs=20 optimizer=gd seed=…" in text
    assert "2 processes ran side by side" in text
    prints = {
        json.loads(path.read_text())["data"]["split_fingerprint"]
        for path in tmp_path.glob("iris/runs/*/*/summary.json")
    }
    assert len(prints) == 1
    # The finished runs give the same numbers.
    runs, left_out = find_runs("iris/runs")
    assert left_out == []
    assert compare(runs).sentences() == lines[:-1]
    assert command(third.split(), monkeypatch) == 0
    out, _ = capsys.readouterr()
    assert "to a training loss of 0.3:" in out
    assert "Report: again/report.html" in out


def test_the_python_of_the_page(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(code, "docs/compare.md", "exec"), found)
    assert (tmp_path / "comparison" / "report.html").is_file()
    compared = compare(found["runs"])
    for c in compared.contenders:
        (run,) = c.runs
        made = json.loads((run.folder / "summary.json").read_text())
        assert run.train.updates[-1] == made["updates"]
        assert c.values("loss/train")[0] == made["metrics"]["loss/train"]
    assert [row["contender"] for row in compared.ends()] == ["gd", "sgd"]
