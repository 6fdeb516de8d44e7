"""Figures that say how good a model is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import (
    confusion_matrix,
    log_loss,
    mean_absolute_error,
    mean_squared_error,
    precision_recall_fscore_support,
    r2_score,
)

from featx.cli.judged import Judged
from featx.cli.outcomes import table

_N_WORST, _N_PAIRS, _N_BINS = 10, 10, 10
_SURE = 0.95
_ALIKE = 0.05  # of confidence and accuracy


class Measures(Protocol):
    """What there is to say of a model, in words and for JSON."""

    @property
    def worst(self) -> list[tuple[int, dict[str, Any]]]:
        """Positions of the photos that are most wrong, and how."""

    def lines(self, name: Callable[[int], str]) -> list[str]:
        """In words; ``name`` tells a photo by its position."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the photos."""


@dataclass(frozen=True)
class OfClass:
    """A class.

    Attributes
    ----------
    label : str
    n_photos : int
    recall, precision, f1 : float or None
        Shares in 0..1; None where no photo is of the class, or none is taken for it.
    """

    label: str
    n_photos: int
    recall: float | None
    precision: float | None
    f1: float | None


@dataclass(frozen=True)
class Bin:
    """Photos of about the same confidence.

    Attributes
    ----------
    low, high : float
        Limits of the confidence.
    n_photos : int
    confidence, accuracy : float
        Means.
    """

    low: float
    high: float
    n_photos: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class OfClasses:
    """Of a model of classes.

    Attributes
    ----------
    n_photos, n_right : int
    interval : (float, float)
        Wilson's, of 95 %, for the accuracy.
    classes : list of OfClass
    confusion : ndarray of shape (n_classes, n_classes) of int
        Photos by true and by predicted class.
    log_loss, calibration_error : float or None
        The error is the mean distance of confidence and accuracy in ten bins of equal width, by photos (the expected
        calibration error).
    bins : list of Bin
    worst : list of (int, dict)
    """

    n_photos: int
    n_right: int
    interval: tuple[float, float]
    classes: list[OfClass]
    confusion: np.ndarray
    log_loss: float | None
    calibration_error: float | None
    bins: list[Bin]
    worst: list[tuple[int, dict[str, Any]]]

    @classmethod
    def of(cls, judged: Judged) -> OfClasses:
        """Of what is judged."""
        y, predicted, right = judged.photos.y, judged.predicted, judged.right
        known = judged.classes.tolist()
        precision, recall, f1, counts = precision_recall_fscore_support(
            y, predicted, labels=known, zero_division=np.nan
        )
        test = binomtest(int(right.sum()), len(right))
        interval = test.proportion_ci(_SURE, method="wilson")
        each = zip(known, counts.tolist(), recall.tolist(), precision.tolist(), f1.tolist(), strict=True)
        bins = _bins(judged.confidence, right) if judged.proba is not None else []
        error = sum(each.n_photos * abs(each.confidence - each.accuracy) for each in bins) / len(y)
        return cls(
            len(y),
            int(right.sum()),
            (float(interval.low), float(interval.high)),
            [OfClass(label, n, *map(_known, shares)) for label, n, *shares in each],
            confusion_matrix(y, predicted, labels=known),
            None if judged.proba is None else _log_loss(judged),
            error if bins else None,
            bins,
            [(row, _mistake(judged, row)) for row in judged.worst(_N_WORST)],
        )

    @property
    def accuracy(self) -> float:
        """In 0..1."""
        return self.n_right / self.n_photos

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that are there."""
        return float(np.mean([each.recall for each in self.classes if each.n_photos and each.recall is not None]))

    def confused(self, count: int = _N_PAIRS) -> list[tuple[str, str, int]]:
        """The pairs of true and predicted class that are confused most often."""
        return confused_pairs(self.confusion, [each.label for each in self.classes], count)

    def lines(self, name: Callable[[int], str]) -> list[str]:
        """In words."""
        low, high = self.interval
        found = [
            f"Accuracy {self.accuracy:.3f} ({self.n_right} of {self.n_photos} photos; 95 % interval {low:.3f} to "
            f"{high:.3f})",
            f"Balanced accuracy {self.balanced_accuracy:.3f}",
        ]
        if self.calibration_error is not None:
            confidence = sum(each.n_photos * each.confidence for each in self.bins) / self.n_photos
            found.append(
                f"Calibration error {self.calibration_error:.3f} (mean confidence {confidence:.3f}: "
                f"{_verdict(confidence - self.accuracy)}); log loss {self.log_loss:.3f}"
            )
        rows = [
            [each.label, each.n_photos, *(_short(value) for value in (each.recall, each.precision, each.f1))]
            for each in self.classes
        ]
        found += ["", table(["class", "photos", "recall", "precision", "F1"], rows)]
        if pairs := self.confused():
            found += ["", table(["true class", "taken for", "photos"], [list(pair) for pair in pairs])]
            mistakes = [[_short(a["confidence"]), a["label"], a["true"], name(row)] for row, a in self.worst]
            found += ["", "Worst mistakes:", table(["confidence", "taken for", "true class", "photo"], mistakes)]
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "n_used": self.n_photos,
            "n_right": self.n_right,
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "balanced_accuracy": self.balanced_accuracy,
            "log_loss": self.log_loss,
            "calibration_error": self.calibration_error,
            "calibration": [vars(each) for each in self.bins],
            "by_class": [vars(each) for each in self.classes],
            "confusion": self.confusion.tolist(),
            "confused": [{"true": true, "label": label, "n_photos": n} for true, label, n in self.confused()],
        }


@dataclass(frozen=True)
class OfNumbers:
    """Of a model of numbers.

    Attributes
    ----------
    n_photos : int
    r2, mean_absolute_error, root_mean_squared_error : float
    worst : list of (int, dict)
    """

    n_photos: int
    r2: float
    mean_absolute_error: float
    root_mean_squared_error: float
    worst: list[tuple[int, dict[str, Any]]]

    @classmethod
    def of(cls, judged: Judged) -> OfNumbers:
        """Of what is judged."""
        y, predicted = judged.photos.y, judged.predicted
        order = np.argsort(-judged.losses, kind="stable")[:_N_WORST].tolist()
        return cls(
            len(y),
            float(r2_score(y, predicted)) if len(y) > 1 else float("nan"),
            float(mean_absolute_error(y, predicted)),
            float(mean_squared_error(y, predicted)) ** 0.5,
            [(row, {"label": float(predicted[row]), "true": float(y[row])}) for row in order],
        )

    def lines(self, name: Callable[[int], str]) -> list[str]:
        """In words."""
        rows = [[f"{about['label']:.4g}", f"{about['true']:.4g}", name(row)] for row, about in self.worst]
        return [
            f"R2 {self.r2:.3f} ({self.n_photos} photos)",
            f"Mean absolute error {self.mean_absolute_error:.4g}, root mean squared error "
            f"{self.root_mean_squared_error:.4g}",
            "",
            "Worst mistakes:",
            table(["predicted", "true", "photo"], rows),
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "n_used": self.n_photos,
            "R2": _known(self.r2),
            "mean_absolute_error": self.mean_absolute_error,
            "root_mean_squared_error": self.root_mean_squared_error,
        }


def confused_pairs(confusion: np.ndarray, labels: Sequence[str], count: int) -> list[tuple[str, str, int]]:
    """True class, predicted class and number of photos, the most frequent first; of a confusion matrix."""
    wrong = confusion - np.diag(np.diag(confusion))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [divmod(int(cell), len(labels)) for cell in worst]
    return [(labels[true], labels[taken], int(wrong[true, taken])) for true, taken in pairs if wrong[true, taken]]


def measures_of(judged: Judged) -> Measures:
    """By what the model tells."""
    return OfClasses.of(judged) if len(judged.classes) else OfNumbers.of(judged)


def _verdict(gap: float) -> str:
    """What mean confidence less accuracy says to somebody who wants to rely on confidences."""
    if abs(gap) <= _ALIKE:
        return "on the whole as sure as it is right"
    return "right more often than it says" if gap < 0 else "wrong more often than it says"


def _bins(confidence: np.ndarray, right: np.ndarray) -> list[Bin]:
    edges = np.linspace(0, 1, _N_BINS + 1)
    places = np.clip(np.digitize(confidence, edges[1:-1]), 0, _N_BINS - 1)
    found = []
    for place in range(_N_BINS):
        if (inside := places == place).any():
            means = float(confidence[inside].mean()), float(right[inside].mean())
            found.append(Bin(float(edges[place]), float(edges[place + 1]), int(inside.sum()), *means))
    return found


def _log_loss(judged: Judged) -> float:
    """Whatever the order of the classes."""
    order = np.argsort(judged.classes)
    proba = np.asarray(judged.proba, dtype=np.float64)[:, order]
    proba /= proba.sum(axis=1, keepdims=True)  # of float32 they add up to 1 but for the last digits
    return float(log_loss(judged.photos.y, proba, labels=judged.classes[order]))


def _mistake(judged: Judged, row: int) -> dict[str, Any]:
    confidence = _known(float(judged.confidence[row]))
    return {"label": str(judged.predicted[row]), "true": str(judged.photos.y[row]), "confidence": confidence}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
