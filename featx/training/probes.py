"""Linear models on standardised features, put into a linear layer that takes the features as they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from featx.system.devices import fill

# A feature that hardly varies is left as it is.
_LEAST_SPREAD = 1e-6


def standardised(rows: np.ndarray, least: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows less their mean over their spread, the mean, and the spread, both of shape (n_features,).

    Parameters
    ----------
    rows : ndarray of shape (n, n_features)
    least : float, default=0.0
        What varies less than this share of the usual feature, the median of those that vary, is divided by so much.
        Networks have features that are zero for nearly all images: divided by their own spread over a few images, one
        that is not zero in another image outweighs all others.
    """
    mean, spread = rows.mean(0), rows.std(0)
    varies = spread >= _LEAST_SPREAD
    floor = least * np.median(spread[varies]) if varies.any() else 0.0
    spread = np.where(varies | (floor > 0), np.maximum(spread, floor), 1).astype(rows.dtype)
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
