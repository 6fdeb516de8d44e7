"""One pass through a graph: tiles in, pooled parts out, as `TorchPass` gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from featx.activations.exported.graph import Graph
from featx.activations.exported.sessions import run
from featx.activations.plan import Slot
from featx.images.preprocessing import Preprocessing

# Images in a piece: what few make on their way stays in a core's own cache; small ones are more, for what a call costs.
_FEWEST, _MOST, _VALUES = 2, 16, 2**15


@dataclass(frozen=True)
class OnnxPass:
    """Reads what a graph puts out.

    A batch is cut into small pieces, which as many threads as torch would take compute by themselves: they need not
    wait for each other within a piece, which costs several threads at one piece up to half of their time.

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
        pieces = self._fed(tiles).split(_at_once(tiles))
        # More threads than pieces, as for a lone image, share each of them.
        for_each = max(1, n_threads // len(pieces))

        def read(piece: torch.Tensor) -> list[np.ndarray]:
            return run(self.graph, piece.numpy(), names, for_each)

        if n_threads == 1 or len(pieces) == 1:
            found = [*map(read, pieces)]
        else:
            with ThreadPoolExecutor(n_threads, thread_name_prefix="featx-onnx") as pool:
                found = [*pool.map(read, pieces)]
        parts = [np.concatenate(part) if len(part) > 1 else part[0] for part in zip(*found, strict=True)]
        return dict(zip(slots, map(torch.from_numpy, parts), strict=True))

    def _fed(self, tiles: torch.Tensor) -> torch.Tensor:
        if self.of_pixels:
            return tiles.permute(0, 2, 3, 1).contiguous()  # (n, height, width, 3), which they lie in memory as
        return self.preprocessing.finish(tiles).contiguous()


def _at_once(tiles: torch.Tensor) -> int:
    return min(_MOST, max(_FEWEST, _VALUES // math.prod(tiles.shape[1:])))
