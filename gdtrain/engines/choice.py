"""Which engine makes the updates of a run, and why."""

from __future__ import annotations

from typing import Literal

from torch.optim import Optimizer

from gdtrain.engines.compiled import Compiled
from gdtrain.engines.eager import Eager
from gdtrain.engines.engine import Engine, NotApplicableError
from gdtrain.engines.native.engine import Native
from gdtrain.objective import Objective

__all__ = ["ENGINES", "EngineName", "choose"]

EngineName = Literal["auto", "eager", "compiled", "native"]
ENGINES: dict[str, type[Engine]] = {"eager": Eager, "compiled": Compiled, "native": Native}

_WORTH_COMPILING = 100_000  # updates: fewer are made before a compiler is ready


def choose(
    name: EngineName, objective: Objective, optimizer: Optimizer, updates: int | None = None
) -> tuple[Engine, str]:
    """The engine that was asked for; with "auto", the fastest that applies.

    The choice depends on the run alone, never on a measurement: the same run chooses the same.

    Args:
        name: "auto", "eager", "compiled" or "native".
        objective: J.
        optimizer: Of its parameters; its groups have "initial_lr".
        updates: Planned; None: no end is known.

    Returns:
        The engine, and why, in words.

    Raises:
        ValueError: Unknown name, or the engine that was asked for does not apply.

    Example:
        >>> import torch
        >>> from gdtrain import SGD
        >>> from gdtrain.losses import SquaredError
        >>> model = torch.nn.Bilinear(1, 1, 1)
        >>> objective = Objective(model, SquaredError(), torch.ones(1, 1), torch.ones(1))
        >>> engine, why = choose("auto", objective, SGD(model.parameters()), updates=100)
        >>> engine.name, why
        ('eager', 'not native: there is no hand-written backward pass of Bilinear; not...')
    """
    if name != "auto":
        if name not in ENGINES:
            raise ValueError(
                f"engine must be one of auto, {', '.join(ENGINES)}. Received: {name!r}."
            )
        try:
            return ENGINES[name](objective, optimizer), "as asked"
        except NotApplicableError as error:
            raise ValueError(
                f"engine={name} does not apply: {error}. Use engine=auto, which takes the fastest "
                f"that does."
            ) from None
    against: list[str] = []
    for engine in (Native, Compiled):
        try:
            if engine is Compiled and updates is not None and updates < _WORTH_COMPILING:
                raise NotApplicableError(
                    f"{updates:,} updates are made before a compiler is ready (worth it from "
                    f"{_WORTH_COMPILING:,})"
                )
            made = engine(objective, optimizer)
        except NotApplicableError as error:
            against.append(f"not {engine.name}: {error}")
        else:
            return made, "; ".join(against) or "a linear model or MLP on CPU, written by hand"
    return Eager(objective, optimizer), "; ".join(against)
