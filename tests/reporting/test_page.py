"""The report: one page that needs nothing beside it, figures, tables of numbers."""

import csv
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from known_runs import falling, leave_run

from gdtrain.reporting.comparison import compare
from gdtrain.reporting.finished import CLOCKS, find_runs
from gdtrain.reporting.page import page, plot, plot_costs, save


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


@pytest.fixture
def _without_lines(monkeypatch):
    """What is drawn within the charts takes most of a page's time."""
    monkeypatch.setattr("gdtrain.reporting.page._svg", lambda figure, name: ("", ""))


@pytest.mark.usefixtures("_without_lines")
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
