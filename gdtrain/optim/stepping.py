"""Stepping by a rule that computes η: what it is asked, what it is given, what is saved of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite, nan
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gdtrain.generators import RandomStates, same_after
from gdtrain.optim.gathering import Gathering
from gdtrain.optim.updating import check_hyperparameters
from gdtrain.rules import UpdateRule
from gdtrain.step_sizes import Context, Evaluations, Memory, StepSize, automatic
from gdtrain.step_sizes.context import NUMBERS, PREFIX

__all__ = ["DEFAULT_LR", "Stepping"]

# In what state_dict() gives of a rule's numbers: all of them once more, as one list; and the names
# of the tensors.
_WHOLE, _TENSORS = "whole", "tensors"
DEFAULT_LR = 1e-3


class _Evaluated(NamedTuple):
    """Value and gradients that are there already, in the place of a closure."""

    value: Tensor | float
    elsewhere: Evaluations


class Stepping(Gathering):
    """An optimizer whose η is its lr, or what a step-size rule computes at each step."""

    is_full_batch: ClassVar[bool] = False
    """Whether each update averages all N examples, so that no gradient is noisy."""

    # Without values here: a class attribute would hide the instance's from a wrapper's __getattr__.
    step_size: StepSize | None
    """The rule that computes η, or None."""
    total_updates: int | None
    """T, the number of updates that a rule which decays is told."""
    batch_fraction: float | None
    """B/N, for rules that grow η by so much in a pass over the data; set it if you know it."""

    def __init__(
        self,
        params: ParamsT,
        rule: tuple[Any, ...],
        way: dict[str, bool | None],
        examples: int | None,
        step_size: StepSize | None,
        total_updates: int | None,
    ) -> None:
        defaults = dict(zip(UpdateRule._fields, rule, strict=True)) | way
        if isinstance(defaults["lr"], str) or step_size is not None:
            defaults["lr"], step_size = self._peak(
                defaults["lr"], step_size, defaults["momentum"], defaults["dampening"]
            )
        self.step_size = step_size
        self.total_updates = None if step_size is None else total_updates
        self.batch_fraction = 1.0 if self.is_full_batch else None
        super().__init__(params, defaults, examples)
        if self.step_size is not None:
            self.param_groups[0][NUMBERS] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; refused while micro-batches are gathered."""
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            check_hyperparameters(group)
            if self.step_size is not None:
                self._check_rule(self.step_size, group)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        told = not self.is_full_batch and self.batch_fraction is not None
        if self.step_size is not None or told:  # else as in torch
            names = ("step_size", "total_updates", "batch_fraction")
            state |= {name: getattr(self, name) for name in names}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("step_size", None)
        self.__dict__.setdefault("total_updates", None)
        self.__dict__.setdefault("batch_fraction", 1.0 if self.is_full_batch else None)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with what is gathered and what a rule remembers.

        `torch.distributed.checkpoint` loads only what a new optimizer's state asks for: so a rule's
        numbers are also given as one list, and tensors that it does not keep yet are NaN.
        """
        exported = super().state_dict()
        if self.step_size is None:
            return exported
        keys = [PREFIX + name for name in self.step_size.keeps]
        places = (i for group in exported["param_groups"] for i in group["params"])
        names: set[str] = set()
        for p, i in zip(self._parameters(), places, strict=True):
            state = exported["state"].get(i, {})
            if p.requires_grad:
                state = {**{key: _blank(p) for key in keys}, **state}
            if state:
                exported["state"][i] = state
            names |= {name for name in state if str(name).startswith(PREFIX)}
        group = exported["param_groups"][0]
        saved = {_WHOLE: _as_list(group[NUMBERS]), _TENSORS: sorted(names)}
        group[NUMBERS] = group[NUMBERS] | saved
        return exported

    def _check_loadable(self, state: dict[str, Any]) -> None:
        super()._check_loadable(state)
        groups = state["param_groups"]
        saved = _rule_numbers(groups[0]).get("rule") if groups else None
        own = None if self.step_size is None else type(self.step_size).__name__
        if saved is not None and own is not None and saved != own:
            raise ValueError(
                f"This state was saved with the rule {saved}, and this optimizer has {own}: "
                f"construct it with step_size={saved}(…)."
            )

    def _missing(self, state: dict[str, Any]) -> list[str]:
        if self.step_size is None:
            return super()._missing(state)
        names = state["param_groups"][0].get(NUMBERS, {}).get(_TENSORS, [])
        states = state["state"].values()
        lost = [name for name in names if not any(name in own for own in states)]
        return super()._missing(state) + lost

    def _adopt(self, loaded: dict[str, Any]) -> None:
        super()._adopt(loaded)
        for p, saved in self._with_states(loaded):
            for name in [name for name in saved if str(name).startswith(PREFIX)]:
                if self.step_size is None or _is_blank(saved[name]):
                    self._pop(p, name)
                else:
                    self.state[p][name] = saved[name].to(p.device, copy=True)
        self._adopt_numbers(loaded["param_groups"])

    def _adopt_numbers(self, saved: list[dict[str, Any]]) -> None:
        """A rule's numbers in the first group if there is a rule, else none."""
        if self.step_size is None:
            for group in self.param_groups:
                group.pop(NUMBERS, None)
        elif NUMBERS in saved[0]:
            self.param_groups[0][NUMBERS] = _rule_numbers(saved[0])
        else:
            self.param_groups[0][NUMBERS] = {}
            if not self.step_size.needs.lr:  # lr was η; what a schedule had made of it remains
                for group in self.param_groups:
                    lr, initial = float(group["lr"]), float(group.get("initial_lr", group["lr"]))
                    group["lr"] = lr / initial if initial != 0 else 1.0
                    if "initial_lr" in group:
                        group["initial_lr"] = 1.0

    @property
    def last_rate(self) -> float:
        """η of the last update, of group 0; NaN where a rule made none. Without a rule, lr."""
        group = self.param_groups[0]
        return float(group["lr"]) if self.step_size is None else group[NUMBERS].get("rate", nan)

    def step_by_rule(
        self,
        value: Tensor | float,
        evaluate: Callable[[], Tensor | float],
        gradient: Callable[[], object] | None = None,
    ) -> None:
        """`step(closure)` for whoever has the loss and the gradients; after `gather` if gathering.

        Args:
            value: The loss whose gradients are in p.grad: the mean over the update's examples,
                without the penalty of weight decay.
            evaluate: Gives that loss at what the parameters are when it is called, on the same
                examples with the same random numbers, and leaves no trace.
            gradient: The same with gradients, put into p.grad, for rules that need them elsewhere.

        Raises:
            ValueError: The optimizer has no rule, or examples of the update are missing.
        """
        if self.step_size is None:
            raise ValueError("step_by_rule() needs a rule: construct the optimizer with step_size=")
        evaluated = _Evaluated(value, Evaluations(evaluate, gradient))
        self.step(evaluated)  # type: ignore[call-overload]

    def _step_by(self, rule: StepSize, closure: Any, num_samples: int | None) -> Any:
        gathers = self.examples is not None
        if closure is None and num_samples is None and self._is_blank_step():
            self._begin_momentum()
            return None
        try:
            self._check_step_by(rule, closure, num_samples)
            factor = self._factor(rule)
        except ValueError:
            self._forget_scaler()
            raise
        if isinstance(closure, _Evaluated):
            loss, evaluations = closure
        else:
            again = _repeatable(closure, self._parameters()) if rule.needs.elsewhere else closure
            with torch.enable_grad():
                loss = closure()
            evaluations = Evaluations(again, again)
        if gathers and not self._is_due(None):
            return loss
        context = Context.of(
            self.param_groups,
            loss,
            evaluations if rule.needs.elsewhere else None,
            total_updates=self.total_updates,
            batch_fraction=self.batch_fraction,
        )
        memory = Memory.of(self, context.params)
        rate = nan
        if context.params and isfinite(context.value) and isfinite(context.squared_norm):
            rate = factor * rule.rate(context, memory)
        if isfinite(rate):
            before = [group["lr"] for group in self.param_groups]
            try:
                for group in self.param_groups:
                    group["lr"] = rate
                self._update_all(compiling=False)
            finally:
                for group, lr in zip(self.param_groups, before, strict=True):
                    group["lr"] = lr
            rule.follow(context, memory, rate)
        numbers = {"rule": type(rule).__name__, "updates": context.t + 1, "rate": rate}
        self.param_groups[0][NUMBERS] = memory.numbers | numbers
        if gathers:
            self.discard()
        return loss

    def _check_step_by(self, rule: StepSize, closure: Any, num_samples: int | None) -> None:
        name = type(rule).__name__
        if self._is_scaled:
            raise ValueError(
                f"{name} does not go with a GradScaler, which gives no closure. Use bfloat16, "
                f"which needs no loss scale."
            )
        partial = self.examples is not None and type(closure) is not _Evaluated
        if num_samples is not None or partial:
            raise ValueError(
                f"{name} needs the loss of the whole batch, and step() of micro-batches does not "
                f"give it. Let the closure go over all of the batch's examples, without "
                f"{self.examples_argument or 'num_samples'}=; or call gather(num_samples=m), and "
                f"when it returns True step_by_rule(mean_loss, evaluate)."
            )
        if closure is None:
            raise ValueError(
                f"step() needs a closure with {name}: a function that calls zero_grad(), computes "
                f"the loss, calls backward() and returns the loss. Received: none. (A GradScaler "
                f"gives none: use bfloat16, which needs no loss scale.)"
            )
        if self.examples is not None and not self._is_complete:
            raise ValueError(
                f"{self.gathered} of the {self.examples} examples of this update are in: call "
                f"gather(num_samples=m) until it returns True."
            )
        if self.param_groups[0][NUMBERS].get("mode") == "eval":
            raise ValueError(
                "The parameters hold the average: call optimizer.step_size.train(optimizer) "
                "before training goes on."
            )

    def _factor(self, rule: StepSize) -> float:
        """A schedule's factor on what the rule gives."""
        pairs = {(g["lr"], g.get("initial_lr", g["lr"])) for g in self.param_groups}
        if len(pairs) > 1:
            raise ValueError(
                f"All groups share the η of {type(rule).__name__}, and so one lr. "
                f"Received: {', '.join(str(lr) for lr, _ in sorted(pairs))}."
            )
        ((lr, initial),) = pairs
        if not isfinite(lr):
            raise ValueError(f"Invalid learning rate: {lr}. Expected lr finite.")
        if not rule.needs.lr and initial != 1:
            raise ValueError(_two_owners(rule, initial))
        return float(lr / initial) if initial != 0 else 1.0

    def _peak(
        self, lr: Any, rule: StepSize | None, momentum: float, dampening: float
    ) -> tuple[float | Tensor, StepSize]:
        """lr of the groups, and the rule; "auto" stands for one."""
        if isinstance(lr, str):
            if lr != "auto":
                raise ValueError(f"lr must be a number or 'auto'. Received: lr={lr!r}.")
            if rule is not None:
                raise ValueError(
                    f"lr='auto' chooses a rule, and step_size={rule!r} is one: η would have two "
                    f"owners. Leave one out."
                )
            return 1.0, automatic(self.is_full_batch, momentum, dampening, decay=True)
        if not isinstance(rule, StepSize):
            raise ValueError(
                f"step_size must be a gdtrain.step_sizes.StepSize. Received: {rule!r}."
            )
        if isinstance(lr, Tensor):
            raise ValueError("With a step-size rule lr must be a number. Received: a tensor.")
        if rule.needs.lr:
            return lr, rule
        if lr not in (DEFAULT_LR, 1.0):
            raise ValueError(_two_owners(rule, lr))
        return 1.0, rule

    def _check_rule(self, rule: StepSize, group: dict[str, Any]) -> None:
        """Whether the rule holds for a group."""
        if group["differentiable"]:
            raise ValueError(f"{type(rule).__name__} does not go with differentiable=True.")
        lr = group["lr"]
        if isinstance(lr, Tensor) or lr != self.defaults["lr"]:
            raise ValueError(
                f"All groups share the η of {type(rule).__name__}, and so one lr. Received: a "
                f"group with lr={lr}."
            )
        rule.check(
            full_batch=self.is_full_batch,
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            total_updates=self.total_updates,
        )


def _repeatable(closure: Callable[[], Any], params: Iterable[Tensor]) -> Callable[[], Any]:
    """The closure on the random numbers of now, wherever the parameters are when it is called."""
    devices = {p.device for p in params}
    now = RandomStates.now(devices)

    def again() -> Any:
        with same_after(devices), torch.enable_grad():
            now.restore()
            return closure()

    return again


def _blank(p: Tensor) -> Tensor:
    """In the place of a tensor that a rule does not keep yet."""
    return torch.full_like(p, nan, dtype=torch.promote_types(p.dtype, torch.float32)).detach()


def _is_blank(tensor: Tensor) -> bool:
    found = tensor.isnan().all()
    if hasattr(found, "full_tensor"):
        found = found.full_tensor()  # all ranks decide alike
    return tensor.numel() > 0 and bool(found)


def _as_list(numbers: dict[str, Any]) -> list[Any]:
    """[names from the outermost in, value] of each number: no dict, which would be taken apart."""
    pairs: list[Any] = []
    for name, value in numbers.items():
        if isinstance(value, dict):
            pairs += [[[name, *names], number] for names, number in _as_list(value)]
        else:
            pairs.append([[name], value])
    return pairs


def _rule_numbers(group: dict[str, Any]) -> dict[str, Any]:
    """A rule's numbers in a saved group."""
    saved = group.get(NUMBERS, {})
    if _WHOLE not in saved:
        return dict(saved)
    numbers: dict[str, Any] = {}
    for names, value in saved[_WHOLE]:
        place = numbers
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = value
    return numbers


def _two_owners(rule: StepSize, lr: float) -> str:
    return (
        f"η would have two owners: {type(rule).__name__} computes it, and lr={lr:g} sets it. Leave "
        f"lr out (or 1.0), or step_size; a schedule may scale the rule's η, from lr=1.0."
    )
