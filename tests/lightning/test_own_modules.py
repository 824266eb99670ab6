"""Modules of one's own: constants of −∞, outputs in tuples, norms that need two examples, freezing.

The oracle is a plain loop over the same examples, which shares nothing with the package but the
order of the examples.
"""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    LambdaCallback,
    StochasticWeightAveraging,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from watched_runs import QUIET

import gdtrain
from gdtrain import GD, MiniBatchSGD, SupervisedModule
from gdtrain.callbacks import BestAndLast, Divergence
from gdtrain.data import ArrayDataModule
from gdtrain.lightning.description import structure
from gdtrain.losses import CrossEntropy
from gdtrain.objective import prediction_of
from gdtrain.schedules import Constant, Polynomial

N = 33
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 4))
Y = (X[:, 0] + 0.3 * RNG.normal(size=N) > 0).astype(int)
PAIR = torch.from_numpy(X), torch.from_numpy(Y)
UNSEEN = {**QUIET, "limit_val_batches": 0}


def data(batch_size, **options):
    options = {"val_fraction": 0.0, "test_fraction": 0.0, "standardize": False, **options}
    return ArrayDataModule(X, Y, batch_size=batch_size, dtype="float64", **options)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def train(
    model, batch_size=11, *, epochs=6, callbacks=(), schedule=None, checkpoint=None, **options
):
    optimizer = options.pop("optimizer", partial(MiniBatchSGD, lr=0.3))
    kind, source = options.pop("kind", SupervisedModule), options.pop("data", {})
    module = kind(model, CrossEntropy(), optimizer, schedule, **options)
    saves = {"enable_checkpointing": any(isinstance(c, BestAndLast) for c in callbacks)}
    rest = {"precision": "64-true", **UNSEEN, **saves}
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **rest)
    trainer.fit(module, datamodule=data(batch_size, **source), ckpt_path=checkpoint)
    return module


def batches(epochs):
    """The examples of each update, as gdtrain draws them."""
    source = data(11)
    source.setup()
    loader = source.train_dataloader()
    return [loader.block(t, 1)[0] for t in range(epochs * loader.updates_per_epoch)]


def plain(rates, momentum=0.0, epochs=6):
    """The net after descent whose update t has η of its two layers, `rates(t)`; at 0 one rests."""
    model, buffers, (x, y) = net(), {}, PAIR
    for t, rows in enumerate(batches(epochs)):
        model.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        for layer, rate in zip((model[0], model[2]), rates(t), strict=True):
            for p in layer.parameters() if rate else ():
                buffers[p] = momentum * buffers.get(p, 0.0) + p.grad
                p.data -= rate * buffers[p]
    return model


def assert_equal(model, other, tolerance=1e-12):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------- constants of −∞


class Attends(nn.Module):
    """Looks at earlier features only; the mask is a buffer, or made anew each time."""

    def __init__(self, buffer):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2).double()
        mask = torch.triu(torch.full((4, 4), -torch.inf, dtype=torch.float64), 1)
        if buffer:
            self.register_buffer("mask", mask)
        else:
            self.mask = mask

    def forward(self, x):
        return self.layer(torch.softmax(x[:, None] * x[:, :, None] + self.mask, -1).sum(1))


def test_a_mask_of_minus_infinity_is_a_constant_and_a_run_with_it_goes_on(tmp_path):
    whole, saved = train(Attends(buffer=False)), BestAndLast(tmp_path)
    module = train(Attends(buffer=True), callbacks=[Divergence()])
    assert (module.stop, module.updates) == (None, 18)
    assert_equal(module.model, whole.model, 0)
    for epochs, path in ((3, None), (6, str(saved.last_path))):
        callbacks = [saved, Divergence()]
        module = train(Attends(True), epochs=epochs, callbacks=callbacks, checkpoint=path)
    assert module.stop is None
    assert_equal(module.model, whole.model, 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_buffer_that_was_finite_is_watched(value):
    def spoil(trainer, module, *_):
        if module.updates >= 5:
            module.model.count.fill_(value)

    model = Attends(buffer=True)
    model.register_buffer("count", torch.zeros(2))
    callbacks = [LambdaCallback(on_train_batch_end=spoil), Divergence("stop")]
    module = train(model, callbacks=callbacks, epochs=200)
    assert module.stop.reason.value == "NON_FINITE"
    assert module.updates < 600


# ---------------------------------------------------------------------- what a model returns

WAYS = {
    "tuple": lambda logits, x: (logits, x),
    "logits": lambda logits, x: {"hidden": x, "logits": logits},
    "only entry": lambda logits, x: {"out": logits},
}


class Wrapped(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.layers, self.way = net(), way

    def forward(self, x):
        return self.way(self.layers(x), x)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_prediction_in_a_tuple_or_mapping_trains_as_the_tensor_does(way):
    module, tensor = (train(model, engine="eager") for model in (Wrapped(way), net()))
    assert_equal(module.model, tensor.model, 0)
    assert module.evaluate([PAIR]) == tensor.evaluate([PAIR])
    assert torch.equal(module(PAIR[0]), tensor(PAIR[0]))


def test_a_mapping_in_the_compiled_engine_in_fit_and_in_predict():
    module = train(Wrapped(WAYS["logits"]), engine="compiled")
    assert_equal(module.model, train(net(), engine="eager").model)
    model = Wrapped(WAYS["tuple"]).float()
    result = gdtrain.fit(model, X, Y, variant="minibatch", batch_size=4, epochs=2)
    assert result.predict(X).shape == (N,)
    assert {"loss/test", "metric/accuracy/test"} <= result.metrics.keys()


@pytest.mark.parametrize(
    ("output", "received"),
    [
        ((), "tuple of nothing"),
        (({}, torch.zeros(1)), "tuple of dict, Tensor"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "dict with the keys 'a', 'b'"),
        ({"logits": None, "b": torch.zeros(1)}, "dict with the keys 'logits', 'b'"),
        (None, "NoneType"),
        (np.zeros(2), "ndarray"),
    ],
)
def test_what_is_no_prediction_is_told(output, received):
    with pytest.raises(ValueError, match="must return its prediction") as error:
        prediction_of(output)
    assert f"Received: {received}." in str(error.value)


# ---------------------------------------------------------------------- norms and single examples


def normed(norm):
    return nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 2)).double()


@pytest.mark.parametrize(
    ("batch_size", "micro", "why"),
    [
        (32, None, "the last batch of an epoch has one: 33 examples in batches of 32"),
        (1, None, "each update sees one"),
        (11, 5, "11 examples of a batch in passes of 5"),
        ("full", 16, "33 examples of a batch in passes of 16"),
        (20, 12, "13 examples of a batch in passes of 12"),
    ],
)
def test_batch_norm_is_told_before_the_first_update_that_one_example_will_come(
    batch_size, micro, why
):
    model = normed(nn.BatchNorm1d(6))
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(ValueError, match=why):
        train(model, batch_size, data={"micro_batch_size": micro})
    assert all(map(torch.equal, before, model.state_dict().values()))


@pytest.mark.parametrize(
    ("drop_last", "batch_size", "refused"), [(False, 8, True), (True, 8, False), (False, 11, False)]
)
def test_batch_norm_with_a_loader_of_ones_own(drop_last, batch_size, refused):
    loader = DataLoader(TensorDataset(*PAIR), batch_size=batch_size, drop_last=drop_last)
    warnings.filterwarnings("ignore", message="You defined a `validation_step`")
    module = SupervisedModule(normed(nn.BatchNorm1d(6)), CrossEntropy(), partial(GD, lr=0.1))
    trainer = Trainer(max_epochs=1, precision="64-true", **UNSEEN)
    if refused:
        with pytest.raises(ValueError, match="33 examples in batches of 8"):
            trainer.fit(module, loader)
    else:
        trainer.fit(module, loader)
    assert module.updates == (0 if refused else N // batch_size)


@pytest.mark.parametrize(
    "model",
    [
        normed(nn.LayerNorm(6)),
        normed(nn.GroupNorm(2, 6)),
        nn.Sequential(  # BatchNorm over the places of one image
            nn.Unflatten(1, (1, 2, 2)), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2)
        ).double(),
    ],
)
def test_norms_that_can_be_trained_on_one_example_are(model):
    assert train(model, batch_size=32, epochs=1).updates == 2


# ---------------------------------------------------------------------- groups and freezing


class Thaws(BaseFinetuning):
    """Trains the last layer alone for two epochs, then all, the first with a tenth of η."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.model[0], optimizer)


def thawed(t):
    return 0.03 if t >= 6 else 0.0, 0.3


@pytest.mark.parametrize(
    ("kind", "engine", "momentum"),
    [
        (MiniBatchSGD, "eager", 0.0),
        (MiniBatchSGD, "auto", 0.9),
        (MiniBatchSGD, "compiled", 0.9),
        (torch.optim.SGD, "auto", 0.0),
    ],
)
def test_a_group_added_while_training_is_trained(kind, engine, momentum):
    optimizer = partial(kind, lr=0.3, momentum=momentum)
    module = train(net(), callbacks=[Thaws(), Divergence()], optimizer=optimizer, engine=engine)
    assert_equal(module.model, plain(thawed, momentum))


class ThawsHot(Thaws):
    """With a rate at which the first layer diverges."""

    def finetune_function(self, pl_module, epoch, optimizer):
        super().finetune_function(pl_module, epoch, optimizer)
        if epoch == 2:
            optimizer.param_groups[-1]["lr"] = 1e30


def test_a_run_recovers_after_a_group_was_added_however_it_is_cut():
    found, (x, y) = [], PAIR
    for cut in (1, 7, "auto"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
        divergence = Divergence(recoveries=40)
        callbacks, sweeps = [ThawsHot(), divergence], {"updates_per_sweep": cut}
        module = train(model, epochs=300, callbacks=callbacks, schedule=Constant(), data=sweeps)
        assert module.stop is None
        events = [(event["update"], event["good_update"]) for event in divergence.events]
        found.append([events, *(p.tolist() for p in model.parameters())])
    assert found[0] == found[1] == found[2]
    assert events[0][0] in range(6, 22)
    assert events[0][1] == 6  # where it was thawed
    assert F.cross_entropy(model(x), y) < 0.4


def test_a_group_added_under_a_schedule_goes_on_from_its_rate():
    # The callback takes a tenth of η at update 5, and update 6 has it. T = 18.
    module = train(net(), callbacks=[Thaws()], schedule=Polynomial(power=1))
    scales = 13 / 12, 1.0
    expected = plain(
        lambda t: [
            scale * (1 - t / 18) * rate for scale, rate in zip(scales, thawed(t), strict=True)
        ]
    )
    assert_equal(module.model, expected)


def at_epoch(number, act):
    """A callback that does something to the module, or its optimizer, at the start of an epoch."""

    def start(trainer, module):
        if trainer.current_epoch == number:
            act(module.model, trainer.optimizers[0].param_groups[0])

    return LambdaCallback(on_train_epoch_start=start)


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_layers_frozen_while_training_stay(engine):
    freezes = at_epoch(3, lambda model, group: model[0].requires_grad_(False))
    module = train(net(), callbacks=[freezes], engine=engine)
    assert_equal(module.model, plain(lambda t: (0.0 if t >= 9 else 0.3, 0.3)))


def test_a_rate_set_by_a_callback_holds():
    sets = at_epoch(4, lambda model, group: group.update(lr=0.05))
    module = train(net(), callbacks=[sets], decay_biases=True, schedule=Constant())
    assert_equal(module.model, plain(lambda t: 2 * [0.05 if t >= 12 else 0.3]))


class Backbone(SupervisedModule):
    """Lightning's callback asks for an attribute of this name."""

    @property
    def backbone(self):
        return self.model[0]


def test_backbone_finetuning_raises_the_rate_of_the_backbone():
    callback = BackboneFinetuning(
        unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 2.0, backbone_initial_lr=0.01
    )
    module = train(net(), kind=Backbone, epochs=5, callbacks=[callback])
    backbone = (0.0, 0.0, 0.01, 0.02, 0.04)
    assert_equal(module.model, plain(lambda t: (backbone[t // 3], 0.3), epochs=5))


# ---------------------------------------------------------------------- averaged weights


class Records(Callback):
    """The parameters at each start of an epoch."""

    def __init__(self):
        self.kept, self.rates = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.kept.append([p.detach().clone() for p in pl_module.model.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.rates += outputs["rates"].tolist()


@pytest.mark.parametrize(("engine", "batch_size"), [("eager", 11), ("auto", "full")])
def test_stochastic_weight_averaging_is_the_mean_of_the_epochs(engine, batch_size):
    records = Records()
    callbacks = [StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=4), records, Divergence()]
    module = train(net(), batch_size, callbacks=callbacks, engine=engine, schedule=Polynomial())
    # Lightning takes the weights in at the start of epochs 3, 4 and 5, counted from 0.
    for k, p in enumerate(module.model.parameters()):
        expected = torch.stack([kept[k] for kept in records.kept[3:]]).mean(0)
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-12)


def test_its_rates_are_those_of_torchs_scheduler():
    records = Records()
    averaging = StochasticWeightAveraging(
        swa_lrs=0.1, swa_epoch_start=2, annealing_epochs=3, annealing_strategy="linear"
    )
    train(net(), callbacks=[averaging, records], epochs=7)
    optimizer = torch.optim.SGD(net().parameters(), lr=0.3)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, 0.1, 3, "linear")
    expected = [0.3]
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(records.rates, np.repeat(expected, 3), rtol=1e-12)


def test_batch_norm_of_averaged_weights_has_the_statistics_of_all_examples():
    torch.manual_seed(0)
    model = normed(nn.BatchNorm1d(6))
    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=3)
    module = train(model, callbacks=[averaging], epochs=5)
    assert module.updates == 15  # no epoch more
    with torch.no_grad():
        h = model[0](PAIR[0])
    torch.testing.assert_close(model[1].running_mean, h.mean(0))
    torch.testing.assert_close(model[1].running_var, h.var(0, unbiased=False))


def test_a_rule_that_computes_the_rate_and_swa_lrs_exclude_each_other():
    averaging = StochasticWeightAveraging(swa_lrs=0.1)
    with pytest.raises(ValueError, match=r"sets η \(swa_lrs\), and BarzilaiBorwein computes it"):
        train(net(), "full", callbacks=[averaging], optimizer=GD, step_size="auto")


# ---------------------------------------------------------------------- modes, and functions


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_layers_in_evaluation_mode_stay_in_it():
    model = normed(nn.BatchNorm1d(6))
    model[1].eval()
    before = [b.clone() for b in model[1].buffers()]
    module = train(model, batch_size=32, epochs=2)  # with a last batch of one
    assert not model[1].training
    assert model[0].training
    assert all(map(torch.equal, before, model[1].buffers()))
    module.evaluate([PAIR])
    assert [layer.training for layer in model] == [True, False, True, True]


def test_a_model_may_come_from_a_function_made_in_place():
    make = lambda shape, outputs: nn.Linear(shape[0], outputs)  # noqa: E731
    assert gdtrain.fit(make, X, Y, variant="gd", epochs=2).summary["updates"] == 2


def test_functions_in_a_layer_are_told_apart():
    class Applies(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

    functions = [torch.tanh, torch.relu, lambda x: x, lambda x: 2 * x, F.relu, partial(F.elu, 2)]
    told = [structure(Applies(f))[""] for f in functions]
    assert len(set(told)) == len(functions)
