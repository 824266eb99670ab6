"""How noisy the gradient is, and the batch size that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning import Trainer
from torch import Tensor, nn

from gdtrain._compat.torch_modules import BATCH_NORMS
from gdtrain.analysis.gradients import NoiseEstimate, NoiseScale, gram, noise, noise_scale
from gdtrain.analysis.trial_update import TrialUpdate
from gdtrain.callbacks.instrument import Instrument
from gdtrain.data.loader import IndexLoader
from gdtrain.data.order import Order
from gdtrain.ranges import Whole

__all__ = ["GradientNoise"]

_AVERAGED = 8  # looks, of which numerator and denominator are averaged
_FEWEST = 4  # groups, for an interval
_NUMBERS = 2**26  # that the gradients of all groups may have together
_SEED = 2**21  # apart from the orders of training


class GradientNoise(Instrument):
    """Logs the variance of the gradient, its signal-to-noise ratio, and the simple noise scale.

        B_simple = tr Σ / ‖G‖²

    G is the gradient on all N training examples, Σ the covariance of the gradients of single ones.
    Each look takes the gradients of groups of examples, drawn anew; numerator and denominator are
    estimated without bias (`gdtrain.analysis.gradients.noise`) and averaged apart over the last 8
    looks, and the 95% interval is Fieller's. Where ‖G‖² is not significantly above 0 the scale is
    undefined, and is not logged. With BatchNorm, Σ is that of groups of this size. Where layers
    draw random numbers, Σ and ‖G‖² (a mean square) have their share.

    Tags (see `meaning`): `noise/variance` and `noise/gradient_square`, of this look; averaged,
    `noise/signal_to_noise` where B < N (0 where ‖G‖² is below), and `noise/scale`,
    `noise/scale_low`, `noise/scale_high`.

    Args:
        groups: How many, range [4, ∞); fewer where N is small, or the model very large.
        size: Examples in each, at most, range [1, ∞).
        every, looks, share: As for `Instrument`.

    Example:
        >>> callback = GradientNoise(every=50)

    References:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv 1812.06162.
    """

    meaning: ClassVar[Mapping[str, str]] = {
        "noise/variance": "tr Σ, the variance of the gradient of one example.",
        "noise/gradient_square": "‖G‖² of the gradient on all examples: an unbiased estimate, "
        "which may be below 0.",
        "noise/signal_to_noise": "‖G‖² B/tr Σ: of an update's gradient, signal over noise.",
        "noise/scale": "tr Σ/‖G‖², the simple noise scale, in examples, over the last 8 looks: a "
        "heuristic for the batch size from which larger ones help little. No point where ‖G‖² is "
        "not significantly above 0.",
        "noise/scale_low": "Lower end of the 95% interval of the noise scale.",
        "noise/scale_high": "Upper end of the 95% interval of the noise scale.",
    }

    def __init__(
        self,
        groups: int = 16,
        size: int = 8,
        every: int | None = None,
        looks: int = 100,
        share: float = 0.004,
    ) -> None:
        self.groups = Whole(_FEWEST).check("groups", groups)
        self.size = Whole(1).check("size", size)
        super().__init__(every, looks, share)

    def forget(self) -> None:
        """Be as before the first update."""
        self._estimates: list[NoiseEstimate] = []

    @property
    def scale(self) -> NoiseScale | None:
        """The noise scale over the last looks; None before the first."""
        return noise_scale(self._estimates) if self._estimates else None

    def objection(self, trainer: Trainer, loader: IndexLoader) -> str | None:
        """There must be enough examples."""
        count = loader.num_examples
        least = _FEWEST * _least(trainer.lightning_module)
        return f"there must be {least} examples (received: {count})." if count < least else None

    def passes(self, loader: IndexLoader) -> list[int]:
        """The groups."""
        return [self.size] * self.groups

    def measure(self, update: TrialUpdate) -> dict[str, float]:
        """The estimates, and what they come to."""
        rows = self._rows(update)
        gradients = [
            update.gradient_on(group, update.number * len(rows) + k) for k, group in enumerate(rows)
        ]
        found = noise(gram(gradients), rows.shape[1], update.plan.num_examples)
        self._estimates = [*self._estimates, found][-_AVERAGED:]
        scale = noise_scale(self._estimates)
        values = {"noise/variance": found.variance, "noise/gradient_square": found.square}
        if not update.plan.is_full_batch and scale.variance > 0:
            ratio = scale.square * update.plan.batch_size / scale.variance
            values["noise/signal_to_noise"] = max(ratio, 0.0)
        for tag, number in (("", scale.value), ("_low", scale.low), ("_high", scale.high)):
            if number is not None:
                values[f"noise/scale{tag}"] = number
        return values

    def _rows(self, update: TrialUpdate) -> Tensor:
        """(K, b), no example twice."""
        many = update.plan.num_examples
        parameters = sum(p.numel() for p in update.params)
        groups = max(_FEWEST, min(self.groups, _NUMBERS // parameters))
        size = max(min(self.size, many // groups), _least(update.objective.model))
        groups = min(groups, many // size)
        drawn = Order(many, (_SEED + update.plan.seed, update.number))(0, groups * size)
        return torch.from_numpy(drawn).view(groups, size)

    def summary(self) -> dict[str, Any]:
        """The last noise scale."""
        scale = self.scale
        if scale is None:
            return {}
        return {
            "noise_scale": {
                "value": scale.value,
                "interval": None if scale.value is None else [scale.low, scale.high],
                "looks": scale.samples,
                "words": scale.words,
            }
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        rows = [[e.variance, e.square, *e.error, e.degrees] for e in self._estimates]
        return {"estimates": rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._estimates = [
            NoiseEstimate(variance, square, (a, b, c), degrees)
            for variance, square, a, b, c, degrees in state_dict["estimates"]
        ]


def _least(module: nn.Module) -> int:
    """Examples in a group: BatchNorm takes no single one."""
    return 2 if any(isinstance(m, BATCH_NORMS) for m in module.modules()) else 1
