"""featx_micro: the embedded network, small enough to travel inside the package."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from featx.system.devices import to_host

#: Channel statistics of the CIFAR-10 training photos, in units of a 0..1 pixel range.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
INPUT_SIZE = 32
CATEGORIES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Stem(nn.Module):
    """3 x 3 convolution that starts as a whitening of image patches, then GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.activation = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (n, 3, ...) to (n, channels, ...) at the same height and width."""
        return self.activation(self.conv(x))


class ConvBlock(nn.Module):
    """3 x 3 convolution, 2 x 2 max pool, batch normalisation, GELU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (n, in_channels, ...) to (n, out_channels, ...), at half the height and width."""
        return self.activation(self.norm(self.pool(self.conv(x))))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, each batch-normalised, whose result is added to what came in; GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.activation = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (n, channels, ...) to the same shape."""
        inner = self.activation(self.norm1(self.conv1(x)))
        return self.activation(x + self.norm2(self.conv2(inner)))


class FeatxMicro(nn.Module):
    """Residual network of 1.9 million parameters for 32 x 32 images.

    Ten 3 x 3 convolutions at reductions 1, 2, 4 and 8; the whitened stem, the order pool, norm, GELU and the
    residual blocks follow what is known to train fast on CIFAR-10 [1]_.

    Parameters
    ----------
    num_classes : int, default=10
        Width of the output layer.

    References
    ----------
    .. [1] K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498, sections 3.1 to 3.4
           and 4.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Stem(24),
            ConvBlock(24, 64),
            ResidualBlock(64),
            ConvBlock(64, 160),
            ResidualBlock(160),
            ConvBlock(160, 224),
            ResidualBlock(224),
        )
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(224, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores of shape (n, num_classes) for normalised images of shape (n, 3, 32, 32)."""
        return self.head(self.pool(self.features(x)).flatten(1))


def compact(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict for the disk: weights int8 with one scale per output channel (``NAME.scale``), the rest float16."""
    out = {}
    for name, value in state.items():
        value = to_host(value.detach()).contiguous()
        if value.ndim > 1:
            scale = value.abs().flatten(1).amax(1).clamp(min=1e-12) / 127
            out[f"{name}.scale"] = scale
            out[name] = (value / scale.view(-1, *[1] * (value.ndim - 1))).round().to(torch.int8)
        else:
            out[name] = value.half() if value.is_floating_point() else value
    return out


def load_compact(path: str | Path) -> dict[str, torch.Tensor]:
    """The float32 state dict of a file written from `compact`."""
    stored = load_file(path)
    scales = {name.removesuffix(".scale"): stored.pop(name) for name in list(stored) if name.endswith(".scale")}
    out = {name: value.float() if value.is_floating_point() else value for name, value in stored.items()}
    for name, scale in scales.items():
        out[name] = stored[name].float() * scale.view(-1, *[1] * (stored[name].ndim - 1))
    return out
