"""The objective J: the mean loss over named examples, as a function of the parameters.

    J(θ) = (1/B) Σ_{i ∈ indices} ℓ(model(x_i; θ), y_i)

N examples, B of them named, M in one forward and backward pass. This is the only place where a mean
over examples is formed: each pass adds its sum, and the total is divided by B, so that M and a
ragged last pass cannot change the result (but for rounding).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Objective"]


class Objective:
    """J over resident examples, by micro-batches.

    Args:
        model: (B, …) to (B, C).
        loss: (B, C) and targets to (B,).
        inputs: (N, …).
        targets: (N, …).
        micro_batch_size: M, range [1, ∞); None: all named examples at once.

    Raises:
        ValueError: Inputs and targets differ in number.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2.0, 4.0, 6.0])
        >>> objective = Objective(model, SquaredError(), x, y, micro_batch_size=2)
        >>> value, (gradient,) = objective.value_and_grad(torch.arange(3))
        >>> round(value.item(), 4), round(gradient.item(), 4)  # (4+16+36)/6, −(2+8+18)/3
        (9.3333, -9.3333)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        micro_batch_size: int | None = None,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"Expected one target for each example. Received: {len(inputs)} examples and "
                f"{len(targets)} targets."
            )
        self.model, self.loss = model, loss
        self.inputs, self.targets = inputs, targets
        self.micro_batch_size = micro_batch_size
        self.params = [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def losses(self, indices: Tensor) -> Tensor:
        """ℓ of each example; the model stays in the mode that it is in.

        Args:
            indices: (B,), int64.

        Returns:
            (B,).
        """
        return torch.cat([self._losses(part) for part in self._parts(indices)])

    def value(self, indices: Tensor) -> Tensor:
        """J, without its gradient.

        Args:
            indices: (B,), int64.

        Returns:
            A scalar.
        """
        return self.losses(indices).sum() / len(indices)

    def value_and_grad(self, indices: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """J and its exact gradient.

        Args:
            indices: (B,), int64.

        Returns:
            A scalar, and one gradient for each parameter; None where J does not depend on it.
        """
        count = len(indices)
        value: Tensor | None = None
        gradient: list[Tensor | None] = []
        for part in self._parts(indices):
            share = self._losses(part).sum() / count
            grads = torch.autograd.grad(share, self.params, allow_unused=True)
            if value is None:
                value, gradient = share.detach(), list(grads)
                continue
            value = value + share.detach()
            for i, g in enumerate(grads):
                if g is not None:
                    total = gradient[i]
                    gradient[i] = g if total is None else total.add_(g)
        assert value is not None, "indices must not be empty"
        return value, gradient

    def _parts(self, indices: Tensor) -> tuple[Tensor, ...]:
        size = self.micro_batch_size
        return (indices,) if size is None or len(indices) <= size else indices.split(size)

    def _losses(self, indices: Tensor) -> Tensor:
        return self.loss(self.model(self.inputs[indices]), self.targets[indices])
