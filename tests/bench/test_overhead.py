import json

import overhead
import pytest


def test_a_run_makes_the_updates_that_were_asked_for():
    words = ["data=iris", "model=linear", "optimizer=minibatch", "optimizer.lr=0.1"]
    result = overhead.once(words, 37)
    assert result.summary["updates"] == 37


def test_the_command_compares_equal_runs(tmp_path, capsys):
    words = ["--only", "auto", "--variants", "minibatch", "--models", "mlp"]
    words += ["--seconds", "0.05", "--repetitions", "2", "--json", str(tmp_path / "out.json")]
    assert overhead.main(words) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["work"] for row in rows] == ["auto: digits, mlp, minibatch, whole"]
    assert rows[0]["asked"] == pytest.approx(1 / 1.15)
    assert all(row["ratio"] > 0 for row in rows)
    assert len(rows[0]["ours_repetitions"]) == 2
    assert "auto: digits" in capsys.readouterr().out
