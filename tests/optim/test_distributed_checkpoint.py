"""torch.distributed.checkpoint asks a new optimizer for its state by a step of length 0."""

import copy
import socket

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optimizers import STEP_SIZES, through_a_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from gdtrain.optim import GD, SGD, MiniBatchSGD
from gdtrain.penalised import penalty
from gdtrain.step_sizes import Armijo, DoG, ScheduleFree, StepSize

# Of one process, as here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "GD": lambda p: GD(p, lr=0.1, momentum=0.9, weight_decay=0.1, num_samples=6),
    "GD without momentum": lambda p: GD(p, lr=0.1, num_samples=6),
    "MiniBatchSGD": lambda p: MiniBatchSGD(p, lr=0.1, momentum=0.9, nesterov=True, batch_size=6),
    "tensor lr": lambda p: GD(p, lr=torch.tensor(0.1), momentum=0.9, num_samples=6),
}


class OfTheUser(StepSize):
    """It keeps a tensor that it has not declared."""

    def rate(self, context, memory):
        memory.keep("mine", context.direction)
        return 0.1


X = torch.linspace(-1, 1, 12).reshape(6, 2).sin()
Y = X.sum(1, keepdim=True).cos()


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def runs(make, count=3):
    """Models, each with its optimizer."""
    models = [network() for _ in range(count)]
    return [(model, make(model.parameters())) for model in models]


def by_rule(name):
    """What makes an optimizer with a rule."""
    rule = STEP_SIZES[name]
    lr = 0.05 if rule.needs.lr else 1.0
    return lambda p: GD(p, lr=lr, step_size=rule, total_updates=30)


def train_by_rule(model, optimizer, times):
    def closure():
        optimizer.zero_grad()
        loss = 0.5 * ((model(X) - Y) ** 2).mean()
        loss.backward()
        return loss

    for _ in range(times):
        optimizer.step(closure)


def train(model, optimizer, batches):
    """Micro-batches of two, by number."""
    for k in batches:
        part = slice(2 * (k % 3), 2 * (k % 3) + 2)
        optimizer.zero_grad()
        (0.5 * ((model(X[part]) - Y[part]) ** 2).mean()).backward()
        optimizer.step(**({} if type(optimizer) is SGD else {"num_samples": 2}))
    optimizer.zero_grad()


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_alike(one, other):
    assert all(map(torch.equal, parameters(one[0]), parameters(other[0])))


def through_files(model, optimizer, new_model, new_optimizer, path, **options):
    """As torch documents it: what a new model and optimizer have is filled from the files."""
    options = StateDictOptions(**options)
    names = ("model", "optimizer")
    saved = get_state_dict(model, optimizer, options=options)
    dcp.save(dict(zip(names, saved, strict=True)), checkpoint_id=path)
    state = dict(zip(names, get_state_dict(new_model, new_optimizer, options=options), strict=True))
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        new_model,
        new_optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


# ------------------------------------------------------------ the step of length 0


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_new_optimizer_gives_the_state_that_torchs_would_and_nothing_else_changes(make):
    model = network()
    optimizer = make(model.parameters())
    before, groups = parameters(model), copy.deepcopy(optimizer.state_dict()["param_groups"])
    state = get_optimizer_state_dict(model, optimizer)
    assert all(map(torch.equal, parameters(model), before))
    assert optimizer.state_dict()["param_groups"] == groups
    assert all(p.grad is None for p in model.parameters())
    momentum = groups[0]["momentum"] != 0
    assert set(state["state"]) == (set(dict(model.named_parameters())) if momentum else set())
    for own in state["state"].values():
        assert set(own) == {"momentum_buffer"}
        assert not own["momentum_buffer"].any()


@pytest.mark.parametrize("name", STEP_SIZES)
def test_a_new_optimizer_with_a_rule_remembers_nothing_of_it(name):
    asked, other = runs(by_rule(name), 2)
    get_optimizer_state_dict(*asked)
    assert asked[1].param_groups[0]["step_size"] == {}
    assert not asked[1].state
    for run in (asked, other):
        train_by_rule(*run, 4)
    assert_alike(asked, other)


def test_a_real_step_without_num_samples_or_closure_is_refused_as_before():
    model = network()
    gathering = GD(model.parameters(), lr=0.1, num_samples=6)
    ruled = GD(model.parameters(), step_size=Armijo())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer, words in ((gathering, "needs num_samples"), (ruled, "needs a closure")):
        optimizer.param_groups[0]["lr"] = 0.0
        with pytest.raises(ValueError, match=words):  # the gradient is not zero
            optimizer.step()
        for p in model.parameters():
            p.grad.zero_()
        optimizer.param_groups[0]["lr"] = 0.1
        with pytest.raises(ValueError, match=words):  # lr is not
            optimizer.step()
        for p in model.parameters():
            p.grad.fill_(1)


def test_an_update_of_zero_gradients_with_lr_zero_is_an_update_after_gather():
    theta = nn.Parameter(torch.ones(2))
    optimizer = GD([theta], lr=0.0, num_samples=2)
    for _ in range(2):
        theta.grad = torch.zeros(2)
        assert optimizer.gather(num_samples=2)
        optimizer.step()
        assert optimizer.param_groups[0]["gathered"] == 0


def test_an_overflowed_micro_batch_is_not_forgotten():
    model = network()
    optimizer = GD(model.parameters(), lr=0.1, num_samples=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer, num_samples=2)
    optimizer.zero_grad()
    group = get_optimizer_state_dict(model, optimizer)["param_groups"][0]
    assert (group["gathered"], group["overflow"], group["lr"]) == (2, True, 0.1)
    assert optimizer.param_groups[0]["lr"] == 0.1


# ------------------------------------------------------------ saved and resumed


@pytest.mark.parametrize("at", [0, 3, 4, 5], ids=lambda k: f"after {k}")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_goes_on_to_the_last_bit_in_the_middle_of_an_update_too(make, at):
    whole, half, resumed = runs(make)
    train(*whole, range(10))
    train(*half, range(at))
    for p in resumed[0].parameters():
        nn.init.zeros_(p)
    states = copy.deepcopy(get_state_dict(*half))
    set_state_dict(*resumed, model_state_dict=states[0], optim_state_dict=states[1])
    assert resumed[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]
    train(*resumed, range(at, 10))
    assert_alike(resumed, whole)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_files_go_on_to_the_last_bit_between_updates(make, flatten, tmp_path):
    whole, half, resumed = runs(make)
    train(*whole, range(9))
    train(*half, range(6))
    through_files(*half, *resumed, tmp_path, flatten_optimizer_state_dict=flatten)
    train(*resumed, range(6, 9))
    assert_alike(resumed, whole)


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("name", STEP_SIZES)
def test_files_of_a_rule_go_on_to_the_last_bit(name, at, tmp_path):
    whole, half, resumed = runs(by_rule(name))
    train_by_rule(*whole, 12)
    train_by_rule(*half, at)
    half[1].zero_grad()
    through_files(*half, *resumed, tmp_path)
    assert resumed[1].param_groups[0]["step_size"] == half[1].param_groups[0]["step_size"]
    train_by_rule(*resumed, 12 - at)
    assert_alike(resumed, whole)


@pytest.mark.parametrize("flatten", [False, True])
def test_what_a_new_optimizer_cannot_ask_for_is_missed_and_not_made_up(flatten, tmp_path):
    half, resumed = runs(OPTIMIZERS["GD"], 2)
    train(*half, range(4))
    with pytest.raises(ValueError, match="not whole: expected gathered_sum"):
        through_files(*half, *resumed, tmp_path, flatten_optimizer_state_dict=flatten)
    assert resumed[1].param_groups[0]["lr"] == 0.1


def test_the_way_that_the_message_names_goes_on_in_the_middle_of_an_update(tmp_path):
    whole, half, resumed = runs(OPTIMIZERS["GD"])
    train(*whole, range(7))
    train(*half, range(4))
    state = get_state_dict(*half)
    dcp.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=tmp_path / "parts")
    dcp_to_torch_save(tmp_path / "parts", tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=True)
    states = {"model_state_dict": loaded["model"], "optim_state_dict": loaded["optimizer"]}
    set_state_dict(*resumed, **states)
    train(*resumed, range(4, 7))
    assert_alike(resumed, whole)


@pytest.mark.parametrize("case", ["not declared", "flattened", "average shown"])
def test_a_tensor_of_a_rule_that_got_lost_is_missed(case, tmp_path):
    rule = {"not declared": OfTheUser, "flattened": DoG, "average shown": ScheduleFree}[case]
    half, resumed = runs(lambda p: SGD(p, lr=1.0, step_size=rule()), 2)
    train_by_rule(*half, 3)
    half[1].step_size.eval(half[1])
    flatten = case == "flattened"
    with pytest.raises(ValueError, match="not whole: expected step_size_"):
        through_files(*half, *resumed, tmp_path, flatten_optimizer_state_dict=flatten)


def test_a_state_through_torch_save_has_no_tensor_that_is_not_kept():
    ((model, optimizer),) = runs(by_rule("DoG averaged"), 1)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert not any(optimizer.state.values())
    assert optimizer.param_groups[0]["step_size"] == {}
    train_by_rule(model, optimizer, 1)
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    assert set(optimizer.state[model[0].bias]) == {"step_size_start", "step_size_average"}


# ------------------------------------------------------------ two ranks


def on_a_rank(rank, port, folder):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    divided, decays = network(), [0.5] * 4
    fully_shard(divided, mesh=mesh)
    whole = penalty(network().parameters(), decays)
    assert penalty(divided.parameters(), decays) == pytest.approx(whole, rel=1e-12)
    for name in ("GD", "DoG averaged", "in the middle"):
        make = by_rule(name) if name == "DoG averaged" else OPTIMIZERS["GD"]
        models = [fully_shard(network(), mesh=mesh) for _ in range(3)]
        whole, half, resumed = ((model, make(model.parameters())) for model in models)

        def go_on(run, batches, name=name):
            if name == "DoG averaged":
                train_by_rule(*run, len(batches))
            else:
                train(*run, batches)

        at = 7 if name == "in the middle" else 6
        go_on(whole, range(9))
        go_on(half, range(at))
        half[1].zero_grad()
        if name == "in the middle":
            states = copy.deepcopy(get_state_dict(*half))
            set_state_dict(*resumed, model_state_dict=states[0], optim_state_dict=states[1])
        else:
            through_files(*half, *resumed, folder / name)
        go_on(resumed, range(at, 9))
        for ours, theirs in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
            assert torch.equal(ours.to_local(), theirs.to_local()), name
    torch.distributed.destroy_process_group()


def test_two_ranks_with_sharded_parameters_go_on_to_the_last_bit(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(on_a_rank, (port, tmp_path), nprocs=2)
