"""Schedule-free averaging: the average takes the place of a decaying η."""

from __future__ import annotations

from dataclasses import replace

from gdtrain._compat import torch_foreach as foreach
from gdtrain.step_sizes.base import Needs, StepSize, option
from gdtrain.step_sizes.context import Context, Memory, in_dtypes_of

__all__ = ["ScheduleFree"]


class ScheduleFree(StepSize):
    """Schedule-free averaging: the average takes the place of a decaying η.

        y = (1 − β) z + β x        where the gradient is taken
        z ← z − η d(y)             gradient descent
        x ← (1 − c) x + c z,       c = w_t / Σ_{i≤t} w_i,    w_t = (max_{i≤t} η_i)²

    x, the average, is the answer. While training the parameters hold y; `eval` puts x into them
    and `train` y again, bit for bit: call them around validation and before the model is used.
    A checkpoint may be made in either mode. Keeps two copies of the parameters, x and z.
    BatchNorm's statistics are those at y.

    Args:
        rule: Gives η, from what it sees at y; None: η is the optimizer's lr.
        beta: β, range [0, 1); 0: plain descent and its average.

    Raises:
        ValueError: beta is out of range, or the rule averages by itself.

    Example:
        >>> import torch
        >>> from gdtrain import SGD
        >>> theta = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = SGD([theta], lr=0.5, step_size=ScheduleFree(beta=0.5))
        >>> for _ in range(2):  # z = 1, .5, .25;  x = 1, .5, .375;  y = 1, .5, .3125
        ...     theta.grad = theta.detach().clone()  # of ½θ²
        ...     optimizer.step_by_rule(0.5 * theta**2, lambda: 0.5 * theta**2)
        >>> optimizer.step_size.eval(optimizer)
        >>> theta.item()
        0.375

    References:
        Defazio et al., The Road Less Scheduled, 2024, arXiv 2405.15682.
    """

    average = "x"

    def __init__(self, rule: StepSize | None = None, beta: float = 0.9) -> None:
        if rule is not None and rule.average is not None:
            raise ValueError(f"ScheduleFree averages, and so does {rule!r}. Leave one average out.")
        self.rule, self.beta = rule, option("beta", beta, 0, 1, closed="left")

    @property
    def needs(self) -> Needs:
        """What the rule needs, and no momentum; without a rule, lr is η."""
        rule = Needs(lr=True) if self.rule is None else self.rule.needs
        return replace(rule, no_momentum="the averaging is momentum (β) already", no_nesterov=None)

    @property
    def keeps(self) -> tuple[str, ...]:
        """z, x, and what the rule keeps."""
        return ("z", "x", *(() if self.rule is None else self.rule.keeps))

    def rate(self, context: Context, memory: Memory) -> float:
        """The rule's η; what it remembers is kept apart."""
        memory.keep_missing("z", context.params)
        memory.keep_missing("x", context.params)
        if self.rule is None:
            return context.lr
        return self.rule.rate(context, memory.inner())

    def follow(self, context: Context, memory: Memory, rate: float) -> None:
        """z, x, and y into the parameters."""
        if self.rule is not None:
            self.rule.follow(context, memory.inner(), rate)
        numbers = memory.numbers
        z, x = memory.tensors("z"), memory.tensors("x")
        assert z is not None, "rate() comes first"
        assert x is not None
        foreach.add_(z, in_dtypes_of(z, context.direction), alpha=-rate)
        numbers["largest"] = max(numbers.get("largest", 0.0), rate)
        weight = numbers["largest"] ** 2
        numbers["weights"] = numbers.get("weights", 0.0) + weight
        if weight > 0:
            foreach.lerp_(x, z, weight / numbers["weights"])
        foreach.copy_(context.params, foreach.lerp(z, x, self.beta))
