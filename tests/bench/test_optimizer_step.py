import json

import optimizer_step
import pytest
import torch


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_compares_with_all_three_of_torch_and_with_both_kernels(tmp_path, capsys):
    file = tmp_path / "steps.json"
    optimizer_step.main(
        f"--only linear-momentum --threads 1 --repetitions 2 --seconds 0.001 --json {file}".split()
    )
    found = json.loads(file.read_text())
    against = [row["against"] for row in found["rows"]]
    assert against == ["best of torch", *optimizer_step.TORCH, *optimizer_step.KERNELS]
    assert all(row["work"] == "linear-momentum" for row in found["rows"])
    assert all(len(row["ours_repetitions"]) == 2 for row in found["rows"])
    best, *three = [row["baseline"] for row in found["rows"]][:4]
    assert best == min(three)
    assert found["environment"]["threads"] == 1
    assert "best of torch" in capsys.readouterr().out


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_all_contenders_make_the_same_updates(momentum, monkeypatch):
    seen = []

    def kept(model, device):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(4, 8))]
        for p in params:
            p.grad = torch.randn_like(p)
        seen.append(params)
        return params, [p.grad for p in params]

    monkeypatch.setattr(optimizer_step, "gradients", kept)
    steps = optimizer_step.contenders("linear", momentum)
    assert len(seen) == len(steps) == 6
    if momentum:  # the buffers of the kernels exist before the first step
        assert list(steps)[4:] == list(optimizer_step.KERNELS)
        for first, *others in (seen[:4], seen[4:]):
            torch.testing.assert_close(others, [first] * len(others))
    else:
        torch.testing.assert_close(seen[1:], [seen[0]] * 5)
        torch.manual_seed(0)
        moved = torch.randn(5) - seen[0][0].detach()
        torch.testing.assert_close(moved, 3 * optimizer_step.LR * seen[0][0].grad)
