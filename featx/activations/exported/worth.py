"""From what number of images on it pays to export a network: by a fixed table, never by a clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from featx.activations.plan import Slot
from featx.backbones.layers import Architecture
from featx.backbones.tracing import Call


@dataclass(frozen=True)
class Kind:
    """What an export costs and saves, for networks of a kind; measured on two cores.

    Attributes
    ----------
    export_s, export_s_per_call : float
        Seconds that an export takes, and those of each module with weights.
    saved_s, saved_s_per_call : float
        Seconds of one thread that onnxruntime saves per billion multiply-adds of an image, and per module with weights.
    """

    export_s: float
    export_s_per_call: float
    saved_s: float
    saved_s_per_call: float


# By benchmarks/bench_engines.py, its parts cost, speed and auto, while nothing else ran.
_KINDS = {
    "depthwise": Kind(2.0, 0.11, 0.07, 0.0),
    "convolutional": Kind(2.0, 0.1, 0.0075, 2e-4),
    "attention": Kind(5.0, 0.1, 0.008, 0.0),
}


def pays(architecture: Architecture, slots: Sequence[Slot], n_images: int, n_threads: int) -> bool:
    """Whether reading some slots of so many images saves more time than the export takes."""
    deepest = max(slot.layer.position for slot in slots)
    calls = [call for call in architecture.calls[:deepest] if _multiply_adds(call)]
    kind = _KINDS[kind_of(calls)]
    billions = sum(map(_multiply_adds, calls)) / 1e9
    saved = n_images * (kind.saved_s * billions + kind.saved_s_per_call * len(calls)) / n_threads
    return saved > kind.export_s + kind.export_s_per_call * len(calls)


def kind_of(calls: Sequence[Call]) -> str:
    """What kind of network some calls are of."""
    if any(isinstance(call.module, nn.Conv2d) and call.module.groups == call.shape[1] > 1 for call in calls):
        return "depthwise"
    tokens = sum(call.layout == "tokens" for call in calls)
    return "attention" if 2 * tokens > len(calls) else "convolutional"


def _multiply_adds(call: Call) -> int:
    """Of one image."""
    n_values = math.prod(call.shape) // 2
    if isinstance(call.module, nn.Conv2d):
        return n_values * call.module.in_channels // call.module.groups * math.prod(call.module.kernel_size)
    return n_values * call.module.in_features if isinstance(call.module, nn.Linear) else 0
