"""The commands beside training: evaluate, predict, find-lr, explain, landscape."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from gdtrain.cli.arguments import TEXTS, Command, Key, composed
from gdtrain.cli.messages import listen, one_message, shown
from gdtrain.errors import ConfigurationError
from gdtrain.lightning.launch import check_processes
from gdtrain.runs.configuration import check

if TYPE_CHECKING:
    from gdtrain.analysis.rate_finder import RateCurve

__all__ = ["evaluate", "explain", "find_lr", "landscape", "predict"]

_CHECKPOINT = "outputs/…/checkpoints/best.ckpt"
_DATA = Key(
    "data.",
    "a change to the data's configuration, such as where its files are now",
    "as in training",
    "VALUE",
)
_HEADER = Key("header", "whether the table's first line has names, true or false", "found", "false")
_TRUST = Key(
    "trust",
    "packages, separated by commas, whose classes the checkpoint may name",
    "gdtrain, torch.nn, torchvision.models",
    "mypackage",
)


def _ready(command: Command) -> Any:
    check_processes({})
    return command.read(sys.argv[1:])


def _trusted(options: dict[str, Any]) -> tuple[str, ...]:
    word = options.pop("trust", None)
    names = () if word is None else tuple(name.strip() for name in word.split(","))
    if not all(part.isidentifier() for name in names for part in name.split(".")):
        raise ConfigurationError(
            f"trust must be names of packages, separated by commas, such as mypackage. Received: "
            f"trust={word}"
        )
    return names


def _header(options: dict[str, Any]) -> Any:
    """Whether a table has a header, where that was said."""
    word = options.get("header")
    known = {None: None, "true": True, "false": False, "auto": "auto"}
    found = word if word is None else word.lower()
    if found not in known:
        raise ConfigurationError(f"header must be true, false or auto. Received: header={word}")
    return known[found]


def _data(below: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Changes to the data's configuration: paths and names as they stand, the rest as YAML."""
    made = OmegaConf.create({})
    for key, value in below.get("data.", {}).items():
        if f"data.{key}" in TEXTS:
            OmegaConf.update(made, key, value)
            continue
        try:
            made.merge_with_dotlist([f"{key}={value}"])
        except Exception:
            raise ConfigurationError(
                f"data.{key} cannot be read. Received: data.{key}={value}. A text with colons or "
                f"brackets has quotes of its own inside: 'data.{key}=\"…\"'"
            ) from None
    return OmegaConf.to_container(made)  # type: ignore[return-value]


# ---------------------------------------------------------------------- evaluate and predict

_EVALUATE = Command(
    "gdtrain-evaluate",
    "evaluate",
    "Prints the metrics of a checkpoint on the test part of its data, or on a new labelled file.",
    (
        Key("ckpt_path", "a checkpoint", "", _CHECKPOINT, required=True),
        Key("input", "a labelled file: a table, .npy, .npz or LIBSVM", "the test part", "new.csv"),
        Key("target", "of input: its column, or a .npy file", "as in training", "price"),
        _HEADER,
        _DATA,
        _TRUST,
    ),
    (f"ckpt_path={_CHECKPOINT}", f"ckpt_path={_CHECKPOINT} input=new.csv"),
)


def evaluate() -> None:
    """Print a checkpoint's test metrics, or those on a new file.

    Example:
        >>> sys.argv = ["gdtrain-evaluate", "ckpt_path=missing.ckpt"]
        >>> evaluate()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    with one_message():
        words = _ready(_EVALUATE)
        trust, overrides = _trusted(words.options), _data(words.below)
        header = _header(words.options)
        from gdtrain.runs.tools import evaluate as run

        listen()
        metrics = run(
            words.options["ckpt_path"],
            overrides,
            trust,
            input_path=words.options.get("input"),
            target=words.options.get("target"),
            header=header,
        )
    for tag, value in metrics.items():
        print(f"{tag} {value:.6g}")


_PREDICT = Command(
    "gdtrain-predict",
    "predict",
    "Writes the predictions of a checkpoint for a file of examples.",
    (
        Key("ckpt_path", "a checkpoint", "", _CHECKPOINT, required=True),
        Key(
            "input",
            "a file of examples: a table (columns by name), .npy, .npz or LIBSVM",
            "",
            "new.csv",
            required=True,
        ),
        Key(
            "output",
            "a new CSV file; column prediction, or prediction_0, … for several targets",
            "",
            "predictions.csv",
            required=True,
        ),
        _HEADER,
        _TRUST,
    ),
    (f"ckpt_path={_CHECKPOINT} input=new.csv output=predictions.csv",),
)


def predict() -> None:
    """Write predictions for a file of examples.

    Example:
        >>> sys.argv = ["gdtrain-predict", "ckpt_path=missing.ckpt"]
        >>> predict()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    with one_message():
        words = _ready(_PREDICT)
        trust, output = _trusted(words.options), words.options["output"]
        header = _header(words.options)
        from gdtrain.runs.tools import predict_file

        listen()
        count = predict_file(
            words.options["ckpt_path"],
            words.options["input"],
            output,
            trust,
            header=header,
        )
    print(f"{count} predictions in {output}")


# ---------------------------------------------------------------------- the rate finder

_FIND_LR = Command(
    "gdtrain-find-lr",
    "find_lr",
    "Looks for a learning rate by a range test: short runs in which η grows from min_lr to max_lr.",
    (
        Key("min_lr", "η at the start", "1e-6", "1e-5", float, 0, open=True),
        Key("max_lr", "η at the end, above min_lr", "100", "10", float, 0, open=True),
        Key(
            "updates",
            "of one test",
            "200 for full batches; else 5000/B, at least 1000",
            "500",
            int,
            20,
            10**9,
        ),
        Key(
            "repetitions",
            "tests in different orders of the examples",
            "1 for full batches; else 3",
            "5",
            int,
            1,
            10_000,
        ),
        Key("output", "a folder for the curve, new or empty", "outputs/find_lr/…", "FOLDER"),
    ),
    ("data=digits model=mlp optimizer=sgd", "optimizer=minibatch data.batch_size=64 max_lr=10"),
    configures="test",
)


def find_lr() -> None:
    """Look for a learning rate.

    Example:
        >>> sys.argv = ["find_lr.py", "min_lr=fast"]
        >>> find_lr()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    with one_message():
        words = _ready(_FIND_LR)
        config, choices = composed(words.overrides, words.config_dir)
        names = {name: str(choices[name]) for name in ("data", "model", "optimizer")}
        if "lr" in config.optimizer:
            config.optimizer.lr = 1.0  # what is looked for: not used, whatever it was
        if config.get("step_size"):
            raise ConfigurationError(
                f"There is no rate to find where a rule computes the step size. Received: "
                f"step_size={choices['step_size']}. Set step_size=none."
            )
        check(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        output = words.options.pop("output", None)
        time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        name = "-".join(names.values())
        folder = Path(output) if output else Path("outputs") / "find_lr" / name / time
        from gdtrain.runs.tools import find_lr as run

        listen()
        curve = run(config, folder, name, **words.options)
    _show_curve(curve, folder)


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
    console = Console()
    console.print(table)
    said = curve.basis if curve.suggestion is None else f"Suggestion: {curve.basis}"
    console.print(said, highlight=False, soft_wrap=True, markup=False)
    if curve.suggestion is not None:
        console.print(f"Train with optimizer.lr={curve.suggestion:g}", highlight=False)
    place = shown(folder)
    for line in (f"Curve: {place}/find_lr.png", f"TensorBoard: tensorboard --logdir {place}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


# ---------------------------------------------------------------------- one update in full

_EXPLAIN = Command(
    "gdtrain-explain",
    "explain",
    "Writes one update out in full: examples, losses, gradients layer by layer, and the step.",
    (
        Key("update", "which one, counted from 0", "0", "3", int, 0),
        Key("digits", "of the numbers shown", "4", "6", int, 1, 12),
        Key("examples", "of the batch that are shown in full", "2", "1", int, 0),
    ),
    ("", "experiment=demo_iris_sgd update=3", "data=iris model=linear optimizer=gd digits=6"),
    configures="update",
    notes="Without data=, model= and experiment=, it explains experiment=demo_iris_sgd.",
)


def explain() -> None:
    """Print one update in full.

    Example:
        >>> sys.argv = ["explain.py", "update=first"]
        >>> explain()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    with one_message():
        words = _ready(_EXPLAIN)
        config, choices = composed(_with_readable_model(words.overrides), words.config_dir)
        check(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        update = words.options.pop("update", 0)
        names = f"{config.variant} on {choices['data']}, {choices['model']}"
        from gdtrain.runs.tools import explain as run

        listen(log=False)
        print(run(config, update, title=f"Update {update} of {names}", **words.options))


def _with_readable_model(words: list[str]) -> list[str]:
    """Where nothing says what to train, something that is small enough to read."""
    if any(w.partition("=")[0] in ("data", "model", "experiment") for w in words):
        return words
    of_mlp = ("model.hidden", "model.activation", "model.dropout")
    wants_mlp = any(w.partition("=")[0] in of_mlp for w in words)
    return ["experiment=demo_iris_sgd", *(["model=mlp"] if wants_mlp else []), *words]


# ---------------------------------------------------------------------- the landscape

_PLACES = ("ckpt_path", "run", "ckpt_dir")
_LANDSCAPE = Command(
    "gdtrain-landscape",
    "landscape",
    "Draws the objective around a checkpoint, and the path of its run.",
    (
        Key("ckpt_path", "a checkpoint", "", _CHECKPOINT),
        Key("run", "or the folder of a run, for its last checkpoint", "", "outputs/…"),
        Key("ckpt_dir", "or its folder of checkpoints", "", "outputs/…/checkpoints"),
        Key("output", "a folder for the pictures, new or empty", "landscape, in the run", "FOLDER"),
        Key(
            "span", "of the directions, in lengths of the weights", "1", "0.5", float, 0, 1e6, True
        ),
        Key("points", "of each axis", "31; 61 for a surface", "51", int, 3, 1000),
        Key("examples", "of the training part, on which J is computed", "2048", "500", int, 1),
        Key("seed", "of the examples and the directions", "0", "1", int, 0, 2**32 - 1),
        Key("megabytes", "of memory that may be taken", "2048", "512", float, 0, open=True),
        _DATA,
        _TRUST,
    ),
    ("run=outputs/digits-mlp-sgd/…", f"ckpt_path={_CHECKPOINT} span=0.5 points=51"),
)


def landscape() -> None:
    """Draw the objective around a checkpoint.

    Example:
        >>> sys.argv = ["landscape.py", "run=outputs", "points=few"]
        >>> landscape()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    with one_message():
        words = _ready(_LANDSCAPE)
        options = words.options
        given = [key for key in _PLACES if key in options]
        if len(given) != 1:
            raise ConfigurationError(
                f"One of ckpt_path=…, run=… and ckpt_dir=… says what to draw. Received: "
                f"{' and '.join(given) or 'none'}. --help shows all keys."
            )
        trust, overrides = _trusted(options), _data(words.below)
        from gdtrain.runs.checkpoints import find_checkpoint
        from gdtrain.runs.tools import landscape as run

        listen()
        place = options.pop(given[0])
        path = place if given == ["ckpt_path"] else find_checkpoint(place)
        folder, pictures = run(
            path, options.pop("output", None), overrides=overrides, trust=trust, **options
        )
    for name, picture in pictures.items():
        print(f"{shown(folder)}/{name}.png: {picture.title.splitlines()[0]}")
    if "trajectory" not in pictures and "surface" not in pictures:
        print("The path is not drawn: the run has left no trajectory.npz, or has not moved.")
    print(f"Images: tensorboard --logdir {shown(folder)}")
