"""Models: sizes from the data, initial weights, refusals."""

import math

import pytest
import torch
from torch import nn

from gdtrain.data import EmbeddedDataModule
from gdtrain.losses import CrossEntropy, SquaredError
from gdtrain.models import CNN, MLP, Linear, initialise_, resnet18
from gdtrain.models.activations import ACTIVATIONS, Activation


def layers(model, kind):
    return [layer for layer in model.modules() if isinstance(layer, kind)]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------ shapes and sizes


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 8, 8)])
def test_linear_and_mlp_flatten_any_example(shape):
    x = torch.zeros(5, *shape)
    size = math.prod(shape)
    assert Linear(shape, 3)(x).shape == (5, 3)
    assert MLP(shape, 3, hidden=[6, 4])(x).shape == (5, 3)
    assert parameters(Linear(shape, 3)) == 3 * size + 3
    assert parameters(Linear(shape, 3, bias=False)) == 3 * size
    assert parameters(MLP(shape, 3, hidden=[6, 4])) == (size * 6 + 6) + (6 * 4 + 4) + (4 * 3 + 3)


def test_linear_is_w_x_plus_b():
    model = Linear((2,), 1)
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor([[2.0, -1.0]]))
        model.linear.bias.fill_(0.5)
    assert model(torch.tensor([[3.0, 4.0]])).item() == 2.5


def test_mlp_without_hidden_layers_is_linear():
    model = MLP((4,), 2, hidden=[])
    linear = Linear((4,), 2)
    linear.linear.load_state_dict(layers(model, nn.Linear)[0].state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), linear(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("data", "loss", "shape", "outputs"),
    [
        ("digits", CrossEntropy(), (1, 8, 8), 10),
        ("wine", CrossEntropy(), (13,), 3),
        ("diabetes", SquaredError(), (10,), 1),
    ],
)
def test_sizes_come_from_the_data(data, loss, shape, outputs):
    data = EmbeddedDataModule(data)
    data.setup()
    assert data.input_shape == shape
    model = MLP(data.input_shape, loss.outputs(data.num_classes, data.num_targets))
    x, y = data.examples("val")
    prediction = model(x)
    assert prediction.shape == (len(x), outputs)
    loss.check(prediction, y)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 9, 13), (2, 4, 4)])
def test_cnn_fits_images_of_any_size(shape):
    depth, height, width = shape
    model = CNN(shape, 10, channels=[4, 6], hidden=5)
    assert model(torch.zeros(3, *shape)).shape == (3, 10)
    flat = 6 * (height // 4) * (width // 4)
    wanted = (depth * 9 * 4 + 4) + (4 * 9 * 6 + 6) + (flat * 5 + 5) + (5 * 10 + 10)
    assert parameters(model) == wanted


def test_cnn_norm_puts_a_norm_behind_each_convolution():
    shape = (1, 8, 8)
    found = {}
    for norm, kind in (("none", ()), ("group", nn.GroupNorm), ("batch", nn.BatchNorm2d)):
        model = CNN(shape, 2, channels=[6, 16], norm=norm)
        assert model(torch.randn(3, *shape)).shape == (3, 2)
        found[norm] = len(layers(model, kind))
        assert len(layers(model, (nn.GroupNorm, nn.BatchNorm2d))) == found[norm]
    assert found == {"none": 0, "group": 2, "batch": 2}
    groups = [n.num_groups for n in layers(CNN(shape, 2, [6, 16], norm="group"), nn.GroupNorm)]
    assert groups == [2, 8]


@pytest.mark.parametrize(
    ("norm", "independent"), [("none", True), ("group", True), ("batch", False)]
)
def test_only_batch_norm_mixes_the_examples_of_a_batch(norm, independent):
    torch.manual_seed(0)
    model = CNN((1, 8, 8), 2, channels=[4], norm=norm).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    together = model(x)[:2]
    assert torch.allclose(together, model(x[:2]), rtol=1e-10, atol=1e-12) is independent


# ---------------------------------------------------------------------- activations

BY_HAND = {
    "relu": lambda x: max(x, 0.0),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "softplus": lambda x: math.log(1 + math.exp(x)),
    "identity": lambda x: x,
}


def test_every_activation_is_tested():
    assert set(BY_HAND) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", BY_HAND)
def test_activation_acts_on_each_hidden_unit(activation):
    model = MLP((1,), 1, hidden=[1], activation=activation).double()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.0 if p.ndim == 1 else 1.0)
    points = [-2.0, -0.3, 0.0, 0.7, 3.0]
    got = model(torch.tensor(points, dtype=torch.float64).unsqueeze(1))[:, 0].tolist()
    assert got == pytest.approx([BY_HAND[activation](x) for x in points], abs=1e-12)


# ------------------------------------------------------------------- initial weights

SPREAD = {
    "gaussian": lambda fan_in, fan_out: 0.03,
    "kaiming": lambda fan_in, fan_out: math.sqrt(2 / fan_in),
    "xavier": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "default": lambda fan_in, fan_out: 1 / math.sqrt(3 * fan_in),
}


def fans(layer):
    if isinstance(layer, nn.Conv2d):
        field = math.prod(layer.kernel_size)
        return layer.in_channels * field, layer.out_channels * field
    return layer.in_features, layer.out_features


@pytest.mark.parametrize("init", SPREAD)
@pytest.mark.parametrize(
    "make",
    [
        lambda **options: Linear((300,), 100, **options),
        lambda **options: MLP((300,), 40, hidden=[200, 100], **options),
        lambda **options: CNN((8, 8, 8), 60, channels=[48, 64], hidden=80, **options),
    ],
    ids=["linear", "mlp", "cnn"],
)
def test_initial_weights_have_the_spread_of_their_scheme(make, init):
    torch.manual_seed(0)
    model = make(init=init, std=0.03)
    for layer in layers(model, nn.Linear | nn.Conv2d):
        wanted = SPREAD[init](*fans(layer))
        # The standard error of a standard deviation over n draws is 1/√(2n), here at most 1.2%.
        assert layer.weight.std().item() == pytest.approx(wanted, rel=0.05)
        assert layer.weight.mean().abs().item() < 5 * wanted / math.sqrt(layer.weight.numel())
        if init == "default":
            assert 0 < layer.bias.abs().max() <= 1 / math.sqrt(fans(layer)[0])
        else:
            assert layer.bias.abs().max() == 0


def test_initialise_leaves_norms_alone_and_returns_its_module():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LayerNorm(3))
    assert initialise_(model, "zeros") is model
    assert model[0].weight.abs().max() == 0
    assert model[1].weight.tolist() == [1.0, 1.0, 1.0]


# --------------------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    "make",
    [
        lambda p: MLP((6,), 2, hidden=[64, 64], dropout=p),
        lambda p: CNN((1, 8, 8), 2, hidden=64, dropout=p),
    ],
    ids=["mlp", "cnn"],
)
def test_dropout_acts_in_training_only(make):
    torch.manual_seed(0)
    model = make(0.5)
    shape = (6,) if isinstance(model, MLP) else (1, 8, 8)
    x = torch.randn(4, *shape)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    none = make(0.0)
    none.load_state_dict(dict(zip(none.state_dict(), model.state_dict().values(), strict=True)))
    assert torch.equal(none(x), model(x))
    assert not layers(none, nn.Dropout)


def test_dropout_drops_its_share_of_hidden_units_and_scales_the_rest():
    torch.manual_seed(0)
    model = MLP((1,), 1, hidden=[10_000], activation="identity", dropout=0.25)
    with torch.no_grad():
        first, last = layers(model, nn.Linear)
        first.weight.fill_(1.0), first.bias.zero_(), last.weight.fill_(1e-4), last.bias.zero_()
    got = model(torch.ones(1, 1)).item()
    assert got == pytest.approx(1.0, abs=0.03)
    assert got != pytest.approx(1.0, abs=1e-6)


# ------------------------------------------------------------------------- resnet18


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pooling"), [(32, 3, 1, nn.Identity), (64, 7, 2, nn.MaxPool2d)]
)
def test_resnet18_has_a_stem_for_the_size_of_its_images(depth, size, kernel, stride, pooling):
    model = resnet18((depth, size, size), 7).eval()
    assert model.conv1.weight.shape == (64, depth, kernel, kernel)
    assert model.conv1.stride == (stride, stride)
    assert isinstance(model.maxpool, pooling)
    with torch.no_grad():
        assert model(torch.zeros(2, depth, size, size)).shape == (2, 7)


def test_resnet18_has_a_stem_drawn_as_its_other_convolutions():
    torch.manual_seed(0)
    for shape in ((1, 64, 64), (3, 32, 32)):
        stem = resnet18(shape, 2).conv1
        fan_out = 64 * math.prod(stem.kernel_size)
        assert stem.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.06)


def test_resnet18_takes_an_initialisation():
    torch.manual_seed(0)
    model = resnet18((3, 32, 32), 10, init="gaussian", std=0.02)
    assert model.layer2[0].conv1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.fc.bias.abs().max() == 0
    assert model.bn1.weight.tolist() == [1.0] * 64


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP((4,), 2, activation="swish"), "activation must be one of relu.*'swish'"),
        (lambda: MLP((4,), 2, hidden=8), r"list of whole widths.*Received: hidden=8"),
        (lambda: MLP((4,), 2, hidden="8"), "hidden must be a list"),
        (lambda: MLP((4,), 2, hidden=[8, 0]), r"at least 1, such as \[128\].*\[8, 0\]"),
        (lambda: MLP((4,), 2, hidden=[2.5]), r"Received: hidden=\[2.5\]"),
        (lambda: MLP((4,), 2, hidden=[True]), r"Received: hidden=\[True\]"),
        (lambda: MLP((4,), 2, dropout=1.0), r"dropout must be a number in \[0, 1\)\. Received"),
        (lambda: MLP((4,), 2, dropout=-0.1), "dropout must be a number in"),
        (lambda: MLP((4,), 2, init="zeros"), "init=zeros is for linear models"),
        (lambda: CNN((1, 8, 8), 2, init="zeros"), "init=zeros is for linear models"),
        (lambda: CNN((64,), 2), r"model=cnn is for images.*shape \(64,\).*model=mlp"),
        (lambda: CNN((1, 8, 8), 2, channels=[4] * 4), r"at least 16 pixels.*images of 8×8"),
        (lambda: CNN((1, 8, 8), 2, channels=[0]), "channels must be whole numbers"),
        (lambda: CNN((1, 8, 8), 2, channels=[2.0]), "channels must be whole numbers"),
        (lambda: CNN((1, 8, 8), 2, channels=8), "channels must be"),
        (lambda: CNN((1, 8, 8), 2, norm="layer"), "norm must be one of none, group, batch"),
        (lambda: CNN((1, 8, 8), 2, hidden=0), "hidden must be a whole number of at least 1"),
        (lambda: CNN((1, 8, 8), 2, hidden=1.5), "Received: hidden=1.5"),
        (lambda: CNN((1, 8, 8), 2, dropout=math.nan), r"dropout must be a number in \[0, 1\)"),
        (lambda: resnet18((10,), 2), "model=resnet18 is for images"),
        (lambda: resnet18((3, 32, 32), 2, init="zeros"), "init=zeros is for linear models"),
        (lambda: Linear((4,), 2, init="ones"), "init must be one of default, gaussian.*'ones'"),
        (lambda: Linear((4,), 2, init="gaussian", std=0), r"std must be a number in \(0, ∞\)"),
        (lambda: Linear((4,), 2, init="gaussian", std=math.nan), "Received: std=nan"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_activation_of_ones_own_is_given_as_a_class_or_as_an_object():
    class Power(Activation):
        name = "power"

        def __init__(self, exponent=2):
            super().__init__()
            self.exponent = exponent

        def forward(self, z):
            return z**self.exponent

    first, second = (m for m in MLP((1,), 1, [2, 2], Power(3)).layers if isinstance(m, Power))
    assert first is not second
    assert first.exponent == second.exponent == 3
    assert MLP((1,), 1, [2], Power).layers[2].exponent == 2
