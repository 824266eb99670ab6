"""The landscape: numbers against float64 loops and NumPy, what is put back, what a user reads."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import called, command, loaded
from sklearn.decomposition import PCA
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.utils import vector_to_parameters

from gdtrain.analysis.landscape import Landscape, Surface, directions
from gdtrain.analysis.landscape_figure import Grid, Line, save
from gdtrain.analysis.trajectory import Snapshots, plane_of
from gdtrain.cli.composition import compose
from gdtrain.losses import CrossEntropy, Hinge, Logistic, SquaredError
from gdtrain.models import MLP, Linear
from gdtrain.objective import Objective
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
    parts = iter(d.split([p.numel() for p in model.parameters() if p.requires_grad]))
    for name, p in model.named_parameters():
        if name in ("conv.weight", "last.weight"):
            for own, filter_ in zip(next(parts).view(p.shape), p.detach(), strict=True):
                assert float(own.norm()) == pytest.approx(float(filter_.norm()), rel=1e-5)
        elif p.requires_grad:
            assert not next(parts).any()
    assert next(parts, None) is None
    assert abs(float(d @ e)) < 0.5 * float(d.norm() * e.norm())
    assert torch.equal(d, directions(model, 1, seed=3)[0])
    assert not torch.equal(d, directions(model, 1, seed=4)[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_a_transposed_convolution_lead_to_its_outputs(groups):
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    (d,) = directions(model, count=1)
    for out in range(6):
        group, place = divmod(out, 6 // groups)
        rows = slice(group * 4 // groups, (group + 1) * 4 // groups)
        own = model.weight.detach()[rows, place].norm()
        made = d.view(model.weight.shape)[rows, place].norm()
        assert made == pytest.approx(float(own), rel=1e-5)


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
    still = Snapshots(np.arange(2), torch.stack([here, here]).numpy())  # has no plane
    assert set(landscape.pictures(still, points=3)) == {"landscape-1d", "landscape-2d"}
    assert model.count == 0
    assert torch.equal(torch.get_rng_state(), before)
    landscape.objective.loss = None
    with pytest.raises(TypeError, match="not callable"):
        landscape.slice_2d(points=3)
    assert torch.equal(vector(model), here)
    assert model.training


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
        vector_to_parameters(theta, params)
        prediction = oracle(objective.inputs[made.indices].double())
        loss = nn.functional.cross_entropy(prediction, objective.targets[made.indices])
        squares = [float((p**2).sum()) for p in params]
        return float(loss) + sum(0.5 * k * s for k, s in zip(decay, squares, strict=True))

    for j, b in enumerate(grid.y):
        for i, a in enumerate(grid.x):
            expected = value(centre + a * d + b * e)
            assert grid.values[j, i] == pytest.approx(expected, rel=2e-6)
    assert line.values[0] == pytest.approx(grid.values[2], rel=1e-6)
    assert made.value() == pytest.approx(value(centre), rel=2e-6)
    assert grid.x.tolist() == grid.y.tolist() == pytest.approx([-0.8, -0.4, 0, 0.4, 0.8])


def test_a_small_pass_gives_the_same_values(monkeypatch):
    _, objective = odd()
    made = Landscape(objective)
    expected = made.value()
    monkeypatch.setattr("gdtrain.analysis.landscape._PASS", 2000)
    other = Landscape(objective)
    assert other.value() == pytest.approx(expected, rel=1e-6)
    assert 1 <= other._pass < 20 <= made._pass


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
        (lambda m: m.plane(None, margin=0), r"margin must be a number in \(0, ∞\)"),
        (
            lambda m: directions(Linear((3,), 2, init="zeros")),
            "as long as the weights.*Received: a model without",
        ),
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
    path = np.random.default_rng(1).normal(size=(5, 33))
    whole = plane_of(path, np.zeros(33))
    monkeypatch.setattr("gdtrain.analysis.trajectory._CHUNK", 7)
    parts = plane_of(path.astype(np.float32), np.zeros(33, np.float32))
    assert parts.coordinates == pytest.approx(whole.coordinates, abs=1e-5)
    assert parts.shares == pytest.approx(whole.shares, rel=1e-6)


def test_a_path_on_a_line_has_one_component_and_no_path_has_none():
    found = plane_of([[2.0, 0, 0, 0], [1.0, 0, 0, 0]], [0.0, 0, 0, 0])
    assert found.shares == (1.0, 0.0)
    assert found.coordinates == pytest.approx(np.array([[-2.0, 0], [-1.0, 0]]), abs=1e-6)
    assert float(found.second.norm()) == pytest.approx(1)
    with pytest.raises(ValueError, match="all equal to the end"):
        plane_of([[1.0, 2.0]], [1.0, 2.0])


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
    until, ended = found.until(9), found.until(10, torch.tensor([5.0, 5.0, 5.0]))
    assert (until.updates.tolist(), ended.updates.tolist()) == ([0, 9], [0, 9, 10])
    assert until.parameters.tolist() == [[1, 2, 3], [7, 8, 9]]
    assert ended.parameters[-1].tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match=r"t.npz is the path of another model: expected 4 .* 3 in"):
        found.check(Linear((3,), 1), "t.npz")
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "other.npz", updates=np.zeros(2))
    Snapshots(np.array([5, 0]), np.zeros((2, 3))).save(tmp_path / "descending.npz")
    for name in ("bad", "other", "descending"):
        with pytest.raises(ValueError, match=f"{name}.npz cannot be read as the path of a run"):
            Snapshots.load(tmp_path / f"{name}.npz")


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

    def value(w):
        residual = design @ w - objective.targets.numpy()[:, 0]
        return pytest.approx(0.5 * np.mean(residual**2) + 0.15 * w @ w, rel=1e-12)

    if isinstance(picture, Line):
        assert len(answer) == 1
        assert picture.xlabel == "parameter linear.weight"
        for i, w in enumerate(picture.x):
            assert picture.values[0, i] == value(np.array([w]))
    else:
        assert picture.ylabel == f"parameter {'linear.bias' if bias else 'linear.weight[0, 1]'}"
        for i, j in ((0, 0), (3, 5), (6, 2)):
            assert picture.values[j, i] == value(np.array([picture.x[i], picture.y[j]]))
    for theta, own in zip(path.parameters, picture.path_values, strict=True):
        assert made.value(torch.from_numpy(theta)) == own


def test_where_j_falls_for_ever_is_flat_or_has_a_kink_there_is_no_minimum():
    for loss in (Logistic(), Hinge()):  # of classes that can be told apart
        _, objective = least_squares(1, loss=loss, y=lambda x: (x[:, 0] > 0).long())
        assert Surface(objective).minimum() is None
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
    assert levels(0.5e-6, 2.0) == pytest.approx([10.0**k for k in range(-6, 1)])
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
    return train(compose(["logger=none", *words], None), folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["data=iris", "optimizer=minibatch", "optimizer.lr=0.05", "optimizer.weight_decay=0.1"]
    result = trained(folder, *words, "model.hidden=[5]", "trainer.max_epochs=6")
    return folder, result


def test_the_command_draws_a_run_and_its_numbers_are_those_of_the_run(run, tmp_path):
    folder, result = run
    done = command(tmp_path, "landscape", f"run={folder}", "points=5")
    assert done.returncode == 0
    names = {p.name for p in (folder / "landscape").iterdir()}
    pictures = {"landscape-1d.png", "landscape-2d.png", "trajectory.png"}
    assert pictures | {"landscape.npz"} <= names
    assert len(names) == 5
    assert all(name in done.stdout for name in pictures)
    weights = [p for n, p in result.model.named_parameters() if n.endswith("weight")]
    decay = sum(0.05 * float((w.detach().double() ** 2).sum()) for w in weights)
    objective = pytest.approx(result.metrics["loss/train"] + decay, rel=1e-5)
    with np.load(folder / "landscape" / "landscape.npz") as file:
        numbers = dict(file)
    assert numbers["landscape-2d/values"][2, 2] == objective
    assert all(line[4] == objective for line in numbers["landscape-1d/values"])
    assert numbers["trajectory/path_values"][-1] == objective
    assert numbers["trajectory/path_values"][0] > numbers["trajectory/path_values"][-1]
    updates = numbers["trajectory/path_updates"][[0, -1]].tolist()
    assert updates == [0, result.summary["updates"]]
    # A second time it takes another folder, and every way of naming the run leads to the same.
    checkpoints, chosen = folder / "checkpoints", tmp_path / "chosen"
    for words in (
        [f"ckpt_dir={folder}"],
        [f"ckpt_dir={checkpoints}"],
        [f"ckpt_path={checkpoints / 'last.ckpt'}", f"output={chosen}"],
    ):
        assert command(tmp_path, "landscape", *words, "points=5").returncode == 0
    for other in (folder / "landscape-2", folder / "landscape-3", chosen):
        with np.load(other / "landscape.npz") as again:
            assert set(again) == set(numbers)
            assert all(np.array_equal(again[name], numbers[name]) for name in numbers)


def changed(run, to, change):
    """A copy of the run's last checkpoint, with something else in it."""
    state = torch.load(run[0] / "checkpoints" / "last.ckpt", weights_only=True)
    change(state["gdtrain"])
    to.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, to)
    return to


def test_a_checkpoint_from_the_middle_ends_the_path_there(run, tmp_path):
    middle = run[0] / "checkpoints" / "middle.ckpt"
    changed(run, middle, lambda state: state.update(updates=15))  # of 24
    _, pictures = landscape(middle, tmp_path / "middle", points=3)
    assert pictures["trajectory"].path_updates.max() == 15
    assert pictures["trajectory"].path[-1].tolist() == [0, 0]


def test_without_a_recorded_path_the_slices_are_drawn_all_the_same(run, tmp_path):
    only = changed(run, tmp_path / "only.ckpt", lambda state: None)
    done = command(tmp_path, "landscape", f"ckpt_path={only}", "points=3")
    assert done.returncode == 0
    assert "The path is not drawn: the run has left no trajectory.npz" in done.stdout
    assert not (tmp_path / "landscape" / "trajectory.png").exists()


def test_wrong_words_are_told_in_one_message_and_leave_nothing(run, tmp_path):
    folder, _ = run
    place = f"run={folder}"
    before = sorted(p.name for p in folder.iterdir())
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    changed(run, tmp_path / "other" / "checkpoints" / "last.ckpt", lambda state: None)
    Snapshots(np.arange(2), np.zeros((2, 3), np.float32), ["w"], [3]).save(
        tmp_path / "other" / "trajectory.npz"
    )
    other = {"hidden": [7]}
    changed(run, tmp_path / "m.ckpt", lambda state: state["description"]["model"].update(other))
    for words, message in [
        ([place, "ckpt_path=x"], "Received: ckpt_path and run"),
        (["run=empty"], "empty holds no run: expected checkpoints/last.ckpt"),
        (["ckpt_path=text.ckpt"], "cannot be read as a checkpoint"),
        (["ckpt_path=m.ckpt"], "does not match the model"),
        (["run=other"], "trajectory.npz is the path of another model"),
        ([place, "points=few"], "from 3 to 1000. Received: points=few"),
        ([place, "span=1e300"], "span must be a number in (0, 1e+06]. Received: span=1e300"),
        ([place, "seed=-1"], "seed must be a whole number from 0 to 4294967295"),
        ([place, "megabytes=0"], "megabytes must be a number in (0, ∞)"),
        ([place, "megabytes=1"], "Pictures of 43 parameters take about 64 MB of memory, more than"),
        ([place, "output="], "output must be a folder for the pictures"),
        ([place, f"output={folder}"], "exists already; choose another output="),
        ([place, "data.test_fraction=0.4"], "trained on another split"),
    ]:
        done = command(tmp_path, "landscape", *words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert done.stderr.startswith("error: "), words
        assert message in done.stderr, (words, done.stderr)
        assert done.stderr.count("error") == 1
    assert sorted(p.name for p in folder.iterdir()) == before
    assert not (tmp_path / "other" / "landscape").exists()


@pytest.mark.parametrize("bias", [False, True])
def test_a_run_with_one_or_two_parameters_is_drawn_on_its_exact_surface(tmp_path, bias):
    rows = np.random.default_rng(0).normal(size=(80, 2)) @ [[1, 3], [0, 0.1]] + [0, 1]
    np.savetxt(tmp_path / "table.csv", rows, delimiter=",", header="x,y", comments="")
    result = trained(
        tmp_path / "run", "data=csv", f"data.path={tmp_path / 'table.csv'}", "data.target=y",
        "optimizer=gd", "model=linear", f"model.bias={str(bias).lower()}", "optimizer.lr=0.3",
        "trainer.max_epochs=60", "schedule=constant", "data.standardize_targets=false",
    )  # fmt: skip
    folder, pictures = landscape(tmp_path / "run" / "checkpoints" / "last.ckpt")
    (picture,) = pictures.values()
    assert (folder / "surface.png").read_bytes().startswith(PNG)
    assert picture.path_updates[:51].tolist() == list(range(51))
    assert picture.path[-1] == pytest.approx(vector(result.model).numpy())
    assert picture.path_values[-1] == pytest.approx(result.metrics["loss/train"], rel=1e-5)
    with pytest.raises(ValueError, match=r"drawn on its exact surface. Received: span=2"):
        landscape(tmp_path / "run" / "checkpoints" / "last.ckpt", span=2)


# ------------------------------------------------------------------ the demonstration and the page


demo = loaded("demo_landscape")


def test_the_demonstration_draws_and_prints_what_the_page_shows(tmp_path):
    done = called(demo.main, tmp_path, "--figure", "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    page = (ROOT / "docs" / "landscape.md").read_text(encoding="utf-8")
    assert "](landscape.png)" in page
    assert (ROOT / "docs" / "landscape.png").read_bytes().startswith(PNG)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 8
    assert all(row in page for row in rows)
    for found in json.loads(called(demo.main, tmp_path, "--json").stdout):
        values = np.array(found["values"]) - found["least"]
        if len(found["columns"]) == 1:  # J − J_min shrinks by (1 − ηλ)² at each update
            share = (1 - found["lr"] * found["curvature"]) ** 2
            expected = values[0] * share ** np.arange(len(values))
            assert values == pytest.approx(expected, abs=1e-12, rel=1e-9)


def test_the_commands_and_the_example_of_the_page_work(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "landscape.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(40, 1)) * [1, 2] + [0, 1]
    np.savetxt("table.csv", rows, delimiter=",", header="x,y", comments="")
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
            done = command(tmp_path, "landscape", *words)
            assert done.returncode == 0, done.stderr
    assert Path("outputs/line/landscape/surface.png").is_file()
    assert Path("outputs/digits/landscape/trajectory.png").is_file()
    assert Path("outputs/best/trajectory.png").is_file()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "landscape.md", "exec"), {})
    assert Path("slice.png").read_bytes().startswith(PNG)
