"""Build models, losses and data modules from plain descriptions, which may come from anybody.

A description is what a checkpoint keeps: `{"_target_": "gdtrain.models.MLP", "hidden": [128]}`.
Nothing in it is resolved, looked up in the environment, or called, but public classes of packages
in `trust`, or trusted in any case, of the kind that belongs in that place, with plain values.
"""

from __future__ import annotations

import importlib
import inspect
import math
import typing
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gdtrain._compat.torch_dispatch import TorchDispatchMode
from gdtrain.data.module import DataModule
from gdtrain.losses import CrossEntropy, Loss, SquaredError

__all__ = [
    "build_model",
    "build_part",
    "check_description",
    "check_outputs",
    "default_loss",
    "first_difference",
]

_DEPTH = 16  # of containers in containers
_VALUES = 100_000  # in a description
_TEXT = 4096  # characters of one
_WIDEST = 2**16  # what a whole number of a model may be in any case
_OPERATIONS = 100  # while a model is built, for each of its tensors

_Make = Callable[[Mapping[str, Any]], Any]  # from input_shape and num_outputs to an object

_PARTS: dict[str, type] = {"model": nn.Module, "loss": Loss, "data": DataModule}
# Packages whose public classes may be built without being named by the user, by kind.
_TRUSTED: dict[type, tuple[str, ...]] = {
    nn.Module: ("gdtrain.models", "torch.nn", "torchvision.models"),
    Loss: ("gdtrain.losses",),
    DataModule: ("gdtrain.data",),
    Dataset: (),
    object: (),
}
_WORDS: dict[type, str] = {
    nn.Module: "model (a class of torch.nn.Module, or a function that says it returns one)",
    Loss: "loss (a class of gdtrain.losses.Loss)",
    DataModule: "data module (a class of gdtrain.data.DataModule)",
    Dataset: "torch Dataset",
    object: "class",
}
# What may stand in an argument of one.
_NESTED: dict[type, type] = {nn.Module: nn.Module, Dataset: object, object: object}
# Pretrained weights change how these compute, beyond the weights.
_CHANGED_BY_WEIGHTS = ("googlenet", "inception_v3")


class _ExcessError(ValueError):
    """A model would be larger than the weights that are there for it."""


def _check_plain(value: Any) -> None:
    """Raise unless a value is made of plain containers, not too many, with nothing to resolve."""
    left, count = [(value, 0)], 1
    while left:
        node, depth = left.pop()
        inner: Sequence[Any] = ()
        if isinstance(node, str):
            _check_text(node)
        elif isinstance(node, Mapping):
            for key in node:
                _check_text(key)
            inner = list(node.values())
        elif isinstance(node, list | tuple):
            inner = node
        elif isinstance(node, int) and abs(node) >= 2**63:
            raise ValueError("The description must hold whole numbers of at most 64 bits.")
        elif not (node is None or isinstance(node, bool | int | float)):
            raise ValueError(
                f"The description must hold plain values only. Received: a {type(node).__name__}."
            )
        count += len(inner)
        if count > _VALUES or (inner and depth == _DEPTH):
            raise ValueError(
                f"The description is too large: expected at most {_VALUES:,} values, and {_DEPTH} "
                f"containers in each other."
            )
        left.extend((item, depth + 1) for item in inner)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"The description must have texts as keys. Received: {text!r:.80}.")
    if len(text) > _TEXT:
        raise ValueError(f"The description must hold texts of at most {_TEXT} characters.")
    if "${" in text:
        raise ValueError(
            f"The description must hold plain values only. Received: {text[:80]!r}, which asks to "
            f"be resolved."
        )


def build_model(
    description: Any,
    input_shape: Sequence[int],
    num_outputs: int,
    weights: Mapping[str, Tensor],
    trust: Sequence[str] = (),
) -> nn.Module:
    """A model for weights that are there; none that would need more memory than they do.

    It is built without memory first (on torch's "meta" device), and its tensors are compared with
    the weights.
    """
    _check_plain(description)
    make = _prepared(description, nn.Module, trust, "model")
    module = description["_target_"].rpartition(".")[0]
    own = module not in _TRUSTED[nn.Module] and _within(module, trust) is not None
    if not own:
        _check_whole_numbers(description, max(_WIDEST, _numbers(weights)))
    sizes = {"input_shape": tuple(input_shape), "num_outputs": num_outputs}
    try:
        with torch.device("meta"), _Bounded(weights, own):
            without_memory = make(sizes)
    except ValueError:
        raise
    except Exception:  # it reads values while it is built, or would fail with memory too
        pass
    else:
        different = first_difference(without_memory, weights)
        if different is not None:
            raise ValueError(
                f"The checkpoint does not match the model that it describes: expected "
                f"{different[0]} of shape {different[1]}. Received: {different[2]}."
            )
    with nullcontext() if own else _Bounded(weights):
        return _made(description, make, sizes)


def build_part(place: str, description: Any, trust: Sequence[str] = ()) -> Any:
    """A "loss", or a "data" module, which reads nothing before `setup`."""
    _check_plain(description)
    return _made(description, _prepared(description, _PARTS[place], trust, place), {})


def _made(description: Mapping[str, Any], make: _Make, sizes: Mapping[str, Any]) -> Any:
    try:
        return make(sizes)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(_unbuildable(description, error)) from error


def default_loss(num_classes: int | None) -> Loss:
    """Cross-entropy for classes, squared error for numbers."""
    return SquaredError() if num_classes is None else CrossEntropy()


def check_description(description: Any, trust: Sequence[str] = ()) -> None:
    """Raise where a model, its loss or its data would be refused; nothing is built."""
    _check_plain(description)
    if not isinstance(description, Mapping) or not {"model", "data"} <= description.keys():
        raise ValueError("The description must have a model, its loss and its data.")
    for place, kind in _PARTS.items():
        node = description.get(place)
        # A model or loss of the user's own class is only named, and given by him.
        if (node or place == "model") and not (isinstance(node, Mapping) and "own" in node):
            _prepared(node, kind, trust, place)


def _unbuildable(description: Mapping[str, Any], error: Exception) -> str:
    words = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{description['_target_']} cannot be built from its description: {words}"


# ---------------------------------------------------------------------- from words to a call


def _prepared(node: Any, kind: type, trust: Sequence[str], place: str) -> _Make:
    """What builds the object from sizes; raises on whatever may not be built, before any is."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ValueError(f"The description of the {place} must have a _target_.")
    target = _public(node["_target_"], kind, trust, place)
    partial = node.get("_partial_", False)
    if not isinstance(partial, bool) or (partial and place != "model"):
        raise ValueError(f"{place}._partial_ is for models, true or false.")
    if target is nn.Sequential:
        return _sequential(node, trust, place)
    arguments = {
        key: _argument(value, kind, trust, f"{place}.{key}")
        for key, value in node.items()
        if key not in ("_target_", "_partial_")
    }
    for key in arguments:
        if key.startswith("_") or not key.isidentifier():
            raise ValueError(f"{place}.{key[:80]} is no argument of {node['_target_']}.")
    if getattr(target, "__module__", "").startswith("torchvision."):
        arguments = _without_downloads(target, arguments)
    parameters = inspect.signature(target).parameters

    def make(sizes: Mapping[str, Any]) -> Any:
        given = {k: v for k, v in sizes.items() if partial and k in parameters}
        values = {key: value(sizes) for key, value in arguments.items()}
        try:
            inspect.signature(target).bind(**values, **given)
        except TypeError as error:
            raise ValueError(_unbuildable(node, error)) from None
        made = target(**values, **given)
        if not isinstance(made, kind):
            raise ValueError(f"{node['_target_']} gives no {_WORDS[kind]}.")
        return made

    return make


def _sequential(node: Mapping[str, Any], trust: Sequence[str], place: str) -> _Make:
    """Layers by name, one after the other: `{"_target_": "torch.nn.Sequential", "children": …}`."""
    children = node.get("children")
    if node.keys() != {"_target_", "children"} or not isinstance(children, Mapping):
        raise ValueError(f"{place}: a torch.nn.Sequential has its layers in children, by name.")
    makes = {
        name: _prepared(child, nn.Module, trust, f"{place}.{name}")
        for name, child in children.items()
    }
    if not all(name and "." not in name and not hasattr(nn.Module, name) for name in makes):
        raise ValueError(f"{place}: a layer cannot have such a name.")
    return lambda sizes: nn.Sequential(OrderedDict((n, m(sizes)) for n, m in makes.items()))


def _argument(value: Any, kind: type, trust: Sequence[str], place: str) -> _Make:
    """What gives an argument its value, anew at each call: nested objects are built then."""
    if isinstance(value, Mapping) and "_target_" in value:
        if place in ("data.train", "data.val", "data.test"):
            return _prepared(value, Dataset, trust, place)
        if kind not in _NESTED:
            raise ValueError(f"{place} must be a plain value. Received: a nested _target_.")
        return _prepared(value, _NESTED[kind], trust, place)
    if isinstance(value, Mapping):
        items = {k: _argument(v, kind, trust, f"{place}.{k}") for k, v in value.items()}
        for key in items:
            if key.startswith("_"):
                raise ValueError(f"{place} must have plain keys. Received: {key[:80]!r}.")
        return lambda sizes: {k: v(sizes) for k, v in items.items()}
    if isinstance(value, list | tuple):
        values = [_argument(v, kind, trust, f"{place}[{i}]") for i, v in enumerate(value)]
        return lambda sizes: [v(sizes) for v in values]
    return lambda sizes: value


def _public(target: Any, kind: type, trust: Sequence[str], place: str) -> Callable[..., Any]:
    """The class (or factory) that a name stands for, where a trusted package has made it public."""
    packages = " or ".join([*_TRUSTED[kind], *trust]) or "a package that you trust"
    refusal = (
        f"The {place} asks to call {str(target)[:120]!r}, which is no public {_WORDS[kind]} of "
        f"{packages}. "
    )
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() and part[0] != "_" for part in parts):
        raise ValueError(refusal)
    module, name = ".".join(parts[:-1]), parts[-1]
    own = _within(module, trust)
    package = module if module in _TRUSTED[kind] else own
    if package is None:
        hint = f"If you know where the file comes from, name its package: trust={parts[0]}"
        raise ValueError(refusal + hint * (parts[0] not in ("gdtrain", "torch")))
    try:
        holder = importlib.import_module(module)
        found = getattr(holder, name, None) if name in getattr(holder, "__all__", [name]) else None
    except Exception as error:
        raise ValueError(f"{refusal}{module} cannot be imported: {error}") from error
    at_home = _within(str(getattr(found, "__module__", "")), [package])
    is_class = inspect.isclass(found) and issubclass(found, kind) and not inspect.isabstract(found)
    if not at_home or not (is_class or _is_factory(found, kind, module, bool(own))):
        raise ValueError(refusal)
    return typing.cast("Callable[..., Any]", found)


def _within(module: str, packages: Sequence[str]) -> str | None:
    """The first of some packages that a module is of."""
    return next((p for p in packages if module == p or module.startswith(f"{p}.")), None)


def _is_factory(found: Any, kind: type, module: str, own: bool) -> bool:
    """Whether a function is documented to make a model."""
    if kind is not nn.Module or not inspect.isfunction(found):
        return False
    if own:
        try:
            returned = typing.get_type_hints(found).get("return")
        except Exception:  # a name that only a type checker knows
            return False
        return inspect.isclass(returned) and issubclass(returned, nn.Module)
    if module == "torchvision.models":
        import torchvision

        return found.__name__ in torchvision.models.list_models(torchvision.models)
    return module == "gdtrain.models" and found.__name__ == "resnet18"


def _without_downloads(target: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Without pretrained weights, which would be fetched: those of the checkpoint take their place.

    torchvision's functions pass what they do not know on to others that fetch.
    """
    kept = {k: v for k, v in arguments.items() if not k.startswith(("weights", "pretrained"))}
    fetching = any(arguments[k]({}) for k in arguments.keys() - kept.keys())
    if fetching and target.__name__ in _CHANGED_BY_WEIGHTS:
        raise ValueError(
            f"torchvision's {target.__name__} with pretrained weights cannot be built again from a "
            f"checkpoint: build it in Python, and load the weights into it."
        )
    return kept


# ---------------------------------------------------------------------- bounds


def _check_whole_numbers(node: Any, most: int) -> None:
    """Raise on a whole number that no layer for such weights has."""
    for value in node.values() if isinstance(node, Mapping) else node:
        if isinstance(value, Mapping | list | tuple):
            _check_whole_numbers(value, most)
        elif isinstance(value, int) and abs(value) > most:
            raise _ExcessError(
                f"The model is larger than its weights: its description says {value:,}, and there "
                f"are weights for {most:,} numbers at most."
            )


class _Bounded(TorchDispatchMode):
    """Ends the building of a model that needs more, or larger, tensors than its weights.

    Of a package that the user has named, whose constructors may do what they like, the bounds are
    wide.
    """

    def __init__(self, weights: Mapping[str, Tensor], wide: bool = False) -> None:
        super().__init__()
        self._left = 10**6 if wide else _OPERATIONS * (len(weights) + 20)
        self._most = max(2**28 if wide else 2**22, 4 * _numbers(weights))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if args and isinstance(args[0], list | tuple) and all(type(n) is int for n in args[0]):
            self._check(math.prod(args[0]))  # of what makes a tensor of a size: before it does
        made = func(*args, **(kwargs or {}))
        self._check(made.numel() if isinstance(made, Tensor) else 0)
        return made

    def _check(self, size: int) -> None:
        if self._left < 0 or size > self._most:
            raise _ExcessError(
                "The model is larger than its weights: building it as the description says needs "
                "more tensors, or larger ones, than the checkpoint has."
            )


def check_outputs(model: nn.Module, example: Tensor) -> None:
    """Raise where a layer of a model makes very much more of an example than is there.

    It runs without memory, on torch's "meta" device.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    most = max(2**20, 64 * _numbers(state), 4096 * example.numel())
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    try:
        with torch.no_grad(), torch.device("meta"), _SmallOutputs(most):
            torch.func.functional_call(model, empty, (example.to("meta"),))
    except _ExcessError as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"The model cannot be used: it does not take examples of shape "
            f"{tuple(example.shape[1:])} ({words})."
        ) from error


class _SmallOutputs(TorchDispatchMode):
    """Ends a pass through a model in which a tensor has more numbers than it may."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if not isinstance(tensor, Tensor) or not tensor.is_meta:
                continue
            if tensor.untyped_storage().nbytes() > self._most * tensor.itemsize:
                raise _ExcessError(
                    f"The model cannot be used: one of its layers makes more than {self._most:,} "
                    f"numbers of one example, which its weights do not explain."
                )
        return made


def _numbers(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())


def first_difference(model: nn.Module, weights: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first tensor, by name, that a model and its saved weights do not have alike."""
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    saved = {
        k: tuple(v.shape) if isinstance(v, Tensor) else f"a {type(v).__name__}"
        for k, v in weights.items()
    }
    for name in sorted(own.keys() | saved.keys()):
        if own.get(name) != saved.get(name):
            return name, own.get(name, "(none)"), saved.get(name, "(none)")
    return None
