"""What onnxruntime makes of featx's graphs by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from featx import PretrainedFeatureExtractor
from featx.activations.exported import sessions
from featx.activations.exported.onnx_pass import OnnxPass

_AT_ONCE = 8  # what suits it on a few cores


def bare_run(extractor: PretrainedFeatureExtractor) -> Callable[[np.ndarray], None]:
    """Takes pixels (n, height, width, 3) through the graph that reads what an extractor asks for, and nothing else.

    In pieces that suit it, each shared by as many threads as torch has, which spin in between: its defaults.
    """
    items = extractor._items([np.zeros((8, 8, 3), np.uint8)], reset=False)
    recipe = extractor._extraction(items).with_engine("onnx").recipe
    passing = recipe.passes(1)._pass(torch.empty(0, dtype=torch.uint8), recipe.plan.slots)
    assert isinstance(passing, OnnxPass)
    outputs = tuple(slot.column.name for slot in recipe.plan.slots)
    runtime = sessions._runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = sessions._cut(passing.graph, outputs)
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(pixels: np.ndarray) -> None:
        for start in range(0, len(pixels), _AT_ONCE):
            session.run(list(outputs), {"tiles": pixels[start : start + _AT_ONCE]})

    return run
