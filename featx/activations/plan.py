"""What to read, how to reduce it and what the columns are called."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional as F

from featx.activations.pooling import check_pooling, pool, width_of
from featx.backbones.layers import Layer


@dataclass(frozen=True)
class FeaturePlan:
    """Layers to read in one pass, each pooled and normalised on its own, then put side by side.

    Parameters
    ----------
    layers : tuple of Layer
        In the order of the columns.
    pooling, grid, normalize
        As in PretrainedFeatureExtractor.
    """

    layers: tuple[Layer, ...]
    pooling: str
    grid: int
    normalize: str | None

    def __post_init__(self) -> None:
        for layer in self.layers:
            check_pooling(layer, self.pooling, self.grid)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row: (n_features,), or (height, width, channels) for maps."""
        width = sum(self._width(layer) for layer in self.layers)
        return (*self.layers[0].spatial, width) if self.pooling == "map" else (width,)

    def names(self) -> np.ndarray:
        """Names of the columns: layer, pooling where there was something to pool, position."""
        names = [f"{prefix}_{i}" for layer, prefix in self._prefixes() for i in range(self._width(layer))]
        return np.asarray(names, dtype=object)

    def reduce(self, position: int, output: torch.Tensor) -> torch.Tensor:
        """What is kept of one layer's output, at the moment it is captured."""
        rows = pool(output, self.layers[position], self.pooling, self.grid)
        return _normalised(rows, self.normalize)

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The layers side by side; maps are brought to the first one's grid."""
        if self.pooling == "map":
            parts = [parts[0], *(_resized(part, parts[0].shape[1:3]) for part in parts[1:])]
        return torch.cat(parts, dim=-1)

    def _width(self, layer: Layer) -> int:
        return width_of(layer, self.pooling, self.grid)

    def _prefixes(self) -> list[tuple[Layer, str]]:
        cells = f"{self.grid}x{self.grid}" if self.grid > 1 and self.pooling in ("avg", "max", "gem") else ""
        return [
            (layer, layer.label if layer.layout == "vector" else f"{layer.label}_{self.pooling}{cells}")
            for layer in self.layers
        ]


def _normalised(rows: torch.Tensor, normalize: str | None) -> torch.Tensor:
    if normalize is None:
        return rows
    if normalize == "signed-sqrt":
        rows = rows.sign() * rows.abs().sqrt()
    return F.normalize(rows, dim=-1)


def _resized(part: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    if part.shape[1:3] == grid:
        return part
    cells = F.interpolate(part.permute(0, 3, 1, 2), tuple(grid), mode="bilinear", align_corners=False)
    return cells.permute(0, 2, 3, 1)
