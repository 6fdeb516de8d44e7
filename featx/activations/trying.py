"""Whether a layer can be read at all, before it is tried beside others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from featx.activations.engine import DTYPES
from featx.activations.plan import FeaturePlan, unset_before
from featx.exceptions import LayerError
from featx.system.devices import resolve_device


def why_unreadable(extractor: Any, layer: str | int, poolings: Iterable[str | Sequence[str]]) -> str:
    """Why a layer of an extractor's network cannot be read in all of some poolings; empty where it can.

    Loads a network whose weights come from a file, since the file alone tells for which modules it has some.
    """
    spec = extractor._spec()
    architecture = extractor._architecture(spec)
    (place,) = architecture.resolve(layer)
    if spec.weights.kind == "file":
        missing = spec.load(resolve_device(extractor.device), DTYPES[extractor.precision]).missing
        if unset := unset_before(place, architecture, missing):
            return f"the file of weights has nothing for {', '.join(sorted(unset))}."
    try:
        for pooling in poolings:
            FeaturePlan.of([place], pooling, extractor.grid, None, architecture.usual_poolings)
    except LayerError as error:
        return str(error)
    return ""
