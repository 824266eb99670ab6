"""Convolutional networks: a small one of our own, and torchvision's ResNet-18."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from gdtrain.models.dropout import Dropout
from gdtrain.models.initialisation import Init, check_hidden_init, initialise_
from gdtrain.ranges import Whole

__all__ = ["CNN", "resnet18"]


class CNN(nn.Module):
    """Blocks of 3×3 convolution, norm, ReLU and 2×2 max-pooling, then a hidden layer.

    Args:
        input_shape: (channels, height, width) of one image.
        num_outputs: C, range [1, ∞).
        channels: Channels of each block, each in [1, ∞). Each block halves height and width.
        hidden: Width of the hidden layer, range [1, ∞).
        norm: "none", "group" (independent of the batch) or "batch" (mixes the examples of a
            batch, so that its gradient is no mean over examples).
        dropout: Share of hidden units that are dropped in training, range [0, 1).
        init: Initial weights, see `initialise_`; not "zeros".
        std: Standard deviation of init="gaussian".

    Raises:
        ValueError: The input is no image or too small for so many blocks; an argument is out of
            range.

    Example:
        >>> import torch
        >>> CNN((1, 28, 28), 10)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        channels: Sequence[int] = (16, 32),
        hidden: int = 64,
        norm: Literal["none", "group", "batch"] = "none",
        dropout: float = 0.0,
        init: Init = "default",
        std: float = 0.01,
    ) -> None:
        super().__init__()
        depth, height, width = _image_shape(input_shape, "cnn")
        if isinstance(channels, int | str) or any(
            isinstance(c, bool) or not isinstance(c, int) or c < 1 for c in channels
        ):
            raise ValueError(
                f"channels must be whole numbers of at least 1, in a list such as [16, 32]. "
                f"Received: channels={channels!r}."
            )
        if min(height, width) < 2 ** len(channels):
            raise ValueError(
                f"{len(channels)} blocks halve the image {len(channels)} times and need at least "
                f"{2 ** len(channels)} pixels a side. Received: images of {height}×{width}. "
                f"Give model.channels fewer entries."
            )
        if norm not in ("none", "group", "batch"):
            raise ValueError(f"norm must be one of none, group, batch. Received: {norm!r}.")
        Whole(1).check("hidden", hidden)
        check_hidden_init(init)
        self.input_shape, self.num_outputs = tuple(input_shape), num_outputs
        self.channels, self.hidden = list(channels), hidden
        self.norm, self.dropout = norm, dropout
        layers: list[nn.Module] = []
        for next_depth in channels:
            layers.append(nn.Conv2d(depth, next_depth, kernel_size=3, padding=1))
            if norm == "group":
                groups = next(g for g in (8, 4, 2, 1) if next_depth % g == 0)
                layers.append(nn.GroupNorm(groups, next_depth))
            elif norm == "batch":
                layers.append(nn.BatchNorm2d(next_depth))
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            depth, height, width = next_depth, height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(depth * height * width, hidden), nn.ReLU()]
        if dropout != 0:
            layers.append(Dropout(dropout, layer=len(layers)))
        layers.append(nn.Linear(hidden, num_outputs))
        self.layers = nn.Sequential(*layers)
        initialise_(self, init, std)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, height, width) to (B, C)."""
        return self.layers(x)


def resnet18(
    input_shape: Sequence[int], num_outputs: int, init: Init = "default", std: float = 0.01
) -> nn.Module:
    """torchvision's ResNet-18, without pretrained weights, its first layer sized from the images.

    Images below 64 pixels a side get the stem that He et al. used on CIFAR: a 3×3 convolution of
    stride 1 and no pooling, since the ImageNet stem would shrink 32×32 to 8×8 at once.

    Args:
        input_shape: (channels, height, width) of one image.
        num_outputs: C, range [1, ∞).
        init: Initial weights, see `initialise_`; not "zeros".
        std: Standard deviation of init="gaussian".

    Raises:
        ValueError: The input is no image, or init="zeros".

    Example:
        >>> import torch
        >>> model = resnet18((3, 32, 32), 10).eval()
        >>> model(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])

    References:
        He et al., Deep Residual Learning for Image Recognition, 2016, arXiv 1512.03385.
    """
    from torchvision.models import resnet18 as build

    depth, height, width = _image_shape(input_shape, "resnet18")
    check_hidden_init(init)
    model = build(weights=None, num_classes=num_outputs)
    if min(height, width) < 64:
        model.conv1 = nn.Conv2d(depth, 64, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif depth != 3:
        model.conv1 = nn.Conv2d(depth, 64, kernel_size=7, stride=2, padding=3, bias=False)
    if depth != 3 or min(height, width) < 64:
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return initialise_(model, init, std)


def _image_shape(input_shape: Sequence[int], model: str) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ValueError(
            f"model={model} is for images, (channels, height, width). Received: examples of shape "
            f"{tuple(input_shape)}. Use model=mlp or model=linear for tables."
        )
    depth, height, width = input_shape
    return depth, height, width
