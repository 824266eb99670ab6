import json
from pathlib import Path

import pytest
from commands import SCRIPTS, called, loaded

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def numbers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # for the two ranks
        done = called(loaded("demo_exact_gradient").main, ROOT, "--json")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


def test_the_page_shows_what_the_script_prints(numbers, monkeypatch):
    demo = loaded("demo_exact_gradient")
    monkeypatch.setattr(demo, "Problem", lambda: None)
    monkeypatch.setattr(demo, "micro_batches", lambda _: numbers["micro-batches"])
    monkeypatch.setattr(demo, "two_ranks", lambda _: numbers["two ranks"])
    tables = called(demo.main, ROOT).stdout.strip().split("\n\n")
    page = (ROOT / "docs" / "exact-gradients.md").read_text()
    assert len(tables) == 2
    assert "\npython scripts/demo_exact_gradient.py\n" in page
    for table in tables:
        assert f"\n\n{table}\n\n" in page


def test_gathered_gradients_are_exact_and_the_others_are_not(numbers):
    for row in numbers["micro-batches"]:
        assert row["gdtrain"] < 1e-13
        assert min(row["naive"], row["naive, tail dropped"]) > 1e-3
        assert row["M"] * (row["micro-batches"] - 1) + row["last"] == 1789
        assert row["last"] < row["M"]
    for row in numbers["two ranks"]:
        assert row["gdtrain"] < 1e-13
        assert min(row["mean of means"], row["padded to equal"]) > 1e-4
