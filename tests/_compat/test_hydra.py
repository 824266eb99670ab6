"""Hydra's grammar, flags, sweeps and jobs do what the command line relies on."""

from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from gdtrain._compat.hydra import (
    Override,
    flag_parser,
    function_names,
    in_quotes,
    is_text,
    parse_override,
    run_composed,
    sweep,
)
from gdtrain.cli.composition import compose
from gdtrain.runs.configuration import conf_directory

CONF = str(conf_directory())


@pytest.mark.parametrize("word", ["seed=1", "optimizer=gd,sgd", "~model", "+a.b=[1,2]", "a@b=c"])
def test_a_word_is_parsed(word):
    parsed = parse_override(word)
    assert isinstance(parsed, Override)
    assert parsed.input_line == word
    assert parsed.is_sweep_override() == ("," in word and "[" not in word)


@pytest.mark.parametrize(
    "word", ["model.hidden=[64", "optimizer='sgd", "x=f(1", "seed=1" + 9**4 * "0"]
)
def test_a_word_that_cannot_be_parsed_is_none(word):
    assert parse_override(word) is None


@pytest.mark.parametrize("text", ["price ($)", "l'été", "a\\", "a,b", "[", "{x}", "${x}"])
def test_what_is_quoted_is_taken_as_it_is(text):
    value = parse_override(f"x={in_quotes(text)}").value()
    assert is_text(value)
    assert value == text


def test_functions_of_values_are_known():
    assert {"choice", "range", "glob", "interval"} <= set(function_names())


def test_flags_are_hydras():
    read = flag_parser().parse_args(
        ["-m", "--config-dir=x", "--cfg=job", "--resolve", "a=1", "b=2"]
    )
    assert (read.multirun, read.config_dir, read.cfg, read.resolve) == (True, "x", "job", True)
    assert read.overrides == ["a=1", "b=2"]
    for name in ("config_name", "config_path", "experimental_rerun", "info", "shell_completion"):
        assert not getattr(read, name)


def test_a_sweep_is_the_product_of_its_values():
    jobs = sweep([parse_override("a=1,2"), parse_override("b=range(0,2)"), parse_override("c=3")])
    assert jobs == [
        ["a=1", "b=0", "c=3"],
        ["a=1", "b=1", "c=3"],
        ["a=2", "b=0", "c=3"],
        ["a=2", "b=1", "c=3"],
    ]


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
