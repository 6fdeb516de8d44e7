"""One pass in torch: tiles through the network, out as pooled parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from featx.activations.plan import Slot
from featx.activations.pooling import pool_together
from featx.activations.taps import read
from featx.backbones.layers import Architecture, Layer
from featx.backbones.networks import Network
from featx.exceptions import LayerError
from featx.images.preprocessing import Preprocessing
from featx.system.devices import in_memory, kind_of, move, to_host, undisturbed

# Up to this many values torch sends a batch of one past oneDNN (aten/src/ATen/native/Convolution.cpp, use_mkldnn).
_LONE_IMAGE_VALUES = 20480

# On a CPU a batch is cut until no module's output is larger: a C library hands larger blocks back to the system at once
# (glibc those from 32 MiB on), and getting them anew page by page costs up to half as much as the arithmetic.
_LARGEST_BYTES, _FEWEST_AT_ONCE, _ALL = 2**25 - 2**16, 4, 2**31


@dataclass(frozen=True)
class TorchPass:
    """Reads layers of a network with hooks, on any device and in any precision."""

    network: Network
    architecture: Architecture
    preprocessing: Preprocessing
    device: str
    dtype: torch.dtype

    def puts_out(self, slots: Sequence[Slot]) -> bool:
        """Whether it can read all of some slots."""
        return True

    def parts(self, tiles: torch.Tensor, slots: Sequence[Slot]) -> dict[Slot, torch.Tensor]:
        """What the network makes of tiles (n, ...), as preprocessing leaves them: (n, width) for each slot."""
        by_layer: dict[Layer, list[Slot]] = {}
        for slot in slots:
            by_layer.setdefault(slot.layer, []).append(slot)
        reads = list(by_layer.values())

        def reduce(position: int, output: torch.Tensor) -> list[torch.Tensor]:
            slots = reads[position]
            parts = pool_together(output, slots[0].layer, [(slot.pooling, slot.grid) for slot in slots])
            return [part.flatten(1) for part in parts]

        def read_some(some: torch.Tensor) -> list[torch.Tensor]:
            images = self.preprocessing.finish(move(some, self.device))
            # In the layout of the weights: in another, every convolution would turn its input.
            images = _in_company(images.to(self.dtype)).contiguous(memory_format=torch.channels_last)
            found = read(module, images, list(by_layer), reduce)
            for layer, parts in zip(by_layer, found, strict=True):
                check_rows(layer, parts[0], len(images))
            return [to_host(part[: len(some)]) for of_layer in found for part in of_layer]  # without the company

        needs = in_memory(self.device, f"a batch of {len(tiles)} images")
        # The lock: all clones share the module, and one thread's taps would see another's images.
        with torch.inference_mode(), self.network.lock, undisturbed(self.device), needs:
            module = self.network.reading(by_layer)
            found = [read_some(some) for some in tiles.chunk(-(-len(tiles) // self._at_once))]
        parts = found[0] if len(found) == 1 else [torch.cat(part) for part in zip(*found, strict=True)]
        return dict(zip((slot for of_layer in reads for slot in of_layer), parts, strict=True))

    @cached_property
    def _at_once(self) -> int:
        """Images of a batch that pass through the network together; all where smaller pieces would leave cores idle."""
        calls = self.architecture.calls
        largest = max(math.prod(shape) // 2 for call in calls for shape in (call.shape, call.input_shape))
        fit = _LARGEST_BYTES // (largest * self.dtype.itemsize)
        in_pieces = kind_of(self.device).in_pieces
        return fit if in_pieces and fit >= max(_FEWEST_AT_ONCE, torch.get_num_threads()) else _ALL


def _in_company(images: torch.Tensor) -> torch.Tensor:
    """A lone small image twice: torch convolves it by another routine than a batch, with other rounding."""
    lone = len(images) == 1 and images.numel() <= _LONE_IMAGE_VALUES
    return torch.cat([images, images]) if lone else images


def check_rows(layer: Layer, part: torch.Tensor, n: int) -> None:
    """Raise where a layer did not put out one row per image.

    Raises
    ------
    LayerError
    """
    if len(part) != n:
        raise LayerError(
            f"Layers with one row per image are expected, got layer {layer.label!r} with {len(part)} rows for {n} "
            "images. Read another layer."
        )
