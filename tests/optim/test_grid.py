"""SGD against torch.optim.SGD: bit for bit where torch's loop is the reference.

torch's own loop is compared with, for its other modes have faults: foreach with nesterov writes
into the gradients and rounds the momentum to half precision on a CPU, fused is blind to strides and
to late first gradients.
"""

import copy

import pytest
import torch
from optimizers import EVERY_MODE, EVERY_RULE, MODES, RULES, twin_of
from torch.testing import assert_close

from gdtrain.optim import SGD

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
LAYOUTS = {
    "contiguous": lambda d: torch.randn(3, 5, dtype=d),
    "transposed": lambda d: torch.randn(5, 3, dtype=d).t(),
    "gaps": lambda d: torch.randn(3, 10, dtype=d)[:, ::2],
    "inner block": lambda d: torch.randn(8, 6, dtype=d)[1:7, 1:5],
    "permuted": lambda d: torch.randn(5, 3, 4, dtype=d).permute(2, 0, 1),
    "channels last": lambda d: torch.randn(2, 3, 4, 4, dtype=d).to(
        memory_format=torch.channels_last
    ),
    "empty": lambda d: torch.randn(0, 2, dtype=d),
    "scalar": lambda d: torch.randn((), dtype=d),
    "odd": lambda d: torch.randn(1037, dtype=d),
}
GRADIENTS = {
    "as the parameter": lambda p: torch.randn_like(p),
    "contiguous": lambda p: torch.randn(p.shape, dtype=p.dtype),
    "expanded": lambda p: torch.randn((), dtype=p.dtype).expand(p.shape),
}


def twins(tensors):
    return [torch.nn.Parameter(twin_of(t)) for t in tensors]


def assert_same(ours, theirs, mode):
    if "fused" in mode and ours is not None:  # the kernel contracts: it rounds less often
        few_roundings = 8 * torch.finfo(ours.dtype).eps
        assert_close(ours, theirs, rtol=few_roundings, atol=few_roundings, check_stride=False)
    else:
        assert_close(ours, theirs, rtol=0, atol=0, check_stride=False)


@EVERY_RULE
@EVERY_MODE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_updates_and_state_in_every_layout_with_late_gradients(rule, mode, dtype, gradient):
    if dtype.is_complex and "fused" in mode:
        pytest.skip("the kernel takes no complex parameters")
    start = [make(dtype) for make in LAYOUTS.values()]
    ours, theirs = twins(start), twins(start)
    sgd = SGD(ours, lr=0.05, **rule, **mode)
    torch_sgd = torch.optim.SGD(theirs, lr=0.05, **rule, foreach=False)
    for t in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            # the first gradient of every second parameter comes late, then one is missing
            p.grad = None if (t < 2 and i % 2) or (t == 3 and i == 0) else gradient(p)
            q.grad = p.grad
        given = [None if p.grad is None else p.grad.clone() for p in ours]
        sgd.step()
        torch_sgd.step()
        for p, q, g in zip(ours, theirs, given, strict=True):
            assert_same(p, q, mode)
            states = [sgd.state.get(p, {}), torch_sgd.state.get(q, {})]
            assert_same(*(state.get("momentum_buffer") for state in states), mode)
            assert (p.grad is None) == (g is None)
            if g is not None:
                assert torch.equal(p.grad, g)


@pytest.mark.parametrize("rule", [RULES["plain"], RULES["all"]], ids=["plain", "all"])
@EVERY_MODE
def test_millions_of_entries(rule, mode):
    start = [torch.randn(2 * 10**6)]
    ours, theirs = twins(start), twins(start)
    sgd = SGD(ours, lr=0.05, **rule, **mode)
    torch_sgd = torch.optim.SGD(theirs, lr=0.05, **rule, foreach=False)
    for _ in range(2):
        ours[0].grad = torch.randn_like(ours[0])
        theirs[0].grad = ours[0].grad.clone()
        sgd.step()
        torch_sgd.step()
    assert_same(ours[0], theirs[0], mode)


# ------------------------------------------------------------ the same script

SCRIPT = """
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
).to(dtype)
if channels_last:
    model = model.to(memory_format=torch.channels_last)
x, y = torch.randn(24, 1, 8, 8, dtype=dtype), torch.randint(3, (24,))
decay = [p for p in model.parameters() if p.ndim > 1]
others = [p for p in model.parameters() if p.ndim == 1]
optimizer = SGD(
    [{"params": decay, "weight_decay": 0.01}, {"params": others}],
    lr=0.05, momentum=0.9, nesterov=True, **mode,
)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
model[0].requires_grad_(False)
for epoch in range(3):
    if epoch == 1:
        model[0].requires_grad_(True)
    for i in torch.randperm(24).split(6):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[i]), y[i])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
"""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [MODES["default"], MODES["loop"]], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_same_script_with_the_class_replaced_gives_the_same_numbers(dtype, mode, channels_last):
    seen = []
    for optimizer in (SGD, torch.optim.SGD):
        names = {"torch": torch, "copy": copy, "SGD": optimizer, "dtype": dtype, "mode": mode}
        names |= {"channels_last": channels_last, "losses": []}
        exec(SCRIPT, names)
        seen.append((names["losses"], list(names["model"].parameters())))
    assert len(seen[0][0]) == 12
    assert_close(*seen, rtol=0, atol=0)
