"""The comparison of step-size rules with the best constant and decayed rates."""

import copy
import hashlib
import json
from dataclasses import replace

import pytest
import step_size_tasks
import step_sizes
import torch
from stacked_training import Measure, Member, optimum, train_together
from step_size_tasks import KINDS, Task, tasks

from gdtrain.descent.plan import Plan
from gdtrain.descent.preparation import parameter_groups


def task(kind, size=8, **options):
    sizes = {"examples": 30, "features": 8, "passes": 3, "momentum": 0.0, "nesterov": False}
    return Task(0, kind, 5, batch_size=size, **{**sizes, "weight_decay": 0.0, **options})


def by_torch(task, member, seed):
    """The same run, with torch's optimizer and a plain loop."""
    problem = task.build(seed)
    measure = Measure(replace(problem, model=copy.deepcopy(problem.model)), task.weight_decay)
    groups = parameter_groups(problem.model)
    if member.rule == "adam":
        optimizer = torch.optim.Adam(groups, lr=1.0, weight_decay=task.weight_decay)
    else:
        options = {"momentum": task.momentum, "nesterov": task.nesterov}
        optimizer = torch.optim.SGD(groups, lr=1.0, weight_decay=task.weight_decay, **options)
    plan = Plan(task.examples, task.per_update, seed=seed)
    for update, rate in enumerate(member.rates(task.updates).tolist()):
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = plan.block(update, 1)[0]
        optimizer.zero_grad()
        problem.loss(problem.model(problem.inputs[rows]), problem.targets[rows]).mean().backward()
        optimizer.step()
    return measure(torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "size": "full"},
    ],
)
@pytest.mark.parametrize("kind", ["softmax, correlated", "MLP LayerNorm", "attention"])
def test_a_stack_trains_as_torch_does(kind, options):
    members = [Member("sgd", 0.03), Member("adam", 0.01, "linear"), Member("sgd", 0.1, "cosine")]
    drawn = task(kind, **options)
    together = train_together(drawn, members, [3, 4])
    for member, ends in zip(members, together, strict=True):
        assert ends == pytest.approx([by_torch(drawn, member, seed) for seed in (3, 4)], rel=1e-4)


def test_a_member_that_diverges_disturbs_no_other():
    drawn = task("least squares, correlated", passes=40)
    alone = train_together(drawn, [Member("sgd", 0.01)], [0])
    both = train_together(drawn, [Member("sgd", 100.0), Member("sgd", 0.01)], [0])
    assert both[0] == [float("inf")]
    assert both[1] == pytest.approx(alone[0])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_can_be_trained_in_a_stack_and_by_the_package(kind):
    drawn = task(kind, examples=64, size=16, passes=4, features=max(8, KINDS[kind].features[0]))
    start = step_sizes._start(drawn, 0)
    ends = train_together(drawn, [Member("adam", 1e-3), Member("sgd", 0.0)], [0])
    assert ends[1] == pytest.approx([start])
    assert ends[0] != ends[1]
    run = step_sizes.train(drawn, 0, "auto")
    assert run["start"] == pytest.approx(start)
    assert run["passes"] <= drawn.passes + 0.25


def test_tasks_are_drawn_in_shares_and_again_the_same():
    drawn = tasks(7)
    assert drawn == tasks(7) != tasks(8)
    assert len({t.key for t in drawn}) == 120
    assert {t.kind for t in drawn} == set(KINDS)
    assert sum(t.is_linear for t in drawn) == 66
    assert sum(t.batch_size == "full" for t in drawn) == 30
    assert sum(t.momentum == 0 for t in drawn) == 60
    assert {t.batch_size for t in drawn} == {*step_size_tasks.BATCHES, "full"}
    assert all(20 <= t.updates <= 6100 for t in drawn)
    assert all(t.batch_size == "full" or t.batch_size <= t.examples / 2 for t in drawn)


def test_the_optimum_of_smooth_linear_models_is_exact():
    drawn = task("logistic, flipped", "full", passes=300, weight_decay=0.01)
    (ends,) = train_together(drawn, [Member("sgd", 1.0)], [0])
    assert optimum(drawn) == pytest.approx(ends[0], abs=1e-5)
    assert optimum(task("MLP deep")) == 0
    assert optimum(task("hinge, flipped")) is None


def test_a_gap_is_relative_to_the_way_from_the_start_to_the_optimum():
    row = {"start": 5.0, "optimum": 1.0, "best": {"constant": {"f": [1.5, 2.5]}}}
    assert step_sizes.gap(row, [3.0, 3.0], "constant") == 0.25
    assert step_sizes.gap(row, [3.0, None], "constant") == float("inf")


@pytest.mark.parametrize(
    ("rule", "size"), [("auto", "full"), ("bb", "full"), ("auto", 1), ("auto", 7), ("dowg", 7)]
)
def test_the_budget_is_kept(rule, size):
    drawn = task("least squares", size, examples=45, passes=20)
    run = step_sizes.train(drawn, 0, rule)
    assert drawn.passes / 2 < run["passes"] <= drawn.passes + drawn.per_update / drawn.examples
    assert run["f"] < run["start"]


def test_sealed_tasks_need_their_seed(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        step_sizes.main(["--part", "sealed", "--sealed-seed", "1"])
    assert "is not that of the sealed tasks" in capsys.readouterr().err
    monkeypatch.setattr(step_sizes, "SEALED", hashlib.sha256(b"1").hexdigest())
    with pytest.raises(SystemExit):
        step_sizes.main(["--part", "sealed", "--sealed-seed", "1", "--only", "no such task"])
    assert tasks(1)[0].name in capsys.readouterr().err


def test_results_are_kept_and_joined(tmp_path, capsys, monkeypatch):
    drawn = [task("least squares, few"), task("logistic, few", momentum=0.9, nesterov=True)]
    monkeypatch.setattr(step_sizes, "OPEN", drawn)
    known, files = tmp_path / "known.json", [tmp_path / "0.json", tmp_path / "1.json"]
    for offset, file in enumerate(files):
        arguments = ["--every", "2", "--offset", str(offset), "--choosing", "1", "--scoring", "2"]
        arguments += ["--opponents", str(known), "--json", str(file)]
        assert step_sizes.main(arguments) == 0
    (first,), (second,) = (json.loads(file.read_text())["rows"] for file in files)
    assert len(json.loads(known.read_text())) == 2
    assert len(first["rules"]["auto"]["f"]) == len(second["rules"]["auto"]["f"]) == 2
    monkeypatch.setattr(step_sizes, "train_together", None)  # is not asked again
    assert step_sizes.main(["--opponents", str(known), "--choosing", "1", "--scoring", "2"]) == 0
    assert step_sizes.main(["--summary", *map(str, files)]) == 0
    assert "2 tasks" in capsys.readouterr().out


def test_unknown_rules_and_tasks_are_told(capsys):
    for arguments in (["--rules", "newton"], ["--only", "imagenet"]):
        with pytest.raises(SystemExit) as error:
            step_sizes.main(arguments)
        assert error.value.code == 2
    assert "Received: newton" in capsys.readouterr().err
