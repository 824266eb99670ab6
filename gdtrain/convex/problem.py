"""A linear model's objective P and its dual D on one data set; see `gdtrain.convex.certificate`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.convex.conjugates import Conjugate, double
from gdtrain.losses import Loss
from gdtrain.models.structure import NotDenseError, dense_layers
from gdtrain.objective import Objective, Rows
from gdtrain.ranges import Interval

__all__ = ["LeastSquares", "LinearProblem", "NoCertificateError", "linear_layer"]

_RESIDENT = 64 * 2**20  # bytes of inputs in float64 that are kept; more are converted in parts
_FEATURES = 1024  # D, up to which a matrix (D, D) is made for least squares


class NoCertificateError(ValueError):
    """This model, loss or weight decay has no duality gap; the text says why.

    Example:
        >>> raise NoCertificateError("the model is not linear")
        Traceback (most recent call last):
        ...
        gdtrain.convex.problem.NoCertificateError: the model is not linear
    """


def linear_layer(model: nn.Module) -> nn.Linear:
    """The layer of a linear model, z = W x + b.

    Args:
        model: gdtrain's `Linear`, `torch.nn.Linear`, or an `nn.Sequential` of one and `Flatten`.

    Returns:
        It.

    Raises:
        NoCertificateError: The model is another.

    Example:
        >>> linear_layer(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))).out_features
        2
    """
    try:
        layers = dense_layers(model)
    except NotDenseError as error:
        raise NoCertificateError(f"the model is not linear: {error}") from None
    if len(layers) != 1 or not layers[0].is_linear:
        raise NoCertificateError("the model is not linear")
    return layers[0].linear


class LinearProblem:
    """P and D of one data set, loss and weight decay.

    Args:
        inputs: (N, …), flattened to (N, D).
        targets: (N,) or (N, C).
        loss: One that states its conjugate, as gdtrain's own do.
        outputs: C.
        weight_decay: λ, range (0, ∞); for squared error also 0.
        bias: Whether there is b.
        bias_decay: λ_b, range [0, ∞).

    Raises:
        NoCertificateError: The loss states no conjugate, or λ = 0.
        ValueError: λ_b is out of range, or there are no examples.

    Example:
        >>> from gdtrain.losses import Hinge
        >>> x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0])
        >>> problem = LinearProblem(x, y, Hinge(), 1, weight_decay=1.0)
        >>> problem.primal(torch.tensor([[1.0]]), torch.tensor([0.0]))
        0.5
    """

    def __init__(
        self,
        inputs: Rows,
        targets: Tensor,
        loss: Loss,
        outputs: int,
        weight_decay: float,
        *,
        bias: bool = True,
        bias_decay: float = 0.0,
    ) -> None:
        if len(inputs) == 0 or len(inputs) != len(targets):
            raise ValueError(
                f"Expected one target for each of at least one example. Received: {len(inputs)} "
                f"examples and {len(targets)} targets."
            )
        decay = Interval(0, math.inf, closed="left")
        self.bias_decay = decay.check("bias_decay", bias_decay)
        self.weight_decay = decay.check("weight_decay", weight_decay)
        if not loss.states("slope", "curvature", "conjugate", "domain"):
            raise NoCertificateError(f"there is no conjugate of {type(loss).__name__} here")
        if weight_decay == 0 and not loss.quadratic:
            raise NoCertificateError(
                "without weight decay on the weights there is no finite certificate: set "
                "optimizer.weight_decay"
            )
        self.inputs = inputs
        self.count = len(inputs)
        self.has_bias = bias
        self.dual = Conjugate(loss, targets, outputs)
        self.balances = bias and bias_decay == 0
        self.passes = 0.0  # over the N examples, that were made so far
        self.lowest: tuple[float, Tensor, Tensor | None] | None = None  # P met so far, W, b
        self._kept: Tensor | None = None
        self.least_squares = LeastSquares(self) if weight_decay == 0 else None

    @classmethod
    def of(cls, objective: Objective, optimizer: Optimizer) -> LinearProblem:
        """The problem that a run solves.

        Args:
            objective: J.
            optimizer: Whose groups tell the weight decay of each parameter.

        Returns:
            The problem.

        Raises:
            NoCertificateError: The model is not linear, the loss states no conjugate, or there is
                no weight decay.

        Example:
            >>> from gdtrain import GD
            >>> from gdtrain.losses import SquaredError
            >>> model = nn.Linear(1, 1)
            >>> objective = Objective(model, SquaredError(), torch.ones(1, 1), torch.ones(1))
            >>> optimizer = GD(model.parameters(), weight_decay=0.5)
            >>> LinearProblem.of(objective, optimizer).weight_decay
            0.5
        """
        layer = linear_layer(objective.model)
        decays: dict[int, float] = {}
        for group in optimizer.param_groups:
            if group.get("decoupled_weight_decay") or isinstance(optimizer, torch.optim.AdamW):
                raise NoCertificateError(
                    "decoupled weight decay is no part of an objective: use SGD or Adam"
                )
            if group.get("maximize"):
                raise NoCertificateError("the optimizer maximises")
            decays |= {id(p): float(group.get("weight_decay", 0.0)) for p in group["params"]}
        tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        if any(id(p) not in decays or not p.requires_grad for p in tensors):
            raise NoCertificateError("a parameter of the linear model is not trained")
        loss = objective.loss
        if not isinstance(loss, Loss):
            raise NoCertificateError("the loss is none of gdtrain's")
        example = objective.inputs[:1]
        if example.numel() != layer.in_features:
            raise NoCertificateError("the linear layer is applied to a part of an example")
        return cls(
            objective.inputs,
            objective.targets,
            loss,
            layer.out_features,
            decays[id(layer.weight)],
            bias=layer.bias is not None,
            bias_decay=0.0 if layer.bias is None else decays[id(layer.bias)],
        )

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the inputs, (n, D) in float64."""
        if self._kept is None:
            first = self.inputs[:1]
            width = max(1, first.numel())
            rows = max(1, _RESIDENT // (8 * width))
            if self.count > rows:
                for start in range(0, self.count, rows):
                    part = slice(start, min(start + rows, self.count))
                    yield part, double(self.inputs[part]).flatten(1)
                return
            self._kept = double(self.inputs[: self.count]).flatten(1).contiguous()
        yield slice(0, self.count), self._kept

    def outputs(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """z_i = W x_i + b, (N, C), in float64.

        Args:
            weight: (C, D), float64.
            bias: (C,), float64.
        """
        self.passes += 1
        made = torch.cat([x @ weight.T for _, x in self.parts()])
        return made if bias is None else made + bias

    def rows(self, which: Tensor) -> Tensor:
        """Some rows of the inputs, (n, D) in float64.

        Args:
            which: (n,).
        """
        if self._kept is not None:
            return self._kept[which]
        size = max(1, _RESIDENT // (8 * max(1, self.inputs[:1].numel())))
        return torch.cat([double(self.inputs[part]).flatten(1) for part in which.split(size)])

    def gathered(self, alpha: Tensor) -> Tensor:
        """A = (1/N) Σ_i α_i x_iᵀ, (C, D).

        Args:
            alpha: (N, C), float64.
        """
        self.passes += 1
        total: Tensor | float = 0.0
        for part, x in self.parts():
            total = total + alpha[part].T @ x
        assert isinstance(total, Tensor)
        return total / self.count

    def penalty(self, weight: Tensor, bias: Tensor | None) -> float:
        """½λ‖W‖² + ½λ_b‖b‖².

        Args:
            weight: (C, D), float64.
            bias: (C,), float64.
        """
        made = 0.5 * self.weight_decay * float(weight.square().sum())
        if bias is not None and self.bias_decay:
            made += 0.5 * self.bias_decay * float(bias.square().sum())
        return made

    def primal(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """P(W, b).

        Args:
            weight: (C, D).
            bias: (C,).

        Example:
            >>> from gdtrain.losses import SquaredError
            >>> x, y = torch.tensor([[1.0]]), torch.tensor([1.0])
            >>> LinearProblem(x, y, SquaredError(), 1, 1.0, bias=False).primal(torch.ones(1, 1))
            0.5
        """
        w, b = double(weight), None if bias is None else double(bias)
        return float(self.dual.values(self.outputs(w, b)).mean()) + self.penalty(w, b)

    def lower_bound(self, alpha: Tensor, gathered: Tensor | None = None) -> float:
        """D(α), for α in the domain of the conjugate and, where b is free, balanced.

        Args:
            alpha: (N, C), float64.
            gathered: A, where it is known.
        """
        if gathered is None:
            gathered = self.gathered(alpha)
        made = -float(self.dual.conjugates(alpha).mean())
        made -= float(gathered.square().sum()) / (2 * self.weight_decay)
        if self.has_bias and self.bias_decay:
            made -= float(alpha.mean(0).square().sum()) / (2 * self.bias_decay)
        return made

    def state_dict(self) -> dict[str, Any]:
        """Where a search goes on, in plain containers: the lowest P that was met, its W and b."""
        return {"lowest": None if self.lowest is None else list(self.lowest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`: a search then answers as it would have.

        Args:
            state_dict: Of a problem with the same data.
        """
        lowest = state_dict["lowest"]
        self.lowest = None if lowest is None else (lowest[0], lowest[1], lowest[2])


class LeastSquares:
    """Least squares without weight decay: G = (1/N) Σ x̃_i x̃_iᵀ with x̃ = (x, 1), and its inverse.

    Args:
        problem: Of a quadratic loss.

    Raises:
        NoCertificateError: There are more than 1024 features.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0])
        >>> problem = LinearProblem(x, y, SquaredError(), 1, weight_decay=0.0, bias=False)
        >>> found = LeastSquares(problem).excess(torch.zeros(1, 1, dtype=torch.float64), None)
        >>> round(found, 12)  # ½(1 + 4)/2, and w = 1 fits exactly
        1.25
    """

    def __init__(self, problem: LinearProblem) -> None:
        width = problem.inputs[:1].numel()
        if width > _FEATURES:
            raise NoCertificateError(
                f"without weight decay, least squares has a certificate up to {_FEATURES} "
                f"features: set optimizer.weight_decay"
            )
        self.problem = problem
        g: Tensor | float = 0.0
        for _, x in problem.parts():
            x = self._with_one(x)
            g = g + x.T @ x
        assert isinstance(g, Tensor)
        g = g / problem.count
        if problem.has_bias:
            g[-1, -1] += problem.bias_decay
        # In units in which each feature has the mean square 1.
        size = g.diagonal().sqrt()
        self._unit = torch.where(size > 0, 1 / size.clamp(min=1e-300), 0.0)
        values, vectors = torch.linalg.eigh(g * self._unit * self._unit[:, None])
        kept = values > 1e-13 * len(values) * values.max()
        self._inverse = torch.where(kept, 1 / values, 0.0)
        self._vectors = vectors

    def _with_one(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if self.problem.has_bias else x

    def excess(self, w: Tensor, b: Tensor | None) -> float:
        """P − min P = ½ Σ_c ⟨g_c, G⁺ g_c⟩ with the gradient g (C, D + 1).

        Args:
            w: W, (C, D), float64.
            b: (C,), float64.
        """
        problem = self.problem
        alpha = problem.dual.slopes(problem.outputs(w, b))
        gradient = problem.gathered(alpha)
        if b is not None:
            last = alpha.mean(0) + problem.bias_decay * b
            gradient = torch.cat([gradient, last[:, None]], 1)
        turned = (gradient * self._unit) @ self._vectors
        return 0.5 * float((turned.square() * self._inverse).sum())
