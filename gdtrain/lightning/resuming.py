"""What a resumed run must share with the run it goes on with: all that its next update depends on.

Settings are texts by key; keys are those of the command line. T planned updates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.optim import Optimizer

from gdtrain._compat.torch_modules import BATCH_NORMS, DROPOUTS
from gdtrain.data.reading import printable
from gdtrain.lightning.description import options, structure, text
from gdtrain.optim.protocol import step_size_of

__all__ = ["check_model", "check_resumes", "model_settings", "planned_updates", "settings"]

# Lightning's callbacks that a run depends on; gdtrain's say by `decisive` which attributes do.
_DECISIVE = (
    EarlyStopping,
    StochasticWeightAveraging,
    WeightAveraging,
    BaseFinetuning,
    ModelPruning,
)
# Of a group: what a run changes, and what a rule or gathering keep there.
_STATE = {"params", "param_names", "lr", "initial_lr", "scheduled_lr"}
_STATE |= {"step_size", "gathered", "overflow"}
_PLAN = ("trainer.max_epochs", "trainer.max_steps")
_NEEDED = ("settings", "updates", "examples_seen", "random_state", "micro_batch_size", "engine")
_TRUE = {"64-true": "float64", "bf16-true": "bfloat16"}
_FLOATING = r"\b(float64|float32|float16|bfloat16)\b"
_POINTS = 4096  # at which two schedules are compared


def settings(module: Any, trainer: Any, data: Any = None) -> dict[str, str]:
    """Everything that the next update depends on beside the state, by key."""
    precision, automatic = str(trainer.precision), module.step_size == "auto"
    found = model_settings(module.model, _TRUE.get(precision))
    found |= {"decay_biases": str(module.decay_biases), "trainer.precision": precision}
    for name in ("max_epochs", "max_steps", "check_val_every_n_epoch", "limit_val_batches"):
        found[f"trainer.{name}"] = repr(getattr(trainer, name))
    found |= _of("loss", module.loss)
    found |= _of("schedule", "auto" if module.schedule_is_automatic else module.schedule)
    planned = planned_updates(trainer, data, module.updates_per_epoch)
    optimizer = _optimizer_for(module, planned)
    found |= _optimizer(optimizer, automatic)
    found |= _of("step_size", "auto" if automatic else step_size_of(optimizer))
    for callback in trainer.callbacks:
        found |= _callback(callback)
    if any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks):
        found.pop("model/frozen", None)  # it freezes and thaws
        found.pop("optimizer.params")
    if any(isinstance(m, (BATCH_NORMS, DROPOUTS)) for m in module.model.modules()):
        found["trainer.devices"] = str(trainer.world_size)  # each draws, or normalises, its own
    if data is not None and hasattr(data, "settings"):
        found |= {f"data.{name}": value for name, value in data.settings().items()}
    return found


def model_settings(model: nn.Module, dtype: str | None = None) -> dict[str, str]:
    """Those of a model: its class, its own settings, and every layer below it."""
    found = {"model": type(model).__name__}
    found |= {f"model.{name}": value for name, value in options(model).items()}
    for path, layer in structure(model).items():
        if path == "":
            layer = layer.partition("), ")[2]  # the settings stand above
        if layer:
            found[f"model/{path}"] = layer if dtype is None else re.sub(_FLOATING, dtype, layer)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    return {**found, "model/frozen": ", ".join(frozen)} if frozen else found


def _of(key: str, value: Any) -> dict[str, str]:
    """An object's class and its settings; a loss may have parts."""
    if value is None or isinstance(value, str):
        return {key: str(value)}
    found = {key: type(value).__name__}
    found |= {f"{key}.{name}": entry for name, entry in options(value).items()}
    if isinstance(value, nn.Module):
        found |= {f"{key}.{p}": entry for p, entry in structure(value).items() if p}
    return found


def _optimizer_for(module: Any, planned: int | None) -> Optimizer:
    """As it would be made for so many updates."""
    module.planned_updates = planned
    made: Optimizer = module.configure_optimizers()
    module.planned_updates = None
    return made


def _optimizer(optimizer: Optimizer, automatic: bool) -> dict[str, str]:
    groups = optimizer.param_groups
    found = {"optimizer": type(optimizer).__name__}
    for name in sorted({name for group in groups for name in group} - _STATE):
        found[f"optimizer.{name}"] = _by_group([group.get(name) for group in groups])
    if not automatic:
        found["optimizer.lr"] = _by_group([g.get("initial_lr", g["lr"]) for g in groups])
    found["optimizer.params"] = _by_group([len(group["params"]) for group in groups])
    return found


def _by_group(values: list[Any]) -> str:
    shown = [str(text(value)) for value in values]
    return shown[0] if len(set(shown)) == 1 else f"{', '.join(shown)} (by group)"


def _callback(callback: Any) -> dict[str, str]:
    names = getattr(callback, "decisive", None)
    if names is None:
        if not isinstance(callback, _DECISIVE):
            return {}
        names = _constructor_arguments(type(callback))
    key = f"callbacks.{type(callback).__name__}"
    found = {key: "there"}
    for name in names:
        value = vars(callback).get(name, vars(callback).get(f"_{name}"))
        # EarlyStopping keeps min_delta with the sign of its mode.
        shown = text(abs(value) if name == "min_delta" else value)
        if shown is not None:
            found[f"{key}.{name}"] = shown
    return found


def _constructor_arguments(kind: type) -> list[str]:
    own = [vars(k)["__init__"] for k in kind.__mro__ if "__init__" in vars(k)]
    names = {name for made in own for name in getattr(made, "__annotations__", {})}
    # Not what Lightning fills in itself, and what changes no number.
    return sorted(names - {"return", "device", "verbose", "strict", "check_on_train_epoch_end"})


def planned_updates(trainer: Any, data: Any, per_epoch: int) -> int | None:
    """T, as a trainer plans it; None: no end. `per_epoch` is for loaders that are not gdtrain's."""
    if hasattr(data, "planned_updates"):
        return data.planned_updates(trainer)
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs * per_epoch
    limits = [limit for limit in (epochs, trainer.max_steps) if limit >= 0]
    return min(limits) if limits else None


def check_resumes(
    state: Mapping[str, Any], module: Any, trainer: Any, data: Any, path: str | Path
) -> None:
    """Raise, with all that differs, where a run would not go on as the one of a checkpoint.

    More or fewer epochs are taken where the schedule gives the updates that were made the factors
    that they had, as a constant one does: then the run is what it would have been if it had been
    planned like that.
    """
    own = state["gdtrain"]
    if not {"optimizer_states", "loops"} <= state.keys():
        raise ValueError(f"{path} holds weights only: it can be evaluated, but not resumed.")
    missing = [name for name in _NEEDED if name not in own]
    if missing:
        raise ValueError(
            f"{path} cannot be resumed from: it is damaged, gdtrain.{missing[0]} is missing. Use "
            f"another checkpoint of the run, best.ckpt or last.ckpt."
        )
    then, now = dict(own["settings"]), settings(module, trainer, data)
    if then.get("trainer.precision") != now["trainer.precision"]:  # the types follow from it
        then, now = (
            {k: re.sub(_FLOATING, "float", v) if "/" in k else v for k, v in s.items()}
            for s in (then, now)
        )
    config = (own.get("description") or {}, module.description or {})
    plans = [(s.pop(_PLAN[0], "None"), s.pop(_PLAN[1], "-1")) for s in (then, now)]
    found = _differences(then, now)
    if plans[0] != plans[1] and (why := _other_plan(own, module, trainer, data)):
        i = int(plans[0][0] == plans[1][0])
        found[_PLAN[i]] = (f"{plans[0][i]} ({why})", plans[1][i])
    if not found:
        return
    command = all("variant" in part and part.get("command") for part in config)
    if command and any(key.startswith("model") for key in found):
        parts = [{k: str(v) for k, v in _flat("model", part.get("model"))} for part in config]
        if typed := _differences(*parts):
            found = {k: v for k, v in found.items() if not k.startswith("model")} | typed
    raise ValueError(
        f"The run of {path} can only go on as the run that it was. These differ:\n"
        f"{_listed(found, command)}\n"
        f"Resume with what it had then. With other settings it is a new run from its weights: "
        f"gdtrain.fit(gdtrain.load('{path}').model, X, y, …)."
    )


def check_model(then: Mapping[str, str], model: nn.Module, path: str | Path) -> None:
    """Raise, with all that differs, where a model is not of the structure that a file tells."""
    kept = {key: value for key, value in then.items() if key.startswith("model")}
    found = _differences(kept, model_settings(model))
    found.pop("model/frozen", None)
    if found:
        raise ValueError(
            f"The model is not that of {path}:\n{_listed(found, False)}\n"
            f"Build it as it was trained."
        )


def _listed(found: Mapping[str, tuple[str, str]], command: bool) -> str:
    return "\n".join(
        f"  {printable(_shown(key, command))}: {printable(before)} then, {printable(after)} now"
        f"{_MEANING.get(key, '')}"
        for key, (before, after) in sorted(found.items())
    )


_MEANING = {
    "data.examples_fingerprint": " (the examples are others)",
    "data.preprocessing_fingerprint": " (the examples, or how they are prepared, are others)",
    "data.split_fingerprint": " (the examples are divided otherwise: others, or other targets)",
}


def _differences(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Keys whose values differ, without those that only follow from another."""
    found = {
        key: (then.get(key, "none"), now.get(key, "none"))
        for key in (*then, *now)
        if then.get(key) != now.get(key)
    }
    own = any(key == "model" or key.startswith("model.") for key in found)
    return {
        key: values
        for key, values in found.items()
        if not (own and key.startswith("model/"))
        and not any(key.startswith(f"{other}.") for other in found)
        and not (key in _FOLLOWS and _FOLLOWS[key] & found.keys())
    }


_SPLIT = {"data.val_fraction", "data.test_fraction", "data.split_seed"}
_PREPARED = {"data.standardize", "data.standardize_targets", "data.split_fingerprint", *_SPLIT}
_FOLLOWS = {
    "optimizer.params": {"decay_biases", "model/frozen"},
    "optimizer.weight_decay": {"decay_biases"},
    "data.split_fingerprint": _SPLIT,
    "data.preprocessing_fingerprint": _PREPARED,
    "data.examples_fingerprint": {"data.dtype", "data.preprocessing_fingerprint", *_PREPARED},
}


def _other_plan(own: Mapping[str, Any], module: Any, trainer: Any, data: Any) -> str:
    """Why another T makes another run; "": it does not."""
    per_epoch = own.get("updates_per_epoch", 1)
    before, after = own.get("planned"), planned_updates(trainer, data, per_epoch)
    done = own["updates"]
    if before == after or not done:
        return ""
    rule = step_size_of(_optimizer_for(module, after))
    if rule is not None and rule.needs.total_updates:
        return f"{type(rule).__name__} is stretched over them"
    t = np.unique(np.linspace(0, done - 1, min(done, _POINTS)).astype(np.int64))
    updates = torch.from_numpy(t).to(torch.float64)
    factors = [
        module.schedule(updates, max(total or done, 1), per_epoch) for total in (before, after)
    ]
    if torch.equal(*factors):
        return ""
    name = "schedule=auto" if module.schedule_is_automatic else type(module.schedule).__name__
    return f"{name} is stretched over them; a constant schedule is not"


def _flat(key: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(key, value)]
    return [entry for name, part in value.items() for entry in _flat(f"{key}.{name}", part)]


def _shown(key: str, command: bool) -> str:
    """A key in the words of the command line, or of Python's arguments."""
    key = {"data.seed": "seed", "model/": "model"}.get(key, key)
    if not command:
        key = re.sub(r"^(optimizer|data|trainer|callbacks)\.", "", key)
    else:
        key = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower() if "callbacks." in key else key
        key = key.removesuffix("._target_")
    return key.replace("/", ".")
