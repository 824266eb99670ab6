"""`torch.compile` for the updates of a sweep: whole graphs, host code in C++, errors in a line."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gdtrain._compat.torch_compile import compiler_errors, decompositions, inductor, with_strides
from gdtrain.engines.engine import NotApplicableError

__all__ = ["compiled_for", "flat"]


def flat(carried: Sequence[Any]) -> list[Tensor]:
    """The tensors in tensors and lists of them."""
    return [t for c in carried for t in (c if isinstance(c, (list, tuple)) else [c])]


def compiled_for(
    function: Callable[..., Any], arguments: tuple[Any, ...], single_threaded: bool = False
) -> Callable[..., Any]:
    """A function compiled for such arguments, and called once with them.

    On CPU with host code in C++, where that can be had: a small update spends as long there as in
    its kernels.
    """
    backend_failed, tracing_failed, too_many = compiler_errors()
    on_cpu = flat(arguments)[0].device.type == "cpu"
    for in_cpp in (True, False) if on_cpu else (False,):
        # Dynamo keeps what it compiled with the code, and no more than a few for each.
        code = function.__code__
        own = types.FunctionType(
            code.replace(), function.__globals__, None, None, function.__closure__
        )
        compiled = torch.compile(
            own, fullgraph=True, dynamic=False, backend=_backend(in_cpp, single_threaded)
        )
        try:
            with _without_word_of_cuda():
                compiled(*arguments)
        except RuntimeError as error:
            traced = isinstance(error, backend_failed)
            if in_cpp and (traced or not isinstance(error, tracing_failed)):
                continue
            raise _refusal(error) from error
        break

    def run(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except (tracing_failed, too_many) as error:  # the model was changed
            raise _refusal(error) from error

    return run


def _refusal(error: Exception) -> NotApplicableError:
    return NotApplicableError(f"torch.compile cannot take the update: {_reason(error)}")


@contextmanager
def _without_word_of_cuda() -> Iterator[None]:
    """Silences torch's remark on a CUDA toolkit without a GPU, made where compilers are sought."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _backend(in_cpp: bool, single_threaded: bool) -> Callable[..., Any]:
    """Inductor, with products of a single row as loops that fuse with what surrounds them.

    For one example, the product W x and the gradient, an outer product, then read or write each
    weight once, together with the rule; library calls pass over memory three times as often.
    """
    aten, in_memory = torch.ops.aten, with_strides()
    table = decompositions()
    usual_mm, usual_addmm = table[aten.mm.default], table[aten.addmm.default]

    def is_single(a: Tensor) -> bool:
        return a.is_cpu and a.dtype in (torch.float32, torch.float64) and 1 in a.shape

    def mm(a: Tensor, b: Tensor) -> Any:
        if not is_single(a):
            return usual_mm(a, b)
        # In memory: else the layer before would be computed again for each entry of the product.
        a, b = in_memory(a, a.stride()), in_memory(b, b.stride())
        return a * b if a.shape[1] == 1 else (a.reshape(-1, 1) * b).sum(0, keepdim=True)

    def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        if not is_single(a) or beta != 1 or alpha != 1:
            return usual_addmm(c, a, b, beta=beta, alpha=alpha)
        return c + mm(a, b)

    table[aten.mm.default], table[aten.addmm.default] = mm, addmm
    patches = {"cpp_wrapper": in_cpp, **({"cpp.threads": 1} if single_threaded else {})}
    return inductor(patches, table)


def _reason(error: Exception) -> str:
    """What torch says in pages, in a line."""
    inner = getattr(error, "inner_exception", None)
    lines = [line.strip() for line in str(inner or error).splitlines() if line.strip()]
    explained = [line for line in lines if line.startswith("Explanation: ")]
    line = (*explained, *lines, "")[0].removeprefix("Explanation: ").removesuffix(".")[:200]
    return f"{type(inner).__name__}: {line}" if inner is not None else line
