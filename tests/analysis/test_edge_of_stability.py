"""The demonstration: a shortened run reaches the edge; the page shows what the command printed."""

import json
import re
from pathlib import Path

import pytest
from commands import called, loaded

ROOT = Path(__file__).parent.parent.parent
demo = loaded("demo_edge_of_stability")


@pytest.mark.slow
def test_squared_error_comes_to_the_edge_and_cross_entropy_falls_away_from_it():
    done = called(demo.main, ROOT, "--updates", 540, "--every", 60, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    runs = json.loads(done.stdout)
    squared, entropy = runs["squared error"], runs["cross-entropy"]
    assert (squared["lr"], entropy["lr"]) == (0.3, 1.0)
    for update, ratio in zip(squared["update"], squared["ratio"], strict=True):
        if update < 150:
            assert ratio < 0.7
        if update >= 500:
            assert 0.9 < ratio < 1.1
    assert squared["update"][-1] == 540
    assert squared["loss"][-1] < 0.12 * squared["loss"][0]
    assert set(squared["output_curvature"]) == {1.0}
    top = max(entropy["ratio"])
    assert 1.2 * entropy["ratio"][0] < top < 0.8
    assert entropy["update"][entropy["ratio"].index(top)] < 50
    assert entropy["ratio"][-1] < 0.15 * top
    assert entropy["output_curvature"][-1] < 0.05 * entropy["output_curvature"][0]


@pytest.mark.slow
def test_it_draws_and_prints_as_the_page_says(tmp_path):
    done = called(demo.main, tmp_path, "--updates", 8, "--figure", "short.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "short.png").read_bytes().startswith(b"\x89PNG")
    page = (ROOT / "docs" / "edge-of-stability.md").read_text()
    assert "\npython scripts/demo_edge_of_stability.py\n" in page
    assert "](edge-of-stability.png)" in page
    assert (ROOT / "docs" / "edge-of-stability.png").read_bytes().startswith(b"\x89PNG")
    rows = re.findall(r"^\| \d.*$", done.stdout, re.MULTILINE)
    assert len(rows) == 4
    for row in rows:  # of updates 0 and 8
        assert row in page


def test_no_updates_are_refused():
    done = called(demo.main, ROOT, "--updates", 0)
    assert done.returncode == 2
    assert "--updates must be at least 1. Received: 0" in done.stderr
