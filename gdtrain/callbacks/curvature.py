"""How sharply the loss bends, logged beside the step size while a run goes on."""

from __future__ import annotations

import math
from typing import Any

from lightning import Callback, Trainer

from gdtrain.analysis.curvature import (
    NotFiniteError,
    Sharpness,
    batch_sharpness,
    draw_batches,
    limit_of,
    sharpness,
)
from gdtrain.callbacks.instrument import log_described
from gdtrain.data.loader import IndexLoader
from gdtrain.descent.work import FREE, Places, Work
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
      weight decay; `curvature/limit`, see `gdtrain.analysis.curvature.stability_limit`;
    - B < N: `curvature/batch_sharpness`, the curvature along the gradients of 16 batches of B
      examples; there 2/λ is no limit;
    - `curvature/lr`, the η of the last update (at the start, of the first), and
      `curvature/two_over_lr`, 2/η, with which either compares (without momentum).

    It looks between updates, at the model in training mode, and changes nothing; where the model
    has diverged it logs nothing. The places are the same at any speed. Needs the resident examples
    of a gdtrain data module. State in checkpoints: products with the Hessian that were made.

    Args:
        every: Updates from one look to the next, from 0 on, range [1, ∞). None: at most 100 looks,
            evenly, as often as they take no more than 4% of the run's work so far
            (`gdtrain.descent.work`), or about a tenth of a second's.
        examples: Full batch: of how many the Hessian and the limit are, a fixed sample, range
            [1, N]. None: all N.

    Raises:
        ValueError: An argument is out of range; later, the data are no resident examples, the
            optimizer maximises, or the model cannot be differentiated twice.

    Example:
        >>> callback = Curvature(every=10)  # of a Trainer; callback.looks has what it found
    """

    def __init__(self, every: int | None = None, examples: int | None = None) -> None:
        self.every = None if every is None else Whole(1).check("every", every)
        self.examples = None if examples is None else Whole(1).check("examples", examples)
        self.looks: list[tuple[int, Sharpness]] = []
        self._known: set[str] = set()  # tags that have their description
        self._products = self._last = 0  # with the Hessian: of all looks, and of the last
        self._module: Any = None  # of the run, and its loader
        self._loader: Any = None
        self._places: Places | None = None

    def next_update(self, update: int) -> int | None:
        """The next update at which it looks, if that is paid for by then."""
        return self._plan().next(update)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
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
        self._module, self._loader, self._places = pl_module, loader, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Look before the first update."""
        if pl_module.updates == 0 and self._is_time():
            optimizer = trainer.optimizers[0]
            group = optimizer.param_groups[0]
            lr = float(pl_module.rate_factors(0, 1)) * float(group.get("initial_lr", group["lr"]))
            self._look(trainer, lr if step_size_of(optimizer) is None else None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Look, if it is time."""
        if self._is_time():
            self._look(trainer, float(outputs["rates"][-1]))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Let go of the run."""
        self._module = self._loader = None

    def _plan(self) -> Places:
        """Where it may look: known when the module has begun, which is after the callbacks have."""
        if self._places is None and self.every is not None:
            self._places = Places(None, None, self.every)
        elif self._places is None:
            least = max(1, self._module.updates_per_epoch // 10)
            self._places = Places(self._module.total_updates, _LOOKS, least)
            self._work = Work.of(self._module.objective, self._loader.batch_size)
        return self._places

    def _is_time(self) -> bool:
        update, total, plan = self._module.updates, self._module.total_updates, self._loader
        if update not in self._plan():
            return False
        if self.every is not None:
            return True
        if plan.is_full_batch:
            size, expected = self.examples or plan.num_examples, _EXPECTED
        else:
            size, expected = plan.batch_size, _BATCHES
        products, work = self._products + (self._last or expected), self._work
        if update == 0:  # in advance, where the run will pay for it
            paid = max(_SHARE * total * work.update, FREE) if total is not None else math.inf
        else:
            paid = max(_SHARE * update * work.update, FREE * update / total if total else 0.0)
        return products * work.passes([size] * _PASSES) <= paid

    def _look(self, trainer: Trainer, lr: float | None) -> None:
        update, objective, plan = self._module.updates, self._module.objective, self._loader
        options: dict[str, Any] = {"optimizer": trainer.optimizers[0], "draw": update}
        try:
            if plan.is_full_batch:
                found = sharpness(objective, self.examples, tolerance=_TOLERANCE, **options)
                limit = limit_of(found, trainer.optimizers[0])
                values = {"curvature/sharpness": found.value}
                values |= {} if limit is None else {"curvature/limit": limit}
            else:
                seed = (_SEED + plan.seed, update)
                batches = draw_batches(plan.num_examples, plan.batch_size, _BATCHES, seed)
                found = batch_sharpness(objective, batches.to(objective.targets.device), **options)
                values = {"curvature/batch_sharpness": found.value}
        except NotFiniteError:
            return  # diverged: other callbacks say so
        if lr is not None and lr > 0:
            values |= {"curvature/lr": lr, "curvature/two_over_lr": 2 / lr}
        self.looks.append((update, found))
        self._last = found.iterations
        self._products += self._last
        log_described(trainer, update, values, self._known, _MEANING.__getitem__)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        return {"products": self._products, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._products, self._last = state_dict["products"], state_dict["last"]
