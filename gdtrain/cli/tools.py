"""The commands beside training: evaluate, predict, find-lr, explain, landscape."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdtrain.cli.composition import composed
from gdtrain.cli.messages import one_message, set_up_process, shown
from gdtrain.cli.words import Command, given, option
from gdtrain.errors import ConfigurationError
from gdtrain.ranges import Interval, Whole
from gdtrain.runs.configuration import checked

if TYPE_CHECKING:
    from gdtrain.analysis.rate_finder import RateCurve

__all__ = ["EVALUATE", "EXPLAIN", "FIND_LR", "LANDSCAPE", "PREDICT"]

_CHECKPOINT = "outputs/…/checkpoints/best.ckpt"
_POSITIVE = Interval(0, math.inf)


@dataclass
class _OfCheckpoint:
    """What the commands that read a checkpoint have in common."""

    ckpt_path: str = option("a checkpoint", _CHECKPOINT, required=True)
    trust: str | None = option(
        "packages, separated by commas, whose classes the checkpoint may name",
        "mypackage",
        "gdtrain, torch.nn, torchvision.models",
    )


@dataclass
class _OfTable(_OfCheckpoint):
    """And of those that read a new table."""

    header: str | None = option(
        "whether the table's first line has names, true or false", "false", "found"
    )


@dataclass
class _OfItsData(_OfCheckpoint):
    """And of those that read the data that it was trained on."""

    data: dict[str, Any] | None = option(  # noqa: RUF009 (it is a field)
        "a change to the data's configuration, such as where its files are now",
        "VALUE",
        "as in training",
    )


def _packages(word: str | None) -> tuple[str, ...]:
    names = () if word is None else tuple(name.strip() for name in word.split(","))
    if not all(part.isidentifier() for name in names for part in name.split(".")):
        raise ConfigurationError(
            f"trust must be names of packages, separated by commas, such as mypackage. Received: "
            f"trust={word}"
        )
    return names


def _has_header(word: str | None) -> Any:
    """Whether a table has a header, where that was said."""
    known = {None: None, "true": True, "false": False, "auto": "auto"}
    found = word if word is None else word.lower()
    if found not in known:
        raise ConfigurationError(f"header must be true, false or auto. Received: header={word}")
    return known[found]


@dataclass
class _Evaluate(_OfItsData, _OfTable):
    input: str | None = option(
        "a labelled file: a table, .npy, .npz or LIBSVM", "new.csv", "the test part"
    )
    target: str | None = option("of input: its column, or a .npy file", "price", "as in training")


EVALUATE = Command(
    "gdtrain-evaluate",
    "Prints the metrics of a checkpoint on the test part of its data, or on a new labelled file.",
    _Evaluate,
    (f"ckpt_path={_CHECKPOINT}", f"ckpt_path={_CHECKPOINT} input=new.csv"),
)


@one_message()
def evaluate() -> None:
    """Print a checkpoint's test metrics, or those on a new file."""
    options = EVALUATE.read(sys.argv[1:]).options
    trust, header = _packages(options.trust), _has_header(options.header)
    from gdtrain.runs.tools import evaluate as run

    set_up_process()
    metrics = run(
        options.ckpt_path,
        options.data,
        trust,
        input_path=options.input,
        target=options.target,
        header=header,
    )
    for tag, value in metrics.items():
        print(f"{tag} {value:.6g}")


@dataclass
class _Predict(_OfTable):
    input: str = option(
        "a file of examples: a table (columns by name), .npy, .npz or LIBSVM",
        "new.csv",
        required=True,
    )
    output: str = option(
        "a new CSV file; column prediction, or prediction_0, … for several targets",
        "predictions.csv",
        required=True,
    )


PREDICT = Command(
    "gdtrain-predict",
    "Writes the predictions of a checkpoint for a file of examples.",
    _Predict,
    (f"ckpt_path={_CHECKPOINT} input=new.csv output=predictions.csv",),
)


@one_message()
def predict() -> None:
    """Write predictions for a file of examples."""
    options = PREDICT.read(sys.argv[1:]).options
    trust, header = _packages(options.trust), _has_header(options.header)
    from gdtrain.runs.tools import predict_file

    set_up_process()
    count = predict_file(options.ckpt_path, options.input, options.output, trust, header=header)
    print(f"{count} predictions in {options.output}")


@dataclass
class _FindLR:
    min_lr: float | None = option("η at the start", "1e-5", "1e-6", _POSITIVE)
    max_lr: float | None = option("η at the end, above min_lr", "10", "100", _POSITIVE)
    updates: int | None = option(
        "of one test", "500", "200 for full batches; else 5000/B, at least 1000", Whole(20, 10**9)
    )
    repetitions: int | None = option(
        "tests in different orders of the examples",
        "5",
        "1 for full batches; else 3",
        Whole(1, 10000),
    )
    output: str | None = option(
        "a folder for the curve, new or empty", "FOLDER", "outputs/find_lr/…"
    )


FIND_LR = Command(
    "gdtrain-find-lr",
    "Looks for a learning rate by a range test: short runs in which η grows from min_lr to max_lr.",
    _FindLR,
    ("data=digits model=mlp optimizer=sgd", "optimizer=minibatch data.batch_size=64 max_lr=10"),
    configures="test",
)


@one_message()
def find_lr() -> None:
    """Look for a learning rate."""
    words = FIND_LR.read(sys.argv[1:])
    config, choices = composed(words.overrides, words.config_dir)
    if "lr" in config.optimizer:
        config.optimizer.lr = 1.0  # what is looked for: not used, whatever it was
    if config.get("step_size"):
        raise ConfigurationError(
            f"There is no rate to find where a rule computes the step size. Received: "
            f"step_size={choices['step_size']}. Set step_size=none."
        )
    checked(config)
    options = given(words.options)
    output = options.pop("output", None)
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    name = "-".join(choices[group] for group in ("data", "model", "optimizer"))
    folder = Path(output) if output else Path("outputs") / "find_lr" / name / time
    from gdtrain.runs.tools import find_lr as run

    set_up_process()
    _show_curve(run(config, folder, name, **options), folder)


def _show_curve(curve: RateCurve, folder: Path) -> None:
    """Loss by half decades, and what follows from it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"loss after updates with a growing η: from {curve.start:.4g}")
    for name in ("η", "loss", "smoothed", "slope per decade", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    for i, words in curve.rows().items():
        values = (curve.losses[i], curve.smoothed[i], curve.slopes[i])
        table.add_row(f"{curve.rates[i]:.2g}", *(f"{v:.4g}" for v in values), words)
    Console().print(table)
    print(curve.basis if curve.suggestion is None else f"Suggestion: {curve.basis}")
    if curve.suggestion is not None:
        print(f"Train with optimizer.lr={curve.suggestion:g}")
    place = shown(folder)
    print(f"Curve: {place}/find_lr.png\nTensorBoard: tensorboard --logdir {place}")


@dataclass
class _Explain:
    update: int | None = option("which one, counted from 0", "3", "0", Whole(0))
    digits: int | None = option("of the numbers shown", "6", "4", Whole(1, 12))
    examples: int | None = option("of the batch that are shown in full", "1", "2", Whole(0))


EXPLAIN = Command(
    "gdtrain-explain",
    "Writes one update out in full: examples, losses, gradients layer by layer, and the step.",
    _Explain,
    ("", "experiment=demo_iris_sgd update=3", "data=iris model=linear optimizer=gd digits=6"),
    configures="update",
    notes="Without data=, model= and experiment=, it explains experiment=demo_iris_sgd.",
)


@one_message()
def explain() -> None:
    """Print one update in full."""
    words = EXPLAIN.read(sys.argv[1:])
    config, choices = composed(_with_readable_model(words.overrides), words.config_dir)
    checked(config)
    options = given(words.options)
    update = options.pop("update", 0)
    names = f"{config.variant} on {choices['data']}, {choices['model']}"
    from gdtrain.runs.tools import explain as run

    set_up_process(log=False)
    print(run(config, update, title=f"Update {update} of {names}", **options))


def _with_readable_model(words: list[str]) -> list[str]:
    """Where nothing says what to train, something that is small enough to read."""
    if any(w.partition("=")[0] in ("data", "model", "experiment") for w in words):
        return words
    of_mlp = ("model.hidden", "model.activation", "model.dropout")
    wants_mlp = any(w.partition("=")[0] in of_mlp for w in words)
    return ["experiment=demo_iris_sgd", *(["model=mlp"] if wants_mlp else []), *words]


@dataclass
class _Landscape(_OfItsData):
    ckpt_path: str | None = option("a checkpoint", _CHECKPOINT)  # type: ignore[assignment]
    run: str | None = option(
        "instead of ckpt_path: the folder of a run, for its last checkpoint", "outputs/…"
    )
    ckpt_dir: str | None = option(
        "instead of ckpt_path: a run's folder of checkpoints", "outputs/…/checkpoints"
    )
    output: str | None = option(
        "a folder for the pictures, new or empty", "FOLDER", "landscape, in the run"
    )
    span: float | None = option(
        "of the directions, in lengths of the weights", "0.5", "1", Interval(0, 1000000.0, "right")
    )
    points: int | None = option("of each axis", "51", "31; 61 for a surface", Whole(3, 1000))
    examples: int | None = option(
        "of the training part, on which J is computed", "500", "2048", Whole(1)
    )
    seed: int | None = option("of the examples and the directions", "1", "0", Whole(0, 2**32 - 1))
    megabytes: float | None = option("of memory that may be taken", "512", "2048", _POSITIVE)


LANDSCAPE = Command(
    "gdtrain-landscape",
    "Draws the objective around a checkpoint, and the path of its run.",
    _Landscape,
    ("run=outputs/digits-mlp-sgd/…", f"ckpt_path={_CHECKPOINT} span=0.5 points=51"),
)


@one_message()
def landscape() -> None:
    """Draw the objective around a checkpoint."""
    options = given(LANDSCAPE.read(sys.argv[1:]).options)
    places = [key for key in ("ckpt_path", "run", "ckpt_dir") if key in options]
    if len(places) != 1:
        raise ConfigurationError(
            f"One of ckpt_path=…, run=… and ckpt_dir=… says what to draw. Received: "
            f"{' and '.join(places) or 'none'}. --help shows all keys."
        )
    trust, overrides = _packages(options.pop("trust", None)), options.pop("data", None)
    from gdtrain.runs.checkpoints import find_checkpoint
    from gdtrain.runs.tools import landscape as run

    set_up_process()
    place = options.pop(places[0])
    path = place if places == ["ckpt_path"] else find_checkpoint(place)
    folder, pictures = run(
        path, options.pop("output", None), overrides=overrides, trust=trust, **options
    )
    for name, picture in pictures.items():
        print(f"{shown(folder)}/{name}.png: {picture.title.splitlines()[0]}")
    if "trajectory" not in pictures and "surface" not in pictures:
        print("The path is not drawn: the run has left no trajectory.npz, or has not moved.")
    print(f"Images: tensorboard --logdir {shown(folder)}")
