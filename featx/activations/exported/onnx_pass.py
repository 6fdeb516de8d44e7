"""One pass through a graph: tiles in, pooled parts out, as `TorchPass` gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from featx.activations.exported.graph import Graph
from featx.activations.exported.sessions import run
from featx.activations.plan import Slot
from featx.images.preprocessing import Preprocessing

# Images that pass together: what they make on the way stays in the caches of a few cores.
AT_ONCE = 8


@dataclass(frozen=True)
class OnnxPass:
    """Reads what a graph puts out.

    Attributes
    ----------
    graph : Graph
    preprocessing : Preprocessing
    of_pixels : bool
        Whether the graph takes pixels and normalises them itself.
    """

    graph: Graph
    preprocessing: Preprocessing
    of_pixels: bool

    def puts_out(self, slots: Sequence[Slot]) -> bool:
        """Whether it can read all of some slots."""
        return {slot.column.name for slot in slots} <= {*self.graph.outputs}

    def parts(self, tiles: torch.Tensor, slots: Sequence[Slot]) -> dict[Slot, torch.Tensor]:
        """What the network makes of tiles (n, ...), as preprocessing leaves them: (n, width) for each slot."""
        names = [slot.column.name for slot in slots]
        n_threads = torch.get_num_threads()  # of now, as torch would take them
        found = [run(self.graph, self._fed(some).numpy(), names, n_threads) for some in tiles.split(AT_ONCE)]
        parts = [np.concatenate(part) if len(part) > 1 else part[0] for part in zip(*found, strict=True)]
        return dict(zip(slots, map(torch.from_numpy, parts), strict=True))

    def _fed(self, tiles: torch.Tensor) -> torch.Tensor:
        if self.of_pixels:
            return tiles.permute(0, 2, 3, 1).contiguous()  # (n, height, width, 3), which they lie in memory as
        return self.preprocessing.finish(tiles).contiguous()
