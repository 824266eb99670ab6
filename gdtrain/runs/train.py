"""The program `gdtrain`: from a configuration to objects, and to a finished run."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
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
from gdtrain.lightning.launch import check_processes, is_first_process
from gdtrain.lightning.module import SupervisedModule
from gdtrain.losses import Loss
from gdtrain.runs.checkpoints import unfinished
from gdtrain.runs.configuration import checked, closest, flatten, plain_containers, read_defaults
from gdtrain.runs.descriptions import default_loss
from gdtrain.runs.folder import discard_empty, reserved
from gdtrain.runs.result import Result
from gdtrain.runs.run import run

__all__ = [
    "USER_ERRORS",
    "build",
    "in_keys",
    "message",
    "train",
    "unknown_option",
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


def train(
    config: DictConfig, directory: str | Path, plain: Mapping[str, Any] | None = None
) -> Result:
    """Build what the configuration names, train it, test it, and leave the run in a new folder.

    A run that `ckpt_path` names, and of which only the evaluation is left, is finished in its own
    folder. `plain` is what `checked` has made of the configuration. Raises a ConfigurationError,
    with the folder as it was, where the configuration, the data or the checkpoint is wrong.
    """
    plain = checked(config) if plain is None else plain
    check_processes(plain["trainer"])
    folder, checkpoint = Path(directory), plain["ckpt_path"]
    limits = plain["trainer"].get("max_epochs"), plain["trainer"].get("max_steps", -1)
    try:
        left = None if checkpoint is None else unfinished(checkpoint, *limits)
    except (ValueError, OSError) as error:
        raise ConfigurationError(str(error)) from None
    if left is not None:
        discard_empty(folder)
        folder = left
    elif not is_first_process() and any(
        (folder / n).exists() for n in ("summary.json", "checkpoints")
    ):
        raise ConfigurationError(f"{folder} already holds a run.")  # as the first process says
    own = plain if left is None and is_first_process() else None
    parts = {name: plain[name] for name in ("model", "loss", "data")}
    module: SupervisedModule | None = None
    start = 0

    def trained() -> bool:
        return module is not None and module.total_updates is not None and module.updates > start

    def keep(error: BaseException) -> bool:
        started = module is not None and module.total_updates is not None
        told = isinstance(error, USER_ERRORS) or _too_large(error) is not None
        return started and (trained() or not told)

    try:
        with reserved(folder, own, keep):
            data, module = build(config)
            start = module.updates
            return run(
                module,
                data,
                trainer=instantiate(config.trainer, _convert_="all"),
                callbacks=[*_entries(config.callbacks), *_entries(config.instruments)],
                loggers=_entries(config.logger),
                directory=folder,
                variant=config.variant,
                seed=config.seed,
                checkpoint=checkpoint,
                hyperparameters=_hyperparameters(plain),
                description={"command": True, **parts},
            )
    except Exception as error:
        size = _too_large(error)
        if size is not None:
            raise ConfigurationError(
                f"There is not enough memory to train{size}. Received: data.micro_batch_size="
                f"{plain['data'].get('micro_batch_size')}. Set a smaller one, such as "
                f"data.micro_batch_size=64, which changes no result, or train fewer updates."
            ) from error
        if trained() or not isinstance(error, USER_ERRORS):
            raise  # not the configuration's fault: the traceback tells more
        raise ConfigurationError(message(error, plain)) from error


def _hyperparameters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes runs, flat, for TensorBoard."""
    chosen = {"variant": plain["variant"], "seed": plain["seed"]}
    chosen |= {"schedule": "auto", "step_size": "none"}
    for group in ("optimizer", "schedule", "step_size", "model", "loss", "data"):
        for name, value in (plain[group] or {}).items():
            if name == "_target_":
                chosen[group] = value.rsplit(".", 1)[-1]
            elif name != "_partial_":
                chosen[f"{group}.{name}"] = value
    return chosen


def build(config: DictConfig) -> tuple[DataModule, SupervisedModule]:
    """The data, set up, and the module that is to be trained on it."""
    for group, node in plain_containers(config).items():
        _check_options(node, str(group))
    with _named("loss", config):
        loss = instantiate(config.loss, _convert_="all") if config.loss else None
    if loss is not None and not isinstance(loss, Loss):
        raise ValueError(
            f"The loss must be a gdtrain.losses.Loss, which gives one value per example. Received: "
            f"{type(loss).__name__}."
        )
    with _named("data", config):
        data = instantiate(config.data, _convert_="all")
        data.prepare_data()
        _settle_precision(config, data)
        data.use_loss(loss)
        data.setup()
    loss = default_loss(data.num_classes) if loss is None else loss
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


def _entries(group: DictConfig | None) -> list[Any]:
    """The callbacks, instruments or loggers of a group; some are functions of the run's folder."""
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
        error = _innermost(outer)
        common = read_defaults("train").get(group, {})
        own = dict(flatten(plain_containers(config)[group] or {}))
        target = str(own.pop("_target_", group))
        values = ", ".join(
            f"{group}.{k}={v}"
            for k, v in own.items()
            if not k.endswith("_") and k != "seed" and (k not in common or common[k] != v)
        )
        size = _too_large(error)
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
    wrong = unknown_option(found, node, key)
    if wrong:
        raise ConfigurationError(
            f"{wrong} To take one away that the configuration has: ~{wrong.partition(':')[0]}"
        )
    missing = [name for name in _options_of(found)[1] if name not in node]
    if missing and not node.get("_partial_"):
        raise ConfigurationError(
            f"{key}: {target.rsplit('.', 1)[-1]} needs {missing[0]}, and has no default for it. "
            f"Add +{key}.{missing[0]}=…"
        )


def unknown_option(found: Callable[..., Any], names: Iterable[str], key: str) -> str:
    """What to say of the first option that a class or function does not take; "": it takes all."""
    known, _, complete = _options_of(found)
    for name in names:
        if complete and name not in known and not name.startswith("_"):
            return (
                f"{key}.{name}: {getattr(found, '__name__', key)} has no option {name}."
                f"{closest(name, known)} It has: {', '.join(known) or 'none'}."
            )
    return ""


def _options_of(found: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """The options that a call takes, those that it needs, and whether it takes no others."""
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


_MEMORY = re.compile(
    r"allocate|out of memory|not enough memory|[Oo]verflow|Maximum allowed dimension|too big"
)


def _too_large(error: BaseException) -> str | None:
    """How much memory was asked for in vain, in words; None: memory is not what was wrong."""
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
    """What is wrong, in the keys of the configuration."""
    key = re.search(r"full_key: (\S+)", str(error))
    error = _innermost(error)
    text = str(error).partition("\nException raised from")[0].strip() or type(error).__name__
    if isinstance(error, ConfigurationError):
        return text
    # Python's own words do not say which value they are about.
    text = f"{key.group(1)}: {text}" if key and not isinstance(error, ValueError) else text
    return in_keys(text, plain)


def _innermost(error: BaseException) -> BaseException:
    """What a constructor said: Hydra wraps it."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def in_keys(text: str, plain: Mapping[str, Any]) -> str:
    """A message about arguments, "std must …", said with the keys that were typed, "model.std"."""
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
