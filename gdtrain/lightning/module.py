"""The Lightning module: a model, a loss, an optimizer and a schedule, trained update by update.

B examples per update, K updates per Lightning step, T planned updates, U updates per epoch.
"""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any, Literal, cast

import numpy as np
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
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError, R2Score

from gdtrain.data.dataset import DatasetDataModule, PairLoader
from gdtrain.data.loader import IndexLoader
from gdtrain.data.mapped import MappedInputs
from gdtrain.data.module import DataModule
from gdtrain.data.sparse import SparseInputs
from gdtrain.descent.race import Race, race
from gdtrain.descent.stopping import Stop
from gdtrain.descent.trial import Snapshot
from gdtrain.engines import ENGINES, Eager, Engine, EngineName, NotApplicableError, choose
from gdtrain.generators import RandomStates
from gdtrain.lightning.description import describe, describe_data
from gdtrain.lightning.hooks import Sight, before_step, call, overrides, sight
from gdtrain.lightning.resuming import check_resumes, settings
from gdtrain.losses import Loss
from gdtrain.models import exact_batch_norm_
from gdtrain.objective import Objective, Rows, evaluating, own_part, prediction_of, untouched
from gdtrain.optim import GD, SGD, MiniBatchSGD
from gdtrain.schedules import Constant, ReduceOnPlateau, Schedule, WarmupStableDecay
from gdtrain.step_sizes import BarzilaiBorwein, DoWG, StepSize, StochasticPolyak

__all__ = ["SupervisedModule", "parameter_groups"]

_log = logging.getLogger("gdtrain")

_SWEEP_SECONDS = (
    0.1  # that a sweep of automatic length takes: Lightning's own cost is then below 1%
)
_MOST_UPDATES = 2**16  # of such a sweep
_ENDLESS = 2**62  # updates of a run without a planned end
_PASS = 1024  # examples, of a pass that renews the statistics of BatchNorm
_SCHEDULED = "scheduled_lr"  # of a group: its "lr" as the schedule left it
_BATCH = 8  # examples, from which on convolutions gain from another layout

# Callbacks to which only the epochs with a validation matter.
_INDIFFERENT = (EarlyStopping,)

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def parameter_groups(model: nn.Module, decay_biases: bool = False) -> list[dict[str, Any]]:
    """A model's trainable parameters, biases and the parameters of norms apart, without decay.

    Args:
        model: Any module.
        decay_biases: Put all into one group instead.

    Returns:
        Parameter groups for an optimizer.

    Example:
        >>> groups = parameter_groups(nn.Linear(3, 2))
        >>> [len(group["params"]) for group in groups], groups[1]["weight_decay"]
        ([1, 1], 0.0)
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and not any(p is q for q in (*decayed, *exempt)):
                bias = name.endswith("bias") or isinstance(module, _NORMS)
                (exempt if bias and not decay_biases else decayed).append(p)
    groups: list[dict[str, Any]] = [{"params": decayed}] if decayed else []
    return [*groups, {"params": exempt, "weight_decay": 0.0}] if exempt else groups


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
        self.schedule = copy.deepcopy(schedule)
        if not isinstance(self.schedule, Schedule):
            raise ValueError(
                f"schedule must be a gdtrain.schedules.Schedule, such as Cosine(). Received: "
                f"{schedule!r}."
            )
        self.decay_biases = decay_biases
        if engine not in ("auto", *ENGINES):
            raise ValueError(
                f"engine must be one of auto, {', '.join(ENGINES)}. Received: {engine!r}."
            )
        self.engine = engine
        self.engine_reason = ""
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
        self.race: Race | None = None
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
        self.examples_seen = 0
        self.updates = 0
        self.total_updates: int | None = None
        self.planned_updates: int | None = None  # before a trainer has the module
        self.rate_cut = 1.0  # by recoveries from divergence: a factor on η, beside the schedule's
        self.updates_per_epoch = 1
        self._objective: Objective | None = None
        self._engine: Engine | None = None
        self._engine_before: EngineName | None = None  # of the run that is resumed
        self._rates = torch.zeros(0, dtype=torch.float64)
        self._shows_average = self._ended_at_average = False
        self._validated: AbstractContextManager[None] | None = None
        self._random_state: dict[str, Any] | None = None
        self._target_scale: Tensor | None = None
        self._micro_batch_size: int | None = None
        self._pair_micro_batch_size: int | None = None
        self._draws = 0
        self._declaring: list[Any] = []  # callbacks that say at which updates they must see the run
        self._sight = Sight("", (), ())
        self._hook: Any = None  # of the optimizer's steps
        self._is_training = self._guarded = False
        self._constant: frozenset[str] = frozenset()  # buffers that were not finite at the start
        self._owned = 0  # parameters of the optimizer, in all groups
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
        made = self._make_optimizer
        if not isinstance(made, Optimizer):  # a factory
            groups = parameter_groups(self.model, self.decay_biases)
            made = made(groups) if self.step_size is None else self._with_rule(made, groups)
        if self.schedule_is_automatic:
            rule = getattr(made, "step_size", None)
            # Rules for full batches find the length of each step; rules that ask for T decay.
            decays = rule is not None and (rule.needs_full_batch or rule.needs_total_updates)
            self.schedule = Constant() if decays else WarmupStableDecay(warmup=0.1, decay=0.5)
        for group in made.param_groups:
            group.setdefault("initial_lr", group["lr"])
            if group.get("differentiable"):
                raise ValueError(
                    "A sweep's steps are not differentiable: use differentiable=False."
                )
        return made

    def _with_rule(self, make: Callable[..., Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
        """An optimizer that computes η itself; lr = 1 is then only the unit of the schedule."""
        plain = make(groups, lr=1.0)
        if not isinstance(plain, GD | SGD | MiniBatchSGD):
            raise ValueError(
                f"Rules for the step size, and lr=auto, work with GD, SGD and MiniBatchSGD of "
                f"gdtrain. Received: {type(plain).__name__}. Set optimizer.lr to a number."
            )
        rule = self._automatic_rule(plain) if self.step_size == "auto" else self.step_size
        assert isinstance(rule, StepSize)
        rule.check_loss(self.loss)
        total = self.planned_updates
        if self._trainer is not None and self.trainer.datamodule is not None:  # type: ignore[attr-defined]
            total = self.trainer.datamodule.planned_updates(self.trainer)  # type: ignore[attr-defined]
        options: dict[str, Any] = {"lr": 1.0, "step_size": copy.deepcopy(rule)}
        return make(groups, **options, total_updates=total)

    def _automatic_rule(self, optimizer: Optimizer) -> StepSize:
        group = optimizer.param_groups[0]
        if group["nesterov"]:
            raise ValueError(
                "lr=auto has no rule for Nesterov momentum. Set optimizer.nesterov=false, or "
                "optimizer.lr to a number."
            )
        if isinstance(optimizer, GD) and self.loss.smooth and group["momentum"] == 0:
            return BarzilaiBorwein(memory=30, f_star=0.0)  # no loss is below 0
        data = None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, DatasetDataModule) and not data.is_resident:
            # No race over examples that are fetched one by one.
            return DoWG(cap=2.0, decay="linear")
        # A buffer adds 1 + μ + μ² + … gradients up, and so the bound holds for their sum.
        gain = (1 - group["dampening"]) / max(1 - group["momentum"], 1e-3)
        return StochasticPolyak(c=0.5 * max(float(gain), 1.0))

    def setup(self, stage: str) -> None:
        """Take from the data module the units of the target, and make the metrics.

        Args:
            stage: Lightning's.
        """
        if stage == "fit":
            self._note_settings()
            self._see()  # before callbacks do anything
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, DataModule):  # what the targets are may have been settled without us
            self.loss.outputs(data.num_classes, data.num_targets)
        preprocessing = getattr(data, "preprocessing", None)
        self.use_target_scale(getattr(preprocessing, "target_scale", None))
        for part in ("val", "test"):
            if part not in self.evaluation:
                self.evaluation[part] = self._new_metrics()

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

    def _new_metrics(self) -> nn.ModuleDict:
        made: dict[str, Metric]
        if self._metrics is not None:
            made = {name: metric.clone() for name, metric in self._metrics.items()}
        elif self.loss.task == "regression":
            made = {"r2": R2Score(), "mae": MeanAbsoluteError()}
        else:
            # Over decided classes, the count of classes does not matter to plain accuracy.
            made = {"accuracy": MulticlassAccuracy(2, average="micro", validate_args=False)}
        return nn.ModuleDict({"loss": _MeanLoss(), **made})

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
        self._see()

    def _see(self) -> None:
        """Ask who must see which updates of the run; refuse who cannot."""
        trainer: Any = self.trainer
        by_rule = any(getattr(o, "step_size", None) is not None for o in trainer.optimizers)
        found = sight(trainer.callbacks, self, trainer.log_every_n_steps, by_rule)
        if type(self).training_step is not SupervisedModule.training_step and not found.single:
            found = found._replace(single=f"{type(self).__name__} has its own training_step")
        self._sight = found
        self._guarded = any(isinstance(c, OnExceptionCheckpoint) for c in trainer.callbacks)
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
        trainer = self.trainer
        loader = trainer.train_dataloader
        self.updates = trainer.global_step
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(datamodule, DataModule) and trainer.is_global_zero:
            _log.info(datamodule.target_said)
        self.validation, self.validated_at = {}, -1
        self._constant = frozenset(
            name for name, b in self.model.named_buffers() if not torch.isfinite(b).all()
        )
        self._engine, self._ended_at_average = None, False
        self._objective, self._pair_micro_batch_size = None, None
        if self.updates == 0:
            self.examples_seen, self.rate_cut = 0, 1.0
        plan = self._plan
        if plan is not None:
            self._refuse_counts_of_steps()
            self.total_updates = plan.total
            self.updates_per_epoch = plan.updates_per_epoch
            _align_progress(trainer, self.updates // plan.updates_per_epoch)
            data = cast(Any, trainer).datamodule
            self._draws = data.seed & (2**30 - 1)
        if isinstance(loader, PairLoader):
            self._pair_micro_batch_size = data.micro_batch_size
            self._single = _single_example(plan)
        elif isinstance(loader, IndexLoader):
            inputs, targets = (_to(t, self.device, self._precision) for t in data.examples("train"))
            micro: int | Literal["auto"] | None = data.micro_batch_size
            if micro is None and isinstance(inputs, MappedInputs):
                micro = "auto"
            if micro is None and isinstance(inputs, SparseInputs):
                # A pass makes its rows dense: what memory holds bounds it, not B.
                most = inputs.rows_at_once
                micro = most if loader.batch_size > most else None
            if trainer.world_size > loader.batch_size:
                raise ValueError(
                    f"The {loader.batch_size} examples of an update cannot be divided over "
                    f"{trainer.world_size} processes. One-example SGD is sequential: train it on "
                    f"one device, or use optimizer=minibatch with a larger batch_size."
                )
            self._objective = Objective(
                self.model,
                self.loss,
                inputs,
                targets,
                micro,
                rank=trainer.global_rank,
                ranks=trainer.world_size,
            )
            if self._micro_batch_size is not None:  # of the run that is resumed
                self._objective.micro_batch_size = self._micro_batch_size
            self._single = _single_example(plan, self._objective)
            self._check(inputs, targets)
            self._lay_out(loader.batch_size)
            loader.epochs_per_iteration = self._epochs_at_once(data.count("val") > 0)
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            if getattr(optimizer, "step_size", None) is not None:
                optimizer.batch_fraction = loader.batch_size / loader.num_examples
        else:
            self._single = _single_example(loader)
            per_epoch = trainer.num_training_batches
            if math.isfinite(per_epoch):
                self.updates_per_epoch = int(per_epoch)
                epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
                limits = [n for n in (epochs * self.updates_per_epoch, trainer.max_steps) if n >= 0]
                self.total_updates = min(limits) if limits else None
            elif trainer.max_steps >= 0:
                self.total_updates = trainer.max_steps
        if self._random_state is not None:
            RandomStates.from_state_dict(self._random_state).restore()
            self._random_state = None
        if self.total_updates is None:
            self._check_endless()
        self._listen()
        groups = self.optimizers(use_pl_optimizer=False).param_groups  # type: ignore[union-attr]
        self._owned = sum(len(group["params"]) for group in groups)
        if self.step_size == "auto" and self.updates == 0:
            self._find_rate()
        for group in groups:
            group[_SCHEDULED] = group["lr"]
        self._declaring = [c for c in cast(Any, trainer).callbacks if hasattr(c, "next_update")]
        if isinstance(loader, IndexLoader):
            # Lightning has fetched the first block already, before anybody could be asked.
            iter(cast(Any, trainer.fit_loop._data_fetcher))

    def _check_endless(self) -> None:
        """Where no end is planned, η must not depend on one."""
        if self.schedule_is_automatic:
            self.schedule = Constant()
        updates, size = 2.0 ** torch.arange(-1, 40, dtype=torch.float64), self.updates_per_epoch
        totals = (2**20, 2**30)
        one, other = (self.schedule(updates.floor(), total, size) for total in totals)
        if not torch.equal(one, other):
            raise ValueError(
                f"{self.schedule!r} is a function of the planned updates. Received: max_epochs="
                f"{self.trainer.max_epochs} and max_steps={self.trainer.max_steps}, which plan no "
                f"end. Set one of them, or take schedule=constant."
            )

    def _listen(self) -> None:
        """Call the hooks of those who act on each step of the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._sight.step:
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, Optimizer)

            def listen(optimizer: Any, arguments: Any, options: Any) -> None:
                if self._is_training:  # and no update that is only tried, or made once more
                    before_step(self._sight.step, self.trainer, self, optimizer)

            self._hook = optimizer.register_step_pre_hook(listen)
        if self._sight.single and isinstance(self.trainer.train_dataloader, IndexLoader):
            _log.info(
                "sweeps: one update a step, because %s; each step costs Lightning about 0.4 ms",
                self._sight.single,
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
        if self._sight.single:
            return update + 1
        wanted = [cut(update) for cut in self._sight.cuts]
        for callback in self._declaring:
            found = callback.next_update(update)
            if found is not None and found <= update:
                raise ValueError(
                    f"{type(callback).__name__}.next_update({update}) must be above {update}, "
                    f"or None. Received: {found}."
                )
            wanted += [] if found is None else [found]
        return min(wanted, default=None)

    def next_validation(self, update: int) -> int | None:
        """The smallest update number above one at which the run validates; None: it never does.

        Args:
            update: Number of updates made, range [0, ∞).
        """
        trainer: Any = self.trainer
        data = trainer.datamodule
        if self._plan is None or not trainer.enable_validation or not data.count("val"):
            return None
        every = (trainer.check_val_every_n_epoch or 1) * self.updates_per_epoch
        return (update // every + 1) * every

    def _find_rate(self) -> None:
        """Let step sizes race, where an update sees only some of the examples."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        loader = self.trainer.train_dataloader
        assert isinstance(optimizer, Optimizer)
        if not isinstance(getattr(optimizer, "step_size", None), StochasticPolyak):
            return
        if not isinstance(loader, IndexLoader) or self._objective is None:
            raise ValueError(
                "lr=auto lets step sizes race over resident examples. Received: batches from a "
                "loader. Set optimizer.lr to a number, or take a rule that needs no race "
                "(step_size=dowg)."
            )
        if self.total_updates is None:
            raise ValueError(
                "lr=auto needs to know how many updates are planned: set trainer.max_epochs or "
                "trainer.max_steps."
            )
        if self._engine is None:
            self._engine = self._choose(optimizer)

        def run(indices: Tensor, factors: Tensor, draw: int) -> Tensor:
            return self._sweep(self._objective, optimizer, indices, factors, draw)  # type: ignore[arg-type]

        self.race = found = race(
            run,
            self._objective,
            optimizer,
            loader.block,
            self.total_updates,
            loader.batch_size,
            draw=self._draws << 32,
        )
        if self.trainer.is_global_zero:
            _log.info("lr: auto found %.3g %s", found.rate, found.basis)

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

    def _lay_out(self, batch_size: int) -> None:
        """While training on CPU, keep convolutions' weights with the channels last in memory.

        PyTorch's kernels for batches are about twice as fast on them; the numbers are the same (to
        rounding). For single examples they are not.
        """
        images = any(isinstance(m, nn.Conv2d) for m in self.model.modules())
        if images and batch_size >= _BATCH and self.device.type == "cpu":
            self.model.to(memory_format=torch.channels_last)

    def on_train_end(self) -> None:
        """End at the average, if there is one, and in the default layout, as view() expects."""
        self._declaring, self._sight = [], Sight("", (), ())
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        optimizer, rule = self._averaging()
        if rule is not None:
            rule.eval(optimizer)
            self._ended_at_average = True
        for m in self.model.modules():
            if isinstance(m, nn.Conv2d):
                m.to(memory_format=torch.contiguous_format)
        if self._renews_statistics and self._objective is not None:
            self._renews_statistics = False
            inputs = self._objective.inputs
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
    def _plan(self) -> IndexLoader | None:
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
        if self._plan is None:
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
        return None if self._objective is None else self._objective.micro_batch_size

    @property
    def objective(self) -> Objective | None:
        """J over the training examples, once training on a gdtrain data module has begun."""
        return self._objective

    @property
    def micro_batch_size_is_automatic(self) -> bool:
        """Whether M was chosen here, by `Objective.automatic_size`."""
        return self._objective is not None and self._objective.automatic

    @torch.no_grad()
    def _check(self, inputs: Rows, targets: Tensor) -> None:
        """Run two examples, so that a misfit of model, loss and data is told before training.

        They are those of the lowest and the highest label.
        """
        if len(inputs) != len(targets) or not len(targets):
            raise ValueError(
                f"Expected one target for each example, and at least one. Received: {len(inputs)} "
                f"examples and targets of shape {tuple(targets.shape)}."
            )
        flat = targets.reshape(len(targets), -1)[:, 0]
        flat = flat.byte() if flat.dtype == torch.bool else flat
        extremes = torch.stack([flat.argmin(), flat.argmax()])
        examples, targets = inputs[extremes], targets[extremes]
        try:
            with evaluating(self.model):
                prediction = self(examples)
        except RuntimeError as error:
            raise ValueError(
                f"The model does not take examples of shape {tuple(examples.shape[1:])}: {error}"
            ) from error
        self.loss.check(prediction, targets)
        if self._single:
            self._refuse_one(examples[:1])
        self._outputs = prediction.shape[1]

    def _refuse_one(self, example: Tensor) -> None:
        """Raise, if the model cannot be trained on the passes over one example that will come."""
        with untouched(self.model):
            try:
                self.model(example)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"The model cannot be trained on one example by itself ({error}), and "
                    f"{self._single}. Choose another batch_size, or a norm that does not mix "
                    f"examples: model.norm=group (torch.nn.GroupNorm, LayerNorm)."
                ) from error

    # ------------------------------------------------------------------ training

    def rate_factors(self, first: int, count: int) -> Tensor:
        """The schedule's factors for updates first … first + count − 1, times `rate_cut`.

        Args:
            first: Update number, from 0.
            count: K.

        Returns:
            (K,), float64.
        """
        trainer = self._trainer
        if trainer is not None and trainer.lr_scheduler_configs:  # a callback's, which decides
            return torch.full((count,), self.rate_cut, dtype=torch.float64)
        total = _ENDLESS if self.total_updates is None else max(self.total_updates, 1)
        updates = torch.from_numpy(np.arange(first, first + count, dtype=np.float64))
        made = self.schedule(updates, total, self.updates_per_epoch)
        return made if self.rate_cut == 1.0 else made * self.rate_cut

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
        first = self.updates
        self.follow_callbacks()
        started = time.perf_counter()
        with self._training():
            losses, indices = self.make_updates(batch, first)
        count = len(indices)
        if losses.is_cuda:
            torch.cuda.synchronize()  # once per sweep: its time is measured
        seconds = time.perf_counter() - started
        self.updates += count
        self.examples_seen += indices.numel()
        if isinstance(self.trainer.train_dataloader, IndexLoader):
            # Lightning counts the end of an iteration as one epoch more.
            _count_epochs(self.trainer, (self.updates - 1) // self.updates_per_epoch)
        epoch_loop = self.trainer.fit_loop.epoch_loop
        progress = epoch_loop.manual_optimization.optim_step_progress
        for counts in (progress.total, progress.current):
            counts.ready += count
            counts.completed += count
        # What Lightning passes to loggers as the step; it adds 1 for this batch itself.
        epoch_loop._batches_that_stepped = self.updates - 1
        if self.updates % self.updates_per_epoch == 0:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            for config in self.trainer.lr_scheduler_configs:
                optimizer._opt_called = True  # schedulers ask: not every engine calls step()
                self.lr_scheduler_step(config.scheduler, None)
        self._lengthen(count, seconds)
        return {
            "loss": losses[-1],
            "losses": losses,
            "rates": self._rates,
            "seconds": seconds,
            "first": first,
            "examples": indices.shape[1],
        }

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Around the updates of the run itself."""
        trainer, optimizer = self.trainer, self.optimizers(use_pl_optimizer=False)
        call(self._sight.step, "on_before_zero_grad", trainer, self, optimizer)
        before = None
        if self._guarded and self._objective is not None and isinstance(optimizer, Optimizer):
            before = Snapshot(self._objective, optimizer)
        self._is_training = True
        try:
            yield
        except BaseException:
            if before is not None:  # what OnExceptionCheckpoint saves is the state that is counted
                before.give_back()
            raise
        finally:
            self._is_training = False

    def follow_callbacks(self) -> None:
        """Go on with what a callback has changed since the last sweep.

        Parameters that were frozen are left alone, those that were freed are trained. A group that
        was added, or whose "lr" was set, has that η at the next update, and is scheduled from there
        on in proportion. Called before each sweep; once more changes nothing.
        """
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        factor = float(self.rate_factors(self.updates, 1))
        scheduled = bool(self.trainer.lr_scheduler_configs)  # by a callback's scheduler
        for group in optimizer.param_groups:
            if scheduled or "initial_lr" not in group or group["lr"] != group[_SCHEDULED]:
                group["initial_lr"] = group["lr"] / factor if factor > 0 else group["lr"]
                group[_SCHEDULED] = group["lr"]
        objective = self._objective
        if objective is None:
            return
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        owned = sum(len(group["params"]) for group in optimizer.param_groups)
        if owned != self._owned or [*map(id, trainable)] != [*map(id, objective.params)]:
            for p in objective.params:
                p.grad = None  # a frozen parameter is not stepped along an old gradient
            objective.params, self._owned, self._engine = trainable, owned, None

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
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, Optimizer):
            raise ValueError("SupervisedModule trains with one optimizer.")
        objective, indices = self.named(batch)
        draw = self.draw_of(first)
        factors = self.rate_factors(first, len(indices))
        return self._sweep(objective, optimizer, indices, factors, draw), indices

    @property
    def rates(self) -> Tensor:
        """(K,), float64: η of the first group at each of the updates that were made last."""
        return self._rates

    def draw_of(self, update: int) -> int:
        """Names the random numbers of an update, for `Objective`.

        Args:
            update: From 0.
        """
        return (self._draws << 32) + update

    def named(self, batch: Tensor | tuple[Tensor, Tensor]) -> tuple[Objective, Tensor]:
        """The objective of a batch, and which of its examples make which update.

        Args:
            batch: (K, B) indices, or inputs and targets.

        Returns:
            J, and (K, B) indices into its examples.
        """
        if isinstance(batch, Tensor):
            if self._objective is None:
                raise ValueError(
                    "A batch must be a pair (inputs, targets). Received: one tensor; blocks of "
                    "indices come from a gdtrain data module."
                )
            objective, indices = self._objective, batch
        else:
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
                self._check(inputs, targets)
                assert self._outputs is not None
            targets = self.loss.as_targets(targets, self._outputs)
            objective = Objective(
                self.model, self.loss, inputs, targets, self._pair_micro_batch_size
            )
            indices = torch.arange(len(inputs), device=inputs.device).unsqueeze(0)
        return objective, indices

    def _sweep(
        self,
        objective: Objective,
        optimizer: Optimizer,
        indices: Tensor,
        factors: Tensor,
        draw: int,
    ) -> Tensor:
        if objective is not self._objective:  # of one batch of another loader
            return self._run(Eager(objective, optimizer), indices, factors, draw)
        if self._engine is None:
            self._engine = self._choose(optimizer)
        try:
            return self._run(self._engine, indices, factors, draw)
        except NotApplicableError as error:  # found out only by trying, as a compiler does
            if self.engine != "auto":
                raise ValueError(
                    f"engine={self.engine} does not apply: {error}. Use engine=auto, which takes "
                    f"the fastest that does."
                ) from error
            self.engine_reason = f"not {self._engine.name}: {error}"
            warnings.warn(
                f"The {self._engine.name} engine does not apply, and eager goes on: {error}",
                stacklevel=2,
            )
            self._engine = Eager(objective, optimizer)
            return self._run(self._engine, indices, factors, draw)

    def _run(self, engine: Engine, indices: Tensor, factors: Tensor, draw: int) -> Tensor:
        losses = engine(indices, factors, draw)
        self._rates = engine.rates
        for group in engine.optimizer.param_groups:
            group[_SCHEDULED] = group["lr"]
        return losses

    def _choose(self, optimizer: Optimizer) -> Engine:
        assert self._objective is not None
        if self.engine == "auto" and self._engine_before is not None:
            # A resumed run goes on with the engine that it had, so that it is the same run.
            before, self._engine_before = self._engine_before, None
            try:
                engine, _ = choose(before, self._objective, optimizer)
                self.engine_reason = "as before"
                return engine
            except ValueError as error:
                warnings.warn(
                    f"The run goes on equal to rounding, not bit for bit: {error}", stacklevel=2
                )
        engine, self.engine_reason = choose(
            self.engine, self._objective, optimizer, self.total_updates
        )
        if self.trainer.is_global_zero:
            _log.info("engine: %s (%s)", engine.name, self.engine_reason)
        return engine

    @property
    def engine_in_use(self) -> str:
        """Name of the engine that makes the updates, once training has begun."""
        return (self._engine_before or "eager") if self._engine is None else self._engine.name

    @property
    def _precision(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters()), torch.float32)

    def _lengthen(self, count: int, seconds: float) -> None:
        """Let automatic sweeps take a tenth of a second: no update depends on their length."""
        loader = self.trainer.train_dataloader
        if not isinstance(loader, IndexLoader) or not loader.automatic:
            return
        if self.trainer.world_size > 1:  # of rank 0: all must have the same sweeps
            seconds = self.trainer.strategy.broadcast(seconds)
        if seconds > 0:
            fitting = int(count * _SWEEP_SECONDS / seconds)
            # In steps: the first updates warm up, and are no measure of the others.
            loader.updates_per_sweep = max(1, min(fitting, 8 * count, _MOST_UPDATES))

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
        values = _compute(cast(nn.ModuleDict, self.evaluation["val"]), "val")
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
        return [
            f"loss/{part}" if name == "loss" else f"metric/{name}/{part}"
            for name in self._new_metrics()
        ]

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
        self.log_dict(_compute(cast(nn.ModuleDict, self.evaluation["test"]), "test"))

    def _take(self, metrics: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        if not len(inputs):
            return
        inputs, targets = (_to(t, self.device, self._precision) for t in (inputs, targets))
        prediction = self(inputs)
        targets = self.loss.as_targets(targets, prediction.shape[-1])
        losses = self.loss(prediction, targets)
        decided = self.loss.decide(prediction)
        if self.loss.task == "regression":
            if decided.device.type != "mps":  # R² is a difference of sums of squares
                decided, targets = decided.double(), targets.double()
            targets = targets.reshape(decided.shape)
            if self._target_scale is not None:
                scale = self._target_scale.to(decided)
                decided, targets = decided * scale, targets * scale
            decided, targets = decided.squeeze(1), targets.squeeze(1)
        for name, metric in cast(nn.ModuleDict, metrics).items():
            values = (losses,) if name == "loss" else (decided, targets)
            cast(Metric, metric).update(*values)

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
        metrics = self._new_metrics().to(self.device)
        with evaluating(self.model), self.averaged():
            for inputs, targets in batches:
                self._take(metrics, inputs, targets)
        return _compute(metrics, part)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the parameters are the average that the step-size rule keeps, if it does."""
        optimizer, rule = self._averaging()
        if rule is None or self._shows_average:
            yield
            return
        rule.eval(optimizer)
        self._shows_average = True
        try:
            yield
        finally:
            self._shows_average = False
            rule.train(optimizer)

    def _averaging(self) -> tuple[Any, StepSize | None]:
        trainer = self._trainer
        optimizers = [] if trainer is None else trainer.optimizers
        rule = getattr(optimizers[0], "step_size", None) if len(optimizers) == 1 else None
        if rule is None or not rule.averages or not self.updates or self._ended_at_average:
            return None, None
        return optimizers[0], rule

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
        gone = ("_engine", "_objective", "_validated")
        return {**super().__getstate__(), **dict.fromkeys(gone)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the next update depends on beside parameters and optimizer.

        Args:
            checkpoint: Lightning's; changed in place.
        """
        if not self.noted_settings:
            self._note_settings()
        checkpoint["gdtrain"] = {
            "updates": self.updates,
            "examples_seen": self.examples_seen,
            "rate_cut": self.rate_cut,
            "race": None if self.race is None else asdict(self.race),
            "random_state": RandomStates.now().state_dict(),
            "micro_batch_size": self.micro_batch_size,
            "engine": self.engine_in_use,
            "settings": self.noted_settings,
            "planned": self.total_updates,
            "stop": None if self.stop is None else self.stop.state_dict(),
            "updates_per_epoch": self.updates_per_epoch,
            "schedule": self.schedule.state_dict()
            if isinstance(self.schedule, ReduceOnPlateau)
            else None,
            "description": self.description,
            "average": self._average(),
        }

    def _average(self) -> dict[str, Tensor] | None:
        """The averaged parameters, which are what a model from the checkpoint answers with."""
        if self._averaging()[1] is None:
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
        self.updates = state["updates"]
        self.examples_seen = state["examples_seen"]
        self.rate_cut = state.get("rate_cut", 1.0)
        self.race = None if state.get("race") is None else Race(**state["race"])
        self._random_state = state["random_state"]
        self._micro_batch_size = state["micro_batch_size"]
        self._engine_before = state["engine"]
        if isinstance(self.schedule, ReduceOnPlateau) and state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])


def _single_example(loader: Any, objective: Objective | None = None) -> str:
    """Where a pass over a single example will come from; nothing, where none will, or none knows.

    Args:
        loader: A plan, or a `DataLoader`.
        objective: J, whose micro-batches and ranks divide the batches.
    """
    try:
        size = loader.batch_size
        count = loader.num_examples if isinstance(loader, IndexLoader) else len(loader.dataset)
    except (AttributeError, TypeError):
        return ""
    if size is None:
        return ""
    sizes = [size]
    if count % size and not getattr(loader, "drop_last", False):
        sizes.append(count % size)
    if 1 in sizes:
        return (
            "each update sees one"
            if size == 1
            else f"the last batch of an epoch has one: {count} examples in batches of {size}; "
            f"batches of {next(b for b in range(size + 1, count + 2) if count % b != 1)} end "
            f"otherwise"
        )
    if objective is None:
        return ""
    micro = objective.micro_batch_size
    for size in sizes:
        start, end = own_part(size, objective.rank, objective.ranks)
        own = end - start
        if 1 in ({own} if micro is None else {min(micro, own), own % micro}):
            return (
                f"a pass has one: {own} examples of a batch"
                + (f" in passes of {micro}" if micro is not None else "")
                + (f" on one of {objective.ranks} processes" if objective.ranks > 1 else "")
            )
    return ""


class _MeanLoss(Metric):
    """Mean of losses per example, in their own precision, and NaN where one is."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor) -> None:
        dtype = torch.promote_types(losses.dtype, torch.float32)
        self.total = self.total + losses.sum(dtype=dtype)
        self.count = self.count + losses.numel()

    def compute(self) -> Tensor:
        return self.total / self.count


def _compute(metrics: nn.ModuleDict, part: str) -> dict[str, float]:
    """Values by tag, over all ranks; the metrics start anew."""
    values = {}
    for name, metric in metrics.items():
        tag = f"loss/{part}" if name == "loss" else f"metric/{name}/{part}"
        try:
            values[tag] = float(cast(Metric, metric).compute())
        except ValueError:
            if not isinstance(metric, R2Score):
                raise  # R² of a single example does not exist
        cast(Metric, metric).reset()
    return values


def _to(tensor: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """On the device; in the model's dtype if it holds floating-point numbers."""
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def _count_epochs(trainer: Any, done: int) -> None:
    """Tell Lightning's loop that the epoch after so many is under way."""
    current = trainer.fit_loop.epoch_progress.current
    current.ready = current.started = done + 1
    current.processed = current.completed = done


def _align_progress(trainer: Any, epoch: int) -> None:
    """Tell Lightning's loops that `epoch` epochs are done and the next begins or goes on.

    The update number alone says where a run is. Lightning's own counters depend on the hook in
    which the checkpoint was saved, and would repeat or skip an epoch.
    """
    loop = trainer.fit_loop
    current = loop.epoch_progress.current
    current.ready = current.started = current.processed = current.completed = epoch
    loop.restarting = False
    loop.reset_restart_stage()
    loop.epoch_loop.restarting = False
    loop.epoch_loop.reset_restart_stage()
    loop.epoch_loop.batch_progress.reset_on_run()
    loop.epoch_loop.val_loop.restarting = False
    loop.epoch_loop.val_loop.batch_progress.reset_on_run()
