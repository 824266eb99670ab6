"""The programs beside training: evaluate, predict, find a rate, explain an update, draw J."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.utils import parameters_to_vector

import gdtrain.data as data_modules
from gdtrain.data import DataModule
from gdtrain.data.checkpoint_reading import load_checkpoint
from gdtrain.data.files import read_features, read_labelled
from gdtrain.data.loader import EvaluationLoader, IndexLoader
from gdtrain.data.reading import printable, unpacked_bytes
from gdtrain.data.tables import Header
from gdtrain.descent.preparation import parameter_groups, resident_objective
from gdtrain.errors import ConfigurationError
from gdtrain.lightning.module import SupervisedModule
from gdtrain.lightning.strategy import alone_in
from gdtrain.objective import Objective
from gdtrain.penalised import weight_decays
from gdtrain.ranges import Interval
from gdtrain.runs.checkpoints import Trained, check_fits, load_trained
from gdtrain.runs.configuration import plain_containers
from gdtrain.runs.descriptions import build_part, check_outputs
from gdtrain.runs.folder import complete_file, complete_folder, free_folder, new_folder
from gdtrain.runs.result import predict
from gdtrain.runs.run import quiet_libraries
from gdtrain.runs.train import USER_ERRORS, build, message, unknown_option

if TYPE_CHECKING:
    from gdtrain.analysis.landscape_figure import Grid, Line
    from gdtrain.analysis.rate_finder import RateCurve

__all__ = ["evaluate", "explain", "find_lr", "landscape", "predict_file"]

_log = logging.getLogger("gdtrain")

_MOST_DRAWN = 2**23  # and in data that are drawn
_FETCHED = 4096  # examples of a Dataset that is not resident, for an analysis


def evaluate(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    trust: tuple[str, ...] = (),
    *,
    input_path: str | Path | None = None,
    target: str | None = None,
    header: Header | None = None,
) -> dict[str, float]:
    """Metrics by tag of a checkpoint, on the test part of its data or on a file of new examples.

    `overrides` change the data's configuration, such as {"root": "data"}; `target` and `header` of
    a new file are as in training, unless they are given.
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
        loader = _test_loader(trained, overrides)
    trained.module.use_target_scale(trained.data.preprocessing.target_scale)
    if trained.module.from_file:
        check_outputs(trained.module.model, next(iter(loader))[0][:1])
    return trained.module.evaluate(loader, "test")


def _test_loader(trained: Trained, overrides: Mapping[str, Any] | None) -> Any:
    """The test part of the data that a checkpoint was trained on."""
    try:
        data = _same_data(trained, overrides)
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
    described, preprocessing = trained.described_data, trained.data.preprocessing
    numpy_file = Path(input_path).suffix.lower() in (".npy", ".npz")
    if target is None and numpy_file == str(described.get("_target_")).endswith("NPYDataModule"):
        if described.get("target_path") is not None:
            raise ValueError(
                "The targets of training were in a file of their own: target=FILE.npy must name "
                "those of the new examples."
            )
        target = None if described.get("target") is None else str(described["target"])
    header = described.get("header", "auto") if header is None else header
    raw, labels = read_labelled(input_path, preprocessing, target, header=header)
    columns = trained.data.state["num_targets"]
    if math.prod(labels.shape[1:]) != columns:
        raise ValueError(
            f"The targets of {input_path} must have {columns} number{'s' * (columns > 1)} for each "
            f"example, as in training. Received: an array of shape {labels.shape}."
        )
    dtype = next(trained.module.model.parameters()).dtype
    inputs, targets = preprocessing.inputs(raw, dtype), preprocessing.targets(labels, dtype)
    return EvaluationLoader(inputs, targets)


def predict_file(
    path: str | Path,
    input_path: str | Path,
    output_path: str | Path,
    trust: tuple[str, ...] = (),
    *,
    header: Header | None = None,
) -> int:
    """Write predictions for a file of examples, as CSV, and say how many there are.

    The file has a column "prediction" (or prediction_0, … for several targets); tabs if its name
    ends in `.tsv`, and compressed if it ends in `.gz` and the like.
    """
    import pandas as pd

    with complete_file(Path(output_path).expanduser()) as output:
        trained = load_trained(path, trust)
        preprocessing, described = trained.data.preprocessing, trained.described_data
        inputs = read_features(
            input_path,
            preprocessing.feature_names,
            num_features=math.prod(preprocessing.input_shape or ()) or None,
            first_feature=preprocessing.first_feature,
            header=described.get("header", "auto") if header is None else header,
        )
        answers = predict(trained.module, preprocessing, inputs)
        table = pd.DataFrame(answers.reshape(len(answers), -1)).add_prefix("prediction_")
        if table.shape[1] == 1:
            table.columns = ["prediction"]
        table.to_csv(output, index=False, sep="\t" if ".tsv" in output.name.lower() else ",")
    return len(answers)


def _same_data(trained: Trained, overrides: Mapping[str, Any] | None) -> DataModule:
    """The data that a checkpoint was trained on, split and prepared as then."""
    path = trained.path
    if not trained.described_data:
        raise ValueError(
            f"{path} was trained on arrays in Python, which are not in the file, so their examples "
            f"are not at hand here. In Python, result.metrics has the metrics of the run; "
            f"predictions for new examples: predict.py ckpt_path={path} input=… output=…"
        )
    own = dict(overrides or {})
    merged = OmegaConf.merge(trained.described_data, own)
    named: dict[str, Any] = OmegaConf.to_container(merged)  # type: ignore[assignment]
    kind = getattr(data_modules, str(named.get("_target_")).removeprefix("gdtrain.data."), None)
    wrong = unknown_option(kind, own, "data") if inspect.isclass(kind) else ""
    if wrong:
        raise ValueError(wrong)
    sizes = [named.get(key) for key in ("num_examples", "num_features")]
    size = math.prod(n for n in sizes if type(n) is int and n > 0)
    if size > _MOST_DRAWN and not {"num_examples", "num_features"} & own.keys():
        raise ValueError(
            f"{path} asks for {size:,} numbers to be drawn as its data. If that is meant, say so: "
            f"data.num_examples={named['num_examples']}."
        )
    for key in ("path", "test_path", "target_path", "root"):
        if isinstance(named.get(key), str):
            _log.info("data: read from %s (%s)", printable(named[key]), key)
    data = build_part("data", named, trained.trust)
    if getattr(data, "download", False) and not own.get("download"):
        data.download = False  # to fetch files, the user must ask
    data.prepare_data()
    data.use_loss(trained.module.loss)
    weights = trained.state["state_dict"]  # as they were trained, whatever the model is now
    if any(w.dtype == torch.float64 for n, w in weights.items() if n.startswith("model.")):
        data.dtype = torch.float64
    data.setup()
    try:
        data.check_same_data(trained.data.state)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no preprocessing that can be compared.") from error
    return data


@contextmanager
def _trainer(config: DictConfig, **options: Any) -> Iterator[Any]:
    """The configuration's, which leaves nothing behind."""
    with quiet_libraries(), alone_in(None, instantiate(config.trainer, _convert_="all")) as make:
        yield make(logger=False, enable_checkpointing=False, **options)


def find_lr(config: DictConfig, directory: str | Path, name: str = "", **options: Any) -> RateCurve:
    """Build what the configuration names, make a range test, and leave the curve in a new folder.

    `options` are those of `gdtrain.analysis.rate_finder.find_lr`; `name` stands in the picture.
    """
    folder = new_folder(directory)
    try:
        with complete_folder(folder) as new:
            curve = _range_test(config, options)
            curve.details = {"name": name, **(curve.details or {})}
            curve.save(new)
    except USER_ERRORS as error:
        raise ConfigurationError(message(error, plain_containers(config))) from error
    return curve


def _range_test(config: DictConfig, options: dict[str, Any]) -> RateCurve:
    """On the device, and in the precision, that the configuration trains with."""
    from gdtrain.analysis import rate_finder

    data, module = build(config)
    if config.ckpt_path is not None:
        state = load_checkpoint(config.ckpt_path)
        check_fits(state["state_dict"], module, config.ckpt_path)
        module.load_state_dict(state["state_dict"])
    with _trainer(config) as trainer:
        if trainer.world_size > 1:
            raise ValueError(
                f"The test runs on one device. Received: {trainer.world_size} processes. Set "
                f"trainer=default trainer.devices=1."
            )
        module = trainer.precision_plugin.convert_module(module)
        module.to(trainer.strategy.root_device)
        if module.step_size == "auto":
            module.step_size = None  # what is looked for
        objective = _objective(module, data, data.examples_per_update, data.micro_batch_size)
        size = min(data.examples_per_update, len(objective.targets))
        plan = IndexLoader(len(objective.targets), size, sampling=data.sampling, seed=data.seed)
        with trainer.precision_plugin.forward_context():
            return rate_finder.find_lr(
                objective,
                module.configure_optimizers(),
                plan,
                engine=module.engine,
                total=data.num_train,
                **options,
            )


def explain(config: DictConfig, update: int = 0, **options: Any) -> str:
    """Train what the configuration names up to an update, and write that one out in full.

    `options` are those of `gdtrain.analysis.explanation.Explanation.text`.
    """
    from gdtrain.callbacks.explain import ExplainUpdate

    try:
        if config.ckpt_path is not None:
            raise ConfigurationError(
                f"The updates are made from the first one on. Received: ckpt_path="
                f"{config.ckpt_path}. Leave it out, and set update=… to a later one."
            )
        explained = ExplainUpdate(update)
        data, module = build(config)
        with _trainer(config, callbacks=[explained]) as trainer:
            if trainer.world_size > 1 or "mixed" in str(trainer.precision):
                raise ValueError(
                    f"One update is written out on one device, in one precision. Received: "
                    f"{trainer.world_size} processes, precision={trainer.precision}. Set "
                    f"trainer=default trainer.precision=32."
                )
            trainer.fit(module, datamodule=data)
        assert explained.found is not None
        return explained.found.text(**options)
    except USER_ERRORS as error:
        raise ConfigurationError(message(error, plain_containers(config))) from error


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
) -> tuple[Path, Mapping[str, Line | Grid]]:
    """Draw the objective around a checkpoint, and the path of its run, into a new folder.

    Directions are random, and filter-normalised; for a model with one or two parameters there is a
    surface instead, in float64. The pictures lie there as files and as TensorBoard's images.
    """
    from gdtrain.analysis.landscape import Landscape, Surface
    from gdtrain.analysis.landscape_figure import save
    from gdtrain.analysis.trajectory import Snapshots

    path = Path(path)
    Interval(0, math.inf).check("megabytes", megabytes)
    run_folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    folder = free_folder(run_folder / "landscape") if directory is None else new_folder(directory)
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
    kind = Surface if parameters <= 2 else Landscape
    if kind is Surface:
        model.double()  # so that the minimum is one to many digits
    elif params[0].dtype in (torch.bfloat16, torch.float16):
        model.float()
    needed = Landscape.bytes_needed(parameters, params[0].element_size())
    _check_memory(read + needed, megabytes, f"Pictures of {parameters:,} parameters")
    data = _same_data(trained, overrides)
    objective = _objective(trained.module, data)
    if trained.module.from_file:
        check_outputs(objective.model, objective.inputs[:1])
    decay = _weight_decay(trained)
    made = kind(objective, weight_decay=decay, examples=examples, total=data.num_train, seed=seed)
    with complete_folder(folder) as new:
        pictures = made.pictures(snapshots, span=span, points=points)
        save(pictures, new, update)
    return folder, pictures


def _check_memory(needed: int, megabytes: float, what: str) -> None:
    amount = needed / 2**20
    if amount > megabytes:
        raise ValueError(
            f"{what} take about {f'{amount:,.0f}' if amount >= 10 else f'{amount:.2g}'} MB of "
            f"memory, more than megabytes={megabytes:g}. Raise it if there is more."
        )


def _objective(
    module: SupervisedModule, data: DataModule, batch_size: int = 1, micro: Any = None
) -> Objective:
    """J on the training examples, or on some of those that are fetched one by one."""
    inputs, targets = map(module.to_model, _examples(data))
    return resident_objective(module.model, module.loss, inputs, targets, batch_size, micro)


def _examples(data: DataModule) -> tuple[Any, Tensor]:
    """The training examples; of a Dataset, whole batches up to a few thousand examples."""
    loader = data.train_dataloader()
    if isinstance(loader, IndexLoader):
        return data.examples("train")
    pairs: list[tuple[Tensor, Tensor]] = []
    try:
        for pair in loader:
            pairs.append(pair)
            if sum(len(y) for _, y in pairs) >= min(_FETCHED, data.num_train):
                break
    finally:
        loader.close()
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _weight_decay(trained: Trained) -> list[float]:
    """λ of each trainable parameter, from the optimizer's groups; a decoupled one is not of J."""
    model, state = trained.module.model, trained.state
    try:
        saved = (state.get("optimizer_states") or [{}])[0].get("param_groups", [])
        own = parameter_groups(model, state["gdtrain"]["settings"]["decay_biases"] == "True")
        groups = [{**then, "params": g["params"]} for g, then in zip(own, saved, strict=False)]
        return weight_decays((p for p in model.parameters() if p.requires_grad), groups)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError("The checkpoint does not say which weight decay it had.") from error
