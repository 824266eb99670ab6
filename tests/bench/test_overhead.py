import json

import overhead
import pytest


def test_a_run_makes_the_updates_that_were_asked_for():
    words = ["data=iris", "model=linear", "optimizer=minibatch", "optimizer.lr=0.1"]
    result = overhead.once(words, 37)
    assert result.summary["updates"] == 37
    assert 0 <= overhead.before_the_first_update(result) < result.summary["fit_seconds"]


def test_the_time_before_the_first_update_is_that_of_the_first_point_less_its_updates():
    class Finished:
        class history:  # noqa: N801
            @staticmethod
            def array(part, column):
                assert (part, column) == ("train", "seconds")
                return overhead.np.array([1.5, 1.6, 1.8, 1.9])

    assert overhead.before_the_first_update(Finished) == pytest.approx(1.4)


def test_the_command_compares_equal_runs(tmp_path, capsys):
    words = ["--only", "auto", "--variants", "minibatch", "--models", "mlp"]
    words += ["--seconds", "0.05", "--repetitions", "2", "--json", str(tmp_path / "out.json")]
    assert overhead.main(words) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["work"] for row in rows] == [
        "auto: digits, mlp, minibatch, whole",
        "auto: digits, mlp, minibatch, per update",
    ]
    assert rows[0]["asked"] is None
    assert rows[1]["asked"] == pytest.approx(1 / 1.15)
    assert all(row["ratio"] > 0 for row in rows)
    assert len(rows[0]["ours_repetitions"]) == 2
    assert "auto: digits" in capsys.readouterr().out
