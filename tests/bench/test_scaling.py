import json

import pytest
import scaling
from rich.console import Console
from scaling import Point


def made(n, seconds):
    return Point(n, 10**6, [seconds] * 3, [seconds] * 3, 1, 2, 68 * n, "native")


def test_a_point_holds_what_was_measured():
    point = scaling.point(50, 100, 2)
    assert point.n == 50
    assert point.updates == 100  # two passes
    assert len(point.seconds) == len(point.whole_seconds) == 2
    assert all(0 < s <= w for s, w in zip(point.seconds, point.whole_seconds, strict=True))
    assert point.data == 50 * (16 + 1) * 4
    assert point.process > point.memory >= 0
    assert point.engine in ("eager", "native")


def test_growth_is_that_of_a_row_in_the_issue():
    points = [made(10**3, 9e-8), made(10**4, 3e-8), made(10**7, 8.4e-8)]
    assert scaling.growth(points) == pytest.approx(2.8)
    assert scaling.growth(points[:2]) is None


def test_table():
    console = Console(width=140, record=True, force_terminal=False)
    console.print(scaling.table([made(10**4, 3.2e-8)]))
    text = console.export_text()
    for part in ("10,000", "1,000,000", "32", "0.7", "native"):
        assert part in text


def test_parameters():
    rows = scaling.parameters((2, 3), 4, 0.01, 2, n=40)
    assert [row.details["parameters"] for row in rows] == [
        64 * w + w + w * w + w + 10 * w + 10 for w in (2, 3)
    ]
    for row in rows:
        assert row.unit == "µs"
        assert len(row.baseline) == len(row.ours) == 2


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "in_child", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(scaling, "SIZES", (10, 20, 30))
    monkeypatch.setattr(scaling, "WIDTHS", (2,))
    path = tmp_path / "scaling.json"
    arguments = "--max-n 20 --updates 40 --repetitions 1 --seconds 0.01 --json"
    assert scaling.main([*arguments.split(), str(path)]) == 0
    content = json.loads(path.read_text())
    assert [row.get("n") for row in content["rows"]] == [10, 20, None, None]
    assert [row["details"]["batch_size"] for row in content["rows"][2:]] == [1, 64]
    assert content["environment"]["versions"]["numba"]
    out = capsys.readouterr().out
    assert "ns/example" in out
    assert "memory of a fit: at most" in out
