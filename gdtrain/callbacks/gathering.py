"""Exact updates from micro-batches in anybody's LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gdtrain._compat.lightning_training import (
    decide_steps,
    ends_epoch,
    leave_steps,
    only_forward,
    steps_are_decided,
)
from gdtrain.optim.gathering import Gathering
from gdtrain.optim.protocol import gathers, is_full_batch

__all__ = ["GatherMicroBatches"]


class GatherMicroBatches(Callback):
    """Updates from the exact mean over B examples, whatever the sizes of the loader's batches.

        g = (Σ m_i g_i) / B,    B = Σ m_i,    g_i the gradient of what training_step returned

    for the i-th batch, of m_i examples: `training_step` returns the **mean** loss over its batch.
    For any LightningModule under automatic optimization whose `configure_optimizers` returns a
    `GD(num_samples=N)` (then B = N) or a `MiniBatchSGD(batch_size=B)`. A parameter that has no
    gradient in some batch counts as zero there; half-precision gradients are summed in float32.

    A step of Lightning is an update: `global_step`, `max_steps`, logging, schedulers of interval
    "step", clipping, `optimizer_step` and `on_before_optimizer_step` come once per update and see
    the mean, as does the module's `on_after_backward` at an update's last batch. Batches of the
    loader are counted by `val_check_interval`, `limit_train_batches` and
    `trainer.estimated_stepping_batches`: give a schedule its number of updates yourself.

    An update that is unfinished when an epoch ends is made then, from the examples that are in; if
    it is one of GD, a warning says so. With `epoch_end="carry"`, the next epoch goes on with it.
    What is gathered is in the optimizer's state: a run that is resumed inside an update makes the
    same update, if the loader can resume. No state of its own.

    Args:
        batch_size: Examples in a batch, as a function of it. None: the first dimension, which all
            tensors in the (nested) batch must share.
        epoch_end: What becomes of an unfinished update, "flush" or "carry".

    Raises:
        ValueError: `epoch_end` is neither; the optimizer gathers nothing; something cannot be exact
            (`accumulate_grad_batches` > 1, a gradient scaler, manual optimization, several
            devices, a `training_step` that returns None); the size of a batch cannot be told, or
            exceeds what the update lacks.
        RuntimeError: Several optimizers (from Lightning: put the parameters into one, as groups).

    Example:
        >>> callback = GatherMicroBatches(epoch_end="carry")
    """

    def __init__(
        self,
        batch_size: Callable[[Any], int] | None = None,
        *,
        epoch_end: Literal["flush", "carry"] = "flush",
    ) -> None:
        if epoch_end not in ("flush", "carry"):
            raise ValueError(f'epoch_end must be "flush" or "carry". Received: {epoch_end!r}.')
        self.batch_size = batch_size
        self.epoch_end = epoch_end
        self._size = 0  # examples in the batch at hand; 0 once its gradients are in
        self._closes = True  # whether the update is made at the batch at hand
        self._warned = False
        self._hook: RemovableHandle | None = None
        self._frequencies: list[tuple[LRSchedulerConfig, int]] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be exact."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "GatherMicroBatches is for automatic optimization, and this module has "
                "automatic_optimization=False. Leave the callback out, and in training_step call "
                "optimizer.gather(num_samples=m); when it returns True, clip and step()."
            )
        _check_accumulation(trainer)
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"GatherMicroBatches cannot be exact with precision={trainer.precision!r}: the "
                f"gradient scaler would scale the micro-batches of one update differently. "
                f'Use Trainer(precision="bf16-mixed") or precision=32.'
            )
        if trainer.world_size > 1 or trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"GatherMicroBatches gathers on one device: use Trainer(devices=1, num_nodes=1, "
                f'strategy="auto"), or, on several, a gdtrain.SupervisedModule with trainer=ddp. '
                f"Received: {type(trainer.strategy).__name__} on {trainer.world_size} device(s)."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse optimizers that gather nothing."""
        _optimizer(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take over the decision at which batches Lightning makes an optimizer step."""
        optimizer = _optimizer(trainer)
        if steps_are_decided(trainer):
            raise ValueError("There are two GatherMicroBatches callbacks: leave one out.")
        decide_steps(trainer, lambda: self._makes_update(trainer))
        # A resumed run asks, before its first batch, whether its last one made an update.
        self._closes, self._size = optimizer.gathered == 0, 0
        self._warned = False
        self._hook = optimizer.register_step_pre_hook(_close_before_step)
        optimizer.has_no_scaler = True  # see setup
        self._frequencies = [
            (config, config.frequency)
            for config in trainer.lr_scheduler_configs
            if config.interval == "step" and config.frequency != 1
        ]

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the decision back."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        _optimizer(trainer).has_no_scaler = False
        leave_steps(trainer)
        for config, frequency in self._frequencies:
            config.frequency = frequency
        self._frequencies = []

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the decision back."""
        self.teardown(trainer, pl_module, "fit")

    def _makes_update(self, trainer: Trainer) -> bool:
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        # A batch is ready but not started when the module's on_train_batch_start skipped it.
        return self._closes and progress.started == progress.ready  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the size of the batch, and whether the update is made from it."""
        if only_forward(trainer):
            self._size, self._closes = 0, False
            return
        _check_accumulation(trainer)
        optimizer = _optimizer(trainer)
        size = optimizer.check_gatherable((self.batch_size or _size_of)(batch))
        assert optimizer.examples is not None
        missing = optimizer.examples - optimizer.gathered - size
        flushes = self.epoch_end == "flush" and ends_epoch(trainer)
        self._size = size
        self._closes = missing == 0 or flushes
        if self._closes:
            for config, frequency in self._frequencies:  # which Lightning holds against batch_idx
                due = (trainer.global_step + 1) % frequency == 0
                config.frequency = 1 if due else batch_idx + 2
        if flushes and missing and is_full_batch(optimizer) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The epoch ends {missing} examples short of GD(num_samples={optimizer.examples}):"
                f" the update is the mean over the {optimizer.examples - missing} that are in. "
                f"Does the loader leave examples out (drop_last, limit_train_batches)? To go on "
                f'with the update in the next epoch, use GatherMicroBatches(epoch_end="carry").'
            )

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        """Gather the gradients; at the last batch of an update, put their mean in their place."""
        if self._size == 0:
            raise ValueError(
                "The backward pass of this batch was made twice: GatherMicroBatches needs one "
                "call of the closure per batch. Look into optimizer_step of the module."
            )
        optimizer = _optimizer(trainer)
        optimizer.gather(num_samples=self._size)
        self._size = 0
        if self._closes:
            optimizer.close()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Any, optimizer: Optimizer
    ) -> None:
        """Make sure that the batch took part."""
        if self._size:
            raise ValueError(
                f"training_step returned None, so that {self._size} examples are missing from the "
                f"update. To leave a batch out, take it from the loader; to count it as zero, "
                f"return a loss of zero that has a gradient."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Make sure that the batch took part."""
        self.on_before_optimizer_step(trainer, pl_module, trainer.optimizers[0])


def _close_before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run Lightning's closure ahead of step(), whose examples are all in only after it."""
    kwargs = dict(kwargs)
    closure = kwargs.pop("closure", None)
    if closure is not None:
        closure()
    return args, kwargs


def _optimizer(trainer: Trainer) -> Gathering:
    optimizer: Any = trainer.optimizers[0] if trainer.optimizers else None
    if not gathers(optimizer):
        raise ValueError(
            f"GatherMicroBatches needs an optimizer that gathers: let configure_optimizers return "
            f"GD(..., num_samples=N) or MiniBatchSGD(..., batch_size=B). "
            f"Received: {type(optimizer).__name__}, which updates at every step."
        )
    return optimizer


def _check_accumulation(trainer: Trainer) -> None:
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"GatherMicroBatches and accumulate_grad_batches={trainer.accumulate_grad_batches} "
            f"exclude each other: Lightning gives a smaller last batch the weight of a whole one. "
            f"Leave accumulate_grad_batches out, and say how many examples an update averages: "
            f"GD(num_samples=N) or MiniBatchSGD(batch_size=B)."
        )


def _size_of(batch: Any) -> int:
    sizes = list(dict.fromkeys(_sizes(batch)))
    if len(sizes) != 1:
        found = (
            "it holds no tensor with a first dimension"
            if not sizes
            else "the first dimensions of its tensors are " + ", ".join(map(str, sizes))
        )
        raise ValueError(
            f"The number of examples in a batch of type {type(batch).__name__} cannot be told: "
            f"{found}. Say it with GatherMicroBatches(batch_size=lambda batch: ...)."
        )
    return sizes[0]


def _sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch.size(0)
    elif isinstance(batch, PackedSequence):
        yield int(batch.batch_sizes[0])
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _sizes(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _sizes(getattr(batch, field.name))
