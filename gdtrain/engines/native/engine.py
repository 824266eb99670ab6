"""Sweeps of linear models and MLPs on CPU, forward, backward and update written by hand.

N examples, D features, K updates in the sweep, B examples per update, L layers.

- B = 1: loops over one example at a time (`gdtrain.engines.native.dense`);
- B > 1: matrix products (`gdtrain.engines.native.matrix`);
- sparse inputs of a linear model: loops over the non-zeros (`gdtrain.engines.native.sparse`).

These three are imported where they are first used: Numba takes its time.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.data.sparse import SparseInputs
from gdtrain.engines.engine import (
    NotApplicableError,
    check_hooks,
    in_stretches,
    rates_by_schedule,
    single_threaded,
)
from gdtrain.engines.native.arguments import Arguments, has_kernel
from gdtrain.losses import Loss
from gdtrain.models.structure import NotDenseError, dense_layers
from gdtrain.objective import Objective
from gdtrain.optim.protocol import gathers, own_rule, step_size_of, update_rules

__all__ = ["Native"]


class Native:
    """Makes K updates, as `gdtrain.engines.engine.Engine` says, without autograd.

    It takes linear models and MLPs in float32 or float64 with SGD, GD, MiniBatchSGD or
    torch.optim.SGD, on CPU; gdtrain's losses and activations, and others that bring a kernel.

    Raises:
        NotApplicableError: The model, loss, optimizer or data is something else.

    Example:
        >>> Native.name  # it is called as `Eager` is
        'native'
    """

    name: ClassVar[str] = "native"

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer
        try:
            layers = dense_layers(objective.model)
        except NotDenseError as error:
            raise NotApplicableError(str(error)) from None
        if any(layer.dropout is not None for layer in layers):
            raise NotApplicableError("the model has dropout")
        for layer in layers:
            if not has_kernel(layer.activation):
                raise NotApplicableError(
                    f"{type(layer.activation).__name__} is no activation of gdtrain's, and has no "
                    f"native kernel"
                )
        check_hooks(objective, optimizer)
        loss = objective.loss
        if not isinstance(loss, Loss) or not has_kernel(loss):
            raise NotApplicableError(
                f"{type(loss).__name__} is no loss of gdtrain's, and has no native kernel"
            )
        if update_rules(optimizer) is None:
            others = "eager" if own_rule(optimizer) is None else "eager and compiled"
            raise NotApplicableError(
                f"the native engine has the rule of SGD, GD, MiniBatchSGD and torch.optim.SGD "
                f"alone; that of {type(optimizer).__name__} is for engine={others}"
            )
        if gathers(optimizer):
            raise NotApplicableError("the optimizer gathers micro-batches by itself")
        if torch.is_autocast_enabled("cpu"):
            raise NotApplicableError("it computes in one precision only (trainer.precision=32)")
        self._arguments = Arguments(objective, optimizer, layers)
        self._check_tensors()
        self.rates = torch.zeros(0, dtype=torch.float64)
        self.evaluations = 0
        rule = step_size_of(optimizer)
        self._rule_sees_more = rule is not None and self._arguments.bounded is None
        self._is_sparse = isinstance(objective.inputs, SparseInputs)
        if self._rule_sees_more and self._is_sparse:
            raise NotApplicableError(
                f"on sparse inputs, {type(rule).__name__} needs the gradient as a whole"
            )

    def _check_tensors(self) -> None:
        arguments, inputs = self._arguments, self.objective.inputs
        owned = {p for group in self.optimizer.param_groups for p in group["params"]}
        if owned != set(arguments.parameters) or len(owned) != len(self.objective.params):
            raise NotApplicableError("the optimizer does not have all parameters of the model")
        dtype = arguments.dtype
        if dtype not in (torch.float32, torch.float64):
            raise NotApplicableError(f"the parameters are {dtype}")
        for p in arguments.parameters:
            if p.device.type != "cpu" or p.dtype != dtype or p.layout != torch.strided:
                raise NotApplicableError("the parameters are not on CPU, in one precision")
        if isinstance(inputs, SparseInputs):
            if len(arguments.layers) > 1:
                raise NotApplicableError("sparse inputs of a network with hidden layers")
            if torch.from_numpy(inputs.values).dtype != dtype:
                raise NotApplicableError("inputs and parameters have different precisions")
        else:
            example = inputs[:1]
            if example.dtype != dtype or example.device.type != "cpu":
                raise NotApplicableError(
                    "inputs are not on CPU, in the precision of the parameters"
                )
            if example.numel() != arguments.layers[0].linear.in_features:
                raise NotApplicableError("the first layer is applied to a part of an example")

    def __call__(self, indices: Tensor, factors: Tensor, draw: int = 0) -> Tensor:
        """(K, B) example numbers and (K,) factors to (K,) losses, as in `Engine`; draws nothing."""
        arguments, batch = self._arguments, indices.shape[1]
        for p in arguments.parameters:
            p.grad = None
        weights = sum(layer.linear.weight.numel() for layer in arguments.layers)
        with torch.no_grad(), single_threaded(batch * weights):
            if self._rule_sees_more:
                made: Tensor = self._by_rule(indices, factors)
                self.rates = torch.tensor(self._by_rule.rates, dtype=torch.float64)
                self.evaluations = self._by_rule.evaluations
            else:
                loops = (
                    self._sparse if self._is_sparse else self._dense if batch == 1 else self._matrix
                )
                made, shares = in_stretches(loops, self.optimizer, indices, factors)
                self.rates = rates_by_schedule(self.optimizer, factors) * shares
        if len(factors):
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * float(factors[-1])
        return made

    @cached_property
    def _dense(self) -> Any:
        from gdtrain.engines.native.dense import Dense

        return Dense(self._arguments)

    @cached_property
    def _matrix(self) -> Any:
        from gdtrain.engines.native.matrix import Matrix

        return Matrix(self._arguments)

    @cached_property
    def _by_rule(self) -> Any:
        from gdtrain.engines.native.matrix import ByRule

        return ByRule(self._arguments)

    @cached_property
    def _sparse(self) -> Any:
        from gdtrain.engines.native.sparse import Sparse

        return Sparse(self._arguments)
