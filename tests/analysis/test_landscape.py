"""The landscape: numbers against float64 loops and NumPy, what is put back, what a user reads."""

import copy
import importlib.util
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from sklearn.decomposition import PCA
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from gdtrain import cli
from gdtrain.analysis.landscape import Landscape, directions
from gdtrain.analysis.landscape_figure import Grid, Line, save
from gdtrain.analysis.surface import Surface
from gdtrain.analysis.trajectory import Snapshots, plane_of
from gdtrain.cli import tools
from gdtrain.losses import CrossEntropy, Hinge, Logistic, SquaredError
from gdtrain.models import MLP, Linear
from gdtrain.objective import Objective
from gdtrain.runs.checkpoints import find_checkpoint
from gdtrain.runs.configuration import conf_directory
from gdtrain.runs.tools import landscape
from gdtrain.runs.train import train

ROOT = Path(__file__).parent.parent.parent
PNG = b"\x89PNG"


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Odd(nn.Module):
    """A convolution, both kinds of norm, dropout, a frozen layer and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)
        self.batch = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.norm = nn.LayerNorm(12)
        self.last = nn.Linear(12, 3)

    def forward(self, x):
        x = self.drop(torch.tanh(self.batch(self.conv(x)))).flatten(1)
        return self.last(self.norm(self.frozen(x)))


def odd():
    torch.manual_seed(0)
    model = Odd()
    model.batch.running_mean.fill_(0.1)
    nn.init.normal_(model.norm.weight)
    x, y = torch.randn(20, 1, 3, 3), torch.randint(0, 3, (20,))
    return model, Objective(model, CrossEntropy(), x, y)


# ------------------------------------------------------------------ directions


def test_each_filter_of_a_direction_is_as_long_as_that_of_the_weights_and_the_rest_is_0():
    model, _ = odd()
    d, e = directions(model, 2, seed=3)
    trained = [(n, p.detach()) for n, p in model.named_parameters() if p.requires_grad]
    parts = dict(
        zip([n for n, _ in trained], d.split([p.numel() for _, p in trained]), strict=True)
    )
    assert set(parts) == {f"{m}.{k}" for m in ("conv", "batch", "norm", "last")
                          for k in ("weight", "bias")}  # fmt: skip
    for name, weights in trained:
        part = parts[name].view(weights.shape)
        if name in ("conv.weight", "last.weight"):
            for own, filter_ in zip(part, weights, strict=True):
                assert float(own.norm()) == pytest.approx(float(filter_.norm()), rel=1e-5)
        else:
            assert not part.any()
    assert abs(float(d @ e)) < 0.5 * float(d.norm() * e.norm())
    assert torch.equal(d, directions(model, 1, seed=3)[0])
    assert not torch.equal(d, directions(model, 1, seed=4)[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_a_transposed_convolution_lead_to_its_outputs(groups):
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    (d,) = directions(model, count=1)
    for tensor in (d.view(model.weight.shape),):
        for out in range(6):
            group, place = divmod(out, 6 // groups)
            rows = slice(group * 4 // groups, (group + 1) * 4 // groups)
            own = model.weight.detach()[rows, place].norm()
            assert tensor[rows, place].norm() == pytest.approx(float(own), rel=1e-5)


def test_buffers_and_generators_are_put_back_and_values_repeat():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.norm = nn.BatchNorm1d(2, track_running_stats=False)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return self.norm(self.linear(x)) + 0.1 * torch.rand(len(x), 2)

    torch.manual_seed(0)
    model = Counts()
    landscape = Landscape(Objective(model, SquaredError(), torch.randn(5, 3), torch.randn(5, 2)))
    before = torch.get_rng_state()
    here = landscape.position
    assert len({landscape.value(), landscape.value(), *landscape.values([here, here])}) == 1
    assert model.count == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_path_starts_at_the_left():
    plane = plane_of([[-1.0, 0.0, 0.1], [3.0, 0.0, 0.0]], [0.0, 0.0, 0.0])
    assert plane.coordinates[0, 0] < 0


def test_without_a_weight_there_is_no_length_for_a_direction():
    model = Linear((3,), 2, init="zeros")
    with pytest.raises(ValueError, match=r"as long as the weights.*Received: a model without"):
        directions(model)


# ------------------------------------------------------------------ values


def test_values_are_those_of_a_loop_in_float64_and_everything_is_put_back():
    model, objective = odd()
    decay = [0.1, 0.0, 0.0, 0.0, 0.0, 0.2, 0.3, 0.0]  # of conv, batch, norm, last
    made = Landscape(objective, weight_decay=decay, examples=12, seed=5)
    assert len(set(made.indices.tolist())) == 12
    assert made.said == (
        "J over 12 of 20 training examples, weight decay 0.1, 0.2, 0.3, evaluation mode"
    )
    before = copy.deepcopy(model.state_dict())
    grid = made.slice_2d(span=0.8, points=5)
    line = made.slice_1d(lines=1, span=0.8, points=5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert model.drop.training
    d, e = (v.double() for v in directions(model, 2, seed=5))
    oracle = copy.deepcopy(model).double().eval()
    params = [p for p in oracle.parameters() if p.requires_grad]
    centre = torch.cat([p.detach().flatten() for p in params])

    @torch.no_grad()
    def value(theta):
        done = 0
        for p in params:
            p.data = theta[done : done + p.numel()].view(p.shape)
            done += p.numel()
        total = 0.0
        for i in made.indices.tolist():
            x, label = objective.inputs[i : i + 1].double(), int(objective.targets[i])
            p = oracle(x)[0].softmax(0)
            total -= float(p[label].log()) / 12
        own = zip(decay, params, strict=True)
        return total + sum(0.5 * k * float((p**2).sum()) for k, p in own)

    for j, b in enumerate(grid.y):
        for i, a in enumerate(grid.x):
            expected = value(centre + a * d + b * e)
            assert grid.values[j, i] == pytest.approx(expected, rel=2e-6)
    assert line.values[0] == pytest.approx(grid.values[2], rel=1e-6)
    assert made.value() == pytest.approx(value(centre), rel=2e-6)
    assert grid.x.tolist() == grid.y.tolist() == pytest.approx([-0.8, -0.4, 0, 0.4, 0.8])


def test_in_float64_the_values_are_exact_to_rounding():
    x = torch.randn(30, 4, dtype=torch.float64)
    y = torch.randn(30, 1, dtype=torch.float64)
    model = Linear((4,), 1).double()
    made = Landscape(Objective(model, SquaredError(), x, y), weight_decay=0.5)
    theta = torch.randn(5, dtype=torch.float64)
    w, b = theta[:4].numpy(), theta[4].item()
    expected = 0.5 * np.mean((x.numpy() @ w + b - y.numpy()[:, 0]) ** 2)
    expected += 0.25 * float((theta**2).sum())
    assert made.value(theta) == pytest.approx(expected, rel=1e-14)
    assert made.values(theta[None].numpy()) == pytest.approx([expected], rel=1e-14)


def test_a_small_pass_gives_the_same_values(monkeypatch):
    _, objective = odd()
    made = Landscape(objective)
    expected = made.value()
    monkeypatch.setattr("gdtrain.analysis.landscape._PASS", 2000)
    other = Landscape(objective)
    assert other.value() == pytest.approx(expected, rel=1e-6)
    assert 1 <= other._pass < 20 <= made._pass


def test_an_error_in_between_puts_the_parameters_back():
    model, objective = odd()
    made, before = Landscape(objective), vector(model)

    def broken(prediction, target):
        raise RuntimeError("broken")

    made.value()
    objective.loss = broken
    with pytest.raises(RuntimeError, match="broken"):
        made.slice_2d(points=3)
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.slice_2d(points=2), "points must be .* at least 3. Received: points=2"),
        (
            lambda m: m.slice_1d(span=float("nan")),
            r"span must be a number in \(0, 1e\+06\]. Received: span=nan",
        ),
        (lambda m: Surface(m.objective), "one or two parameters .* Received: a model with 30"),
        (lambda m: Landscape(m.objective, examples=0), "examples must be .* Received: examples=0"),
        (lambda m: Landscape(m.objective, weight_decay=[1.0]), "one for each of 2 .* Received: 1"),
    ],
)
def test_what_is_out_of_range_is_said(call, message):
    objective = Objective(
        Linear((9,), 3), CrossEntropy(), torch.zeros(2, 9), torch.zeros(2, dtype=torch.int64)
    )
    with pytest.raises(ValueError, match=message):
        call(Landscape(objective))


# ------------------------------------------------------------------ the plane of a path


def test_the_plane_of_a_path_is_that_of_principal_component_analysis():
    rng = np.random.default_rng(0)
    end = rng.normal(size=40)
    path = end + np.linspace(3, 0.1, 9)[:, None] * rng.normal(size=40) + rng.normal(size=(9, 40))
    found = plane_of(path, end)
    pca = PCA(2).fit(np.vstack([path, end[None]]) - end)
    assert found.shares == pytest.approx(pca.explained_variance_ratio_, rel=1e-10)
    for mine, theirs in zip((found.first, found.second), pca.components_, strict=True):
        sign = np.sign(mine.numpy() @ theirs)
        assert mine.numpy() == pytest.approx(sign * theirs, abs=1e-10)
    basis = np.stack([found.first.numpy(), found.second.numpy()])
    assert basis @ basis.T == pytest.approx(np.eye(2), abs=1e-12)
    assert found.coordinates == pytest.approx((path - end) @ basis.T, abs=1e-10)
    assert (found.coordinates[0] < 0).all()  # the start


def test_in_chunks_and_float32_it_is_the_same(monkeypatch):
    rng = np.random.default_rng(1)
    path, end = rng.normal(size=(5, 33)).astype(np.float32), np.zeros(33, np.float32)
    whole = plane_of(path, end)
    monkeypatch.setattr("gdtrain.analysis.trajectory._CHUNK", 7)
    parts = plane_of(path, end)
    assert parts.coordinates == pytest.approx(whole.coordinates, abs=1e-5)
    assert parts.shares == pytest.approx(whole.shares, rel=1e-6)


def test_a_path_on_a_line_has_one_component_and_no_path_has_none():
    found = plane_of([[2.0, 0, 0, 0], [1.0, 0, 0, 0]], [0.0, 0, 0, 0])
    assert found.shares == (1.0, 0.0)
    assert found.coordinates == pytest.approx(np.array([[-2.0, 0], [-1.0, 0]]), abs=1e-6)
    assert float(found.second.norm()) == pytest.approx(1)
    with pytest.raises(ValueError, match="all equal to the end"):
        plane_of([[1.0, 2.0]], [1.0, 2.0])


def test_of_a_run_that_has_not_moved_the_slices_are_drawn():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    objective = Objective(model, SquaredError(), torch.randn(5, 3), torch.randn(5))
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    still = Snapshots(np.arange(2), np.stack([theta, theta]))
    assert set(Landscape(objective).pictures(still, points=3)) == {"landscape-1d", "landscape-2d"}


def test_the_picture_of_a_path_has_j_in_the_plane_and_at_the_points():
    torch.manual_seed(0)
    model = MLP((3,), 2, hidden=[4]).double()
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randint(0, 2, (16,))
    objective = Objective(model, CrossEntropy(), x, y)
    made, end = Landscape(objective), vector(model)
    # A path that lies in a plane: then J in the plane is J on the path.
    u, v = torch.randn(2, len(end), dtype=torch.float64)
    path = torch.stack([end + (4 - k) * u + (4 - k) ** 2 * 0.1 * v for k in range(5)])
    snapshots = Snapshots(np.arange(5), path.numpy())
    grid = made.plane(snapshots, points=9)
    assert sum(grid.shares) == pytest.approx(1)
    assert grid.path[-1].tolist() == [0, 0]
    assert grid.path_values == pytest.approx([made.value(theta) for theta in path], rel=1e-12)
    found = plane_of(path[:-1], end)
    for (a, b), value in zip(grid.path, grid.path_values, strict=True):
        here = end + a * found.first + b * found.second
        assert made.value(here) == pytest.approx(value, rel=1e-9)
    corner = end + grid.x[0] * found.first + grid.y[-1] * found.second
    assert grid.values[-1, 0] == pytest.approx(made.value(corner), rel=1e-12)
    assert grid.x[0] < grid.path[:, 0].min() < grid.path[:, 0].max() < grid.x[-1]
    assert grid.y[0] < grid.path[:, 1].min() < grid.path[:, 1].max() < grid.y[-1]
    with pytest.raises(ValueError, match="last snapshot must be the parameters"):
        made.plane(Snapshots(np.arange(4), path[:4].numpy()))


def test_snapshots_are_read_as_they_were_written_and_a_wrong_file_is_said(tmp_path):
    model = Linear((2,), 1)
    parameters = np.array([[1, 2, 3], [4, np.inf, 6], [7, 8, 9], [1, 1, 1]], np.float32)
    names, sizes = ["linear.weight", "linear.bias"], [2, 1]
    Snapshots(np.array([0, 5, 9, 12]), parameters, names, sizes).save(tmp_path / "t.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]
    found = Snapshots.load(tmp_path / "t.npz")
    found.check(model, "t.npz")
    until = found.until(9)
    assert until.updates.tolist() == [0, 9]
    assert until.parameters.tolist() == [[1, 2, 3], [7, 8, 9]]
    ended = found.until(10, torch.tensor([5.0, 5.0, 5.0]))
    assert ended.updates.tolist() == [0, 9, 10]
    assert ended.parameters[-1].tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match=r"t.npz is the path of another model: expected 4 .* 3 in"):
        found.check(Linear((3,), 1), "t.npz")
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read as the path of a run"):
        Snapshots.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", updates=np.zeros(2))
    with pytest.raises(ValueError, match="cannot be read as the path of a run"):
        Snapshots.load(tmp_path / "other.npz")


# ------------------------------------------------------------------ one and two parameters


def least_squares(columns, bias=False, loss=None, y=None):
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(size=(50, columns)) @ np.diag([1.0, 0.2][:columns]))
    y = torch.from_numpy(rng.normal(size=(50, 1)) + 1) if y is None else y(x)
    model = Linear((columns,), 1, bias=bias).double()
    return model, Objective(model, loss or SquaredError(), x, y)


@pytest.mark.parametrize(("columns", "bias"), [(1, False), (2, False), (1, True)])
def test_the_minimum_is_that_of_the_normal_equations(columns, bias):
    model, objective = least_squares(columns, bias)
    before = vector(model)
    design = objective.inputs.numpy()
    if bias:
        design = np.column_stack([design, np.ones(len(design))])
    gram = design.T @ design / 50 + 0.3 * np.eye(design.shape[1])
    answer = np.linalg.solve(gram, design.T @ objective.targets.numpy()[:, 0] / 50)
    made = Surface(objective, weight_decay=0.3)
    assert made.minimum() == pytest.approx(answer, abs=1e-7)
    assert torch.equal(vector(model), before)
    assert all(p.grad is None for p in model.parameters())
    path = Snapshots(np.arange(3), np.stack([answer + 2, answer - 1, answer + 0.1]))
    picture = made.picture(path, points=7)
    assert picture.path.tolist() == path.parameters.tolist()
    line = picture.x if columns == 1 and not bias else None
    if line is not None:
        assert isinstance(picture, Line)
        assert picture.values[0] == pytest.approx(
            [0.5 * np.mean((design[:, 0] * w - objective.targets.numpy()[:, 0]) ** 2)
             + 0.15 * w * w for w in line], rel=1e-12)  # fmt: skip
        assert picture.xlabel == "parameter linear.weight"
    else:
        assert isinstance(picture, Grid)
        for i, j in ((0, 0), (3, 5), (6, 2)):
            w = np.array([picture.x[i], picture.y[j]])
            value = 0.5 * np.mean((design @ w - objective.targets.numpy()[:, 0]) ** 2)
            assert picture.values[j, i] == pytest.approx(value + 0.15 * w @ w, rel=1e-12)
        second = "linear.bias" if bias else "linear.weight[0, 1]"
        assert picture.ylabel == f"parameter {second}"
    for theta, value in zip(path.parameters, picture.path_values, strict=True):
        assert made.value(torch.from_numpy(theta)) == value


def test_where_j_falls_for_ever_is_flat_or_has_a_kink_there_is_no_minimum():
    separable = {"loss": Logistic(), "y": lambda x: (x[:, 0] > 0).long()}
    assert Surface(least_squares(1, **separable)[1]).minimum() is None
    hinge = {"loss": Hinge(), "y": lambda x: (x[:, 0] > 0).long()}
    assert Surface(least_squares(1, **hinge)[1]).minimum() is None
    model, objective = least_squares(2)
    objective.inputs[:, 1] = objective.inputs[:, 0]  # only the sum of the weights matters
    assert Surface(objective).minimum() is None
    picture = Surface(objective).picture(points=5)
    assert picture.minimum is None
    assert np.isfinite(picture.values).all()
    assert picture.x[0] < float(vector(model)[0]) < picture.x[-1]


def test_a_run_that_has_left_does_not_stretch_the_picture():
    _, objective = least_squares(1)
    made = Surface(objective)
    minimum = float(made.minimum()[0])
    path = minimum + np.array([[1.0], [-2.0], [4.0], [-8.0], [1e30]])
    picture = made.picture(Snapshots(np.arange(5), path), points=5)
    assert picture.x[0] < minimum - 2 < minimum + 1 < picture.x[-1] < minimum + 10
    box = made.picture(Snapshots(np.arange(5), path), points=5, box=[(-1, 3)])
    assert box.x.tolist() == [-1, 0, 1, 2, 3]


# ------------------------------------------------------------------ pictures


def test_contours_are_round_numbers_inside_and_logarithmic_over_decades():
    x = np.linspace(-1, 1, 5)

    def levels(low, high):
        values = np.linspace(low, high, 25).reshape(5, 5)
        return Grid(x=x, y=x, values=values).levels().tolist()

    assert levels(0.015, 7) == [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    assert levels(0.5e-6, 2.0) == pytest.approx([10.0**k for k in range(-6, 1)]) or levels(
        0.5e-6, 2.0
    ) == pytest.approx([s * 10.0**k for k in range(-6, 1) for s in (1, 3)][:-1])
    assert len(levels(1e-30, 1.0)) <= 12
    assert levels(0.0, 1.0) == pytest.approx(np.arange(1, 10) / 10)
    assert levels(1.0, 1.0) == []
    assert Grid(x=x, y=x, values=np.full((5, 5), np.nan)).levels().tolist() == []


def test_what_is_drawn_says_what_it_is(tmp_path):
    values = np.array([[4.0, 1.0, np.inf], [2.0, 0.5, 40.0], [3.0, 1.5, np.nan]])
    path = np.array([[-1.0, -1.0], [0.0, 0.0]])
    grid = Grid(
        x=np.array([-1.0, 0, 1]), y=np.array([-1.0, 0, 1]), values=values, path=path,
        path_updates=np.array([0, 40]), minimum=np.zeros(2), title="a plane", xlabel="this",
        ylabel="that", shares=(0.9, 0.1),
    )  # fmt: skip
    (axes, *_) = grid.plot().axes
    words = [t.get_text() for t in axes.get_legend().get_texts()]
    assert words == ["minimum", "path, 2 of 41 points", "start (update 0)", "end (update 40)"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("this", "that", "a plane")
    line = Line(
        x=np.array([-1.0, 0, 1]), values=np.array([[1.0, 1e-4, 1.0], [2.0, 1e-4, np.inf]]),
        labels=["one", "two"],
    )  # fmt: skip
    (axes,) = line.plot().axes
    assert axes.get_yscale() == "log"
    assert len({drawn.get_linestyle() for drawn in axes.lines[:2]}) == 2
    save({"grid": grid, "line": line}, tmp_path / "new", update=40)
    events = EventAccumulator(str(tmp_path / "new")).Reload()
    for name in ("grid", "line"):
        file = (tmp_path / "new" / f"{name}.png").read_bytes()
        (image,) = events.Images(f"landscape/{name}")
        assert file.startswith(PNG)
        assert image.encoded_image_string == file
        width, height = (int.from_bytes(file[i : i + 4], "big") for i in (16, 20))
        assert (image.step, image.width, image.height) == (40, width, height)
    with np.load(tmp_path / "new" / "landscape.npz") as numbers:
        assert numbers["grid/values"].tolist()[1] == [2.0, 0.5, 40.0]
        assert numbers["grid/shares"].tolist() == [0.9, 0.1]
        assert numbers["grid/path"].tolist() == path.tolist()


# ------------------------------------------------------------------ from a checkpoint


def trained(folder, *words):
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = compose("train", ["logger=none", *words])
    return train(config, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["data=iris", "optimizer=minibatch", "optimizer.lr=0.05", "optimizer.weight_decay=0.1"]
    result = trained(folder, *words, "model.hidden=[5]", "trainer.max_epochs=6")
    return folder, result


def main(capsys, monkeypatch, *words):
    """The command in this process, but for what it sets for the whole process."""
    monkeypatch.setattr(sys, "argv", ["landscape.py", *map(str, words)])
    monkeypatch.setattr(tools, "set_up_process", lambda: None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    code = 0
    try:
        cli.landscape_main()
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_draws_a_run_and_its_numbers_are_those_of_the_run(run, capsys, monkeypatch):
    folder, result = run
    code, out, _ = main(capsys, monkeypatch, f"run={folder}", "points=5")
    assert code == 0
    names = {p.name for p in (folder / "landscape").iterdir()}
    pictures = {"landscape-1d.png", "landscape-2d.png", "trajectory.png"}
    assert pictures | {"landscape.npz"} <= names
    assert len(names) == 5
    assert all(name in out for name in pictures)
    loss = result.metrics["loss/train"]
    weights = [p for n, p in result.model.named_parameters() if n.endswith("weight")]
    decayed = loss + sum(0.05 * float((w.detach().double() ** 2).sum()) for w in weights)
    with np.load(folder / "landscape" / "landscape.npz") as numbers:
        assert numbers["landscape-2d/values"][2, 2] == pytest.approx(decayed, rel=1e-5)
        assert numbers["landscape-1d/values"][:, 4] == pytest.approx([decayed] * 2, rel=1e-5)
        assert numbers["trajectory/path_values"][-1] == pytest.approx(decayed, rel=1e-5)
        assert numbers["trajectory/path_updates"][[0, -1]].tolist() == [
            0,
            result.summary["updates"],
        ]
        assert numbers["trajectory/path_values"][0] > decayed
    # A second time it takes another folder, and every way of naming the run leads to the same.
    chosen = folder.parent / "chosen"
    for place in (f"ckpt_dir={folder}", f"ckpt_dir={folder / 'checkpoints'}",
                  f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"):  # fmt: skip
        words = [place, "points=5", *([f"output={chosen}"] if "path" in place else [])]
        assert main(capsys, monkeypatch, *words)[0] == 0
    for other in (folder / "landscape-2", folder / "landscape-3", chosen):
        with np.load(other / "landscape.npz") as again, np.load(
            folder / "landscape" / "landscape.npz") as before:  # fmt: skip
            assert set(again) == set(before)
            assert all(np.array_equal(again[name], before[name]) for name in before)


def test_a_checkpoint_from_the_middle_ends_the_path_there(run):
    folder, _ = run
    best = folder / "checkpoints" / "best.ckpt"
    state = torch.load(best, weights_only=True)
    state["gdtrain"]["updates"] = 15  # of 24
    torch.save(state, folder / "checkpoints" / "middle.ckpt")
    output = folder.parent / "middle"
    _, pictures = landscape(folder / "checkpoints" / "middle.ckpt", output, points=3)
    assert pictures["trajectory"].path_updates.max() == 15
    assert pictures["trajectory"].path[-1].tolist() == [0, 0]


def test_without_a_recorded_path_the_slices_are_drawn_all_the_same(run, capsys, monkeypatch):
    folder, _ = run
    alone = folder.parent / "alone"
    alone.mkdir()
    (alone / "only.ckpt").write_bytes((folder / "checkpoints" / "last.ckpt").read_bytes())
    code, out, _ = main(capsys, monkeypatch, f"ckpt_path={alone / 'only.ckpt'}", "points=3")
    assert code == 0
    assert "The path is not drawn: the run has left no trajectory.npz" in out
    assert not (alone / "landscape" / "trajectory.png").exists()


def test_wrong_words_are_told_in_one_message_and_leave_nothing(run, capsys, monkeypatch, tmp_path):
    folder, _ = run
    place = f"run={folder}"
    before = sorted(p.name for p in folder.iterdir())
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    last = (folder / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "other" / "checkpoints" / "last.ckpt").write_bytes(last)
    Snapshots(np.arange(2), np.zeros((2, 3), np.float32), ["w"], [3]).save(
        tmp_path / "other" / "trajectory.npz"
    )
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state["gdtrain"]["description"]["model"]["hidden"] = [7]
    torch.save(state, tmp_path / "model.ckpt")
    for words, message in [
        ([], "Received: none"),
        ([place, "ckpt_path=x"], "Received: ckpt_path and run"),
        (["run=nowhere"], "There is no folder nowhere"),
        ([f"run={tmp_path / 'empty'}"], "empty holds no run: expected checkpoints/last.ckpt"),
        (["ckpt_path=no.ckpt"], "There is no checkpoint no.ckpt"),
        ([f"ckpt_path={tmp_path / 'text.ckpt'}"], "cannot be read as a checkpoint"),
        ([f"ckpt_path={tmp_path / 'model.ckpt'}"], "does not match the model"),
        ([f"run={tmp_path / 'other'}"], "trajectory.npz is the path of another model"),
        ([place, "points=2"], "points must be a whole number from 3 to 1000. Received: points=2"),
        (
            [place, "points=100000"],
            "points must be a whole number from 3 to 1000. Received: points=100000",
        ),
        ([place, "span=1e300"], "span must be a number in (0, 1e+06]. Received: span=1e300"),
        (
            [place, "points=few"],
            "from 3 to 1000. Received: points=few",
        ),
        ([place, "span=0"], "span must be a number in (0, 1e+06]. Received: span=0"),
        ([place, "examples=0"], "examples must be a whole number of at least 1"),
        ([place, "seed=-1"], "seed must be a whole number from 0 to 4294967295"),
        ([place, "megabytes=0"], "megabytes must be a number in (0, ∞)"),
        ([place, "megabytes=1"], "Pictures of 43 parameters take about 64 MB of memory, more than"),
        ([place, "megabytes=0.001"], "more than megabytes=0.001."),
        ([place, "pionts=5"], "Unknown argument pionts=5. Did you mean points?"),
        ([place, "output="], "output must be a folder for the pictures"),
        ([place, f"output={folder}"], "exists already; choose another output="),
        ([place, "data.test_fraction=0.4"], "trained on another split"),
    ]:
        code, out, err = main(capsys, monkeypatch, *words)
        assert (code, out) == (2, ""), words
        assert err.startswith("error: "), words
        assert message in err, (words, err)
        assert err.count("error") == 1
    assert sorted(p.name for p in folder.iterdir()) == before
    assert not (tmp_path / "other" / "landscape").exists()


@pytest.mark.parametrize("bias", [False, True])
def test_a_run_with_one_or_two_parameters_is_drawn_on_its_exact_surface(tmp_path, bias):
    rng = np.random.default_rng(0)
    x = rng.normal(size=80)
    y = 3 * x + 1 + 0.1 * rng.normal(size=80)
    lines = ["x,y", *(f"{a},{b}" for a, b in zip(x, y, strict=True))]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    result = trained(
        tmp_path / "run", "data=csv", f"data.path={tmp_path / 'table.csv'}", "data.target=y",
        "optimizer=gd", "model=linear", f"model.bias={str(bias).lower()}", "optimizer.lr=0.3",
        "trainer.max_epochs=60", "schedule=constant", "data.standardize_targets=false",
    )  # fmt: skip
    folder, pictures = landscape(tmp_path / "run" / "checkpoints" / "last.ckpt")
    (picture,) = pictures.values()
    assert (folder / "surface.png").read_bytes().startswith(PNG)
    assert picture.path_updates[:51].tolist() == list(range(51))
    inputs, targets = (t.double().numpy() for t in result.data.examples("train"))
    design = np.column_stack([inputs, np.ones(len(inputs))]) if bias else inputs
    answer = np.linalg.lstsq(design, targets.reshape(-1), rcond=None)[0]
    assert picture.minimum == pytest.approx(answer, abs=1e-6)
    # The steps are those of descent, θ ← θ − η ∇J, in float32.
    theta = picture.path[0]
    for k in range(50):
        residual = design @ theta - targets.reshape(-1)
        theta = theta - 0.3 * design.T @ residual / len(design)
        assert picture.path[k + 1] == pytest.approx(theta, abs=1e-5)
        value = 0.5 * np.mean((design @ picture.path[k] - targets.reshape(-1)) ** 2)
        assert picture.path_values[k] == pytest.approx(value, rel=1e-10)
    with pytest.raises(ValueError, match=r"drawn on its exact surface. Received: span=2"):
        landscape(tmp_path / "run" / "checkpoints" / "last.ckpt", span=2)


def test_the_checkpoint_of_a_folder_is_the_last(run):
    folder, _ = run
    last = folder / "checkpoints" / "last.ckpt"
    assert find_checkpoint(folder) == find_checkpoint(folder / "checkpoints") == last


# ------------------------------------------------------------------ the demonstration and the page


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo_landscape.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo"]


def test_the_demonstration_draws_and_prints_what_the_page_shows(
    demo, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["demo", "--figure", str(tmp_path / "figure.png")])
    demo.main()
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    page = (ROOT / "docs" / "landscape.md").read_text(encoding="utf-8")
    assert "](landscape.png)" in page
    assert (ROOT / "docs" / "landscape.png").read_bytes().startswith(PNG)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 8
    assert all(row in page for row in rows)


def test_the_demonstration_descends_as_the_theory_says(demo, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo", "--json"])
    demo.main()
    for found in json.loads(capsys.readouterr().out):
        values = np.array(found["values"]) - found["least"]
        ratio, name = found["lr"] * found["curvature"], found["name"]
        if len(found["columns"]) == 1:  # J − J_min shrinks by (1 − ηλ)² at each update
            expected = values[0] * (1 - ratio) ** (2 * np.arange(len(values)))
            assert values == pytest.approx(expected, abs=1e-12, rel=1e-9)
        if name == "too small":
            assert (np.diff(values) < 0).all()
        if name == "right":
            assert found["to_one_percent"] in (1, 22)
            assert values[-1] < 0.01 * values[0]
        if name == "too large":
            assert found["to_one_percent"] is None
            assert values[-1] > values[0]


def test_the_commands_and_the_example_of_the_page_work(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "landscape.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    rows = [f"{a},{2 * a + 1}" for a in x]
    Path("table.csv").write_text("\n".join(["x,y", *rows]))
    blocks = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line]
    assert lines[0] == "python scripts/demo_landscape.py"
    assert len(lines) == 6
    for line in lines[1:]:
        _, script, *words = line.split()
        if script == "scripts/train.py":
            (place,) = [w for w in words if w.startswith("hydra.run.dir=")]
            trained(Path(place.partition("=")[2]), *(w for w in words if w != place))
        else:
            assert script == "scripts/landscape.py"
            words += [] if any(w.startswith("points=") for w in words) else ["points=5"]
            code, _, err = main(capsys, monkeypatch, *words)
            assert code == 0, err
    assert Path("outputs/line/landscape/surface.png").is_file()
    assert Path("outputs/digits/landscape/trajectory.png").is_file()
    assert Path("outputs/best/trajectory.png").is_file()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "landscape.md", "exec"), {})
    assert Path("slice.png").read_bytes().startswith(PNG)
