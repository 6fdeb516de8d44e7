"""How the scores of a tuned network change with what a layer puts out, by which maps for a class are made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from featx.activations.pooling import as_cells
from featx.backbones.layers import Architecture, Layer
from featx.training.model import Built
from featx.training.tuned import TunedNetwork


@dataclass(frozen=True)
class Slopes:
    """Of one image.

    Attributes
    ----------
    values : tensor of shape (channels, height, width)
        What the layer puts out.
    slopes : tensor of shape (n_chosen, channels, height, width)
        Derivatives of the chosen scores with respect to the values.
    """

    values: torch.Tensor
    slopes: torch.Tensor


def slopes_of(built: Built, tile: torch.Tensor, chosen: Sequence[int]) -> Slopes | None:
    """At the deepest place that the scores depend on; None where there is no such place.

    Parameters
    ----------
    built : Built
    tile : tensor of shape (1, channels, height, width)
        Normalised, on the network's device.
    chosen : sequence of int
        Of the outputs.
    """
    model = built.model
    module = built.module
    if module is None:
        network = model.pretrained()
        with network.lock:  # not with the hooks of another thread's pass
            module = copy.deepcopy(network.module)
    module.eval().requires_grad_(False)
    tuned = TunedNetwork(replace(model.split, cut=None).tail(module), model.plan, built.head.eval())
    for place in _places(model.architecture, model.plan.slots[0].layer):
        # Where a class token is read, the last places have no say any more.
        found = _at(place, module, tuned, tile, chosen)
        if found is not None and bool(found.slopes.any()):
            return found
    return None


def _places(architecture: Architecture, attach: Layer) -> list[Layer]:
    """The deepest layer with places that the head can depend on, and the stages before it, deepest first."""
    layers = [architecture.resolve(name)[0] for name in reversed(architecture.names)]
    spatial = [layer for layer in layers if layer.position <= attach.position and _has_places(layer)]
    stages = [layer for layer in map(architecture.layer, reversed(architecture.stages)) if _has_places(layer)]
    return [*spatial[:1], *(stage for stage in stages if spatial and stage.position < spatial[0].position)]


def _has_places(layer: Layer) -> bool:
    has_grid = layer.layout in ("NCHW", "NHWC") or (layer.layout == "tokens" and layer.grid is not None)
    return has_grid and layer.spatial != (1, 1)


def _at(
    place: Layer, module: nn.Module, tuned: TunedNetwork, tile: torch.Tensor, chosen: Sequence[int]
) -> Slopes | None:
    """None where the layer's output is not what the scores are made of."""
    kept: list[torch.Tensor] = []
    calls = 0

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != place.call or not isinstance(output, torch.Tensor):
            return output
        kept.append(output.detach().clone().requires_grad_())
        return kept[-1].clone()  # which may be written over

    handle = module.get_submodule(place.name).register_forward_hook(cut)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            (scores,) = tuned(tile)
            if not kept or not scores.requires_grad:
                return None
            slopes = [torch.autograd.grad(scores[i], kept[0], retain_graph=True)[0] for i in chosen]
    finally:
        handle.remove()
    cells = [as_cells(part, place)[0] for part in (kept[0].detach(), *slopes)]
    return Slopes(cells[0], torch.stack(cells[1:]))
