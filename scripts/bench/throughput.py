"""How fast whole training runs are, against what people would write otherwise.

    python scripts/bench/throughput.py                       # all rows, about ten minutes
    python scripts/bench/throughput.py --only mlp-1,logging --repetitions 3
    python scripts/bench/throughput.py --mnist data/mnist --a9a data/a9a.gz --json throughput.json

Ours is `gdtrain.SupervisedModule` in an ordinary `lightning.Trainer.fit`, with TensorBoard,
`LossCurves` and the command's other callbacks on (checkpoints apart), from a resident data module
that is built outside of the timing. Everything is a ratio in one process: the contenders run in
turn, with as many threads each, and the table holds the medians.

Baselines
    plain Lightning: automatic optimization, `self.log` each step, TensorBoard, progress bar,
    `DataLoader(TensorDataset(X, y), shuffle=True)`, torch.optim.SGD.
    plain torch loop: a permutation, `X[indices]`, zero_grad, backward, torch.optim.SGD.step.
    scikit-learn: SGDClassifier at the same constant η and the same λ, on the same float32 array.
    Both torch baselines run for --seconds after their first update, and their time per update is
    taken for that of a longer run. scikit-learn makes all its passes if they take less than
    --seconds, and else fewer, whose time is multiplied.

Ours is timed by the whole `Trainer.fit`, set-up included, except in the rows that say "after the
first step": compilation is in that step, and is told apart. A first fit comes before all timing;
what Numba and torch.compile keep from former runs makes it shorter.

Softmax regression against ten one-vs-all fits
    The two minimise different things, so "equal training loss" needs a measure for both. Each
    model gives every class a probability: ours the softmax, p_c ∝ exp(s_c); theirs the sigmoid
    q_c = σ(s_c) of each one-vs-all score, and q_c / Σ q for probabilities that add up to one, as
    `predict_proba` has it. Over the training set are taken
        normalised:  mean of −log p_y            (theirs: q_y / Σ q), what ours minimises;
        one-vs-all:  mean of −log q_y − Σ_{c≠y} log(1 − q_c)  (ours: p_c for q_c), what theirs
        minimises.
    The row "at equal loss" times the fewest passes, out of 1, 2, 3, 5, 8, 12, 20, 30, 40, after
    which ours is at or below theirs after 20 passes in both losses.

Data: 60,000 images of 28×28, synthetic (blobs by class, about 19% of the pixels are not zero), or
MNIST. At least 30% of the hidden units' outputs must be positive after training, or the benchmark
stops: kernels that skip dead units would look faster than they are.
"""

from __future__ import annotations

import argparse
import gzip
import math
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import (
    Row,
    alternate,
    environment,
    in_child,
    parser,
    peak_memory,
    report,
    selected,
    use_threads,
)
from contenders import MeanLoss, Timing, fit, plain_lightning, plain_loop, scikit_learn
from numpy.typing import NDArray
from scipy import sparse
from sklearn.datasets import load_svmlight_file
from torch import Tensor, nn
from torch.nn import functional as F

from gdtrain.data import ArrayDataModule
from gdtrain.engines import ENGINES, EngineName
from gdtrain.losses import CrossEntropy, Hinge, Logistic, Loss
from gdtrain.models import CNN, MLP, Linear

PASSES = 20
A9A_PASSES = 100
FIRST = 50_000  # updates that a first fit plans, ended by the clock: too few for a compiler
LEAST_LIVE = 0.3
WEIGHT_DECAY = 1e-4


# ---------------------------------------------------------------------------- data


def synthetic_images(
    n: int, side: int = 28, classes: int = 10, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images whose classes can be learnt: five blobs each, shaken, on black.

    Args:
        n: N.
        side: Height and width.
        classes: C.
        seed: Of everything.

    Returns:
        (N, side²) in [0, 1], about 19% of it above 0, and (N,) classes.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    grid = np.arange(side, dtype=np.float32)
    centres = rng.uniform(0.15, 0.85, (classes, 5, 2)) * side
    images = np.empty((n, side * side), np.float32)
    for first in range(0, n, 4096):
        part = labels[first : first + 4096]
        places = centres[part] + rng.normal(0, side / 12, (len(part), 5, 2))
        blobs = np.exp(-0.5 * ((grid - places[..., None]) * 14 / side) ** 2).astype(np.float32)
        image = np.einsum("mbi,mbj->mij", blobs[:, :, 0], blobs[:, :, 1])
        image = np.minimum(1.3 * image, 1)
        image[image < 0.4] = 0
        images[first : first + 4096] = image.reshape(len(part), -1)
    return images, labels


def mnist(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The training part of MNIST, from IDX files, compressed or not.

    Args:
        folder: Holds train-images-idx3-ubyte and train-labels-idx1-ubyte.

    Returns:
        (60000, 784) in [0, 1], and (60000,) classes.

    Raises:
        FileNotFoundError: It does not.
    """
    images = _idx(folder / "train-images-idx3-ubyte")
    labels = _idx(folder / "train-labels-idx1-ubyte")
    return images.reshape(len(images), -1) / np.float32(255), labels.astype(np.int64)


def _idx(path: Path) -> NDArray[np.uint8]:
    packed = path.with_name(f"{path.name}.gz")
    if packed.is_file():
        content = gzip.decompress(packed.read_bytes())
    elif path.is_file():
        content = path.read_bytes()
    else:
        raise FileNotFoundError(f"There is neither {path} nor {packed}.")
    axes = content[3]
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def synthetic_a9a(
    n: int = 32_561, features: int = 123, ones: int = 14, seed: int = 0
) -> tuple[sparse.csr_matrix, NDArray[np.int64]]:
    """Sparse rows of ones in the shape of a9a, with classes that a linear model can learn.

    Args:
        n: N.
        features: D.
        ones: In each row.
        seed: Of everything.

    Returns:
        (N, D) float32, and (N,) classes 0, 1, about a quarter of them 1.
    """
    rng = np.random.default_rng(seed)
    columns = np.sort(np.argsort(rng.random((n, features)), axis=1)[:, :ones], axis=1)
    weights = rng.normal(0, 1, features)
    scores = weights[columns].sum(1) + rng.logistic(0, 1, n)
    labels = (scores > np.quantile(scores, 0.76)).astype(np.int64)
    x = sparse.csr_matrix(
        (
            np.ones(n * ones, np.float32),
            columns.reshape(-1).astype(np.int32),
            np.arange(0, n * ones + 1, ones, dtype=np.int32),
        ),
        (n, features),
    )
    return x, labels


def a9a(path: Path) -> tuple[sparse.csr_matrix, NDArray[np.int64]]:
    """LIBSVM's file, compressed or not.

    Args:
        path: Of a9a or a9a.gz.

    Returns:
        (N, 123) float32, and (N,) classes 0, 1.
    """
    x, y = load_svmlight_file(str(path), n_features=123, dtype=np.float32)
    x.indices, x.indptr = x.indices.astype(np.int32), x.indptr.astype(np.int32)  # SGDClassifier's
    return x, (y > 0).astype(np.int64)


def resident(x: Any, y: NDArray[Any], batch_size: Any, **options: Any) -> ArrayDataModule:
    """A data module that holds these examples as they are, all of them for training, set up.

    Args:
        x: (N, …), dense or CSR.
        y: (N,).
        batch_size: B, or "full".
        options: More for `ArrayDataModule`.
    """
    data = ArrayDataModule(
        x,
        y,
        batch_size=batch_size,
        val_fraction=0,
        test_fraction=0,
        standardize=False,
        **options,
    )
    data.setup()
    return data


# ---------------------------------------------------------------------------- models


class Scale(nn.Module):
    """A layer that no package knows: each unit times a learnt number.

    Args:
        width: Units.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) to (B, width)."""
        return self.scale * x


def custom_mlp(features: int, classes: int, hidden: int = 128) -> nn.Module:
    """The MLP of the other rows, with a layer of one's own in it."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), Scale(hidden), nn.Linear(hidden, classes)
    )


@torch.no_grad()
def live_share(model: nn.Module, x: Tensor) -> float:
    """Share of the ReLUs' outputs that are positive.

    Args:
        model: Holds `nn.ReLU` modules.
        x: Examples, (n, …).
    """
    shares: list[float] = []
    hooks = [
        module.register_forward_hook(
            lambda _m, _x, out: shares.append(float((out > 0).double().mean()))
        )
        for module in model.modules()
        if isinstance(module, nn.ReLU)
    ]
    model(x.to(next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return sum(shares) / len(shares)


def class_losses(scores: Tensor, y: Tensor, one_vs_all: bool) -> tuple[float, float]:
    """The two losses of a model of C classes (see the head of this file).

    Args:
        scores: (N, C).
        y: (N,).
        one_vs_all: Whether scores are those of C binary models; else softmax's.

    Returns:
        Normalised, one-vs-all.
    """
    s = scores.double()
    if one_vs_all:
        log_q, log_not_q = F.logsigmoid(s), F.logsigmoid(-s)
        log_p = log_q - log_q.logsumexp(1, keepdim=True)
    else:
        log_p = log_q = s.log_softmax(1)
        # log(1 − p_c) as the log of what is left to the other classes: exact for p_c near 1.
        others = s.unsqueeze(1).repeat(1, s.shape[1], 1)
        others.diagonal(dim1=1, dim2=2).fill_(-math.inf)
        log_not_q = others.logsumexp(2) - s.logsumexp(1, keepdim=True)
    own = torch.zeros_like(s, dtype=torch.bool).scatter_(1, y[:, None], True)
    return (
        float(-log_p[own].mean()),
        float(-torch.where(own, log_q, log_not_q).sum(1).mean()),
    )


# ---------------------------------------------------------------------------- rows


@dataclass
class Bench:
    """What all rows share.

    Args:
        x: (N, D) images, float32.
        y: (N,) classes.
        image_shape: Of one image.
        sparse_data: Function that reads or makes a9a.
        repetitions: Alternating.
        seconds: Of one repetition.
        device: Where.
        threads: Of everybody.
        engine: Of every row, in place of the row's own.
        passes: Of the rows against scikit-learn, dense.
        sparse_passes: Of the sparse one.
        say: Told what runs.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    image_shape: tuple[int, int, int]
    sparse_data: Callable[[], tuple[sparse.csr_matrix, NDArray[np.int64]]]
    repetitions: int = 5
    seconds: float = 3.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    engine: EngineName | None = None
    passes: int = PASSES
    sparse_passes: int = A9A_PASSES
    say: Callable[[str], None] = lambda text: None

    @property
    def classes(self) -> int:
        """C."""
        return int(self.y.max()) + 1

    def inputs(self, image: bool = False) -> NDArray[np.float32]:
        """Flat, or as images."""
        return self.x.reshape(-1, *self.image_shape) if image else self.x

    @property
    def widths(self) -> str:
        """Of the MLP, for the name of a row."""
        return f"{self.x.shape[1]}–128–{self.classes}"

    def mlp(self) -> nn.Module:
        """784–128–10, from the same start in all rows."""
        torch.manual_seed(0)
        return MLP((self.x.shape[1],), self.classes)

    def cnn(self) -> nn.Module:
        """The package's small CNN, from the same start in all rows."""
        torch.manual_seed(0)
        return CNN(self.image_shape, self.classes)

    def custom(self) -> nn.Module:
        """The MLP with a layer of one's own."""
        torch.manual_seed(0)
        return custom_mlp(self.x.shape[1], self.classes)


def compare(
    bench: Bench,
    name: str,
    model: nn.Module,
    batch_size: int | str,
    asked: dict[str, float],
    *,
    lr: float,
    momentum: float = 0.0,
    engine: EngineName = "auto",
    image: bool = False,
    whole: bool = True,
    **options: Any,
) -> tuple[list[Row], Timing]:
    """Rows of one model against plain Lightning and a plain loop.

    Args:
        bench: What all rows share.
        name: Of the work.
        model: Where all start.
        batch_size: B, or "full".
        asked: Ratios by baseline, "plain Lightning" and "plain torch loop".
        lr: η.
        momentum: μ.
        engine: Ours.
        image: Whether the model takes images.
        whole: Time the whole fit; else from the end of the first Lightning step.
        options: For the data module.

    Returns:
        The rows, and ours as timed last.
    """
    x, y = bench.inputs(image), bench.y
    size = len(x) if batch_size == "full" else int(batch_size)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    there = tuple(t.to(bench.device) for t in tensors)
    data = resident(x, y, batch_size, **options)
    loss: MeanLoss = F.cross_entropy
    ours = partial(
        fit,
        model,
        CrossEntropy(),
        data,
        lr=lr,
        momentum=momentum,
        engine=bench.engine or engine,
        device=bench.device,
    )
    bench.say(f"{name}: first fit")
    first = ours(updates=FIRST, seconds=bench.seconds / 4)
    updates = planned(bench.seconds, first.per_update, -(-len(x) // size))
    last: list[Timing] = []

    def run_ours() -> float:
        last[:] = [ours(updates=updates)]
        return last[0].whole_per_update if whole else last[0].per_update

    baselines = {
        "plain Lightning": lambda: (
            plain_lightning(
                model,
                loss,
                *tensors,
                batch_size=size,
                lr=lr,
                momentum=momentum,
                seconds=bench.seconds,
                device=bench.device,
            ).per_update
        ),
        "plain torch loop": lambda: (
            plain_loop(
                model,
                loss,
                *there,
                batch_size=size,
                lr=lr,
                momentum=momentum,
                seconds=bench.seconds,
            ).per_update
        ),
    }
    costs = alternate(
        {**{k: baselines[k] for k in asked}, "ours": run_ours},
        bench.repetitions,
        lambda text: bench.say(f"{name}: {text}"),
    )
    note = (
        f"ours: {updates:,} updates, {'whole fit' if whole else 'after the first step'}; set-up "
        f"and first step {first.whole_seconds - first.seconds:.2g} s at the first fit "
        f"(compilation), {last[0].whole_seconds - last[0].seconds:.2g} s later"
    )
    details = {
        "updates": updates,
        "first_step_seconds": first.whole_seconds - first.seconds,
        "later_first_step_seconds": last[0].whole_seconds - last[0].seconds,
        "whole_fit": whole,
        "why_this_engine": last[0].reason,
    }
    rows = [
        Row(name, baseline, costs[baseline], costs["ours"], ratio, "updates/s")
        for baseline, ratio in asked.items()
    ]
    for row in rows:
        row.engine, row.note, row.details = last[0].engine, note, dict(details)
    return rows, last[0]


def planned(seconds: float, per_update: float, per_pass: int) -> int:
    """How many updates ours makes in a repetition: for about that long, whole passes if it can."""
    updates = max(6, round(seconds / per_update))
    return updates if updates < per_pass else math.ceil(updates / per_pass) * per_pass


def check_live(bench: Bench, timing: Timing, rows: Sequence[Row]) -> None:
    """Note how many ReLUs are alive; stop if they are too few."""
    live = live_share(timing.model, torch.from_numpy(bench.x[:2000]))
    for row in rows:
        row.details["live_relus"] = live
    if live < LEAST_LIVE:
        raise ValueError(
            f"Only {live:.0%} of the hidden units' outputs are positive after training, and a "
            f"figure is honest from {LEAST_LIVE:.0%} on: use other data or a smaller η."
        )


def mlp_1(bench: Bench) -> list[Row]:
    rows, timing = compare(
        bench,
        f"MLP {bench.widths}, B = 1",
        bench.mlp(),
        1,
        {"plain Lightning": 100, "plain torch loop": 25},
        lr=0.005,
    )
    check_live(bench, timing, rows)
    return rows


def mlp_1_momentum(bench: Bench) -> list[Row]:
    rows, timing = compare(
        bench,
        "MLP, B = 1, momentum 0.9",
        bench.mlp(),
        1,
        {"plain Lightning": 25},
        lr=0.001,
        momentum=0.9,
    )
    check_live(bench, timing, rows)
    return rows


def cnn_1_compiled(bench: Bench) -> list[Row]:
    return compare(
        bench,
        "CNN, B = 1, any module",
        bench.cnn(),
        1,
        {"plain Lightning": 4},
        lr=0.01,
        engine="compiled",
        image=True,
        whole=False,
    )[0]


def custom_1_compiled(bench: Bench) -> list[Row]:
    rows, timing = compare(
        bench,
        "MLP with a custom layer, B = 1, any module",
        bench.custom(),
        1,
        {"plain Lightning": 15},
        lr=0.01,
        engine="compiled",
        whole=False,
    )
    check_live(bench, timing, rows)
    return rows


def mlp_64(bench: Bench) -> list[Row]:
    return compare(
        bench,
        "MLP, B = 64",
        bench.mlp(),
        64,
        {"plain Lightning": 4, "plain torch loop": 1.6},
        lr=0.1,
    )[0]


def mlp_full(bench: Bench) -> list[Row]:
    rows, _ = compare(
        bench,
        f"MLP, full batch {len(bench.x):,}",
        bench.mlp(),
        "full",
        {"plain Lightning": 3, "plain torch loop": 1},
        lr=0.1,
        micro_batch_size="auto",
        whole=False,
    )
    rows[1].against = "plain torch, resident tensor"
    bench.say("MLP, full batch: memory")
    n = len(bench.x)
    arguments = bench.image_shape, bench.classes, str(bench.device), bench.threads
    theirs, _ = in_child(full_batch_peak, False, n, *arguments)
    peak, micro = in_child(full_batch_peak, True, n, *arguments)
    half, _ = in_child(full_batch_peak, True, n // 2, *arguments)
    memory = Row(
        f"MLP, full batch {n:,}: memory of an update",
        "plain torch, resident tensor",
        [float(theirs)],
        [float(peak)],
        unit="MB",
        engine=rows[0].engine,
        note=f"above the data; ours with M = {micro:,}",
        details={"micro_batch_size": micro},
    )
    bounded = Row(
        f"MLP, full batch {n:,}: memory O(M), not O(N)",
        "half of the examples",
        [float(half)],
        [float(peak)],
        0.8,
        "MB",
        rows[0].engine,
        "0.5× would mean that memory grows with N",
    )
    return [*rows, memory, bounded]


def full_batch_peak(
    ours: bool, n: int, shape: tuple[int, int, int], classes: int, device: str, threads: int
) -> tuple[int, int]:
    """Peak memory of one update from all examples, above the data; in a process of its own.

    Args:
        ours: Else plain torch.
        n: N.
        shape: Of an image.
        classes: C.
        device: Where.
        threads: As everywhere.

    Returns:
        Bytes, at least 1, and M.
    """
    use_threads(threads)
    x, y = synthetic_images(n, shape[1], classes)
    model = MLP((x.shape[1],), classes)
    if ours:
        few = resident(x[:256], y[:256], "full", micro_batch_size=64)
        data = resident(x, y, "full", micro_batch_size="auto")
        size: list[int] = []

        def update(examples: ArrayDataModule = data) -> None:
            made = fit(model, CrossEntropy(), examples, lr=0.1, updates=1, device=device)
            size[:] = [min(made.micro_batch_size or n, n)]

        update(few)  # what is loaded and compiled once is not the update's
        return max(peak_memory(update, device), 1), size[0]
    tensors = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)

    def step(examples: int = n) -> None:
        part = (t[:examples] for t in tensors)
        plain_loop(model, F.cross_entropy, *part, batch_size=examples, lr=0.1, updates=1)

    step(256)
    return max(peak_memory(step, device), 1), n


def cnn_64(bench: Bench) -> list[Row]:
    return compare(
        bench,
        "CNN, B = 64",
        bench.cnn(),
        64,
        {"plain torch loop": 1.1},
        lr=0.05,
        image=True,
        whole=False,
    )[0]


def logging(bench: Bench) -> list[Row]:
    data, model = resident(bench.x, bench.y, 1), bench.mlp()
    ours = partial(
        fit,
        model,
        CrossEntropy(),
        data,
        lr=0.01,
        engine=bench.engine or "auto",
        device=bench.device,
    )
    name = "MLP, B = 1, logged at the default interval"
    bench.say(f"{name}: first fit")
    first = ours(updates=FIRST, seconds=bench.seconds / 4)
    updates = min(planned(3 * bench.seconds, first.per_update, len(bench.x)), 10 * len(bench.x))
    costs = alternate(
        {
            "no logger": lambda: ours(updates=updates, logged=False).whole_per_update,
            "ours": lambda: ours(updates=updates).whole_per_update,
        },
        2 * bench.repetitions,  # a twentieth is little on a machine that does other things too
        lambda text: bench.say(f"{name}: {text}"),
    )
    return [
        Row(
            name,
            "the same without a logger",
            costs["no logger"],
            costs["ours"],
            1 / 1.05,
            engine=first.engine,
            note=f"{updates:,} updates, whole fits: at most 5% slower",
            details={"updates": updates},
        )
    ]


# ---------------------------------------------------------------------------- linear models


def linear(
    bench: Bench,
    name: str,
    x: Any,
    y: NDArray[Any],
    loss: Loss,
    theirs: str,
    *,
    lr: float,
    passes: int,
    asked: float,
    weight_decay: float = WEIGHT_DECAY,
) -> Row:
    """A linear model of two classes, all passes of one example at a time, against scikit-learn.

    Args:
        bench: What all rows share.
        name: Of the work.
        x: (N, D), dense or CSR.
        y: (N,), 0 or 1.
        loss: Ours.
        theirs: scikit-learn's name for it.
        lr: η.
        passes: Over the data.
        asked: The ratio.
        weight_decay: λ.
    """
    torch.manual_seed(0)
    model, data = Linear((x.shape[1],), 1, init="zeros"), resident(x, y, 1)
    ours = partial(
        fit,
        model,
        loss,
        data,
        lr=lr,
        weight_decay=weight_decay,
        engine=bench.engine or "auto",
        device=bench.device,
    )
    baseline = partial(scikit_learn, x, y, loss=theirs, lr=lr, weight_decay=weight_decay)
    bench.say(f"{name}: first fit")
    first = ours(updates=FIRST, seconds=bench.seconds / 4)
    done = fitted_passes(bench, baseline(epochs=1)[0], passes)
    last: list[Timing] = []

    def run_ours() -> float:
        last[:] = [ours(epochs=passes)]
        return last[0].whole_seconds

    costs = alternate(
        {"scikit-learn": lambda: baseline(epochs=done)[0] * passes / done, "ours": run_ours},
        bench.repetitions,
        lambda text: bench.say(f"{name}: {text}"),
    )
    estimator = baseline(epochs=passes)[1]
    scores = torch.from_numpy(estimator.decision_function(x)).reshape(-1, 1)
    losses = (
        float(loss(linear_scores(last[0].model, x), torch.from_numpy(y)).mean()),
        float(loss(scores, torch.from_numpy(y)).mean()),
    )
    return Row(
        name,
        "scikit-learn",
        costs["scikit-learn"],
        costs["ours"],
        asked,
        "s",
        engine=last[0].engine,
        note=(
            f"{passes} passes, {passes * x.shape[0]:,} updates, whole fit; training loss ours "
            f"{losses[0]:.4f}, theirs {losses[1]:.4f}"
            + ("" if done == passes else f"; theirs timed on {done} passes")
        ),
        details={
            "passes": passes,
            "passes_timed_of_baseline": done,
            "training_loss_ours": losses[0],
            "training_loss_theirs": losses[1],
            "first_step_seconds": first.whole_seconds - first.seconds,
        },
    )


def fitted_passes(bench: Bench, one: float, passes: int) -> int:
    """How many passes of scikit-learn are timed, if one takes `one` seconds."""
    return min(passes, max(1, round(bench.seconds / one)))


@torch.no_grad()
def linear_scores(model: nn.Module, x: Any) -> Tensor:
    """W x + b of a linear model, for dense or sparse x; (N, C), float64."""
    weight, bias = (p.detach().cpu().double() for p in model.parameters())
    return torch.from_numpy(np.asarray(x @ weight.numpy().T)) + bias


def logistic(bench: Bench) -> list[Row]:
    return [
        linear(
            bench,
            "logistic regression, B = 1",
            bench.x,
            (bench.y >= bench.classes // 2).astype(np.int64),
            Logistic(),
            "log_loss",
            lr=0.01,
            passes=bench.passes,
            asked=1.5,
        )
    ]


def svm(bench: Bench) -> list[Row]:
    return [
        linear(
            bench,
            "linear SVM, B = 1",
            bench.x,
            (bench.y >= bench.classes // 2).astype(np.int64),
            Hinge(),
            "hinge",
            lr=0.01,
            passes=bench.passes,
            asked=1.5,
        )
    ]


def sparse_logistic(bench: Bench) -> list[Row]:
    x, y = bench.sparse_data()
    row = linear(
        bench,
        "logistic regression on a9a, sparse, B = 1",
        x,
        y,
        Logistic(),
        "log_loss",
        lr=0.01,
        passes=bench.sparse_passes,
        asked=1,
        weight_decay=0.0,
    )
    row.note += (
        "; on sparse input scikit-learn multiplies the updates of the intercept by 0.01, ours does "
        "not"
    )
    return [row]


def softmax(bench: Bench) -> list[Row]:
    name, lr, x, y = "softmax regression, B = 1", 0.01, bench.x, bench.y
    torch.manual_seed(0)
    model, data = Linear((x.shape[1],), bench.classes, init="zeros"), resident(x, y, 1)
    ours = partial(
        fit,
        model,
        CrossEntropy(),
        data,
        lr=lr,
        weight_decay=WEIGHT_DECAY,
        engine=bench.engine or "auto",
        device=bench.device,
    )
    baseline = partial(scikit_learn, x, y, loss="log_loss", lr=lr, weight_decay=WEIGHT_DECAY)
    bench.say(f"{name}: first fits")
    first = ours(updates=FIRST, seconds=bench.seconds / 4)
    estimator = baseline(epochs=bench.passes)[1]
    targets = torch.from_numpy(y)
    theirs = class_losses(torch.from_numpy(estimator.decision_function(x)), targets, True)
    done = fitted_passes(bench, baseline(epochs=1)[0], bench.passes)

    def losses(timing: Timing) -> tuple[float, float]:
        return class_losses(linear_scores(timing.model, x), targets, False)

    full = losses(ours(epochs=bench.passes))
    enough = None
    for passes in (1, 2, 3, 5, 8, 12, 20, 30, 40):
        reached = full if passes == bench.passes else losses(ours(epochs=passes))
        if reached[0] <= theirs[0] and reached[1] <= theirs[1]:
            enough = passes
            break
    contenders = {
        "scikit-learn": lambda: baseline(epochs=done)[0] * bench.passes / done,
        "ours": lambda: ours(epochs=bench.passes).whole_seconds,
    }
    if enough is not None:
        contenders["equal"] = lambda: ours(epochs=enough).whole_seconds
    costs = alternate(contenders, bench.repetitions, lambda text: bench.say(f"{name}: {text}"))
    timed = "" if done == bench.passes else f"; theirs timed on {done} passes"
    said = "normalised {:.4f} and {:.4f}, one-vs-all {:.4f} and {:.4f}"
    details = {
        "theirs_normalised_and_one_vs_all": theirs,
        "passes_timed_of_baseline": done,
        "first_step_seconds": first.whole_seconds - first.seconds,
    }
    rows = [
        Row(
            name,
            "scikit-learn, one-vs-all",
            costs["scikit-learn"],
            costs["ours"],
            5,
            "s",
            first.engine,
            f"{bench.passes} passes, whole fit; training loss ours and theirs: "
            + said.format(full[0], theirs[0], full[1], theirs[1])
            + timed,
            {**details, "ours_normalised_and_one_vs_all": full, "passes": bench.passes},
        )
    ]
    if enough is None:
        rows[
            0
        ].note += (
            "; ours is below theirs in both losses after none of the numbers of passes up to 40"
        )
        return rows
    return [
        *rows,
        Row(
            f"{name}, at equal loss",
            "scikit-learn, one-vs-all",
            costs["scikit-learn"],
            costs["equal"],
            5,
            "s",
            first.engine,
            f"ours after {enough} passes, theirs after {bench.passes}; training loss: "
            + said.format(reached[0], theirs[0], reached[1], theirs[1]),
            {**details, "ours_normalised_and_one_vs_all": reached, "passes": enough},
        ),
    ]


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "mlp-1": mlp_1,
    "mlp-1-momentum": mlp_1_momentum,
    "logistic": logistic,
    "svm": svm,
    "softmax": softmax,
    "a9a": sparse_logistic,
    "cnn-1": cnn_1_compiled,
    "custom-1": custom_1_compiled,
    "mlp-64": mlp_64,
    "mlp-full": mlp_full,
    "cnn-64": cnn_64,
    "logging": logging,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--mnist", type=Path, metavar="FOLDER", help="IDX files, .gz or not")
    options.add_argument("--a9a", type=Path, metavar="FILE", help="LIBSVM's a9a, .gz or not")
    options.add_argument(
        "--engine", choices=("auto", *ENGINES), help="of every row (default: as the row says)"
    )
    given: argparse.Namespace = options.parse_args(arguments)
    names = selected(ROWS, given.only)
    threads = use_threads(given.threads)
    try:
        x, y = synthetic_images(60_000) if given.mnist is None else mnist(given.mnist)
    except FileNotFoundError as error:
        options.error(str(error))
    if given.a9a is not None and not given.a9a.is_file():
        options.error(f"There is no file {given.a9a}.")
    bench = Bench(
        x,
        y,
        (1, 28, 28),
        synthetic_a9a if given.a9a is None else partial(a9a, given.a9a),
        repetitions=given.repetitions,
        seconds=given.seconds,
        device=torch.device(given.device),
        threads=threads,
        engine=given.engine,
        say=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
    )
    rows: list[Row] = []
    try:
        for name in names:
            rows += ROWS[name](bench)
    finally:  # what was measured before an error is shown all the same
        report("Training, ours against baselines", rows, environment(given), given.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
