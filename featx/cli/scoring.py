"""How well a logistic regression tells classes apart by some features, by cross-validation."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import click
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from featx.activations.plan import FeaturePlan
from featx.activations.trying import why_unreadable
from featx.backbones.addresses import plain_address
from featx.cli.options import typed_poolings, typed_weights
from featx.cli.outcomes import Console, broken_of
from featx.estimators.extractor import PretrainedFeatureExtractor
from featx.system.fits import one_thread, run_fits

C_VALUES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


@dataclass(frozen=True)
class Score:
    """What cross-validation said of one choice.

    Attributes
    ----------
    backbone, layer, pooling : str
    weights : str or None
        As of an extractor; None for a random network.
    C : float
        The regularisation that did best.
    accuracy, spread : float
        Mean over the folds, and standard deviation.
    fold_accuracies : tuple of float
    """

    backbone: str
    layer: str
    pooling: str
    weights: str | None
    C: float
    accuracy: float
    spread: float
    fold_accuracies: tuple[float, ...]

    @property
    def network(self) -> str:
        """The backbone, as it is shown."""
        return self.backbone if self.weights is not None else f"{self.backbone} (random)"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def classifier(C: float = 1.0) -> Pipeline:
    """What learns from features: standardised, then a logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000))


def folds_for(y: np.ndarray, n_folds: int) -> StratifiedKFold:
    """The same folds for whatever is compared, as many as the smallest class allows.

    Raises
    ------
    ClickException
        There is one class only, or one photo of a class.
    """
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise click.ClickException(
            f"Readable photos of at least two classes are expected, got {' '.join(classes) or 'none'}."
        )
    if counts.min() < 2:
        raise click.ClickException(
            f"At least two readable photos of each class are expected, got one of {str(classes[counts.argmin()])!r}."
        )
    return StratifiedKFold(min(n_folds, int(counts.min())), shuffle=True, random_state=0)


def compute_once(
    extractor: PretrainedFeatureExtractor,
    layers: Sequence[str | int],
    poolings: Sequence[str | list[str]],
    paths: Sequence[str],
    console: Console,
) -> tuple[list[str], np.ndarray]:
    """Send every photo through the network, once, and keep some layers.

    Returns
    -------
    names : list of str
        Of the layers, each once. With "all" goes the penultimate one, unless it cannot be read, which is told.
    rows : ndarray of int
        Of the photos that can be used.

    Raises
    ------
    ClickException
        The network makes finite numbers of none.
    """
    names = candidates(extractor, layers)
    if "all" in layers and "penultimate" not in names:
        if reason := why_unreadable(extractor, "penultimate", poolings):
            console.note(f"The penultimate layer is not tried: {reason}")
        else:
            names.append("penultimate")
    errors = extractor.set_params(layers=names)._extraction_of_images([*paths]).warm(names)
    console.leave_out(broken_of(sorted(errors, key=lambda error: error.row or 0), paths))
    good = np.setdiff1d(np.arange(len(paths)), [error.row for error in errors])
    if not len(good) and any(photo.was_read for photo in console.broken):
        raise console.none_left(len(paths))
    return names, good


def scores_of(
    extractor: PretrainedFeatureExtractor,
    choices: Sequence[tuple[str, str | list[str]]],
    paths: Sequence[str],
    y: np.ndarray,
    folds: StratifiedKFold,
) -> list[Score]:
    """Scores of (layer, pooling) choices, from features that the extractor's cache knows."""
    found = []
    for layer, pooling in choices:
        rows = extractor.set_params(layers=layer, pooling=pooling, verbose=0).transform([*paths])
        accuracies = accuracies_of(rows, y, folds)
        best = int(np.argmax(accuracies.mean(axis=1)))
        found.append(
            Score(
                os.fspath(extractor.backbone),
                layer,
                typed_poolings(pooling),
                typed_weights(plain_address(extractor.weights)),
                C_VALUES[best],
                float(accuracies[best].mean()),
                float(accuracies[best].std()),
                tuple(accuracies[best].tolist()),
            )
        )
    return found


def probabilities_of(rows: np.ndarray, y: np.ndarray, folds: StratifiedKFold, C: float) -> np.ndarray:
    """Probabilities of all classes, shape (n, n_classes), each row's by a classifier that did not learn from it."""
    parts = _folds(rows, y, folds, n_fits=1)
    found = _run([partial(part.probabilities, C) for part in parts], rows, y)
    proba = np.empty((len(rows), found[0].shape[1]))
    for part, those in zip(parts, found, strict=True):
        proba[part.held_out] = those
    return proba


def learn(rows: np.ndarray, y: np.ndarray, C: float) -> Pipeline:
    """The classifier, fitted to all rows."""
    with one_thread():
        return classifier(C).fit(rows, y)


class _Fold:
    """One fold of a cross-validation: standardised when it is first asked for, let go after the last of its fits.

    May be asked by several threads at once.
    """

    def __init__(self, rows: np.ndarray, y: np.ndarray, learnt: np.ndarray, held_out: np.ndarray, n_fits: int) -> None:
        self._all, self._y, self._learnt, self.held_out = rows, y, learnt, held_out
        self._left = n_fits
        self._lock = threading.Lock()
        self._made: tuple[np.ndarray, np.ndarray] | None = None

    def accuracy(self, C: float) -> float:
        """Of the photos that are held out."""
        learner, rows = self._learn(C)
        return float(learner.score(rows, self._y[self.held_out]))

    def probabilities(self, C: float) -> np.ndarray:
        """Of the photos that are held out, shape (n_held_out, n_classes)."""
        learner, rows = self._learn(C)
        return learner.predict_proba(rows)

    def _learn(self, C: float) -> tuple[Any, np.ndarray]:
        """What learnt from the fold, and the rows that are held out."""
        learnt, held_out = self._standardised()
        return classifier(C)[-1].fit(learnt, self._y[self._learnt]), held_out

    def _standardised(self) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if self._made is None:
                scaler = classifier()[0].set_params(copy=False)  # of what is a copy already
                learnt = scaler.fit_transform(self._all[self._learnt])
                self._made = learnt, scaler.transform(self._all[self.held_out])
            made, self._left = self._made, self._left - 1
            if not self._left:
                self._made = None
            return made


def _folds(rows: np.ndarray, y: np.ndarray, folds: StratifiedKFold, n_fits: int) -> list[_Fold]:
    return [_Fold(rows, y, learnt, held_out, n_fits) for learnt, held_out in folds.split(rows, y)]


def accuracies_of(rows: np.ndarray, y: np.ndarray, folds: StratifiedKFold) -> np.ndarray:
    """Accuracies of shape (n_C, n_folds)."""
    parts = _folds(rows, y, folds, len(C_VALUES))
    # A large C takes longest: what begins with it ends with short ones, and no thread waits long for another.
    calls = [partial(part.accuracy, C) for part in parts for C in reversed(C_VALUES)]
    return np.reshape(_run(calls, rows, y), (len(parts), len(C_VALUES))).T[::-1]


def _run(calls: Sequence[Any], rows: np.ndarray, y: np.ndarray) -> list[Any]:
    # A fold's rows, and those in double precision, which some releases of scikit-learn fit.
    return run_fits(calls, work=rows.size * len(np.unique(y)), n_bytes=3 * rows.nbytes)


def candidates(extractor: PretrainedFeatureExtractor, layers: Sequence[str | int]) -> list[str]:
    """Names of the layers that ``layers`` means, each once."""
    architecture = extractor._architecture(extractor._spec())
    return list(dict.fromkeys(layer.label for spec in layers for layer in architecture.resolve(spec)))


def poolings_of(extractor: PretrainedFeatureExtractor, layer: str, poolings: Sequence[str]) -> list[str | list[str]]:
    """Poolings of one layer, "auto" resolved; the first alone of vectors, which no pooling changes."""
    architecture = extractor._architecture(extractor._spec())
    (found,) = architecture.resolve(layer)
    several = poolings[:1] if found.layout == "vector" else poolings
    return [FeaturePlan.of([found], how, 1, None, architecture.usual_poolings).pooling for how in several]
