"""The Lightning module: a shell over the descent, which makes and counts the updates; and what
callbacks and others ask of a run.

B examples per update, K updates per Lightning step, T planned updates, U updates per epoch.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from gdtrain._compat.lightning_training import fetch_again
from gdtrain._compat.torch_optimizer import mark_stepped
from gdtrain.data.loader import IndexLoader, PairLoader
from gdtrain.data.module import DataModule
from gdtrain.descent.loop import Loop, check_engine
from gdtrain.descent.plan import Plan
from gdtrain.descent.preparation import (
    automatic_schedule,
    check_examples,
    check_step_size,
    make_optimizer,
    resident_objective,
    single_example,
)
from gdtrain.descent.recovery import Guard
from gdtrain.descent.state import State
from gdtrain.descent.stopping import Stop
from gdtrain.engines import EngineName
from gdtrain.lightning.description import describe, describe_data
from gdtrain.lightning.evaluation import EvaluatedModule, compute_metrics
from gdtrain.lightning.hooks import UpdateHooks
from gdtrain.lightning.resuming import check_resumes, planned_updates, settings
from gdtrain.lightning.trainer import (
    align_progress,
    check_counts,
    check_precision,
    count_epochs,
    count_updates,
    epochs_at_once,
    take_over_batch_norm,
)
from gdtrain.losses import Loss
from gdtrain.models import exact_batch_norm_
from gdtrain.objective import Objective
from gdtrain.optim.protocol import step_size_of
from gdtrain.schedules import Constant, ReduceOnPlateau, Schedule
from gdtrain.step_sizes import StepSize

__all__ = ["SupervisedModule"]

_log = logging.getLogger("gdtrain")

_PASS = 1024  # examples, of a pass that renews the statistics of BatchNorm


def _of_state(name: str, doc: str) -> Any:
    """An attribute that the descent's state holds."""
    return property(
        lambda self: getattr(self.state, name),
        lambda self, value: setattr(self.state, name, value),
        doc=doc,
    )


class RunView(EvaluatedModule):
    """A module whose descent can be asked, before, while and after it trains."""

    updates: int = _of_state("updates", "Made so far.")
    examples_seen: int = _of_state("examples_seen", "In these updates.")
    rate_cut: float = _of_state("rate_cut", "A factor on η, by recoveries from divergence.")
    schedule: Schedule = _of_state("schedule", "The factor on η.")
    stop: Stop | None = _of_state("stop", "Why the run ends early; None: it does not.")
    total_updates: int | None = _of_state("total_updates", "T; None: no end is planned.")
    updates_per_epoch: int = _of_state("updates_per_epoch", "U.")

    checks_data = True
    """Whether a resumed run's data are compared here, with all else."""

    def __init__(
        self, model: nn.Module, loss: Loss, state: State, metrics: Mapping[str, Metric] | None
    ) -> None:
        super().__init__(model, loss, metrics)
        self.state = state
        self.guard: Guard | None = None  # of the loop that comes next
        self.certificate: dict[str, Any] | None = None
        self.description: dict[str, Any] | None = None
        self.noted_settings: dict[str, str] = {}
        self.from_file = False  # its model was built as a file says, which may be anybody's
        self._loop: Loop | None = None

    @property
    def loop(self) -> Loop:
        """The descent, once training has begun."""
        assert self._loop is not None, "training has not begun"
        return self._loop

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, Optimizer):
            raise ValueError("SupervisedModule trains with one optimizer.")
        return optimizer

    @property
    def plan(self) -> Plan | None:
        """Which examples make which update, where a gdtrain data module knows."""
        loader = self.trainer.train_dataloader
        if isinstance(loader, PairLoader):
            return loader.plan
        return loader if isinstance(loader, IndexLoader) else None

    @property
    def objective(self) -> Objective | None:
        """J over the training examples, once training on a gdtrain data module has begun."""
        return None if self._loop is None else self._loop.objective

    @property
    def micro_batch_size(self) -> int | None:
        """M, once training has begun; None: a whole batch, or a rank's part of it."""
        return None if self.objective is None else self.objective.micro_batch_size

    @property
    def micro_batch_size_is_automatic(self) -> bool:
        """Whether M was chosen here, by `Objective.automatic_size`."""
        return self.objective is not None and self.objective.automatic

    @property
    def engine_in_use(self) -> str:
        """Name of the engine that makes the updates, once training has begun."""
        return self.state.engine_before or self.state.engine

    @property
    def engine_reason(self) -> str:
        """Why that engine makes them."""
        return "" if self._loop is None else self._loop.engine.reason

    @property
    def validation_is_planned(self) -> bool:
        """Whether the validation at hand belongs to the run: Lightning validates once more where it
        is stopped between two planned ones, which a resumed run does not have.
        """
        planned = self.total_updates, self.next_validation(self.updates - 1)
        return self.plan is None or self.updates in planned

    def next_validation(self, update: int) -> int | None:
        """The smallest update number above one at which the run validates; None: it never does."""
        trainer: Any = self.trainer
        data = trainer.datamodule
        if self.plan is None or not trainer.enable_validation or not data.count("val"):
            return None
        every = (trainer.check_val_every_n_epoch or 1) * self.updates_per_epoch
        return (update // every + 1) * every

    def rate_factors(self, first: int, count: int) -> Tensor:
        """(K,), float64: the schedule's factors from update `first` on, times `rate_cut`."""
        return (self._loop or self.state).rate_factors(first, count)

    @contextmanager
    def in_a_step(self) -> Iterator[None]:
        """As within `training_step`: with gradients, in the trainer's precision."""
        with torch.enable_grad(), self.trainer.strategy.precision_plugin.train_step_context():
            yield

    def settle(self) -> None:
        """Let the guard read what it has not read: the run ends here. Again, it changes nothing.

        For callbacks that look at the model in `on_train_end`, in which it may be set back.
        """
        with self.in_a_step():
            self.loop.settle()

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the parameters are the average that the step-size rule keeps, if it does."""
        return nullcontext() if self._loop is None else self._loop.average.shown()

    # ------------------------------------------------------------------ checkpoints

    def note_settings(self) -> None:
        """What the run is, before anything of it changes: for its checkpoints."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.noted_settings = settings(self, self.trainer, data)
        if self.description is None:
            self.description = self.describe(data)

    def describe(
        self, data: Any = None, make: Any = None, sizes: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """How model, loss and data are built again; what cannot be is named under "own".

        `make` is the function that has made the model, `sizes` what it was called with.
        """
        model, loss = self.model, self.loss
        return {
            "model": describe(model, make, sizes) or {"own": type(model).__qualname__},
            "loss": describe(loss) or {"own": type(loss).__qualname__},
            "data": describe_data(data),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the next update depends on beside parameters and optimizer."""
        if not self.noted_settings:
            self.note_settings()
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
        if self._loop is None or not self._loop.average.is_hidden:
            return None
        with self.averaged():
            return {name: p.detach().clone() for name, p in self.named_parameters()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from what `on_save_checkpoint` added."""
        state = checkpoint.get("gdtrain")
        if state is None:
            return
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit":
            path = trainer.ckpt_path or "the checkpoint"
            check_resumes(checkpoint, self, trainer, trainer.datamodule, path)  # type: ignore[attr-defined]
        self.state.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the trainer, and the loop that it had."""
        return {**super().__getstate__(), "_loop": None, "guard": None}


class SupervisedModule(RunView):
    """Trains any `nn.Module` on inputs and targets, with exact counts of updates and examples.

    A Lightning step makes K whole updates, and `trainer.global_step` counts updates. A batch is a
    block of indices (K, B) from a gdtrain data module, whose examples stay resident, or a pair
    (inputs, targets), from `DatasetDataModule` or any other loader: one update.

    Between two steps, callbacks may freeze or free parameters, add groups to the optimizer, set a
    group's "lr", or bring a scheduler: the next update has what they set. It logs `loss/val`,
    `metric/<name>/val` and those of "test" for callbacks; `LossCurves` writes them to the loggers.

    Args:
        model: (B, …) to (B, C); a tuple whose first entry that is, or a mapping with it as
            `logits`, will do (`gdtrain.objective.prediction_of`).
        loss: Per example.
        optimizer: From parameters or groups to an optimizer, such as
            `functools.partial(SGD, lr=0.1)`; or an optimizer of the model's parameters.
        schedule: The factor on η; None: constant; "auto": `WarmupStableDecay(warmup=0.1,
            decay=0.8)`, but constant where a rule finds the length of full-batch steps.
        metrics: By name, fed with `loss.decide(prediction)` and targets; None: accuracy for
            classes, R² and mean absolute error for numbers.
        decay_biases: Whether weight decay acts on biases and norms, when `optimizer` is a factory.
        step_size: A rule that computes η (`gdtrain.step_sizes`), for a factory of gdtrain's;
            "auto": on the full batch with `GD`, Barzilai and Borwein's; else `PolyakDoG`;
            None: `lr` and the schedule alone.
        engine: How updates are made: "eager", by autograd, for any module; "compiled", by
            `torch.compile`; "native", linear models and MLPs on CPU; "auto", the fastest that
            applies (`engine_in_use` and `engine_reason` tell).

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
        automatic = schedule == "auto"
        if schedule is None or schedule == "auto":
            schedule = Constant()
        if not isinstance(schedule, Schedule):
            raise ValueError(
                f"schedule must be a gdtrain.schedules.Schedule, such as Cosine(). Received: "
                f"{schedule!r}."
            )
        # A copy: a plateau schedule has a state, and belongs to one run.
        super().__init__(model, loss, State(copy.deepcopy(schedule)), metrics)
        self.schedule_is_automatic = automatic
        self.automatic_optimization = False
        self.decay_biases = decay_biases
        check_engine(engine)
        self.engine = engine
        check_step_size(step_size, optimizer)
        self.step_size = step_size
        self._make_optimizer = optimizer
        self.validation: dict[str, float] = {}
        self.validated_at = -1
        self.planned_updates: int | None = None  # before a trainer has the module
        self._validated = ExitStack()
        self._hooks = UpdateHooks()
        self._renews_statistics = False  # of BatchNorm, at the end
        self._outputs: int | None = None  # of the model, once it was tried

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
        )
        if self.schedule_is_automatic:
            self.schedule = automatic_schedule(made)
        return made

    def setup(self, stage: str) -> None:
        """Note what the run is; make the metrics."""
        if stage == "fit":
            self.note_settings()
            self._find_hooks()  # before callbacks do anything
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Refuse what would be wrong."""
        check_precision(self.trainer)
        rule = step_size_of(next(iter(self.trainer.optimizers), None))
        self._renews_statistics = take_over_batch_norm(self.trainer, rule)
        self.stop = self.guard = None
        self._find_hooks()

    def _find_hooks(self) -> None:
        own_step = type(self).training_step is not SupervisedModule.training_step
        self._hooks.find(self.trainer, self, own_step)

    def on_train_start(self) -> None:
        """Go on from the update that the trainer is at."""
        trainer: Any = self.trainer
        loader, data = trainer.train_dataloader, trainer.datamodule
        if isinstance(data, DataModule) and trainer.is_global_zero:
            _log.info(data.target_said)
        self.validation, self.validated_at = {}, -1
        self.updates = trainer.global_step
        if self.updates == 0:
            self.examples_seen, self.rate_cut, self.state.micro_batch_size = 0, 1.0, None
        self._loop = loop = self._new_loop(loader, data)
        if self.total_updates is None and self.schedule_is_automatic:
            self.schedule = Constant()
        self._hooks.listen(self._optimizer, isinstance(loader, IndexLoader))
        loop.start()
        if self.step_size == "auto" and trainer.is_global_zero:
            _log.info("lr: auto is %r", step_size_of(self._optimizer))
        if isinstance(loader, IndexLoader):
            loader.epochs_per_iteration = epochs_at_once(
                trainer, [self, *trainer.callbacks], data.count("val") > 0
            )
            loader.watchers = self._hooks.watchers()
            # Lightning has fetched the first block already, before anybody could be asked.
            fetch_again(trainer)

    def _new_loop(self, loader: Any, data: Any) -> Loop:
        """The descent, on what the trainer's loader gives."""
        trainer: Any = self.trainer
        plan, objective = self.plan, None
        if plan is not None:
            check_counts(trainer)
            align_progress(trainer, self.updates // plan.updates_per_epoch)
        if isinstance(loader, IndexLoader):
            inputs, targets = map(self.to_model, data.examples("train"))
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
        loop = Loop(
            objective,
            self._optimizer,
            plan,
            model=self.model,
            engine=self.engine,
            state=self.state,
            guard=self.guard,
        )
        loop.next_validation = self.next_validation
        loop.updating = lambda: self._hooks.updating(loop.optimizer)
        if isinstance(loader, PairLoader):
            loop.examples = lambda update, count: self.named(loader.batch(update))
        loop.has_own_scheduler = lambda: bool(trainer.lr_scheduler_configs)  # a callback's
        loop.restores_on_error = any(  # what it saves is the state that is counted
            isinstance(callback, OnExceptionCheckpoint) for callback in trainer.callbacks
        )
        if plan is None:
            self.total_updates = trainer.max_steps if trainer.max_steps >= 0 else None
            if math.isfinite(trainer.num_training_batches):
                self.updates_per_epoch = int(trainer.num_training_batches)
                self.total_updates = planned_updates(trainer, None, self.updates_per_epoch)
        return loop

    def on_train_end(self) -> None:
        """End at the average, if there is one, and in the default layout, as view() expects."""
        self._hooks.remove()
        self._hooks = UpdateHooks()
        if self.plan is not None:
            self.plan.watchers = []
        self.loop.finish()
        if self._renews_statistics and self.objective is not None:
            self._renews_statistics = False
            inputs = self.objective.inputs
            parts = torch.arange(len(inputs), device=self.device).split(_PASS)
            exact_batch_norm_(self.model, lambda: (inputs[part] for part in parts))

    # ------------------------------------------------------------------ training

    def training_step(
        self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int
    ) -> dict[str, Any]:
        """Make the updates of one block of indices, or of one pair.

        Returns "losses" (K,), "loss", the last of them, "rates" (K,), η of the first group,
        "first", the number of the first of these updates, "examples", how many made one update,
        and "seconds" that all took.
        """
        trainer: Any = self.trainer
        objective, indices = self.named(batch)
        stop = self.stop
        made = self.loop.advance(indices, objective)
        if self.stop is not stop:  # the guard has found a reason
            trainer.should_stop = True
        if isinstance(trainer.train_dataloader, IndexLoader):
            count_epochs(trainer, (self.updates - 1) // self.updates_per_epoch)
        count_updates(trainer, made.updates, self.updates)
        if self.updates % self.updates_per_epoch == 0:
            for config in trainer.lr_scheduler_configs:
                mark_stepped(self._optimizer)
                self.lr_scheduler_step(config.scheduler, None)
        return {"loss": made.losses[-1], **vars(made)}

    def named(self, batch: Tensor | tuple[Tensor, Tensor]) -> tuple[Objective, Tensor]:
        """J of a batch, and (K, B) indices into its examples, which make which update."""
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
        inputs, targets = map(self.to_model, batch)
        loader: Any = self.trainer.train_dataloader
        if self._outputs is None:
            single = single_example(self.plan or loader)
            self._outputs = check_examples(self.model, self.loss, inputs, targets, single)
        targets = self.loss.as_targets(targets, self._outputs)
        data = cast(Any, self.trainer).datamodule
        micro = data.micro_batch_size if isinstance(loader, PairLoader) else None
        objective = Objective(self.model, self.loss, inputs, targets, micro)
        return objective, torch.arange(len(inputs), device=inputs.device).unsqueeze(0)

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_end(self) -> None:
        """Publish the validation metrics; tell a plateau schedule."""
        values = compute_metrics(self.evaluation["val"], "val")
        fitting = self.trainer.state.fn == "fit"
        # Not through loggers while fitting: they would get the number of the update before.
        self.log_dict(values, logger=False if fitting else None)
        if fitting and not self.trainer.sanity_checking and self.validation_is_planned:
            self._note(values)

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

    def on_validation_start(self) -> None:
        """Validate the average, if there is one."""
        if self.trainer.state.fn == "fit":
            self._validated.enter_context(self.averaged())

    def on_validation_end(self) -> None:
        """Go on from where training is."""
        self._validated.close()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what belongs to a run."""
        return {**super().__getstate__(), "_validated": ExitStack(), "_hooks": UpdateHooks()}
