"""The part of a network that trains, with its head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from featx.activations.plan import FeaturePlan
from featx.activations.pooling import pool_together
from featx.system.devices import move, to_double, to_host

# Weights that are turned into double precision at a time.
_MOST_IN_DOUBLE = 2**22


class TunedNetwork(nn.Module):
    """A tail, the pooling of the layer that the head reads, and the head.

    Parameters
    ----------
    tail : nn.Module or None
        From the values at the cut to the layer's output; None where the values are the pooled rows themselves.
    plan : FeaturePlan
        Of the one layer that the head reads, in one pooling or several.
    head : nn.Sequential
    """

    def __init__(self, tail: nn.Module | None, plan: FeaturePlan, head: nn.Sequential) -> None:
        super().__init__()
        self.tail, self.plan, self.head = tail, plan, head

    @property
    def may_draw(self) -> bool:
        """Whether a pass in training mode may draw random numbers."""
        return self.tail is not None or any(isinstance(layer, nn.Dropout) and layer.p for layer in self.head)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Scores of shape (n, n_outputs)."""
        return self.head(self.features(values))

    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """Scores of a network that does not train, shape (n, n_outputs), float32."""
        return self._scores(self.features(values))

    def scores_of(self, rows: np.ndarray) -> np.ndarray:
        """Scores of features, as of `scores`; both float32 on the CPU."""
        device = next(self.head.parameters()).device
        with torch.no_grad():
            return to_host(self._scores(move(torch.from_numpy(rows), device))).numpy()

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Of features.

        A BLAS adds up the products of a row in an order that depends on how many rows there are. In double precision
        that order leaves no trace in a float32, however near to zero a score is.
        """
        rows = to_double(rows)
        for layer in self.head:
            rows = _linear_in_double(layer, rows) if isinstance(layer, nn.Linear) else layer(rows)
        return rows.float()

    def features(self, values: torch.Tensor) -> torch.Tensor:
        """Pooled, normalised rows of shape (n, n_features), float32."""
        if self.tail is None:
            return values
        slots = self.plan.slots
        parts = pool_together(self.tail(values), slots[0].layer, [(slot.pooling, slot.grid) for slot in slots])
        return torch.cat([self._normalised(part) for part in parts], dim=1)

    def _normalised(self, rows: torch.Tensor) -> torch.Tensor:
        if self.plan.normalize == "signed-sqrt":
            rows = rows.sign() * rows.abs().clamp(min=1e-12).sqrt()  # the root of 0 has no slope
        return rows if self.plan.normalize is None else F.normalize(rows)


def _linear_in_double(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    at_once = max(1, _MOST_IN_DOUBLE // layer.in_features)
    pieces = zip(layer.weight.split(at_once), layer.bias.split(at_once), strict=True)
    return torch.cat([F.linear(rows, to_double(weight), to_double(bias)) for weight, bias in pieces], dim=1)


def make_head(n_features: int, hidden: Sequence[int], n_outputs: int, dropout: float) -> nn.Sequential:
    """Linear layers with ReLU between them; dropout before each but the first of several."""
    layers: list[nn.Module] = []
    width = n_features
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(dropout)]
        width = size
    if not hidden:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(width, n_outputs))
