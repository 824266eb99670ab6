"""Known answers: scikit-learn on the same order of examples, exact solvers, closed forms."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning import Trainer
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression, SGDClassifier, SGDRegressor
from watched_runs import QUIET

from gdtrain import GD, SGD, SupervisedModule, minimize
from gdtrain.data import ArrayDataModule, EmbeddedDataModule
from gdtrain.descent.stopping import StopReason
from gdtrain.engines import Eager
from gdtrain.losses import Hinge, Logistic, SquaredError
from gdtrain.models import Linear
from gdtrain.objective import Objective
from gdtrain.schedules import Polynomial

WHOLE = {"dtype": "float64", "val_fraction": 0, "test_fraction": 0}


@pytest.fixture(autouse=True)
def one_thread():
    """Problems this small only lose by a second thread, above all beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def standardised(load):
    x, y = load(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), y


def lightning_fit(model, loss, optimizer, data, schedule=None, **limits):
    module = SupervisedModule(model, loss, optimizer, schedule)
    trainer = Trainer(limit_val_batches=0, **QUIET, **limits)
    trainer.fit(module, datamodule=data)
    return trainer


def zero_linear(features, outputs=1):
    return Linear((features,), outputs, init="zeros").double()


def penalised(model, loss, x, y, decay):
    with torch.no_grad():
        mean = loss(model(x), y).mean()
        return (mean + 0.5 * decay * model.linear.weight.square().sum()).item()


def solved(model, solver):
    """The model with a fitted scikit-learn solver's coefficients."""
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor(solver.coef_))
        model.linear.bias.copy_(torch.tensor(solver.intercept_))
    return model


# ------------------------------------------------------- scikit-learn, update by update

SKLEARN = {"penalty": None, "learning_rate": "constant", "shuffle": False, "tol": None}


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(
    ("loss", "solver", "load"),
    [
        (SquaredError(), partial(SGDRegressor, loss="squared_error"), load_diabetes),
        (Logistic(), partial(SGDClassifier, loss="log_loss"), load_breast_cancer),
        (Hinge(), partial(SGDClassifier, loss="hinge"), load_breast_cancer),
    ],
    ids=["squared_error", "logistic", "hinge"],
)
def test_one_example_sgd_equals_scikit_learn(loss, solver, load, epochs):
    x, y = standardised(load)
    x = x[:300]
    y = (y[:300] - y.mean()) / y.std() if loss.task == "regression" else y[:300]
    eta = 0.01
    data = ArrayDataModule(
        x,
        y,
        batch_size=1,
        sampling="sequential",
        standardize=False,
        standardize_targets=False,
        **WHOLE,
    )
    model = zero_linear(x.shape[1])
    trainer = lightning_fit(model, loss, partial(SGD, lr=eta), data, max_epochs=epochs)
    theirs = solver(eta0=eta, max_iter=epochs, **SKLEARN).fit(x, y)
    assert trainer.global_step == 300 * epochs == theirs.t_ - 1
    assert np.abs(theirs.coef_).max() > 0.05
    np.testing.assert_allclose(
        model.linear.weight.detach().numpy().ravel(), theirs.coef_.ravel(), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(
        model.linear.bias.item(), np.ravel(theirs.intercept_)[0], rtol=1e-12, atol=1e-12
    )


def test_the_losses_of_a_sweep_keep_the_precision_of_the_model():
    x, y = (torch.from_numpy(a) for a in standardised(load_diabetes))
    model = zero_linear(10)
    optimizer = SGD([{"params": model.parameters(), "initial_lr": 0.01}])
    objective = Objective(model, SquaredError(), x, y)
    losses = Eager(objective, optimizer)(torch.tensor([[0], [1]]), torch.ones(2))
    assert losses.dtype == torch.float64
    assert losses[0].item() == 0.5 * y[0].item() ** 2


# ------------------------------------------------------------------- exact solvers


def test_gd_through_lightning_reaches_the_least_squares_solution():
    data = EmbeddedDataModule("diabetes", batch_size="full", dtype="float64")
    data.setup()
    x, y = (t.numpy() for t in data.examples("train"))
    with_one = np.c_[x, np.ones(len(x))]
    wanted = np.linalg.lstsq(with_one, y, rcond=None)[0]
    eigenvalues = np.linalg.eigvalsh(with_one.T @ with_one / len(x))
    root = np.sqrt(eigenvalues[0] / eigenvalues[-1])
    rule = partial(
        GD, lr=1 / eigenvalues[-1], momentum=float((1 - root) / (1 + root)), nesterov=True
    )
    model = zero_linear(10)
    lightning_fit(model, SquaredError(), rule, data, max_epochs=800)
    np.testing.assert_allclose(model.linear.weight.detach().numpy()[0], wanted[:-1], atol=1e-9)
    np.testing.assert_allclose(model.linear.bias.item(), wanted[-1], atol=1e-9)


def test_logistic_regression_through_lightning_reaches_scikit_learns_objective():
    decay = 0.01
    data = EmbeddedDataModule("breast_cancer", batch_size="full", **WHOLE)
    data.setup()
    x, y = data.examples("train")
    model = zero_linear(x.shape[1])
    rule = partial(GD, lr=0.25, momentum=0.9, nesterov=True, weight_decay=decay)
    lightning_fit(model, Logistic(), rule, data, max_epochs=1200)
    theirs = LogisticRegression(C=1 / (decay * len(x)), tol=1e-12, max_iter=10_000).fit(x, y)
    ours = penalised(model, Logistic(), x, y, decay)
    exact = penalised(solved(zero_linear(x.shape[1]), theirs), Logistic(), x, y, decay)
    assert ours == pytest.approx(exact, rel=1e-6)
    np.testing.assert_allclose(model.linear.weight.detach().numpy(), theirs.coef_, atol=1e-5)


# ------------------------------------------------------------ minimize, closed forms

CURVATURES = torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64)


def bowl(x):
    return 0.5 * (CURVATURES * x**2).sum()


@pytest.mark.parametrize("lr", [0.01, 0.1, 0.19])
def test_each_coordinate_of_a_quadratic_shrinks_by_one_minus_lr_times_curvature(lr):
    start = np.array([1.0, -2.0, 3.0])
    found = minimize(bowl, start, lr=lr, updates=40, tolerance=0)
    t = np.arange(41)[:, None]
    wanted = start * (1 - lr * CURVATURES.numpy()) ** t
    np.testing.assert_allclose(found.path, wanted, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        found.values, 0.5 * (CURVATURES.numpy() * wanted**2).sum(1), rtol=1e-12, atol=1e-15
    )
    assert found.updates == 40
    assert found.stop.reason is StopReason.BUDGET
    np.testing.assert_array_equal(found.path_updates, np.arange(41))
    np.testing.assert_array_equal(found.x.numpy(), found.path[-1])


def test_the_limit_two_over_the_largest_curvature_divides_convergence_from_divergence():
    start = [1.0, 1.0, 1.0]
    below = minimize(bowl, start, lr=0.199, updates=5000)
    assert below.stop.reason is StopReason.CONVERGED
    assert below.x.abs().max() < 1e-7
    at = minimize(bowl, start, lr=0.2, updates=500, tolerance=0)
    assert at.path[-1][2] == pytest.approx(1.0, rel=1e-12)
    above = minimize(bowl, start, lr=0.201, updates=500)
    assert above.path[-1][2] == pytest.approx(1.01**500, rel=1e-9)


def test_a_start_at_the_minimum_makes_no_update():
    found = minimize(bowl, [0.0, 0.0, 0.0], lr=0.1)
    assert found.updates == 0
    assert found.path.tolist() == [[0.0, 0.0, 0.0]]


def test_a_schedule_scales_each_step():
    found = minimize(lambda x: x.sum(), [0.0], lr=1.0, updates=4, schedule=Polynomial())
    assert found.path[:, 0].tolist() == [0.0, -1.0, -1.75, -2.25, -2.5]


def test_rosenbrocks_minimum_is_found():
    def rosenbrock(x):
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    found = minimize(
        rosenbrock, [-1.2, 1.0], lr=5e-4, momentum=0.95, updates=20_000, tolerance=1e-10
    )
    assert found.stop.reason is StopReason.CONVERGED
    assert found.x.tolist() == pytest.approx([1.0, 1.0], abs=1e-7)
    assert len(found.path) <= 1001
    assert found.path_updates[-1] == found.updates
    assert len(found.values) == found.updates + 1


def test_the_path_keeps_about_as_many_points_as_asked_with_both_ends():
    found = minimize(bowl, [1.0, 1.0, 1.0], lr=0.01, updates=103, keep=11, tolerance=0)
    assert found.path_updates.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 103]
    np.testing.assert_array_equal(found.path[-1], found.x.numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, r"lr must be finite and > 0\. Received: lr=0\.0"),
        ({"lr": -0.1}, "lr must be finite and > 0"),
        ({"lr": float("nan")}, "Received: lr=nan"),
        ({"lr": float("inf")}, "Received: lr=inf"),
        ({"lr": 0.1, "tolerance": -1.0}, "tolerance must be finite and >= 0"),
        ({"lr": 0.1, "updates": 0}, "updates must be a whole number of at least 1"),
        ({"lr": 0.1, "updates": 2.5}, "Received: updates=2.5"),
        ({"lr": 0.1, "keep": 1}, "keep must be a whole number of at least 2"),
        ({"lr": 0.1, "momentum": -0.5}, "Invalid momentum value: -0.5"),
        ({"lr": 0.1, "nesterov": True}, "Nesterov momentum requires a momentum"),
    ],
)
def test_minimize_names_an_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        minimize(bowl, [1.0, 1.0, 1.0], **arguments)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: 1.0, "Received: float"),
        (lambda x: x, r"Received: Tensor of shape \(2,\)"),
        (lambda x: x.detach().sum(), "one number that depends on x"),
        (lambda x: torch.ones((), requires_grad=True), "one number that depends on x"),
    ],
    ids=["no tensor", "a vector", "detached", "another variable"],
)
def test_minimize_refuses_functions_that_give_no_number_of_x(f, message):
    with pytest.raises(ValueError, match=message):
        minimize(f, [1.0, 2.0], lr=0.1)


def test_plot_shows_the_values_and_the_path_of_two_variables():
    found = minimize(lambda x: x.square().sum(), [1.0, 2.0], lr=0.1, updates=5)
    values, path = found.plot().axes
    np.testing.assert_array_equal(values.lines[0].get_ydata(), found.values)
    np.testing.assert_array_equal(path.lines[0].get_xydata(), found.path)
