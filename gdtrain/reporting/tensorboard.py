"""What TensorBoard shows beside bare numbers: words, a page of charts, a table of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

__all__ = ["BAND", "LAYOUT", "SPEED", "described", "hyperparameter_row"]

BAND = tuple(f"spread/loss/train/{name}" for name in ("mean", "min", "max"))
SPEED = "time/updates_per_second"
_AXES = {  # further horizontal axes of the losses: TensorBoard's is the update number
    "by_sample": "Step: examples seen, so that variants with different batch sizes compare.",
    "by_epoch": "Step: passes over the training examples.",
    "by_millisecond": "Step: milliseconds since training began (12k are 12 seconds).",
}
_DESCRIPTIONS = {
    "loss/train": "Mean loss of the updates since the point before, each taken on the update's own "
    "examples, before it.",
    "loss/val": "Mean loss of the validation examples.",
    "loss/test": "Mean loss of the test examples, at the end.",
    "spread/loss/train/mean": "Mean loss of the updates since the point before, as `loss/train`.",
    "spread/loss/train/min": "Smallest loss of an update since the point before.",
    "spread/loss/train/max": "Largest loss of an update since the point before.",
    "lr": "η, the step size, of the last update before the point.",
    SPEED: "Updates per second of training since the point before, without validations.",
}


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", list(tags)]


# Of the page of custom scalars; the same in all runs, since TensorBoard joins those that it shows.
# Tags are regular expressions in "Multiline", and names in "Margin" (value, lower and upper edge).
LAYOUT = {
    "loss": {
        "against updates": _lines("^loss/train$", "^loss/val$"),
        "training, smallest to largest of an interval": ["Margin", list(BAND)],
        "against examples seen": _lines("^by_sample/loss/train$", "^by_sample/loss/val$"),
        "against epochs": _lines("^by_epoch/loss/train$", "^by_epoch/loss/val$"),
        "against milliseconds": _lines("^by_millisecond/loss/train$", "^by_millisecond/loss/val$"),
    },
    "rate": {
        "step size η, and from where on descent is unstable": _lines("^lr$", "^curvature/limit$"),
        "curvature, and 2/η": _lines("^curvature/(batch_)?sharpness$", "^curvature/two_over_lr$"),
        "length of a step, relative to the parameters": _lines("^step/ratio$"),
    },
    "gradient": {
        "norm": _lines("^gradient/norm$"),
        "norm, by layer": _lines("^gradient/norm/"),
        "cosine of one gradient with the next": _lines("^gradient/cosine$"),
        "signal to noise": _lines("^noise/signal_to_noise$"),
        "noise scale, in examples, with its interval": _lines("^noise/scale"),
    },
    "time": {"updates per second": _lines(f"^{SPEED}$")},
}
_TELLING = ("variant", "optimizer.lr", "lr", "data.batch_size", "schedule", "seed")


def described(
    values: Mapping[str, float], known: set[str], describe: Callable[[str], str] | None = None
) -> Summary:
    """Scalars for TensorBoard; the first of a tag brings what its chart says about it.

    `known` are the tags that were written: those of `values` are added.
    """
    entries = []
    for tag, value in values.items():
        entry = Summary.Value(tag=tag, simple_value=value)
        if tag not in known:
            known.add(tag)
            entry.metadata.CopyFrom(
                SummaryMetadata(
                    display_name=tag,
                    summary_description=(describe or _description)(tag),
                    plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
                    data_class=DATA_CLASS_SCALAR,  # else TensorBoard's fast loader drops all this
                )
            )
        entries.append(entry)
    return Summary(value=entries)


def _description(tag: str) -> str:
    axis, _, rest = tag.partition("/")
    if axis in _AXES:
        what = _DESCRIPTIONS[rest]
        if axis == "by_epoch" and rest == "loss/train":
            what = "Mean loss of an epoch's examples, each before its update."
        return f"{what} {_AXES[axis]}"
    if axis == "metric":
        name, _, part = rest.partition("/")
        return f"{name} of the {'validation' if part == 'val' else part} examples."
    return _DESCRIPTIONS.get(tag, "")


def hyperparameter_row(
    values: Mapping[str, bool | int | float | str], metrics: Mapping[str, float]
) -> Iterator[Summary]:
    """A row of TensorBoard's table of runs; what tells runs from one another stands first."""
    for summary in hparams(dict(values), dict(metrics)):
        # The table shows five: those that "differ" first, then by name.
        plugin = summary.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(plugin.content)
        for info in data.experiment.hparam_infos:
            info.differs = info.name in _TELLING
        plugin.content = data.SerializeToString()
        yield summary
