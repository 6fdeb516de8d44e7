"""What can be learnt of photos: their classes, or a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import BaseCrossValidator, GroupKFold, KFold, check_cv
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from featx.choosing.folds import folds_of
from featx.choosing.probes import C_VALUES, accuracies_of, learn, probabilities_of
from featx.cli.judged import Judged
from featx.cli.scoring import folds_for
from featx.cli.sources import Labelled
from featx.estimators.classifier import FineTuneClassifier
from featx.estimators.regressor import FineTuneRegressor
from featx.system.fits import one_thread

_ALPHAS = [10.0**k for k in range(-1, 7)]  # of features that are standardised


class Kind(Protocol):
    """A kind of target."""

    @property
    def score(self) -> str:
        """What models are judged by."""

    @property
    def by_fold(self) -> str:
        """What its values of each fold are called in JSON."""

    @property
    def setting(self) -> str:
        """What is chosen for a linear model on features."""

    @property
    def settings(self) -> Sequence[float]:
        """Values of it."""

    @property
    def tuned(self) -> type[FineTuneClassifier | FineTuneRegressor]:
        """What trains the network."""

    def about(self, y: np.ndarray) -> dict[str, Any]:
        """What there is to say of targets, for JSON."""

    def told(self, y: np.ndarray) -> str:
        """The same in words."""

    def remark(self, score: float) -> str:
        """What a beginner should know of a score; empty for nothing."""

    def folds(self, photos: Labelled, n_folds: int) -> Any:
        """A splitter, the same for whatever is compared.

        Raises
        ------
        ClickException, ValueError
            There are too few photos.
        """

    def scores(self, rows: np.ndarray, y: np.ndarray, folds: Any) -> np.ndarray:
        """Of linear models on features, shape (n_settings, n_folds)."""

    def score_of(self, judged: Judged) -> float:
        """Of what is judged."""

    def learn(self, rows: np.ndarray, y: np.ndarray, setting: float) -> Pipeline:
        """A linear model on features, fitted."""

    def judged(self, rows: np.ndarray, photos: Labelled, folds: Any, setting: float) -> Judged:
        """What it says of all photos, each by the fold that it is held out in."""


class Classes:
    """One class for each photo."""

    score, by_fold = "accuracy", "fold_accuracies"
    setting, settings, tuned = "C", C_VALUES, FineTuneClassifier

    def about(self, y: np.ndarray) -> dict[str, Any]:
        """The classes."""
        return {"classes": np.unique(y).tolist()}

    def told(self, y: np.ndarray) -> str:
        """How many, and the first ones."""
        classes = np.unique(y).tolist()
        return f"of {len(classes)} classes: {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"

    def remark(self, score: float) -> str:
        """Nothing."""
        return ""

    def folds(self, photos: Labelled, n_folds: int) -> BaseCrossValidator:
        """Stratified, and as many as the smallest class allows."""
        usual = folds_for(photos.y, n_folds)
        if photos.groups is None:
            return usual
        return check_cv(folds_of(photos.y, np.arange(len(photos.y)), n_folds, photos.groups, seed=0))

    def scores(self, rows: np.ndarray, y: np.ndarray, folds: Any) -> np.ndarray:
        """Accuracies."""
        return accuracies_of(rows, y, folds)

    def score_of(self, judged: Judged) -> float:
        """Accuracy."""
        return float(judged.right.mean())

    def learn(self, rows: np.ndarray, y: np.ndarray, setting: float) -> Pipeline:
        """Standardised, then a logistic regression."""
        return learn(rows, y, setting)

    def judged(self, rows: np.ndarray, photos: Labelled, folds: Any, setting: float) -> Judged:
        """Each photo by the fold that it is held out in."""
        proba, classes = probabilities_of(rows, photos.y, folds, setting), np.unique(photos.y)
        return Judged(photos, classes, classes[proba.argmax(axis=1)], proba)


class Numbers:
    """A number for each photo."""

    score, by_fold = "R2", "fold_R2"
    setting, settings, tuned = "alpha", _ALPHAS, FineTuneRegressor

    def about(self, y: np.ndarray) -> dict[str, Any]:
        """Their mean and standard deviation."""
        return {"mean": float(y.mean()), "standard_deviation": float(y.std())}

    def told(self, y: np.ndarray) -> str:
        """The same."""
        return f"with numbers of {y.mean():.4g} +- {y.std():.4g}"

    def remark(self, score: float) -> str:
        """Whether anything was learnt."""
        return "\nNothing was learnt: the mean of all numbers has an R2 of 0." if score <= 0 else ""

    def folds(self, photos: Labelled, n_folds: int) -> BaseCrossValidator:
        """By chance."""
        n = len(photos.y) if photos.groups is None else len(np.unique(photos.groups))
        if n < 2 * n_folds:
            what = "photos" if photos.groups is None else "groups of photos"
            raise ValueError(f"At least two {what} in each of {n_folds} folds are expected, got {n}.")
        if photos.groups is None:
            return KFold(n_folds, shuffle=True, random_state=0)
        return check_cv([*GroupKFold(n_folds).split(photos.y, photos.y, photos.groups)])

    def scores(self, rows: np.ndarray, y: np.ndarray, folds: Any) -> np.ndarray:
        """R squared."""
        found = np.empty((len(_ALPHAS), folds.get_n_splits()))
        for fold, (learnt, held_out) in enumerate(folds.split(rows, y)):
            for place, alpha in enumerate(_ALPHAS):
                predicted = self.learn(rows[learnt], y[learnt], alpha).predict(rows[held_out])
                found[place, fold] = r2_score(y[held_out], predicted)
        return found

    def score_of(self, judged: Judged) -> float:
        """R squared."""
        return float(r2_score(judged.photos.y, judged.predicted))

    def learn(self, rows: np.ndarray, y: np.ndarray, setting: float) -> Pipeline:
        """Standardised, then a ridge regression."""
        with one_thread():
            return make_pipeline(StandardScaler(), Ridge(setting)).fit(rows.astype(np.float64), y)

    def judged(self, rows: np.ndarray, photos: Labelled, folds: Any, setting: float) -> Judged:
        """Each photo by the fold that it is held out in."""
        predicted = np.empty(len(rows))
        for learnt, held_out in folds.split(rows, photos.y):
            predicted[held_out] = self.learn(rows[learnt], photos.y[learnt], setting).predict(rows[held_out])
        return Judged(photos, np.array([]), predicted, None)


KINDS: dict[str, Kind] = {"classification": Classes(), "regression": Numbers()}
