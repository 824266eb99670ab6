"""What the compiled loops are handed: named tuples, and the numbers of losses and activations.

N examples, D features, C outputs, L layers, K updates in the sweep, P parameters. The 2L tensors
are W_1, b_1, W_2, …; a layer without bias has a place for it that is not used.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gdtrain import losses
from gdtrain.models.activations import ACTIVATIONS, Activation
from gdtrain.models.structure import Layer
from gdtrain.objective import Objective
from gdtrain.optim.protocol import bounded_step_of
from gdtrain.step_sizes.bounded import Bound

__all__ = [
    "ACTIVATION",
    "LOSS",
    "Arguments",
    "Examples",
    "LossKernel",
    "Made",
    "Network",
    "Parameters",
    "Rates",
    "Room",
    "Rule",
    "has_kernel",
]

_FAR = 4096  # numbers

(SQUARED_ERROR, HUBER, CROSS_ENTROPY, LOGISTIC, HINGE, SQUARED_HINGE, ONE_HOT) = range(7)
# The slope of the logistic loss, and the margin s·p in place of its value: the loss, a logarithm,
# is then computed for many examples at once.
MARGIN = 7
OWN = -1  # a user's loss or activation, called at its address
LOSS: dict[type[losses.Loss], int] = {
    losses.SquaredError: SQUARED_ERROR,
    losses.Huber: HUBER,
    losses.CrossEntropy: CROSS_ENTROPY,
    losses.Logistic: LOGISTIC,
    losses.Hinge: HINGE,
    losses.SquaredHinge: SQUARED_HINGE,
    losses.OneHotSquaredError: ONE_HOT,
}
(IDENTITY, RELU, TANH, SIGMOID, GELU, SILU, LEAKY_RELU, ELU, SOFTPLUS) = range(9)
ACTIVATION: dict[type[Activation], int] = {
    ACTIVATIONS["identity"]: IDENTITY,
    ACTIVATIONS["relu"]: RELU,
    ACTIVATIONS["tanh"]: TANH,
    ACTIVATIONS["sigmoid"]: SIGMOID,
    ACTIVATIONS["gelu"]: GELU,
    ACTIVATIONS["silu"]: SILU,
    ACTIVATIONS["leaky_relu"]: LEAKY_RELU,
    ACTIVATIONS["elu"]: ELU,
    ACTIVATIONS["softplus"]: SOFTPLUS,
}


class LossKernel(NamedTuple):
    """Which loss."""

    code: int  # a value of `LOSS`, or MARGIN or OWN
    parameter: Any = 0.0  # Huber's δ, of the type of the parameters
    address: int = 0  # of the compiled kernel of an OWN loss


class Network(NamedTuple):
    """Which layers."""

    widths: NDArray[np.int64]  # (L+1,), n_0 … n_L
    activations: NDArray[np.int64]  # (L,), values of `ACTIVATION`, or OWN
    parameters: NDArray[Any]  # (L,), slope of leaky_relu, α of elu
    values: NDArray[np.int64]  # (L,), addresses of a(z) of OWN activations
    slopes: NDArray[np.int64]  # (L,), addresses of a′(z, h)


class Rule(NamedTuple):
    """The update rule of all tensors, as arrays (2L,); or of one, as numbers."""

    present: Any = True  # whether there is such a tensor
    momentum: Any = 0.0  # μ; 0: none
    keep: Any = 1.0  # 1 − dampening
    weight_decay: Any = 0.0  # λ
    nesterov: Any = False
    sign: Any = 1.0  # −1 to climb, +1 to descend
    fresh: Any = False  # the momentum buffer is made at the first update, as a copy of the gradient


class Rates(NamedTuple):
    """η = η₀ · factor, float64."""

    factors: NDArray[np.float64]  # (K,), the schedule's
    peaks: NDArray[np.float64]  # (2L,), η₀ of each tensor


class Examples(NamedTuple):
    """Dense examples."""

    inputs: NDArray[Any]  # (N, D)
    labels: NDArray[np.int64]  # (N,) class numbers, or (1,) in a regression
    targets: NDArray[Any]  # (N, C) numbers, or (1, C) of classes
    squares: NDArray[np.float64]  # (N,), ‖x‖² of each; (0,) without a bound on the step


class Parameters(NamedTuple):
    """θ and its momentum, each in one piece, in place: W_1 (n_1·n_0), b_1 (n_1), W_2 …"""

    theta: NDArray[Any]  # (P,)
    buffers: NDArray[Any]  # (P,); (0,) where no tensor has momentum


class Room(NamedTuple):
    """Room for z, h and δ of one example on its way forward and back, (Σ n_l,) each."""

    z: NDArray[Any]
    h: NDArray[Any]
    delta: NDArray[Any]


class Made(NamedTuple):
    """What a sweep tells, one number for each update."""

    losses: NDArray[Any]  # (K,)
    shares: NDArray[np.float64]  # (K,), of η₀ that were taken; written where there is a bound
    total: NDArray[np.float64]  # (1,), Σ‖g‖²; likewise


def has_kernel(part: losses.Loss | Activation) -> bool:
    """Whether the loops know this very class, no subclass, or it brings a kernel of its own."""
    known: Any = LOSS if isinstance(part, losses.Loss) else ACTIVATION
    return type(part) in known or ("native" in vars(type(part)) and part.native() is not None)


class Arguments:
    """A run's arrays, as the loops take them."""

    def __init__(self, objective: Objective, optimizer: Optimizer, layers: list[Layer]) -> None:
        self.objective, self.optimizer, self.layers = objective, optimizer, layers
        self.loss = cast(losses.Loss, objective.loss)
        self.tensors: list[Tensor | None] = [
            p for layer in layers for p in (layer.linear.weight, layer.linear.bias)
        ]
        self.parameters = [p for p in self.tensors if p is not None]
        owned = {p: i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        self.group_of = [0 if p is None else owned.get(p, 0) for p in self.tensors]
        self.dtype = self.parameters[0].dtype
        self.bounded = bounded_step_of(optimizer)
        self._theta = torch.zeros(0)
        self._buffers: Tensor | None = None
        self._views: list[tuple[Tensor, Tensor | None]] = []
        self._targets: tuple[NDArray[Any], NDArray[Any]] | None = None
        self._own: dict[Any, Any] = {}

    def empty(self, *shape: int) -> NDArray[Any]:
        """Zeros of the type of the parameters."""
        made: NDArray[Any] = self._apart(math.prod(shape)).view(shape).numpy()
        return made

    def _apart(self, count: int) -> Tensor:
        """(count,) zeros, far from all other memory.

        Compiled loops look whether their arrays overlap, by bounds that exceed them, and if so add
        up in another order: what is near by chance would decide on the last bits.
        """
        margin = -(-min(count, _FAR) // 16) * 16 + 16  # keeps the alignment
        return torch.zeros(count + 2 * margin, dtype=self.dtype)[margin : margin + count]

    def rates(self, factors: Tensor) -> Rates:
        """The schedule's factors, and η₀ of each tensor."""
        groups = self.optimizer.param_groups
        peaks = [float(groups[i]["initial_lr"]) for i in self.group_of]
        return Rates(factors.to("cpu", torch.float64).numpy(), np.array(peaks))

    def rule(self) -> Rule:
        """The update rule of each tensor."""
        groups = [self.optimizer.param_groups[i] for i in self.group_of]
        number = np.float32 if self.dtype == torch.float32 else np.float64
        return Rule(
            np.array([p is not None for p in self.tensors]),
            np.array([g["momentum"] for g in groups], number),
            np.array([1 - g["dampening"] for g in groups], number),
            np.array([g["weight_decay"] for g in groups], number),
            np.array([bool(g["nesterov"]) for g in groups]),
            np.array([-1.0 if g["maximize"] else 1.0 for g in groups], number),
            np.array([p is not None and self.buffer(p) is None for p in self.tensors]),
        )

    def bound(self) -> Bound:
        """Of the step."""
        if self.bounded is None:
            return Bound()
        return Bound(*map(float, self.bounded.bound(self.optimizer)))

    def buffer(self, p: Tensor) -> Tensor | None:
        """The momentum buffer of a parameter, as the optimizer has it."""
        return self.optimizer.state[p].get("momentum_buffer") if p in self.optimizer.state else None

    def has_momentum(self, p: Tensor | None, group: int) -> bool:
        """Whether a tensor is there and moves with momentum."""
        return p is not None and self.optimizer.param_groups[group]["momentum"] != 0

    def gather(self) -> Parameters:
        """Copies of θ and of the momentum buffers, each in one piece."""
        sizes = [
            self.layers[i // 2].linear.out_features if p is None else p.numel()
            for i, p in enumerate(self.tensors)
        ]
        if not len(self._theta):
            self._theta = self._apart(sum(sizes))
        moving = any(map(self.has_momentum, self.tensors, self.group_of))
        if moving and self._buffers is None:
            self._buffers = self._apart(sum(sizes))
        buffers = self._buffers if moving else None
        own: Any = [None] * len(sizes) if buffers is None else buffers.split(sizes)
        self._views = list(zip(self._theta.split(sizes), own, strict=True))
        for p, (theta, part) in zip(self.tensors, self._views, strict=True):
            if p is None:
                continue
            theta.view_as(p).copy_(p)
            if part is not None:
                old = self.buffer(p)
                part.zero_() if old is None else part.view_as(p).copy_(old)
        none = torch.zeros(0, dtype=self.dtype)
        return Parameters(self._theta.numpy(), (none if buffers is None else buffers).numpy())

    def give_back(self) -> None:
        """Put what the loops have made of `gather` into the parameters and the optimizer."""
        for p, group, (theta, part) in zip(self.tensors, self.group_of, self._views, strict=True):
            if p is None:
                continue
            p.copy_(theta.view_as(p))
            if part is not None and self.has_momentum(p, group):
                own = self.buffer(p)
                if own is None:
                    own = self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p)
                own.copy_(part.view_as(p))

    def targets(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Class numbers (N,) and (1, C), or (1,) and numbers (N, C)."""
        if self._targets is None:
            outputs = self.layers[-1].linear.out_features
            targets = self.loss.as_targets(self.objective.targets, outputs)
            if self.loss.task == "regression":
                values = targets.reshape(-1, outputs).to(self.dtype).contiguous()
                self._targets = np.zeros(1, np.int64), values.numpy()
            else:
                self._targets = targets.contiguous().numpy(), self.empty(1, outputs)
        return self._targets

    def gives_margins(self, batch: int) -> bool:
        """Whether the loops give margins for the logistic loss, which is then computed at once."""
        return batch == 1 and self.bounded is None and type(self.loss) is losses.Logistic

    def loss_kernel(self, batch: int) -> LossKernel:
        """Which loss the loops compute."""
        parameter = torch.tensor(getattr(self.loss, "delta", 0.0), dtype=self.dtype).numpy()[()]
        code = MARGIN if self.gives_margins(batch) else LOSS.get(type(self.loss), OWN)
        address = 0
        if code == OWN:
            from gdtrain.engines.native.kernels import own_loss

            if "loss" not in self._own:  # what is compiled lives as long as this does
                kernel = self.loss.native()
                assert kernel is not None
                self._own["loss"] = own_loss(kernel, self.dtype)
            address = self._own["loss"].address
        return LossKernel(code, parameter, address)

    def network(self) -> Network:
        """Which layers."""
        linears = [layer.linear for layer in self.layers]
        activations = [layer.activation for layer in self.layers]
        addresses = np.zeros((2, len(linears)), np.int64)
        for at, activation in enumerate(activations):
            if type(activation) not in ACTIVATION:
                from gdtrain.engines.native.kernels import own_activation

                kernels = activation.native()
                assert kernels is not None
                self._own[at] = own_activation(*kernels, self.dtype)
                addresses[:, at] = [made.address for made in self._own[at]]
        parameters = torch.tensor([a.parameter for a in activations], dtype=self.dtype)
        return Network(
            np.array([linears[0].in_features, *(linear.out_features for linear in linears)]),
            np.array([ACTIVATION.get(type(a), OWN) for a in activations]),
            parameters.numpy(),
            *addresses,
        )
