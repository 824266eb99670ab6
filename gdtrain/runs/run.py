"""From a configuration to a finished run, and from a checkpoint back to a model.

The only module below the scripts, with `gdtrain.cli`, that knows Hydra.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import pkgutil
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning import Callback, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import gdtrain.data as data_modules
from gdtrain.data import (
    DataModule,
    EvaluationLoader,
    Preprocessing,
    SparseInputs,
    read_features,
    read_labelled,
)
from gdtrain.data.reading import load_checkpoint, printable, unpacked_bytes
from gdtrain.data.tables import Header
from gdtrain.descent.optimizer import parameter_groups
from gdtrain.errors import ConfigurationError
from gdtrain.lightning.launch import check_processes, is_first_process
from gdtrain.lightning.module import SupervisedModule
from gdtrain.lightning.resuming import check_model
from gdtrain.lightning.strategy import alone_in
from gdtrain.losses import Loss
from gdtrain.objective import Objective
from gdtrain.runs.builder import (
    build_data,
    build_loss,
    build_model,
    check_description,
    check_outputs,
)
from gdtrain.runs.configuration import check, closest, new_folder, read_defaults
from gdtrain.runs.fit import (
    Result,
    _quiet,
    check_fits,
    claim,
    default_loss,
    leave,
    predict,
    run,
    unfinished,
)

if TYPE_CHECKING:
    from gdtrain.analysis.landscape import Grid, Line
    from gdtrain.analysis.rate_finder import RateCurve

__all__ = [
    "Trained",
    "evaluate",
    "explain",
    "find_checkpoint",
    "find_lr",
    "landscape",
    "load_trained",
    "predict_file",
    "train",
]

_log = logging.getLogger("gdtrain")

_LARGEST = 2**27  # numbers in an example which a checkpoint may ask for
_MOST_DRAWN = 2**23  # and in data that are drawn


def train(config: DictConfig, directory: str | Path) -> Result:
    """Build what the configuration names, train it, test it, and leave the run in a folder.

    Args:
        config: Composed from `conf/train.yaml`.
        directory: The run's folder; it must not hold a run yet. A run that `ckpt_path` names and
            of which only the evaluation is left is finished in its own folder.

    Returns:
        The finished run.

    Raises:
        ConfigurationError: The configuration, the data or the checkpoint is wrong. No update was
            made, and the folder is as it was.

    Example:
        >>> import tempfile
        >>> from hydra import compose, initialize_config_dir
        >>> from gdtrain.runs.configuration import conf_directory
        >>> with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        ...     config = compose("train", ["data=iris", "model=linear", "optimizer=gd"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = train(config, folder)
        >>> result.stop.reason.value
        'BUDGET'
    """
    folder = Path(directory)
    plain = _plain(config)
    check(plain)
    check_processes(plain["trainer"])
    unfinished = _unfinished(plain)
    if unfinished is not None:
        discard_empty(folder)
        folder = unfinished
    before = set(os.listdir(folder)) if folder.is_dir() else None
    if unfinished is not None:
        pass  # it is that run's already
    elif is_first_process():
        try:
            claim(folder, plain)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
    elif (folder / "summary.json").exists() or (folder / "checkpoints").exists():
        raise ConfigurationError(f"{folder} already holds a run.")  # as the first process says
    module: SupervisedModule | None = None
    try:
        data, module = _build(config)
        start = module.updates
        return run(
            module,
            data,
            trainer=instantiate(config.trainer, _convert_="all"),
            callbacks=[*_values(config.callbacks), *_values(config.instruments)],
            loggers=_values(config.logger),
            directory=folder,
            variant=config.variant,
            seed=config.seed,
            checkpoint=config.ckpt_path,
            hyperparameters=_hyperparameters(plain),
            description={
                "command": True,
                **{name: plain.get(name) for name in ("model", "loss", "data")},
            },
        )
    except Exception as error:
        trained = module is not None and module.total_updates is not None and module.updates > start
        size = _too_large(error)
        told = size is not None or isinstance(error, _USER_ERRORS)
        if (told and not trained) or module is None or module.total_updates is None:
            _leave(folder, before)
        if size is not None:
            raise ConfigurationError(
                f"There is not enough memory to train{size}. Received: data.micro_batch_size="
                f"{plain['data'].get('micro_batch_size')}. Set a smaller one, such as "
                f"data.micro_batch_size=64, which changes no result, or train fewer updates."
            ) from error
        if trained or not isinstance(error, _USER_ERRORS):
            raise  # not the configuration's fault: the traceback tells more
        raise ConfigurationError(_message(error, plain)) from error
    except BaseException:
        if module is None or module.total_updates is None:  # nothing was trained
            _leave(folder, before)
        raise


def _unfinished(plain: Mapping[str, Any]) -> Path | None:
    """The folder of the run to go on with, where only its evaluation is left."""
    if plain["ckpt_path"] is None:
        return None
    limits = plain["trainer"].get("max_epochs"), plain["trainer"].get("max_steps", -1)
    try:
        return unfinished(plain["ckpt_path"], *limits)
    except (ValueError, OSError) as error:
        raise ConfigurationError(str(error)) from None


_USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
)


def _build(config: DictConfig) -> tuple[DataModule, SupervisedModule]:
    for group, node in _plain(config).items():
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
        own = dict(_flat(_plain(config)[group] or {}))
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


_MEMORY = re.compile(
    r"allocate|out of memory|not enough memory|[Oo]verflow|Maximum allowed dimension|too big"
)


def _too_large(error: BaseException) -> str | None:
    """How much memory was asked for in vain, or nothing; None: that is not what was wrong."""
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


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
    known, required, complete = _options(found)
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


def _options(found: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """The names that a call takes, those it needs, and whether there are no others."""
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


def _values(group: DictConfig | None) -> list[Any]:
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


def _plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def _hyperparameters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes runs, flat, for TensorBoard."""
    chosen = {"variant": plain["variant"], "seed": plain["seed"]}
    for group in ("optimizer", "schedule", "step_size", "model", "loss", "data"):
        if group in ("schedule", "step_size") and not plain[group]:
            chosen[group] = "auto" if group == "schedule" else "none"
        for name, value in (plain[group] or {}).items():
            if name == "_partial_":
                continue
            key = group if name == "_target_" else f"{group}.{name}"
            chosen[key] = value.rsplit(".", 1)[-1] if name == "_target_" else value
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in chosen.items()
    }


# ---------------------------------------------------------------------- a learning rate


def find_lr(config: DictConfig, directory: str | Path, name: str = "", **options: Any) -> RateCurve:
    """Build what the configuration names, make a range test, and leave the curve in a folder.

    Args:
        config: Composed from `conf/train.yaml`; lr and schedule are not used.
        directory: The test's folder; it must not be there, or be empty.
        name: Of the test, in its picture.
        **options: As for `gdtrain.analysis.rate_finder.find_lr`.

    Returns:
        The curve, with the suggestion.

    Raises:
        ConfigurationError: The configuration, the data, an option or the folder is wrong. Nothing
            was written.

    Example:
        >>> import tempfile
        >>> from hydra import compose, initialize_config_dir
        >>> from gdtrain.runs.configuration import conf_directory
        >>> words = ["data=iris", "model=linear", "optimizer=gd", "optimizer.lr=1.0"]
        >>> with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        ...     config = compose("train", words)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     curve = find_lr(config, Path(folder) / "test", updates=50)
        ...     (Path(folder) / "test" / "find_lr.png").is_file()
        True
    """
    folder = new_folder(directory)
    try:
        with _all_or_nothing(folder) as new:
            curve = _range_test(config, options)
            curve.details = {"name": name, **(curve.details or {})}
            curve.save(new)
    except _USER_ERRORS as error:
        raise ConfigurationError(_message(error, _plain(config))) from error
    return curve


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[Path]:
    """A place to make a folder in, which is moved to where it belongs once all is written."""
    was_there = folder.parent.exists()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            yield Path(scratch) / "new"
            os.replace(Path(scratch) / "new", folder)
    except OSError as error:
        if not error.filename or Path(error.filename).parent != folder.parent:
            raise
        raise ConfigurationError(
            f"{folder} cannot be made: {error.strerror}. Choose another output=…"
        ) from None
    finally:
        if not was_there:
            discard_empty(folder.parent)


def _range_test(config: DictConfig, options: dict[str, Any]) -> RateCurve:
    """On the device, and in the precision, that the configuration trains with."""
    from gdtrain.analysis import rate_finder

    data, module = _build(config)
    if config.ckpt_path is not None:
        state = load_checkpoint(config.ckpt_path)
        check_fits(state["state_dict"], module, config.ckpt_path)
        module.load_state_dict(state["state_dict"])
    with _quiet(), alone_in(None, instantiate(config.trainer, _convert_="all")) as make_trainer:
        trainer = make_trainer(logger=False, enable_checkpointing=False)
        if trainer.world_size > 1:
            raise ValueError(
                f"The test runs on one device. Received: {trainer.world_size} processes. Set "
                f"trainer=default trainer.devices=1."
            )
        module = trainer.precision_plugin.convert_module(module)
        module.to(trainer.strategy.root_device)
        with trainer.precision_plugin.forward_context():
            return rate_finder.find_lr(module, data, **options)


# ---------------------------------------------------------------------- one update in full


def explain(config: DictConfig, update: int = 0, **options: Any) -> str:
    """Train what the configuration names up to an update, and write that one out in full.

    Args:
        config: Composed from `conf/train.yaml`.
        update: Which, range [0, T).
        **options: As for `gdtrain.analysis.explanation.Explanation.text`.

    Returns:
        The text.

    Raises:
        ConfigurationError: The configuration, the data or an option is wrong, or the update cannot
            be explained.

    Example:
        >>> from hydra import compose, initialize_config_dir
        >>> from gdtrain.runs.configuration import conf_directory
        >>> with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        ...     config = compose("train", ["experiment=demo_iris_sgd"])
        >>> "The model, before the update" in explain(config)
        True
    """
    from gdtrain.analysis.explanation import check_text, explain_run

    try:
        if config.ckpt_path is not None:
            raise ConfigurationError(
                f"The updates are made from the first one on. Received: ckpt_path="
                f"{config.ckpt_path}. Leave it out, and set update=… to a later one."
            )
        check_text(options.get("digits", 4), options.get("examples", 2))
        data, module = _build(config)
        with _quiet():
            trainer = instantiate(config.trainer, _convert_="all")
            found = explain_run(module, data, trainer, update)
        return found.text(**options)
    except _USER_ERRORS as error:
        raise ConfigurationError(_message(error, _plain(config))) from error


# ---------------------------------------------------------------------- the run's folder


def _leave(folder: Path, before: set[str] | None) -> None:
    """Take away what a run that did not start has put into its folder."""
    if not is_first_process() or not folder.is_dir():
        return
    leave(folder, before)
    discard_empty(folder)


def discard_empty(folder: Path) -> None:
    """Remove a folder if it is empty, and what is then empty above it, within the working folder.

    Args:
        folder: Of a run that did not start.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     (Path(root) / "keep").touch()
        ...     folder = Path(root) / "a" / "b"
        ...     folder.mkdir(parents=True)
        ...     discard_empty(folder)
        ...     os.listdir(root)
        ['keep']
    """
    here = Path.cwd()
    for path in (folder.absolute(), *folder.absolute().parents):
        if path == here or path in here.parents or (path.is_dir() and any(path.iterdir())):
            return
        if path.is_dir():
            path.rmdir()


def _message(error: BaseException, plain: Mapping[str, Any]) -> str:
    """The innermost reason: Hydra and OmegaConf wrap what a constructor said."""
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
    flat = dict(_flat(plain))
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


# ---------------------------------------------------------------------- from a checkpoint


@dataclass
class Trained:
    """A model from a checkpoint, and what it needs to answer.

    Args:
        module: With the trained weights.
        preprocessing: As learnt in training.
        state: The checkpoint.
        trust: Further packages whose classes may be built.
        data: What the data module has put into it.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> module = SupervisedModule(nn.Linear(1, 1), SquaredError(), lambda params: None)
        >>> Trained(module, Preprocessing(), {}).preprocessing.classes is None
        True
    """

    module: SupervisedModule
    preprocessing: Preprocessing
    state: dict[str, Any]
    trust: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)


def load_trained(
    path: str | Path,
    trust: tuple[str, ...] = (),
    model: nn.Module | Callable[[Any, int], nn.Module] | None = None,
    loss: Loss | None = None,
) -> Trained:
    """Build the model of a checkpoint or of a file of `Result.save`, and load its weights.

    Building calls what the file names. Only gdtrain, torch.nn and torchvision models are called,
    unless `trust` names more: a file may come from anybody.

    Args:
        path: Of the file.
        trust: Further packages whose classes may be called, such as ("mypackage",).
        model: To be filled, where the file does not say how its model is built: a module, or a
            function from (input_shape, num_outputs) to one.
        loss: Likewise.

    Returns:
        The model, ready to answer.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, names a class that is not trusted, or holds a model of
            somebody's own class, which must be given, or another one than was given.

    Example:
        >>> load_trained("missing.ckpt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no checkpoint missing.ckpt. ...
    """
    state = load_checkpoint(path)
    description = state["gdtrain"].get("description")
    if not isinstance(description, Mapping):
        raise ValueError(f"{path} does not say how its model is built.")
    for part, given in (("model", model), ("loss", loss)):
        _check_given(description.get(part), part, given, path)
    try:
        check_description(description, trust)
        data = _data_state(state)
        preprocessing = Preprocessing.from_state_dict(data["preprocessing"])
        weights = _weights(state)
        if loss is None:
            named = description.get("loss")
            loss = build_loss(named, trust) if named else default_loss(data["num_classes"])
        shape = tuple(data["input_shape"])

        def outputs() -> int:
            return loss.outputs(data["num_classes"], data["num_targets"])

        if model is None:
            sized = description["model"].get("_partial_")
            own = {k.removeprefix("model."): v for k, v in weights.items() if k[:6] == "model."}
            made = build_model(description["model"], shape, outputs() if sized else 0, own, trust)
        else:
            made = model if isinstance(model, nn.Module) else model(shape, outputs())
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    module = SupervisedModule(made, loss, lambda params: None)  # type: ignore[arg-type,return-value]
    floating = [v.dtype for v in weights.values() if v.is_floating_point()]
    module.to(floating[0] if floating else None)
    if model is not None:
        check_model(state["gdtrain"].get("settings", {}), module.model, path)
    check_fits(weights, module, path)
    _check_weights(weights, module, path)
    module.load_state_dict(weights)
    module.description = {**description}
    module.from_file = model is None and not trust
    module.noted_settings = dict(state["gdtrain"].get("settings", {}))
    module.updates = state["gdtrain"].get("updates", 0)
    module.examples_seen = state["gdtrain"].get("examples_seen", 0)
    module.eval()
    return Trained(module, preprocessing, state, trust, data)


def _check_weights(weights: Mapping[str, Tensor], module: nn.Module, path: str | Path) -> None:
    """Raise where a parameter is not of finite floating-point numbers, as those that answer are.

    A buffer may hold infinite ones, such as a mask of -inf.
    """
    for name, own in module.named_parameters():
        found = weights[name]
        if own.is_floating_point() and not found.is_floating_point():
            raise ValueError(
                f"{path} cannot be used: expected {name} in floating point. Received: "
                f"{found.dtype}."
            )
        if not torch.isfinite(found).all():
            raise ValueError(
                f"{path} cannot be used: its weights are not finite numbers, in {name}. Use a "
                f"checkpoint from before the run diverged, such as best.ckpt."
            )


def _check_given(found: Any, part: str, given: Any, path: str | Path) -> None:
    """Raise where a model or a loss of somebody's own class is not given."""
    if given is None and isinstance(found, Mapping) and "own" in found:
        name = printable(found["own"])
        raise ValueError(
            f"{path} holds the weights of a {part} of your own class, {name}, and no code comes "
            f"from a file. Build the {part} and give it: gdtrain.load({str(path)!r}, "
            f"{part}={name}(…))."
        )


def _weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of the module: averaged, where a step-size rule averages."""
    weights = {k: v for k, v in state["state_dict"].items() if not k.startswith("evaluation.")}
    average = state["gdtrain"].get("average") or {}
    weights |= average if isinstance(average, dict) else {"average": average}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"its weights must be tensors. Received: {name!r:.80}.")
        if value.is_complex():
            raise ValueError(
                f"its weights must be real numbers. Received: {printable(name)} of {value.dtype}."
            )
    return weights


def _data_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the data module has put in; of batches from a loader nothing is known."""
    keys = {"preprocessing", "input_shape", "num_classes", "num_targets"}
    found = [v for v in state.values() if isinstance(v, Mapping) and keys <= v.keys()]
    if not found and not state["gdtrain"]["description"].get("data"):
        return {"preprocessing": {}, "input_shape": [], "num_classes": None, "num_targets": 1}
    if not found or not isinstance(found[0]["preprocessing"], Mapping):
        raise ValueError("it holds no preprocessing: no gdtrain data module was trained on.")
    data = found[0]
    shape, classes, columns = (
        data.get(key) for key in ("input_shape", "num_classes", "num_targets")
    )
    sizes = list(shape) if isinstance(shape, list | tuple) else [None]
    counts = [columns] if classes is None else [columns, classes]
    if not all(type(n) is int and n >= 1 for n in (*sizes, *counts)) or math.prod(sizes) > _LARGEST:  # type: ignore[arg-type]
        raise ValueError(
            f"input_shape, num_classes and num_targets must be sizes of examples. Received: "
            f"{shape!r:.80}, {classes!r:.40} and {columns!r:.40}."
        )
    _check_preprocessing(data["preprocessing"], sizes, data)
    return dict(data)


def _check_preprocessing(state: Mapping[str, Any], shape: Sequence[Any], data: Any) -> None:
    """Raise unless it was learnt from such examples, so that its use makes nothing large."""
    known = {field.name for field in fields(Preprocessing)}
    columns = [data["num_targets"]]
    of = {"mean": shape, "scale": shape, "target_mean": columns, "target_scale": columns}
    lengths = {"classes": data["num_classes"], "feature_names": math.prod(shape)}
    for name, value in state.items():
        if name in of:
            right = value is None or (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and value.ndim <= len(of[name])
                and all(
                    n in (1, size)
                    for n, size in zip(value.shape[::-1], of[name][::-1], strict=False)
                )
            )
        elif name in lengths:
            right = value is None or (
                isinstance(value, list)
                and len(value) == lengths[name]
                and all(isinstance(x, bool | int | float | str) for x in value)
            )
        elif name == "input_shape":
            right = value is None or list(value) == list(shape)
        else:
            right = name in known and (value is None or isinstance(value, bool | int | float | str))
        if not right:
            raise ValueError(f"its preprocessing is damaged: {name!r:.80} does not fit the data.")


def _same_data(
    trained: Trained, path: str | Path, overrides: Mapping[str, Any] | None
) -> DataModule:
    """The data that a checkpoint was trained on, split and prepared as then."""
    described = trained.state["gdtrain"]["description"].get("data")
    if not described:
        raise ValueError(
            f"{path} was trained on arrays in Python, which are not in the file, so their examples "
            f"are not at hand here. In Python, result.metrics has the metrics of the run; "
            f"predictions for new examples: predict.py ckpt_path={path} input=… output=…"
        )
    own = dict(overrides or {})
    named = _merged(described, own)
    _check_data_options(named, own)
    size = _numbers(named.get("num_examples")) * _numbers(named.get("num_features"))
    if size > _MOST_DRAWN and not {"num_examples", "num_features"} & own.keys():
        raise ValueError(
            f"{path} asks for {size:,} numbers to be drawn as its data. If that is meant, say so: "
            f"data.num_examples={named['num_examples']}."
        )
    for key in ("path", "test_path", "target_path", "root"):
        if isinstance(named.get(key), str):
            _log.info("data: read from %s (%s)", printable(named[key]), key)
    data = build_data(named, trained.trust)
    if getattr(data, "download", False) and not own.get("download"):
        data.download = False  # type: ignore[attr-defined]  # to fetch files, the user must ask
    data.prepare_data()
    data.use_loss(trained.module.loss)
    weights = trained.state["state_dict"]  # as they were trained, whatever the model is now
    if any(w.dtype == torch.float64 for n, w in weights.items() if n.startswith("model.")):
        data.dtype = torch.float64
    data.setup()
    try:
        data.check_same_data(trained.data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no preprocessing that can be compared.") from error
    return data


def _check_data_options(named: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise on a change to the data's configuration that its class does not take."""
    found = getattr(data_modules, str(named.get("_target_")).removeprefix("gdtrain.data."), None)
    if not inspect.isclass(found):
        return
    known, _, complete = _options(found)
    for name in own:
        if complete and name not in known and not name.startswith("_"):
            raise ValueError(
                f"data.{name}: {found.__name__} has no option {name}.{closest(name, known)} It "
                f"has: {', '.join(known)}."
            )


def _numbers(value: Any) -> int:
    return value if type(value) is int and value > 0 else 1


def _merged(then: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A description with the user's changes."""
    merged = dict(then)
    for key, value in own.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def evaluate(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    trust: tuple[str, ...] = (),
    *,
    input_path: str | Path | None = None,
    target: str | None = None,
    header: Header | None = None,
) -> dict[str, float]:
    """Metrics of a checkpoint, on the test part of its data or on a file of new examples.

    Args:
        path: Of a checkpoint that the command made.
        overrides: Changes to the data's configuration, such as {"root": "data"}.
        trust: As for `load_trained`.
        input_path: Examples with targets, all of which are tested on (see
            `gdtrain.data.read_labelled`); None: the test part of the data that was trained on.
        target: Where the targets of `input_path` are, as for `read_labelled`; None: as in training.
        header: Of `input_path`, as for `gdtrain.data.Table`; None: as in training.

    Returns:
        By tag: `loss/test`, `metric/<name>/test`.

    Raises:
        FileNotFoundError: There is no such checkpoint, or no such data.
        ValueError: The checkpoint cannot be used, its data is another, or the new examples are not
            like those of training.

    Example:
        >>> evaluate("missing.ckpt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no checkpoint missing.ckpt. ...
    """
    trained = load_trained(path, trust)
    if input_path is not None:
        if overrides:
            raise ValueError(
                f"input=… takes a new file, and data.… changes how the training data is found: set "
                f"one of them. Received: both, data.{next(iter(overrides))}."
            )
        loader = _labelled_loader(trained, input_path, target, header)
    else:
        if target is not None or header is not None:
            raise ValueError("target=… and header=… are of a new file: input=… must name it.")
        loader = _test_loader(trained, path, overrides)
    trained.module.use_target_scale(trained.preprocessing.target_scale)
    if trained.module.from_file:
        check_outputs(trained.module.model, next(iter(loader))[0][:1])
    return trained.module.evaluate(loader, "test")


def _test_loader(
    trained: Trained, path: str | Path, overrides: Mapping[str, Any] | None
) -> Iterable[tuple[Tensor, Tensor]]:
    """The test part of the data that a checkpoint was trained on."""
    try:
        data = _same_data(trained, path, overrides)
    except ValueError as error:
        if "path" in (overrides or {}):
            raise ValueError(f"{error} A new file is tested on with input=FILE.") from None
        raise
    if not data.count("test"):
        raise ValueError(
            "There is no test part: test_fraction was 0. A new file is tested on with input=FILE."
        )
    return data.evaluation_loader("test")


def _labelled_loader(
    trained: Trained, input_path: str | Path, target: str | None, header: Header | None
) -> Iterable[tuple[Tensor, Tensor]]:
    """All examples of a new file, prepared as those of training."""
    described = trained.state["gdtrain"]["description"].get("data") or {}
    numpy_file = Path(input_path).suffix.lower() in (".npy", ".npz")
    if target is None and numpy_file == str(described.get("_target_")).endswith("NPYDataModule"):
        if described.get("target_path") is not None:
            raise ValueError(
                "The targets of training were in a file of their own: target=FILE.npy must name "
                "those of the new examples."
            )
        target = None if described.get("target") is None else str(described["target"])
    header = described.get("header", "auto") if header is None else header
    raw, labels = read_labelled(input_path, trained.preprocessing, target, header=header)
    columns = trained.data["num_targets"]
    if math.prod(labels.shape[1:]) != columns:
        raise ValueError(
            f"The targets of {input_path} must have {columns} number{'s' * (columns > 1)} for each "
            f"example, as in training. Received: an array of shape {labels.shape}."
        )
    dtype = next(trained.module.model.parameters()).dtype
    inputs = trained.preprocessing.inputs(raw, dtype)
    targets = trained.preprocessing.targets(labels, dtype)
    size = min(1024, inputs.rows_at_once) if isinstance(inputs, SparseInputs) else 1024
    return EvaluationLoader(inputs, targets, size)


def predict_file(
    path: str | Path,
    input_path: str | Path,
    output_path: str | Path,
    trust: tuple[str, ...] = (),
    *,
    header: Header | None = None,
) -> int:
    """Predictions for a file of examples, as CSV.

    Args:
        path: Of a checkpoint, or of a file of `Result.save`.
        input_path: A table (columns by name where training had names; others are not used),
            `.npy`, or sparse: LIBSVM or `.npz` (see `gdtrain.data.read_features`).
        output_path: A new file, with a column "prediction" (or prediction_0, … for several
            targets); with tabs if it ends in `.tsv`, compressed if it ends in `.gz` and the like.
        trust: As for `load_trained`.
        header: Of `input_path`, as for `gdtrain.data.Table`; None: as in training.

    Returns:
        The number of examples.

    Raises:
        FileNotFoundError: There is no such file.
        FileExistsError: `output_path` exists.
        ValueError: The examples do not have the training data's shape, or `output_path` cannot be
            written. It is written whole or not at all.

    Example:
        >>> predict_file("missing.ckpt", "new.csv", "predictions.csv")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no checkpoint missing.ckpt. ...
    """
    import pandas as pd

    with _new_file(Path(output_path).expanduser()) as output:
        trained = load_trained(path, trust)
        preprocessing = trained.preprocessing
        described = (trained.state["gdtrain"].get("description") or {}).get("data") or {}
        inputs = read_features(
            input_path,
            preprocessing.feature_names,
            num_features=math.prod(preprocessing.input_shape or ()) or None,
            first_feature=preprocessing.first_feature,
            header=described.get("header", "auto") if header is None else header,
        )
        answers = predict(trained.module, trained.preprocessing, inputs)
        columns = answers.reshape(len(answers), -1)
        names = (
            ["prediction"]
            if columns.shape[1] == 1
            else [f"prediction_{i}" for i in range(columns.shape[1])]
        )
        table = pd.DataFrame({name: columns[:, i] for i, name in enumerate(names)})
        table.to_csv(output, index=False, sep="\t" if ".tsv" in output.name.lower() else ",")
    return len(answers)


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A place to write a new file to, which is moved to where it belongs once all is written.

    That it can be written is seen beforehand.
    """
    taken = f"{path} exists already; choose another output=…"
    if path.is_dir():
        raise ValueError(f"output must name a new file. Received: {path}, a folder.")
    if path.exists():
        raise FileExistsError(taken)
    was_there = path.parent.exists()
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=".predictions-")
        except OSError as error:
            raise ValueError(f"output={path} cannot be written: {error.strerror}.") from None
        with scratch as folder:
            yield Path(folder) / path.name
            if path.exists():
                raise FileExistsError(taken)
            os.replace(Path(folder) / path.name, path)
    finally:
        if not was_there:
            discard_empty(path.parent)


# ---------------------------------------------------------------------- the landscape


def landscape(
    path: str | Path,
    directory: str | Path | None = None,
    *,
    span: float | None = None,
    points: int | None = None,
    examples: int = 2048,
    seed: int = 0,
    megabytes: float = 2048.0,
    overrides: Mapping[str, Any] | None = None,
    trust: tuple[str, ...] = (),
) -> tuple[Path, dict[str, Line | Grid]]:
    """Draw the objective around a checkpoint, and the path of its run, into a folder.

    `landscape-1d.png` and `landscape-2d.png` (random directions, filter-normalised), and
    `trajectory.png` where the run has left `trajectory.npz`; for a model with one or two
    parameters `surface.png` instead, in float64. Beside them their numbers, `landscape.npz`, and
    the same pictures as TensorBoard's images.

    Args:
        path: Of a checkpoint that the command made.
        directory: Where to; it must not be there, or be empty. None: `landscape`, or the first free
            of `landscape-2`, …, in the run's folder.
        span: Of the random directions, range (0, 10⁶], in lengths of the weights; None: 1. A model
            with one or two parameters has none.
        points: Of each axis of a plane, range [3, 1000]; None: 31, for a surface 61.
        examples: Of the training part, on which J is, range [1, ∞).
        seed: Of the sample of examples, and of the directions.
        megabytes: That may be taken, range (0, ∞).
        overrides: Changes to the data's configuration, such as {"root": "data"}.
        trust: As for `load_trained`.

    Returns:
        The folder, and the pictures by name.

    Raises:
        FileNotFoundError: There is no such checkpoint, or no such data.
        ValueError: The checkpoint cannot be used, an argument is out of range, the folder is taken,
            or memory does not suffice. Nothing was written.

    Example:
        >>> landscape("missing.ckpt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no checkpoint missing.ckpt. ...
    """
    from gdtrain.analysis.landscape import Landscape, Snapshots, save

    path = Path(path)
    if isinstance(megabytes, bool) or not 0 < megabytes < math.inf:
        raise ValueError(f"megabytes must be finite and > 0. Received: megabytes={megabytes}.")
    run_folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    folder = _free(run_folder / "landscape") if directory is None else new_folder(directory)
    recorded = run_folder / "trajectory.npz"
    size = path.stat().st_size if path.is_file() else 0
    read = size + (unpacked_bytes(recorded) if recorded.is_file() else 0)
    _check_memory(read, megabytes, f"The files of {path}")
    trained = load_trained(path, trust)
    model = trained.module.model
    params = [p for p in model.parameters() if p.requires_grad]
    update = trained.state["gdtrain"].get("updates")
    if type(update) is not int or update < 0:
        raise ValueError(f"{path} does not say how many updates were made.")
    snapshots = None
    if recorded.is_file():
        snapshots = Snapshots.load(recorded)
        snapshots.check(model, recorded)
        snapshots = snapshots.until(update, parameters_to_vector(params))
    parameters = sum(p.numel() for p in params)
    if parameters <= 2:
        if span is not None:
            raise ValueError(
                f"span is of random directions, and a model with {parameters} parameters is drawn "
                f"on its exact surface. Received: span={span:g}. Leave it out."
            )
        model.double()  # so that the minimum is one to many digits
    elif params[0].dtype in (torch.bfloat16, torch.float16):
        model.float()
    needed = Landscape.bytes_needed(parameters, params[0].element_size())
    _check_memory(read + needed, megabytes, f"Pictures of {parameters:,} parameters")
    objective, total = _training_objective(trained, path, overrides)
    made = Landscape(
        objective,
        weight_decay=_weight_decay(trained),
        examples=examples,
        total=total,
        seed=seed,
    )
    with _all_or_nothing(folder) as new:
        pictures = made.pictures(snapshots, span=span, points=points)
        save(pictures, new, update)
    return folder, pictures


def find_checkpoint(folder: str | Path) -> Path:
    """The last checkpoint of a run.

    Args:
        folder: The run's, or its `checkpoints`.

    Returns:
        The path of `last.ckpt`.

    Raises:
        FileNotFoundError: There is no such folder, or no checkpoint in it.

    Example:
        >>> find_checkpoint("missing")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no folder missing. ...
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. A run's is outputs/<name>/<time>.")
    for path in (folder / "checkpoints" / "last.ckpt", folder / "last.ckpt"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder} holds no run: expected checkpoints/last.ckpt in it. Received: "
        f"{', '.join(sorted(os.listdir(folder))[:5]) or 'an empty folder'}."
    )


def _free(folder: Path) -> Path:
    """The folder, or the first free one with a number."""
    number = 2
    free = folder
    while free.exists():
        free = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return free


def _check_memory(needed: int, megabytes: float, what: str) -> None:
    if needed > megabytes * 2**20:
        raise ValueError(
            f"{what} take about {_rounded(needed / 2**20)} MB of memory, more than megabytes="
            f"{megabytes:g}. Raise it if there is more."
        )


def _rounded(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.2g}"


def _training_objective(
    trained: Trained, path: Path, overrides: Mapping[str, Any] | None
) -> tuple[Objective, int]:
    """J of a checkpoint on its training examples, and their number N."""
    from gdtrain.analysis.rate_finder import objective_examples

    data = _same_data(trained, path, overrides)
    module = trained.module
    dtype = next(module.model.parameters()).dtype
    inputs, targets = (
        t.to("cpu", dtype if t.is_floating_point() else None) for t in objective_examples(data)
    )
    if module.from_file:
        check_outputs(module.model, inputs[:1])
    return Objective(module.model, module.loss, inputs, targets), data.num_train


def _weight_decay(trained: Trained) -> list[float]:
    """λ of each trainable parameter, from the optimizer's groups; a decoupled one is not of J."""
    model, state = trained.module.model, trained.state
    try:
        saved = (state.get("optimizer_states") or [{}])[0].get("param_groups", [])
        own = parameter_groups(model, state["gdtrain"]["settings"]["decay_biases"] == "True")
        decays: dict[int, float] = {}
        for group, then in zip(own, saved, strict=False):
            decay = 0.0 if then.get("decoupled_weight_decay") else then.get("weight_decay", 0.0)
            decays.update({id(p): float(decay) for p in group["params"]})
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError("The checkpoint does not say which weight decay it had.") from error
    return [decays.get(id(p), 0.0) for p in model.parameters() if p.requires_grad]
