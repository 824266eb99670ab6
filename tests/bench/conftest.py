import sys
from pathlib import Path

# The scripts import each other by name, as `python scripts/bench/<name>.py` does.
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
