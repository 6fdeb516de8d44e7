"""From the output of one layer to one row per image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from featx.backbones.layers import Layer
from featx.exceptions import LayerError

GEM_POWER = 3
GEM_FLOOR = 1e-6

_GRIDS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "avg": lambda cells, grid: F.adaptive_avg_pool2d(cells, grid),
    "max": lambda cells, grid: F.adaptive_max_pool2d(cells, grid),
    "gem": lambda cells, grid: F.adaptive_avg_pool2d(cells.clamp(min=GEM_FLOOR) ** GEM_POWER, grid) ** (1 / GEM_POWER),
}

GRID_POOLINGS = tuple(_GRIDS)


def pool(output: torch.Tensor, layer: Layer, pooling: str, grid: int) -> torch.Tensor:
    """Reduce what a layer put out, in float32, sharing no memory with it.

    Parameters
    ----------
    output : tensor of shape (n, ...)
        As the network made it, in ``layer.layout``; may be overwritten by the network later.
    layer : Layer
    pooling : {"avg", "max", "gem", "cls", "flatten", "map"}
    grid : int
        Cells per side for avg, max and gem.

    Returns
    -------
    rows : tensor of shape (n, width), or (n, height, width, channels) for "map"
    """
    if layer.layout == "vector" or (pooling == "flatten" and layer.layout != "NHWC"):
        return output.to(torch.float32, copy=True).flatten(1)
    if pooling == "cls":
        return output[:, 0].to(torch.float32, copy=True)
    cells = as_cells(output, layer).to(torch.float32, copy=True)  # (n, channels, height, width)
    if pooling == "map":
        return cells.permute(0, 2, 3, 1).contiguous()
    return (cells if pooling == "flatten" else _GRIDS[pooling](cells, grid)).flatten(1)


def as_cells(output: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The output as (n, channels, height, width), without class token."""
    if layer.layout == "NCHW":
        return output
    if layer.layout == "NHWC":
        return output.permute(0, 3, 1, 2)
    places = output[:, layer.n_prefix_tokens :].transpose(1, 2)  # (n, channels, tokens)
    return places.unflatten(2, layer.spatial)


def width_of(layer: Layer, pooling: str, grid: int) -> int:
    """Entries per row that ``pool`` makes of a layer; channels for "map"."""
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
    if pooling == "cls" and layer.layout != "vector" and not layer.n_prefix_tokens:
        raise LayerError(
            f'A layer with a class token is expected for pooling="cls", got layer {layer.label!r} of layout '
            f'{layer.layout} without one. Use "avg", "max" or "gem".'
        )
    if pooling == "map" and layer.layout not in ("NCHW", "NHWC", "tokens"):
        raise LayerError(
            f'A spatial layer is expected for pooling="map", got layer {layer.label!r} with output of shape '
            f"(n, {', '.join(map(str, layer.shape[1:]))}). Use a stage, such as layers=-1."
        )
    if layer.layout == "tokens" and layer.spatial[1] == 1 < layer.spatial[0] and (grid > 1 or pooling == "map"):
        raise LayerError(
            f"Tokens that fill a square are expected for grid={grid} and pooling={pooling!r}, got layer "
            f"{layer.label!r} with {layer.spatial[0]} of them. Use grid=1."
        )
    if layer.layout == "other" and pooling != "flatten":
        raise LayerError(
            f"A layer with 2, 3 or 4 dimensions is expected for pooling={pooling!r}, got layer {layer.label!r} with "
            f'output of shape (n, {", ".join(map(str, layer.shape[1:]))}). Use pooling="flatten".'
        )
