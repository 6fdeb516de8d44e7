"""Which tokens of a layer stand for no place in the image, and what grid the others form: what the network says of it.

Nothing is guessed from the number of tokens alone: 1 + 4 + 14 x 14 and 201 look alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any

from torch import nn

from featx.backbones.tracing import Call, lengths_with_trailing

#: Attributes that say how many tokens lead those of the image: timm's, and what users set where nothing tells.
COUNT = "num_prefix_tokens"
#: Attributes that say how many tokens an image has, from top to bottom and from left to right.
GRID = "grid_size"
_GRIDS = (GRID, f"patch_embed.{GRID}")
# Parameters that lead the tokens of the image, as widespread code names them, and whether it is a class token. Numbered
# ones ("cls_token1", "cls_token2") lead those of one branch each.
_LEADING = {
    **dict.fromkeys(("cls_token", "class_token", "class_embedding", "cls_embedding", "cls_tokens"), True),
    **dict.fromkeys(("dist_token", "distillation_token", "reg_token", "reg_tokens", "register_token"), False),
    **dict.fromkeys(("register_tokens", "storage_token", "storage_tokens"), False),
}


# How the rows of some families are made by those who published them, by what their code or configuration is called.
_POOLINGS = {"dinov2": ("cls", "avg"), "dinov3": ("cls",)}
# timm's word for it; an attention head has an output of its own, and in front of it tokens are averaged.
_POOLINGS_OF_TIMM = {"token": ("cls",), "avg": ("avg",), "map": ("avg",), "max": ("max",), "avgmax": ("avg", "max")}
# A word of others for the same: of MAE's own code, and of a configuration of transformers.
_AVERAGES = {True: ("avg",), False: ("cls",)}


def usual_poolings(network: nn.Module) -> tuple[str, ...]:
    """What rows of a network's tokens are usually made by: of the class token, where nothing tells and there is one."""
    modules = [*network.modules()]
    names = [name for module in modules for name in _names_of(module)]
    by_name = (poolings for family, poolings in _POOLINGS.items() if family in names)
    told = (found for module in modules if (found := _told_poolings(module)) is not None)
    return next(by_name, None) or next(told, None) or ("cls",)


def _told_poolings(module: nn.Module) -> tuple[str, ...] | None:
    word = getattr(module, "global_pool", None)
    if isinstance(word, str):
        return _POOLINGS_OF_TIMM.get(word)
    averages = word if isinstance(word, bool) else getattr(getattr(module, "config", None), "use_mean_pooling", None)
    return _AVERAGES[averages] if isinstance(averages, bool) else None


def _names_of(module: nn.Module) -> list[str]:
    """Parts of what its author's code and its configuration call a module."""
    config = getattr(module, "pretrained_cfg", None) or {}
    architecture = config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    kind = getattr(getattr(module, "config", None), "model_type", None)
    told = [part for name in (architecture, kind) if isinstance(name, str) for part in name.split("_")]
    return [*type(module).__module__.split("."), *told]


@dataclass(frozen=True)
class Places:
    """What the tokens of a layer are.

    Attributes
    ----------
    n_prefix : int or None
        Leading tokens that stand for no place; None where nothing tells.
    has_class : bool
        Whether the first of them is a class token.
    grid : (int, int) or None
        Rows and columns that the others fill; None where they fill no grid or nothing tells.
    """

    n_prefix: int | None
    has_class: bool = False
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Told:
    """What a module says of the tokens in front of those of the image; ``counted`` where it has a number for them."""

    n_prefix: int
    has_class: bool
    counted: bool = True


class Tokens:
    """What a network says of its tokens, which join those of the image somewhere.

    Parameters
    ----------
    root : nn.Module
        The network.
    calls : sequence of Call
        Its trace.
    shape : (int, int, int)
        Channels, height and width of the images of the trace.
    told : Told or None
        What the table says; None asks the network.
    """

    def __init__(self, root: nn.Module, calls: Sequence[Call], shape: tuple[int, int, int], told: Told | None) -> None:
        self._root, self._calls, self._shape, self._size, self._in_table = root, calls, shape, shape[1:], told
        self._inside = lru_cache(maxsize=None)(self._told_inside)

    def places(self, name: str, n_tokens: int, position: int) -> Places:
        """What the tokens are that a module puts out or takes, where ``position`` of the trace's calls have begun."""
        told = self._in_table or self._told(name)
        known = Told(0, False) if told is None else told
        if n_tokens <= max(1, known.n_prefix):  # a class token that is processed alone
            return Places(0, known.has_class, (n_tokens, 1))
        if known.n_prefix and not known.counted and n_tokens in self._lengths_with_trailing:
            return Places(None)
        grids = [*self._said_grids(name), *self._maps(position)]
        for leading in _first_unless_they_join_later(known):
            for grid in grids:
                if math.prod(grid) == n_tokens - leading.n_prefix:
                    return Places(leading.n_prefix, leading.has_class, grid)
        if told is None or not (told.counted or self._has_room(n_tokens - told.n_prefix, position)):
            return Places(None)
        for leading in _first_unless_they_join_later(told):
            if (found := _in_proportion(n_tokens - leading.n_prefix, self._size)) is not None:
                return Places(leading.n_prefix, leading.has_class, found)
        return Places(told.n_prefix, told.has_class)

    @cached_property
    def _lengths_with_trailing(self) -> frozenset[int]:
        return lengths_with_trailing(self._root, self._shape)

    def _told(self, name: str) -> Told | None:
        """By the outermost module around a layer that has a count, or else by what lies nearest."""
        around = scopes_of(name)
        counts = (_count_of(self._root.get_submodule(scope)) for scope in around)
        said = next((count for count in counts if count is not None), None)
        nearest = (self._inside(scope) for scope in reversed(around))
        return said or next((told for told in nearest if told is not None), None)

    def _told_inside(self, scope: str) -> Told | None:
        """By what lies within a module, where all that say anything agree."""
        inside = list(self._root.get_submodule(scope).named_modules())
        counts = [(name.count("."), found) for name, module in inside if (found := _count_of(module)) is not None]
        outermost = {found for depth, found in counts if depth == min(counts, key=lambda count: count[0])[0]}
        said = outermost or {found for _, module in inside if (found := _parameters_of(module)) is not None}
        return next(iter(said)) if len(said) == 1 else None

    def _said_grids(self, name: str) -> Iterator[tuple[int, int]]:
        for scope in scopes_of(name):
            for attribute in _GRIDS:
                try:
                    grid = attrgetter(attribute)(self._root.get_submodule(scope))
                except AttributeError:
                    continue
                if isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(side, int) for side in grid):
                    yield grid[0], grid[1]

    def _maps(self, position: int) -> list[tuple[int, int]]:
        """Grids that convolutions put out before, latest first, and those that remain where cells are merged."""
        shapes = [call.shape for call in self._calls[:position] if isinstance(call.module, nn.modules.conv._ConvNd)]
        grids = [(shape[2], shape[3]) for shape in reversed(shapes) if len(shape) == 4 and shape[0] == 2]
        merged = [
            (height // factor, width // factor)
            for height, width in grids
            for factor in range(2, min(height, width) + 1)
            if height % factor == width % factor == 0
        ]
        return list(dict.fromkeys([*grids, *merged]))

    def _has_room(self, n_places: int, position: int) -> bool:
        """Whether the image ever had so many cells: where it had not, something joined that nothing tells of."""
        cells = [math.prod(grid) for grid in self._maps(position)]
        return n_places <= max(cells, default=n_places)


def _first_unless_they_join_later(told: Told) -> tuple[Told, ...]:
    """Tokens may join behind a layer (CaiT's class token), in which case all that there are have places."""
    return told, Told(0, False)


def scopes_of(name: str) -> list[str]:
    """A module's name after those of all modules around it, outermost first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _count_of(module: nn.Module) -> Told | None:
    count: Any = getattr(module, COUNT, None)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        return None
    has_class = getattr(module, "has_class_token", getattr(module, "cls_token", True) is not None)
    return Told(count, count > 0 and bool(has_class))


def _parameters_of(module: nn.Module) -> Told | None:
    found: dict[str, set[int]] = {}
    for name, value in module.named_parameters(recurse=False):
        if (plain := name.rstrip("_0123456789")) in _LEADING:
            found.setdefault(plain, set()).add(value.shape[-2] if value.ndim > 1 else 1)
    if not found or any(len(counts) > 1 for counts in found.values()):
        return None
    return Told(sum(map(sum, found.values())), any(_LEADING[name] for name in found), counted=False)


def _in_proportion(n_places: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of square cells that fill an image, what is left at its edges dropped; None where none do."""
    height, width = size
    rows = round(math.sqrt(max(0, n_places) * height / width))
    if not rows or n_places % rows:
        return None
    columns = n_places // rows
    largest, smallest = min(height / rows, width / columns), max(height / (rows + 1), width / (columns + 1))
    return (rows, columns) if smallest < largest else None
