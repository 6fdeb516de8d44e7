"""From the output of one layer to one row per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from featx.backbones.layers import Layer
from featx.backbones.tokens import COUNT, GRID
from featx.exceptions import LayerError
from featx.system.devices import kind_of

GEM_POWER = 3
GEM_FLOOR = 1e-6

GRID_POOLINGS = ("avg", "max", "gem")
#: What may stand side by side, and is kept of each layer that has what it takes.
SIDE_BY_SIDE = (*GRID_POOLINGS, "cls")

# Values pooled at once on a CPU: while they are in a cache that its cores share, each further pooling costs less.
_VALUES_AT_ONCE = 2**21


def names_of_poolings(pooling: object) -> tuple[str, ...]:
    """A user's ``pooling``, one name or several, each once.

    Raises
    ------
    ValueError
        Several of which one stands alone, is there twice or is unknown, or none.
    """
    if isinstance(pooling, str):
        return (pooling,)
    names: tuple[Any, ...] = tuple(pooling)  # type: ignore[arg-type]
    if not names or not all(names.count(name) == 1 and name in SIDE_BY_SIDE for name in names):
        raise ValueError(
            f'A list of "avg", "max", "gem" and "cls", each at most once, is expected, got pooling={pooling!r}. '
            "Anything else stands alone, without a list."
        )
    return names


def pool_together(output: torch.Tensor, layer: Layer, poolings: Sequence[tuple[str, int]]) -> list[torch.Tensor]:
    """Reduce what a layer put out, in float32, sharing no memory with it.

    Several poolings cost little more than one.

    Parameters
    ----------
    output : tensor of shape (n, ...)
        As the network made it, in ``layer.layout``; may be overwritten by the network later.
    layer : Layer
    poolings : sequence of (str, int)
        Names, but "auto", each with its cells per side, which count for avg, max and gem.

    Returns
    -------
    rows : list of tensor of shape (n, width), or (n, height, width, channels) for "map"
    """
    found: dict[int, torch.Tensor] = {}
    over_cells = [i for i, (name, _) in enumerate(poolings) if name in GRID_POOLINGS and layer.layout != "vector"]
    if over_cells:
        pooled = _pooled_cells(as_cells(output, layer), [poolings[i] for i in over_cells])
        found.update(zip(over_cells, pooled, strict=True))
    return [found[i] if i in found else _rearranged(output, layer, name) for i, (name, _) in enumerate(poolings)]


def pool_in_one_piece(output: torch.Tensor, layer: Layer, pooling: str, grid: int) -> torch.Tensor:
    """One pooling, as `pool_together`, with nothing that depends on the number of rows, for whoever traces it."""
    if pooling in GRID_POOLINGS and layer.layout != "vector":
        return _over_grid(as_cells(output, layer).to(torch.float32), pooling, grid, None).flatten(1)
    return _rearranged(output, layer, pooling)


def _rearranged(output: torch.Tensor, layer: Layer, pooling: str) -> torch.Tensor:
    """A copy of vectors, of class tokens, or of everything."""
    if layer.layout == "vector" or (pooling == "flatten" and layer.layout != "NHWC"):
        return output.to(torch.float32, copy=True).flatten(1)
    if pooling == "cls":
        return output[:, 0].to(torch.float32, copy=True)
    cells = as_cells(output, layer).to(torch.float32, copy=True)  # (n, channels, height, width)
    return cells.permute(0, 2, 3, 1).contiguous() if pooling == "map" else cells.flatten(1)


def _pooled_cells(cells: torch.Tensor, poolings: Sequence[tuple[str, int]]) -> list[torch.Tensor]:
    values = max(1, cells[0].numel())
    at_once = max(1, _VALUES_AT_ONCE // values) if kind_of(cells.device).in_pieces else len(cells)
    # In float32 also of half precision, in which sums are rounded and third powers end at 40.
    chunks = [chunk.to(torch.float32) for chunk in cells.split(at_once)]
    # One for all chunks: fresh memory for each would cost more than the arithmetic. Slopes need what was there.
    needs_spare = any(name == "gem" for name, _ in poolings) and not cells.requires_grad
    spare = torch.empty_like(chunks[0]) if needs_spare else None
    parts = [[_over_grid(chunk, name, grid, spare).flatten(1) for name, grid in poolings] for chunk in chunks]
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


def _over_grid(cells: torch.Tensor, pooling: str, grid: int, spare: torch.Tensor | None) -> torch.Tensor:
    """One pooling of cells; ``spare``, of at least their size, is overwritten by gem."""
    if pooling == "max":
        return cells.amax((2, 3)) if grid == 1 else F.adaptive_max_pool2d(cells, grid)
    if pooling == "gem":
        out = None if spare is None else spare[: len(cells)]
        # Positive, or the root would be NaN; in place, on memory that is this function's own by now.
        cubes = torch.clamp(cells, min=GEM_FLOOR, out=out).pow_(GEM_POWER)
        return _mean(cubes, grid) ** (1 / GEM_POWER)
    return _mean(cells, grid)


def _mean(cells: torch.Tensor, grid: int) -> torch.Tensor:
    return cells.mean((2, 3)) if grid == 1 else F.adaptive_avg_pool2d(cells, grid)


def as_cells(output: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The output as (n, channels, height, width), without class token."""
    if layer.layout == "NCHW":
        return output
    if layer.layout == "NHWC":
        return output.permute(0, 3, 1, 2)
    places = output[:, layer.n_prefix_tokens :].transpose(1, 2)  # (n, channels, tokens)
    return places.unflatten(2, layer.spatial)


def width_of(layer: Layer, pooling: str, grid: int) -> int:
    """Entries per row that ``pool_together`` makes of a layer; channels for "map"."""
    if layer.layout == "vector" or pooling in ("cls", "map"):
        return layer.channels
    if pooling == "flatten":
        entries = 1
        for length in layer.shape[1:]:
            entries *= length
        return entries
    return layer.channels * grid * grid


def check_pooling(layer: Layer, pooling: str, grid: int) -> None:
    """Raise where a pooling has no meaning for a layer.

    Raises
    ------
    LayerError
    """
    if layer.layout == "tokens" and layer.n_prefix_tokens is None and pooling != "flatten":
        raise LayerError(
            "A network that tells its class and register tokens from those of the image is expected for "
            f"pooling={pooling!r}, got layer {layer.label!r} with {layer.shape[1]} tokens, and nothing says how many "
            f"of them stand for no place. Set backbone.{COUNT} to the number that lead the others, as in "
            f'backbone.{COUNT} = 1 (0 for none), or use pooling="flatten".'
        )
    if pooling == "cls" and layer.layout != "vector" and not layer.has_class_token:
        raise LayerError(
            f'A layer with a class token is expected for pooling="cls", got layer {layer.label!r} of layout '
            f'{layer.layout} without one. Use "avg", "max", "gem" or "auto".'
        )
    if pooling == "map" and layer.layout not in ("NCHW", "NHWC", "tokens"):
        raise LayerError(
            f'A spatial layer is expected for pooling="map", got layer {layer.label!r} with output of shape '
            f"(n, {', '.join(map(str, layer.shape[1:]))}). Use a stage, such as layers=-1."
        )
    if layer.layout == "tokens" and layer.grid is None and (pooling == "map" or (pooling != "cls" and grid > 1)):
        raise LayerError(
            f"Tokens that fill a grid are expected for pooling={pooling!r} and grid={grid}, got layer {layer.label!r} "
            f"with {layer.spatial[0]} of them, and nothing says which. Set backbone.{GRID} = (rows, columns), or use "
            'pooling="avg" and grid=1.'
        )
    if layer.layout == "other" and pooling != "flatten":
        raise LayerError(
            f"A layer with 2, 3 or 4 dimensions is expected for pooling={pooling!r}, got layer {layer.label!r} with "
            f'output of shape (n, {", ".join(map(str, layer.shape[1:]))}). Use pooling="flatten".'
        )
