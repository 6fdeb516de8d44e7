"""Small networks from outside the catalogue, each with a habit that has broken feature extractors before."""

from __future__ import annotations

import torch
from torch import nn


class InPlace(nn.Module):
    """Writes over its layers' outputs: an in-place ReLU, and an addition into a convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv(x))
        out = self.second(x)
        out += x
        return self.head(self.relu(out).mean((2, 3)))


class Many(nn.Module):
    """Calls one module twice, puts out tuples and dictionaries, and shares a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.conv
        self.pair = Pair()
        self.never = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.conv(torch.relu(self.again(x)))
        x, _ = self.pair(x)
        return {"scores": self.head(x.mean((2, 3)))}


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x * 3


class Stubborn(nn.Module):
    """Catches every Exception that comes out of its parts, and depends on values that only a real run has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.deep = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            x = self.conv(x)
            x = x * float(x.mean() > -1e9)
            x = self.deep(x)
        except Exception as error:
            raise AssertionError("nothing was expected to go wrong") from error
        return x.mean((2, 3))


class Wrapper(nn.Module):
    """Holds a network and nothing else, as many training frameworks do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


class Permuting(nn.Module):
    """A ConvNeXt block as most people write it: channels last inside, channels first outside."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.LayerNorm(12)
        self.linear = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Prototypes(nn.Module):
    """One of its layers puts out two rows, however many images there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.prototypes = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3)) @ self.prototypes(x.new_ones(2, 5)).T


class Patches(nn.Module):
    """A transformer as most people write it: a convolution makes patches, parameters of some names lead them.

    Parameters
    ----------
    leading : dict of str to int
        Tokens in front of the patches, by the name of the parameter that they are.
    trailing : int
        Tokens behind them.
    """

    def __init__(self, leading: dict[str, int], trailing: int = 0, patch: int = 8) -> None:
        super().__init__()
        self.embeddings = Embeddings(leading, trailing, patch)
        self.blocks = nn.Sequential(*(nn.Linear(6, 6) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embeddings(x))


class Embeddings(nn.Module):
    def __init__(self, leading: dict[str, int], trailing: int, patch: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 6, patch, stride=patch)
        self.behind = nn.Parameter(100 + torch.randn(1, trailing, 6))
        self._leading = [*leading]
        for name, count in leading.items():
            setattr(self, name, nn.Parameter(100 + torch.randn(1, count, 6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.projection(x).flatten(2).transpose(1, 2)
        tokens = [*(getattr(self, name) for name in self._leading), patches, self.behind]
        return torch.cat([token.expand(len(x), -1, -1) for token in tokens], dim=1)


class Growing(nn.Module):
    """Its deep layer takes powers of e: black pictures give 1, white ones more than float16 or float32 can hold."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.shallow = nn.Conv2d(3, 4, 1)
        nn.init.constant_(self.shallow.weight, 1 / 3)
        nn.init.zeros_(self.shallow.bias)
        self.pool = nn.AvgPool2d(2)
        self.deep = Powers(power)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.deep(self.pool(self.shallow(x))).mean((2, 3)).clamp(max=1))


class Powers(nn.Module):
    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.power * x)
