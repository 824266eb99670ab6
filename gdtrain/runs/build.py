"""From a configuration to objects, and from their errors to messages in its keys."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning import Callback, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from gdtrain.data import DataModule
from gdtrain.errors import ConfigurationError
from gdtrain.lightning.module import SupervisedModule
from gdtrain.losses import Loss
from gdtrain.runs.configuration import closest, flatten, read_defaults
from gdtrain.runs.descriptions import default_loss

__all__ = [
    "USER_ERRORS",
    "build",
    "entries",
    "in_keys",
    "message",
    "options_of",
    "plain_containers",
    "too_large",
]

# What a wrong configuration may raise while it is built.
USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
)


def plain_containers(config: DictConfig) -> dict[str, Any]:
    """The configuration with all that it refers to filled in.

    Args:
        config: Composed.

    Example:
        >>> plain_containers(OmegaConf.create({"seed": 1, "data": {"seed": "${seed}"}}))
        {'seed': 1, 'data': {'seed': 1}}
    """
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def build(config: DictConfig) -> tuple[DataModule, SupervisedModule]:
    """The data, set up, and the module that is to be trained on it.

    Args:
        config: Composed from `conf/train.yaml`, and checked.

    Returns:
        Both.

    Raises:
        ConfigurationError: A part cannot be built from its values.
        ValueError: A value is refused by what it is for.

    Example:
        >>> from hydra import compose, initialize_config_dir
        >>> from gdtrain.runs.configuration import conf_directory
        >>> with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        ...     data, module = build(compose("train", ["data=iris", "model=linear"]))
        >>> data.num_train, module.loss
        (105, CrossEntropy())
    """
    for group, node in plain_containers(config).items():
        _check_options(node, str(group))
    with _named("data", config):
        data = instantiate(config.data, _convert_="all")
        data.prepare_data()
        _settle_precision(config, data)
        data.use_loss(_loss(config.loss, None) if config.loss else None)
        data.setup()
    loss = _loss(config.loss, data.num_classes)
    outputs = loss.outputs(data.num_classes, data.num_targets)
    seed_everything(config.seed, verbose=False)
    with _named("model", config):
        model = _sized(instantiate(config.model, _convert_="all"), data.input_shape, outputs)
    if data.dtype == torch.float64:
        model = model.double()
    with _named("optimizer", config):
        optimizer, step_size = _optimizer(config)
    module = SupervisedModule(
        model,
        loss,
        optimizer,
        instantiate(config.schedule, _convert_="all") if config.schedule else "auto",
        decay_biases=config.decay_biases,
        step_size=step_size,
        engine=config.engine,
    )
    return data, module


def _settle_precision(config: DictConfig, data: DataModule) -> None:
    """float64 throughout, where data.dtype or trainer.precision says so."""
    precision = str(config.trainer.get("precision"))
    if precision in ("64", "64-true"):
        data.dtype = torch.float64
    elif data.dtype == torch.float64 and precision not in ("32", "32-true", "None"):
        raise ValueError(
            f"data.dtype=float64 trains in float64, and trainer.precision={precision} in another. "
            f"Set one of them."
        )


def _optimizer(config: DictConfig) -> tuple[Any, Any]:
    """The optimizer's factory, and what decides its step size."""
    own: Any = OmegaConf.to_container(config.optimizer, resolve=True)
    rule = instantiate(config.step_size, _convert_="all") if config.step_size else None
    if own.get("lr") == "auto":
        del own["lr"]
        rule = "auto" if rule is None else rule
    make = instantiate(own, _convert_="all")
    with suppress(ValueError):  # which the module says; a value of a wrong kind is told here
        make([nn.Parameter(torch.zeros(1, 1))])
    return make, rule


def _loss(config: Any, num_classes: int | None) -> Loss:
    loss = instantiate(config, _convert_="all") if config else default_loss(num_classes)
    if not isinstance(loss, Loss):
        raise ValueError(
            f"The loss must be a gdtrain.losses.Loss, which gives one value per example. Received: "
            f"{type(loss).__name__}."
        )
    return loss


def _sized(make: Callable[..., nn.Module] | nn.Module, shape: Any, outputs: int) -> nn.Module:
    """A model from its factory; one that does not ask for sizes gets none."""
    if isinstance(make, nn.Module):
        return make
    sizes = {"input_shape": shape, "num_outputs": outputs}
    try:
        asked = inspect.signature(make).parameters
    except ValueError:  # of a partial with options that the class does not take
        raise TypeError("options that it does not take") from None
    return make(**{name: value for name, value in sizes.items() if name in asked})


def entries(group: DictConfig | None) -> list[Any]:
    """The callbacks, instruments or loggers of a group.

    Args:
        group: By name; what is null is left out.

    Returns:
        Callbacks, and functions that are called with the run's folder.

    Raises:
        ConfigurationError: One is neither.

    Example:
        >>> group = {"curves": {"_target_": "gdtrain.callbacks.LossCurves"}, "progress": None}
        >>> [type(one).__name__ for one in entries(OmegaConf.create(group))]
        ['LossCurves']
    """
    made = []
    for name, entry in (group or {}).items():
        if not entry:
            continue
        one = instantiate(entry, _convert_="all")
        if not isinstance(one, Callback) and not entry.get("_partial_"):
            raise ConfigurationError(
                f"{name!s} must be a Lightning callback, or have _partial_: true to be made with "
                f"the run's folder. Received: {type(one).__name__}."
            )
        made.append(one)
    return made


@contextmanager
def _named(group: str, config: DictConfig) -> Iterator[None]:
    """Say of a part that cannot be built which values it was to be built from."""
    try:
        yield
    except Exception as outer:
        error: BaseException = outer
        while isinstance(error, HydraException) and error.__cause__ is not None:
            error = error.__cause__
        common = read_defaults("train").get(group, {})
        own = dict(flatten(plain_containers(config)[group] or {}))
        target = str(own.pop("_target_", group))
        values = ", ".join(
            f"{group}.{k}={v}"
            for k, v in own.items()
            if not k.endswith("_") and k != "seed" and (k not in common or common[k] != v)
        )
        size = too_large(error)
        if size is not None:
            raise ConfigurationError(
                f"There is not enough memory for the {group}{size}. Received: {values}. Choose "
                f"smaller numbers."
            ) from error
        if not isinstance(error, TypeError):
            raise
        ours = target.startswith(("gdtrain.", "torch.", "torchvision."))
        words = "" if ours else f" ({error})"  # Python's own do not say which value they are about
        raise ConfigurationError(
            f"The {group} cannot be built from its configuration: a value is of another kind than "
            f"{target.rsplit('.', 1)[-1]} takes{words}. Received: {values}. --help shows the "
            f"defaults."
        ) from error


def _check_options(node: Any, key: str) -> None:
    """Raise where a class that is named cannot be found, or does not have an option beside it."""
    if not isinstance(node, Mapping):
        return
    for name, value in node.items():
        _check_options(value, f"{key}.{name}")
    if "_target_" not in node or "_args_" in node:
        return
    target = str(node["_target_"])
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        raise ConfigurationError(
            f"{key}._target_ must name a class or function that can be imported, such as "
            f"package.module.Class. Received: {key}._target_={target}, and there is no such name. "
            f"Is it spelt as in Python, and its package installed?"
        ) from None
    if not callable(found):
        raise ConfigurationError(
            f"{key}._target_ must name a class or function. Received: {key}._target_={target}."
        )
    known, required, complete = options_of(found)
    short = target.rsplit(".", 1)[-1]
    for name in node:
        if complete and name not in known and not name.startswith("_"):
            raise ConfigurationError(
                f"{key}.{name}: {short} has no option {name}.{closest(name, known)} It has: "
                f"{', '.join(known) or 'none'}. To take one away that the configuration has: "
                f"~{key}.{name}"
            )
    missing = [name for name in required if name not in node]
    if missing and not node.get("_partial_"):
        raise ConfigurationError(
            f"{key}: {short} needs {missing[0]}, and has no default for it. Add "
            f"+{key}.{missing[0]}=…"
        )


def options_of(found: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """The options that a call takes.

    Args:
        found: A class or function.

    Returns:
        The names that it takes, those it needs, and whether there are no others.

    Example:
        >>> options_of(lambda lr, momentum=0: None)
        (['lr', 'momentum'], ['lr'], True)
    """
    makers: list[Any] = [found]
    if inspect.isclass(found):
        if found.__new__ is not object.__new__ or type(found) is not type:
            return [], [], False
        makers = [vars(c)["__init__"] for c in found.__mro__[:-1] if "__init__" in vars(c)]
    known: dict[str, inspect.Parameter] = {}
    for maker in makers:
        try:
            parameters = list(inspect.signature(maker).parameters.values())
        except (ValueError, TypeError):
            return [], [], False
        for parameter in parameters[inspect.isclass(found) :]:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                known.setdefault(parameter.name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break  # else what is left goes to the class above
    else:
        if not inspect.isclass(found):
            return [], [], False
    needed = [name for name, p in known.items() if p.default is p.empty]
    return list(known), needed, True


# ---------------------------------------------------------------------- messages


_MEMORY = re.compile(
    r"allocate|out of memory|not enough memory|[Oo]verflow|Maximum allowed dimension|too big"
)


def too_large(error: BaseException) -> str | None:
    """How much memory was asked for in vain.

    Args:
        error: What came.

    Returns:
        In words, or nothing where it does not say; None: memory is not what was wrong.

    Example:
        >>> too_large(RuntimeError("you tried to allocate 8589934592 bytes"))
        ' (8.0 GiB were asked for)'
        >>> too_large(ValueError("lr must be > 0"))
    """
    text = str(error)
    kinds = (RuntimeError, ValueError, TypeError, OverflowError)
    if not isinstance(error, MemoryError) and not (
        isinstance(error, kinds)
        and not isinstance(error, ConfigurationError)
        and re.search(_MEMORY, text)
    ):
        return None
    amount = re.search(r"allocate (\d+) bytes", text)
    if amount:
        return f" ({int(amount.group(1)) / 2**30:,.1f} GiB were asked for)"
    written = re.search(r"allocate ([\d.]+ [KMGTPE]iB)", text)
    return f" ({written.group(1)} were asked for)" if written else ""


def message(error: BaseException, plain: Mapping[str, Any]) -> str:
    """The innermost reason: Hydra and OmegaConf wrap what a constructor said.

    Args:
        error: What came.
        plain: The configuration.

    Returns:
        It, in the configuration's keys.

    Example:
        >>> message(ValueError("std must be > 0. Received: 0."), {"model": {"std": 0}})
        'model.std must be > 0. Received: model.std=0.'
    """
    key = re.search(r"full_key: (\S+)", str(error))
    while error.__cause__ is not None and isinstance(error, HydraException):
        error = error.__cause__
    text = str(error).partition("\nException raised from")[0].strip() or type(error).__name__
    if isinstance(error, ConfigurationError):
        return text
    # Python's own words do not say which value they are about.
    text = f"{key.group(1)}: {text}" if key and not isinstance(error, ValueError) else text
    return in_keys(text, plain)


def in_keys(text: str, plain: Mapping[str, Any]) -> str:
    """A message about arguments, said with the keys that were typed.

    Args:
        text: Such as "std must be > 0. Received: std=0."
        plain: The configuration.

    Example:
        >>> in_keys("std must be > 0. Received: 0.", {"model": {"std": 0}})
        'model.std must be > 0. Received: model.std=0.'
    """
    flat = dict(flatten(plain))
    received = text.partition("Received: ")[2]

    def key(found: re.Match[str]) -> str:
        name = found.group(1)
        named = [k for k in flat if k.rpartition(".")[2] == name]
        meant = [k for k in named if str(flat[k]) in received or f"{name}={flat[k]}" in text]
        return meant[0] if meant else named[0] if len(named) == 1 else name

    text = re.sub(r"(?<![\w.'=])(\w+)(?= must |=)", key, text)
    first = text.partition(" must ")[0]
    if first in flat and received.startswith((str(flat[first]), repr(flat[first]))):
        said = f"{flat[first]}{received.removeprefix(repr(flat[first]))}"
        said = said if received.startswith(repr(flat[first])) else received
        text = text.replace(f"Received: {received}", f"Received: {first}={said}")
    return text
