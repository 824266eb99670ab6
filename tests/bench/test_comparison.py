import json

import numpy as np
import pytest
from comparison import (
    Row,
    alternate,
    environment,
    in_child,
    parser,
    peak_memory,
    report,
    resident_memory,
    selected,
    write_json,
)
from rich.console import Console


def test_contenders_take_turns():
    order = []

    def contender(name, cost):
        def run():
            order.append(name)
            return cost

        return run

    costs = alternate({"theirs": contender("theirs", 2.0), "ours": contender("ours", 1.0)}, 3)
    assert order == ["theirs", "ours"] * 3
    assert costs == {"theirs": [2.0] * 3, "ours": [1.0] * 3}


@pytest.mark.parametrize("cost", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cost_that_is_none_is_refused(cost):
    with pytest.raises(ValueError, match="ours must return a positive cost"):
        alternate({"ours": lambda: cost}, 1)
    with pytest.raises(ValueError, match="at least 1"):
        alternate({"ours": lambda: 1.0}, 0)


def test_the_ratio_is_of_medians_and_is_compared_with_what_was_asked():
    row = Row("work", "theirs", [3.0, 100.0, 2.0], [1.0, 0.5, 20.0], asked=3)
    assert row.ratio == 3.0  # 3 / 1
    assert row.verdict == "ok"
    assert row.numbers()["ratio_range"] == [0.1, 200.0]
    assert Row("work", "theirs", [2.9], [1.0], asked=3).verdict == "below"
    assert Row("work", "theirs", [2.9], [1.0]).verdict == ""


def rise(megabytes):
    return peak_memory(lambda: np.ones(megabytes * 2**17).sum())


@pytest.mark.slow
def test_peak_memory_of_a_process_of_its_own():
    ballast = np.ones(64 * 2**17)  # of the parent: not the child's
    low, high = in_child(rise, 32), in_child(rise, 128)
    assert 30e6 < low < 60e6
    assert 130e6 < high < 170e6
    assert ballast.nbytes > 0


def test_the_peak_holds_what_is_gone():
    before = resident_memory()
    rise(64)
    assert resident_memory(peak=True) > before + 60e6


def test_table_and_json(tmp_path):
    console = Console(width=180, record=True, force_terminal=False)
    rows = [
        Row("fast work", "theirs", [2e-3], [1e-3], asked=1.5, engine="native", note="say so"),
        Row("slow work", "theirs", [1e-3], [1e-3], asked=1.5, unit="ms", details={"n": 3}),
    ]
    path = tmp_path / "figures.json"
    report("Figures", rows, environment(), path, console)
    text = console.export_text()
    for part in ("fast work", "native", "1,000", "2×", "1.5×", "ok", "below", "say so", "torch"):
        assert part in text
    content = json.loads(path.read_text())
    assert [row["verdict"] for row in content["rows"]] == ["ok", "below"]
    assert content["rows"][1]["details"] == {"n": 3}
    where = content["environment"]
    assert {"torch", "lightning", "numba", "numpy", "scikit-learn"} <= where["versions"].keys()
    assert "not installed" not in where["versions"].values()
    assert where["processor"]
    assert where["threads"] >= 1
    assert "card" in where


def test_json_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "figures.json", "Figures", [float("nan")], {})


def test_only_names_rows(capsys):
    assert selected(["a", "b", "c"], None) == ["a", "b", "c"]
    assert selected(["a", "b", "c"], "c, a") == ["a", "c"]
    for only in ("a,d", ","):
        with pytest.raises(SystemExit) as stopped:
            selected(["a", "b", "c"], only)
        assert stopped.value.code == 2
        assert "a, b, c" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--repetitions", "0"], ["--seconds", "nan"], ["--threads", "-1"], ["--fast"]]
)
def test_options_out_of_range(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser("A benchmark.").parse_args(arguments)
    assert stopped.value.code == 2


def test_options():
    made = parser("A benchmark.", repetitions=7).parse_args(["--json", "x.json", "--threads", "2"])
    assert (made.repetitions, made.threads, made.json.name, made.device) == (7, 2, "x.json", "cpu")
