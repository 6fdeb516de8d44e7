"""What training is to reach: one protocol, which classes and real numbers follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn


class Loss(Protocol):
    """What a head's outputs mean, and how wrong they are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the targets, on the device."""

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor, *, mean: bool = False) -> torch.Tensor:
        """Loss of each image, of shape (n,); or their mean, whose slope takes less time to find."""

    def mixable(self, targets: torch.Tensor) -> torch.Tensor:
        """The same targets in a form that can be mixed in proportions."""

    def score(self, outputs: torch.Tensor, targets: torch.Tensor, weights: np.ndarray) -> float:
        """How good outputs are: what the estimator's ``score`` gives."""

    def probe(
        self, rows: np.ndarray, targets: np.ndarray, weights: np.ndarray, strength: float, out: nn.Linear
    ) -> None:
        """Set a linear layer to scikit-learn's linear model on standardised rows (LP-FT).

        Parameters
        ----------
        rows : ndarray of shape (n, n_features), float32
        targets : ndarray of shape (n,) or (n, n_outputs)
        weights : ndarray of shape (n,)
        strength : float
            How much it is regularised, in the model's own words.
        out : nn.Linear
            Changed in place.
        """


@dataclass(frozen=True)
class Targets:
    """What the training images are.

    Attributes
    ----------
    values : ndarray of shape (n,) or (n, n_outputs)
        As the loss takes them.
    weights : ndarray of shape (n,), float
        Positive, 1 on average.
    loss : Loss
    """

    values: np.ndarray
    weights: np.ndarray
    loss: Loss


class Meaning(Protocol):
    """What a fitted head's outputs stand for: all that prediction needs of the y it was fitted on."""

    @property
    def n_outputs(self) -> int:
        """Of the head."""

    def to_json(self) -> dict[str, Any]:
        """For a file that holds no pickles."""


class Answers(Protocol):
    """A user's y, checked."""

    @property
    def groups(self) -> np.ndarray:
        """Of shape (n,) or (n, n_labels): images are held out by a share of each group."""

    @property
    def meaning(self) -> Meaning:
        """What outputs fitted to it stand for, of answers that are measured."""

    def __len__(self) -> int:
        """Images."""

    def measured(self, rows: np.ndarray, weights: np.ndarray) -> Answers:
        """The same, with what training learns from the answers of some rows before its first step."""

    def targets(self, rows: np.ndarray, weights: np.ndarray) -> Targets:
        """What to train on in some rows; weights are those of all rows."""


def even(weights: np.ndarray) -> np.ndarray:
    """Weights that are 1 on average."""
    return np.asarray(weights / weights.mean())
