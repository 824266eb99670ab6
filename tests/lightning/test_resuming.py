"""A run goes on as the run that it was: whatever its updates depend on is compared, at once."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_iris
from torch import nn
from watched_runs import SILENT, StopAt

import gdtrain
from gdtrain import SGD, MiniBatchSGD, SupervisedModule
from gdtrain.callbacks import BestAndLast, Convergence, Divergence, GradientNorms, LossCurves
from gdtrain.cli.composition import compose
from gdtrain.data import EmbeddedDataModule
from gdtrain.errors import ConfigurationError
from gdtrain.lightning.resuming import model_settings, settings
from gdtrain.losses import CrossEntropy, Loss, OneHotSquaredError
from gdtrain.models import MLP
from gdtrain.runs.run import run
from gdtrain.runs.train import train
from gdtrain.schedules import Constant, Cosine, ReduceOnPlateau, Step, WarmupStableDecay
from gdtrain.step_sizes import DoG, DoWG, ScheduleFree, StochasticPolyak


class Pinball(Loss):
    """A user's loss, which tells its options nowhere but in attributes."""

    task = "multiclass"

    def __init__(self, q=0.5):
        super().__init__()
        self.q = q

    def forward(self, prediction, target):
        return self.q * nn.functional.cross_entropy(prediction, target, reduction="none")


class Own(nn.Module):
    """A user's model, likewise."""

    def __init__(self, slope=0.1, norm=nn.LayerNorm):
        super().__init__()
        self.slope = slope
        self.layer, self.norm, self.out = nn.Linear(4, 4), norm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(nn.functional.leaky_relu(self.norm(self.layer(x)), self.slope))


def mlp(**options):
    return partial(MLP, (4,), 3, **{"hidden": [3, 3], "dropout": 0.1, **options})


def sgd(**options):
    return partial(SGD, **{"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01, **options})


USUAL_MODEL, USUAL_OPTIMIZER, USUAL_SCHEDULE = mlp(), sgd(), Cosine()
CONVERGENCE = partial(Convergence, every=1000)
EARLY = partial(EarlyStopping, "loss/val", patience=4)


def start(
    *,
    model=USUAL_MODEL,
    loss=CrossEntropy,
    optimizer=USUAL_OPTIMIZER,
    schedule=USUAL_SCHEDULE,
    step_size=None,
    decay_biases=False,
    divergence=Divergence,
    convergence=CONVERGENCE,
    early=EARLY,
    checkpoint=None,
    folder=None,
    callbacks=(),
    loggers=(),
    trainer=None,
    points=500,
    **options,
):
    seed_everything(0, verbose=False)
    data = EmbeddedDataModule("iris", **{"batch_size": 20, "updates_per_sweep": 2, **options})
    rest = {"step_size": step_size, "decay_biases": decay_biases}
    module = SupervisedModule(model(), loss(), optimizer, schedule, **rest)
    usual = [make() for make in (divergence, convergence, early) if make is not None]
    return run(
        module,
        data,
        trainer=partial(Trainer, **{"max_epochs": 2, **SILENT, **(trainer or {})}),
        callbacks=[*usual, LossCurves(points), *([BestAndLast] if folder else []), *callbacks],
        loggers=loggers,
        directory=folder,
        checkpoint=checkpoint,
    )


def fit(X=None, **options):
    features, y = load_iris(return_X_y=True)
    options = {"progress": False, **options}
    return gdtrain.fit("linear", features if X is None else X, y, **options)


def assert_same(one, other):
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """From options of `start` to the checkpoint of such a run after two updates; made once."""
    made = {}

    def of(name, **options):
        if name not in made:
            folder = tmp_path_factory.mktemp("run")
            callbacks = [*options.pop("callbacks", ()), StopAt(2)]
            result = start(folder=folder, callbacks=callbacks, **options)
            assert result.summary["updates"] == 2
            made[name] = folder / "checkpoints" / "last.ckpt"
        return made[name]

    return of


# What is said; with which options a run goes on; and those of the run before, where not the usual.
REFUSED = {
    "lr: 0.1 then, 0.2 now": {"optimizer": sgd(lr=0.2)},
    "weight_decay: 0.01, 0.0 (by group) then, 0.0 now": {"optimizer": sgd(weight_decay=0.0)},
    "optimizer: SGD then, MiniBatchSGD now": {
        "optimizer": partial(MiniBatchSGD, lr=0.1, momentum=0.5, weight_decay=0.01)
    },
    "optimizer: SGD then, Adam now": {"optimizer": partial(torch.optim.Adam, lr=0.1)},
    "decay_biases: False then, True now": {"decay_biases": True},
    "schedule: Cosine then, Constant now": {"schedule": Constant()},
    "schedule: Cosine then, auto now": {"schedule": "auto"},
    "schedule.final: 0.0 then, 0.1 now": {"schedule": Cosine(final=0.1)},
    "step_size: None then, DoG now": {"optimizer": sgd(momentum=0), "step_size": DoG()},
    "step_size: None then, auto now": {"optimizer": sgd(), "step_size": "auto"},
    "max_steps: -1 (Cosine is stretched over them; a constant schedule is not) then, 5 now": {
        "trainer": {"max_steps": 5}
    },
    "loss: CrossEntropy then, OneHotSquaredError now": {"loss": OneHotSquaredError},
    "model.hidden: [3, 3] then, [3, 4] now": {"model": mlp(hidden=[3, 4])},
    "model: MLP then, Sequential now": {"model": lambda: mlp()().layers},
    "model.layers.1: Linear(in_features=4, out_features=3), weight float32 [3, 4], bias": {
        "model": lambda: mlp()().double()
    },
    "precision: 32-true then, 64-true now": {"trainer": {"precision": "64-true"}},
    "check_val_every_n_epoch: 1 then, 2 now": {"trainer": {"check_val_every_n_epoch": 2}},
    "batch_size: 20 then, 21 now": {"batch_size": 21},
    "micro_batch_size: None then, 7 now": {"micro_batch_size": 7},
    "seed: 0 then, 1 now": {"seed": 1},
    "val_fraction: 0.1 then, 0.2 now": {"val_fraction": 0.2},
    "standardize: True then, False now": {"standardize": False},
    "dtype: float32 then, float64 now": {"dtype": "float64"},
    "Divergence.action: 'recover' then, 'stop' now": {"divergence": partial(Divergence, "stop")},
    "Divergence: there then, none now": {"divergence": None},
    "Convergence.tolerance: 1e-06 then, 0.001 now": {"convergence": partial(CONVERGENCE, 1e-3)},
    "EarlyStopping.min_delta: 0.0 then, 0.1 now": {"early": partial(EARLY, min_delta=0.1)},
    "EarlyStopping: there then, none now": {"early": None},
    "StochasticWeightAveraging: none then, there now": {
        "callbacks": [StochasticWeightAveraging(swa_lrs=0.1)]},
    "schedule.patience: 1 then, 2 now": (
        {"schedule": ReduceOnPlateau(patience=2)}, {"schedule": ReduceOnPlateau(patience=1)}),
    "step_size.c: 0.5 then, 0.6 now": (
        {"optimizer": MiniBatchSGD, "step_size": StochasticPolyak(c=0.6)},
        {"optimizer": MiniBatchSGD, "step_size": StochasticPolyak(c=0.5)}),
    "max_epochs: 2 (DoWG is stretched over them": (
        {"optimizer": MiniBatchSGD, "step_size": DoWG(decay="linear"), "schedule": Constant(),
         "trainer": {"max_epochs": 4}},
        {"optimizer": MiniBatchSGD, "step_size": DoWG(decay="linear"), "schedule": Constant()}),
    "betas: [0.9, 0.99] then, [0.8, 0.99] now": (
        {"optimizer": partial(torch.optim.Adam, betas=(0.8, 0.99))},
        {"optimizer": partial(torch.optim.Adam, betas=(0.9, 0.99))}),
    "lr: 0.25 then, 0.5 now": (
        {"optimizer": sgd(lr=torch.tensor(0.5))}, {"optimizer": sgd(lr=torch.tensor(0.25))}),
    "loss.q: 0.5 then, 0.4 now": ({"loss": partial(Pinball, 0.4)}, {"loss": Pinball}),
    "model.slope: 0.1 then, 0.2 now": ({"model": partial(Own, 0.2)}, {"model": Own}),
    "model.norm: LayerNorm(elementwise_affine=True, eps=1e-05": (
        {"model": partial(Own, norm=partial(nn.LayerNorm, eps=0.1))}, {"model": Own}),
    "EMAWeightAveraging.kwargs: ": (
        {"callbacks": [EMAWeightAveraging(decay=0.8)]},
        {"callbacks": [EMAWeightAveraging(decay=0.9)]}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_a_run_with_another_setting_is_refused_with_its_name(checkpoints, message):
    options = REFUSED[message]
    now, then = options if isinstance(options, tuple) else (options, {})
    path = checkpoints(message if then else "usual", **then)
    with pytest.raises(ValueError, match=re.escape(f"  {message}")) as caught:
        start(checkpoint=path, **now)
    # What follows from it is not told beside it.
    assert len(re.findall(r"^  ", str(caught.value), re.MULTILINE)) <= 4


DAMAGES = {
    "callbacks": (lambda s: s["callbacks"].update(Divergence={"seen": 3}), "Divergence"),
    "optimizer": (lambda s: s.update(optimizer_states=[{"x": 1}]), "SGD"),
    "progress": (lambda s: s["loops"].update(fit_loop=3), "loops"),
    "random state": (lambda s: s["gdtrain"].pop("random_state"), r"gdtrain\.random_state"),
    "weights alone": (lambda s: s.pop("optimizer_states"), "holds weights only"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_its_name_and_part(checkpoints, tmp_path, damage):
    change, part = DAMAGES[damage]
    state = torch.load(checkpoints("usual"), weights_only=True)
    change(state)
    torch.save(state, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match=rf"damaged\.ckpt .*{part}"):
        start(checkpoint=tmp_path / "damaged.ckpt")


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        (lambda m: nn.Sequential(*[m[i] for i in (1, 0, 2)]), {"model/0", "model/1"}),
        (lambda m: nn.Sequential(m[0], nn.Tanh(), m[2]), {"model/1"}),
        (lambda m: nn.Sequential(m[0], m[1], nn.BatchNorm1d(3, eps=1e-3)), {"model/2"}),
        (lambda m: nn.Sequential(m[0], m[1], nn.BatchNorm1d(3, momentum=0.2)), {"model/2"}),
        (lambda m: nn.Sequential(m[0], nn.LeakyReLU(0.2), m[2]), {"model/1"}),
        (lambda m: nn.Sequential(m[0], m[1]), {"model/2"}),
        (lambda m: m.to(torch.float64), {"model/0", "model/2"}),
        (lambda m: nn.Sequential(nn.Linear(3, 3, bias=False), m[1], m[2]), {"model/0"}),
        (lambda m: m.requires_grad_(False) and m, {"model/frozen"}),
    ],
)
def test_layers_order_settings_and_types_of_a_model_tell_it_apart(changed, names):
    def make():
        return nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(0.1), nn.BatchNorm1d(3))

    then, now = model_settings(make()), model_settings(changed(make()))
    assert {key for key in then | now if then.get(key) != now.get(key)} == names


def test_all_that_differs_is_told_in_one_message(checkpoints):
    with pytest.raises(ValueError, match="can only go on as the run that it was") as caught:
        start(
            checkpoint=checkpoints("usual"),
            optimizer=sgd(momentum=0.9, weight_decay=0.0),
            model=mlp(activation="tanh"),
            sampling="sequential",
            trainer={"max_epochs": 3},
        )
    keys = re.findall(r"^  ([\w.]+): ", str(caught.value), re.MULTILINE)
    assert set(keys) == {"model.activation", "sampling", "max_epochs", "momentum", "weight_decay"}
    assert "gdtrain.fit(gdtrain.load('" in str(caught.value)


def test_other_examples_are_refused_even_where_nothing_is_learnt_from_them(tmp_path):
    options = {"variant": "minibatch", "standardize": False, "lr": 0.1, "schedule": Constant()}
    fit(epochs=1, directory=tmp_path, **options)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="examples_fingerprint: "):
        fit(load_iris().data + 1, epochs=2, checkpoint=last, **options)


@pytest.fixture(scope="module")
def whole():
    return start()


@pytest.mark.parametrize(
    "options",
    [
        {"updates_per_sweep": 1},
        {"updates_per_sweep": "auto"},
        {"callbacks": [GradientNorms()], "points": 3},
        {"model": mlp(init="xavier")},
        {"trainer": {"log_every_n_steps": 3}},
        {"folder": True, "loggers": [partial(CSVLogger, name="", version="")]},
    ],
)
def test_what_changes_no_update_may_change(checkpoints, whole, tmp_path, options):
    if options.get("folder"):
        options = {**options, "folder": tmp_path}
    rest = start(checkpoint=checkpoints("usual"), **options)
    assert rest.summary["updates"] == whole.summary["updates"] == 12
    assert_same(rest, whole)


@pytest.mark.parametrize(
    ("schedule", "goes_on"),
    [
        (Constant(), True),
        (Constant(warmup=3), True),
        (Constant(warmup=0.25), False),  # a fraction of the run
        (Step(every=2), True),
        (WarmupStableDecay(warmup=1, decay=2), True),  # the decay is still to come
        (WarmupStableDecay(warmup=1, decay=0.5), True),
        (WarmupStableDecay(warmup=0.1, decay=0.5), False),
        (Cosine(), False),
        (ReduceOnPlateau(), True),
    ],
)
def test_more_epochs_are_taken_where_the_updates_made_would_have_been_the_same(
    checkpoints, schedule, goes_on
):
    path = checkpoints(repr(schedule), schedule=schedule)
    options = {"schedule": schedule, "trainer": {"max_epochs": 4}}
    if not goes_on:
        with pytest.raises(ValueError, match="is stretched over them"):
            start(checkpoint=path, **options)
    else:
        assert_same(start(checkpoint=path, **options), start(**options))


def test_lightnings_own_resume_compares_too(checkpoints):
    def go_on(momentum=0.5, epochs=2, **options):
        seed_everything(0, verbose=False)
        module = SupervisedModule(mlp()(), CrossEntropy(), sgd(momentum=momentum), Cosine())
        callbacks = [Divergence(), CONVERGENCE(), EARLY(), LossCurves()]
        rest = {"logger": False, "enable_checkpointing": False, **SILENT}
        trainer = Trainer(max_epochs=epochs, callbacks=callbacks, **rest)
        data = EmbeddedDataModule("iris", batch_size=20, **options)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoints("usual"))
        return module.updates

    with pytest.warns(UserWarning, match="callbacks used to create"):
        assert go_on() == 12
    with pytest.raises(ValueError, match=r"momentum: 0\.5 then, 0\.7 now") as caught:
        go_on(momentum=0.7, split_seed=3, epochs=3)
    assert "max_epochs: 2 (Cosine" in str(caught.value)
    assert "split_seed: 0 then, 3 now" in str(caught.value)


def test_layers_that_draw_or_normalise_by_process_bind_the_number_of_processes():
    for model, bound in ((nn.Dropout(0.5), True), (nn.BatchNorm1d(3), True), (nn.ReLU(), False)):
        module = SupervisedModule(nn.Sequential(nn.Linear(3, 3), model), CrossEntropy(), SGD)
        trainer = Trainer(logger=False, enable_checkpointing=False, max_epochs=1, **SILENT)
        assert ("trainer.devices" in settings(module, trainer)) == bound


# ---------------------------------------------------------------------- a run without its summary


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 9}])
def test_a_run_killed_before_its_summary_is_finished_without_an_update(tmp_path, limit):
    whole = start(folder=tmp_path / "run", trainer=limit)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="there is nothing left to do"):
        start(checkpoint=last, trainer=limit)
    (tmp_path / "run" / "summary.json").unlink()
    rest = start(checkpoint=last, folder=tmp_path / "rest", trainer=limit)
    written = json.loads((tmp_path / "rest" / "summary.json").read_text())
    for key in whole.summary.keys() - {"fit_seconds", "engine_reason", "micro_batch_size"}:
        assert written[key] == whole.summary[key] == rest.summary[key], key
    assert_same(rest, whole)
    assert rest.history.val["update"] == whole.history.val["update"]
    assert rest.history.train["loss"] == whole.history.train["loss"]
    left = {p.name for p in (tmp_path / "rest" / "checkpoints").iterdir()}
    assert left == {"best.ckpt", "last.ckpt"}


AVERAGED = {"variant": "minibatch", "step_size": ScheduleFree(), "schedule": Constant()}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({**AVERAGED, "epochs": 2}, "BUDGET"),  # the average is what it ends at
        ({"variant": "gd", "lr": 0.1, "weight_decay": 0.5, "epochs": 3000}, "CONVERGED"),
    ],
)
def test_fit_finishes_a_run_in_the_folder_that_it_has(tmp_path, options, reason):
    whole = fit(directory=tmp_path / "run", **options)
    assert whole.stop.reason.value == reason
    (tmp_path / "run" / "summary.json").unlink()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    rest = fit(directory=tmp_path / "run", checkpoint=last, **options)
    assert (rest.stop.reason, rest.stop.message) == (whole.stop.reason, whole.stop.message)
    assert rest.metrics == whole.metrics
    assert rest.summary["updates"] == whole.summary["updates"] < 3000
    assert_same(rest, whole)
    assert (tmp_path / "run" / "summary.json").is_file()


def unfinished(folder):
    """A run of the command that was killed before its summary; and what was in its folder."""
    words = ["data=iris", "model=linear", "optimizer=gd", "optimizer.lr=0.1",
        "trainer.max_epochs=3", "instruments=off", "logger=csv"]  # fmt: skip
    train(compose(words, None), folder / "run")
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (folder / "run" / "summary.json").unlink()
    return [*words, f"ckpt_path={folder}/run/checkpoints/last.ckpt"], before


@pytest.mark.parametrize("named", ["new", "run"])
def test_the_command_finishes_a_run_in_its_own_folder(tmp_path, named):
    words, before = unfinished(tmp_path)
    (tmp_path / named).mkdir(exist_ok=True)  # as Hydra makes it
    result = train(compose(words, None), tmp_path / named)
    assert result.directory == tmp_path / "run"
    after = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after.keys() == before.keys()
    for name in ("metrics.csv", "config.yaml"):
        assert after[Path("run", name)] == before[Path("run", name)]
    then, now = (json.loads(files[Path("run", "summary.json")]) for files in (before, after))
    assert (now["metrics"], now["updates"]) == (then["metrics"], then["updates"])


def test_a_run_with_updates_left_goes_on_in_a_folder_of_its_own(tmp_path):
    words, _ = unfinished(tmp_path)
    longer = compose([*words, "trainer.max_epochs=5", "schedule=constant"], None)
    with pytest.raises(ConfigurationError, match=r"already holds a run.* a folder of its own"):
        train(longer, tmp_path / "run")
    with pytest.raises(ConfigurationError, match="These differ"):
        train(compose([*words, "seed=1"], None), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
