"""The table of engines' gaps to the reference."""

import json

import agreement
import pytest
import torch


def test_a_gap_is_the_largest_of_all_entries_and_nan_is_one():
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])
    assert agreement.gap([a, a], [a, b]) == 1.0  # 2 / (1 + 1)
    assert agreement.gap([torch.tensor([torch.nan])], [torch.tensor([0.0])]) == float("inf")


@pytest.mark.parametrize("model", ["linear", "linear, sparse inputs", "mlp relu"])
def test_native_makes_a_thousand_updates_of_the_reference_in_float32(model, tmp_path, capsys):
    path = tmp_path / "gaps.json"
    arguments = ["--models", model, "--losses", "cross-entropy", "hinge", "--json", str(path)]
    assert agreement.main(["--batch-sizes", "1", "--updates", "1000", *arguments]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [len(row["gaps"]) for row in rows] == [len(agreement.RULES)] * 2
    assert all(0 <= gap < 2e-5 for row in rows for gap in row["gaps"].values())
    assert "10 runs compared" in capsys.readouterr().out


def test_a_wrong_engine_is_found(monkeypatch, capsys):
    class Wrong(agreement.Eager):
        def __call__(self, indices, factors, draw=0):
            return super().__call__(indices, factors * 1.001, draw)

    monkeypatch.setitem(agreement.ENGINES, "native", Wrong)
    arguments = ["--models", "linear", "--losses", "logistic", "--updates", "100"]
    assert agreement.main(arguments) == 1
    assert "above" in capsys.readouterr().out


def test_an_unknown_model_is_told(capsys):
    with pytest.raises(SystemExit) as error:
        agreement.main(["--models", "cubic"])
    assert error.value.code == 2
    assert "Received: cubic" in capsys.readouterr().err
