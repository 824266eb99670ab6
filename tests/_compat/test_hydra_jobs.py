"""A composed configuration runs as `hydra.main` would run it."""

from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from gdtrain._compat.hydra_jobs import run_composed
from gdtrain.cli.composition import compose
from gdtrain.runs.configuration import conf_directory

CONF = str(conf_directory())


def test_a_task_gets_its_folder_and_what_hydra_knows(tmp_path):
    config = compose(["data=iris", "seed=3", f"hydra.run.dir={tmp_path}/run"], None, whole=True)

    def task(own):
        assert "hydra" not in own
        assert own.seed == own.data.seed == 3
        known = HydraConfig.get()
        assert known.runtime.choices.data == "iris"
        assert list(known.overrides.task) == ["data=iris", "seed=3"]
        assert Path(known.runtime.output_dir) == tmp_path / "run"
        assert Path(known.runtime.output_dir).is_dir()
        return 5

    assert run_composed(task, config, CONF) == 5


def test_what_a_task_raises_is_raised_and_callbacks_are_called(tmp_path, monkeypatch):
    (tmp_path / "seen_by_callback.py").write_text(
        "from hydra.experimental.callback import Callback\n"
        "called = []\n"
        "class Seen(Callback):\n"
        "    def on_run_start(self, **rest): called.append('start')\n"
        "    def on_job_end(self, job_return, **rest): called.append(job_return.status.name)\n"
        "    def on_run_end(self, **rest): called.append('end')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = [f"hydra.run.dir={tmp_path}/run", "+hydra.callbacks.c._target_=seen_by_callback.Seen"]

    def task(own):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_composed(task, compose(words, None, whole=True), CONF)
    import seen_by_callback

    assert seen_by_callback.called == ["start", "FAILED", "end"]
