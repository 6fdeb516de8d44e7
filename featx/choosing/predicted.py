"""What was predicted, as scikit-learn's scorers ask a fitted classifier for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.metaestimators import available_if

_LEAST = 1e-12  # probability whose logarithm is finite


@dataclass(frozen=True)
class Answer:
    """What a fitted classifier says of some rows.

    Attributes
    ----------
    labels : ndarray of shape (n,) or (n, n_labels)
    proba : ndarray of shape (n, n_classes) or None
    scores : ndarray of shape (n,) or (n, n_classes), or None
        Of ``decision_function``, where there are no probabilities.
    """

    labels: np.ndarray
    proba: np.ndarray | None = None
    scores: np.ndarray | None = None

    @classmethod
    def of(cls, fitted: Any, X: Any, classes: np.ndarray, multilabel: bool) -> Answer:
        """Ask a fitted classifier, whose classes may be some of those there are."""
        labels = np.asarray(fitted.predict(X))
        if hasattr(fitted, "predict_proba"):
            known = classes if multilabel else fitted.classes_
            return cls(labels, cls.of_proba(proba_of(fitted, X), known, classes, multilabel).proba)
        whole = multilabel or len(fitted.classes_) == len(classes)
        has_scores = whole and hasattr(fitted, "decision_function")
        return cls(labels, scores=np.asarray(fitted.decision_function(X)) if has_scores else None)

    @classmethod
    def of_proba(cls, proba: np.ndarray, known: np.ndarray, classes: np.ndarray, multilabel: bool) -> Answer:
        """From probabilities of the classes that a classifier knows; those of others are 0."""
        if multilabel:
            return cls((proba > 0.5).astype(int), proba)
        whole = np.zeros((len(proba), len(classes)), proba.dtype)
        whole[:, np.searchsorted(classes, known)] = proba
        return cls(classes[whole.argmax(axis=1)], whole)

    @classmethod
    def mean(cls, answers: Sequence[Answer], classes: np.ndarray, multilabel: bool) -> Answer:
        """Of several classifiers that all give probabilities."""
        parts = [answer.proba for answer in answers if answer.proba is not None]
        return cls.of_proba(np.mean(parts, axis=0), classes, classes, multilabel)


def proba_of(fitted: Any, X: Any) -> np.ndarray:
    """Probabilities of shape (n, n_labels), also where a classifier gives those of each label by themselves."""
    proba = fitted.predict_proba(X)
    if not isinstance(proba, list):
        return np.asarray(proba)
    known = zip(proba, fitted.classes_, strict=True)  # a label that no image had, or all, has one column
    return np.stack([each[:, np.asarray(classes) == 1].sum(axis=1) for each, classes in known], axis=1)


def scores_of(proba: np.ndarray, multilabel: bool) -> np.ndarray:
    """Logarithms of probabilities, of shape (n, n_classes); of two classes, and of several labels, log odds."""
    proba = np.clip(proba.astype(np.float64), _LEAST, 1)
    if multilabel:
        return np.asarray(logit(np.minimum(proba, 1 - _LEAST)))
    scores = np.log(proba)
    return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores


class Predicted(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier whose X are row numbers, of which it knows the answers.

    Parameters
    ----------
    classes : ndarray of shape (n_classes,)
    rows : ndarray of shape (n,) of int
        Ascending.
    answer : Answer
        Of these rows.
    """

    def __init__(self, classes: np.ndarray, rows: np.ndarray, answer: Answer) -> None:
        self.classes, self.rows, self.answer = classes, rows, answer
        self._multilabel = answer.labels.ndim == 2
        # Two positions of labels would look like two classes.
        self.classes_ = np.tile([0, 1], (len(classes), 1)) if self._multilabel else classes

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Labels of rows."""
        return self._of(self.answer.labels, X)

    @available_if(lambda self: self.answer.proba is not None)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Probabilities of rows, shape (n, n_classes)."""
        assert self.answer.proba is not None
        return self._of(self.answer.proba, X)

    @available_if(lambda self: self.answer.proba is not None or self.answer.scores is not None)  # type: ignore[untyped-decorator]
    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Scores of rows."""
        if self.answer.scores is not None:
            return self._of(self.answer.scores, X)
        return scores_of(self.predict_proba(X), self._multilabel)

    def _of(self, values: np.ndarray, X: np.ndarray) -> np.ndarray:
        return values[np.searchsorted(self.rows, X)]
