"""Private names of `torch.compile`: its loop, its backend, its decompositions and its errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["compiler_errors", "decompositions", "inductor", "while_loop", "with_strides"]


def while_loop(
    goes_on: Callable[..., Any], body: Callable[..., Any], carried: tuple[Any, ...]
) -> Any:
    """A loop that is compiled as one graph, whose number of turns is not known beforehand."""
    from torch._higher_order_ops import while_loop as loop

    return loop(goes_on, body, carried)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions by operator, as a table of one's own."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def inductor(options: dict[str, Any], table: dict[Any, Callable[..., Any]]) -> Callable[..., Any]:
    """Inductor as a backend of `torch.compile`."""
    from torch._inductor.compile_fx import compile_fx

    return functools.partial(compile_fx, config_patches=options, decompositions=table)


def with_strides() -> Any:
    """Inductor's operator that puts a tensor into memory with given strides, not computed again."""
    import torch._inductor.inductor_prims  # registers it

    return torch.ops.prims.inductor_force_stride_order


def compiler_errors() -> tuple[type[Exception], type[Exception], type[Exception]]:
    """The errors of a backend, of tracing, and of too many compilations."""
    from torch._dynamo.exc import (
        BackendCompilerFailed,
        FailOnRecompileLimitHit,
        TorchDynamoException,
    )

    return BackendCompilerFailed, TorchDynamoException, FailOnRecompileLimitHit
