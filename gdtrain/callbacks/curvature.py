"""How sharply the loss bends, logged beside the step size while a run goes on."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer

from gdtrain.analysis.curvature import (
    NotFiniteError,
    Sharpness,
    batch_sharpness,
    draw_batches,
    limit_of,
    sharpness,
)
from gdtrain.analysis.trial_update import is_full_batch
from gdtrain.callbacks.instrument import log_described
from gdtrain.data.loader import IndexLoader
from gdtrain.descent.work import FREE, Places, Work
from gdtrain.lightning.module import SupervisedModule
from gdtrain.objective import Objective
from gdtrain.optim.protocol import step_size_of
from gdtrain.ranges import Whole

__all__ = ["Curvature"]

_SHARE = 0.04  # of a run's work, that looks at an interval of their own choice take
_LOOKS = 100  # of them at most; in each doubling of a run without an end
_EXPECTED = 12  # products with the Hessian, of a first look
_PASSES = 3  # over its examples, that a product takes about as long as
_BATCHES = 16
_TOLERANCE = 0.02
_SEED = 2**20  # apart from the orders of training
_MEANING = {
    "curvature/sharpness": "λ, the largest eigenvalue of the Hessian of the objective with weight "
    "decay, on the full batch.",
    "curvature/limit": "The η beyond which full-batch descent with this momentum is unstable.",
    "curvature/batch_sharpness": "Curvature along the gradients of batches of B examples.",
    "curvature/lr": "η of the last update; at the start, of the first.",
    "curvature/two_over_lr": "2/η, with which the sharpness compares (without momentum).",
}


class Curvature(Callback):
    """Logs the curvature that gradient descent meets, and the step size that it allows.

    Tags, with the number of updates made as step:

    - full batch: `curvature/sharpness`, the largest eigenvalue λ of the objective's Hessian with
      weight decay; `curvature/limit`, the η beyond which descent with this momentum is unstable
      (`gdtrain.analysis.curvature.stability_limit`);
    - B < N: `curvature/batch_sharpness`, the curvature along the gradients of 16 batches of B
      examples; there 2/λ is no limit, and is not logged;
    - `curvature/lr`, the η of the last update (at the start, of the first), and
      `curvature/two_over_lr`, 2/η, with which either compares (without momentum).

    It looks between updates, at the model in training mode, and changes nothing; where the model
    has diverged it logs nothing. At which updates depends on the plan and on the products with the
    Hessian that were made, and so is the same at any speed; a sweep ends at each of them. Needs the
    resident examples of a gdtrain data module. State in checkpoints: how many products were made.

    Args:
        every: Updates from one look to the next, range [1, ∞); the first is before the first
            update. None: at most 100 looks, evenly, and as often as they take no more than 4% of
            the run's work so far, counted in floating-point operations (`gdtrain.descent.work`), or
            of about a tenth of a second's; the first before the first update, where the planned
            ones will pay for it.
        examples: Full batch: of how many the Hessian is, a fixed sample, range [1, N]; the limit is
            then that of the sample. None: all N.

    Raises:
        ValueError: An argument is out of range; later, the data are no resident examples, the
            optimizer maximises, or the model cannot be differentiated twice.

    Example:
        >>> from functools import partial
        >>> from gdtrain import GD
        >>> from gdtrain.data import EmbeddedDataModule
        >>> from gdtrain.losses import CrossEntropy
        >>> from gdtrain.models import MLP
        >>> curvature = Curvature(every=10)
        >>> module = SupervisedModule(MLP((4,), 3), CrossEntropy(), partial(GD, lr=0.1))
        >>> trainer = Trainer(max_epochs=20, accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ...     callbacks=[curvature])
        >>> trainer.fit(module, datamodule=EmbeddedDataModule("iris", batch_size="full"))
        >>> curvature.looks[0][0], 0 < curvature.looks[-1][1].value
        (0, True)
    """

    def __init__(self, every: int | None = None, examples: int | None = None) -> None:
        for name, value in (("every", every), ("examples", examples)):
            if value is not None:
                Whole(1).check(name, value)
        self.every, self.examples = every, examples
        self.looks: list[tuple[int, Sharpness]] = []
        self._known: set[str] = set()  # tags that have their description
        self._products = self._last = 0  # with the Hessian: of all looks, and of the last
        self._trainer: Trainer | None = None
        self._places: Places | None = None
        self._work: Work | None = None

    def next_update(self, update: int) -> int | None:
        """The next update at which it looks, if that is paid for by then.

        Args:
            update: Number of updates made.
        """
        return self._plan().next(update)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that there is something to look at."""
        loader = trainer.train_dataloader
        if not isinstance(loader, IndexLoader):
            raise ValueError(
                f"callbacks.Curvature needs the resident examples of a gdtrain data module. "
                f"Received: batches from {type(loader).__name__}."
            )
        if self.examples is not None and self.examples > loader.num_examples:
            raise ValueError(
                f"examples must lie in [1, {loader.num_examples}], the number of training "
                f"examples. Received: examples={self.examples}."
            )
        if any(group.get("maximize") for group in trainer.optimizers[0].param_groups):
            raise ValueError(
                "callbacks.Curvature looks at a function that is minimised. Received: "
                "maximize=True."
            )
        if trainer.global_step == 0:
            self._products = self._last = 0
        self._trainer, self._places, self._work = trainer, None, None

    def _plan(self) -> Places:
        """Where it may look: known when the module has begun, which is after the callbacks have."""
        if self._places is None:
            assert self._trainer is not None
            module = cast(SupervisedModule, self._trainer.lightning_module)
            total = module.total_updates
            if self.every is not None:
                self._places = Places(None, None, self.every)
            else:
                self._places = Places(total, _LOOKS, max(1, module.updates_per_epoch // 10))
                loader = _plan(self._trainer)
                self._work = Work.of(_objective(module), loader.batch_size)
        return self._places

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look before the first update."""
        module = cast(SupervisedModule, pl_module)
        if module.updates == 0 and self._is_time(trainer, module):
            factor = float(module.rate_factors(0, 1))
            optimizer = trainer.optimizers[0]
            known = step_size_of(optimizer) is None
            self._look(trainer, module, factor * _peak(optimizer) if known else None)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look, if it is time."""
        module = cast(SupervisedModule, pl_module)
        if self._is_time(trainer, module):
            self._look(trainer, module, float(outputs["rates"][-1]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the run."""
        self._trainer = None

    def _is_time(self, trainer: Trainer, module: SupervisedModule) -> bool:
        update, total = module.updates, module.total_updates
        if update not in self._plan():
            return False
        if self.every is not None:
            return True
        assert self._work is not None
        plan, work = _plan(trainer), self._work
        if is_full_batch(plan):
            size, expected = self.examples or plan.num_examples, _EXPECTED
        else:
            size, expected = plan.batch_size, _BATCHES
        products = self._products + (self._last or expected)
        if update == 0:  # in advance, where the run will pay for it
            paid = max(_SHARE * total * work.update, FREE) if total is not None else math.inf
        else:
            paid = max(_SHARE * update * work.update, FREE * update / total if total else 0.0)
        return products * work.passes([size] * _PASSES) <= paid

    def _look(self, trainer: Trainer, module: SupervisedModule, lr: float | None) -> None:
        try:
            found, values = self._measured(trainer, module)
        except NotFiniteError:
            return  # diverged: other callbacks say so
        if lr is not None and lr > 0:
            values |= {"curvature/lr": lr, "curvature/two_over_lr": 2 / lr}
        self.looks.append((module.updates, found))
        self._last = found.iterations
        self._products += self._last
        log_described(trainer, module.updates, values, self._known, _MEANING.__getitem__)

    def _measured(
        self, trainer: Trainer, module: SupervisedModule
    ) -> tuple[Sharpness, dict[str, float]]:
        objective, optimizer, plan = _objective(module), trainer.optimizers[0], _plan(trainer)
        update = module.updates
        if not is_full_batch(plan):
            seed = (_SEED + plan.seed, update)
            batches = draw_batches(plan.num_examples, plan.batch_size, _BATCHES, seed)
            batches = batches.to(objective.targets.device)
            found = batch_sharpness(objective, batches, optimizer=optimizer, draw=update)
            return found, {"curvature/batch_sharpness": found.value}
        options: dict[str, Any] = {"tolerance": _TOLERANCE, "draw": update}
        found = sharpness(objective, self.examples, optimizer=optimizer, **options)
        values, limit = {"curvature/sharpness": found.value}, limit_of(found, optimizer)
        return found, values if limit is None else {**values, "curvature/limit": limit}

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        return {"products": self._products, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._products, self._last = state_dict["products"], state_dict["last"]


def _plan(trainer: Trainer) -> IndexLoader:
    return cast(IndexLoader, trainer.train_dataloader)


def _objective(module: SupervisedModule) -> Objective:
    assert module.objective is not None, "on_train_start has seen an IndexLoader"
    return module.objective


def _peak(optimizer: torch.optim.Optimizer) -> float:
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))
