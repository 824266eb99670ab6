"""Build models, losses and data modules from plain descriptions, which may come from anybody.

A description is what a checkpoint keeps: `{"_target_": "gdtrain.models.MLP", "hidden": [128]}`.
Nothing in it is resolved, looked up in the environment, or called, but public classes of trusted
packages, of the kind that belongs in that place, with plain values.
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
    "build_data",
    "build_loss",
    "build_model",
    "check_description",
    "check_outputs",
    "check_plain",
    "default_loss",
    "first_difference",
]

_DEPTH = 16  # of containers in containers
_VALUES = 100_000  # in a description
_TEXT = 4096  # characters of one
_WIDEST = 2**16  # what a whole number of a model may be in any case
_OPERATIONS = 100  # while a model is built, for each of its tensors

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
# Pretrained weights change how these compute, beyond the weights.
_CHANGED_BY_WEIGHTS = ("googlenet", "inception_v3")


class _ExcessError(ValueError):
    """A model would be larger than the weights that are there for it."""


# ---------------------------------------------------------------------- plain values


def check_plain(value: Any, most: int = _VALUES, what: str = "The description") -> None:
    """Raise unless a value is made of plain containers, of bounded size, with nothing to resolve.

    Args:
        value: None, a boolean, number or text, or a list or dict of them; keys are texts.
        most: Values in all.
        what: It is, for the message.

    Raises:
        ValueError: It holds something else, or is too deep or too large.

    Example:
        >>> check_plain({"hidden": [128, 64]})
        >>> check_plain({"hidden": "${oc.env:HOME}"})
        Traceback (most recent call last):
        ...
        ValueError: The description must hold plain values only. Received: '${oc.env:HOME}', ...
    """
    left, count = [(value, 0)], 0
    while left:
        node, depth = left.pop()
        count += 1
        if count > most or depth > _DEPTH:
            raise ValueError(
                f"{what} is too large: expected at most {most:,} values, and {_DEPTH} containers "
                f"in each other."
            )
        if isinstance(node, str):
            _check_text(node, what)
        elif isinstance(node, Mapping):
            for key, item in node.items():
                if not isinstance(key, str):
                    raise ValueError(f"{what} must have texts as keys. Received: {key!r:.80}.")
                _check_text(key, what)
                left.append((item, depth + 1))
        elif isinstance(node, list | tuple):
            if len(node) > most:
                count = most
            left.extend((item, depth + 1) for item in node[: most + 1])
        elif isinstance(node, int) and abs(node) >= 2**63:
            raise ValueError(f"{what} must hold whole numbers of at most 64 bits.")
        elif not (node is None or isinstance(node, bool | int | float)):
            raise ValueError(
                f"{what} must hold plain values only. Received: a {type(node).__name__}."
            )


def _check_text(text: str, what: str) -> None:
    if len(text) > _TEXT:
        raise ValueError(f"{what} must hold texts of at most {_TEXT} characters.")
    if "${" in text:
        raise ValueError(
            f"{what} must hold plain values only. Received: {text[:80]!r}, which asks to be "
            f"resolved."
        )


# ---------------------------------------------------------------------- what is built


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

    Args:
        description: With `_target_`, and `_partial_: true` where the sizes are still to be given.
        input_shape: Of one example, to a model that asks for it.
        num_outputs: To a model that asks for it.
        weights: Its future `state_dict`.
        trust: Further packages whose classes may be built.

    Returns:
        The model, with first weights of its own.

    Raises:
        ValueError: The description is not plain, names something else, or does not fit the weights.

    Example:
        >>> mlp = {"_target_": "gdtrain.models.MLP", "_partial_": True, "hidden": [8]}
        >>> own = build_model(mlp, (4,), 3, {
        ...     "layers.1.weight": torch.zeros(8, 4), "layers.1.bias": torch.zeros(8),
        ...     "layers.3.weight": torch.zeros(3, 8), "layers.3.bias": torch.zeros(3)})
        >>> own(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """
    check_plain(description)
    make = _prepared(description, nn.Module, trust, "model")
    own = _is_own_package(description, trust)
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
    try:
        with nullcontext() if own else _Bounded(weights):
            return make(sizes)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(_unbuildable(description, error)) from error


def build_loss(description: Any, trust: Sequence[str] = ()) -> Loss:
    """A loss.

    Args:
        description: With `_target_`.
        trust: Further packages whose classes may be built.

    Returns:
        The loss.

    Raises:
        ValueError: The description is not plain, or names something else.

    Example:
        >>> build_loss({"_target_": "gdtrain.losses.Huber", "delta": 2.0})
        Huber(delta=2.0)
    """
    return _built(description, Loss, trust, "loss")


def default_loss(num_classes: int | None) -> Loss:
    """Cross-entropy for classes, squared error for numbers.

    Args:
        num_classes: Of the data; None for numbers.

    Returns:
        The loss.

    Example:
        >>> default_loss(num_classes=3), default_loss(num_classes=None)
        (CrossEntropy(), SquaredError())
    """
    return SquaredError() if num_classes is None else CrossEntropy()


def build_data(description: Any, trust: Sequence[str] = ()) -> DataModule:
    """A data module; it reads nothing before `setup`.

    Args:
        description: With `_target_`. A `DatasetDataModule` has further ones in `train`, `val` and
            `test`, of packages in `trust`.
        trust: Further packages whose classes may be built.

    Returns:
        The data module.

    Raises:
        FileNotFoundError: It names a file that is not there.
        ValueError: The description is not plain, or names something else.

    Example:
        >>> build_data({"_target_": "gdtrain.data.EmbeddedDataModule", "name": "iris"}).name
        'iris'
    """
    return _built(description, DataModule, trust, "data")


def check_description(description: Any, trust: Sequence[str] = ()) -> None:
    """Raise where a model, its loss or its data would be refused; nothing is built.

    Args:
        description: With `model`, `loss` (or None) and `data` (or None: arrays).
        trust: Further packages whose classes may be built.

    Raises:
        ValueError: The description is not plain, or names something else.

    Example:
        >>> check_description({"model": {"_target_": "os.system"}, "loss": None, "data": {}})
        Traceback (most recent call last):
        ...
        ValueError: The model asks to call 'os.system', which is no public model ...
    """
    check_plain(description)
    if not isinstance(description, Mapping) or not {"model", "data"} <= description.keys():
        raise ValueError("The description must have a model, its loss and its data.")
    for place, kind in (("model", nn.Module), ("loss", Loss), ("data", DataModule)):
        node = description.get(place)
        # A model or loss of the user's own class is only named, and given by him.
        if (node or place == "model") and not (isinstance(node, Mapping) and "own" in node):
            _prepared(node, kind, trust, place)


def _built(description: Any, kind: type, trust: Sequence[str], place: str) -> Any:
    check_plain(description)
    make = _prepared(description, kind, trust, place)
    try:
        return make({})
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(_unbuildable(description, error)) from error


def _unbuildable(description: Mapping[str, Any], error: Exception) -> str:
    words = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{description['_target_']} cannot be built from its description: {words}"


# ---------------------------------------------------------------------- from words to a call


def _prepared(
    node: Any, kind: type, trust: Sequence[str], place: str
) -> Callable[[Mapping[str, Any]], Any]:
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


def _sequential(
    node: Mapping[str, Any], trust: Sequence[str], place: str
) -> Callable[[Mapping[str, Any]], Any]:
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


def _argument(
    value: Any, kind: type, trust: Sequence[str], place: str
) -> Callable[[Mapping[str, Any]], Any]:
    """What gives an argument its value, anew at each call: nested objects are built then."""
    if isinstance(value, Mapping) and "_target_" in value:
        inner: type | None = None
        if kind is nn.Module:
            inner = nn.Module
        elif place in ("data.train", "data.val", "data.test"):
            inner = Dataset
        elif kind in (Dataset, object):
            inner = object
        if inner is None:
            raise ValueError(f"{place} must be a plain value. Received: a nested _target_.")
        return _prepared(value, inner, trust, place)
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
    refusal = (
        f"The {place} asks to call {str(target)[:120]!r}, which is no public "
        f"{_WORDS[kind]} of "
        f"{' or '.join([*_TRUSTED[kind], *trust]) or 'a package that you trust'}. "
    )
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() and part[0] != "_" for part in parts):
        raise ValueError(refusal)
    module, name = ".".join(parts[:-1]), parts[-1]
    own = [p for p in trust if module == p or module.startswith(f"{p}.")]
    if module in _TRUSTED[kind]:
        package = module
    elif own:
        package = own[0]
    else:
        hint = f"If you know where the file comes from, name its package: trust={parts[0]}"
        raise ValueError(refusal + hint * (parts[0] not in ("gdtrain", "torch")))
    try:
        found = _exported(module, name)
    except Exception as error:
        raise ValueError(f"{refusal}{module} cannot be imported: {error}") from error
    home = str(getattr(found, "__module__", ""))
    at_home = home == package or home.startswith(f"{package}.")
    if not at_home or not (_is_class(found, kind) or _is_factory(found, kind, module, bool(own))):
        raise ValueError(refusal)
    return typing.cast("Callable[..., Any]", found)


def _exported(module: str, name: str) -> Any:
    """What a module has under a public name; None where it has none."""
    found = importlib.import_module(module)
    public = getattr(found, "__all__", None)
    return getattr(found, name, None) if public is None or name in public else None


def _is_class(found: Any, kind: type) -> bool:
    return inspect.isclass(found) and issubclass(found, kind) and not inspect.isabstract(found)


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


def _is_own_package(description: Mapping[str, Any], trust: Sequence[str]) -> bool:
    """Whether the model is of a package that the user has named."""
    module = str(description["_target_"]).rpartition(".")[0]
    return module not in _TRUSTED[nn.Module] and any(
        module == p or module.startswith(f"{p}.") for p in trust
    )


# ---------------------------------------------------------------------- bounds


def _check_whole_numbers(node: Any, most: int) -> None:
    """Raise on a whole number that no layer for such weights has."""
    if isinstance(node, Mapping):
        for value in node.values():
            _check_whole_numbers(value, most)
    elif isinstance(node, list | tuple):
        for value in node:
            _check_whole_numbers(value, most)
    elif isinstance(node, int) and not isinstance(node, bool) and abs(node) > most:
        raise _ExcessError(
            f"The model is larger than its weights: its description says {node:,}, and there are "
            f"weights for {most:,} numbers at most."
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

    Args:
        model: From a file, with its weights.
        example: Such as it will take, (1, …).

    Raises:
        ValueError: A layer gives more than 2²⁰ numbers, 64 for each of the model's and 4096 for
            each of the example's; or the model takes no such examples.

    Example:
        >>> check_outputs(nn.Upsample(10**5), torch.zeros(1, 1, 4))
        >>> check_outputs(nn.Upsample(10**9), torch.zeros(1, 1, 4))
        Traceback (most recent call last):
        ...
        ValueError: The model cannot be used: one of its layers makes more than 1,048,576 numbers...
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
    """The first tensor, by name, that a model and its saved weights do not have alike.

    Args:
        model: To be filled.
        weights: Saved, as a `state_dict`.

    Returns:
        Its name, and its shape in the model and as saved, or what stands there; None: all are
        alike.

    Example:
        >>> first_difference(nn.Linear(2, 1, bias=False), {"weight": torch.ones(2, 2)})
        ('weight', (1, 2), (2, 2))
    """
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    saved = {
        k: tuple(v.shape) if isinstance(v, Tensor) else f"a {type(v).__name__}"
        for k, v in weights.items()
    }
    for name in sorted(own.keys() | saved.keys()):
        if own.get(name) != saved.get(name):
            return name, own.get(name, "(none)"), saved.get(name, "(none)")
    return None
