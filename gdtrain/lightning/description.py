"""What a model is, in plain values: to tell it from another one, and to build it again.

Weights are not part of it. Nothing here runs what a file says.
"""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gdtrain._compat.torch_modules import buffers_in, children_in, has_hooks, parameters_in
from gdtrain.step_sizes import StepSize

__all__ = ["describe", "describe_data", "options", "rebuild", "structure", "text"]

# Where classes live that are built again from their constructor's arguments.
_HOMES = ("torch.nn", "gdtrain.models", "gdtrain.losses")


def text(value: Any) -> str | None:
    """A setting as text that is equal for equal settings; None for what is none (tensors, …)."""
    if isinstance(value, Enum):
        return repr(value.value)
    if value is None or isinstance(value, bool | int | float | complex | str):
        return repr(value)
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return repr(value.item())
    if isinstance(value, torch.dtype | Path):
        return str(value).removeprefix("torch.")
    if isinstance(value, type | BuiltinFunctionType):  # torch.tanh, say
        return value.__qualname__
    if isinstance(value, list | tuple | set | frozenset):
        parts = [text(entry) for entry in value]
        if None in parts:
            return None
        shown = sorted(map(str, parts)) if isinstance(value, set | frozenset) else parts
        return f"[{', '.join(map(str, shown))}]"
    if isinstance(value, Mapping):
        return _call("", value)
    if isinstance(value, partial):
        return _call(text(value.func) or "", {**dict(enumerate(value.args)), **value.keywords})
    if isinstance(value, FunctionType):
        # What a function has closed over is a setting too: the decay of an average, say.
        return _call(_named(value), inspect.getclosurevars(value).nonlocals)
    if is_dataclass(value) or isinstance(value, StepSize):
        return _call(type(value).__name__, options(value))
    return None


def _call(name: str, arguments: Mapping[Any, Any]) -> str:
    shown = [(key, text(entry)) for key, entry in arguments.items()]
    return f"{name}({', '.join(f'{key}={entry}' for key, entry in shown if entry is not None)})"


def _named(function: FunctionType) -> str:
    """A function's name; one that is made in place may share it with others, and tells its code."""
    name, code = function.__qualname__, function.__code__
    if "<" not in name:
        return name
    plain = [c for c in code.co_consts if c is None or isinstance(c, bool | int | float | str)]
    digest = hashlib.sha256(repr((code.co_code, plain, code.co_names)).encode()).hexdigest()
    return f"{name} {digest[:8]}"


def options(value: Any) -> dict[str, str]:
    """The public attributes of an object that are settings, as text.

    What a dataclass does not show, or does not take, is its state and no setting.
    """
    state = {"training"}
    if is_dataclass(value):
        state |= {field.name for field in fields(value) if not (field.repr and field.init)}
    shown = {
        name: text(entry)
        for name, entry in sorted(vars(value).items())
        if not name.startswith("_") and name not in state
    }
    return {name: entry for name, entry in shown.items() if entry is not None}


def structure(model: nn.Module) -> dict[str, str]:
    """Every layer by its path, with its settings, and its tensors with dtype and shape."""
    found = {}
    for path, module in model.named_modules():
        own = (*parameters_in(module).items(), *buffers_in(module).items())
        tensors = [f"{n} {text(t.dtype)} {text(t.shape)}" for n, t in own if t is not None]
        found[path] = ", ".join([_call_of(module), *tensors])
    return found


def _call_of(module: nn.Module) -> str:
    shown = [f"{name}={entry}" for name, entry in options(module).items()]
    return f"{type(module).__name__}({', '.join(shown)})"


def describe(
    module: nn.Module, make: Any = None, sizes: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """A model or a loss in plain values, from which `rebuild` makes one of the same structure.

    Layers and losses of `torch.nn`, `gdtrain.models` and `gdtrain.losses` are described by the
    arguments of their constructor, as they stand in the instance, and `torch.nn.Sequential` by its
    layers; or as made by `make`, a function of `gdtrain.models`, with `sizes`. Whether one of the
    same structure comes out is tried.
    """
    candidates = [_described(module)]
    if isinstance(make, partial):
        make, sizes = make.func, {**(sizes or {}), **make.keywords}
    if isinstance(make, FunctionType) and _home(make) is not None:
        candidates.append({"_target_": _home(make), **(sizes or {})})
    for candidate in candidates:
        if candidate is not None and _is_rebuilt(module, candidate):
            return candidate
    return None


def _described(module: nn.Module) -> dict[str, Any] | None:
    if has_hooks(module) or "forward" in vars(module):
        return None
    kind = type(module)
    if kind is nn.Sequential:
        children = {name: _described(child) for name, child in children_in(module).items() if child}
        if None in children.values():
            return None
        return {"_target_": "torch.nn.Sequential", "children": children}
    home = _home(kind)
    arguments = None if home is None else _arguments(module, kind)
    return None if arguments is None else {"_target_": home, **arguments}


def _home(kind: Any) -> str | None:
    """The public name of a class or function that is built again."""
    for home in _HOMES:
        name = f"{home}.{kind.__qualname__}"
        try:
            if pkgutil.resolve_name(name) is kind:
                return name
        except (AttributeError, ValueError):  # ValueError: a name such as <lambda>
            continue
    return None


def _arguments(value: Any, kind: type, strict: bool = False) -> dict[str, Any] | None:
    """A constructor's arguments, from the attributes of the same names; `strict`: all of them."""
    found = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or (
            name in ("device", "dtype") and not strict
        ):
            continue
        entry = getattr(value, name, parameter.empty)
        if name == "bias" and (entry is None or isinstance(entry, Tensor)):
            entry = entry is not None
        if entry is parameter.empty:
            if strict or parameter.default is entry:
                return None
            continue
        try:
            found[name] = _plain(entry)
        except TypeError:
            return None
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype | Path):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    raise TypeError


def _is_rebuilt(module: nn.Module, description: Mapping[str, Any]) -> bool:
    def build(node: Mapping[str, Any]) -> Any:
        arguments = {name: value for name, value in node.items() if name != "_target_"}
        return pkgutil.resolve_name(node["_target_"])(**arguments)

    floating = [t.dtype for t in module.state_dict().values() if t.is_floating_point()]
    try:
        # Without memory, and without drawing from the generator.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            again = rebuild(description, build)
        again.to(floating[0] if floating else None)
    except Exception:  # whatever a constructor makes of arguments that it did not get
        return False
    return structure(again) == structure(module)


def rebuild(description: Mapping[str, Any], build: Callable[[Mapping[str, Any]], Any]) -> Any:
    """The inverse of `describe`, with new weights; `build` alone calls what a description names."""
    if not isinstance(description, Mapping):
        raise ValueError(f"A layer is described by a mapping. Received: {description!r}.")
    children = description.get("children")
    if description.get("_target_") == "torch.nn.Sequential" and isinstance(children, Mapping):
        made = ((str(name), rebuild(child, build)) for name, child in children.items())
        return nn.Sequential(OrderedDict(made))
    return build(description)


def describe_data(data: Any) -> dict[str, Any] | None:
    """A data module of gdtrain in plain values, where its source is a name or a file; else None."""
    kind = type(data)
    name = f"gdtrain.data.{kind.__qualname__}"
    if not kind.__module__.startswith("gdtrain.data."):
        return None
    base = next(k for k in kind.__mro__ if k.__name__ == "DataModule")
    parts = [_arguments(data, k, strict=True) for k in (base, kind)]
    return {"_target_": name, **parts[0], **parts[1]} if all(p is not None for p in parts) else None  # type: ignore[dict-item]
