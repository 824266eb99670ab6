"""The objective J: the mean loss over named examples, as a function of the parameters.

    J(θ) = (1/B) Σ_{i ∈ indices} ℓ(model(x_i; θ), y_i)

N examples, B of them named, M in one forward and backward pass, R ranks. This is the only place
where a mean over examples is formed: each pass adds its share, a sum divided by B, and the ranks'
shares are added once, so that M, a ragged last pass and uneven ranks cannot change the result (but
for rounding).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gdtrain.dropout import drawing

__all__ = ["Objective", "Rows", "own_part"]

_ACTIVATIONS = 64 * 2**20  # bytes that a pass of automatic size may keep for its backward pass


def own_part(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """A rank's part of `count` examples: nothing padded, repeated or dropped.

    Args:
        count: Examples in all.
        rank: From 0.
        ranks: R.

    Returns:
        The first, and the one after the last.

    Example:
        >>> [own_part(7, rank, 3) for rank in range(3)]
        [(0, 3), (3, 5), (5, 7)]
    """
    share, more = divmod(count, ranks)
    start = rank * share + min(rank, more)
    return start, start + share + (rank < more)


class Rows(Protocol):
    """What inputs must offer: a tensor does, and so do rows that stay in a file.

    Example:
        >>> rows: Rows = torch.zeros(3, 2)
        >>> len(rows), rows[torch.tensor([0, 2])].shape
        (3, torch.Size([2, 2]))
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Any) -> Tensor: ...


class Objective:
    """J over resident (or memory-mapped) examples, by micro-batches.

    Args:
        model: (B, …) to (B, C).
        loss: (B, C) and targets to (B,).
        inputs: (N, …).
        targets: (N, …), on the device of the model.
        micro_batch_size: M, range [1, ∞); None: all named examples at once; "auto": measured at
            the first gradient, by throughput and within 64 MB of activations (a quarter of what is
            free on a GPU), and halved when memory runs out.
        rank: Of this process; it takes its part of the named examples.
        ranks: R. With more than one, `torch.distributed` must be initialised.

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
        inputs: Rows,
        targets: Tensor,
        micro_batch_size: int | Literal["auto"] | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"Expected one target for each example. Received: {len(inputs)} examples and "
                f"{len(targets)} targets."
            )
        self.model, self.loss = model, loss
        self.inputs, self.targets = inputs, targets
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.rank, self.ranks = rank, ranks
        self.automatic = micro_batch_size == "auto"
        self.micro_batch_size = None if micro_batch_size == "auto" else micro_batch_size
        self._mixes = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())

    @torch.no_grad()
    def losses(self, indices: Tensor, draw: int = 0) -> Tensor:
        """ℓ of each example, on this process alone; the model stays in the mode that it is in.

        Args:
            indices: (B,), int64.
            draw: Names the random numbers of gdtrain's own layers: the same draw, the same numbers.

        Returns:
            (B,).
        """
        size = self.micro_batch_size or max(len(indices), 1)
        parts = []
        for first in range(0, len(indices), size):
            with drawing(draw, first):
                parts.append(self._losses(indices[first : first + size]))
        return torch.cat(parts)

    def value(self, indices: Tensor, draw: int = 0) -> Tensor:
        """J, without its gradient, on this process alone.

        Args:
            indices: (B,), int64.
            draw: As for `losses`.

        Returns:
            A scalar.
        """
        return self.losses(indices, draw).sum() / len(indices)

    def value_and_grad(self, indices: Tensor, draw: int = 0) -> tuple[Tensor, list[Tensor | None]]:
        """J and its exact gradient, over all ranks.

        Args:
            indices: (B,), int64, the same on every rank.
            draw: As for `losses`.

        Returns:
            A scalar, and one gradient for each parameter; None where J does not depend on it.
        """
        count = len(indices)
        assert count, "indices must not be empty"
        start, end = own_part(count, self.rank, self.ranks)
        if self.automatic and self.micro_batch_size is None:
            self.micro_batch_size = self._measured(indices[start:end])
        self._say_if_mixed(end - start, count)
        value: Tensor | None = None
        gradient: list[Tensor | None] = [None] * len(self.params)
        while start < end:
            size = self.micro_batch_size or end - start
            part = indices[start : min(start + size, end)]
            try:
                with drawing(draw, start):
                    share, grads = self._share(part, count)
            except torch.OutOfMemoryError:
                if not self.automatic or len(part) == 1:
                    raise
                torch.cuda.empty_cache()
                self.micro_batch_size = len(part) // 2  # what is added up already stays
                continue
            value = share if value is None else value + share
            for i, g in enumerate(grads):
                if g is not None:
                    total = gradient[i]
                    gradient[i] = g if total is None else total.add_(g)
            start += len(part)
        return self._reduced(value, gradient) if self.ranks > 1 else (value, gradient)  # type: ignore[return-value]

    def _share(self, part: Tensor, count: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        share = self._losses(part).sum() / count
        return share.detach(), torch.autograd.grad(share, self.params, allow_unused=True)

    def _losses(self, indices: Tensor) -> Tensor:
        return self.loss(self.model(self.inputs[indices]), self.targets[indices])

    # ------------------------------------------------------------------ ranks

    def _reduced(
        self, value: Tensor | None, gradient: list[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Sum of the ranks' shares, in one reduction.

        The buffer holds J, then for each parameter whether J depends on it, then the gradients.
        """
        like = self.params[0]
        flags = torch.tensor([g is not None for g in gradient], dtype=like.dtype).to(like.device)
        head = torch.zeros(1).to(like) if value is None else value.reshape(1).to(like)
        parts = [
            (torch.zeros_like(p) if g is None else g).reshape(-1).to(like.dtype)
            for p, g in zip(self.params, gradient, strict=True)
        ]
        buffer = torch.cat([head, flags, *parts])
        torch.distributed.all_reduce(buffer)
        sums = buffer[1 + len(flags) :].split([p.numel() for p in self.params])
        return buffer[0], [
            total.view_as(p).to(p.dtype) if depends else None
            for depends, total, p in zip(
                buffer[1 : 1 + len(flags)].tolist(), sums, self.params, strict=True
            )
        ]

    # ------------------------------------------------------------------ micro-batches

    def _say_if_mixed(self, own: int, count: int) -> None:
        size = self.micro_batch_size or own
        if self._mixes and self.model.training and (size < own or own < count):
            self._mixes = False
            warnings.warn(
                f"BatchNorm normalises each pass of {min(size, own)} examples by itself, so the "
                f"gradient is not that of the whole batch of {count}. Use norm=group (GroupNorm), "
                f"or one pass: micro_batch_size=null on one device.",
                stacklevel=2,
            )

    def _measured(self, indices: Tensor) -> int | None:
        """M of the best throughput within the memory bound; leaves model and generators alone."""
        least = min(len(indices), 32)
        if len(indices) <= 2 * least:
            return None
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        devices = [p.device for p in self.params[:1] if p.device.type == "cuda"]
        with torch.random.fork_rng(devices):
            per_example = (self._saved(indices[: 2 * least]) - self._saved(indices[:least])) / least
            bound = torch.cuda.mem_get_info(devices[0])[0] / 4 if devices else _ACTIVATIONS
            most = int(bound / max(per_example, 1.0))
            best, best_time, size = least, float("inf"), least
            while True:
                elapsed = min(self._timed(indices[:size]) for _ in range(2)) / size
                if elapsed < 0.95 * best_time:
                    best, best_time = size, elapsed
                if size * 2 > min(most, len(indices)):
                    break
                size *= 2
        with torch.no_grad():
            for name, b in self.model.named_buffers():
                b.copy_(buffers[name])
        return best

    def _saved(self, indices: Tensor) -> float:
        """Bytes that the forward pass keeps for the backward pass."""
        total = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._losses(indices)
        return total

    def _timed(self, indices: Tensor) -> float:
        started = time.perf_counter()
        try:
            self._share(indices, len(indices))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return float("inf")
        if self.targets.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started
