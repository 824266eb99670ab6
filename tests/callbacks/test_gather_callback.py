"""GatherMicroBatches: in anybody's LightningModule, each update is that of a plain loop over B.

N examples, B per update, M per batch of the loader. The oracle is a loop in float64 that takes the
B examples of an update at once, and shares nothing with the package.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset
from watched_runs import QUIET

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.callbacks import GatherMicroBatches
from gdtrain.callbacks.gathering import _size_of
from gdtrain.losses import SquaredError

N = 31  # prime


def data(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.sin(x.sum(1, keepdim=True)) + 0.1 * x[:, :1]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


class Regression(LightningModule):
    """As anybody writes it; notes what the hooks see."""

    def __init__(self, optimizer, schedule=None, frequency=1, model=None):
        super().__init__()
        self.model = model if model is not None else network()
        self.optimizer, self.schedule, self.frequency = optimizer, schedule, frequency
        self.seen = []  # (global_step, gradient) in on_before_optimizer_step
        self.rates = []  # after each batch
        self.calls = {"optimizer_step": 0, "scheduler": 0}

    def training_step(self, batch):
        x, y = batch
        loss = 0.5 * ((self.model(x) - y) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        config = {"interval": "step", "frequency": self.frequency}
        scheduler = {"scheduler": self.schedule(optimizer), **config}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_before_optimizer_step(self, optimizer):
        self.seen.append((self.trainer.global_step, gradient(self)))

    def optimizer_step(self, *args, **kwargs):
        self.calls["optimizer_step"] += 1
        super().optimizer_step(*args, **kwargs)

    def lr_scheduler_step(self, scheduler, metric):
        self.calls["scheduler"] += 1
        super().lr_scheduler_step(scheduler, metric)

    def on_train_batch_end(self, *args):
        self.rates.append(self.optimizers().param_groups[0]["lr"])


def gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def weights(module):
    return parameters_to_vector(module.parameters()).detach()


def fit(module, loader, *callbacks, gather=None, ckpt_path=None, **arguments):
    trainer = Trainer(
        callbacks=[gather or GatherMicroBatches(), *callbacks], **{**QUIET, **arguments}
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def batches(M, n=N, tensors=None):
    return DataLoader(TensorDataset(*(tensors or data(n))), batch_size=M)


def oracle(
    blocks, model=None, *, lr=0.3, momentum=0.0, rate=lambda t: 1.0, clip=lambda g: g, tensors=None
):
    """θ and the mean gradients, one block of example numbers after the other; v ← μv + g."""
    x, y = tensors or data()
    model = model or network()
    velocity, gradients = 0.0, []
    for t, block in enumerate(blocks):
        loss = 0.5 * ((model(x[block]) - y[block]) ** 2).sum() / len(block)
        g = parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
        gradients.append(g)
        velocity = momentum * velocity + clip(g)
        vector_to_parameters(weights(model) - lr * rate(t) * velocity, model.parameters())
    return weights(model), gradients


def epochs(k, B=N, n=N):
    return [torch.arange(i, min(i + B, n)) for _ in range(k) for i in range(0, n, B)]


def assert_same(module, expected, gradients=None, tolerance=1e-12):
    assert torch.linalg.norm(weights(module) - expected) <= tolerance * torch.linalg.norm(expected)
    if gradients is not None:
        assert [t for t, _ in module.seen] == list(range(len(gradients)))
        for (_, g), h in zip(module.seen, gradients, strict=True):
            assert torch.linalg.norm(g - h) <= tolerance * torch.linalg.norm(h)


def gd(momentum=0.0, **options):
    return lambda params: GD(params, lr=0.3, momentum=momentum, num_samples=N, **options)


def minibatch(B, momentum=0.0):
    return lambda params: MiniBatchSGD(params, lr=0.3, momentum=momentum, batch_size=B)


# ---------------------------------------------------------------------- exact updates


FULL = [(N, M) for M in (1, 4, 10, 30, 31)]
PARTS = [(6, 1), (6, 2), (6, 3), (6, 6), (8, 4), (10, 5), (30, 15)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("B", "M"), [*FULL, *PARTS])
def test_updates_are_those_of_a_plain_loop_ceil_n_by_b_in_an_epoch(B, M, momentum):
    module = Regression(gd(momentum) if B == N else minibatch(B, momentum))
    trainer = fit(module, batches(M), max_epochs=5)
    blocks = epochs(5, B)
    expected, gradients = oracle(blocks, momentum=momentum)
    assert_same(module, expected, gradients)
    assert trainer.global_step == module.calls["optimizer_step"] == 5 * -(-N // B)


class Stream:
    """Unsized; yields what it is given."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def cut(sizes, tensors=None):
    """The examples in parts of these sizes, and over again."""
    tensors = tensors or data()
    rows = (torch.arange(sum(sizes)) % len(tensors[0])).split(sizes)
    return [tuple(tensor[part] for tensor in tensors) for part in rows]


class Resumable:
    """Sized; goes on with the epoch that it was in."""

    def __init__(self, batches):
        self.batches, self.done = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.done %= len(self)  # Lightning does not drive a sized loader to its end
        while self.done < len(self):
            self.done += 1
            yield self.batches[self.done - 1]

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def test_batches_of_any_sizes_from_an_unsized_loader():
    module = Regression(minibatch(7, 0.9))
    trainer = fit(module, Stream(*cut([3, 4, 7, 1, 1, 5, 6, 1, 2])), max_epochs=1)
    expected, gradients = oracle(torch.arange(30).split(7), momentum=0.9)
    assert_same(module, expected, gradients)
    assert trainer.global_step == 5


def test_carry_goes_on_in_the_next_epoch():
    module = Regression(minibatch(10, 0.9))
    trainer = fit(module, batches(1), gather=GatherMicroBatches(epoch_end="carry"), max_epochs=4)
    endless = torch.arange(4 * N) % N
    expected, gradients = oracle(endless[:120].split(10), momentum=0.9)
    assert_same(module, expected, gradients)
    assert trainer.global_step == 12
    assert trainer.optimizers[0].gathered == 4


def test_gd_that_meets_fewer_examples_than_it_names_says_so_once():
    module = Regression(gd())
    loader = DataLoader(TensorDataset(*data()), batch_size=4, drop_last=True)
    with pytest.warns(UserWarning, match=r"3 examples short of GD\(num_samples=31\)") as record:
        fit(module, loader, max_epochs=3)
    assert sum("examples short" in str(warning.message) for warning in record) == 1
    expected, gradients = oracle([torch.arange(28)] * 3)
    assert_same(module, expected, gradients)


def test_max_steps_counts_updates_and_limit_train_batches_ends_an_epoch():
    module = Regression(gd())
    assert fit(module, batches(4), max_steps=3, max_epochs=-1).global_step == 3
    expected, _ = oracle(epochs(3))
    assert_same(module, expected)

    module = Regression(minibatch(8))
    trainer = fit(module, batches(4), max_epochs=2, limit_train_batches=5)
    assert trainer.global_step == 6  # of 8, 8 and 4 examples
    expected, gradients = oracle([*epochs(1, 8, 20)] * 2)
    assert_same(module, expected, gradients)


def test_losses_are_not_divided_and_the_trainer_is_left_as_it_was():
    class Losses(Callback):
        seen = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen += (float(outputs["loss"]),)

    losses, module = Losses(), Regression(gd())
    trainer = fit(module, batches(10), losses, max_epochs=1)
    parts = (0.5 * (network()(data()[0]) - data()[1]) ** 2).split(10)
    assert losses.seen == pytest.approx([part.mean().item() for part in parts], rel=1e-14)
    assert trainer.accumulate_grad_batches == 1
    assert "_should_accumulate" not in vars(trainer.fit_loop.epoch_loop)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


class TwoHeads(LightningModule):
    """One of two heads has no gradient in a batch; the body is frozen."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2).double().requires_grad_(False)
        self.heads = nn.ParameterList([torch.ones(2).double(), torch.ones(2).double()])
        self.means = []

    def training_step(self, batch):
        return (self.body(batch["x"]) @ self.heads[int(batch["head"][0])]).mean()

    def configure_optimizers(self):
        return GD(self.parameters(), lr=0.0, num_samples=N)

    def on_before_optimizer_step(self, optimizer):
        self.means.append([head.grad.clone() for head in self.heads])
        assert all(p.grad is None for p in self.body.parameters())


def test_missing_gradients_count_as_zero_and_frozen_parameters_stay():
    x, _ = data()
    heads = torch.arange(N) // 20  # 0 in the first 20 examples
    parts = zip(x.split(10), heads.split(10), strict=True)
    loader = Stream(*({"x": part, "head": head} for part, head in parts))
    module = TwoHeads()
    before = module.body.weight.clone()
    fit(module, loader, max_epochs=1)
    features = module.body(x)
    for mean, rows in zip(module.means[0], (slice(20), slice(20, N)), strict=True):
        torch.testing.assert_close(mean, features[rows].sum(0) / N, rtol=1e-12, atol=0)
    assert torch.equal(module.body.weight, before)


# ---------------------------------------------------------------------- per update


def exponential(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


@pytest.mark.parametrize(
    ("optimizer", "blocks", "each", "frequency"),  # each: the updates at the batches of an epoch
    [
        (minibatch(8, 0.9), epochs(3, 8), [0, 1, 0, 1, 0, 1, 0, 1], 1),
        (gd(0.9), epochs(11), [0, 0, 0, 0, 0, 0, 0, 1], 3),
    ],
)
def test_a_schedule_counts_updates(optimizer, blocks, each, frequency):
    module = Regression(optimizer, exponential, frequency)
    made = np.cumsum(each * (len(blocks) // sum(each)))
    trainer = fit(module, batches(4), max_epochs=len(made) // 8)
    expected, gradients = oracle(blocks, momentum=0.9, rate=lambda t: 0.9 ** (t // frequency))
    assert_same(module, expected, gradients)
    assert module.calls["scheduler"] == len(blocks) // frequency
    assert module.rates == pytest.approx(list(0.3 * 0.9 ** (made // frequency)))
    assert trainer.lr_scheduler_configs[0].frequency == frequency


def test_a_schedule_of_interval_epoch():
    class PerEpoch(Regression):
        def configure_optimizers(self):
            optimizer = self.optimizer(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    module = PerEpoch(minibatch(8))
    fit(module, batches(4), max_epochs=3)
    expected, _ = oracle(epochs(3, 8), rate=lambda t: 0.5 ** (t // 4))
    assert_same(module, expected)


def by_norm(bound):
    return lambda g: g * min(1.0, float(bound / (torch.linalg.norm(g) + 1e-6)))


@pytest.mark.parametrize(
    ("algorithm", "bound", "clip"),
    [("norm", 0.05, by_norm(0.05)), ("value", 0.02, lambda g: g.clamp(-0.02, 0.02))],
)
def test_clipping_sees_the_mean(algorithm, bound, clip):
    module = Regression(gd(0.9))
    clips = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
    fit(module, batches(4), max_epochs=20, **clips)
    expected, gradients = oracle(epochs(20), momentum=0.9, clip=clip)
    assert any(not torch.equal(clip(g), g) for g in gradients)
    assert_same(module, expected, gradients)


def test_on_after_backward_of_the_module_changes_the_mean():
    class Halved(Regression):
        def on_after_backward(self):
            for p in self.parameters():
                p.grad.mul_(0.5)

    module = Halved(gd())
    fit(module, batches(10), max_epochs=5)
    expected, _ = oracle(epochs(5), clip=lambda g: 0.5 * g)
    assert_same(module, expected)


@pytest.mark.parametrize("first", [True, False])
def test_other_callbacks_see_the_mean_wherever_they_stand(first):
    class Sees(Callback):
        seen = ()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen += (gradient(pl_module),)

    sees, module = Sees(), Regression(gd())
    pair = [sees, GatherMicroBatches()] if first else [GatherMicroBatches(), sees]
    Trainer(callbacks=pair, max_epochs=3, **QUIET).fit(module, batches(4))
    for g, (_, h) in zip(sees.seen, module.seen, strict=True):
        assert torch.equal(g, h)


def test_logs_are_by_update(tmp_path):
    module = Regression(minibatch(8))
    logger = CSVLogger(tmp_path)
    fit(module, batches(4), max_epochs=3, logger=logger, log_every_n_steps=3)
    rows = np.genfromtxt(f"{logger.log_dir}/metrics.csv", delimiter=",", names=True)
    assert rows["step"].tolist() == [2, 5, 8, 11]  # of the updates 0 … 11


def test_an_optimizer_step_that_calls_the_closure_itself():
    class Warmup(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            optimizer.step()

    module = Warmup(gd())
    fit(module, batches(4), max_epochs=5, gradient_clip_val=0.05)
    expected, _ = oracle(epochs(5), clip=by_norm(0.05))
    assert_same(module, expected)


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-12), (32, 1e-5)])
def test_float32_data_in_either_precision(precision, tolerance):
    module = Regression(gd(0.9), model=network().float())
    start = network().float().double()
    x, y = (t.float() for t in data())
    fit(module, batches(4, tensors=(x, y)), max_epochs=20, precision=precision)
    expected, _ = oracle(epochs(20), start, momentum=0.9, tensors=(x.double(), y.double()))
    assert_same(module, expected.to(weights(module)), tolerance=tolerance)


def test_bf16_mixed_gathers_the_float32_gradients():
    x, y = (t.float() for t in data())
    module = Regression(gd(), model=network().float())
    fit(module, batches(4, tensors=(x, y)), max_epochs=1, precision="bf16-mixed")
    total, model = 0.0, network().float()
    for i in range(0, N, 4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = 0.5 * ((model(x[i : i + 4]) - y[i : i + 4]) ** 2).mean()
        parts = torch.autograd.grad(loss, list(model.parameters()))
        total = total + torch.cat([p.flatten().double() for p in parts]) * len(x[i : i + 4])
    torch.testing.assert_close(module.seen[0][1].double(), total / N, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [None, True])
def test_bf16_mixed_clips_the_mean(fused):
    x, y = (t.float() for t in data())
    module = Regression(gd(fused=fused), model=network().float())
    start = weights(module)
    loader = batches(4, tensors=(x, y))
    fit(module, loader, max_epochs=1, precision="bf16-mixed", gradient_clip_val=0.05)
    assert module.seen[0][1].norm() > 0.1  # before it is clipped
    step = (weights(module) - start).norm() / 0.3
    torch.testing.assert_close(step, torch.tensor(0.05), rtol=1e-4, atol=0)
    assert module.optimizers(use_pl_optimizer=False)._step_supports_amp_scaling  # as it was


# ---------------------------------------------------------------------- the size of a batch


@dataclass
class Sample:
    x: torch.Tensor
    name: str = "a name is no size"


FOUR = torch.zeros(4, 3)
TOLD = {
    "tensor": FOUR,
    "tuple": (FOUR, torch.zeros(4)),
    "list": [FOUR, torch.zeros(4, 1)],
    "dict": {"x": FOUR, "y": torch.zeros(4), "name": ["a", "b"], "epoch": 3, "no": None},
    "scalars": (FOUR, torch.tensor(0.5)),
    "dataclass": Sample(FOUR),
    "nested": {"in": [FOUR, {"mask": torch.zeros(4, 2)}], "out": (Sample(FOUR), "text")},
    "packed": pack_sequence([torch.zeros(n) for n in (5, 3, 2, 2)]),
}


@pytest.mark.parametrize("kind", TOLD)
def test_size_is_told_from_the_batch(kind):
    assert _size_of(TOLD[kind]) == 4


def test_a_function_tells_the_size():
    class Transposed(Regression):  # examples in the second dimension
        def training_step(self, batch):
            return super().training_step((batch[0].T, batch[1]))

    module = Transposed(gd(0.9))
    loader = [(a.T.contiguous(), b) for a, b in zip(*(t.split(4) for t in data()), strict=True)]
    gather = GatherMicroBatches(lambda batch: np.int64(batch[0].shape[1]))
    fit(module, Stream(*loader), gather=gather, max_epochs=10)
    expected, gradients = oracle(epochs(10), momentum=0.9)
    assert_same(module, expected, gradients)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(4, 3), torch.zeros(3)), "cannot be told: .* are 4, 3"),
        ({"text": ["a", "b"]}, "type dict cannot be told: it holds no tensor"),
        ([torch.tensor(1.0)], "type list cannot be told: it holds no tensor"),
        (torch.zeros(0, 3), "at least 1. Received: 0"),
    ],
)
def test_size_that_cannot_be_told(batch, message):
    module = Regression(gd())
    with pytest.raises(ValueError, match=message):
        fit(module, Stream(data(), batch), max_epochs=1)
    assert module.calls["optimizer_step"] == 1  # the first batch is whole
    expected, _ = oracle(epochs(1))
    assert_same(module, expected)


@pytest.mark.parametrize("size", [0, -1, 2.0, None, True, "4"])
def test_function_that_returns_no_count(size):
    message = "needs num_samples" if size is None else "must be a whole number"
    refused(message, gather=GatherMicroBatches(lambda batch: size))


def refused(message, module=None, *callbacks, error=ValueError, **arguments):
    module = module or Regression(gd())
    before = weights(module)
    with pytest.raises(error, match=message):
        fit(module, batches(4), *callbacks, **{"max_epochs": 1, **arguments})
    assert torch.equal(weights(module), before)


# ---------------------------------------------------------------------- stopped and resumed


class SaveAt(Callback):
    """Saves after so many batches, and stops there."""

    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 9, 10, 13])
def test_resumed_inside_an_update_makes_the_same_update(batch, tmp_path):
    sizes = [3, 4, 1, 4, 2, 7, 6, 1, 2]
    whole = Regression(minibatch(7, 0.9), exponential, frequency=2)
    whole_trainer = fit(whole, Resumable(cut(sizes)), max_epochs=3)

    path = tmp_path / "inside.ckpt"
    part = Regression(minibatch(7, 0.9), exponential, frequency=2)
    stopped = fit(part, Resumable(cut(sizes)), SaveAt(batch, path), max_epochs=3)
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]
    inside = {1: 3, 2: 0, 3: 1, 4: 5, 5: 0, 7: 6, 9: 0, 10: 3, 13: 5}[batch]
    assert saved["param_groups"][0]["gathered"] == inside
    assert ("gathered_sum" in saved["state"].get(0, {})) == (inside > 0)

    rest = Regression(minibatch(7, 0.9), exponential, frequency=2)
    trainer = fit(rest, Resumable(cut(sizes)), max_epochs=3, ckpt_path=path)
    assert torch.equal(weights(rest), weights(whole))
    assert trainer.global_step == whole_trainer.global_step == 15
    assert stopped.global_step + len(rest.seen) == 15
    for (t, g), (s, h) in zip(whole.seen, part.seen + rest.seen, strict=True):
        assert t == s
        assert torch.equal(g, h)
    loop, other = trainer.fit_loop.epoch_loop, whole_trainer.fit_loop.epoch_loop
    assert loop._batches_that_stepped == other._batches_that_stepped


class SaveAfterEpoch(Callback):
    """Saves at the end of so many epochs."""

    def __init__(self, epochs, path):
        self.epochs, self.path = epochs, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)


def test_resumed_between_epochs(tmp_path):
    def go(module, epochs, *callbacks, **options):
        gather = GatherMicroBatches(epoch_end="carry")
        return fit(module, batches(1), *callbacks, gather=gather, max_epochs=epochs, **options)

    path = tmp_path / "between.ckpt"
    whole, half, rest = (Regression(minibatch(10, 0.9), exponential) for _ in range(3))
    go(whole, 4)
    go(half, 2, SaveAfterEpoch(2, path))
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert groups[0]["gathered"] == (2 * N) % 10
    trainer = go(rest, 4, ckpt_path=path)
    assert trainer.global_step == len(whole.seen)
    assert torch.equal(weights(rest), weights(whole))


def test_checkpoints_every_n_updates(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(Regression(minibatch(8)), batches(4), keep, max_epochs=2, enable_checkpointing=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step={t}.ckpt" for t in (2, 4, 6, 8)]


def test_half_precision_sum_is_not_rounded_by_a_checkpoint(tmp_path):
    def module():
        torch.manual_seed(0)
        return Regression(gd(0.9), exponential, model=nn.Linear(3, 1))

    tensors = tuple(t.bfloat16() for t in data())
    sizes = [4, 10, 3, 14]
    whole, rest = module(), module()
    path = tmp_path / "inside.ckpt"
    options = {"max_epochs": 2, "precision": "bf16-true"}
    fit(whole, Resumable(cut(sizes, tensors)), **options)
    fit(module(), Resumable(cut(sizes, tensors)), SaveAt(7, path), **options)
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]
    assert saved["state"][0]["gathered_sum"].dtype is torch.float32
    fit(rest, Resumable(cut(sizes, tensors)), ckpt_path=path, **options)
    assert torch.equal(weights(rest), weights(whole))


def test_fit_goes_on_after_an_error():
    module, gather = Regression(gd()), GatherMicroBatches()
    trainer = Trainer(callbacks=[gather], max_epochs=2, **QUIET)
    with pytest.raises(ValueError, match="cannot be told"):
        trainer.fit(module, Stream("no tensor"))
    assert "_should_accumulate" not in vars(trainer.fit_loop.epoch_loop)
    fit(module, batches(4), gather=gather, max_epochs=3)
    expected, _ = oracle(epochs(3))
    assert_same(module, expected)


# ---------------------------------------------------------------------- refusals


@pytest.mark.filterwarnings("ignore:When using .Trainer.accumulate_grad_batches")
def test_refuses_lightnings_accumulation():
    refused(r"accumulate_grad_batches=2 exclude.*num_samples=N", accumulate_grad_batches=2)
    refused(r"accumulate_grad_batches=2 exclude", None, GradientAccumulationScheduler({0: 2}))


def test_refuses_gradient_scaling():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    refused('scaler would scale.*precision="bf16-mixed"', plugins=[plugin])


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
def test_refuses_manual_optimization():
    class Manual(Regression):
        def __init__(self):
            super().__init__(gd())
            self.automatic_optimization = False

    refused(r"automatic_optimization=False.*gather\(num_samples=m\)", Manual())
    refused(
        "automatic_optimization=False",
        SupervisedModule(nn.Linear(3, 1), SquaredError(), lambda p: SGD(p)),
    )


def test_refuses_several_optimizers():
    class Two(Regression):
        def configure_optimizers(self):
            return [self.optimizer(self.parameters()), self.optimizer(self.parameters())]

    refused("multiple optimizers", Two(gd()), error=RuntimeError)  # Lightning's own


@pytest.mark.parametrize("optimizer", [GD, MiniBatchSGD, SGD, torch.optim.SGD])
def test_refuses_optimizers_that_gather_nothing(optimizer):
    refused(r"needs an optimizer that gathers.*MiniBatchSGD", Regression(optimizer))


def test_refuses_several_devices():
    module, trainer = Regression(gd()), Trainer(devices=2, strategy="ddp", **QUIET)
    with pytest.raises(ValueError, match=r"one device.*devices=1.*DDPStrategy on 2"):
        GatherMicroBatches().setup(trainer, module, "fit")


def test_refuses_batches_that_do_not_fit_the_update():
    refused(r"at most 1: 4 of the 5.*Received: 4", Regression(minibatch(5)))
    refused(r"at most 2: 0 of the 2.*Received: 4", Regression(minibatch(2)))

    module = Regression(lambda p: GD(p, lr=0.1, num_samples=30))  # N is 31
    refused(r"at most 2: 28 of the 30.*Received: 3", module)


def test_refuses_a_second_one():
    refused("two GatherMicroBatches", None, GatherMicroBatches())


@pytest.mark.filterwarnings("ignore:.training_step. returned .None")
@pytest.mark.parametrize("skipped", [2, 7])  # inside the update, and at its last batch
def test_refuses_a_training_step_that_returns_none(skipped):
    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == skipped else super().training_step(batch)

    size = 3 if skipped == 7 else 4
    refused(f"returned None, so that {size} examples are missing", Skips(gd()))


def test_refuses_a_closure_that_is_called_twice():
    class Twice(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            optimizer.step(closure=optimizer_closure)

    refused("made twice", Twice(gd()))


def test_refuses_an_unknown_epoch_end():
    with pytest.raises(ValueError, match=r'"flush" or "carry"\. Received: .drop.'):
        GatherMicroBatches(epoch_end="drop")


# ---------------------------------------------------------------------- beside other things


def test_an_epoch_that_the_module_skips_makes_no_update_and_no_schedule_step():
    class Skips(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 and self.trainer.current_epoch == 0 else None

    module = Skips(minibatch(8), exponential)
    trainer = fit(module, batches(4), max_epochs=1)
    assert trainer.global_step == module.calls["scheduler"] == 1


def test_averaging_of_weights_and_its_pass_for_batch_norm():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    module = Regression(minibatch(8), model=model)
    averaging = StochasticWeightAveraging(0.1, swa_epoch_start=1)
    trainer = fit(module, DataLoader(TensorDataset(*data(32)), 4), averaging, max_epochs=4)
    assert trainer.global_step == 16


def test_validation_between_the_batches_of_an_update():
    class Validates(Regression):
        def validation_step(self, batch):
            x, y = batch
            self.log("val", ((self.model(x) - y) ** 2).mean())

    module = Validates(gd(0.9))
    trainer = Trainer(callbacks=[GatherMicroBatches()], max_epochs=5, val_check_interval=3, **QUIET)
    trainer.fit(module, batches(4), batches(N))
    expected, gradients = oracle(epochs(5), momentum=0.9)
    assert_same(module, expected, gradients)
