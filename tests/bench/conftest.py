import sys
from pathlib import Path

import pytest

# The scripts import each other by name, as `python scripts/bench/<name>.py` does.
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are(monkeypatch):
    for name in ("overhead", "scaling", "step_sizes", "throughput"):
        monkeypatch.setattr(f"{name}.use_threads", lambda n: n or 1)
