"""Sweeps of linear models and MLPs on CPU, forward, backward and update written by hand.

N examples, D features, K updates in the sweep, B examples per update, L layers.

- B = 1: loops over one example at a time (`gdtrain.engines.native.kernels`);
- B > 1: matrix products (`gdtrain.engines.native.matrix`);
- sparse inputs of a linear model: loops over the non-zeros (`gdtrain.engines.native.sparse`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain import losses
from gdtrain.data.sparse import SparseInputs
from gdtrain.engines.engine import (
    LookAhead,
    NotApplicableError,
    check_hooks,
    last_share,
    rates_by_schedule,
    single_threaded,
)
from gdtrain.models import MLP, Linear
from gdtrain.models.dropout import Dropout
from gdtrain.objective import Objective
from gdtrain.optim import GD, SGD, MiniBatchSGD
from gdtrain.step_sizes import StochasticPolyak

__all__ = ["Layer", "Native", "dense_layers", "logistic_losses"]

_OPTIMIZERS = (GD, SGD, MiniBatchSGD, torch.optim.SGD)
_LOSSES = (
    losses.CrossEntropy,
    losses.Hinge,
    losses.Huber,
    losses.Logistic,
    losses.OneHotSquaredError,
    losses.SquaredError,
    losses.SquaredHinge,
)
_RULE = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
_CACHED = 4 * 2**20  # bytes of one pass
_GATHERED = 16 * 2**20  # bytes of examples that are brought from a file together


@dataclass
class Layer:
    """a(W h + b).

    Args:
        linear: W and b.
        activation: Its name, as in `gdtrain.models.mlp.ACTIVATIONS`.
        parameter: Slope of leaky_relu, α of elu.

    Example:
        >>> Layer(nn.Linear(2, 3)).activation
        'identity'
    """

    linear: nn.Linear
    activation: str = "identity"
    parameter: float = 0.0


def logistic_losses(margins: Tensor) -> Tensor:
    """log(1 + exp(−m)), each bit independent of where in the tensor m stands.

    What does not fill a vector of the processor may be computed in another way: so it is filled up.
    (NumPy is several times as fast here as torch's softplus, which this equals to rounding.)

    Args:
        margins: (K,).

    Returns:
        (K,).

    Example:
        >>> logistic_losses(torch.tensor([0.0, 2.0]))
        tensor([0.6931, 0.1269])
    """
    count = len(margins)
    m = np.pad(margins.numpy(), (0, -count % 64))
    made = np.exp(-np.abs(m))
    np.log1p(made, out=made)
    made += np.maximum(-m, 0)
    return torch.from_numpy(made[:count])


def dense_layers(model: nn.Module) -> list[Layer]:
    """The layers of a linear model or MLP: gdtrain's own, or an `nn.Sequential` of such layers.

    Args:
        model: Any module.

    Returns:
        Its L layers.

    Raises:
        NotApplicableError: It is something else; the message names what.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> [layer.activation for layer in dense_layers(model)]
        ['tanh', 'identity']
    """
    layers: list[Layer] = []
    for module in _modules(model):
        if type(module) is nn.Linear:
            layers.append(Layer(module))
            continue
        activation, parameter = _activation(module)
        if not layers or layers[-1].activation != "identity":
            raise NotApplicableError(f"{type(module).__name__} stands behind no linear layer")
        layers[-1].activation, layers[-1].parameter = activation, parameter
    if not layers:
        raise NotApplicableError("the model has no linear layer")
    return layers


def _modules(model: nn.Module) -> list[nn.Module]:
    if "forward" in vars(model):
        raise NotApplicableError(f"the forward of a {type(model).__name__} was replaced")
    if type(model) is nn.Sequential:
        return [leaf for child in model for leaf in _modules(child)]
    if type(model) is MLP:
        return _modules(model.layers)
    if type(model) is Linear:
        return _modules(model.linear)
    if type(model) is nn.Identity:
        return []
    if type(model) is nn.Flatten and (model.start_dim, model.end_dim) == (1, -1):
        return []
    if type(model) in (Dropout, nn.Dropout):
        if model.p:
            raise NotApplicableError("the model has dropout")
        return []
    return [model]


def _activation(module: nn.Module) -> tuple[str, float]:
    kind = type(module)
    options: dict[str, Any] = vars(module)
    if kind is nn.LeakyReLU:
        return "leaky_relu", options["negative_slope"]
    if kind is nn.ELU:
        return "elu", options["alpha"]
    if kind is nn.GELU and options["approximate"] == "none":
        return "gelu", 0.0
    if kind is nn.Softplus and (options["beta"], options["threshold"]) == (1, 20):
        return "softplus", 0.0
    names = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}
    if kind in names:
        return names[kind], 0.0
    raise NotApplicableError(f"there is no hand-written backward pass of {kind.__name__}")


class Native:
    """Makes K updates, as `gdtrain.engines.engine.Engine` says, without autograd.

    It takes linear models and MLPs in float32 or float64 with gdtrain's losses and SGD, GD,
    MiniBatchSGD or torch.optim.SGD, on CPU.

    Args:
        objective: J.
        optimizer: Of the objective's parameters; its groups have "initial_lr".

    Raises:
        NotApplicableError: The model, loss, optimizer or data is something else.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0])
        >>> optimizer = SGD([{"params": model.parameters(), "initial_lr": 0.5}])
        >>> sweep = Native(Objective(model, SquaredError(), x, y), optimizer)
        >>> sweep(torch.tensor([[0], [1]]), torch.tensor([1.0, 0.5]))
        tensor([0.5000, 0.5000])
        >>> model.weight.item()
        1.0
    """

    name: ClassVar[str] = "native"

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer
        self.layers = dense_layers(objective.model)
        check_hooks(objective, optimizer)
        loss = objective.loss
        if type(loss) not in _LOSSES:
            raise NotApplicableError(f"{type(loss).__name__} is no loss of gdtrain's")
        if type(optimizer) not in _OPTIMIZERS:
            raise NotApplicableError(f"{type(optimizer).__name__} is no gradient descent")
        if getattr(optimizer, "_examples", None) is not None:
            raise NotApplicableError("the optimizer gathers micro-batches by itself")
        if torch.is_autocast_enabled("cpu"):
            raise NotApplicableError("it computes in one precision only (trainer.precision=32)")
        linears = [layer.linear for layer in self.layers]
        self._tensors: list[Tensor | None] = [
            p for linear in linears for p in (linear.weight, linear.bias)
        ]
        self.parameters = [p for p in self._tensors if p is not None]
        owned = {p: i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        if owned.keys() != set(self.parameters) or len(owned) != len(objective.params):
            raise NotApplicableError("the optimizer does not have all parameters of the model")
        self._group_of = [0 if p is None else owned[p] for p in self._tensors]
        self._check_tensors()
        self.rates = torch.zeros(0, dtype=torch.float64)
        self.evaluations = 0
        self._ahead = LookAhead()
        rule = getattr(optimizer, "step_size", None)
        self._bound = rule if isinstance(rule, StochasticPolyak) else None
        self._rule_sees_more = rule is not None and self._bound is None
        if self._rule_sees_more and isinstance(objective.inputs, SparseInputs):
            raise NotApplicableError(
                f"on sparse inputs, {type(rule).__name__} needs the gradient as a whole"
            )
        self._room: dict[str, Any] = {}

    def _check_tensors(self) -> None:
        dtype = self.parameters[0].dtype
        inputs = self.objective.inputs
        if dtype not in (torch.float32, torch.float64):
            raise NotApplicableError(f"the parameters are {dtype}")
        for p in self.parameters:
            if p.device.type != "cpu" or p.dtype != dtype or p.layout != torch.strided:
                raise NotApplicableError("the parameters are not on CPU, in one precision")
        if isinstance(inputs, SparseInputs):
            if len(self.layers) > 1:
                raise NotApplicableError("sparse inputs of a network with hidden layers")
            if torch.from_numpy(inputs.values).dtype != dtype:
                raise NotApplicableError("inputs and parameters have different precisions")
        else:
            example = inputs[:1]
            if example.dtype != dtype or example.device.type != "cpu":
                raise NotApplicableError(
                    "inputs are not on CPU, in the precision of the parameters"
                )
            if example.numel() != self.layers[0].linear.in_features:
                raise NotApplicableError("the first layer is applied to a part of an example")

    def __call__(self, indices: Tensor, factors: Tensor, draw: int = 0) -> Tensor:
        """(K, B) example numbers and (K,) factors to (K,) losses.

        Args:
            indices: (K, B), int64.
            factors: (K,), the schedule's factor at each update.
            draw: Not used: nothing is drawn.

        Returns:
            (K,), J on each update's examples before that update.
        """
        for p in self.parameters:
            p.grad = None
        run = (
            self._nonzeros
            if isinstance(self.objective.inputs, SparseInputs)
            else self._by_rule
            if self._rule_sees_more
            else self._one_example
            if indices.shape[1] == 1
            else self._batch
        )
        if not self._rule_sees_more:
            self.rates = rates_by_schedule(self.optimizer, factors)
        shares = torch.ones(len(factors), dtype=torch.float64)
        weights = sum(layer.linear.weight.numel() for layer in self.layers)
        with torch.no_grad(), single_threaded(indices.shape[1] * weights):
            made = run(indices, factors, shares)
        if self._bound is not None:
            self.rates *= shares
            if len(shares):
                self._bound.remember(self.optimizer, indices.shape[1], last_share(shares))
        if len(factors):
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * float(factors[-1])
        return made

    # ------------------------------------------------------------------ what the loops work on

    def _rates(self, factors: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(K,) and (2L,): the schedule's factors, and η₀ of each layer's weights and bias."""
        groups = self.optimizer.param_groups
        peaks = [float(groups[i]["initial_lr"]) for i in self._group_of]
        return factors.to("cpu", torch.float64).numpy(), np.array(peaks)

    def _rule(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """(2L, 5) and (2L,), as `kernels.sweep` wants them."""
        rows, fresh = [], []
        for p, index in zip(self._tensors, self._group_of, strict=True):
            group = self.optimizer.param_groups[index]
            momentum = float(group["momentum"]) or -1.0
            rows.append(
                [
                    np.nan if p is None else momentum,
                    1 - float(group["dampening"]),
                    float(group["weight_decay"]),
                    float(group["nesterov"]),
                    -1.0 if group["maximize"] else 1.0,
                ]
            )
            fresh.append(p is None or self._buffer(p) is None)
        return np.array(rows, self._number), np.array(fresh)

    def _buffer(self, p: Tensor) -> Tensor | None:
        return self.optimizer.state[p].get("momentum_buffer") if p in self.optimizer.state else None

    def _has_momentum(self, p: Tensor | None, index: int) -> bool:
        return p is not None and self.optimizer.param_groups[index]["momentum"] != 0

    @property
    def _dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    @property
    def _number(self) -> type:
        return np.float32 if self._dtype == torch.float32 else np.float64

    def _gather(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Copies of θ and of the momentum buffers, each in one piece: (P,) and (P,) or (0,)."""
        room = self._room
        sizes = [
            self.layers[i // 2].linear.out_features if p is None else p.numel()
            for i, p in enumerate(self._tensors)
        ]
        if "theta" not in room:
            room["theta"] = torch.zeros(sum(sizes), dtype=self._dtype)
        moving = any(map(self._has_momentum, self._tensors, self._group_of))
        if moving and "buffers" not in room:
            room["buffers"] = torch.zeros(sum(sizes), dtype=self._dtype)
        buffers = room["buffers"] if moving else torch.zeros(0, dtype=self._dtype)
        room["views"] = list(
            zip(
                room["theta"].split(sizes),
                buffers.split(sizes) if moving else [None] * len(sizes),
                strict=True,
            )
        )
        for p, (theta, buffer) in zip(self._tensors, room["views"], strict=True):
            if p is None:
                continue
            theta.view_as(p).copy_(p)
            if buffer is not None:
                own = self._buffer(p)
                buffer.zero_() if own is None else buffer.view_as(p).copy_(own)
        return room["theta"].numpy(), buffers.numpy()

    def _give_back(self) -> None:
        """Put what the loops have made into the parameters and the optimizer's state."""
        for p, index, (theta, buffer) in zip(
            self._tensors, self._group_of, self._room["views"], strict=True
        ):
            if p is None:
                continue
            p.copy_(theta.view_as(p))
            if self._has_momentum(p, index):
                own = self._buffer(p)
                if own is None:
                    own = self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p)
                own.copy_(buffer.view_as(p))

    def _targets(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Class numbers (N,) and (1, C), or (1,) and numbers (N, C)."""
        if "targets" not in self._room:
            outputs = self.layers[-1].linear.out_features
            loss = cast(losses.Loss, self.objective.loss)
            targets = loss.as_targets(self.objective.targets, outputs)
            if loss.task == "regression":
                values = targets.reshape(-1, outputs).to(self._dtype).contiguous()
                self._room["targets"] = np.zeros(1, np.int64), values.numpy()
            else:
                none = torch.zeros(1, outputs, dtype=self._dtype).numpy()
                self._room["targets"] = targets.contiguous().numpy(), none
        return self._room["targets"]

    def _loss(self, batch: int = 0) -> tuple[int, Any]:
        """The loops' number of the loss and its parameter; of single examples the margin."""
        from gdtrain.engines.native.kernels import LOSS

        loss = self.objective.loss
        name = "Margin" if self._is_margin(batch) else type(loss).__name__
        parameter = torch.tensor(getattr(loss, "delta", 0.0), dtype=self._dtype).numpy()[()]
        return LOSS[name], parameter

    def _is_margin(self, batch: int) -> bool:
        """Whether the loops give margins for the logistic loss, which is then computed at once."""
        one = batch == 1 and self._bound is None
        return one and type(self.objective.loss) is losses.Logistic

    # ------------------------------------------------------------------ three kinds of loops

    def _polyak(self, batch: int) -> NDArray[np.float64]:
        """As `kernels.polyak_share` wants it; (0,) without such a rule."""
        if self._bound is None:
            return np.zeros(0)
        return np.array(self._bound.bounds(self.optimizer, batch), np.float64)

    def _one_example(self, indices: Tensor, factors: Tensor, shares: Tensor) -> Tensor:
        inputs = self.objective.inputs
        rows = indices.reshape(-1).cpu()
        if isinstance(inputs, Tensor):
            if "inputs" not in self._room:
                self._room["inputs"] = inputs.reshape(len(inputs), -1).contiguous().numpy()
            labels, values = self._targets()
            if self._bound is not None and "squares" not in self._room:
                self._room["squares"] = _squares(self._room["inputs"])
            squares = self._room.get("squares", np.zeros(0))
            return self._loop(
                self._room["inputs"],
                squares,
                labels,
                values,
                rows,
                factors,
                shares,
                self._polyak(1),
            )
        # Rows from a file, so many at a time.
        width = self.layers[0].linear.in_features * self.parameters[0].element_size()
        parts, polyak = [], self._polyak(1)
        many = max(_GATHERED // width, 1)
        for part, own, taken in zip(
            rows.split(many), factors.split(many), shares.split(many), strict=True
        ):
            labels, values = self._targets()
            labels = labels[part.numpy()] if len(labels) > 1 else labels
            values = values[part.numpy()] if len(values) > 1 else values
            local = inputs[part].reshape(len(part), -1).contiguous().numpy()
            squares = _squares(local) if len(polyak) else np.zeros(0)
            here = torch.arange(len(part))
            parts.append(self._loop(local, squares, labels, values, here, own, taken, polyak))
            if len(polyak) and polyak[2] > 0:
                polyak[3] = polyak[2] * last_share(taken, polyak[3] / polyak[2])
        return torch.cat(parts)

    def _loop(
        self,
        inputs: NDArray[Any],
        squares: NDArray[np.float64],
        labels: NDArray[Any],
        values: NDArray[Any],
        rows: Tensor,
        factors: Tensor,
        shares: Tensor,
        polyak: NDArray[np.float64],
    ) -> Tensor:
        from gdtrain.engines.native import kernels

        linears = [layer.linear for layer in self.layers]
        if "work" not in self._room:
            units = sum(linear.out_features for linear in linears)
            self._room["work"] = [torch.zeros(units, dtype=self._dtype).numpy() for _ in range(3)]
            self._room["shape"] = (
                np.array([linears[0].in_features, *(linear.out_features for linear in linears)]),
                np.array([kernels.ACTIVATION[layer.activation] for layer in self.layers]),
                torch.tensor([la.parameter for la in self.layers], dtype=self._dtype).numpy(),
            )
        theta, buffers = self._gather()
        rule, fresh = self._rule()
        made = torch.zeros(len(rows), dtype=self._dtype)
        kernels.sweep(
            inputs,
            labels,
            values,
            rows.numpy(),
            *self._rates(factors),
            theta,
            buffers,
            *self._room["shape"],
            rule,
            fresh,
            *self._loss(1),
            made.numpy(),
            *self._room["work"],
            squares,
            polyak,
            shares.numpy(),
        )
        self._give_back()
        return logistic_losses(made) if self._is_margin(1) else made

    def _network(self) -> Any:
        from gdtrain.engines.native.kernels import losses_and_slopes
        from gdtrain.engines.native.matrix import Backpropagation

        if "network" not in self._room:
            code, parameter = self._loss()
            labels, values = self._targets()

            def loss(prediction: Tensor, rows: Tensor, slope: Tensor) -> float:
                return losses_and_slopes(
                    code, parameter, prediction.numpy(), labels, values, rows.numpy(), slope.numpy()
                )

            self._room["network"] = Backpropagation(
                [layer.linear.weight for layer in self.layers],
                [layer.linear.bias for layer in self.layers],
                [(layer.activation, layer.parameter) for layer in self.layers],
                loss,
            )
        return self._room["network"]

    def _flat_inputs(self) -> Any:
        inputs = self.objective.inputs
        return inputs.reshape(len(inputs), -1) if isinstance(inputs, Tensor) else inputs

    def _batch(self, indices: Tensor, factors: Tensor, shares: Tensor) -> Tensor:
        from gdtrain.engines.native.kernels import polyak_share

        network, inputs = self._network(), self._flat_inputs()
        groups = self.optimizer.param_groups
        own = [{name: group[name] for name in _RULE} for group in groups]
        rules = [own[i] for i in self._group_of]
        buffers = [None if p is None else self._buffer(p) for p in self._tensors]
        size = self._pass_size(indices.shape[1])
        polyak, peak = self._polyak(indices.shape[1]), float(groups[0]["initial_lr"])
        most = polyak[3] if len(polyak) else 1.0
        taken = shares.numpy()
        made: list[float] = []

        def share(value: float, square: float) -> float:
            nonlocal most
            taken[len(made)] = part = polyak_share(value, square, peak, most, polyak)
            if polyak[2] > 0 and part > 0:
                most = polyak[2] * part
            return float(part)

        for rows, factor in zip(indices.cpu(), factors.tolist(), strict=True):
            rates = [groups[i]["initial_lr"] * factor for i in self._group_of]
            made.append(
                network.update(
                    inputs,
                    rows,
                    size,
                    list(zip(rates, rules, strict=True)),
                    buffers,
                    share if len(polyak) else None,
                )
            )
        for p, index, buffer in zip(self._tensors, self._group_of, buffers, strict=True):
            if p is not None and self._has_momentum(p, index):
                self.optimizer.state[p]["momentum_buffer"] = buffer
        return torch.tensor(made, dtype=self._dtype)

    def _by_rule(self, indices: Tensor, factors: Tensor, shares: Tensor) -> Tensor:
        """The rule of the step size is the optimizer's own; value and gradient are ours."""
        network, inputs = self._network(), self._flat_inputs()
        optimizer: Any = self.optimizer
        size = self._pass_size(indices.shape[1])
        full = indices.shape[1] == len(self.objective.targets)
        made, rates = [], []

        def set_gradients(gradient: list[Tensor | None]) -> None:
            for p, g in zip(self._tensors, gradient, strict=True):
                if p is not None:
                    p.grad = None if g is None else g.clone()

        for rows, factor in zip(indices.cpu(), factors.tolist(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            found = self._ahead.begin(self.parameters, rows) if full else None
            if found is None:
                value, gradient = network.value_and_grad(inputs, rows, size)
                set_gradients(gradient)
            else:
                self.evaluations -= 1
                value, gradient = found
                for p, g in zip(self._tensors, gradient, strict=True):
                    if p is not None:
                        p.grad = g

            def evaluate(rows: Tensor = rows) -> float:
                self.evaluations += 1
                if not (full and self._ahead.wanted()):
                    return float(network.value(inputs, rows, size))
                there, gradient = network.value_and_grad(inputs, rows, size)
                own = [None if g is None else g.clone() for g in gradient]
                self._ahead.keep(self.parameters, rows, (there, own))
                return there

            def differentiate(rows: Tensor = rows) -> None:
                self.evaluations += 1
                set_gradients(network.value_and_grad(inputs, rows, size)[1])

            optimizer.step_by_rule(value, evaluate, differentiate)
            made.append(value)
            rates.append(optimizer.last_rate)
        for p in self.parameters:
            p.grad = None
        self.rates = torch.tensor(rates, dtype=torch.float64)
        return torch.tensor(made, dtype=self._dtype)

    def _pass_size(self, count: int) -> int:
        """M: what was asked for, else as many examples as the processor's caches hold."""
        objective = self.objective
        if objective.micro_batch_size is None:
            if not objective.automatic:
                units = sum(layer.linear.out_features for layer in self.layers)
                features = self.layers[0].linear.in_features
                per_example = (features + 3 * units) * self.parameters[0].element_size()
                return min(max(_CACHED // per_example, 32), count)
            objective.micro_batch_size = objective.automatic_size()
        return min(objective.micro_batch_size, count)

    def _nonzeros(self, indices: Tensor, factors: Tensor, shares: Tensor) -> Tensor:
        from gdtrain.engines.native import sparse

        inputs = self.objective.inputs
        assert isinstance(inputs, SparseInputs)
        linear = self.layers[0].linear
        if "gradient" not in self._room:
            for name, shape in (
                ("prediction", (linear.out_features,)),
                ("gradient", (linear.out_features, linear.in_features)),
            ):
                self._room[name] = torch.zeros(shape, dtype=self._dtype).numpy()
        theta, buffers = self._gather()
        made = torch.zeros(len(indices), dtype=self._dtype)
        sparse.sweep(
            inputs.values,
            inputs.columns,
            inputs.row_starts,
            *self._targets(),
            indices.cpu().contiguous().numpy(),
            *self._rates(factors),
            theta,
            buffers,
            linear.in_features,
            *self._rule(),
            *self._loss(indices.shape[1]),
            made.numpy(),
            self._room["prediction"],
            torch.zeros(indices.shape[1], linear.out_features, dtype=self._dtype).numpy(),
            self._room["gradient"],
            self._polyak(indices.shape[1]),
            shares.numpy(),
        )
        self._give_back()
        return logistic_losses(made) if self._is_margin(indices.shape[1]) else made


def _squares(inputs: NDArray[Any]) -> NDArray[np.float64]:
    """‖x‖² of each row."""
    return np.einsum("ij,ij->i", inputs, inputs, dtype=np.float64)
