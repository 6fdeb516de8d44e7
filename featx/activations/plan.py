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
from featx.activations.pooling import GRID_POOLINGS, SIDE_BY_SIDE, check_pooling, names_of_poolings, width_of
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
    def prefix(self) -> str:
        """What the names of its columns begin with."""
        if self.layer.layout == "vector":
            return self.layer.label
        cells = f"{self.grid}x{self.grid}" if self.grid > 1 and self.pooling in GRID_POOLINGS else ""
        return f"{self.layer.label}_{self.pooling}{cells}"

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
    """What to read in one pass, each part normalised on its own, then put side by side.

    Parameters
    ----------
    slots : tuple of Slot
        In the order of the columns.
    normalize : str or None
        As in PretrainedFeatureExtractor.
    """

    slots: tuple[Slot, ...]
    normalize: str | None

    def __post_init__(self) -> None:
        for slot in self.slots:
            check_pooling(*slot)

    @classmethod
    def of(
        cls,
        layers: Sequence[Layer],
        pooling: str | Sequence[str],
        grid: int,
        normalize: str | None,
        usual: Callable[[Layer], tuple[str, ...]] = lambda _: ("avg",),
    ) -> FeaturePlan:
        """For layers in this order, with parameters as in PretrainedFeatureExtractor.

        ``usual`` tells what "auto" means for a layer.

        Raises
        ------
        LayerError
            A pooling has no meaning for one of the layers.
        ValueError
            The poolings cannot stand side by side.
        """
        names, slots = names_of_poolings(pooling), list[Slot]()
        for layer in layers:
            of_layer = usual(layer) if names == ("auto",) else names
            # A vector is the same in all of them.
            slots += [Slot(layer, name, grid) for name in (of_layer[:1] if layer.layout == "vector" else of_layer)]
        return cls(tuple(slots), normalize)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are read, each once."""
        return tuple(dict.fromkeys(slot.layer for slot in self.slots))

    @property
    def pooling(self) -> str | list[str]:
        """How the first layer is pooled, as the parameter says it, with "auto" resolved."""
        names = [slot.pooling for slot in self.slots if slot.layer == self.slots[0].layer]
        return names[0] if len(names) == 1 else names

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row: (n_features,), or (height, width, channels) for maps."""
        shapes = [slot.shape for slot in self.slots]
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))

    def names(self) -> np.ndarray:
        """Names of the columns: layer, pooling where there was something to pool, position."""
        names = [f"{slot.prefix}_{i}" for slot in self.slots for i in range(slot.shape[-1])]
        return np.asarray(names, dtype=object)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Rows from one part (n, width) per slot: normalised, side by side; maps take the first one's grid."""
        parts = [
            normalised(part.reshape(-1, *slot.shape), self.normalize)
            for slot, part in zip(self.slots, parts, strict=True)
        ]
        if self.slots[0].pooling == "map":
            parts = [parts[0], *(_resized(part, parts[0].shape[1:3]) for part in parts[1:])]
        return side_by_side(parts)


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
        for pooling in SIDE_BY_SIDE:
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
