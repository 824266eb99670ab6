"""The instruments: what they log, that it changes nothing, when they look and where not."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional
from watched_runs import N, Numbers, StopAt, fit, small

from gdtrain.callbacks import (
    Distance,
    Divergence,
    GradientCosine,
    GradientNoise,
    GradientNorms,
    Histograms,
    Instrument,
    LossCurves,
    StepTest,
    UpdateRatio,
)
from gdtrain.data import DatasetDataModule, EmbeddedDataModule
from gdtrain.losses import OneHotSquaredError
from gdtrain.models import Linear
from gdtrain.models.dropout import Dropout
from gdtrain.objective import Objective
from gdtrain.runs.configuration import conf_directory
from gdtrain.runs.train import train
from gdtrain.schedules import Cosine


class Odd(nn.Module):
    """What a user may write: a shared weight, a frozen one, an idle one, and control flow."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.body = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.body["b"].weight = self.body["a"].weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        hidden = torch.tanh(self.body["a"](x) * self.frozen)
        for _ in range(2):
            hidden = hidden + torch.tanh(self.body["b"](hidden))
        return self.scale * hidden[:, :3]


def convolutional():
    layers = [nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers, nn.Linear(27, 3))


class Path(Callback):
    """Keeps the way of a run, with one update in a sweep."""

    def __init__(self):
        self.theta, self.rows = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(batch[0].clone())
        self.theta.append([p.detach().clone() for p in pl_module.model.parameters()])


def everything(every=None):
    return [
        GradientNorms(every=every),
        UpdateRatio(every=every),
        Distance(every=every),
        GradientCosine(every=every),
        GradientNoise(every=every, size=4),
        StepTest(every=every, probe=64),
        Histograms(every=every),
    ]


class Reference:
    """Plain autograd in float64, on a model of its own."""

    def __init__(self, model, module):
        torch.manual_seed(0)
        self.model = model().double()
        self.x, self.y = (t.clone() for t in module.trainer.datamodule.examples("train"))
        assert self.x.dtype == torch.float64

    def gradient(self, theta, rows):
        """Of the mean over rows; one pass, or with no BatchNorm a loop over examples."""
        trained = []
        for p, value in zip(self.model.parameters(), theta, strict=True):
            p.data.copy_(value)
            trained += [p] * p.requires_grad
        mixes = any(isinstance(m, nn.BatchNorm2d) for m in self.model.modules())
        passes = [rows] if mixes else rows[:, None]
        total = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64)
        for part in passes:
            loss = functional.cross_entropy(self.model(self.x[part]), self.y[part])
            grads = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            total += torch.cat([g.flatten() for g in grads]) / len(passes)
        return total

    def flat(self, theta):
        pairs = zip(self.model.parameters(), theta, strict=True)
        return torch.cat([value.flatten() for p, value in pairs if p.requires_grad])

    def slices(self):
        """By layer, where its numbers are in a flat vector."""
        found, done = {}, 0
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                places = found.setdefault(name.rpartition(".")[0] or name, [])
                places += range(done, done + p.numel())
                done += p.numel()
        return found


# ------------------------------------------------------------------ against float64


# BatchNorm normalises each micro-batch by itself: another gradient
@pytest.mark.parametrize(
    ("model", "sweep", "micro"),
    [(m, *cut) for m in (small, Odd) for cut in ((1, None), (6, None), (6, 3))]
    + [(convolutional, 1, None), (convolutional, 6, None)],
)
def test_each_number_is_that_of_a_plain_loop(model, sweep, micro):
    options = {"model": model, "momentum": 0.9, "weight_decay": 0.1, "schedule": Cosine()}
    path, logger = Path(), Numbers()
    module = fit(path, sweep=1, double=True, **options)
    step_test = StepTest(every=6, probe=200)
    fit(
        GradientNorms(every=6), UpdateRatio(every=6), Distance(every=6), GradientCosine(every=6),
        step_test, sweep=sweep, micro=micro, double=True, logger=logger, **options,
    )  # fmt: skip
    found, reference = logger.found, Reference(model, module)
    looks = sorted(found["gradient/norm"])
    assert looks == [0, 6, 12, 18]
    start = reference.flat(path.theta[0])
    decay = torch.cat(
        [  # not on biases and norms
            0.1 * torch.full((p.numel(),), not n.endswith("bias") and n != "2.weight").double()
            for n, p in reference.model.named_parameters()
            if p.requires_grad
        ]
    )
    for t in looks:
        theta, after = reference.flat(path.theta[t]), reference.flat(path.theta[t + 1])
        g = reference.gradient(path.theta[t], path.rows[t])
        following = reference.gradient(path.theta[t + 1], path.rows[t + 1])
        step = after - theta
        assert found["gradient/norm"][t] == pytest.approx(float(g.norm()), rel=1e-9)
        assert found["step/norm"][t] == pytest.approx(float(step.norm()), rel=1e-9)
        assert found["step/ratio"][t] == pytest.approx(float(step.norm() / theta.norm()), rel=1e-9)
        cosine = functional.cosine_similarity(g, following, dim=0)
        assert found["gradient/cosine"][t] == pytest.approx(float(cosine), rel=1e-8)
        way = float((theta - start).norm())
        assert found["distance/from_start"][t] == pytest.approx(way, rel=1e-9)
        assert found["distance/relative"][t] == pytest.approx(way / float(start.norm()), rel=1e-9)
        for name, places in reference.slices().items():
            norm = float(g[places].norm())
            assert found[f"gradient/norm/{name}"][t] == pytest.approx(norm, rel=1e-9)
            if theta[places].norm() > 0:
                ratio = float(step[places].norm() / theta[places].norm())
                assert found[f"step/ratio/{name}"][t] == pytest.approx(ratio, rel=1e-9)
        # Both ends on all examples but those of the batch, in passes of 32; 97 are 33 + 33 + 31,
        # for BatchNorm takes no pass of one.
        rows = torch.tensor(sorted(set(range(N)) - set(path.rows[t].tolist())))
        slopes = []
        for point, vector in ((path.theta[t], theta), (path.theta[t + 1], after)):
            parts = rows.split(33) if model is convolutional else [rows]
            mean = sum(len(p) * reference.gradient(point, p) for p in parts) / len(rows)
            slopes.append(float((mean + decay * vector) @ step))
        if slopes[0] < 0:
            assert found["step/alpha"][t] == pytest.approx(-slopes[1] / slopes[0], rel=1e-7)
        else:
            assert t not in found["step/alpha"]
    assert step_test.verdict.steps == len(looks)


@pytest.mark.parametrize("model", [small, Odd])
@pytest.mark.parametrize("micro", [None, 3])
def test_the_noise_of_all_examples_is_that_of_their_gradients(model, micro):
    path, logger = Path(), Numbers()
    module = fit(path, model=model, sweep=1, double=True)
    noise = GradientNoise(groups=N, size=1, every=12)
    fit(noise, model=model, sweep=4, micro=micro, double=True, logger=logger)
    reference, found = Reference(model, module), logger.found
    ratios = []
    for t in sorted(found["noise/variance"]):
        gradients = torch.stack(
            [reference.gradient(path.theta[t], torch.tensor([i])) for i in range(N)]
        )
        variance = float(gradients.var(dim=0).sum())  # with N − 1
        square = float(gradients.mean(dim=0).square().sum())
        assert found["noise/variance"][t] == pytest.approx(variance, rel=1e-9)
        assert found["noise/gradient_square"][t] == pytest.approx(square, rel=1e-8)
        ratios.append((variance, square))
    variance, square = (sum(r[i] for r in ratios) for i in range(2))  # averaged apart
    assert noise.scale.value == pytest.approx(variance / square, rel=1e-8)
    assert found["noise/scale"][t] == pytest.approx(variance / square, rel=1e-8)
    snr = found["noise/signal_to_noise"][t]
    assert snr == pytest.approx(8 * square / variance, rel=1e-8)  # B = 8


def test_with_batch_norm_the_noise_is_that_of_groups():
    kept = []

    class Kept(GradientNoise):
        def _rows(self, update):
            kept.append(super()._rows(update))
            return kept[-1]

    path, noise, logger = Path(), Kept(groups=10, size=6, every=30), Numbers()
    module = fit(path, noise, model=convolutional, sweep=1, double=True, logger=logger)
    assert kept[0].shape == (10, 6)
    assert len(set(kept[0].flatten().tolist())) == 60
    reference = Reference(convolutional, module)
    means = torch.stack([reference.gradient(path.theta[0], rows) for rows in kept[0]])
    variance = 6 * float(means.var(dim=0).sum())
    square = float(means.mean(dim=0).square().sum()) - variance * (1 / 60 - 1 / N)
    assert logger.found["noise/variance"][0] == pytest.approx(variance, rel=1e-8)
    assert logger.found["noise/gradient_square"][0] == pytest.approx(square, rel=1e-7)


@pytest.mark.parametrize(("lr", "state"), [(0.01, "stable"), (0.1, "unstable")])
def test_the_verdict_tells_stable_rates_from_those_that_climb(lr, state):
    """A linear model of digits by batches of 32; it diverges from about η = 0.07 on."""
    trial, curves = StepTest(every=1), LossCurves()
    fit(
        trial, curves, model=Linear((1, 8, 8), 10), loss=OneHotSquaredError(), lr=lr,
        updates=50, data=EmbeddedDataModule("digits", batch_size=32),
    )  # fmt: skip
    losses = curves.history.train["loss"]
    assert trial.verdict.state == state
    assert (losses[-1] < losses[0]) == (state == "stable")
    words = trial.summary()["step_test"]["verdict"]
    assert words.startswith(f"The steps are {state}")
    assert "of the last 32 ended higher than they began" in words


# ------------------------------------------------------------------ nothing changes


def outcome(module, curves):
    state = module.trainer.optimizers[0].state_dict()
    return {
        "model": {name: t.clone() for name, t in module.model.state_dict().items()},
        "state": state["state"],
        "groups": repr(state["param_groups"]),
        "losses": curves.history.train["loss"],
        "rates": curves.history.train["lr"],
        "random": torch.get_rng_state(),
    }


def assert_same(a, b):
    assert a.pop("groups") == b.pop("groups")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def noisy():
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6), nn.BatchNorm1d(6),
        Dropout(0.2), nn.Linear(6, 3),
    )  # fmt: skip


CASES = {
    "native SGD": {"batch": 1, "engine": "native", "momentum": 0.9},
    "native batches": {"batch": 8, "engine": "native", "momentum": 0.9, "schedule": Cosine()},
    "native GD by rule": {"batch": "full", "engine": "native", "rule": "auto"},
    "native, raced": {"batch": 8, "engine": "native", "rule": "auto"},
    "eager GD by rule": {"batch": "full", "engine": "eager", "rule": "auto"},
    "eager, micro-batches": {"batch": 8, "engine": "eager", "micro": 3, "momentum": 0.9},
    "odd": {"batch": 8, "engine": "eager", "model": Odd, "weight_decay": 0.1},
    "noisy": {"batch": 7, "engine": "eager", "model": noisy, "momentum": 0.9},
    "Adam": {"batch": 8, "engine": "eager", "model": convolutional, "optimizer": torch.optim.Adam},
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_run_with_all_instruments_is_the_same_bit_for_bit(case, monkeypatch):
    monkeypatch.setattr("gdtrain.descent.work._PASS", 2**22)  # or few looks are paid for
    ends = []
    for instruments in ([], everything(every=5), everything()):
        curves, logger = LossCurves(), Numbers()
        options = {"updates": 40, "sweep": 7, "logger": logger, **CASES[case]}
        module = fit(Divergence(), curves, *instruments, **options)
        assert len(logger.found.get("gradient/norm", ())) >= 8 * bool(instruments)
        ends.append(outcome(module, curves))
    assert_same(dict(ends[0]), ends[1])
    assert_same(dict(ends[0]), ends[2])


@pytest.mark.parametrize("engine", ["native", "eager"])
def test_a_resumed_run_with_instruments_is_the_same_run(engine, tmp_path):
    def run(updates, instruments, ckpt_path=None, save=False):
        logger, curves = Numbers(), LossCurves()
        options = {"sweep": 1, "engine": engine, "momentum": 0.9, "ckpt_path": ckpt_path}
        module = fit(curves, *instruments, updates=updates, logger=logger, **options)
        if save:
            module.trainer.save_checkpoint(tmp_path / "half.ckpt")
        return outcome(module, curves), logger.found

    plain, _ = run(40, [])
    uncut, again = everything(every=8), everything(every=8)
    whole, seen = run(40, uncut)
    run(20, everything(every=8), save=True)
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed, later = run(40, again, ckpt_path=tmp_path / "half.ckpt")
    for end in (whole, resumed):
        assert_same(dict(plain), end)
    assert set(later) >= {"distance/from_start", "noise/variance", "gradient/norm"}
    for tag in ("distance/from_start", "noise/variance", "gradient/cosine", "gradient/norm"):
        for update, value in later[tag].items():
            assert update >= 20
            assert seen[tag][update] == value
    assert set(later["gradient/norm"]) == {u for u in seen["gradient/norm"] if u >= 20}
    assert again[4].scale == uncut[4].scale  # over looks before and after
    assert again[5].verdict == uncut[5].verdict


def test_a_model_too_large_for_the_checkpoint_has_no_distance_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr("gdtrain.callbacks.vectors._SAVED", 10)
    module = fit(Distance(every=5), updates=12, sweep=4)
    module.trainer.save_checkpoint(tmp_path / "half.ckpt")
    logger = Numbers()
    fit(Distance(every=5), updates=24, sweep=4, ckpt_path=tmp_path / "half.ckpt", logger=logger)
    assert not logger.found


# ------------------------------------------------------------------ when


def test_they_share_one_look_and_make_one_step(monkeypatch):
    from gdtrain.analysis import trial_update

    made = []

    class Counting(trial_update.Eager):
        def __call__(self, indices, factors, draw=0):
            made.append(draw)
            return super().__call__(indices, factors, draw)

    monkeypatch.setattr(trial_update, "Eager", Counting)
    fit(*everything(every=10), updates=30, sweep=5, engine="native")
    assert len(made) == len(set(made)) == 3


@pytest.mark.parametrize(("options", "expected"), [
    ({"every": 7}, [0, 7, 14, 21, 28, 35]),
    ({"looks": 5, "share": 0.9}, [0, 8, 16, 24, 32]),
    ({"looks": 3}, [0, 13, 26]),
])  # fmt: skip
@pytest.mark.parametrize("sweep", [3, "auto"])
def test_looks_stand_at_the_updates_that_the_plan_names(options, expected, sweep):
    logger = Numbers()
    fit(GradientNorms(**options), updates=40, sweep=sweep, logger=logger)
    assert list(logger.found["gradient/norm"]) == expected


def test_looks_take_no_more_than_their_share_of_the_passes(monkeypatch, caplog):
    """Full batch, where a pass has its N examples: a look makes two, and with a cosine three."""
    monkeypatch.setattr("gdtrain.callbacks.instrument.FREE", 0)
    monkeypatch.setattr("gdtrain.descent.work._PASS", 0)
    caplog.set_level(logging.INFO, logger="gdtrain")
    for instruments, passes in (
        ([GradientNorms(share=0.04)], 2),
        ([GradientNorms(share=0.04), GradientCosine(share=0.04)], 3),
        ([GradientNorms(share=0.04), StepTest(share=0.04)], 4),
        ([GradientNorms(share=0.04, looks=7), GradientNorms(share=0.04, looks=8)], 4),
    ):
        for updates in (49, 200):
            logger = Numbers()
            fit(*instruments, updates=updates, batch="full", logger=logger)
            found = len(logger.found.get("gradient/norm", ()))
            paid = int(0.04 * len(instruments) * updates / passes)
            assert found == min(paid, instruments[-1].looks)
    short = Numbers()
    fit(GradientNorms(share=0.02), updates=10, batch="full", logger=short)
    assert not short.found
    assert "a look would take more than a share of 0.02 of the run's work" in caplog.text


def test_without_a_planned_end_looks_become_rarer_as_the_run_goes_on(monkeypatch):
    monkeypatch.setattr("gdtrain.descent.work._PASS", 0)

    norms, logger = GradientNorms(looks=4, share=0.02), Numbers()
    fit(norms, StopAt(1700), updates=-1, batch="full", logger=logger)
    looks = list(logger.found["gradient/norm"])
    # Two passes are 2% of 100 updates; four looks in each doubling.
    assert looks == [0, 100, 200, 300, 400, 500, 600, 700, 800, 1000, 1200, 1400, 1600]


# ------------------------------------------------------------------ where


class OneByOne(torch.utils.data.Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, i):
        return torch.full((4,), i / 60), i % 3


def test_without_resident_examples_they_say_once_that_they_do_not_look(caplog):
    data = DatasetDataModule(OneByOne(), batch_size=8, val_fraction=0.2)
    caplog.set_level(logging.INFO, logger="gdtrain")
    logger = Numbers()
    module = fit(*everything(every=1), data=data, updates=6, logger=logger)
    assert module.updates == 6
    assert not logger.found
    said = [r.message for r in caplog.records if r.message.startswith("instruments:")]
    assert len(said) == 1
    assert "GradientNorms" in said[0]
    assert "PairLoader" in said[0]


@pytest.mark.parametrize(
    ("probe", "batch", "reason"),
    [
        (64, 100, "there must be 16 examples beside a batch (received: 5)."),
        (16, 60, "of 16 probe examples about 7 are not in a batch, and there must be 16: a larger "
         "probe helps."),
    ],
)  # fmt: skip
def test_what_an_instrument_cannot_do_is_said_and_the_others_look(caplog, probe, batch, reason):
    caplog.set_level(logging.INFO, logger="gdtrain")
    logger = Numbers()
    instruments = StepTest(every=1, probe=probe), GradientNorms(every=1)
    fit(*instruments, batch=batch, updates=2, logger=logger)
    said = [r.message for r in caplog.records if r.message.startswith("instruments:")]
    assert said == [f"instruments: StepTest do not look: {reason}"]
    assert "gradient/norm" in logger.found
    assert "step/alpha" not in logger.found


def test_after_divergence_there_is_nothing_to_see():
    logger = Numbers()
    options = {"batch": "full", "updates": 60, "lr": 1e30, "model": Odd, "sweep": 1}
    fit(*everything(every=1), logger=logger, **options)
    for values in logger.found.values():
        assert all(math.isfinite(v) for v in values.values())


def test_in_bfloat16_they_see_what_the_run_does():
    logger = Numbers()
    fit(*everything(every=5), updates=20, logger=logger, precision="bf16-mixed")
    assert logger.found["gradient/norm"][0] > 0


# ------------------------------------------------------------------ loggers, summary, options


def test_tensorboard_gets_scalars_and_histograms_and_csv_the_scalars(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path / "csv")]
    fit(*everything(every=5), updates=30, sweep=5, logger=loggers)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    expected = "gradient/norm gradient/cosine step/ratio step/share_higher step/alpha_median "
    expected += "distance/from_start distance/relative noise/variance noise/gradient_square"
    assert set(expected.split()) <= set(tags["scalars"])
    assert "step/alphas" in tags["histograms"]
    layer = next(t for t in tags["histograms"] if t.startswith("weights/"))
    assert layer.replace("weights/", "gradients/") in tags["histograms"]
    assert events.Scalars("gradient/norm")[0].step == 0
    text = next((tmp_path / "csv").rglob("metrics.csv")).read_text()
    assert "noise/variance" in text.splitlines()[0]


def test_the_summary_tells_the_noise_scale_and_the_verdict(tmp_path):
    words = ["data=iris", "optimizer=sgd", "callbacks=none", "logger=csv", "trainer.max_epochs=10"]
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = compose("train", [*words, "instruments=full"])
    train(config, tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())["instruments"]
    assert set(found) == {"noise_scale", "step_test"}
    undefined = found["noise_scale"]["value"] is None
    assert "heuristic" in found["noise_scale"]["words"] or undefined
    assert found["step_test"]["verdict"].endswith(".")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientNorms(every=0), "every must be a whole number of at least 1"),
        (lambda: GradientNorms(looks=0), "looks must be a whole number of at least 1. Received"),
        (
            lambda: GradientNorms(share=1.0),
            r"share must be a number in \(0, 1\). Received: share=1.0",
        ),
        (lambda: GradientNoise(groups=3), "groups must be a whole number of at least 4"),
        (lambda: GradientNoise(size=0), "size must be a whole number of at least 1"),
        (lambda: StepTest(probe=8), "probe must be a whole number of at least 16"),
    ],
)
def test_options_out_of_range_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_instrument_of_ones_own():
    class Longest(Instrument):
        def measure(self, update):
            return {"longest": max(float(s.abs().max()) for s in update.step), "nan": math.nan}

    logger = Numbers()
    fit(Longest(every=10), updates=20, sweep=10, logger=logger)
    assert set(logger.found) == {"longest"}
    assert len(logger.found["longest"]) == 2


# ------------------------------------------------------------------ what a module may do


@pytest.mark.parametrize("kind", [nn.Dropout, Dropout])
def test_each_group_has_random_numbers_of_its_own(kind):
    """Against the covariance over examples and masks, drawn in float64; G has masks too."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), kind(0.8), nn.Linear(64, 3))
    logger = Numbers()
    noise = GradientNoise(groups=13, size=8, every=1)
    options = {"engine": "eager", "sweep": 1, "logger": logger, "lr": 1e-12, "double": True}
    module = fit(noise, model=model, updates=300, **options)
    x, y = module.trainer.datamodule.examples("train")
    generator = torch.Generator().manual_seed(1)
    net = module.model

    def drawn(rows):
        hidden = torch.tanh(net[0](x[rows]))
        mask = (torch.rand(hidden.shape, generator=generator) > 0.8) / 0.2
        loss = functional.cross_entropy(net[3](hidden * mask), y[rows])
        return torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(net.parameters()))])

    single = torch.stack([drawn(torch.randint(N, (1,), generator=generator)) for _ in range(4000)])
    variance = float(single.var(0).sum())
    whole = np.mean([float(drawn(torch.arange(N)).square().sum()) for _ in range(2000)])
    found = np.array(list(logger.found["noise/variance"].values()))
    assert found.mean() == pytest.approx(variance, rel=0.06)
    found = np.array(list(logger.found["noise/gradient_square"].values()))
    assert found.mean() == pytest.approx(whole, rel=0.06)


class Remembers(nn.Module):
    """Puts a longer tensor in its buffer's place at each pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, self.seen[-1:] + 1])
        return self.linear(x) * (1 + 0.01 * torch.sin(self.seen[-1]))


@pytest.mark.parametrize("batch", [8, "full"])
def test_a_buffer_that_is_replaced_by_a_longer_one_is_put_back(batch):
    weights = []
    for callbacks in ((), everything(every=1)):
        module = fit(*callbacks, model=Remembers, batch=batch, updates=6, sweep=1)
        weights.append(module.model.linear.weight.detach().clone())
        assert len(module.model.seen) == 7
    assert torch.equal(*weights)


def test_before_the_first_update_passes_are_no_larger_than_the_run_would_make(monkeypatch):
    monkeypatch.setattr(Objective, "automatic_size", lambda self: 21)
    sizes = []

    class Sees(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    fit(StepTest(every=1), model=Sees(4, 3), batch="full", micro="auto", updates=2, engine="eager")
    assert max(sizes) <= 32


@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW])
def test_alpha_has_the_decay_that_is_in_the_gradient(optimizer):
    """λθ is in ∇J for the first two: slopes by hand, in float64."""
    path, logger = Path(), Numbers()
    options = {"optimizer": optimizer, "weight_decay": 0.5, "lr": 0.05, "double": True}
    module = fit(
        path, StepTest(every=1), batch="full", updates=4, sweep=1, logger=logger, **options
    )
    reference, rows = Reference(small, module), torch.arange(N)
    decayed = [torch.full_like(p, p.ndim > 1).flatten() for p in module.model.parameters()]
    decay = 0.5 * torch.cat(decayed) * (optimizer is not torch.optim.AdamW)
    for t in range(3):
        ends = path.theta[t : t + 2]
        step = reference.flat(ends[1]) - reference.flat(ends[0])
        start, end = (
            float((reference.gradient(at, rows) + decay * reference.flat(at)) @ step) for at in ends
        )
        assert logger.found["step/alpha"][t] == pytest.approx(-end / start, rel=1e-6)
