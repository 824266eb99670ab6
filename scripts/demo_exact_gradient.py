"""How wrong is the gradient that everybody accumulates? Measured on the digits of scikit-learn.

    python scripts/demo_exact_gradient.py         # the tables of docs/exact-gradients.md
    python scripts/demo_exact_gradient.py --json  # all digits

The model is softmax regression in float64; θ is where 100 updates of GD have brought it. N, a
prime, is no multiple of any micro-batch size M, so that the last micro-batch is smaller. Each error
is ‖g − ∇J‖ / ‖∇J‖, where ∇J is the gradient of the mean loss over all examples in one pass. The
two ranks are two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DistributedSampler

from gdtrain import GD
from gdtrain.losses import CrossEntropy
from gdtrain.objective import Objective

N = 1789  # prime; digits has 1797 examples
SIZES = (8, 64, 256, 1000, 1788)
# Examples on each of two ranks. (2, 1): a batch of three.
SPLITS = ((895, 894), (1000, 789), (1788, 1), (2, 1))
ROUNDING = 1e-13


class Problem:
    """J(θ): the mean cross-entropy of softmax regression, and its gradients."""

    def __init__(self, updates: int = 100) -> None:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:N]
        self.x = torch.from_numpy(data.data)[order] / 16
        self.y = torch.from_numpy(data.target)[order]
        self.theta = torch.nn.Parameter(torch.zeros(10, 64, dtype=torch.float64))
        optimizer = GD([self.theta], lr=0.5)
        for _ in range(updates):
            self.theta.grad = self.gradient(torch.arange(N))
            optimizer.step()

    def gradient(self, examples: Tensor) -> Tensor:
        """∇ of the mean loss over some examples, as backward() leaves it for one micro-batch."""
        loss = F.cross_entropy(self.x[examples] @ self.theta.T, self.y[examples])
        return torch.autograd.grad(loss, self.theta)[0]

    def gathered(self, parts: Sequence[Tensor]) -> Tensor:
        """What GD gathers from the parts."""
        optimizer = GD([self.theta], num_samples=sum(len(part) for part in parts))
        for part in parts:
            self.theta.grad = self.gradient(part)
            optimizer.gather(num_samples=len(part))
        assert self.theta.grad is not None
        return self.theta.grad

    def mean_of_means(self, parts: Sequence[Tensor]) -> Tensor:
        """What is accumulated with `(loss / len(parts)).backward()`, or averaged over ranks."""
        return torch.stack([self.gradient(part) for part in parts]).mean(0)


def error(g: Tensor, exact: Tensor) -> float:
    return ((g - exact).norm() / exact.norm()).item()


def micro_batches(problem: Problem) -> list[dict[str, Any]]:
    exact = problem.gradient(torch.arange(N))
    rows = []
    for size in SIZES:
        parts = torch.arange(N).split(size)
        rows.append(
            {
                "M": size,
                "micro-batches": len(parts),
                "last": len(parts[-1]),
                "naive": error(problem.mean_of_means(parts), exact),
                "naive, tail dropped": error(problem.mean_of_means(parts[:-1]), exact),
                "gdtrain": error(problem.gathered(parts), exact),
            }
        )
    return rows


def two_ranks(problem: Problem) -> list[dict[str, Any]]:
    """In two processes that talk through gloo."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (folder, problem.theta.detach()), nprocs=2)
        gradients = torch.load(Path(folder) / "gradients.pt", weights_only=True)
    rows = []
    for split, (averaged, padded, ours) in zip(SPLITS, gradients, strict=True):
        exact = problem.gradient(torch.arange(sum(split)))
        rows.append(
            {
                "rank 0": split[0],
                "rank 1": split[1],
                "mean of means": error(averaged, exact),
                "padded to equal": error(padded, exact),
                "gdtrain": error(ours, exact),
            }
        )
    return rows


def rank_main(rank: int, folder: str, theta: Tensor) -> None:
    """One of the two: PyTorch's DistributedDataParallel, and gdtrain's objective."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    problem = Problem(updates=0)
    model = torch.nn.Linear(64, 10, bias=False, dtype=torch.float64)
    model.weight.data.copy_(theta)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)

    def averaged(examples: Tensor) -> Tensor:
        wrapped.zero_grad()
        F.cross_entropy(wrapped(problem.x[examples]), problem.y[examples]).backward()
        assert model.weight.grad is not None
        return model.weight.grad.clone()

    gradients = []
    for split in SPLITS:
        examples = torch.arange(sum(split))
        sampler = DistributedSampler(examples, num_replicas=2, rank=rank, shuffle=False)
        objective = Objective(model, CrossEntropy(), problem.x, problem.y, rank=rank, ranks=2)
        _, (ours,) = objective.value_and_grad(examples)
        gradients.append(
            (
                averaged(examples.split(list(split))[rank]),
                averaged(torch.tensor(list(sampler))),
                ours,
            )
        )
    if rank == 0:
        torch.save(gradients, Path(folder) / "gradients.pt")
    store.add("done", 1)
    while store.add("done", 0) < 2:  # a rank that left early would break the other's connection
        time.sleep(0.01)
    os._exit(0)  # gloo's threads do not always survive an interpreter's tidy end


def shown(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.1e}" if value > ROUNDING else f"< {ROUNDING:.0e}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([shown(v) for v in r.values()] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The error of the accumulated gradient.")
    parser.add_argument("--json", action="store_true", help="print numbers instead of tables")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)  # the matrices are small
    problem = Problem()
    tables = {"micro-batches": micro_batches(problem), "two ranks": two_ranks(problem)}
    print(json.dumps(tables) if as_json else "\n\n".join(table(rows) for rows in tables.values()))


if __name__ == "__main__":
    main()
