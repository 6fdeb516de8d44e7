"""What to read, how to reduce it and what the columns are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from featx.activations.joining import normalised, side_by_side
from featx.activations.pooling import GRID_POOLINGS, check_pooling, width_of
from featx.backbones.layers import Architecture, Layer
from featx.exceptions import LayerError
from featx.store import Column


class Slot(NamedTuple):
    """One layer in one pooling: what a pass reads at one place."""

    layer: Layer
    pooling: str
    grid: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image's part: (width,), or (height, width, channels) for maps."""
        width = width_of(self.layer, self.pooling, self.grid)
        return (*self.layer.spatial, width) if self.pooling == "map" else (width,)

    @property
    def column(self) -> Column:
        """Its name and width in a store; poolings that come to the same share them."""
        place = f"{self.layer.name}#{self.layer.call}.{self.layer.side}"
        vector = self.layer.layout == "vector"  # of which every pooling gives the same
        pooling = "vector" if vector and self.pooling != "map" else self.pooling
        grid = self.grid if self.pooling in GRID_POOLINGS and not vector else 1
        return Column(f"{place} {pooling} {grid}", math.prod(self.shape))


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
    def slots(self) -> tuple[Slot, ...]:
        """What is read, in the order of the columns."""
        return tuple(Slot(layer, self.pooling, self.grid) for layer in self.layers)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row: (n_features,), or (height, width, channels) for maps."""
        shapes = [slot.shape for slot in self.slots]
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))

    def names(self) -> np.ndarray:
        """Names of the columns: layer, pooling where there was something to pool, position."""
        names = [f"{prefix}_{i}" for layer, prefix in self._prefixes() for i in range(self._width(layer))]
        return np.asarray(names, dtype=object)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Rows from one part (n, width) per slot: normalised, side by side; maps take the first one's grid."""
        parts = [
            normalised(part.reshape(-1, *slot.shape), self.normalize)
            for slot, part in zip(self.slots, parts, strict=True)
        ]
        if self.pooling == "map":
            parts = [parts[0], *(_resized(part, parts[0].shape[1:3]) for part in parts[1:])]
        return side_by_side(parts)

    def _width(self, layer: Layer) -> int:
        return width_of(layer, self.pooling, self.grid)

    def _prefixes(self) -> list[tuple[Layer, str]]:
        cells = f"{self.grid}x{self.grid}" if self.grid > 1 and self.pooling in GRID_POOLINGS else ""
        return [
            (layer, layer.label if layer.layout == "vector" else f"{layer.label}_{self.pooling}{cells}")
            for layer in self.layers
        ]


def _resized(part: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    if part.shape[1:3] == grid:
        return part
    cells = torch.from_numpy(part).permute(0, 3, 1, 2)
    return F.interpolate(cells, grid, mode="bilinear", align_corners=False).permute(0, 2, 3, 1).numpy()


def kept_slots(keep: str, architecture: Architecture, missing: frozenset[str] = frozenset()) -> tuple[Slot, ...]:
    """What one pass keeps beside what was asked for: each column once, and nothing that has no weights."""
    if keep == "asked":
        return ()
    names = sorted({*architecture.stages, *(architecture.blocks if keep == "blocks" else ())}, key=_depth(architecture))
    return slots_of([*map(architecture.layer, names), architecture.penultimate], architecture, missing)


def slots_of(
    layers: Sequence[Layer], architecture: Architecture, missing: frozenset[str] = frozenset()
) -> tuple[Slot, ...]:
    """Layers in every pooling over the whole image, as far as it makes sense for them and modules are not missing."""
    found: dict[str, Slot] = {}
    for layer in layers:
        if unset_before(layer, architecture, missing):
            continue
        for pooling in GRID_POOLINGS:
            slot = Slot(layer, pooling, 1)
            if _is_possible(slot):
                found.setdefault(slot.column.name, slot)
    return tuple(found.values())


def _depth(architecture: Architecture) -> Callable[[str], int]:
    return lambda name: architecture.layer(name).position


def _is_possible(slot: Slot) -> bool:
    try:
        check_pooling(*slot)
    except LayerError:
        return False
    return True


def unset_before(layer: Layer, architecture: Architecture, missing: frozenset[str]) -> set[str]:
    """Modules that a layer's values pass through and that are missing: they have no weights."""
    before = {name for call in architecture.calls[: layer.position] for name in call.names}
    return before & missing
