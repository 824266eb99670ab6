"""Whether steps end lower than they began, on examples that did not make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop

from gdtrain.analysis.gradients import StepTrial, StepVerdict, dot, judge
from gdtrain.analysis.trial_update import TrialUpdate
from gdtrain.callbacks.instrument import Instrument
from gdtrain.data.loader import IndexLoader
from gdtrain.data.order import Order
from gdtrain.optim.protocol import update_rules
from gdtrain.penalised import weight_decays, with_decay
from gdtrain.ranges import Whole

__all__ = ["StepTest"]

_JUDGED = 32  # steps at most, the last ones
_FEWEST = 16  # probe examples that must be left when those of the batch are out
# Of torch.optim, those that add the decay to the gradient unless their groups say otherwise.
_COUPLED = (SGD, Adam, Adamax, NAdam, RAdam, RMSprop, Adagrad, Adadelta, ASGD)
_SEED = 2**22  # apart from the orders of training


class StepTest(Instrument):
    """Logs α, where along a parabola a step ends: −1 its start, 0 the lowest point, 1 as high.

    The parabola has the slopes of J (with weight decay) along the step at both of its ends, on one
    fixed probe of training examples, without those of the batch that made the step: that batch sees
    its own noise fall, and calls rates that diverge too small. On the full batch there is no such
    noise, and the probe is all N. The verdict rests on whether steps end lower than they began
    (`gdtrain.analysis.gradients.judge`), and not on α = 0, which is no aim.

    Tags (see `meaning`): `step/alpha`, of a step that begins downhill; of the last 32 steps
    `step/alpha_low`, `step/alpha_median`, `step/alpha_high`, `step/share_higher`, and
    `step/alphas`, a histogram in TensorBoard.

    Args:
        probe: Examples, where B < N, range [16, ∞); all N where there are fewer.
        every, looks, share: As for `Instrument`.

    Example:
        >>> callback = StepTest(every=50)

    References:
        Schneider et al., Cockpit: A Practical Debugging Tool for the Training of Deep Neural
        Networks, 2021, arXiv 2102.06604.
    """

    meaning: ClassVar[Mapping[str, str]] = {
        "step/alpha": "Where a step ends on probe examples: −1 at its start, 0 at the lowest point "
        "along it, 1 as high as it began. Below 1 is stable; 0 is no aim.",
        "step/alpha_median": "Median α of the last 32 steps that were looked at.",
        "step/alpha_low": "Lower quartile of α of the last 32 steps that were looked at.",
        "step/alpha_high": "Upper quartile of α of the last 32 steps that were looked at.",
        "step/share_higher": "Share of the last 32 steps that ended higher than they began.",
    }

    def __init__(
        self, probe: int = 256, every: int | None = None, looks: int = 100, share: float = 0.004
    ) -> None:
        self.probe = Whole(_FEWEST).check("probe", probe)
        super().__init__(every, looks, share)

    def forget(self) -> None:
        """Be as before the first update."""
        self._trials: list[StepTrial] = []
        self._probed = self.probe  # examples, in fact

    @property
    def verdict(self) -> StepVerdict:
        """On the last 32 steps that were looked at."""
        return judge(self._trials)

    def objection(self, trainer: Trainer, loader: IndexLoader) -> str | None:
        """There must be a function that is minimised, and examples beside a batch."""
        if any(group.get("maximize") for group in trainer.optimizers[0].param_groups):
            return "the optimizer maximises."
        left = loader.num_examples - loader.batch_size
        if loader.batch_size < loader.num_examples and left < _FEWEST:
            return f"there must be {_FEWEST} examples beside a batch (received: {left})."
        expected = min(self.probe, loader.num_examples) * left / loader.num_examples
        if not loader.is_full_batch and expected < _FEWEST:
            return (
                f"of {self.probe} probe examples about {expected:.0f} are not in a batch, and "
                f"there must be {_FEWEST}: a larger probe helps."
            )
        return None

    def passes(self, loader: IndexLoader) -> list[int]:
        """The probe, at both ends."""
        return [loader.num_examples if loader.is_full_batch else self.probe] * 2

    def measure(self, update: TrialUpdate) -> dict[str, float]:
        """The parabola of this step, and the distribution of the last ones."""
        rows = self._rows(update)
        if len(rows) < _FEWEST:
            return {}
        start = self._slope(update, rows)
        with update.after():
            trial = StepTrial(start, self._slope(update, rows))
        if not (np.isfinite(trial.start) and np.isfinite(trial.end)):
            return {}
        self._trials = [*self._trials, trial][-_JUDGED:]
        self._probed = len(rows)
        verdict = self.verdict
        values = {"step/share_higher": verdict.higher / verdict.steps}
        if trial.alpha is not None:
            values["step/alpha"] = trial.alpha
        if verdict.median is not None and verdict.quartiles is not None:
            values["step/alpha_median"] = verdict.median
            values["step/alpha_low"], values["step/alpha_high"] = verdict.quartiles
            alphas = [t.alpha for t in self._trials if t.alpha is not None]
            self.draw(update, "step/alphas", np.array(alphas))
        return values

    def _rows(self, update: TrialUpdate) -> Tensor:
        if update.plan.is_full_batch:
            return update.indices
        many = update.plan.num_examples
        drawn = Order(many, (_SEED + update.plan.seed,))(0, min(self.probe, many))
        rows = torch.from_numpy(drawn).sort().values.to(update.indices.device)
        return rows[~torch.isin(rows, update.indices)]

    def _slope(self, update: TrialUpdate, rows: Tensor) -> float:
        """⟨∇J + λθ, s⟩ at what the parameters are."""
        optimizer, gradient = update.optimizer, update.gradient_on(rows, update.number)
        # Others may decay the parameters beside the gradient, which is no part of J.
        coupled = isinstance(optimizer, _COUPLED) or update_rules(optimizer) is not None
        decays = weight_decays(update.objective.params, optimizer.param_groups if coupled else [])
        return dot(with_decay(gradient, update.params, decays), update.step)

    def summary(self) -> dict[str, Any]:
        """The verdict."""
        verdict = self.verdict
        if not verdict.steps:
            return {}
        return {
            "step_test": {
                "verdict": verdict.words(self._probed),
                "state": verdict.state,
                "steps": verdict.steps,
                "median_alpha": verdict.median,
                "probe": self._probed,
            }
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        trials = [[t.start, t.end] for t in self._trials]
        return {"trials": trials, "probed": self._probed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._trials = [StepTrial(*trial) for trial in state_dict["trials"]]
        self._probed = state_dict["probed"]
