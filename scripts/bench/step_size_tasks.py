"""Tasks on which step-size rules are compared: drawn at random, each kind in turn.

N examples, D features (or tokens) of each, B examples per update, T updates. `tasks` draws sizes,
momentum and weight decay; a task's own number draws its data, the widths of its network and what
else its kind leaves open. Initial weights and the order of the examples follow the seed of a run.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from sklearn import datasets
from torch import Tensor, nn

from gdtrain.losses import CrossEntropy, Hinge, Huber, Logistic, Loss, SquaredError
from gdtrain.models import CNN, MLP, Linear

WORK = 6e8  # multiplications of one run's forward passes, at most
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
VOCABULARY, USERS = 40, 30  # tokens; users, and as many items


@dataclass(frozen=True)
class Kind:
    """What is learnt by what.

    Args:
        name: Family first.
        x: The inputs, see `_features` and `_tokens`; or an embedded data set.
        y: The targets, see `_targets`; "own": of the data set.
        loss: Of the run.
        net: "linear", or see `_network`.
        examples: Range of N.
        features: Range of D.
        work: Multiplications per example.
        updates: The largest T.
        batch: The smallest B.
    """

    name: str
    x: str
    y: str
    loss: type[Loss]
    net: str = "linear"
    examples: tuple[int, int] = (150, 2000)
    features: tuple[int, int] = (5, 60)
    work: int = 300
    updates: int = 6000
    batch: int = 1


@dataclass(frozen=True)
class Task:
    """One kind, with its sizes; `kind` and `number` name the data, the rest what a run does."""

    place: int
    kind: str
    number: int
    examples: int
    features: int
    batch_size: int | Literal["full"]
    passes: int
    momentum: float
    nesterov: bool
    weight_decay: float

    @property
    def name(self) -> str:
        """For tables."""
        size = "N" if self.batch_size == "full" else self.batch_size
        return (
            f"{self.place:03d} {self.kind}, N={self.examples}, D={self.features}, B={size}, "
            f"{self.passes} passes, μ={self.momentum:g}{' Nesterov' if self.nesterov else ''}, "
            f"λ={self.weight_decay:g}"
        )

    @property
    def key(self) -> str:
        """Names its results in a file."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def per_update(self) -> int:
        """B, a number."""
        return self.examples if self.batch_size == "full" else self.batch_size

    @property
    def updates(self) -> int:
        """T."""
        return self.passes * -(-self.examples // self.per_update)

    @property
    def is_linear(self) -> bool:
        """Whether f* is worth looking for."""
        return KINDS[self.kind].net == "linear"

    def build(self, seed: int) -> Problem:
        """The data, and a model with the initial weights of a seed."""
        inputs, targets, outputs = _examples(self)
        kind = KINDS[self.kind]
        torch.manual_seed(seed)
        own = np.random.default_rng([self.number, 1])
        shape = (1, 8, 8) if kind.net in _IMAGES else tuple(inputs.shape[1:])
        return Problem(inputs, targets, _network(kind.net, own, shape, outputs), kind.loss())


@dataclass(frozen=True)
class Problem:
    """What is learnt: (N, …) inputs and targets, a model with its initial weights, a loss."""

    inputs: Tensor
    targets: Tensor
    model: nn.Module
    loss: Loss


# ---------------------------------------------------------------------------- kinds

_BIG: dict[str, Any] = {"examples": (100_000, 100_000), "features": (5, 20), "batch": 32}
_MLP: dict[str, Any] = {"examples": (200, 1500), "work": 4000, "updates": 3000}
_CONV: dict[str, Any] = {"examples": (128, 400), "work": 50_000, "updates": 300, "batch": 8}
_DEAR = {**_CONV, "work": 150_000}

_LINEAR = [
    Kind("least squares", "plain", "numbers", SquaredError),
    Kind("least squares, correlated", "correlated", "numbers", SquaredError),
    Kind("least squares, heavy features", "heavy", "numbers", SquaredError),
    Kind("least squares, heavy noise", "plain", "heavy noise", SquaredError),
    Kind("least squares, huge targets", "plain", "huge targets", SquaredError),
    Kind("least squares, uncentred", "uncentred", "numbers", SquaredError),
    Kind("least squares, raw scales", "raw scales", "numbers", SquaredError),
    Kind("least squares, low rank", "low rank", "numbers", SquaredError),
    Kind("least squares, one-hot", "one-hot", "numbers", SquaredError),
    Kind("least squares, diabetes", "diabetes", "own", SquaredError, features=(10, 10)),
    Kind("least squares, many", "correlated", "numbers", SquaredError, **_BIG),
    Kind("least squares, few", "plain", "numbers", SquaredError, examples=(25, 40)),
    Kind("huber, huge targets", "plain", "huge targets", Huber),
    Kind("huber, heavy noise", "correlated", "heavy noise", Huber),
    Kind("logistic, separable", "plain", "separable", Logistic),
    Kind("logistic, flipped", "plain", "flipped", Logistic),
    Kind("logistic, rare class", "plain", "rare class", Logistic),
    Kind("logistic, one-hot", "one-hot", "two", Logistic),
    Kind("logistic, heavy features", "heavy", "two", Logistic),
    Kind("logistic, raw scales", "raw scales", "two", Logistic),
    Kind("logistic, breast cancer", "breast_cancer", "own", Logistic, features=(30, 30)),
    Kind("logistic, many", "correlated", "flipped", Logistic, **_BIG),
    Kind("logistic, few", "plain", "flipped", Logistic, examples=(25, 40)),
    Kind("softmax, digits", "digits", "own", CrossEntropy, features=(64, 64), work=640),
    Kind("softmax, wine", "wine", "own", CrossEntropy, features=(13, 13)),
    Kind("softmax, correlated", "correlated", "several", CrossEntropy),
    Kind("softmax, rare classes", "plain", "rare classes", CrossEntropy),
    Kind("softmax, uncentred", "uncentred", "several", CrossEntropy),
    Kind("softmax, clusters", "clusters", "own", CrossEntropy, features=(20, 40)),
    Kind("hinge, breast cancer", "breast_cancer", "own", Hinge, features=(30, 30)),
    Kind("hinge, flipped", "plain", "flipped", Hinge),
    Kind("hinge, low rank", "low rank", "two", Hinge),
]
_NETS = [
    Kind("MLP relu, digits", "digits", "own", CrossEntropy, "relu", features=(64, 64), **_MLP),
    Kind("MLP tanh, digits", "digits", "own", CrossEntropy, "tanh", features=(64, 64), **_MLP),
    Kind("MLP deep", "plain", "teacher", SquaredError, "deep", **_MLP),
    Kind("MLP deep, classes", "clusters", "own", CrossEntropy, "deep", features=(20, 40), **_MLP),
    Kind("MLP narrow", "plain", "teacher", SquaredError, "narrow", **{**_MLP, "work": 800}),
    Kind("MLP wide", "plain", "teacher classes", CrossEntropy, "wide", **{**_MLP, "work": 9000}),
    Kind("MLP sigmoid", "plain", "teacher", SquaredError, "sigmoid", **_MLP),
    Kind("MLP gelu", "heavy", "teacher classes", CrossEntropy, "gelu", **_MLP),
    Kind("MLP BatchNorm", "plain", "teacher classes", CrossEntropy, "batch",
         **{**_MLP, "batch": 8}),
    Kind("MLP LayerNorm", "raw scales", "teacher", SquaredError, "layer", **_MLP),
    Kind("MLP relu, diabetes", "diabetes", "own", SquaredError, "relu", features=(10, 10), **_MLP),
    Kind("MLP tanh, breast cancer", "breast_cancer", "own", Logistic, "tanh",
         features=(30, 30), **_MLP),
    Kind("MLP relu, few", "plain", "flipped", CrossEntropy, "relu",
         **{**_MLP, "examples": (25, 40)}),
    Kind("MLP relu, huge targets", "plain", "huge targets", SquaredError, "relu", **_MLP),
    Kind("MLP relu, rare class", "plain", "rare class", CrossEntropy, "relu", **_MLP),
    Kind("CNN, digits", "digits", "own", CrossEntropy, "cnn", features=(64, 64), **_CONV),
    Kind("CNN, shapes", "shapes", "own", CrossEntropy, "cnn", features=(64, 64), **_CONV),
    Kind("ResNet, digits", "digits", "own", CrossEntropy, "resnet", features=(64, 64), **_DEAR),
    Kind("ResNet BatchNorm, shapes", "shapes", "own", CrossEntropy, "resnet batch",
         features=(64, 64), **_DEAR),
    Kind("attention", "sequences", "own", CrossEntropy, "attention", features=(6, 12),
         **{**_CONV, "examples": (200, 800), "work": 60_000}),
    Kind("text", "bags", "own", CrossEntropy, "text", features=(8, 16), **{**_MLP, "work": 1000}),
    Kind("autoencoder", "low rank", "inputs", SquaredError, "autoencoder",
         features=(16, 32), **_MLP),
    Kind("matrix factorisation", "ratings", "own", SquaredError, "factors", features=(2, 2),
         **{**_MLP, "work": 1000}),
]  # fmt: skip
KINDS = {kind.name: kind for kind in (*_LINEAR, *_NETS)}
_SIZES = {"digits": 1797, "wine": 178, "breast_cancer": 569, "diabetes": 442}
_IMAGES = ("cnn", "resnet", "resnet batch")


def tasks(seed: int, count: int = 120) -> list[Task]:
    """So many tasks, 55% linear and a quarter on the full batch, all kinds as often as they go.

    Args:
        seed: Of all that is drawn.
        count: How many.

    Example:
        >>> drawn = tasks(0, 40)
        >>> sum(task.is_linear for task in drawn), sum(t.batch_size == "full" for t in drawn)
        (22, 10)
    """
    rng = np.random.default_rng(seed)
    linear = round(0.55 * count)
    made: list[Task] = []
    for kinds, share in ((_LINEAR, linear), (_NETS, count - linear)):
        drawn = _deck(rng, kinds, share)
        full = set(rng.permutation(share)[: round(share / 4)].tolist())
        sizes = _deck(rng, BATCHES, share)
        momenta = _deck(rng, [(0.0, False)] * 3 + [(0.5, False), (0.9, False), (0.9, True)], share)
        decays = _deck(rng, [0.0, 0.0, 1e-4, 1e-3, 1e-2], share)
        for i, kind in enumerate(drawn):
            n, d, size, passes = _sizes(rng, kind, "full" if i in full else sizes[i])
            number, (momentum, nesterov) = int(rng.integers(2**31)), momenta[i]
            sized = Task(
                len(made), kind.name, number, n, d, size, passes, momentum, nesterov, decays[i]
            )
            made.append(sized)
    return made


def _deck(rng: Generator, cards: Any, count: int) -> list[Any]:
    """Each card as often as it goes, in a random order."""
    order: list[int] = []
    while len(order) < count:
        order += rng.permutation(len(cards)).tolist()
    return [cards[i] for i in order[:count]]


def _sizes(rng: Generator, kind: Kind, size: Any) -> tuple[int, int, Any, int]:
    """N, D, B and passes, such that a run is long enough, and not too dear."""

    def between(low: float, high: float) -> int:
        return round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))

    n, d = between(*kind.examples), between(*kind.features)
    n = min(n, _SIZES.get(kind.x, n))
    most = int(WORK / (kind.work if kind.net != "linear" else max(kind.work, 4 * d)))
    if size == "full":
        n = min(n, most // 50)
        return n, d, size, max(50, min(between(50, 400), most // n))
    while size > n // 2 or (size < 512 and size < kind.batch):
        size = size // 2 if size > n // 2 else size * 2
    n = min(n, most, kind.updates * size)
    n -= kind.batch > 1 and n % size == 1  # BatchNorm refuses a batch of one
    per_pass = -(-n // size)
    passes = between(1, 5) if rng.random() < 0.3 or n > 50_000 else between(5, 40)
    return n, d, size, max(1, -(-20 // per_pass), min(passes, kind.updates // per_pass, most // n))


# ---------------------------------------------------------------------------- data

_RAW = ("uncentred", "raw scales", "one-hot")  # left as they are


@functools.lru_cache(maxsize=4)
def _examples(task: Task) -> tuple[Tensor, Tensor, int]:
    """Inputs, targets, and how many outputs they need."""
    kind = KINDS[task.kind]
    rng, n, d = np.random.default_rng(task.number), task.examples, task.features
    y: Any = None
    if kind.x in _WITH_TARGETS:
        x, y = _WITH_TARGETS[kind.x](rng, n, d)
    elif kind.y == "own":
        x, y = getattr(datasets, f"load_{kind.x}")(return_X_y=True)
        rows = rng.permutation(len(x))[:n]
        x, y = x[rows], y[rows]
    else:
        x = _features(kind.x, rng, n, d)
    if np.issubdtype(x.dtype, np.floating):
        sound = _standard(x)
        x = x if kind.x in _RAW else sound
        y = _targets(kind.y, rng, sound) if y is None else y
    if kind.net in _IMAGES:
        x = x.reshape(n, 1, 8, 8)
    inputs = torch.as_tensor(x, dtype=None if x.dtype == np.int64 else torch.float32)
    if np.issubdtype(y.dtype, np.integer):
        classes = max(int(y.max()) + 1, 2)
        return inputs, torch.as_tensor(y, dtype=torch.int64), kind.loss().outputs(classes)
    y = _standard(y)
    outputs = 1 if y.ndim == 1 else y.shape[1]
    return inputs, torch.as_tensor(y, dtype=torch.float32), outputs


def _standard(x: Any) -> Any:
    """Mean 0 and deviation 1; a column that is constant stays 0."""
    deviation = x.std(0)
    return (x - x.mean(0)) / np.where(deviation > 1e-9, deviation, 1.0)


def _features(how: str, rng: Generator, n: int, d: int) -> Any:
    x = rng.standard_normal((n, d))
    if how == "correlated":
        spectrum = np.arange(1, d + 1) ** -rng.uniform(0.5, 1.5)
        return x * spectrum @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    if how == "heavy":
        return rng.standard_t(rng.uniform(1.5, 3), (n, d))
    if how == "uncentred":
        return x + rng.uniform(-1, 1, d) * rng.uniform(1, 6)
    if how == "raw scales":
        return x * 10 ** (rng.uniform(-1, 1, d) * rng.uniform(0.5, 1))
    if how == "low rank":
        rank = max(2, d // int(rng.integers(2, 6)))
        return x[:, :rank] @ rng.standard_normal((rank, d))
    if how == "one-hot":
        columns = max(1, d // 8)
        level = rng.zipf(1.5, (n, columns)) % 8
        return np.eye(8)[level].reshape(n, -1)
    return x


def _targets(how: str, rng: Generator, x: Any) -> Any:
    n, d = x.shape
    if how == "inputs":
        return x
    if how.startswith("teacher"):
        outputs = int(rng.integers(3, 7)) if how == "teacher classes" else 1
        hidden = np.tanh(x @ rng.standard_normal((d, 10)) * 1.5 / np.sqrt(d))
        score = hidden @ rng.standard_normal((10, outputs))
        noise = rng.uniform(0, 0.3) * rng.standard_normal(score.shape)
        return (score + noise).argmax(1) if outputs > 1 else (score + noise)[:, 0]
    classes = int(rng.integers(3, 9)) if how in ("several", "rare classes") else 1
    score = x @ rng.standard_normal((d, classes)) / np.sqrt(d)
    if classes > 1:
        score += rng.gumbel(size=score.shape) * rng.uniform(0.05, 0.5)
        return (score - (np.arange(classes) if how == "rare classes" else 0)).argmax(1)
    score = score[:, 0]
    if how == "numbers":
        return score + rng.uniform(0.02, 1) * rng.standard_normal(n)
    if how == "heavy noise":
        return score + 0.3 * rng.standard_t(rng.uniform(1.2, 2.5), n)
    if how == "huge targets":
        rare = rng.random(n) < rng.uniform(0.005, 0.03)
        return score + 0.1 * rng.standard_normal(n) + rare * rng.uniform(-1, 1, n) * 50
    if how != "separable":
        score = score + rng.uniform(0.1, 1) * rng.logistic(size=n) * 0.5
    bound = np.quantile(score, 1 - rng.uniform(0.02, 0.06)) if how == "rare class" else 0
    flipped = (rng.random(n) < rng.uniform(0.05, 0.3)) & (how == "flipped")
    return ((score > bound) ^ flipped).astype(int)


def _clusters(rng: Generator, n: int, d: int) -> tuple[Any, Any]:
    return datasets.make_classification(
        n, d, n_informative=8, n_classes=int(rng.integers(2, 7)), flip_y=rng.uniform(0, 0.2),
        class_sep=rng.uniform(0.5, 2), random_state=int(rng.integers(2**31)),
    )  # fmt: skip


def _shapes(rng: Generator, n: int, d: int) -> tuple[Any, Any]:
    """Noisy 8 × 8 images of patterns that are shifted."""
    classes = int(rng.integers(3, 7))
    patterns = rng.standard_normal((classes, 8, 8)) * (rng.random((classes, 8, 8)) < 0.3)
    y = rng.integers(0, classes, n)
    shifts = rng.integers(0, 3, (n, 2))
    x = [np.roll(patterns[c], s, (0, 1)) for c, s in zip(y, shifts, strict=True)]
    return np.stack(x).reshape(n, 64) + rng.uniform(0.1, 0.6) * rng.standard_normal((n, 64)), y


def _sequences(rng: Generator, n: int, d: int) -> tuple[Any, Any]:
    """Tokens; the class is that of the token that stands behind the first marker (token 0)."""
    x = rng.integers(1, VOCABULARY, (n, d))
    place = rng.integers(0, d - 1, n)
    x[np.arange(n), place] = 0
    return x, x[np.arange(n), place + 1] % int(rng.integers(2, 5))


def _bags(rng: Generator, n: int, d: int) -> tuple[Any, Any]:
    """Words of one of some topics, rare words of all."""
    topics = int(rng.integers(2, 6))
    words = rng.dirichlet(np.full(VOCABULARY, rng.uniform(0.1, 1)), topics)
    y = rng.integers(0, topics, n)
    return np.stack([rng.choice(VOCABULARY, d, p=words[c]) for c in y]), y


def _ratings(rng: Generator, n: int, d: int) -> tuple[Any, Any]:
    """Users and items, some of them popular, and what they say."""
    x = (rng.zipf(1.3, (n, 2)) - 1) % USERS
    a, b = rng.standard_normal((2, USERS, 3))
    y = (a[x[:, 0]] * b[x[:, 1]]).sum(1) + rng.uniform(0.1, 1) * rng.standard_normal(n)
    return x.astype(np.int64), y


_WITH_TARGETS: dict[str, Callable[[Generator, int, int], tuple[Any, Any]]] = {
    "clusters": _clusters,
    "shapes": _shapes,
    "sequences": _sequences,
    "bags": _bags,
    "ratings": _ratings,
}

# ---------------------------------------------------------------------------- networks


class Residual(nn.Module):
    """x + conv(relu(conv(x))), with BatchNorm or without."""

    def __init__(self, channels: int, norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=not norm)]
            layers += [nn.BatchNorm2d(channels, track_running_stats=False)] if norm else []
            layers += [nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 8, 8) to the same."""
        return torch.relu(x + self.layers(x))


class Attention(nn.Module):
    """One encoder layer on tokens (B, D): attention, an MLP, and the mean over places."""

    def __init__(self, places: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(0.1 * torch.randn(places, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, D) to (B, C)."""
        x = self.embedding(tokens) + self.place
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)
        return self.head((x + self.mlp(self.second(x))).mean(1))


class Text(nn.Module):
    """The mean of the tokens' vectors, and a linear layer."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, D) to (B, C)."""
        return self.head(self.embedding(tokens).mean(1))


class Factors(nn.Module):
    """⟨a_user, b_item⟩ + c_item of (B, 2) numbers."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, rank), nn.Embedding(USERS, rank + 1)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, pairs: Tensor) -> Tensor:
        """(B, 2) to (B, 1)."""
        item = self.item(pairs[:, 1])
        return (self.user(pairs[:, 0]) * item[:, 1:]).sum(1, keepdim=True) + item[:, :1]


def _network(how: str, rng: Generator, shape: tuple[int, ...], outputs: int) -> nn.Module:
    if how == "linear":
        return Linear(shape, outputs)
    if how in ("relu", "tanh", "sigmoid", "gelu"):
        hidden = [int(rng.integers(16, 49))] * int(rng.integers(1, 3))
        return MLP(shape, outputs, hidden=hidden, activation=how)  # type: ignore[arg-type]
    if how in ("deep", "narrow", "wide"):
        hidden = {"deep": [16] * 6, "narrow": [4, 4], "wide": [256]}[how]
        return MLP(shape, outputs, hidden=hidden, activation=("relu", "tanh")[rng.integers(2)])
    if how in ("batch", "layer"):
        width, layers = 32, [nn.Linear(shape[0], 32)]
        for i in range(2):
            norm = (
                nn.LayerNorm(width)
                if how == "layer"
                else nn.BatchNorm1d(width, track_running_stats=False)
            )
            layers += [norm, nn.ReLU(), nn.Linear(width, outputs if i else width)]  # type: ignore[list-item]
        return nn.Sequential(*layers)
    if how == "cnn":
        return CNN(shape, outputs, channels=[8, 16])
    if how.startswith("resnet"):
        blocks = [Residual(8, how.endswith("batch")) for _ in range(2)]
        ends = nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, outputs)
        return nn.Sequential(ends[0], nn.ReLU(), *blocks, *ends[1:])
    if how == "attention":
        return Attention(shape[0], 16, outputs)
    if how == "text":
        return Text(16, outputs)
    if how == "factors":
        return Factors(int(rng.integers(2, 6)))
    assert how == "autoencoder"
    return MLP(shape, outputs, hidden=[24, int(rng.integers(2, 8)), 24], activation="tanh")
