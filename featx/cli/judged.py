"""What a model says of photos whose classes are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featx.cli.sources import Labelled


@dataclass(frozen=True)
class Judged:
    """Photos, and what a model that has not learnt from them takes them for.

    Attributes
    ----------
    photos : Labelled
    classes : ndarray of shape (n_classes,), str
        All that the model knows; none of a model of numbers.
    predicted : ndarray of shape (n,), str or float
    proba : ndarray of shape (n, n_classes) or None
        None where a model gives none.
    """

    photos: Labelled
    classes: np.ndarray
    predicted: np.ndarray
    proba: np.ndarray | None

    @property
    def confidence(self) -> np.ndarray:
        """Probability of what each photo is taken for, of shape (n,); NaN where there is none."""
        return np.full(len(self.predicted), np.nan) if self.proba is None else self.proba.max(axis=1)

    @property
    def right(self) -> np.ndarray:
        """Of shape (n,), bool."""
        return np.asarray(self.predicted == self.photos.y)

    @property
    def losses(self) -> np.ndarray:
        """Of shape (n,): 1 for a wrong class, and the square by which a number is wrong."""
        return (~self.right).astype(float) if len(self.classes) else (self.predicted - self.photos.y) ** 2

    def take(self, rows: np.ndarray) -> Judged:
        """Some of them."""
        proba = None if self.proba is None else self.proba[rows]
        return Judged(self.photos.take(rows), self.classes, self.predicted[rows], proba)

    def worst(self, count: int) -> list[int]:
        """Positions of the photos that are taken for another class, with the highest confidence first."""
        wrong = np.flatnonzero(~self.right)
        order = np.argsort(-np.nan_to_num(self.confidence[wrong]), kind="stable")
        return list(map(int, wrong[order][:count]))


def joined(parts: Sequence[Judged]) -> Judged:
    """What several models say of photos of their own, all with the same classes."""
    groups = [part.photos.groups for part in parts]
    photos = Labelled(
        [path for part in parts for path in part.photos.paths],
        np.concatenate([part.photos.y for part in parts]),
        None if any(each is None for each in groups) else np.concatenate([each for each in groups if each is not None]),
    )
    proba = [part.proba for part in parts if part.proba is not None]
    return Judged(
        photos,
        parts[0].classes,
        np.concatenate([part.predicted for part in parts]),
        np.concatenate(proba) if len(proba) == len(parts) else None,
    )
