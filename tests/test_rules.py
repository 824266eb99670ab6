import pytest
import torch
from optimizers import EVERY_RULE, WITH_MOMENTUM, twin_of
from problems import vector
from torch.testing import assert_close

from gdtrain.rules import descend_, fused_descend_


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


BOTH = pytest.mark.parametrize("update_", [descend_, fused_descend_])
MOMENTUM = pytest.mark.parametrize("rule", WITH_MOMENTUM.values(), ids=WITH_MOMENTUM)


@BOTH
def test_gradient_descent_by_hand(update_):
    theta = torch.tensor([1.0, 2.0, 3.0, 4.0])
    update_([theta], [torch.tensor([1.0, 6.0, 7.0, 2.0])], [], lr=0.5)
    assert theta.tolist() == [0.5, -1.0, -0.5, 3.0]


BY_HAND = {
    # b: 2, 0.5·2 + 4 = 5, 0.5·5 − 1 = 1.5
    "momentum": (10, [2, 4, -1], {"momentum": 0.5}, [8, 3, 1.5]),
    # The first gradient is whole. b: 2, 0.5·2 + 0.25·4 = 2, 0.5·2 + 0.25·(−8) = −1
    "dampening": (10, [2, 4, -8], {"momentum": 0.5, "dampening": 0.75}, [8, 6, 7]),
    # b: 2, 5, 1.5; d + 0.5·b: 3, 6.5, −0.25
    "nesterov": (10, [2, 4, -1], {"momentum": 0.5, "nesterov": True}, [7, 0.5, 0.75]),
    # d: 2 + 0.5·8 = 6, then −1 + 0.5·5 = 1.5
    "decay": (8, [2, -1], {"lr": 0.5, "weight_decay": 0.5}, [5, 4.25]),
    # It decays through the buffer. d: 2 + 0.5·8 = 6, θ = 2; d: −1 + 0.5·2 = 0, b = 0.5·6 + 0 = 3
    "decay, momentum": (8, [2, -1], {"weight_decay": 0.5, "momentum": 0.5}, [2, -1]),
    # It climbs and still decays. d: −2 + 0.5·8 = 2, θ = 6; d: −4 + 0.5·6 = −1, θ = 7
    "maximize": (8, [2, 4], {"weight_decay": 0.5, "maximize": True}, [6, 7]),
    # b: −2, 0.5·(−2) − 4 = −5
    "maximize, momentum": (0, [2, 4], {"momentum": 0.5, "maximize": True}, [2, 7]),
}


@BOTH
@pytest.mark.parametrize(("start", "gradients", "rule", "path"), BY_HAND.values(), ids=BY_HAND)
def test_rules_by_hand(update_, start, gradients, rule, path):
    theta, buffers = vector(start), [None]
    for g, wanted in zip(gradients, path, strict=True):
        update_([theta], [vector(g)], buffers, **{"lr": 1, **rule})
        assert theta.item() == wanted


@BOTH
def test_no_parameters_are_no_error(update_):
    buffers = []
    update_([], [], buffers, lr=0.1, momentum=0.9)
    assert buffers == []


@BOTH
@EVERY_RULE
def test_gradients_are_never_written_into(update_, rule):
    gradients = [torch.randn(3, 4), torch.randn(5)]
    before = [g.clone() for g in gradients]
    theta, buffers = [torch.randn(3, 4), torch.randn(5)], [None, None]
    for _ in range(3):
        update_(theta, gradients, buffers, lr=0.1, **rule)
        for g, kept in zip(gradients, before, strict=True):
            assert torch.equal(g, kept)


@BOTH
def test_the_first_buffer_shares_no_memory_with_the_gradient(update_):
    g, buffers = torch.ones(3), [None]
    update_([torch.zeros(3)], [g], buffers, lr=0.1, momentum=0.9)
    g.fill_(7)
    assert buffers[0].tolist() == [1, 1, 1]


@BOTH
def test_buffers_are_updated_where_they_are(update_):
    theta, buffers = torch.zeros(3), [torch.ones(3)]
    mine = buffers[0]
    update_([theta], [torch.ones(3)], buffers, lr=0.1, momentum=0.5)
    assert buffers[0] is mine
    assert mine.tolist() == [1.5, 1.5, 1.5]


@BOTH
@MOMENTUM
def test_a_late_buffer_starts_as_that_of_a_parameter_alone(update_, rule):
    early, late = torch.randn(4), torch.randn(4)
    alone, early_alone = late.clone(), early.clone()
    gradients = torch.randn(3, 2, 4)

    early_buffers, buffers = [None], [None, None]
    update_([early], [gradients[0, 0]], early_buffers, lr=0.1, **rule)
    buffers[0] = early_buffers[0]
    for g in gradients[1:]:
        update_([early, late], list(g), buffers, lr=0.1, **rule)

    alone_buffers, early_alone_buffers = [None], [None]
    for g in gradients[1:, 1]:
        descend_([alone], [g], alone_buffers, lr=0.1, **rule)
    for g in gradients[:, 0]:
        descend_([early_alone], [g], early_alone_buffers, lr=0.1, **rule)
    assert_close(late, alone)
    assert_close(early, early_alone)
    assert_close(buffers, [early_alone_buffers[0], alone_buffers[0]])


# Against torch's loop in all layouts: tests/optim/test_grid.py.
LAYOUTS = {
    "contiguous": lambda: torch.randn(6, 4),
    "every second column": lambda: torch.randn(6, 8)[:, ::2],
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def test_fused_writes_nothing_outside_a_strided_view():
    memory = torch.arange(24.0).reshape(4, 6)
    expected = memory.clone()
    expected[:, ::2] -= 0.5
    fused_descend_([memory[:, ::2]], [torch.ones(4, 3)], [], lr=0.5)
    assert torch.equal(memory, expected)


def test_fused_reads_an_expanded_gradient_within_its_bounds():
    memory = torch.full((1000,), 1e9)
    memory[0] = 1.0
    theta = torch.zeros(100)
    fused_descend_([theta], [memory[:1].expand(100)], [], lr=0.5)
    assert torch.equal(theta, torch.full((100,), -0.5))


@EVERY_LAYOUT
@pytest.mark.parametrize("first", [True, False])
@EVERY_RULE
def test_where_an_overflow_was_found_nothing_changes(layout, first, rule):
    theta, buffers = LAYOUTS[layout](), [None]
    if not first:
        fused_descend_([theta], [torch.randn(theta.shape)], buffers, lr=0.1, **rule)
    before = theta.clone(), [None if b is None else b.clone() for b in buffers]
    g = torch.full(theta.shape, float("inf" if first else "nan"))
    scaler = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(1.0)}
    fused_descend_([theta], [g], buffers, lr=0.1, **scaler, **rule)
    assert_close((theta, buffers), before, rtol=0, atol=0)


@EVERY_LAYOUT
@EVERY_RULE
def test_grad_scale_divides_the_gradient(layout, rule):
    theta = LAYOUTS[layout]()
    twin = twin_of(theta)
    buffers, twin_buffers = [None], [None]
    scaler = {"grad_scale": torch.tensor(1024.0), "found_inf": torch.tensor(0.0)}
    for _ in range(3):
        g = torch.randn(theta.shape)
        descend_([twin], [g], twin_buffers, lr=0.1, **rule)
        fused_descend_([theta], [g * 1024], buffers, lr=0.1, **scaler, **rule)
        assert_close(theta, twin)
        assert_close(buffers, twin_buffers)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_lr_may_be_a_tensor_of_one_element(shape, requires_grad):
    lr = torch.full(shape, 0.5, requires_grad=requires_grad)
    theta = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        descend_([theta], [torch.tensor([1.0, 6.0])], [], lr=lr)
    assert theta.tolist() == [0.5, -1.0]
