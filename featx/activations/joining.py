"""Rows of several layers, normalised and put side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A row of zeros stays one.
_SHORTEST = np.float32(1e-12)


# In NumPy: for rows this short, waking torch's threads takes longer than the sum.
def normalised(rows: np.ndarray, normalize: str | None) -> np.ndarray:
    """Rows of one layer as ``normalize`` of PretrainedFeatureExtractor says, along the last axis."""
    if normalize is None:
        return rows
    if normalize == "signed-sqrt":
        rows = np.sign(rows) * np.sqrt(np.abs(rows))
    lengths = np.sqrt(np.einsum("...i,...i->...", rows, rows))[..., np.newaxis]
    return rows / np.maximum(lengths, _SHORTEST)


def side_by_side(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One array of several along the last axis; a single one as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
