"""What a search over recipes is asked to learn, before an image is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from featx.choosing.folds import folds_of
from featx.choosing.task import Task
from featx.images.sources import Items
from featx.training.classification import Labels


@dataclass(frozen=True)
class Asked:
    """Images, and how answers about them are judged.

    Attributes
    ----------
    items : Items
    labels : Labels
    rows : ndarray of int
        Of the images that weigh something and can be read, as far as is known; ascending.
    weights, groups : ndarray of shape (n,) or None
        Of all images.
    cv : int, splitter or list
    scorer : callable or None
        None for accuracy.
    seed : int
    """

    items: Items
    labels: Labels
    rows: np.ndarray
    weights: np.ndarray | None
    groups: np.ndarray | None
    cv: Any
    scorer: Any
    seed: int

    def task(self, rows: np.ndarray) -> Task:
        """Of some of the images.

        Raises
        ------
        ValueError
            There are not enough of them for the folds.
        """
        y = self.labels.y[rows]
        return Task(
            y,
            np.arange(y.shape[1]) if y.ndim == 2 else np.unique(y),
            None if self.weights is None else self.weights[rows],
            None if self.groups is None else self.groups[rows],
            folds_of(self.labels.y, rows, self.cv, self.groups, self.seed),
            self.scorer,
            self.seed,
        )
