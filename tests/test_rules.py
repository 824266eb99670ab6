import pytest
import torch
from problems import vector
from torch.testing import assert_close

from gdtrain.rules import descend_, fused_descend_


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


BOTH = pytest.mark.parametrize("rule", [descend_, fused_descend_])

RULES = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
]


def after_each(rule, start, gradients, **arguments):
    theta, buffers, path = vector(start), [None], []
    for g in gradients:
        rule([theta], [vector(g)], buffers, **arguments)
        path.append(theta.item())
    return path


@BOTH
def test_gradient_descent_by_hand(rule):
    theta = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rule([theta], [torch.tensor([1.0, 6.0, 7.0, 2.0])], [], lr=0.5)
    assert theta.tolist() == [0.5, -1.0, -0.5, 3.0]


@BOTH
def test_momentum_by_hand(rule):
    # b: 2, 0.5·2 + 4 = 5, 0.5·5 − 1 = 1.5
    assert after_each(rule, 10, [2, 4, -1], lr=1, momentum=0.5) == [8, 3, 1.5]


@BOTH
def test_dampening_by_hand_leaves_the_first_gradient_whole(rule):
    # b: 2, 0.5·2 + 0.25·4 = 2, 0.5·2 + 0.25·(−8) = −1
    path = after_each(rule, 10, [2, 4, -8], lr=1, momentum=0.5, dampening=0.75)
    assert path == [8, 6, 7]


@BOTH
def test_nesterov_by_hand(rule):
    # b: 2, 5, 1.5; d + 0.5·b: 3, 6.5, −0.25
    path = after_each(rule, 10, [2, 4, -1], lr=1, momentum=0.5, nesterov=True)
    assert path == [7, 0.5, 0.75]


@BOTH
def test_weight_decay_by_hand(rule):
    # d: 2 + 0.5·8 = 6, then −1 + 0.5·5 = 1.5
    assert after_each(rule, 8, [2, -1], lr=0.5, weight_decay=0.5) == [5, 4.25]


@BOTH
def test_weight_decay_with_momentum_by_hand_decays_through_the_buffer(rule):
    # d: 2 + 0.5·8 = 6, θ = 2; d: −1 + 0.5·2 = 0, b = 0.5·6 + 0 = 3, θ = −1
    assert after_each(rule, 8, [2, -1], lr=1, weight_decay=0.5, momentum=0.5) == [2, -1]


@BOTH
def test_maximize_by_hand_climbs_and_still_decays(rule):
    # d: −2 + 0.5·8 = 2, θ = 6; d: −4 + 0.5·6 = −1, θ = 7
    assert after_each(rule, 8, [2, 4], lr=1, weight_decay=0.5, maximize=True) == [6, 7]


@BOTH
def test_maximize_with_momentum_by_hand(rule):
    # b: −2, 0.5·(−2) − 4 = −5
    assert after_each(rule, 0, [2, 4], lr=1, momentum=0.5, maximize=True) == [2, 7]


@BOTH
def test_no_parameters_are_no_error(rule):
    buffers = []
    rule([], [], buffers, lr=0.1, momentum=0.9)
    assert buffers == []


@BOTH
@pytest.mark.parametrize("arguments", RULES, ids=str)
def test_gradients_are_never_written_into(rule, arguments):
    gradients = [torch.randn(3, 4), torch.randn(5)]
    before = [g.clone() for g in gradients]
    theta, buffers = [torch.randn(3, 4), torch.randn(5)], [None, None]
    for _ in range(3):
        rule(theta, gradients, buffers, lr=0.1, **arguments)
        for g, kept in zip(gradients, before, strict=True):
            assert torch.equal(g, kept)


@BOTH
def test_the_first_buffer_shares_no_memory_with_the_gradient(rule):
    g, buffers = torch.ones(3), [None]
    rule([torch.zeros(3)], [g], buffers, lr=0.1, momentum=0.9)
    g.fill_(7)
    assert buffers[0].tolist() == [1, 1, 1]


@BOTH
def test_buffers_are_updated_where_they_are(rule):
    theta, buffers = torch.zeros(3), [torch.ones(3)]
    mine = buffers[0]
    rule([theta], [torch.ones(3)], buffers, lr=0.1, momentum=0.5)
    assert buffers[0] is mine
    assert mine.tolist() == [1.5, 1.5, 1.5]


@BOTH
@pytest.mark.parametrize("arguments", RULES[4:], ids=str)
def test_a_late_buffer_starts_as_that_of_a_parameter_alone(rule, arguments):
    early, late = torch.randn(4), torch.randn(4)
    alone, early_alone = late.clone(), early.clone()
    gradients = torch.randn(3, 2, 4)

    early_buffers, buffers = [None], [None, None]
    rule([early], [gradients[0, 0]], early_buffers, lr=0.1, **arguments)
    buffers[0] = early_buffers[0]
    for g in gradients[1:]:
        rule([early, late], list(g), buffers, lr=0.1, **arguments)

    alone_buffers, early_alone_buffers = [None], [None]
    for g in gradients[1:, 1]:
        descend_([alone], [g], alone_buffers, lr=0.1, **arguments)
    for g in gradients[:, 0]:
        descend_([early_alone], [g], early_alone_buffers, lr=0.1, **arguments)
    assert_close(late, alone)
    assert_close(early, early_alone)
    assert_close(buffers, [early_alone_buffers[0], alone_buffers[0]])


LAYOUTS = {
    "contiguous": lambda: torch.randn(6, 4),
    "transposed": lambda: torch.randn(4, 6).t(),
    "every second column": lambda: torch.randn(6, 8)[:, ::2],
    "inner block": lambda: torch.randn(8, 6)[1:7, 1:5],
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(5, 3, 4).permute(2, 0, 1),
    "one element": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "larger than a vector register": lambda: torch.randn(1037),
}


def twin_of(tensor):
    """A copy at the same strides, gaps included."""
    return torch.empty_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient_as", ["parameter", "contiguous", "expanded"])
@pytest.mark.parametrize("arguments", RULES, ids=str)
def test_fused_equals_unfused_whatever_the_layout(layout, gradient_as, arguments):
    theta = LAYOUTS[layout]()
    twin = twin_of(theta)
    buffers, twin_buffers = [None], [None]
    for _ in range(4):
        if gradient_as == "expanded":
            g = torch.randn(()).expand(theta.shape)
        elif gradient_as == "contiguous":
            g = torch.randn(theta.shape)
        else:
            g = twin_of(theta).normal_()
        kept = g.clone()
        fused_descend_([theta], [g], buffers, lr=0.1, **arguments)
        descend_([twin], [g], twin_buffers, lr=0.1, **arguments)
        assert torch.equal(g, kept)
        assert_close(theta, twin)
        assert_close(buffers, twin_buffers)


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


@pytest.mark.parametrize("arguments", RULES[4:], ids=str)
def test_fused_takes_layouts_and_late_gradients_in_one_call(arguments):
    theta = [make() for make in LAYOUTS.values()]
    twins = [twin_of(t) for t in theta]
    buffers, twin_buffers = [None] * len(theta), [None] * len(theta)
    for have in (range(0, len(theta), 2), range(len(theta)), range(len(theta))):
        gradients = [torch.randn(theta[i].shape) for i in have]
        for rule, all_theta, all_buffers in (
            (fused_descend_, theta, buffers),
            (descend_, twins, twin_buffers),
        ):
            part = [all_buffers[i] for i in have]
            rule([all_theta[i] for i in have], gradients, part, lr=0.1, **arguments)
            for i, buffer in zip(have, part, strict=True):
                all_buffers[i] = buffer
        assert_close(theta, twins)
    assert_close(buffers, twin_buffers)


@pytest.mark.parametrize("layout", ["contiguous", "every second column", "channels last"])
@pytest.mark.parametrize("arguments", RULES, ids=str)
def test_found_inf_on_the_first_step_changes_nothing(layout, arguments):
    theta = LAYOUTS[layout]()
    before, buffers = theta.clone(), [None]
    g = torch.full(theta.shape, float("inf"))
    one, scale = torch.tensor(1.0), torch.tensor(4.0)
    fused_descend_([theta], [g], buffers, lr=0.1, grad_scale=scale, found_inf=one, **arguments)
    assert torch.equal(theta, before)
    assert buffers == [None]


@pytest.mark.parametrize("layout", ["contiguous", "every second column", "channels last"])
@pytest.mark.parametrize("arguments", RULES, ids=str)
def test_found_inf_on_a_later_step_changes_nothing(layout, arguments):
    theta, buffers = LAYOUTS[layout](), [None]
    fused_descend_([theta], [torch.randn(theta.shape)], buffers, lr=0.1, **arguments)
    before = theta.clone()
    buffer_before = None if buffers[0] is None else buffers[0].clone()
    fused_descend_(
        [theta],
        [torch.full(theta.shape, float("nan"))],
        buffers,
        lr=0.1,
        grad_scale=torch.tensor(4.0),
        found_inf=torch.tensor(1.0),
        **arguments,
    )
    assert torch.equal(theta, before)
    assert_close(buffers, [buffer_before])


@pytest.mark.parametrize("layout", ["contiguous", "every second column", "channels last"])
@pytest.mark.parametrize("arguments", RULES, ids=str)
def test_grad_scale_divides_the_gradient(layout, arguments):
    theta = LAYOUTS[layout]()
    twin = twin_of(theta)
    buffers, twin_buffers = [None], [None]
    for _ in range(3):
        g = torch.randn(theta.shape)
        descend_([twin], [g], twin_buffers, lr=0.1, **arguments)
        fused_descend_(
            [theta],
            [g * 1024],
            buffers,
            lr=0.1,
            grad_scale=torch.tensor(1024.0),
            found_inf=torch.tensor(0.0),
            **arguments,
        )
        assert_close(theta, twin)
        assert_close(buffers, twin_buffers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fused_updates_every_entry_in_every_precision(dtype):
    theta = torch.ones(1037, dtype=dtype)
    fused_descend_([theta], [torch.ones(1037, dtype=dtype)], [], lr=0.5)
    assert torch.equal(theta, torch.full((1037,), 0.5, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_lr_may_be_a_tensor_of_one_element(shape, requires_grad):
    lr = torch.full(shape, 0.5, requires_grad=requires_grad)
    theta = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        descend_([theta], [torch.tensor([1.0, 6.0])], [], lr=lr)
    assert theta.tolist() == [0.5, -1.0]


def test_weight_decay_may_be_a_tensor():
    theta = torch.tensor([8.0])
    descend_([theta], [torch.tensor([2.0])], [], lr=0.5, weight_decay=torch.tensor(0.5))
    assert theta.tolist() == [5.0]
