"""The objective J: the mean loss over named examples, as a function of the parameters.

    J(θ) = (1/B) Σ_{i ∈ indices} ℓ(model(x_i; θ), y_i)

N examples, B of them named, M in one forward and backward pass, R ranks. Each pass adds its share,
a sum divided by B, and the ranks' shares are added once, so that M, a ragged last pass and uneven
ranks cannot change the result (but for rounding).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gdtrain._compat.torch_modules import BATCH_NORMS, DROPOUTS, buffers_in
from gdtrain.generators import same_after
from gdtrain.models.dropout import Dropout, drawing

__all__ = [
    "Objective",
    "Rows",
    "buffers_of",
    "evaluating",
    "own_part",
    "prediction_of",
    "untouched",
]

# Bytes that a pass of automatic size keeps for its backward pass.
_CACHED = 4 * 2**20  # on CPU: what its caches hold
_RESIDENT = 64 * 2**20  # on CPU, at most, where examples are large
_ON_GPU = 2**30
_LEAST = 256  # examples that are passed together on CPU, if memory lets them


def own_part(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """A rank's part of `count` examples, [first, end): nothing padded, repeated or dropped.

    Example:
        >>> [own_part(7, rank, 3) for rank in range(3)]
        [(0, 3), (3, 5), (5, 7)]
    """
    share, more = divmod(count, ranks)
    start = rank * share + min(rank, more)
    return start, start + share + (rank < more)


def buffers_of(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Where each buffer lies: the module's own mapping, the name in it, and the buffer.

    Example:
        >>> [(name, len(buffer)) for _, name, buffer in buffers_of(nn.BatchNorm1d(2))[:2]]
        [('running_mean', 2), ('running_var', 2)]
    """
    return [
        (buffers_in(module), name, buffer)
        for module in model.modules()
        for name, buffer in buffers_in(module).items()
        if buffer is not None
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, a model is in evaluation mode; after it, each layer is in the mode it was in.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1).eval())
        >>> with evaluating(model):
        ...     pass
        >>> [layer.training for layer in model]
        [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leaves a model's buffers, and all generators that its layers may draw from, as they were.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> with untouched(layer):
        ...     _ = layer(torch.tensor([[1.0], [3.0]]))
        >>> layer.running_mean
        tensor([0.])
    """
    own = buffers_of(model)
    copies = {id(buffer): buffer.clone() for _, _, buffer in own}  # one may be at two places
    try:
        for owner, name, buffer in own:
            owner[name] = copies[id(buffer)]
        with same_after(p.device for p in model.parameters()):
            yield
    finally:
        for owner, name, buffer in own:
            owner[name] = buffer


def prediction_of(output: Any) -> Tensor:
    """The prediction in what a model returns.

    A tensor is the prediction itself; of a tuple or list, it is the first entry; of a mapping, the
    entry `logits`, or the only one. Elsewhere a ValueError says that there is none.

    Example:
        >>> logits, hidden = torch.zeros(2, 3), torch.ones(2, 8)
        >>> outputs = logits, (logits, hidden), {"hidden": hidden, "logits": logits}
        >>> all(prediction_of(output) is logits for output in outputs)
        True
    """
    if isinstance(output, Tensor):
        return output
    first, what = None, type(output).__name__
    if isinstance(output, Mapping):
        first = output.get("logits", next(iter(output.values())) if len(output) == 1 else None)
        what += f" with the keys {', '.join(map(repr, output)) or '(none)'}"
    elif isinstance(output, tuple | list):
        first = output[0] if output else None
        what += f" of {', '.join(type(entry).__name__ for entry in output) or 'nothing'}"
    if isinstance(first, Tensor):
        return first
    raise ValueError(
        f"A model must return its prediction as a tensor, as the first entry of a tuple or list, "
        f"or as the entry 'logits' (or the only one) of a mapping. Received: {what}."
    )


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

    `indices` are (B,), int64; `draw` names the random numbers of gdtrain's own layers: the same
    draw, the same numbers. The model stays in the mode that it is in. `value_and_grad` and the
    products with the Hessian are over all ranks, whose indices must be the same; all else is of
    this process alone.

    Args:
        model: (B, …) to (B, C), see `prediction_of`.
        loss: (B, C) and targets to (B,).
        inputs: (N, …).
        targets: (N, …), on the device of the model.
        micro_batch_size: M, range [1, ∞); None: all named examples at once; "auto": as many as a
            fixed number of bytes holds, see `automatic_size`, and halved when memory runs out.
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
        self._told_in_turn = self._is_twice_differentiable = False
        self.mixes_examples = any(isinstance(m, BATCH_NORMS) for m in model.modules())
        """Whether a layer normalises the examples of a pass together, as BatchNorm does."""
        self._told_mixing = False

    @torch.no_grad()
    def losses(self, indices: Tensor, draw: int = 0) -> Tensor:
        """ℓ of each example, (B,)."""
        parts = []
        for first, part in self._passes(indices):
            with drawing(draw, first):
                parts.append(self._losses(part))
        return torch.cat(parts)

    def value(self, indices: Tensor, draw: int = 0) -> Tensor:
        """J, without its gradient."""
        return self.losses(indices, draw).sum() / len(indices)

    def value_and_grad(self, indices: Tensor, draw: int = 0) -> tuple[Tensor, list[Tensor | None]]:
        """J and its exact gradient, one for each parameter; None where J does not depend on it."""
        value, gradient, self.micro_batch_size = self._added_up(indices, draw, self._share)
        return value, gradient

    def hessian_vector(self, indices: Tensor, v: Sequence[Tensor], draw: int = 0) -> list[Tensor]:
        """∇²J v, exactly: the gradient of ⟨∇J, v⟩; zeros where ∇J does not depend on a parameter.

        In training mode, BatchNorm's Hessian is that of batch statistics, and dropout's that of the
        masks of `draw`. Buffers, `.grad` and generators stay as they are.

        Args:
            indices: (B,), int64.
            v: A tensor for each of `params`, of its shape; and so is the result.
            draw: Names the random numbers.

        Raises:
            ValueError: A part of the model cannot be differentiated twice.
        """
        return self._times_hessian(v, indices, draw, None)

    def hessian(self, indices: Tensor, draw: int = 0) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """∇²J at the parameters as they are, as a function from v to ∇²J v.

        As `hessian_vector`, and at half the time where the named examples are one pass: its graph
        is then kept for the next v. The parameters must not change in between.
        """
        return partial(self._times_hessian, indices=indices, draw=draw, kept=[])

    def _times_hessian(
        self, v: Sequence[Tensor], indices: Tensor, draw: int, kept: list[Any] | None
    ) -> list[Tensor]:
        with untouched(self.model), torch.enable_grad():
            share = partial(self._second_share, v, kept)
            _, product, _ = self._added_up(indices, draw, share)
        return [
            torch.zeros_like(p) if h is None else h
            for p, h in zip(self.params, product, strict=True)
        ]

    def per_example_gradients(self, indices: Tensor, draw: int = 0) -> list[Tensor]:
        """∇ℓ of each example, (B, …) for each of `params`; their mean is ∇J.

        Examples of a pass are differentiated side by side by `torch.func.vmap` where the model lets
        it, and one after the other where not (a warning says so). Buffers, `.grad` and generators
        stay as they are.

        Raises:
            ValueError: BatchNorm in training mode mixes the examples.
        """
        modules = [m for m in self.model.modules() if m.training]
        if any(isinstance(m, BATCH_NORMS) for m in modules):
            raise ValueError(
                "BatchNorm in training mode mixes the examples, so that none has a gradient of its "
                "own. Call model.eval() first, or use norm=group (GroupNorm)."
            )
        drawn = any(isinstance(m, (Dropout, DROPOUTS)) and m.p for m in modules)
        parts = []
        with untouched(self.model), torch.enable_grad():
            for first, part in self._passes(indices):
                one_by_one = partial(self._each_in_turn, part, first, draw)
                parts.append(one_by_one() if drawn else self._side_by_side(part, one_by_one))
        return [torch.cat(grads) for grads in zip(*parts, strict=True)]

    def _passes(self, indices: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The examples of each pass, and the place of its first."""
        size = self.micro_batch_size or max(len(indices), 1)
        for first in range(0, len(indices), size):
            yield first, indices[first : first + size]

    def _added_up(
        self,
        indices: Tensor,
        draw: int,
        share: Callable[[Tensor, int], tuple[Tensor, Sequence[Tensor | None]]],
    ) -> tuple[Tensor, list[Tensor | None], int | None]:
        """The sum of the passes' and the ranks' shares of a value and a vector; and the M used."""
        count = len(indices)
        assert count, "indices must not be empty"
        start, end = own_part(count, self.rank, self.ranks)
        if self.automatic and self.micro_batch_size is None:
            self.micro_batch_size = self.automatic_size()
        self._say_if_mixed(end - start, count)
        micro = self.micro_batch_size
        value: Tensor | None = None
        vector: list[Tensor | None] = [None] * len(self.params)
        while start < end:
            size = micro or end - start
            part = indices[start : min(start + size, end)]
            try:
                with drawing(draw, start):
                    one, more = share(part, count)
            except torch.OutOfMemoryError:
                if not self.automatic or len(part) == 1:
                    raise
                torch.cuda.empty_cache()
                micro = len(part) // 2  # what is added up already stays
                continue
            value = one if value is None else value + one
            for i, g in enumerate(more):
                if g is not None:
                    total = vector[i]
                    vector[i] = g if total is None else total.add_(g)
            start += len(part)
        if self.ranks > 1:
            return *_reduced(self.params, value, vector), micro
        assert value is not None
        return value, vector, micro

    def _share(self, part: Tensor, count: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        share = self._losses(part).sum() / count
        return share.detach(), torch.autograd.grad(share, self.params, allow_unused=True)

    def _second_share(
        self, v: Sequence[Tensor], kept: list[Any] | None, part: Tensor, count: int
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """J's share of a pass, and the gradient of ⟨∇, v⟩."""
        # The fused attention kernels have no second derivative; the plain one has.
        with sdpa_kernel(SDPBackend.MATH):
            if kept:
                share, grads = kept
            else:
                share = self._losses(part).sum() / count
                grads = torch.autograd.grad(
                    share, self.params, create_graph=True, allow_unused=True
                )
                start, end = own_part(count, self.rank, self.ranks)
                if kept is not None and len(part) == end - start:
                    kept += [share.detach(), grads]
                self._refuse_once_differentiable(grads)
            # A gradient without a graph is constant.
            pairs = [
                (g, w) for g, w in zip(grads, v, strict=True) if g is not None and g.requires_grad
            ]
            if not pairs:
                return share.detach(), [None] * len(self.params)
            try:
                product = torch.autograd.grad(
                    [g for g, _ in pairs],
                    self.params,
                    [w.to(g) for g, w in pairs],
                    allow_unused=True,
                    retain_graph=bool(kept),
                )
            except torch.OutOfMemoryError:
                if kept:
                    kept.clear()  # smaller passes come next
                raise
            except RuntimeError as error:
                raise ValueError(_not_twice(self, str(error))) from error
        return share.detach(), product

    def _refuse_once_differentiable(self, grads: Sequence[Tensor | None]) -> None:
        """Look for nodes that would raise if they were run; autograd.grad goes around them."""
        if self._is_twice_differentiable:
            return
        waiting: list[Any] = [g.grad_fn for g in grads if g is not None]
        seen: set[Any] = {None}
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                if node.name() == "torch::autograd::Error":
                    raise ValueError(_not_twice(self, "a function is marked once_differentiable"))
                waiting += [parent for parent, _ in node.next_functions]
        self._is_twice_differentiable = True

    def _each_in_turn(self, part: Tensor, first: int, draw: int) -> list[Tensor]:
        rows = []
        for k in range(len(part)):
            with drawing(draw, first + k):
                loss = self._losses(part[k : k + 1]).sum()
            rows.append(
                torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
            )
        return [torch.stack(grads) for grads in zip(*rows, strict=True)]

    def _side_by_side(self, part: Tensor, otherwise: Callable[[], list[Tensor]]) -> list[Tensor]:
        owned = {id(p) for p in self.params}
        params = {name: p for name, p in self.model.named_parameters() if id(p) in owned}

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            output = torch.func.functional_call(self.model, params, (x[None],))
            return self.loss(prediction_of(output), y[None]).sum()

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        detached = {name: p.detach() for name, p in params.items()}
        try:
            with sdpa_kernel(SDPBackend.MATH):  # vmap knows no other attention
                made = gradients(detached, self.inputs[part], self.targets[part])
        except RuntimeError as error:
            if not self._told_in_turn:
                self._told_in_turn = True
                warnings.warn(
                    f"Gradients of examples are made one after the other, which is slower: "
                    f"torch.func.vmap says: {error}",
                    stacklevel=4,
                )
            return otherwise()
        return [made[name] for name in params]

    def _losses(self, indices: Tensor) -> Tensor:
        return self.loss(prediction_of(self.model(self.inputs[indices])), self.targets[indices])

    # ------------------------------------------------------------------ micro-batches

    def _say_if_mixed(self, own: int, count: int) -> None:
        size = self.micro_batch_size or own
        told = self._told_mixing or not self.mixes_examples
        if not told and self.model.training and (size < own or own < count):
            self._told_mixing = True
            warnings.warn(
                f"BatchNorm normalises each pass of {min(size, own)} examples by itself, so the "
                f"gradient is not that of the whole batch of {count}. Use norm=group (GroupNorm), "
                f"or one pass: micro_batch_size=null on one device.",
                stacklevel=2,
            )

    def automatic_size(self) -> int:
        """M in [1, N], by bytes and not by clocks: the same for the same model and data.

        Those of an example are what a forward pass keeps of it for the backward pass, and itself.
        On a GPU, M examples have 1 GB. On CPU they have 4 MB, what caches hold, but are at least
        256 where these have no more than 64 MB. Model and generators stay as they are.
        """
        many = len(self.targets)
        if many < 4:
            return many
        few = torch.arange(4, device=self.targets.device)
        with untouched(self.model):
            kept = _saved(self._losses, few) - _saved(self._losses, few[:2])  # parameters cancel
        row = self.inputs[few[:1]]
        each = max(kept // 2, row.numel() * row.element_size(), 1)
        if self.targets.is_cuda:
            size = _ON_GPU // each
        else:
            size = max(_CACHED // each, min(_LEAST, _RESIDENT // each))
        return min(max(size, 1), many)


def _reduced(
    params: Sequence[Tensor], value: Tensor | None, gradient: list[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """Sum of the ranks' shares, in one reduction.

    The buffer holds J, then for each parameter whether J depends on it, then the gradients.
    """
    like = params[0]
    flags = torch.tensor([g is not None for g in gradient], dtype=like.dtype).to(like.device)
    head = torch.zeros(1).to(like) if value is None else value.reshape(1).to(like)
    parts = [
        (torch.zeros_like(p) if g is None else g).reshape(-1).to(like.dtype)
        for p, g in zip(params, gradient, strict=True)
    ]
    buffer = torch.cat([head, flags, *parts])
    torch.distributed.all_reduce(buffer)
    sums = buffer[1 + len(flags) :].split([p.numel() for p in params])
    return buffer[0], [
        total.view_as(p).to(p.dtype) if depends else None
        for depends, total, p in zip(buffer[1 : 1 + len(flags)].tolist(), sums, params, strict=True)
    ]


def _saved(forward: Callable[[Tensor], Tensor], indices: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    total = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        forward(indices)
    return total


def _not_twice(objective: Objective, reason: str) -> str:
    return (
        f"The Hessian needs a model and a loss that can be differentiated twice. Received: "
        f"{type(objective.model).__name__} with {type(objective.loss).__name__}, where PyTorch "
        f"says: {reason}"
    )
