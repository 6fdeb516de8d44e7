"""Logistic regressions on features, by the folds of a cross-validation: as many at once as pays."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from sklearn import config_context
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from featx.system.fits import one_thread, run_fits

C_VALUES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


def classifier(C: float = 1.0, multilabel: bool = False) -> Pipeline:
    """What learns from features: standardised, then a logistic regression, or one for each of several labels."""
    last = LogisticRegression(C=C, max_iter=5000)
    return make_pipeline(StandardScaler(), OneVsRestClassifier(last) if multilabel else last)


def probabilities_of(rows: np.ndarray, y: np.ndarray, folds: StratifiedKFold, C: float) -> np.ndarray:
    """Probabilities of all classes, shape (n, n_classes), each row's by a classifier that did not learn from it."""
    parts = _folds(rows, y, folds, n_fits=1)
    found = _run([partial(part.classes_and_probabilities, classifier(C)) for part in parts], rows, y)
    classes = np.unique(y)
    proba = np.zeros((len(rows), len(classes)))
    for part, (known, those) in zip(parts, found, strict=True):
        proba[np.ix_(part.held_out, np.searchsorted(classes, known))] = those  # a fold may have learnt some alone
    return proba


def accuracies_of(rows: np.ndarray, y: np.ndarray, folds: StratifiedKFold) -> np.ndarray:
    """Accuracies of shape (n_C, n_folds)."""
    parts = _folds(rows, y, folds, len(C_VALUES))
    # A large C takes longest: what begins with it ends with short ones, and no thread waits long for another.
    calls = [partial(part.accuracy, C) for part in parts for C in reversed(C_VALUES)]
    return np.reshape(_run(calls, rows, y), (len(parts), len(C_VALUES))).T[::-1]


def held_out_probabilities(
    rows: np.ndarray,
    y: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    learners: Sequence[Pipeline],
    weights: np.ndarray | None,
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """By fold, what each learner, fitted to the first rows, makes of the others: its classes, and probabilities.

    Parameters
    ----------
    rows : ndarray of shape (n, n_features)
    y : ndarray of shape (n,) or (n, n_labels)
    folds : sequence of (learnt, held_out)
    learners : sequence of Pipeline
        As `classifier` makes them, those that take least time first. They stay as they are.
    weights : ndarray of shape (n,) or None
    """
    parts = [_Fold(rows, y, *fold, len(learners), weights) for fold in folds]
    calls = [partial(part.classes_and_probabilities, learner) for part in parts for learner in reversed(learners)]
    found, n = _run(calls, rows, y), len(learners)
    return [found[i : i + n][::-1] for i in range(0, len(found), n)]


def learn(rows: np.ndarray, y: np.ndarray, C: float) -> Pipeline:
    """The classifier, fitted to all rows."""
    return learn_weighted(classifier(C), rows, y, None)


def learn_weighted(learner: Pipeline, rows: np.ndarray, y: np.ndarray, weights: np.ndarray | None) -> Pipeline:
    """A learner that `classifier` has made, fitted to all rows."""
    scaler, last = (step for _, step in learner.steps)
    with one_thread(), _quietly():
        _fit_last(last, _scaled(scaler, rows, weights), y, weights)
    return learner


def in_double(last: Any) -> Any:
    """A linear classifier whose scores are computed in double precision, where rows in other company add up the same.

    Features are float32, and so is what is fitted to them; products of such matrices depend on how many rows there are.
    """
    for linear in getattr(last, "estimators_", [last]):
        if hasattr(linear, "coef_"):  # a label that all rows have is not learnt by a linear model
            linear.coef_, linear.intercept_ = linear.coef_.astype(np.float64), linear.intercept_.astype(np.float64)
    return last


def _scaled(scaler: Any, rows: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return scaler.fit(rows, sample_weight=weights).transform(rows)


def _fit_last(last: Any, rows: np.ndarray, y: np.ndarray, weights: np.ndarray | None) -> Any:
    """Fit what stands at the end of a learner."""
    if not isinstance(last, OneVsRestClassifier):
        return last.fit(rows, y, sample_weight=weights)
    given = {} if weights is None else {"sample_weight": weights}
    with config_context(enable_metadata_routing=True):
        last.estimator.set_fit_request(sample_weight=True)
        return last.fit(rows, y, **given)


@contextmanager
def _quietly() -> Iterator[None]:
    """A label that all images have, or none, is learnt as such; for the thread that others work for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Label .* is present in all training examples")
        yield


class _Fold:
    """One fold of a cross-validation: standardised when it is first asked for, let go after the last of its fits.

    May be asked by several threads at once.
    """

    def __init__(
        self,
        rows: np.ndarray,
        y: np.ndarray,
        learnt: np.ndarray,
        held_out: np.ndarray,
        n_fits: int,
        weights: np.ndarray | None = None,
    ) -> None:
        self._all, self._y, self._learnt, self.held_out = rows, y, learnt, held_out
        self._weights = None if weights is None else weights[learnt]
        self._left = n_fits
        self._lock = threading.Lock()
        self._made: tuple[np.ndarray, np.ndarray] | None = None

    def accuracy(self, C: float) -> float:
        """Of the photos that are held out."""
        learner, rows = self._learn(classifier(C))
        return float(learner.score(rows, self._y[self.held_out]))

    def classes_and_probabilities(self, learner: Pipeline) -> tuple[np.ndarray, np.ndarray]:
        """Of the photos that are held out, with the classes of the columns."""
        last, rows = self._learn(learner)
        return last.classes_, last.predict_proba(rows)

    def _learn(self, learner: Pipeline) -> tuple[Any, np.ndarray]:
        """What learnt from the fold, and the rows that are held out."""
        learnt, held_out = self._standardised()
        return _fit_last(clone(learner[-1]), learnt, self._y[self._learnt], self._weights), held_out

    def _standardised(self) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if self._made is None:
                scaler = classifier()[0].set_params(copy=False)  # of what is a copy already
                learnt = _scaled(scaler, self._all[self._learnt], self._weights)
                self._made = learnt, scaler.transform(self._all[self.held_out])
            made, self._left = self._made, self._left - 1
            if not self._left:
                self._made = None
            return made


def _folds(rows: np.ndarray, y: np.ndarray, folds: StratifiedKFold, n_fits: int) -> list[_Fold]:
    return [_Fold(rows, y, learnt, held_out, n_fits) for learnt, held_out in folds.split(rows, y)]


def _run(calls: Sequence[Callable[[], Any]], rows: np.ndarray, y: np.ndarray) -> list[Any]:
    # A fold's rows, and those in double precision, which some releases of scikit-learn fit.
    n_outputs = len(np.unique(y)) if y.ndim == 1 else y.shape[1]
    with _quietly():
        return run_fits(calls, work=rows.size * n_outputs, n_bytes=3 * rows.nbytes)
