"""An exported network, and what tells whether a machine computes with it what torch did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

#: Largest distance between rows of two engines, as a fraction of the row's norm.
TOLERANCE = 1e-5
#: How the input of a graph is called.
INPUT = "tiles"
_ABOUT, _MODEL, _SAMPLES = "about", "model", "samples"


@dataclass(frozen=True)
class Graph:
    """A network from tiles to pooled parts.

    Attributes
    ----------
    model : bytes
        In ONNX. Takes ``tiles``: uint8 of shape (n, height, width, 3), or float32 of shape (n, channels, height, width)
        that are normalised already.
    outputs : tuple of str
        Names of the columns, each of shape (n, width).
    missing : frozenset of str
        As of the network.
    samples : ndarray of shape (8, ...)
        What it takes.
    rows : dict of str to ndarray of shape (8, width)
        What torch makes of them, by column.
    """

    model: bytes
    outputs: tuple[str, ...]
    missing: frozenset[str]
    samples: np.ndarray
    rows: Mapping[str, np.ndarray]

    @cached_property
    def key(self) -> str:
        """What identifies the model within a process."""
        return xxhash.xxh3_128_hexdigest(self.model)

    def to_bytes(self) -> bytes:
        """All of it, as a file of safetensors."""
        about = json.dumps({"outputs": self.outputs, "missing": sorted(self.missing)}).encode()
        rows = {str(position): self.rows[name] for position, name in enumerate(self.outputs)}
        texts = {name: np.frombuffer(text, np.uint8) for name, text in ((_ABOUT, about), (_MODEL, self.model))}
        return save({**texts, _SAMPLES: self.samples, **rows})

    @classmethod
    def from_bytes(cls, content: bytes) -> Graph | None:
        """What `to_bytes` gave; None of anything else."""
        try:
            tensors = load(content)
            about = json.loads(tensors[_ABOUT].tobytes())
            outputs = tuple(about["outputs"])
            rows = {name: tensors[str(position)] for position, name in enumerate(outputs)}
            model = tensors[_MODEL].tobytes()
            return cls(model, outputs, frozenset(about["missing"]), tensors[_SAMPLES], rows)
        except (SafetensorError, ValueError, KeyError, TypeError):
            return None

    def farthest(self, found: Sequence[np.ndarray]) -> tuple[float, str]:
        """The largest distance of any row from torch's, as a fraction of its norm, and the column that it is in.

        Parameters
        ----------
        found : sequence of ndarray of shape (8, width)
            What an engine makes of the samples, by output.
        """
        distances = {name: _distance(rows, self.rows[name]) for name, rows in zip(self.outputs, found, strict=True)}
        worst = max(distances, key=lambda name: distances[name])
        return distances[worst], worst


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """NaN counts as infinitely far."""
    apart, norms = np.linalg.norm(found - wanted, axis=1), np.linalg.norm(wanted, axis=1)
    fractions = np.divide(apart, norms, out=np.where(apart == 0, 0.0, np.inf), where=norms > 0, dtype=float)
    return float(np.where(np.isnan(fractions), np.inf, fractions).max(initial=0.0))
