"""The part of a network that trains, with its head."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from featx.activations.plan import FeaturePlan
from featx.activations.pooling import pool_together
from featx.system.devices import fill, to_double
from featx.system.fits import one_thread, run_fits

# A feature that hardly varies is left as it is.
_LEAST_SPREAD = 1e-6
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
        """Scores of a network that does not train, shape (n, n_outputs), float32.

        A BLAS adds up the products of a row in an order that depends on how many rows there are. In double precision
        that order leaves no trace in a float32, however near to zero a score is.
        """
        rows = to_double(self.features(values))
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


def probe(rows: np.ndarray, targets: np.ndarray, weights: np.ndarray, C: float, out: nn.Linear) -> None:
    """Set a linear layer to the logistic regression on standardised rows (LP-FT).

    Parameters
    ----------
    rows : ndarray of shape (n, n_features), float32
    targets : ndarray of shape (n,) of int, or (n, n_outputs) of 0 and 1
    weights : ndarray of shape (n,)
    C : float
        As in scikit-learn: smaller is more regularised.
    out : nn.Linear
        Changed in place.
    """
    mean, spread = rows.mean(0), rows.std(0)
    spread[spread < _LEAST_SPREAD] = 1
    standard = (rows - mean) / spread
    if targets.ndim == 1:
        with one_thread():
            weight, bias = _logistic(standard, targets, weights, C, out.out_features)
    else:
        calls = [partial(_logistic, standard, column.astype(int), weights, C, 2) for column in targets.T]
        columns = run_fits(calls, rows.size, 2 * rows.nbytes)
        weight = np.stack([of_one[1] - of_one[0] for of_one, _ in columns])
        bias = np.stack([of_one[1] - of_one[0] for _, of_one in columns])
    weight = weight / spread
    with torch.no_grad():
        fill(out.weight, torch.from_numpy(weight))
        fill(out.bias, torch.from_numpy(bias - weight @ mean))


def _logistic(
    rows: np.ndarray, targets: np.ndarray, weights: np.ndarray, C: float, n_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (n_classes, n_features) and bias of a softmax regression; classes without a row get none."""
    weight, bias = np.zeros((n_classes, rows.shape[1])), np.zeros(n_classes)
    seen = np.unique(targets)
    if len(seen) == 1:  # nothing to tell apart: only how sure one can be
        bias[seen[0]] = np.log1p(weights.sum())
        return weight, bias
    model = LogisticRegression(C=C, max_iter=200, tol=1e-3)
    # Past what others wrap around it, such as mlflow's autolog, which would log the head's start as the user's run.
    inspect.unwrap(LogisticRegression.fit)(model, rows, targets, sample_weight=weights)
    if len(seen) == 2:  # one score for the second class
        weight[seen] = np.concatenate([-model.coef_, model.coef_]) / 2
        bias[seen] = np.concatenate([-model.intercept_, model.intercept_]) / 2
    else:
        weight[seen], bias[seen] = model.coef_, model.intercept_
    return weight, bias
