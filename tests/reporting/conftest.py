"""Two contenders whose curves are known."""

import pytest
from known_runs import falling, leave_run


@pytest.fixture
def two(tmp_path):
    """gd comes to 0.1 at update 10; sgd, of which a pass has 100 updates, ten times as fast."""
    for seed in range(3):
        slower = 1 + 0.01 * seed
        leave_run(tmp_path / "runs" / f"gd-{seed}", "gd", falling(slower, 10), seed=seed)
        rows = [slower * 0.8**i for i in range(20)]
        leave_run(
            tmp_path / "runs" / f"sgd-{seed}", "sgd", rows, each=1, pace=0.001, every=40, seed=seed
        )
    return tmp_path / "runs"
