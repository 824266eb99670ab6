"""The demonstrations: what the pages claim holds in small; they show what the command prints."""

import math
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import loaded

from gdtrain import GD
from gdtrain.losses import SquaredError

ROOT = Path(__file__).resolve().parent.parent
demo = loaded("demo")


def page(name):
    return (ROOT / "docs" / f"demo-{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", demo.DEMOS)
def test_each_has_a_page_with_its_command_picture_and_table(name):
    text = page(name)
    assert f"\n```\npython scripts/demo.py {name}\n```\n" in text
    assert f"](demo-{name}.png)" in text
    assert (ROOT / "docs" / f"demo-{name}.png").read_bytes().startswith(b"\x89PNG")
    for preset in re.findall(r"experiment=(\w+)", text):
        assert (ROOT / "conf" / "experiment" / f"{preset}.yaml").is_file(), preset
    tables = re.findall(r"^\|.*\|\n\|(?: --- \|)+\n(?:\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == (2 if name == "variants" else 1)
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_there_is_no_page_without_a_demonstration():
    pages = {p.stem.removeprefix("demo-") for p in (ROOT / "docs").glob("demo-*.md")}
    assert pages == set(demo.DEMOS)


def test_numbers_are_rounded():
    shown = {0: "0", 0.0123: "0.012", 12.34: "12", 0.000456: "4.6e-4", 1234: "1200", 9.96: "10"}
    assert {value: demo.number(value) for value in shown} == shown


def test_marks_are_spread_from_nothing_to_the_last():
    marks = demo.marks_up_to(1000)
    assert marks[:3] == [0, 1, 2]
    assert marks[-1] == 1000
    assert marks == sorted(set(marks))


def test_descend_is_full_batch_descent_by_hand():
    x = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]])
    y = np.array([1.0, 2.0, -1.0])
    model = demo.seeded(lambda: torch.nn.Linear(2, 1))
    w = model.weight.detach().double().numpy()[0]
    b = model.bias.item()
    want = []
    for _ in range(4):
        residual = x @ w + b - y
        want.append(0.5 * (residual**2).mean())
        w, b = w - 0.1 * residual @ x / 3, b - 0.1 * residual.mean()
    found = demo.descend(
        model,
        SquaredError(),
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(y, dtype=torch.float32),
        partial(GD, lr=0.1),
        3,
        range(4),
    )
    assert found == pytest.approx(want, rel=1e-5)


# ---------------------------------------------------------------------- what the pages claim


def test_update_rule_and_its_page_in_full():
    shown = demo.update_rule()
    assert f"\n\n{shown.text}\n\n" in page("update-rule")
    paths, curvature = shown.numbers["paths"], shown.numbers["curvature"]
    for rate, path in paths.items():
        want = 3 - 3 * (1 - rate) ** np.arange(len(path))
        np.testing.assert_allclose(path, want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.abs(paths[0.1] - 3), np.abs(paths[1.9] - 3))
    g = curvature * (0 - 3)
    assert paths[0.1][1] == pytest.approx(0 - 0.1 / curvature * g)
    for number in ("η = 0.1/λ = 0.05", "g = 2 · (0 − 3) = −6", "x = 0.3 + 0.27 = 0.57"):
        assert number in page("update-rule")


def test_variants_differ_by_the_clock():
    numbers = demo.variants(epochs=4, timed=50).numbers
    gd, mini, sgd = (numbers[name] for name in ("GD", "mini-batch", "SGD"))

    def at(own, update):
        return own["losses"][own["marks"].index(update)]

    assert at(gd, 4) < at(mini, 4) < at(sgd, 4)  # equal updates
    few = at(mini, 4 * mini["per_epoch"]), at(sgd, 4 * sgd["per_epoch"])
    assert at(gd, 4) > 5 * max(few)  # equal epochs
    assert sgd["ordinary"] < gd["ordinary"]  # an update
    assert sgd["ordinary"] * sgd["per_epoch"] > 5 * mini["ordinary"] * mini["per_epoch"]  # an epoch
    assert sgd["sweep"] < 0.2 * sgd["ordinary"]


def test_learning_rates_too_small_right_and_too_large():
    shown = demo.learning_rate(rates=(0.001, 0.5, 10.0), epochs=4)
    small, right, large = shown.numbers["losses"].values()
    assert small[-1] > 2.0
    assert right[-1] < 0.1
    assert not large[-1] <= 23
    assert [row[-1] == "–" for row in shown.numbers["rows"]] == [False, False, True]


def test_wider_nets_end_lower_and_closer_together():
    shown = demo.local_minima(widths=(2, 8), starts=4, updates=600)
    narrow, wide = shown.numbers["ends"][2], shown.numbers["ends"][8]
    assert max(narrow) > 0.3
    assert max(wide) < 0.02
    stuck = narrow.index(max(narrow))
    assert shown.numbers["slopes"][2][stuck] < 0.01
    assert min(shown.numbers["right"][8]) >= 0.95


def test_small_batches_lead_by_epochs_and_large_ones_by_updates():
    numbers = demo.batch_sizes(
        sizes=(8, 512), epochs=2, updates=40, grid=(0.08, 0.32, 1.28)
    ).numbers
    by_epochs, by_updates = numbers["epochs"], numbers["updates"]
    assert by_epochs[8]["losses"][-1] < 0.5 * by_epochs[512]["losses"][-1]
    assert by_updates[512]["losses"][-1] < 0.5 * by_updates[8]["losses"][-1]
    assert by_updates[8]["rate"] < by_updates[512]["rate"]


def test_noise_follows_the_law():
    found = demo.noise(sizes=(1, 8, 64, 719, 1437), batches=150).numbers
    for k, size in enumerate(found["sizes"]):
        if size == found["N"]:
            assert found["law"][k] == 0
            assert found["measured"][k] < 1e-20
            continue
        assert abs(found["measured"][k] - found["law"][k]) < 4 * found["errors"][k]
        assert found["errors"][k] < 0.15 * found["law"][k]
    assert found["plain"][3] == pytest.approx(2 * found["law"][3], rel=0.01)  # half of the data


def test_averages_go_on_where_the_last_iterate_stops():
    excess = demo.averaging(marks=(100, 500, 4000)).numbers["excess"]
    for rate in (0.02, 0.005):
        assert excess[rate, "average"][-1] < 0.3 * excess[rate, "last"][-1]
        assert excess[rate, "average"][0] > excess[rate, "last"][0]
    assert excess[0.02, "last"][-1] == pytest.approx(4 * excess[0.005, "last"][-1], rel=0.4)
    assert excess[0.005, "average"][-1] == pytest.approx(5 / 4000, rel=0.5)  # twice the best


def test_signals_neither_vanish_nor_explode_from_the_right_first_weights():
    numbers = demo.initialisation(epochs=1).numbers
    by_name = {name.partition(",")[0]: own for name, own in numbers.items() if "Gauss" not in name}
    assert 0.5 < by_name["He"]["signal"] < 2
    assert by_name["He"]["losses"][-1] < 1.0
    small, large = numbers["Gaussian, σ = 0.01"], numbers["Gaussian, σ = 1"]
    assert small["signal"] < 1e-5
    assert small["gradient"] < 1e-5
    assert small["losses"][-1] == pytest.approx(math.log(10), abs=0.01)
    assert large["signal"] > 1000
    assert not large["losses"][-1] < 23


def test_each_method_has_its_own_scale_of_rates():
    numbers = demo.adaptive(epochs=3).numbers
    ends = [own["losses"][-1] for own in numbers.values()]
    assert max(ends) < 4 * min(ends)
    assert numbers["Adam"]["best"] < numbers["momentum 0.9"]["best"] < numbers["SGD"]["best"]


def test_one_hidden_layer_bears_small_first_weights():
    """As the page on first weights says in passing."""
    data = demo.digits()
    make = partial(demo.MLP, (64,), 10, hidden=[64], init="gaussian", std=0.01)
    model = demo.seeded(make)
    optimizer = partial(demo.MiniBatchSGD, lr=0.05)
    loss = demo.CrossEntropy()
    (end,) = demo.descend(model, loss, data.x, data.y, optimizer, 32, [10 * 45])
    assert f"J = {end:.2f} after ten epochs" in page("initialisation")


@pytest.mark.slow
def test_the_page_on_noise_shows_what_the_command_prints():
    assert f"\n\n{demo.noise().text}\n\n" in page("noise")


# ---------------------------------------------------------------------- the command


def command(monkeypatch, folder, *words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["demo.py", *words])
    return demo.main()


def test_the_command_draws_and_prints(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, tmp_path, "update-rule", "output=a/b") == 0
    assert capsys.readouterr().out == demo.update_rule().text + "\n"
    (picture,) = (tmp_path / "a" / "b").iterdir()
    assert picture.name == "demo-update-rule.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Expected one demonstration. Received: nothing."),
        (["noize"], "Did you mean noise?"),
        (["noise", "variants"], "Received: noise variants."),
        (["noise", "output="], "output must name a folder. Received: output="),
        (["noise", "output=file"], "The picture cannot be written"),
    ],
)
def test_wrong_words_end_with_one_message(monkeypatch, capsys, tmp_path, words, message):
    (tmp_path / "file").touch()
    assert command(monkeypatch, tmp_path, *words) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_help_lists_them(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, tmp_path, "--help") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in demo.DEMOS)


@pytest.mark.parametrize("name", ["update_rule", "averaging"])
def test_charts_are_labelled_and_lines_differ_without_colour(name):
    options = {"averaging": {"marks": (10, 20)}}.get(name, {})
    figure = getattr(demo, name)(**options).figure
    for axes in figure.axes:
        assert axes.get_title()
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        markers = [line.get_marker() for line in axes.lines if line.get_marker() != "None"]
        assert len(set(markers)) == len(markers)
