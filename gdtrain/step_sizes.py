"""Rules that compute the step size η from what an update sees: the loss, the gradient, the past.

θ parameters, f the objective on the examples of the update, d its gradient, η the step size, t the
number of updates made before this one, T the number planned, B examples per update, N in all.

    f = J(θ) + ½λ‖θ‖²,    d = ∇J(θ) + λθ        λ the weight decay: a rule sees both with it
    η = rule(θ, f, d, …),    θ ← θ − η d

| rule | η | looks elsewhere | B < N |
| --- | --- | --- | --- |
| `Armijo` | the first that decreases f enough, found by shrinking | f at the trial points | no |
| `BarzilaiBorwein` | ⟨s,s⟩/⟨s,y⟩ of the last step, safeguarded | f at the trial points | no |
| `Polyak` | (f − f*)/‖d‖² | | no |
| `StochasticPolyak` | min(η_max, (f − f*)/(c‖d‖²)) | | yes |
| `StochasticLineSearch` | as Armijo, on the batch at hand | f at the trial points | yes |
| `DoG` | max‖θ−θ₀‖ / √Σ‖d‖² | | yes |
| `DoWG` | max‖θ−θ₀‖² / √Σ max‖θ−θ₀‖²‖d‖² | | yes |
| `InverseSmoothness` | 1/L | gradients near θ | where L is given |
| `ScheduleFree` | another rule's, or lr; averages θ | as that rule | as that rule |

An optimizer takes a rule as `step_size=` and leaves lr to it. A schedule may still scale what the
rule gives. A rule object holds its options only: what it remembers is the optimizer's state, and
is saved with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import inf, isfinite, sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

__all__ = [
    "Armijo",
    "BarzilaiBorwein",
    "DoG",
    "DoWG",
    "InverseSmoothness",
    "Polyak",
    "ScheduleFree",
    "Sight",
    "StepSize",
    "StochasticLineSearch",
    "StochasticPolyak",
    "automatic",
]

_PREFIX = "step_size_"  # of a rule's tensors in state[p]
_NUMBERS = "step_size"  # a rule's numbers in the first group

# BB steps outside this range come from rounding, not from curvature.
_SHORTEST, _LONGEST = 1e-12, 1e12
_LONGEST_PAUSE = 64  # updates between two trials of Polyak's step by Barzilai–Borwein


class Sight:
    """What a rule sees at one update, and where it keeps what it remembers.

    Made by the optimizer. The parameters are those that have a gradient.

    Args:
        groups: The optimizer's parameter groups.
        state: The optimizer's state.
        value: J on the examples of the update, without the penalty.
        evaluate: J at what the parameters are when it is called, same examples, same random
            numbers.
        gradient: Puts the gradient of that into each `p.grad`; None: cannot be had.
        total_updates: T, or None.
        batch_fraction: B/N, or None where it is not known.

    Raises:
        ValueError: Gradients are sparse.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = torch.optim.SGD([theta], lr=1.0, weight_decay=1.0)
        >>> theta.grad = theta.detach().clone()  # of J = ½θ²
        >>> sight = Sight(optimizer.param_groups, optimizer.state, 2.0, lambda: 0.5 * theta**2)
        >>> sight.value, sight.direction, sight.squared_norm  # ½θ² + ½θ², θ + θ
        (4.0, [tensor([4.])], 16.0)
        >>> sight.evaluate(0.25), theta.item()  # at 2 − ¼·4 = 1; then back
        (1.0, 2.0)
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, Any],
        value: Tensor | float,
        evaluate: Callable[[], Tensor | float],
        gradient: Callable[[], object] | None = None,
        *,
        total_updates: int | None = None,
        batch_fraction: float | None = None,
    ) -> None:
        self.numbers: dict[str, Any] = dict(groups[0].get(_NUMBERS, {}))
        self.t: int = self.numbers.get("updates", 0)
        self.lr = float(groups[0].get("initial_lr", groups[0]["lr"]))
        self.params: list[Tensor] = []
        self.direction: list[Tensor] = []
        self._decays: list[float] = []
        self._groups, self._state = groups, state
        self._evaluate, self._gradient = evaluate, gradient
        self._total_updates, self._batch_fraction = total_updates, batch_fraction
        self._theta: list[Tensor] | None = None
        self._squared_norm: float | None = None
        with torch.no_grad():
            for group in groups:
                pairs = [(p, g) for p in group["params"] if (g := p.grad) is not None]
                params, grads = [p for p, _ in pairs], [g for _, g in pairs]
                if any(g.is_sparse for g in grads):
                    raise ValueError(
                        "A step-size rule needs dense gradients. Received: sparse ones. "
                        "Construct the embedding with sparse=False."
                    )
                decay = float(group["weight_decay"])
                if decay != 0 and params:
                    grads = list(torch._foreach_add(grads, params, alpha=decay))
                self.params += params
                self.direction += grads
                self._decays += [decay] * len(params)
            self.value = _number(value) + self._penalty()
        self._given = value

    @cached_property
    def precision(self) -> float:
        """The machine's ε, of the coarsest dtype at hand."""
        dtypes = {p.dtype for p in self.params}
        if isinstance(self._given, Tensor) and self._given.is_floating_point():
            dtypes.add(self._given.dtype)
        return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    @property
    def squared_norm(self) -> float:
        """‖d‖²."""
        if self._squared_norm is None:
            self._squared_norm = _squared_norm(self.direction)
        return self._squared_norm

    @property
    def resolution(self) -> float:
        """Differences of f below this are rounding: four units in its last place."""
        return 4 * self.precision * abs(self.value)

    @property
    def left(self) -> int:
        """T − t, at least 1: the updates from this one on; without end where T is not known."""
        return sys.maxsize if self._total_updates is None else max(self._total_updates - self.t, 1)

    @property
    def total_updates(self) -> int:
        """T, of which t are made."""
        assert self._total_updates is not None, "StepSize.check comes first"
        if self.t >= self._total_updates:
            raise ValueError(
                f"All {self._total_updates} planned updates are made (total_updates="
                f"{self._total_updates}), and the step size has decayed to 0. Construct the "
                f"optimizer with the number of updates that the whole run makes."
            )
        return self._total_updates

    def batch_fraction(self, own: float | None = None) -> float:
        """B/N: a rule's own option, or what the optimizer knows.

        Args:
            own: The option.

        Returns:
            B/N, range (0, 1].

        Raises:
            ValueError: Neither is known.
        """
        fraction = self._batch_fraction if own is None else own
        if fraction is None:
            raise ValueError(_NO_FRACTION)
        return fraction

    @torch.no_grad()
    def evaluate(self, rate: float) -> float:
        """f at θ − η d, on the same examples with the same random numbers; θ is restored.

        Args:
            rate: η.

        Returns:
            f, with the penalty there; it may be infinite or NaN.
        """
        return self._elsewhere(
            lambda: torch._foreach_add_(self.params, self.direction, alpha=-rate),
            lambda: _number(self._evaluate()) + self._penalty(),
        )

    @torch.no_grad()
    def direction_at(self, displacement: list[Tensor]) -> list[Tensor]:
        """The gradient d at θ + v; θ is restored.

        Args:
            displacement: v, one for each of `params`.

        Returns:
            d there.

        Raises:
            ValueError: Whoever made the update gave its gradient only.
        """
        gradient = self._gradient
        if gradient is None:
            raise ValueError(
                "This rule needs gradients at other points than θ: call step(closure), or give "
                "step_by_rule() a gradient."
            )

        def there() -> list[Tensor]:
            gradient()
            return [
                (torch.zeros_like(p) if p.grad is None else p.grad) + decay * p
                for p, decay in zip(self.params, self._decays, strict=True)
            ]

        return self._elsewhere(lambda: torch._foreach_add_(self.params, displacement), there)

    def kept(self, name: str) -> list[Tensor] | None:
        """What `keep` has kept under a name, or None if that is missing for some parameter.

        Args:
            name: As for `keep`.

        Returns:
            One tensor for each of `params`.
        """
        key = _PREFIX + name
        found = [self._state[p].get(key) if p in self._state else None for p in self.params]
        return None if any(t is None for t in found) else found  # type: ignore[return-value]

    def keep(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep copies in the optimizer's state, in single precision at least.

        Args:
            name: Distinguishes what a rule keeps.
            tensors: One for each of `params`.
        """
        key, old = _PREFIX + name, self.kept(name)
        if old is not None:
            torch._foreach_copy_(old, list(tensors))
            return
        for p, t in zip(self.params, tensors, strict=True):
            self._state[p][key] = t.detach().to(_at_least_single(t.dtype), copy=True)

    def keep_missing(self, name: str, tensors: Sequence[Tensor]) -> None:
        """As `keep`, only where nothing is kept yet.

        Args:
            name: As for `keep`.
            tensors: One for each of `params`.
        """
        key = _PREFIX + name
        for p, t in zip(self.params, tensors, strict=True):
            if key not in self._state[p]:
                self._state[p][key] = t.detach().to(_at_least_single(t.dtype), copy=True)

    def _penalty(self) -> float:
        """½λ‖θ‖², summed over the groups."""
        total = 0.0
        if not any(self._decays):
            return total
        for decay in {decay for decay in self._decays if decay != 0}:
            own = [p for p, d in zip(self.params, self._decays, strict=True) if d == decay]
            total += 0.5 * decay * _squared_norm(own)
        return total

    def _elsewhere(self, move: Callable[[], Any], look: Callable[[], Any]) -> Any:
        """look() where move() leads; parameters and gradients are then as they were."""
        every = [p for group in self._groups for p in group["params"]]
        grads = [p.grad for p in every]
        if self._theta is None:
            self._theta = [p.clone() for p in self.params]
        try:
            for p in every:
                p.grad = None  # a closure may set gradients to zero in place
            move()
            return look()
        finally:
            torch._foreach_copy_(self.params, self._theta)
            for p, g in zip(every, grads, strict=True):
                p.grad = g


class StepSize:
    """Base of the rules: what each needs and allows, and how it is asked for η.

    A rule of your own defines `rate`, and `follow` if it wants to see θ after the update.

    Example:
        >>> from gdtrain import GD
        >>> class Shrinking(StepSize):
        ...     def rate(self, sight):
        ...         return 0.5 / (1 + sight.t)
        >>> theta = torch.nn.Parameter(torch.tensor([4.0]))
        >>> optimizer = GD([theta], step_size=Shrinking())
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (theta**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(2):
        ...     _ = optimizer.step(closure)
        >>> theta.item(), optimizer.last_rate  # 4 − ½·4, then 2 − ¼·2
        (1.5, 0.25)
    """

    evaluates: ClassVar[bool] = False
    """Whether it evaluates f at other points."""
    differentiates: ClassVar[bool] = False
    """Whether it evaluates gradients at other points."""
    needs_smooth: ClassVar[str | None] = None
    """Why it does not hold where f has kinks; None: it holds."""
    no_momentum: ClassVar[str | None] = None
    """Why it does not go with momentum; None: it does."""
    no_nesterov: ClassVar[str | None] = None
    """Why it does not go with Nesterov momentum, where momentum is allowed; None: it does."""
    average: ClassVar[str | None] = None
    """The name under which it may keep an average of θ."""

    @property
    def needs_full_batch(self) -> str | None:
        """Why noise breaks it, so that it is refused where B < N; None: it holds there."""
        return None

    @property
    def needs_total_updates(self) -> bool:
        """Whether it asks for T."""
        return False

    @property
    def owns_rate(self) -> bool:
        """Whether η is the rule's alone; False: lr is one of its options."""
        return True

    @property
    def averages(self) -> bool:
        """Whether it averages θ, so that `eval` has something to show."""
        return False

    @property
    def keeps(self) -> tuple[str, ...]:
        """The names that it gives to `Sight.keep`: a checkpoint has a place for each."""
        return ()

    def rate(self, sight: Sight) -> float:
        """η of this update, before a schedule's factor.

        Args:
            sight: What there is to see; f and ‖d‖² are finite.

        Returns:
            η, range [0, ∞).
        """
        raise NotImplementedError

    def follow(self, sight: Sight, rate: float) -> None:
        """Called after the update.

        Args:
            sight: As for `rate`; the parameters are the new ones, f and d those before.
            rate: η that was used, with the schedule's factor.
        """

    def check(
        self,
        *,
        full_batch: bool = True,
        momentum: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        total_updates: int | None = None,
    ) -> None:
        """Refuse, with the reason, an optimizer for which the rule does not hold.

        Args:
            full_batch: Whether each update averages all N examples.
            momentum: μ.
            nesterov: Whether it is Nesterov's.
            maximize: Whether the optimizer climbs.
            total_updates: T, range [1, ∞), or None.

        Raises:
            ValueError: It does not hold, or T is needed and absent.
        """
        name = type(self).__name__
        if maximize:
            raise ValueError(f"{name} descends: maximize=True is refused. Negate the objective.")
        if not full_batch and self.needs_full_batch is not None:
            raise ValueError(
                f"{name} is a rule for full-batch descent: {self.needs_full_batch}. Use it with "
                f"GD; on mini-batches use StochasticPolyak, StochasticLineSearch, DoG or DoWG."
            )
        if momentum != 0 and self.no_momentum is not None:
            raise ValueError(
                f"{name} does not go with momentum: {self.no_momentum}. Set momentum=0. "
                f"Received: momentum={momentum}."
            )
        if nesterov and self.no_nesterov is not None:
            raise ValueError(
                f"{name} does not go with Nesterov momentum: {self.no_nesterov}. "
                f"Set nesterov=False."
            )
        if total_updates is None and self.needs_total_updates:
            raise ValueError(
                f"{name} decays over the run and needs total_updates, the number of updates that "
                f"it makes. Received: none."
            )
        if total_updates is not None and (
            isinstance(total_updates, bool)
            or total_updates != int(total_updates)
            or total_updates < 1
        ):
            raise ValueError(
                f"total_updates must be a whole number, at least 1. Received: {total_updates!r}."
            )

    def check_loss(self, loss: object) -> None:
        """Refuse a loss for which the rule does not hold.

        Args:
            loss: One with `smooth = False` has kinks.

        Raises:
            ValueError: It has kinks, and the rule needs a smooth one.

        Example:
            >>> from gdtrain.losses import Hinge
            >>> Armijo().check_loss(Hinge())
            Traceback (most recent call last):
            ValueError: Armijo needs a smooth loss: near a kink no step decreases f as the gradient
            promises, and the steps shrink to 0 away from the minimum. Use SquaredHinge (or
            Logistic) instead of Hinge, or the rule StochasticPolyak, DoG or DoWG.
        """
        if self.needs_smooth is not None and not getattr(loss, "smooth", True):
            name = type(loss).__name__
            instead = "SquaredHinge (or Logistic)" if name == "Hinge" else "a smooth loss"
            raise ValueError(
                f"{type(self).__name__} needs a smooth loss: {self.needs_smooth}. Use {instead} "
                f"instead of {name}, or the rule StochasticPolyak, DoG or DoWG."
            )

    # ------------------------------------------------------------------ averages

    @torch.no_grad()
    def eval(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the average into the parameters, to be evaluated or saved; `train` takes it out.

        Without an average nothing happens. What was in the parameters waits in the optimizer's
        state, so that training goes on from the same bits, and a checkpoint made in between can be
        resumed too. The optimizer refuses to step meanwhile.

        Args:
            optimizer: The one whose rule this is.

        Example:
            >>> from gdtrain import SGD
            >>> theta = torch.nn.Parameter(torch.tensor([1.0]))
            >>> optimizer = SGD([theta], lr=0.5, step_size=ScheduleFree(beta=0.5))
            >>> def closure():
            ...     optimizer.zero_grad()
            ...     loss = 0.5 * (theta**2).sum()
            ...     loss.backward()
            ...     return loss
            >>> for _ in range(2):  # z = 1, .5, .25;  x = 1, .5, .375;  y = 1, .5, .3125
            ...     _ = optimizer.step(closure)
            >>> optimizer.step_size.eval(optimizer)
            >>> theta.item()
            0.375
            >>> optimizer.step_size.train(optimizer)
            >>> theta.item()
            0.3125
        """
        group = optimizer.param_groups[0]
        numbers = group.get(_NUMBERS, {})
        if not self.averages or numbers.get("mode") == "eval":
            return
        for state, p in _states(optimizer):
            if _PREFIX + f"{self.average}" in state:
                state[_PREFIX + "training"] = p.clone()
                p.copy_(state[_PREFIX + f"{self.average}"])
        group[_NUMBERS] = {**numbers, "mode": "eval"}

    @torch.no_grad()
    def train(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back into the parameters what `eval` took out.

        Args:
            optimizer: The one whose rule this is.
        """
        group = optimizer.param_groups[0]
        numbers = group.get(_NUMBERS, {})
        if numbers.get("mode") != "eval":
            return
        for state, p in _states(optimizer):
            if _PREFIX + "training" in state:
                p.copy_(state.pop(_PREFIX + "training"))
        group[_NUMBERS] = {k: v for k, v in numbers.items() if k != "mode"}

    def __repr__(self) -> str:
        """With its options, for messages and to tell a resumed run's rule."""
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({options})"


# ---------------------------------------------------------------------- line searches


class Armijo(StepSize):
    """Backtracking until f decreases enough.

        f(θ − η d) ≤ f(θ) − c η ‖d‖²

    η starts at the last accepted one times `growth`, and is made smaller by `shrink` until this
    holds. Each trial is a forward pass over the data. Where f can no longer tell (differences of a
    few units in its last place) a trial counts as good. If none of `max_backtracks` + 1 trials is
    good, η = 0.

    Args:
        initial: The first η to try, range (0, ∞).
        c: How much of the decrease that the gradient promises is enough, range (0, 1).
        shrink: Range (0, 1); or "interpolate": the minimum of the parabola through f(θ), its slope
            and the trial, kept within [0.1, 0.5] of the trial.
        growth: Range [1, ∞).
        max_backtracks: Range [1, ∞).

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> from gdtrain import GD
        >>> theta = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = GD([theta], step_size=Armijo())
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 2 * (theta**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)  # η = 1 leads to −3; the parabola is least at ¼
        >>> optimizer.last_rate, theta.item()
        (0.25, 0.0)

    References:
        Armijo, Minimization of Functions Having Lipschitz Continuous First Partial Derivatives,
        1966. Nocedal and Wright, Numerical Optimization, 2006, section 3.1.
    """

    evaluates = True
    needs_smooth = (
        "near a kink no step decreases f as the gradient promises, and the steps shrink to 0 away "
        "from the minimum"
    )
    no_momentum = "it tests the step along −d, and another would be made"

    def __init__(
        self,
        initial: float = 1.0,
        c: float = 1e-4,
        shrink: float | Literal["interpolate"] = "interpolate",
        growth: float = 2.0,
        max_backtracks: int = 30,
    ) -> None:
        _check_search(initial, c, shrink, growth, max_backtracks)
        self.initial, self.c, self.shrink = initial, c, shrink
        self.growth, self.max_backtracks = growth, max_backtracks

    @property
    def needs_full_batch(self) -> str | None:
        """The step accepted is right for the batch at hand only, and grows from one to the next."""
        return "a decrease on one batch says little about the next, from which its η would go on"

    def rate(self, sight: Sight) -> float:
        """The first η on the way down that is good."""
        last = sight.numbers.get("last")
        start = self.initial if last is None else min(last * self.growth, _LONGEST)
        rate, sight.numbers["last"] = _backtracked(
            sight, start, sight.value, self.c, self.shrink, self.max_backtracks
        )
        return rate


class BarzilaiBorwein(StepSize):
    """The secant's step size, safeguarded by a test against the last values.

        s = θ_t − θ_{t−1},    y = d_t − d_{t−1}
        η = ⟨s, s⟩ / ⟨s, y⟩                     BB1, the default; BB2 (short) is ⟨s, y⟩ / ⟨y, y⟩
        f(θ − η d) ≤ max(f_t, …, f_{t−M+1}) − c η ‖d‖²

    BB1 is one over the curvature along the last step. It makes no decrease at each update, and
    needs none: the test takes the largest of the last M values, or of the last T − t where the
    optimizer knows its total_updates T, so that a run does not end on a rise. Where it fails, η
    goes to the minimum of the parabola through f, its slope and the trial, kept within [0.1, 0.5]
    of the trial. Where the curvature is not positive, η = ‖s‖/‖y‖. With `f_star`, Polyak's step
    (f − f*)/‖d‖² is tried instead where it is longer: it gets networks that can fit the data over
    plateaus. Each time it fails the test, twice as many updates pass before it is tried again (at
    most 64); each time it holds, half as many. Keeps two copies of the parameters; the test is one
    forward pass per update, two now and then.

    Args:
        short: BB2 instead of BB1.
        initial: The first η to try, range (0, ∞).
        memory: M, range [1, ∞); 1: f decreases at each update.
        c: Range (0, 1).
        max_backtracks: Range [1, ∞).
        f_star: f*, a lower bound of f, range (−∞, ∞); None: none is known.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> from gdtrain import GD
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> scale = torch.tensor([1.0, 10.0])
        >>> optimizer = GD([theta], step_size=BarzilaiBorwein(initial=0.1))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (scale * theta**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(12):
        ...     _ = optimizer.step(closure)
        >>> bool(theta.abs().max() < 1e-6)
        True

    References:
        Barzilai and Borwein, Two-Point Step Size Gradient Methods, 1988.
        Raydan, The Barzilai and Borwein Gradient Method for the Large Scale Unconstrained
        Minimization Problem, 1997. Grippo, Lampariello and Lucidi, A Nonmonotone Line Search
        Technique for Newton's Method, 1986. Dai, Al-Baali and Yang, A Positive
        Barzilai–Borwein-Like Stepsize, 2015 (‖s‖/‖y‖). Polyak, Introduction to Optimization, 1987.
    """

    evaluates = True
    needs_smooth = Armijo.needs_smooth
    no_momentum = "the secant and the test are those of steps along −d"

    def __init__(
        self,
        short: bool = False,
        initial: float = 1.0,
        memory: int = 10,
        c: float = 1e-4,
        max_backtracks: int = 30,
        f_star: float | None = None,
    ) -> None:
        _check_search(initial, c, "interpolate", 1.0, max_backtracks)
        _check_count("memory", memory)
        if f_star is not None:
            _check_range("f_star", f_star, -inf, inf, "(−∞, ∞)", finite=True)
        self.short, self.initial, self.memory = short, initial, memory
        self.c, self.max_backtracks, self.f_star = c, max_backtracks, f_star

    @property
    def needs_full_batch(self) -> str | None:
        """Noise is no curvature."""
        return "the difference of two batches' gradients is noise, not curvature"

    @property
    def keeps(self) -> tuple[str, ...]:
        """The last update's θ and d."""
        return ("theta", "direction")

    def rate(self, sight: Sight) -> float:
        """The secant's η, after the test."""
        numbers = sight.numbers
        secant = self._secant(sight)
        start = max(secant, self._polyak(sight))
        values = [*numbers.get("values", []), sight.value][-self.memory :]
        rate, numbers["last"] = _backtracked(
            sight, start, max(values[-sight.left :]), self.c, "interpolate", self.max_backtracks
        )
        if start > secant:
            held, pause = rate == start, numbers.get("pause", 1)
            numbers["pause"] = max(pause // 2, 1) if held else min(2 * pause, _LONGEST_PAUSE)
            numbers["wait"] = 0 if held else numbers["pause"]
        numbers["values"], numbers["parameters"] = values, len(sight.params)
        sight.keep("theta", sight.params)
        sight.keep("direction", sight.direction)
        return rate

    def _polyak(self, sight: Sight) -> float:
        if self.f_star is None:
            return 0.0
        wait = sight.numbers.get("wait", 0)
        sight.numbers["wait"] = max(wait - 1, 0)
        excess = max(sight.value - self.f_star, 0.0)
        if wait > 0 or excess > _LONGEST * sight.squared_norm:
            return 0.0
        return excess / sight.squared_norm if sight.squared_norm > 0 else 0.0

    def _secant(self, sight: Sight) -> float:
        last = sight.numbers.get("last", self.initial)
        theta, direction = sight.kept("theta"), sight.kept("direction")
        # What has gained or lost its gradient belongs to no secant.
        if theta is None or direction is None or sight.numbers["parameters"] != len(sight.params):
            return last
        s = torch._foreach_sub(sight.params, theta)
        y = torch._foreach_sub(sight.direction, direction)
        ss, sy, yy = _squared_norm(s), _inner(s, y), _squared_norm(y)
        if ss == 0 or not isfinite(sy):
            return last
        if sy <= 0:
            rate = sqrt(ss / yy) if yy > 0 else 10 * last
        else:
            rate = sy / yy if self.short else ss / sy
        return min(max(rate, _SHORTEST), _LONGEST)


class StochasticLineSearch(StepSize):
    """Armijo's test on the batch at hand, at each update.

        f_B(θ − η d_B) ≤ f_B(θ) − c η ‖d_B‖²

    Both sides are of the same examples with the same random numbers. η starts at
    min(η_max, γ^{B/N} η_{t−1}): it may grow by γ in a pass over the data. Holds best where the
    model can fit each example. One or two forward passes of the batch for each update.

    Args:
        initial: The first η to try, range (0, ∞).
        c: Range (0, 1).
        shrink: Range (0, 1), or "interpolate" as in `Armijo`.
        growth: γ, range [1, ∞).
        max_lr: η_max, range (0, ∞).
        max_backtracks: Range [1, ∞).
        batch_fraction: B/N, range (0, 1]; None: what the optimizer knows (`GD` 1, and any inside
            `gdtrain`'s trainer).

    Raises:
        ValueError: An option is out of range; at the first update: B/N is not known.

    Example:
        >>> from gdtrain import SGD
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> rule = StochasticLineSearch(batch_fraction=1 / 2)
        >>> optimizer = SGD(model.parameters(), step_size=rule)
        >>> for epoch in range(20):
        ...     for i in range(2):
        ...         def closure():
        ...             optimizer.zero_grad()
        ...             loss = (0.5 * (model(x[i]) - y[i]) ** 2).sum()
        ...             loss.backward()
        ...             return loss
        ...         _ = optimizer.step(closure)
        >>> round(model.weight.item(), 3)
        2.0

    References:
        Vaswani et al., Painless Stochastic Gradient: Interpolation, Line-Search, and Convergence
        Rates, 2019, arXiv 1905.09997.
    """

    evaluates = True
    needs_smooth = Armijo.needs_smooth
    no_momentum = Armijo.no_momentum

    def __init__(
        self,
        initial: float = 1.0,
        c: float = 0.1,
        shrink: float | Literal["interpolate"] = 0.9,
        growth: float = 2.0,
        max_lr: float = 10.0,
        max_backtracks: int = 100,
        batch_fraction: float | None = None,
    ) -> None:
        _check_search(initial, c, shrink, growth, max_backtracks)
        _check_range("max_lr", max_lr, 0, inf, "(0, ∞)", finite=True)
        _check_fraction(batch_fraction)
        self.initial, self.c, self.shrink, self.growth = initial, c, shrink, growth
        self.max_lr, self.max_backtracks = max_lr, max_backtracks
        self.batch_fraction = batch_fraction

    def rate(self, sight: Sight) -> float:
        """The first η on the way down that is good for this batch."""
        grown = self.growth ** sight.batch_fraction(self.batch_fraction)
        last = sight.numbers.get("last")
        start = min(self.initial if last is None else last * grown, self.max_lr)
        rate, tried = _backtracked(
            sight, start, sight.value, self.c, self.shrink, self.max_backtracks
        )
        sight.numbers["last"] = tried if rate > 0 or last is None else last
        return rate


def _backtracked(
    sight: Sight,
    start: float,
    reference: float,
    c: float,
    shrink: float | Literal["interpolate"],
    most: int,
) -> tuple[float, float]:
    """The first η with f(θ − η d) ≤ reference − c η ‖d‖², or 0; and the last that was tried."""
    square, rate = sight.squared_norm, start
    for trial in range(most + 1):
        value = sight.evaluate(rate)
        if value <= reference - c * rate * square + sight.resolution:
            return rate, rate
        if trial == most:
            break
        if shrink != "interpolate":
            rate *= shrink
        elif isfinite(value):
            above = value - sight.value + rate * square  # the tangent; > 0 as the test has failed
            least = 0.5 * rate * square / above if above > 0 else 0.5
            rate *= min(max(least, 0.1), 0.5)
        else:
            rate *= 0.1
    return 0.0, rate


# ---------------------------------------------------------------------- Polyak


class Polyak(StepSize):
    """The step that would reach the value f* if f were its tangent.

        η = min(η_max, (f − f*) / (c ‖d‖²))

    f* is the least value of f, penalty included. With f_star="estimate" a target stands for it:

        f̂ = f_best − δ,    δ ← 2δ if f ≤ f_best − ½δ, else ½δ    before each update but the first

    δ starts at ½|f₀| (1 if that is 0). So the target is always below the best value so far; it
    goes down faster while the steps bring at least half of what they aimed at, and comes closer
    when they do not.

    Args:
        f_star: f*, range (−∞, ∞); or "estimate". 0 where the model can fit the data exactly.
        c: Range (0, ∞); ½ gives twice the step, customary where f is nearly quadratic.
        max_lr: η_max, range (0, ∞); None: no bound.

    Raises:
        ValueError: An option is out of range; at an update: f is below f_star.

    Example:
        >>> from gdtrain import GD
        >>> theta = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = GD([theta], step_size=Polyak(f_star=0.0))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (theta**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> optimizer.last_rate, theta.data  # 12.5 / 25
        (0.5, tensor([1.5000, 2.0000]))

    References:
        Polyak, Introduction to Optimization, 1987. Hazan and Kakade, Revisiting the Polyak Step
        Size, 2019, arXiv 1905.00313. Bertsekas, Nedić and Ozdaglar, Convex Analysis and
        Optimization, 2003, section 8.2 (targets that adapt).
    """

    no_momentum = "the step is measured for a move along −d"

    def __init__(
        self,
        f_star: float | Literal["estimate"] = 0.0,
        c: float = 1.0,
        max_lr: float | None = None,
    ) -> None:
        if f_star != "estimate":
            _check_range("f_star", f_star, -inf, inf, "(−∞, ∞), or 'estimate'", finite=True)
        _check_range("c", c, 0, inf, "(0, ∞)", finite=True)
        if max_lr is not None:
            _check_range("max_lr", max_lr, 0, inf, "(0, ∞)", finite=True)
        self.f_star, self.c, self.max_lr = f_star, c, max_lr

    @property
    def needs_full_batch(self) -> str | None:
        """Noise keeps f_B away from f*."""
        return (
            "the loss of a batch is not f, and away from f* the steps of noisy gradients do not "
            "shrink; StochasticPolyak bounds them"
        )

    def rate(self, sight: Sight) -> float:
        """(f − f*) / (c ‖d‖²)."""
        target = self._target(sight)
        if sight.squared_norm == 0:
            return 0.0
        rate = max(sight.value - target, 0.0) / (self.c * sight.squared_norm)
        return rate if self.max_lr is None else min(self.max_lr, rate)

    def _target(self, sight: Sight) -> float:
        f, numbers = sight.value, sight.numbers
        if not isinstance(self.f_star, str):
            numbers["scale"] = scale = max(numbers.get("scale", 0.0), abs(f), abs(self.f_star))
            if f < self.f_star - 4 * sight.precision * scale:
                raise ValueError(
                    f"f_star must be the least value of f, penalty included. Received: "
                    f"f_star={self.f_star}, and f={f} after {sight.t} updates. "
                    f"Use f_star='estimate'."
                )
            return self.f_star
        if "best" not in numbers:
            numbers["best"], numbers["delta"] = f, 0.5 * abs(f) or 1.0
        else:
            reached = f <= numbers["best"] - 0.5 * numbers["delta"]
            numbers["delta"] *= 2.0 if reached else 0.5
            numbers["best"] = min(numbers["best"], f)
        return numbers["best"] - numbers["delta"]


class StochasticPolyak(StepSize):
    """Polyak's step on the batch at hand, with a cap: SPS_max.

        η = min(η_max, (f_B − f*) / (c ‖d_B‖²))

    f_B is of the update's examples; f* a lower bound of such values, 0 for most losses; f_B − f*
    counts as 0 below it. With `smoothing` γ the cap moves: η_max,t = γ^{B/N} η_{t−1}, so that η
    may grow by γ in a pass over the data (an η of 0, from a batch that is fitted exactly, is
    passed over). A function of the loss and the gradient's norm, so every engine has it.

    Args:
        max_lr: η_max, range (0, ∞); with smoothing, that of the first update. None: the
            optimizer's lr is η_max, with its schedule's factor.
        c: Range (0, ∞), customary ½; 1 for functions that are convex and not strongly so.
        f_star: f*, range (−∞, ∞).
        smoothing: γ, range [1, ∞), customary 2; None: a constant cap.
        batch_fraction: B/N, range (0, 1], asked for by smoothing; None: what the optimizer knows.

    Raises:
        ValueError: An option is out of range; at the first update: B/N is not known.

    Example:
        >>> from gdtrain import SGD
        >>> theta = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = SGD([theta], step_size=StochasticPolyak(max_lr=0.75, c=1.0))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (theta**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> optimizer.last_rate, theta.item()  # min(¾, 2 / 4)
        (0.5, 1.0)

    References:
        Loizou et al., Stochastic Polyak Step-size for SGD: An Adaptive Learning Rate for Fast
        Convergence, 2021, arXiv 2002.10542.
    """

    no_nesterov = "the step looks ahead along the buffer, for which the bound is not meant"

    def __init__(
        self,
        max_lr: float | None = None,
        c: float = 0.5,
        f_star: float = 0.0,
        smoothing: float | None = None,
        batch_fraction: float | None = None,
    ) -> None:
        if max_lr is not None:
            _check_range("max_lr", max_lr, 0, inf, "(0, ∞)", finite=True)
        _check_range("c", c, 0, inf, "(0, ∞)", finite=True)
        _check_range("f_star", f_star, -inf, inf, "(−∞, ∞)", finite=True)
        if smoothing is not None:
            _check_range("smoothing", smoothing, 1, inf, "[1, ∞)", closed=True, finite=True)
        _check_fraction(batch_fraction)
        self.max_lr, self.c, self.f_star = max_lr, c, f_star
        self.smoothing, self.batch_fraction = smoothing, batch_fraction

    @property
    def owns_rate(self) -> bool:
        """Whether η_max is the rule's; else it is lr."""
        return self.max_lr is not None

    def rate(self, sight: Sight) -> float:
        """min(η_max, (f − f*) / (c ‖d‖²))."""
        most = sight.lr if self.max_lr is None else self.max_lr
        last = sight.numbers.get("last")
        if self.smoothing is not None and last is not None:
            most = self.smoothing ** sight.batch_fraction(self.batch_fraction) * last
        excess, square = max(sight.value - self.f_star, 0.0), self.c * sight.squared_norm
        rate = excess / square if excess < most * square else most
        if self.smoothing is not None and rate > 0:
            sight.numbers["last"] = rate
        return rate

    def bounds(
        self, optimizer: torch.optim.Optimizer, batch: int
    ) -> tuple[float, float, float, float]:
        """What an engine that makes the updates by itself needs; a share is η/η₀, η₀ the lr.

        Args:
            optimizer: The one whose rule this is; its groups have "initial_lr".
            batch: B.

        Returns:
            1/c; f*; γ^{B/N}, by what the share may grow, or 0 without smoothing; and the first
            bound on the share.

        Raises:
            ValueError: B/N is needed and not known.

        Example:
            >>> theta = torch.nn.Parameter(torch.tensor([2.0]))
            >>> optimizer = torch.optim.SGD([{"params": [theta], "initial_lr": 0.5}])
            >>> StochasticPolyak(max_lr=2.0).bounds(optimizer, 1)
            (2.0, 0.0, 0.0, 4.0)
        """
        group = optimizer.param_groups[0]
        peak = float(group["initial_lr"])
        first = 1.0 if self.max_lr is None or peak == 0 else self.max_lr / peak
        if self.smoothing is None:
            return 1 / self.c, self.f_star, 0.0, first
        known: float | None = getattr(optimizer, "batch_fraction", None)
        fraction = known if self.batch_fraction is None else self.batch_fraction
        if fraction is None:
            raise ValueError(_NO_FRACTION)
        growth = self.smoothing**fraction
        numbers = group.get(_NUMBERS, {})
        last, share = numbers.get("last"), numbers.get("share")
        if share is not None and share * peak == last:
            first = growth * share  # as without a break, to the last bit
        elif last is not None and peak != 0:
            first = growth * last / peak
        return 1 / self.c, self.f_star, growth, first

    def remember(self, optimizer: torch.optim.Optimizer, batch: int, share: float) -> None:
        """Keep the last share, from which smoothing goes on, as `rate` would have.

        Args:
            optimizer: The one whose rule this is.
            batch: B.
            share: η/η₀ before the schedule's factor; one that is not above 0 is passed over.

        Example:
            >>> theta = torch.nn.Parameter(torch.tensor([2.0]))
            >>> optimizer = torch.optim.SGD([{"params": [theta], "initial_lr": 0.5}])
            >>> rule = StochasticPolyak(smoothing=4.0, batch_fraction=0.5)
            >>> rule.remember(optimizer, 1, 0.25)
            >>> rule.bounds(optimizer, 1)
            (2.0, 0.0, 2.0, 0.5)
        """
        group = optimizer.param_groups[0]
        if self.smoothing is not None and share > 0:
            last = share * float(group["initial_lr"])
            group[_NUMBERS] = {**group.get(_NUMBERS, {}), "last": last, "share": share}


# ---------------------------------------------------------------------- distance over gradients


class DoG(StepSize):
    """Distance over gradients: no rate to set.

        η_t = r̄_t / √(Σ_{i≤t} ‖d_i‖²),    r̄_t = max_{i≤t} ‖θ_i − θ₀‖, at least r_ε

    r_ε = start · (1 + ‖θ₀‖) makes the first step. With `averaging`, the last iterate is noisy and
    the average below is what to evaluate: `eval` puts it into the parameters, `train` takes it out.

        θ̄_{t+1} = (1 − w) θ̄_t + w θ_{t+1},    w = (1 + γ)/(t + 1 + γ),    γ = 8

    Keeps a copy of θ₀ (and of θ̄).

    Args:
        start: Range (0, ∞).
        averaging: Whether to keep θ̄.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> from gdtrain import SGD
        >>> theta = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = SGD([theta], step_size=DoG(start=0.25))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 2 * theta.abs().sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> optimizer.last_rate, theta.item()  # r = ¼·4 = 1, over √4
        (0.5, 2.0)

    References:
        Ivgi, Hinder and Carmon, DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size
        Schedule, 2023, arXiv 2302.12022. Shamir and Zhang, Stochastic Gradient Descent for
        Non-Smooth Optimization, 2013, arXiv 1212.1824 (the average).
    """

    average = "average"
    no_momentum = (
        "momentum goes on after η was measured, into distances that make η longer still: it can "
        "diverge"
    )

    def __init__(self, start: float = 1e-6, averaging: bool = False) -> None:
        _check_range("start", start, 0, inf, "(0, ∞)", finite=True)
        self.start, self.averaging = start, averaging

    @property
    def averages(self) -> bool:
        """Whether θ̄ is kept."""
        return self.averaging

    @property
    def keeps(self) -> tuple[str, ...]:
        """θ₀ and θ̄."""
        return ("start", "average") if self.averaging else ("start",)

    def rate(self, sight: Sight) -> float:
        """r̄ / √Σ‖d‖²."""
        distance = _farthest(sight, self.start)
        total = sight.numbers.get("total", 0.0) + sight.squared_norm
        sight.numbers["total"] = total
        return distance / sqrt(total) if total > 0 else 0.0

    def follow(self, sight: Sight, rate: float) -> None:
        """Take θ into the average."""
        if not self.averaging:
            return
        average = sight.kept("average")
        if average is None:
            sight.keep("average", sight.params)
        else:
            weight = 9.0 / (sight.t + 9.0)
            torch._foreach_lerp_(average, _as(sight.params, average), weight)


class DoWG(StepSize):
    """Distance over weighted gradients: as `DoG`, with late gradients counting more.

        v_t = Σ_{i≤t} r̄_i² ‖d_i‖²,    r̄_t = max_{i≤t} ‖θ_i − θ₀‖, at least r_ε
        η_t = min(r̄_t²/√v_t, cap · (f − f*)/‖d‖²) · (1 − t/T)

    The cap and the linear decay (1 − t/T) are options. A decay is most of what a tuned schedule
    gains; the cap keeps a step from being longer than the loss at hand can justify.
    r_ε = start · (1 + ‖θ₀‖). Keeps a copy of θ₀.

    Args:
        start: Range (0, ∞).
        cap: Range (0, ∞), or None.
        decay: "linear", which needs the optimizer's total_updates = T, or None.
        f_star: f*, a lower bound of f on any batch, asked for by the cap; range (−∞, ∞).

    Raises:
        ValueError: An option is out of range; at an update: t ≥ T.

    Example:
        >>> from gdtrain import SGD
        >>> theta = torch.nn.Parameter(torch.tensor([3.0]))
        >>> rule = DoWG(start=0.25, decay="linear")
        >>> optimizer = SGD([theta], step_size=rule, total_updates=2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 2 * theta.abs().sum()
        ...     loss.backward()
        ...     return loss
        >>> rates = []
        >>> for _ in range(2):
        ...     _ = optimizer.step(closure)
        ...     rates.append(optimizer.last_rate)
        >>> [round(rate, 4) for rate in rates]  # 1/√4, then ½ · 1/√8
        [0.5, 0.1768]

    References:
        Khaled, Mishchenko and Jin, DoWG Unleashed: An Efficient Universal Parameter-Free Gradient
        Descent Method, 2023, arXiv 2305.16284. Defazio et al., When, Why and How Much? Adaptive
        Learning Rate Scheduling by Refinement, 2023, arXiv 2310.07831 (linear decay).
    """

    no_momentum = DoG.no_momentum

    def __init__(
        self,
        start: float = 1e-4,
        cap: float | None = None,
        decay: Literal["linear"] | None = None,
        f_star: float = 0.0,
    ) -> None:
        _check_range("start", start, 0, inf, "(0, ∞)", finite=True)
        if cap is not None:
            _check_range("cap", cap, 0, inf, "(0, ∞)", finite=True)
        if decay not in (None, "linear"):
            raise ValueError(f"decay must be 'linear' or None. Received: decay={decay!r}.")
        _check_range("f_star", f_star, -inf, inf, "(−∞, ∞)", finite=True)
        self.start, self.cap, self.decay, self.f_star = start, cap, decay, f_star

    @property
    def needs_total_updates(self) -> bool:
        """The decay does."""
        return self.decay is not None

    @property
    def keeps(self) -> tuple[str, ...]:
        """θ₀."""
        return ("start",)

    def rate(self, sight: Sight) -> float:
        """r̄²/√v, capped and decayed."""
        factor = 1.0 if self.decay is None else 1 - sight.t / sight.total_updates
        square = _farthest(sight, self.start) ** 2
        total = sight.numbers.get("total", 0.0) + square * sight.squared_norm
        sight.numbers["total"] = total
        if sight.squared_norm == 0 or total == 0:
            return 0.0
        rate = square / sqrt(total)
        if self.cap is not None:
            rate = min(rate, self.cap * max(sight.value - self.f_star, 0.0) / sight.squared_norm)
        return rate * factor


def _farthest(sight: Sight, start: float) -> float:
    """r̄: the largest distance from θ₀ so far, at least start · (1 + ‖θ₀‖)."""
    numbers, first = sight.numbers, sight.kept("start")
    if first is None:  # the first update, or parameters that had no gradient before
        sight.keep_missing("start", sight.params)
        first = sight.kept("start") or []
    distance = sqrt(_squared_norm(torch._foreach_sub(sight.params, first))) if first else 0.0
    if "distance" not in numbers:
        numbers["distance"] = start * (1 + sqrt(_squared_norm(first)))
    if isfinite(distance):
        numbers["distance"] = max(numbers["distance"], distance)
    return numbers["distance"]


# ---------------------------------------------------------------------- smoothness


class InverseSmoothness(StepSize):
    """One over the smoothness L, the largest curvature in absolute value: η = 1/L.

        v ← H v / ‖H v‖,    H v ≈ (d(θ + ε v) − d(θ)) / ε,    L ≈ ‖H v‖

    by power iteration on differences of gradients, ε = √(machine precision) · (1 + ‖θ‖). L is
    measured at the first update and every `every` updates after it, where the search goes on from
    the last v. Each iteration is one gradient. Gradient descent on a quadratic is stable below 2/L,
    so 1/L leaves a factor of 2 for what L changes in between. Power iteration sees L from below.

    Args:
        smoothness: L, range (0, ∞), if it is known; None: it is measured.
        every: Updates between measurements, range [1, ∞).
        iterations: At most, for each measurement, range [1, ∞).
        tolerance: A relative change of L that is small enough to stop at, range (0, 1).
        seed: Of the first v; no other random numbers are used.

    Raises:
        ValueError: An option is out of range; at an update: gradients elsewhere cannot be had.

    Example:
        >>> from gdtrain import GD
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
        >>> optimizer = GD([theta], step_size=InverseSmoothness())
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (torch.tensor([1.0, 8.0]) * theta**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> round(optimizer.last_rate, 4)
        0.125

    References:
        Nesterov, Introductory Lectures on Convex Optimization, 2004, section 1.2.
        LeCun, Simard and Pearlmutter, Automatic Learning Rate Maximization by On-Line Estimation
        of the Hessian's Eigenvectors, 1992.
    """

    differentiates = True
    needs_smooth = "where f has kinks there is no L"

    def __init__(
        self,
        smoothness: float | None = None,
        every: int = 100,
        iterations: int = 30,
        tolerance: float = 0.01,
        seed: int = 0,
    ) -> None:
        if smoothness is not None:
            _check_range("smoothness", smoothness, 0, inf, "(0, ∞)", finite=True)
        _check_count("every", every)
        _check_count("iterations", iterations)
        _check_range("tolerance", tolerance, 0, 1, "(0, 1]")
        self.smoothness, self.every, self.iterations = smoothness, every, iterations
        self.tolerance, self.seed = tolerance, seed

    @property
    def needs_full_batch(self) -> str | None:
        """A measured L is that of one batch."""
        if self.smoothness is not None:
            return None
        return (
            "the curvature of one batch is not that of f, and 1/L is no safe step for noisy "
            "gradients (L may be given, as smoothness=)"
        )

    @property
    def keeps(self) -> tuple[str, ...]:
        """The direction of the largest curvature, from which the next search begins."""
        return ("vector",) if self.smoothness is None else ()

    def rate(self, sight: Sight) -> float:
        """1/L."""
        if self.smoothness is not None:
            return 1 / self.smoothness
        numbers = sight.numbers
        if "smoothness" not in numbers or sight.t % self.every == 0:
            numbers["smoothness"] = self._measured(sight, numbers.get("smoothness"))
        return 1 / numbers["smoothness"] if numbers["smoothness"] > 0 else 0.0

    def _measured(self, sight: Sight, before: float | None) -> float:
        v = sight.kept("vector")
        if v is None:
            generator = torch.Generator().manual_seed(self.seed)
            v = [
                torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in sight.params
            ]
            v = [
                t.to(p.device, _at_least_single(p.dtype))
                for t, p in zip(v, sight.params, strict=True)
            ]
            torch._foreach_div_(v, sqrt(_squared_norm(v)))
        epsilon = sqrt(sight.precision) * (1 + sqrt(_squared_norm(sight.params)))
        largest = 0.0
        for _ in range(self.iterations):
            there = sight.direction_at([epsilon * t for t in v])
            product = [
                (a.to(t.dtype) - b.to(t.dtype)) / epsilon
                for a, b, t in zip(there, sight.direction, v, strict=True)
            ]
            last, largest = largest, sqrt(_squared_norm(product))
            if not isfinite(largest) or largest == 0:
                # A flat place, or one on the edge of what is finite: what was known still holds.
                return before or 0.0
            v = [t / largest for t in product]
            if abs(largest - last) <= self.tolerance * largest:
                break
        sight.keep("vector", v)
        return largest


# ---------------------------------------------------------------------- schedule-free


class ScheduleFree(StepSize):
    """Schedule-free averaging: the average takes the place of a decaying η.

        y = (1 − β) z + β x        where the gradient is taken
        z ← z − η d(y)             gradient descent
        x ← (1 − c) x + c z,       c = w_t / Σ_{i≤t} w_i,    w_t = (max_{i≤t} η_i)²

    x, the average, is the answer. While training the parameters hold y; `eval` puts x into them
    and `train` y again, bit for bit: call them around validation and before the model is used.

        optimizer.step_size.eval(optimizer); validate(model); optimizer.step_size.train(optimizer)

    A checkpoint may be made in either mode (in training mode it holds y as the model's parameters).
    Keeps two copies of the parameters, x and z. BatchNorm's statistics are those at y.

    Args:
        rule: Gives η, from what it sees at y; None: η is the optimizer's lr.
        beta: β, range [0, 1); 0: plain descent and its average.

    Raises:
        ValueError: beta is out of range, or the rule averages by itself.

    Example:
        >>> from gdtrain import SGD
        >>> theta = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = SGD([theta], step_size=ScheduleFree(StochasticPolyak(max_lr=0.5), beta=0.5))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (theta**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(2):  # z = 1, .5, .25;  x = 1, .5, .375
        ...     _ = optimizer.step(closure)
        >>> theta.item()
        0.3125

    References:
        Defazio et al., The Road Less Scheduled, 2024, arXiv 2405.15682.
    """

    average = "x"
    no_momentum = "the averaging is momentum (β) already"

    def __init__(self, rule: StepSize | None = None, beta: float = 0.9) -> None:
        _check_range("beta", beta, 0, 1, "[0, 1)", closed=True)
        if beta == 1:
            raise ValueError(f"beta must be in [0, 1). Received: beta={beta!r}.")
        if rule is not None and rule.averages:
            raise ValueError(f"ScheduleFree averages, and so does {rule!r}. Leave one average out.")
        self.rule, self.beta = rule, beta

    @property
    def evaluates(self) -> bool:  # type: ignore[override]
        """As the rule."""
        return self.rule is not None and self.rule.evaluates

    @property
    def differentiates(self) -> bool:  # type: ignore[override]
        """As the rule."""
        return self.rule is not None and self.rule.differentiates

    @property
    def needs_smooth(self) -> str | None:  # type: ignore[override]
        """As the rule."""
        return None if self.rule is None else self.rule.needs_smooth

    @property
    def needs_full_batch(self) -> str | None:
        """As the rule."""
        return None if self.rule is None else self.rule.needs_full_batch

    @property
    def needs_total_updates(self) -> bool:
        """As the rule."""
        return self.rule is not None and self.rule.needs_total_updates

    @property
    def owns_rate(self) -> bool:
        """As the rule; without one, lr is η."""
        return self.rule is not None and self.rule.owns_rate

    @property
    def averages(self) -> bool:
        """Always."""
        return True

    @property
    def keeps(self) -> tuple[str, ...]:
        """z, x, and what the rule keeps."""
        return ("z", "x", *(() if self.rule is None else self.rule.keeps))

    def rate(self, sight: Sight) -> float:
        """The rule's η; what it remembers is kept apart."""
        sight.keep_missing("z", sight.params)
        sight.keep_missing("x", sight.params)
        if self.rule is None:
            return sight.lr
        with _inside(sight):
            return self.rule.rate(sight)

    def follow(self, sight: Sight, rate: float) -> None:
        """z, x, and y into the parameters."""
        if self.rule is not None:
            with _inside(sight):
                self.rule.follow(sight, rate)
        numbers = sight.numbers
        z, x = sight.kept("z"), sight.kept("x")
        assert z is not None, "rate() comes first"
        assert x is not None
        torch._foreach_add_(z, _as(sight.direction, z), alpha=-rate)
        numbers["largest"] = max(numbers.get("largest", 0.0), rate)
        weight = numbers["largest"] ** 2
        numbers["weights"] = numbers.get("weights", 0.0) + weight
        if weight > 0:
            torch._foreach_lerp_(x, z, weight / numbers["weights"])
        torch._foreach_copy_(sight.params, torch._foreach_lerp(z, x, self.beta))


# ---------------------------------------------------------------------- shared


_NO_FRACTION = (
    "This rule needs to know B/N, the part of the data in one update. Construct it with "
    "batch_fraction=B/N."
)


def automatic(full_batch: bool) -> StepSize:
    """The rule that lr="auto" stands for.

    Args:
        full_batch: Whether each update averages all N examples.

    Returns:
        Full batch: `BarzilaiBorwein(memory=30)`. Else `DoWG(cap=2.0, decay="linear")`, which asks
        the optimizer for total_updates.

    Example:
        >>> automatic(full_batch=True)
        BarzilaiBorwein(short=False, initial=1.0, memory=30, ...)
    """
    return BarzilaiBorwein(memory=30) if full_batch else DoWG(cap=2.0, decay="linear")


@contextmanager
def _inside(sight: Sight) -> Iterator[None]:
    """The numbers of the rule within a rule."""
    outer = sight.numbers
    sight.numbers = dict(outer.get("inner", {}))
    try:
        yield
    finally:
        outer["inner"] = sight.numbers
        sight.numbers = outer


def _states(optimizer: torch.optim.Optimizer) -> Iterable[tuple[dict[str, Any], Tensor]]:
    """The state of each parameter that has one."""
    every = (p for group in optimizer.param_groups for p in group["params"])
    return ((optimizer.state[p], p) for p in every if p in optimizer.state)


def _number(value: Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _as(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """In the dtypes of others."""
    return [t.to(other.dtype) for t, other in zip(tensors, like, strict=True)]


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _squared_norm(tensors: Sequence[Tensor]) -> float:
    """Σ ‖t‖², added up in double precision."""
    if not tensors:
        return 0.0
    own = torch._foreach_norm([t if t.dtype.itemsize >= 4 else t.float() for t in tensors])
    norms = [_over_ranks(n) for n in own]
    if all(n.is_cpu for n in norms):
        return sum(n.item() ** 2 for n in norms)
    return float(torch.stack([n.to(norms[0].device).double() for n in norms]).square().sum())


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Σ ⟨a, b⟩, the real part where they are complex."""
    products = [
        _over_ranks((x.conj() * y).sum()).real
        if hasattr(x, "full_tensor")
        else torch.vdot(_flat(x), _flat(y)).real
        for x, y in zip(a, b, strict=True)
    ]
    if all(p.is_cpu for p in products):
        return sum(p.item() for p in products)
    return float(torch.stack([p.to(products[0].device).double() for p in products]).sum())


def _over_ranks(number: Tensor) -> Tensor:
    """All of it, where the parameters are divided between ranks (DTensor)."""
    return number.full_tensor() if hasattr(number, "full_tensor") else number


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1).to(_at_least_single(t.dtype))


def _check_range(
    name: str,
    value: Any,
    low: float,
    high: float,
    words: str,
    *,
    closed: bool = False,
    finite: bool = False,
) -> None:
    """One message for an option out of range; `closed` takes in the lower end."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = good and (low <= value if closed else low < value) and value <= high
    if not good or (finite and not isfinite(value)):
        raise ValueError(f"{name} must be in {words}. Received: {name}={value!r}.")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1. Received: {name}={value!r}.")


def _check_fraction(value: float | None) -> None:
    if value is not None:
        _check_range("batch_fraction", value, 0, 1, "(0, 1]")


def _check_search(initial: Any, c: Any, shrink: Any, growth: Any, most: Any) -> None:
    _check_range("initial", initial, 0, inf, "(0, ∞)", finite=True)
    _check_range("c", c, 0, 1, "(0, 1)")
    if c == 1:
        raise ValueError(f"c must be in (0, 1). Received: c={c!r}.")
    if shrink != "interpolate":
        _check_range("shrink", shrink, 0, 1, "(0, 1), or 'interpolate'")
        if shrink == 1:
            raise ValueError("shrink must be in (0, 1), or 'interpolate'. Received: shrink=1.")
    _check_range("growth", growth, 1, inf, "[1, ∞)", closed=True, finite=True)
    _check_count("max_backtracks", most)
