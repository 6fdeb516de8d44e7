"""Linear models on standardised features, put into a linear layer that takes the features as they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from featx.system.devices import fill

# A feature that hardly varies is left as it is.
_LEAST_SPREAD = 1e-6


def standardised(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows less their mean over their spread, the mean, and the spread, both of shape (n_features,)."""
    mean, spread = rows.mean(0), rows.std(0)
    spread[spread < _LEAST_SPREAD] = 1
    return (rows - mean) / spread, mean, spread


def set_linear(out: nn.Linear, weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> None:
    """Put a linear model of standardised rows into a layer that takes the rows themselves.

    Parameters
    ----------
    out : nn.Linear
        Changed in place.
    weight : ndarray of shape (n_outputs, n_features)
    bias : ndarray of shape (n_outputs,)
    mean, spread : ndarray of shape (n_features,)
        That `standardised` gave.
    """
    weight = weight / spread
    with torch.no_grad():
        fill(out.weight, torch.from_numpy(weight))
        fill(out.bias, torch.from_numpy(bias - weight @ mean))
