"""The Lightning module: a shell over the descent, which makes and counts the updates.

B examples per update, K updates per Lightning step, T planned updates, U updates per epoch.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from gdtrain.data.dataset import DatasetDataModule, PairLoader
from gdtrain.data.loader import IndexLoader
from gdtrain.data.module import DataModule
from gdtrain.descent.loop import Loop
from gdtrain.descent.optimizer import automatic_schedule, make_optimizer
from gdtrain.descent.plan import Every, Plan
from gdtrain.descent.preparation import check_examples, resident_objective, single_example
from gdtrain.descent.race import Race
from gdtrain.descent.state import State
from gdtrain.descent.stopping import Stop
from gdtrain.engines import ENGINES, EngineName
from gdtrain.lightning.counters import align_progress, count_epochs, count_updates
from gdtrain.lightning.description import describe, describe_data
from gdtrain.lightning.evaluation import compute_metrics, make_metrics, tag_of, update_metrics
from gdtrain.lightning.hooks import Watchers, before_step, call, overrides, watchers_of
from gdtrain.lightning.resuming import check_resumes, settings
from gdtrain.losses import Loss
from gdtrain.models import exact_batch_norm_
from gdtrain.objective import Objective, evaluating, prediction_of
from gdtrain.schedules import Constant, ReduceOnPlateau, Schedule
from gdtrain.step_sizes import StepSize

__all__ = ["SupervisedModule"]

_log = logging.getLogger("gdtrain")

_PASS = 1024  # examples, of a pass that renews the statistics of BatchNorm

# Callbacks to which only the epochs with a validation matter.
_INDIFFERENT = (EarlyStopping,)


def _of_state(name: str, doc: str) -> Any:
    """An attribute that the descent's state holds."""
    return property(
        lambda self: getattr(self.state, name),
        lambda self, value: setattr(self.state, name, value),
        doc=doc,
    )


class SupervisedModule(LightningModule):
    """Trains any `nn.Module` on inputs and targets, with exact counts of updates and examples.

    A Lightning step makes K whole updates, and `trainer.global_step` counts updates. Batches may be

    - a block of indices (K, B) from a gdtrain data module, whose examples stay resident;
    - a pair (inputs, targets), from `DatasetDataModule` or any other loader: one update.

    Between two steps, callbacks may freeze or free parameters, add groups to the optimizer
    (`BaseFinetuning`), set a group's "lr", or bring a scheduler (`StochasticWeightAveraging`): the
    next update has what they set.

    It logs `loss/val`, `loss/test` and `metric/<name>/val`, `metric/<name>/test` for callbacks;
    `gdtrain.callbacks.LossCurves` writes them, with the training loss, to the loggers.

    Args:
        model: (B, …) to (B, C); a tuple whose first entry that is, or a mapping with it as
            `logits`, will do (`gdtrain.objective.prediction_of`).
        loss: Per example.
        optimizer: From parameters or groups to an optimizer, such as
            `functools.partial(SGD, lr=0.1)`; or an optimizer of the model's parameters.
        schedule: The factor on η; None: constant; "auto": `WarmupStableDecay(warmup=0.1,
            decay=0.5)`, but constant where a rule finds the length of full-batch steps.
        metrics: By name, fed with `loss.decide(prediction)` and targets; None: accuracy for
            classes, R² and mean absolute error for numbers.
        decay_biases: Whether weight decay acts on biases and norms, when `optimizer` is a factory.
        step_size: A rule that computes η (`gdtrain.step_sizes`), for an optimizer that is a factory
            of gdtrain's; "auto": on the full batch with `GD`, Barzilai and Borwein's; else a short
            race before the first update finds η (`gdtrain.descent.race`), and each step is bounded
            by Polyak's; None: `lr` and the schedule alone.
        engine: How the updates of a block are made: "eager", by autograd, for any module;
            "compiled", by `torch.compile`; "native", linear models and MLPs on CPU, written by
            hand; "auto", the fastest that applies (`engine_in_use` and `engine_reason` tell).

    Raises:
        ValueError: `loss` is no `Loss`; later, data that do not fit it, an engine that does not
            apply, or trainer arguments that would count Lightning steps as updates.

    Example:
        >>> from functools import partial
        >>> from lightning import Trainer
        >>> from gdtrain import SGD
        >>> from gdtrain.data import EmbeddedDataModule
        >>> from gdtrain.losses import CrossEntropy
        >>> from gdtrain.models import MLP
        >>> data = EmbeddedDataModule("iris", batch_size=1)
        >>> module = SupervisedModule(MLP((4,), 3), CrossEntropy(), partial(SGD, lr=0.01))
        >>> trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module, datamodule=data)
        >>> trainer.global_step == 2 * data.num_train
        True
    """

    checks_data = True
    """Whether a resumed run's data are compared here, with all else."""

    updates: int = _of_state("updates", "Made so far.")
    examples_seen: int = _of_state("examples_seen", "In these updates.")
    rate_cut: float = _of_state("rate_cut", "A factor on η, by recoveries from divergence.")
    race: Race | None = _of_state("race", "What found η; None: no race was held.")
    schedule: Schedule = _of_state("schedule", "The factor on η.")
    total_updates: int | None = _of_state("total_updates", "T; None: no end is planned.")
    updates_per_epoch: int = _of_state("updates_per_epoch", "U.")

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Callable[[Any], Optimizer] | Optimizer,
        schedule: Schedule | Literal["auto"] | None = None,
        *,
        metrics: Mapping[str, Metric] | None = None,
        decay_biases: bool = False,
        step_size: StepSize | Literal["auto"] | None = None,
        engine: EngineName = "auto",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if not isinstance(loss, Loss):
            raise ValueError(
                f"loss must be a gdtrain.losses.Loss, which gives one value per example (subclass "
                f"it for one of your own). Received: {type(loss).__name__}."
            )
        self.model = model
        self.loss = loss
        # A copy: a plateau schedule has a state, and belongs to one run.
        self.schedule_is_automatic = schedule == "auto"
        if schedule is None or schedule == "auto":
            schedule = Constant()
        if not isinstance(schedule, Schedule):
            raise ValueError(
                f"schedule must be a gdtrain.schedules.Schedule, such as Cosine(). Received: "
                f"{schedule!r}."
            )
        self.state = State(copy.deepcopy(schedule))
        self.decay_biases = decay_biases
        if engine not in ("auto", *ENGINES):
            raise ValueError(
                f"engine must be one of auto, {', '.join(ENGINES)}. Received: {engine!r}."
            )
        self.engine = engine
        if not (step_size is None or step_size == "auto" or isinstance(step_size, StepSize)):
            raise ValueError(
                f"step_size must be a rule of gdtrain.step_sizes, 'auto' or None. Received: "
                f"{step_size!r}."
            )
        if step_size is not None and isinstance(optimizer, Optimizer):
            raise ValueError(
                "With step_size=…, the optimizer must be a factory, such as "
                "functools.partial(SGD, momentum=0.9). Received: an optimizer; give it the rule "
                "itself: SGD(…, step_size=…)."
            )
        self.step_size = step_size
        self.certificate: dict[str, Any] | None = None
        self._make_optimizer = optimizer
        self._metrics = None if metrics is None else dict(metrics)
        self.evaluation = nn.ModuleDict()
        self.stop: Stop | None = None
        self.validation: dict[str, float] = {}
        self.validated_at = -1
        self.description: dict[str, Any] | None = None
        self.noted_settings: dict[str, str] = {}
        self.from_file = False  # its model was built as a file says, which may be anybody's
        self.planned_updates: int | None = None  # before a trainer has the module
        self._loop: Loop | None = None
        self._validated: AbstractContextManager[None] | None = None
        self._target_scale: Tensor | None = None
        self._watchers = Watchers()
        self._hook: Any = None  # of the optimizer's steps
        self._is_training = False
        self._constant: frozenset[str] = frozenset()  # buffers that were not finite at the start
        self._renews_statistics = False  # of BatchNorm, at the end
        self._single = ""  # where a pass over one example will come from, if one will
        self._outputs: int | None = None  # of the model, once it was tried

    def forward(self, x: Tensor) -> Tensor:
        """The model's predictions.

        Args:
            x: (B, …).
        """
        return prediction_of(self.model(x))

    # ------------------------------------------------------------------ set-up

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer; schedules are applied here, not by Lightning."""
        data = None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]
        planned = self.planned_updates
        if data is not None and hasattr(data, "planned_updates"):
            planned = data.planned_updates(self.trainer)
        made = make_optimizer(
            self._make_optimizer,
            self.model,
            self.loss,
            decay_biases=self.decay_biases,
            step_size=self.step_size,
            total_updates=planned,
            # No race over examples that are fetched one by one.
            races=not (isinstance(data, DatasetDataModule) and not data.is_resident),
        )
        if self.schedule_is_automatic:
            self.schedule = automatic_schedule(made)
        return made

    def setup(self, stage: str) -> None:
        """Take from the data module the units of the target, and make the metrics.

        Args:
            stage: Lightning's.
        """
        if stage == "fit":
            self._note_settings()
            self._find_watchers()  # before callbacks do anything
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, DataModule):  # what the targets are may have been settled without us
            self.loss.outputs(data.num_classes, data.num_targets)
        preprocessing = getattr(data, "preprocessing", None)
        self.use_target_scale(getattr(preprocessing, "target_scale", None))
        for part in ("val", "test"):
            if part not in self.evaluation:
                self.evaluation[part] = make_metrics(self.loss, self._metrics)

    def use_target_scale(self, scale: Any) -> None:
        """Compute the metrics of a regression in the units of the target.

        Args:
            scale: Standard deviation by which the targets were divided, (K,); None: they were not.
        """
        self._target_scale = None if scale is None else torch.as_tensor(scale, dtype=torch.float64)

    def _note_settings(self) -> None:
        """What the run is, before anything of it changes: for its checkpoints."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.noted_settings = settings(self, self.trainer, data)
        if self.description is None:
            self.description = self.describe(data)

    def describe(
        self, data: Any = None, make: Any = None, sizes: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """How model, loss and data are built again; what cannot be is named under "own".

        Args:
            data: The data module, if there is one of gdtrain.
            make: The function that has made the model.
            sizes: What that was called with.

        Returns:
            Plain containers.
        """
        model = describe(self.model, make, sizes)
        loss = describe(self.loss)
        return {
            "model": {"own": type(self.model).__qualname__} if model is None else model,
            "loss": {"own": type(self.loss).__qualname__} if loss is None else loss,
            "data": describe_data(data),
        }

    def on_fit_start(self) -> None:
        """Refuse what would be wrong."""
        trainer = self.trainer
        precision = str(trainer.precision)
        if precision.startswith("16"):
            raise ValueError(
                f"precision={precision} needs a gradient scaler, which a sweep of updates does not "
                f"have. Use trainer.precision=bf16-mixed or 32."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging):
                self._prepare_averaging(callback)
        self.stop = None
        self._find_watchers()

    def _find_watchers(self) -> None:
        """Ask who must see which updates of the run; refuse who cannot."""
        trainer: Any = self.trainer
        by_rule = any(getattr(o, "step_size", None) is not None for o in trainer.optimizers)
        found = watchers_of(trainer.callbacks, self, trainer.log_every_n_steps, by_rule)
        if type(self).training_step is not SupervisedModule.training_step and not found.single:
            found = found._replace(single=f"{type(self).__name__} has its own training_step")
        self._watchers = found
        # Right here, where the state after an update is what a resumed run goes on with.
        warnings.filterwarnings(
            "ignore", message="Using ModelCheckpoint with manual optimization and every_n_train_st"
        )

    def _prepare_averaging(self, callback: StochasticWeightAveraging) -> None:
        """Let Lightning average weights, but not renew BatchNorm's statistics in a further epoch.

        Its way needs sized loaders, and would be planned as an epoch of updates; the statistics are
        made at the end of training instead.
        """
        rule = getattr(self.trainer.optimizers[0], "step_size", None)
        if rule is not None and rule.owns_rate:
            raise ValueError(
                f"StochasticWeightAveraging sets η (swa_lrs), and {type(rule).__name__} computes "
                f"it: set optimizer.lr to a number, without a step-size rule."
            )
        if callback._model_contains_batch_norm and self.trainer.max_epochs != -1:
            callback._model_contains_batch_norm = False
            self.trainer.fit_loop.max_epochs -= 1  # type: ignore[operator]
            self._renews_statistics = True

    def on_train_start(self) -> None:
        """Go on from the update that the trainer is at."""
        trainer: Any = self.trainer
        loader, data = trainer.train_dataloader, trainer.datamodule
        if isinstance(data, DataModule) and trainer.is_global_zero:
            _log.info(data.target_said)
        self.validation, self.validated_at = {}, -1
        self._constant = frozenset(
            name for name, b in self.model.named_buffers() if not torch.isfinite(b).all()
        )
        self.updates = trainer.global_step
        if self.updates == 0:
            self.examples_seen, self.rate_cut, self.state.micro_batch_size = 0, 1.0, None
        self._loop = loop = self._new_loop(loader, data)
        if self.total_updates is None and self.schedule_is_automatic:
            self.schedule = Constant()
        loop.prepare()
        if isinstance(loader, IndexLoader):
            loader.epochs_per_iteration = self._epochs_at_once(data.count("val") > 0)
        self._listen()
        loop.start()
        if isinstance(loader, IndexLoader):
            single = self._watchers.single
            knowing = [c for c in trainer.callbacks if hasattr(c, "next_update")]
            loader.watchers = [Every(1)] if single else [*self._watchers.cuts, *knowing]
            # Lightning has fetched the first block already, before anybody could be asked.
            iter(trainer.fit_loop._data_fetcher)

    def _new_loop(self, loader: Any, data: Any) -> Loop:
        """The descent, on what the trainer's loader gives."""
        trainer: Any = self.trainer
        plan, objective = self.plan, None
        if plan is not None:
            self._refuse_counts_of_steps()
            align_progress(trainer, self.updates // plan.updates_per_epoch)
        if isinstance(loader, IndexLoader):
            inputs, targets = (_to(t, self.device, self._precision) for t in data.examples("train"))
            objective = resident_objective(
                self.model,
                self.loss,
                inputs,
                targets,
                loader.batch_size,
                data.micro_batch_size,
                rank=trainer.global_rank,
                ranks=trainer.world_size,
            )
        self._single = single_example(loader if plan is None else plan)
        loop = Loop(
            objective,
            self._optimizer,
            plan,
            engine=self.engine,
            state=self.state,
            races=self.step_size == "auto",
        )
        loop.has_own_scheduler = lambda: bool(trainer.lr_scheduler_configs)  # a callback's
        # What it saves is then the state that is counted.
        saves = any(isinstance(c, OnExceptionCheckpoint) for c in trainer.callbacks)
        loop.restores_on_error = saves
        if plan is None:
            per_epoch = trainer.num_training_batches
            self.total_updates = trainer.max_steps if trainer.max_steps >= 0 else None
            if math.isfinite(per_epoch):
                self.updates_per_epoch = int(per_epoch)
                epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
                limits = [n for n in (epochs * self.updates_per_epoch, trainer.max_steps) if n >= 0]
                self.total_updates = min(limits) if limits else None
        return loop

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, Optimizer):
            raise ValueError("SupervisedModule trains with one optimizer.")
        return optimizer

    def _listen(self) -> None:
        """Call the hooks of those who act on each step of the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._watchers.step:

            def listen(optimizer: Any, arguments: Any, options: Any) -> None:
                if self._is_training:  # and no update that is only tried, or made once more
                    before_step(self._watchers.step, self.trainer, self, optimizer)

            self._hook = self._optimizer.register_step_pre_hook(listen)
        if self._watchers.single and isinstance(self.trainer.train_dataloader, IndexLoader):
            _log.info(
                "sweeps: one update a step, because %s; each step costs Lightning about 0.4 ms",
                self._watchers.single,
            )

    def next_update(self, update: int) -> int | None:
        """The smallest update number above one at which a callback must see the run.

        A sweep ends there. A callback that acts on batches, and knows that a batch may be a sweep
        of several updates, declares at which updates it must see the state, by a method
        `next_update(update)` of the same meaning (None: wherever sweeps end will do). It must be a
        function of the update number alone, and of what is fixed before training or carried in its
        state in checkpoints: a block is fetched before the one before it is trained on. For other
        callbacks that act on batches, a batch is one update.

        Args:
            update: Number of updates made, range [0, ∞).

        Returns:
            None: there is no such update.

        Raises:
            ValueError: A callback names an update that is not above the one asked about.
        """
        return None if self._loop is None or self.plan is None else self.plan.next_update(update)

    def next_validation(self, update: int) -> int | None:
        """The smallest update number above one at which the run validates; None: it never does.

        Args:
            update: Number of updates made, range [0, ∞).
        """
        trainer: Any = self.trainer
        data = trainer.datamodule
        if self.plan is None or not trainer.enable_validation or not data.count("val"):
            return None
        every = (trainer.check_val_every_n_epoch or 1) * self.updates_per_epoch
        return (update // every + 1) * every

    def _epochs_at_once(self, validated: bool) -> int | None:
        """How many epochs Lightning may take for one; None: all.

        The end of an epoch costs it some milliseconds, as long as thousands of updates of a small
        model take. So it sees only the ends at which something happens: a validation, or a hook of
        a callback (unless that has an attribute `needs_every_epoch = False`).
        """
        trainer: Any = self.trainer
        hooks = ("on_train_epoch_start", "on_train_epoch_end")
        callbacks = [
            c
            for c in trainer.callbacks
            if getattr(c, "needs_every_epoch", True) and not isinstance(c, _INDIFFERENT)
        ]
        if (
            trainer.world_size > 1
            or trainer.fast_dev_run
            or trainer.reload_dataloaders_every_n_epochs
            or any(overrides(owner, hook) for owner in (self, *callbacks) for hook in hooks)
        ):
            return 1
        if validated and trainer.enable_validation:
            return trainer.check_val_every_n_epoch or 1
        return None

    def on_train_end(self) -> None:
        """End at the average, if there is one, and in the default layout, as view() expects."""
        self._watchers = Watchers()
        if isinstance(self.plan, IndexLoader):
            self.plan.watchers = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        assert self._loop is not None, "on_train_start has made it"
        self._loop.finish()
        if self._renews_statistics and self.objective is not None:
            self._renews_statistics = False
            inputs = self.objective.inputs
            parts = torch.arange(len(inputs), device=self.device).split(_PASS)
            exact_batch_norm_(self.model, lambda: (inputs[part] for part in parts))

    def _refuse_counts_of_steps(self) -> None:
        trainer = self.trainer
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for name, neutral in (
                ("val_check_interval", 1.0),
                ("overfit_batches", 0.0),
                ("limit_train_batches", 1.0),
            ):
                value = getattr(trainer, name)
                # 1.0 is all of an epoch; the whole number 1 is one step.
                if value and (value != neutral or not isinstance(value, float)):
                    raise ValueError(
                        f"trainer.{name} counts Lightning steps, each of several updates. "
                        f"Received: {name}={value}. Bound the run with max_epochs or max_steps "
                        f"(which counts updates), and validate with check_val_every_n_epoch."
                    )

    @property
    def plan(self) -> Plan | None:
        """Which examples make which update, where a gdtrain data module knows."""
        loader = self.trainer.train_dataloader
        if isinstance(loader, PairLoader):
            return loader.plan
        return loader if isinstance(loader, IndexLoader) else None

    @property
    def validation_is_planned(self) -> bool:
        """Whether the validation at hand belongs to the run, or only to its interruption.

        Lightning validates once more where a run is stopped between two planned validations. What
        depends on validations (a plateau schedule, the history, the best checkpoint) leaves that
        one out, so that the resumed run is the same run.
        """
        if self.plan is None:
            return True
        epoch, position = divmod(self.updates, self.updates_per_epoch)
        every = self.trainer.check_val_every_n_epoch or 1
        return self.updates == self.total_updates or (position == 0 and epoch % every == 0)

    def watched(self) -> dict[str, Tensor]:
        """What stays finite in a sound run, by name: trainable parameters, and buffers.

        A buffer that was not finite when training began, such as a causal mask of −∞, is left out.
        """
        return {
            **{name: p for name, p in self.model.named_parameters() if p.requires_grad},
            **{n: b for n, b in self.model.named_buffers() if n not in self._constant},
        }

    @property
    def micro_batch_size(self) -> int | None:
        """M, once training has begun; None: a whole batch, or a rank's part of it."""
        return None if self.objective is None else self.objective.micro_batch_size

    @property
    def objective(self) -> Objective | None:
        """J over the training examples, once training on a gdtrain data module has begun."""
        return None if self._loop is None else self._loop.objective

    @property
    def micro_batch_size_is_automatic(self) -> bool:
        """Whether M was chosen here, by `Objective.automatic_size`."""
        return self.objective is not None and self.objective.automatic

    # ------------------------------------------------------------------ training

    def rate_factors(self, first: int, count: int) -> Tensor:
        """The schedule's factors for updates first … first + count − 1, times `rate_cut`.

        Args:
            first: Update number, from 0.
            count: K.

        Returns:
            (K,), float64.
        """
        return (self._loop or self.state).rate_factors(first, count)

    def training_step(
        self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int
    ) -> dict[str, Any]:
        """Make the updates of one block.

        Args:
            batch: (K, B) indices, or inputs and targets.
            batch_idx: Lightning's.

        Returns:
            "losses" (K,), "loss", the last of them, "rates" (K,), η of the first group, "first",
            the number of the first of these updates, "examples", how many made one update, and
            "seconds" that all took.
        """
        trainer: Any = self.trainer
        objective, indices = self.named(batch)
        with self._training():
            made = self.loop.advance(indices, objective)
        if isinstance(trainer.train_dataloader, IndexLoader):
            count_epochs(trainer, (self.updates - 1) // self.updates_per_epoch)
        count_updates(trainer, made.updates, self.updates)
        if self.updates % self.updates_per_epoch == 0:
            optimizer: Any = self._optimizer
            for config in trainer.lr_scheduler_configs:
                optimizer._opt_called = True  # schedulers ask: not every engine calls step()
                self.lr_scheduler_step(config.scheduler, None)
        return {
            "loss": made.losses[-1],
            "losses": made.losses,
            "rates": made.rates,
            "seconds": made.seconds,
            "first": made.first,
            "examples": made.examples,
        }

    @property
    def loop(self) -> Loop:
        """The descent, once training has begun."""
        assert self._loop is not None, "training has not begun"
        return self._loop

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Around the updates of the run itself."""
        call(self._watchers.step, "on_before_zero_grad", self.trainer, self, self._optimizer)
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False

    def follow_callbacks(self) -> None:
        """Go on with what a callback has changed, see `Loop.follow_changes`."""
        self.loop.follow_changes()

    def make_updates(
        self, batch: Tensor | tuple[Tensor, Tensor], first: int
    ) -> tuple[Tensor, Tensor]:
        """Make the updates of one block, from the parameters as they are; nothing is counted.

        η of each is then in `rates`.

        Args:
            batch: (K, B) indices, or inputs and targets.
            first: Number of the first of these updates, which schedule and dropout depend on.

        Returns:
            (K,), J on each update's examples before it; (K, B), the indices.
        """
        objective, indices = self.named(batch)
        return self.loop.make_updates(objective, indices, first), indices

    @property
    def rates(self) -> Tensor:
        """(K,), float64: η of the first group at each of the updates that were made last."""
        return self.loop.rates

    def draw_of(self, update: int) -> int:
        """Names the random numbers of an update, for `Objective`.

        Args:
            update: From 0.
        """
        return self.loop.draw_of(update)

    def named(self, batch: Tensor | tuple[Tensor, Tensor]) -> tuple[Objective, Tensor]:
        """The objective of a batch, and which of its examples make which update.

        Args:
            batch: (K, B) indices, or inputs and targets.

        Returns:
            J, and (K, B) indices into its examples.
        """
        if isinstance(batch, Tensor):
            if self.objective is None:
                raise ValueError(
                    "A batch must be a pair (inputs, targets). Received: one tensor; blocks of "
                    "indices come from a gdtrain data module."
                )
            return self.objective, batch
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise ValueError(
                f"A batch must be a pair (inputs, targets) or a block of indices. Received: "
                f"{type(batch).__name__}."
            )
        if self.engine not in ("auto", "eager"):
            raise ValueError(
                f"engine={self.engine} needs the blocks of indices of a gdtrain data module. "
                f"Received: batches from another loader. Use engine=auto."
            )
        inputs, targets = (_to(t, self.device, self._precision) for t in batch)
        if self._outputs is None:
            self._outputs = check_examples(self.model, self.loss, inputs, targets, self._single)
        targets = self.loss.as_targets(targets, self._outputs)
        loader: Any = self.trainer.train_dataloader
        data = cast(Any, self.trainer).datamodule
        micro = data.micro_batch_size if isinstance(loader, PairLoader) else None
        objective = Objective(self.model, self.loss, inputs, targets, micro)
        return objective, torch.arange(len(inputs), device=inputs.device).unsqueeze(0)

    @property
    def engine_in_use(self) -> str:
        """Name of the engine that makes the updates, once training has begun."""
        return self.state.engine_before or self.state.engine

    @property
    def engine_reason(self) -> str:
        """Why that engine makes them."""
        return "" if self._loop is None else self._loop.engine_reason

    @property
    def _precision(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters()), torch.float32)

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Take one slice of the validation part in.

        Args:
            batch: Inputs and targets.
            batch_idx: Lightning's.
        """
        self._take(self.evaluation["val"], *batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Classes (B,), or numbers (B, C), for `Trainer.predict`.

        Args:
            batch: Inputs, alone or first of a tuple; standardised as in training.
            batch_idx: Lightning's.
        """
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        return self.loss.decide(self(_to(inputs, self.device, self._precision)))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Take one slice of the test part in.

        Args:
            batch: Inputs and targets.
            batch_idx: Lightning's.
        """
        self._take(self.evaluation["test"], *batch)

    def on_validation_epoch_end(self) -> None:
        """Publish the validation metrics; tell a plateau schedule."""
        values = compute_metrics(self.evaluation["val"], "val")
        fitting = self.trainer.state.fn == "fit"
        # Not through loggers while fitting: they would get the number of the update before.
        self.log_dict(values, logger=False if fitting else None)
        if fitting and not self.trainer.sanity_checking and self.validation_is_planned:
            self._note(values)

    def tags(self, part: str) -> list[str]:
        """Of the loss and the metrics.

        Args:
            part: "train", "val" or "test".
        """
        return [tag_of(name, part) for name in make_metrics(self.loss, self._metrics)]

    def validate_at_the_end(self) -> bool:
        """Validate after the last update, unless that was done; says whether there are metrics.

        `check_val_every_n_epoch` need not divide the number of epochs.
        """
        if self.updates != self.total_updates:
            return False
        if self.validated_at != self.updates:
            batches = cast(Any, self.trainer).datamodule.val_dataloader()
            if batches:
                self._note(self.evaluate(batches, "val"))
        return self.validated_at == self.updates

    def _note(self, values: dict[str, float]) -> None:
        self.validation, self.validated_at = values, self.updates
        if isinstance(self.schedule, ReduceOnPlateau):
            self.schedule.observe(values["loss/val"])

    def on_test_epoch_end(self) -> None:
        """Publish the test metrics."""
        self.log_dict(compute_metrics(self.evaluation["test"], "test"))

    def _take(self, metrics: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs):
            inputs, targets = (_to(t, self.device, self._precision) for t in (inputs, targets))
            update_metrics(metrics, self.loss, self(inputs), targets, self._target_scale)

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[tuple[Tensor, Tensor]], part: str = "train"
    ) -> dict[str, float]:
        """Mean loss and metrics, in evaluation mode, outside Lightning's loops.

        Args:
            batches: Pairs of inputs and targets.
            part: Last word of the tags.

        Returns:
            By tag: `loss/<part>`, `metric/<name>/<part>`.
        """
        metrics = make_metrics(self.loss, self._metrics).to(self.device)
        with evaluating(self.model), self.averaged():
            for inputs, targets in batches:
                self._take(metrics, inputs, targets)
        return compute_metrics(metrics, part)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the parameters are the average that the step-size rule keeps, if it does."""
        return nullcontext() if self._loop is None else self._loop.averaged()

    def on_validation_start(self) -> None:
        """Validate the average, if there is one."""
        if self.trainer.state.fn == "fit":
            self._validated = self.averaged()
            self._validated.__enter__()

    def on_validation_end(self) -> None:
        """Go on from where training is."""
        if self._validated is not None:
            self._validated.__exit__(None, None, None)
            self._validated = None

    # ------------------------------------------------------------------ checkpoints

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the trainer, and the engine that it had."""
        gone = ("_loop", "_hook", "_validated")
        return {**super().__getstate__(), **dict.fromkeys(gone)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the next update depends on beside parameters and optimizer.

        Args:
            checkpoint: Lightning's; changed in place.
        """
        if not self.noted_settings:
            self._note_settings()
        checkpoint["gdtrain"] = {
            **self.state.state_dict(),
            "settings": self.noted_settings,
            "planned": self.total_updates,
            "stop": None if self.stop is None else self.stop.state_dict(),
            "updates_per_epoch": self.updates_per_epoch,
            "description": self.description,
            "average": self._average(),
        }

    def _average(self) -> dict[str, Tensor] | None:
        """The averaged parameters, which are what a model from the checkpoint answers with."""
        if self._loop is None or not self._loop.has_average:
            return None
        with self.averaged():
            return {name: p.detach().clone() for name, p in self.named_parameters()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from what `on_save_checkpoint` added.

        Args:
            checkpoint: Lightning's.
        """
        state = checkpoint.get("gdtrain")
        if state is None:
            return
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit":
            path = trainer.ckpt_path or "the checkpoint"
            check_resumes(checkpoint, self, trainer, trainer.datamodule, path)  # type: ignore[attr-defined]
        self.state.load_state_dict(state)


def _to(tensor: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """On the device; in the model's dtype if it holds floating-point numbers."""
    return tensor.to(device, dtype if tensor.is_floating_point() else None)
