import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "demo_exact_gradient.py"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def numbers():
    return json.loads(run("--json"))


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "docs" / "exact-gradients.md").read_text()
    tables = run().strip().split("\n\n")
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
