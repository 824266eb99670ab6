"""What the commands say of a word that is wrong: what was typed, what was meant, exit code 2."""

import re

import pytest
from commands import command

from gdtrain._compat.hydra import parse_override
from gdtrain.cli import overview, train
from gdtrain.cli.compare import COMMAND
from gdtrain.cli.tools import EVALUATE, EXPLAIN, FIND_LR, LANDSCAPE, PREDICT
from gdtrain.cli.words import jobs, read_flags, read_overrides
from gdtrain.errors import ConfigurationError
from gdtrain.lightning.launch import Launch, check_processes, launch
from gdtrain.runs.configuration import conf_directory

COMMANDS = (COMMAND, EVALUATE, EXPLAIN, FIND_LR, LANDSCAPE, PREDICT)
# Words of Python, Hydra's lexer, OmegaConf, gloo.
FOREIGN = (
    r"mismatched|extraneous|no viable|Lexer|Traceback|is not callable|positional|unexpected keyword"
    r"|<class|_Deferred|Exception|Error\b|hydra\.[a-z]+\.[A-Z_]|omegaconf|lightning\.\w+\.\w+\("
)
TRAIN, COMPARE, EVALUATE = "train", "compare", "evaluate"
IRIS = "data=iris"
# Command, its words, the word that was wrong as it is quoted, the remedy.
WRONG = [
    (TRAIN, ["optimizer=sdg"], "There is no optimizer=sdg.", "Did you mean sgd?"),
    (TRAIN, ["optimizr=sgd"], "Unknown key optimizr.", "Did you mean optimizer?"),
    (TRAIN, ["optimizer.lrr=1"], "optimizer.lrr", "Did you mean optimizer.lr?"),
    (TRAIN, ["trainer.max_epoch=3"], "max_epoch", "Did you mean trainer.max_epochs?"),
    (TRAIN, ["optimizer.lr=0"], "optimizer.lr=0", "optimizer.lr must be a number in (0, ∞)"),
    (TRAIN, ["optimizer.lr=nan"], "Received: optimizer.lr=nan", "number in"),
    (TRAIN, ["optimizer.lr=fast"], "Received: optimizer.lr=fast", "or auto"),
    (TRAIN, ["optimizer.momentum=-1"], "=-1", "optimizer.momentum must be"),
    (TRAIN, ["optimizer.nesterov=maybe"], "maybe", "optimizer.nesterov must be true or false"),
    (TRAIN, ["data.batch_size=32"], "data.batch_size=32", "texts call SGD, is optimizer=minibatch"),
    (TRAIN, ["data.batch_size=0"], "=0", "data.batch_size must be a whole number"),
    (TRAIN, ["data.micro_batch_size=2"], "=2", "data.micro_batch_size must be at most"),
    (TRAIN, ["data.val_fraction=-1"], "=-1", "data.val_fraction must be"),
    (TRAIN, ["data=csv"], "data.path", "has no default and must be set"),
    (TRAIN, ["data=csv", "data.path=nothing.csv"], "nothing.csv", "must name a file that exists"),
    (TRAIN, ["trainer.max_steps=0"], "=0", "trainer.max_steps must be"),
    (TRAIN, ["seed=one"], "seed=one", "seed must be"),
    (TRAIN, ["ckpt_path=nothing.ckpt"], "nothing.ckpt", "ckpt_path must name a file that exists"),
    (TRAIN, ["experiment=nothing"], "There is no experiment=nothing", "There are: "),
    (TRAIN, ["-m", "optimizer=sgd,nothing"], "There is no optimizer=nothing", "minibatch, sgd"),
    (TRAIN, ["model=null"], "model=null", "A group takes a choice, not null"),
    (TRAIN, ["~model"], "model", "model is missing"),
    (TRAIN, ["+lr=1"], "Unknown key lr", "--cfg job"),
    (TRAIN, ["schedule=one_cycle", "schedule.warmup=5"], "Unknown key schedule.warmup.", ""),
    (TRAIN, ["trainer.max_epochs=1.0"], "=1.0", "trainer.max_epochs must be a whole number"),
    (TRAIN, ["trainer.max_epochs=null"], "trainer.max_epochs", "must bound the run"),
    (TRAIN, ["--config-name=mine"], "--config-name", "--config-dir=FOLDER"),
    (TRAIN, ["optimizer.lr==0.1"], "=0.1", "number in (0, ∞)"),
    (TRAIN, ["optimizer.lr=0.1;"], "0.1;", "number in (0, ∞)"),
    (TRAIN, ["optimizer.lr", "=0.1"], "optimizer.lr", "Write optimizer.lr=0.1"),
    (TRAIN, ["optimizer.lr=", "0.1"], "0.1", "Write optimizer.lr=0.1"),
    (TRAIN, ["optimizer.lr: 0.1"], "optimizer.lr: 0.1", "Write optimizer.lr=0.1"),
    (TRAIN, ["optimizer:sgd"], "optimizer:sgd", "Write optimizer=sgd"),
    (TRAIN, ["optimizer = sgd"], "optimizer = sgd", "Write optimizer=sgd"),
    (TRAIN, ["sgd"], "sgd", "Did you mean optimizer=sgd?"),
    (TRAIN, ["=5"], "=5", "such as optimizer.lr=0.1"),
    (TRAIN, [""], "''", "such as optimizer=sgd"),
    (TRAIN, ["data=csv", "data.path=my", "table.csv"], "table.csv", "'data.path=my table.csv'"),
    (TRAIN, ["--lr", "0.1"], "--lr", "Keys have no dashes"),
    (TRAIN, ["--resolve"], "--resolve", "--cfg job"),
    (TRAIN, ["--experimental-rerun=x"], "--experimental-rerun", "give its keys again"),
    (TRAIN, ["-sc"], "-sc", "-sc install=bash"),
    (TRAIN, ["-sc", "install=tcsh"], "install=tcsh", "bash, fish and zsh"),
    (TRAIN, ["--cfg", "job", "-p", "optimiser"], "optimiser", "Did you mean optimizer?"),
    (TRAIN, ["-c", "job", "-p", "model.nope"], "model.nope", "--cfg job"),
    (TRAIN, ["--config-dir=/nope", "seed=1"], "--config-dir=/nope", "must name a folder"),
    (TRAIN, ["--config-dir=", "seed=1"], "--config-dir=,", "must name a folder"),
    (TRAIN, ["-m", "--config-dir=/nope", "hydra/sweeper=x"], "/nope", "must name a folder"),
    ("find_lr", ["--config-dir=/nope"], "--config-dir=/nope", "must name a folder"),
    ("explain", ["-cd", "/nope", "update=1"], "--config-dir=/nope", "must name a folder"),
    (COMPARE, ["--config-dir"], "--config-dir", "expected one argument"),
    (TRAIN, ["callbacks=early_stopping", "callbacks.early_stopping.patience=-1"],
     "patience=-1", "from 0 to"),
    (TRAIN, ["callbacks=early_stopping", "callbacks.early_stopping.min_delta=-1"],
     "min_delta=-1", "[0, ∞)"),
    (TRAIN, ["model.hidden=[64,32"], "model.hidden=[64,32", "'model.hidden=[64,32]'"),
    (TRAIN, ["model.hidden=64,32"], "model.hidden=64,32", "model.hidden=[64,32]"),
    (TRAIN, ["optimizer=gd,sgd"], "optimizer=gd,sgd", "gdtrain -m optimizer=gd,sgd"),
    (TRAIN, ["optimizer='sgd"], "optimizer='sgd", "quote"),
    (TRAIN, ["seed=rnge(0,3)"], "rnge", "Did you mean range?"),
    (TRAIN, ["-m", "seed=range(a,b)"], "range(a,b)", "range(0,3)"),
    (TRAIN, ["-m", "seed=range(0,-3)"], "range(0,-3)", "would be no run"),
    (TRAIN, ["-m", "seed=0,,1"], "seed=0,,1", "seed=1,2,3"),
    (TRAIN, ["-m", "seed=interval(0,1)"], "interval(0,1)", "seed=1,2,3"),
    (TRAIN, ["-m", "seed=-1,-2"], "-1", "from 0 to"),
    (TRAIN, ["epochs=5"], "epochs", "Did you mean trainer.max_epochs?"),
    (TRAIN, ["schedule.gamma=0.5"], "schedule.gamma", "schedule=reduce_on_plateau|step"),
    (TRAIN, ["data.root=x"], "data.root", "data=cifar10|fashion_mnist|mnist"),
    (TRAIN, ["schedule._target_=a.B"], "schedule._target_", "+schedule._target_=a.B"),
    (TRAIN, ["optimizer@x=sgd"], "optimizer@x", "optimizer=…"),
    (TRAIN, ["+optimizer=sgd"], "optimizer", "leave out the +"),
    (TRAIN, ["+seed=1"], "seed", "leave out the plus"),
    (TRAIN, ["~nothing"], "nothing", "no key nothing"),
    (TRAIN, ["trainer=[1]"], "trainer=[1]", "ddp, default"),
    (TRAIN, ["seed=${nothing}"], "nothing", "there is no key nothing"),
    (TRAIN, ["hydra.run.dir="], "hydra.run.dir=", "file or folder"),
    (TRAIN, ["seed=1" + 400 * "0"], "seed=1000", "to 4294967295"),
    (TRAIN, ["optimizer.lr=1" + 400 * "0"], "optimizer.lr=1000", "number in"),
    (TRAIN, ["optimizer.lr=1e999"], "optimizer.lr=inf", "number in"),
    (TRAIN, ["trainer.max_steps=9223372036854775808"], "9223372036854775808", "below 2^63"),
    (TRAIN, ["data.split_seed=4294967296"], "4294967296", "to 4294967295"),
    (TRAIN, ["model.hidden=[9223372036854775808]"], "model.hidden=[9223", "below 2^63"),
    (TRAIN, ["callbacks.trajectory.megabytes=1e400"], "megabytes=inf", "finite"),
    (TRAIN, ["trainer.devices=two"], "trainer.devices=two", "at least 1"),
    (TRAIN, ["+logger.w._target_=a.WandbLogger"], "a.WandbLogger", "+logger.w._partial_=true"),
    (TRAIN, ["+callbacks.c.x=5"], "callbacks.c", "+callbacks.c._target_=…"),
    (TRAIN, ["optimized_metric=best"], "optimized_metric=best", "loss/val"),
    (TRAIN, ["~data"], "~data", "set data=…"),
    (TRAIN, ["model=7"], "model=7", "cnn, linear, mlp"),
    (TRAIN, ["++step_size=dog"], "step_size has a choice already", "Write step_size=dog"),
    (TRAIN, ["hydra.job.num=x"], "hydra.job.num: ", "'x'"),
    (TRAIN, ["hydra.run.dir=/proc/foo", "data=iris"], "/proc/foo", "hydra.run.dir=…"),
    (TRAIN, ["trainer.accelerator=quantum"], "trainer.accelerator=quantum", "cpu, gpu, cuda"),
    (TRAIN, ["trainer.precision=3"], "trainer.precision=3", "bf16-mixed, 64-true"),
    (TRAIN, ["engine="], "engine=.", "native"),
    (TRAIN, [IRIS, "model.hidden=[-3]"], "Received: model.hidden=[-3]", "model.hidden must"),
    (TRAIN, [IRIS, "model.init=foo"], "Received: model.init=foo", "model.init must"),
    (TRAIN, [IRIS, "data.val_fraction=0.9"], "data.val_fraction=0.9", "data.test_fraction=0.2"),
    (TRAIN, [IRIS, "data.sampling=bogus"], "Received: data.sampling=bogus", "data.sampling must"),
    (TRAIN, [IRIS, "schedule=step", "schedule.every=-1"], "schedule.every=-1", "schedule.every m"),
    (TRAIN, [IRIS, "loss=huber", "loss.delta=-1"], "loss.delta=-1", "loss.delta must be"),
    (TRAIN, [IRIS, "callbacks.checkpoints.seconds_between=-1"],
     "Received: callbacks.checkpoints.seconds_between=-1", "must be a number in [0, ∞)"),
    (TRAIN, [IRIS, "instruments.distance.looks=-1"], "instruments.distance.looks=-1", "at least 1"),
    ("find_lr", [IRIS, "optimizer=minibatch", "data.batch_size=1000"],
     "Received: data.batch_size=1000", "data.batch_size must be at most 105"),
    ("explain", [IRIS, "model=linear", "data.dtype=int8"], "data.dtype='int8'", "data.dtype must"),
    ("find_lr", ["num=-3"], "num=-3", "min_lr, max_lr, updates, repetitions, output, and every"),
    ("explain", ["output=x"], "output=x", "knows: update, digits, examples, and every key"),
    (COMPARE, ["nope=3"], "nope=3", "and every key of gdtrain"),
    ("find_lr", ["epochs=3"], "epochs", "Did you mean trainer.max_epochs?"),
    (COMPARE, ["--seeds=3"], "--seeds=3", "Write seeds=3"),
    (COMPARE, ["seeds=100000000000"], "seeds=100000000000", "from 1 to 10000"),
    (COMPARE, ["target=1e999"], "target=1e999", "(−∞, ∞)"),
    (COMPARE, ["seeds=2", "seeds=3"], "seeds", "Give it once"),
    (EVALUATE, ["ckpt_path"], "ckpt_path", "Write ckpt_path=VALUE"),
    (EVALUATE, [], "ckpt_path=…", "is missing"),
    (EVALUATE, ["ckpt=evil.ckpt"], "ckpt", "Did you mean ckpt_path?"),
    (EVALUATE, ["checkpoint=x"], "checkpoint=x", "knows: ckpt_path"),
    (EVALUATE, ["ckpt_path=x", "data.name=a: b: c"], "a: b: c", "quotes of its own"),
    (EVALUATE, ["ckpt_path=x", "trust=../x"], "trust=../x", "such as mypackage"),
    (EVALUATE, ["ckpt_path=x", "trust=torch.nn,"], "trust=torch.nn,", "such as mypackage"),
    ("landscape", ["run=x", "trust=a b"], "trust=a b", "such as mypackage"),
    ("predict", ["ckpt_path=a", "input=b.npy", "output=c", "header=perhaps"],
     "header=perhaps", "true, false or auto"),
    (EVALUATE, ["ckpt_path=a", "input=b.npy", "header=perhaps"], "header=perhaps", "or auto"),
    ("predict", ["ckpt_path=a", "input=b"], "output", "output=predictions.csv"),
    ("explain", ["digits=99"], "digits=99", "from 1 to 12"),
    ("explain", ["updat=3"], "updat", "Did you mean update?"),
    ("find_lr", ["min_lr=nan"], "min_lr=nan", "(0, ∞)"),
    ("landscape", ["run=a", "points=1001"], "points=1001", "to 1000"),
    ("landscape", [], "none", "ckpt_path=…, run=… and ckpt_dir=…"),
]  # fmt: skip


def said(folder, name, words):
    done = command(folder, name, *words)
    assert done.returncode == 2
    return done.stderr


@pytest.mark.parametrize(("name", "words", "typed", "remedy"), WRONG)
def test_a_wrong_word_is_quoted_with_its_remedy_and_nothing_foreign(
    tmp_path, name, words, typed, remedy
):
    message = said(tmp_path, name, words)
    assert message.startswith("error")
    assert message.count("\n") == 1
    assert typed in message
    assert remedy in message
    assert not re.search(FOREIGN, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("data.target=price ($)", "price ($)"),
        ("data.target=price=x", "price=x"),
        ("data.target=l'été, 2020", "l'été, 2020"),
        ("data.path=a(b).csv", "a(b).csv"),
        ("data.path=~/a,b.csv", "~/a,b.csv"),
        ("data.path=C:\\new\\", "C:\\new\\"),
        ("ckpt_path=epoch=3-step=9.ckpt", "epoch=3-step=9.ckpt"),
        ("ckpt_path='already quoted'", "already quoted"),
    ],
)
def test_texts_are_taken_as_they_were_typed(word, value):
    (quoted,) = read_overrides([word])
    (again,) = read_overrides([quoted])  # further ranks get the words once more
    assert quoted == again
    assert parse_override(quoted).value() == value


def test_flags_may_stand_anywhere():
    read, words = read_flags(["optimizer=gd", "-m", "seed=0,1"])
    assert jobs(read) == [["optimizer=gd", "seed=0"], ["optimizer=gd", "seed=1"]]
    assert words == ["-m", "optimizer=gd", "seed=0,1"]


@pytest.mark.parametrize("known", COMMANDS, ids=lambda c: c.script)
def test_help_tells_every_key_that_the_parser_knows(known, tmp_path):
    done = command(tmp_path, known.script, "--help")
    assert done.returncode == 0
    text = done.stdout
    for name, key in known.keys.items():
        assert f"{name}{'KEY' * name.endswith('.')}={key.metadata['example']}" in text
        assert key.metadata["meaning"] in text
        if key.type in ("int | None", "float | None"):
            assert f"{key.metadata['within']}; " in text
    assert all(words in text for words in known.examples)


def test_every_key_of_a_choice_has_a_meaning():
    shown = 0
    for path in sorted(conf_directory().glob("*/*.yaml")):
        if path.parent.name in ("experiment", "instruments"):  # the first of a name tells
            continue
        for key, _, meaning in overview.documented(path, f"{path.parent.name}."):
            assert meaning, f"{path}: {key}"
            shown += 1
    assert shown > 100
    text = overview.overview([])
    assert "optimizer.lr=auto" in text
    assert all(f"  {path.name}=" in text for path in conf_directory().iterdir() if path.is_dir())


@pytest.mark.parametrize("flag", [["--config-dir=own"], ["--config-dir", "own"], ["-cd", "own"]])
def test_help_lists_the_choices_of_a_folder_given_beside_it(tmp_path, flag):
    (tmp_path / "own" / "optimizer").mkdir(parents=True)
    (tmp_path / "own" / "sampler").mkdir()
    (tmp_path / "own" / "sampler" / "even.yaml").write_text("_target_: mine.Even\n")
    (tmp_path / "own" / "optimizer" / "sgd.yaml").write_text("# Hydra takes the other.\n")
    (tmp_path / "own" / "optimizer" / "lion.yaml").write_text(
        "# Sign of the momentum.\ndefaults:\n  - sgd\n  - _self_\nbeta: 0.9 # of the average\n"
    )
    done = command(tmp_path, "train", "--help", *flag, "optimizer=lion")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "    lion                       Sign of the momentum." in lines
    assert lines[lines.index("  +sampler=") + 1] == "    even"
    assert "Hydra takes the other." not in done.stdout
    assert any(re.fullmatch(r"  optimizer\.beta=0\.9 +of the average", line) for line in lines)
    assert any(line.startswith("  optimizer.momentum=0") for line in lines)  # of the one it adds to
    assert "lion" not in command(tmp_path, "train", "--help").stdout
    missing = command(tmp_path, "train", "--help", "--config-dir=none")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "--config-dir must name a folder. Received: --config-dir=none" in missing.stderr


def test_completion_is_printed_and_nothing_is_trained(tmp_path):
    done = command(tmp_path, "train", "-sc", "install=bash")
    assert done.returncode == 0
    assert "hydra_bash_completion" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_sweeper_gets_the_metric_that_is_to_be_optimized():
    metrics = {"loss/train": 0.5, "metric/accuracy/test": 0.9}
    assert train._optimized("loss/val", metrics) == 0.5  # there is no validation part
    assert train._optimized("loss/val", {**metrics, "loss/val": 0.4}) == 0.4
    assert train._optimized("metric/accuracy/test", metrics) == 0.9
    assert train._optimized("loss/val", {"loss/val": float("nan")}) == float("inf")
    with pytest.raises(ConfigurationError, match="loss/train, metric/accuracy/test"):
        train._optimized("metric/f1/val", metrics)


SRUN = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environ", "by", "rank", "size"),
    [
        ({}, "", 0, 1),
        ({"LOCAL_RANK": "1"}, "", 1, 1),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, "", 1, 1),
        (SRUN, "srun", 1, 2),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, "", 0, 1),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, "", 0, 1),
        ({**SRUN, "SLURM_NTASKS": "1", "LOCAL_RANK": "1"}, "", 1, 1),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4"}, "torchrun", 3, 4),
        ({**SRUN, "TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "4"}, "torchrun", 0, 4),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun", 1, 2),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpiexec", 1, 2),
        ({"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"}, "jsrun", 1, 2),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "the launcher", 1, 2),
    ],
)
def test_each_launcher_is_known(environ, by, rank, size):
    assert launch(environ) == Launch(by, rank, size)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_several_processes_without_a_strategy_are_told_once(monkeypatch, tmp_path, rank):
    for name, value in {**SRUN, "SLURM_PROCID": rank}.items():
        monkeypatch.setenv(name, value)
    message = said(tmp_path, "train", ["data=iris"])
    assert message.count("\n") == (rank == "0")
    assert ("add trainer=ddp trainer.devices=2" in message) == (rank == "0")
    assert list(tmp_path.iterdir()) == []
    check_processes({"strategy": "ddp", "devices": 2})
    with pytest.raises(ConfigurationError, match=r"Set trainer\.devices=2"):
        check_processes({"strategy": "ddp", "devices": 3})


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "RANK", "LOCAL_RANK"])
def test_a_rank_that_is_no_number_is_told_by_its_name(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "x")
    message = said(tmp_path, "train", ["data=iris"])
    assert f"{name} must be a whole number" in message
    assert f"Received: {name}=x" in message


def test_what_slurm_has_left_is_not_taken_up(monkeypatch, tmp_path):
    from functools import partial

    import numpy as np
    from lightning import Trainer

    import gdtrain
    from gdtrain.lightning.strategy import alone_in, cluster_environment

    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_3.ckpt").write_bytes(b"of another run")
    for name, value in {**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)), np.arange(40) % 2
    result = gdtrain.fit("linear", x, y, variant="gd", epochs=2, lr=0.1, directory="run")
    assert result.summary["updates"] == 2
    assert [p.name for p in tmp_path.glob("hpc*")] == ["hpc_ckpt_3.ckpt"]
    monkeypatch.setenv("SLURM_NTASKS", "2")
    ranks = cluster_environment()
    assert (ranks.world_size(), ranks.auto_requeue) == (2, False)
    with (
        pytest.raises(ValueError, match=r"go on from hpc_ckpt_3\.ckpt"),
        alone_in(tmp_path.relative_to(tmp_path), partial(Trainer, accelerator="cpu")),
    ):
        pass
