"""Ways to transfer a pretrained network to new classes, as a search judges them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils import _safe_indexing

from featx.activations.joining import normalised
from featx.activations.plan import FeaturePlan
from featx.activations.trying import why_unreadable
from featx.backbones.layers import Architecture
from featx.choosing.folds import Fold
from featx.choosing.predicted import Answer, proba_of
from featx.choosing.probes import C_VALUES, classifier, held_out_probabilities, in_double, learn_weighted
from featx.choosing.search import Until
from featx.choosing.task import Task
from featx.estimators.base import NetworkEstimator
from featx.estimators.extractor import PretrainedFeatureExtractor
from featx.images.sources import Items
from featx.store import FeatureStore
from featx.system.fits import one_thread

_MOST_SIDE_BY_SIDE = 3  # layers
_RANKING_C = 0.01
_MOST_FOR_COVARIANCE = 8192  # features: a matrix of half a gibibyte
UNWEIGHED = "cannot weigh samples"


@dataclass(frozen=True)
class Images:
    """What recipes learn from.

    Attributes
    ----------
    X : array-like of n images
    extractor : PretrainedFeatureExtractor
    rows : ndarray of shape (n, n_features), float32
        Features of all layers side by side.
    columns : dict of str to list of slice
        Where each layer's parts lie, one for each of its poolings; in the order of the network.
    penultimate : str
    store : FeatureStore or None
        To lend to estimators that have none, as long as the search lasts.
    """

    X: Any
    extractor: PretrainedFeatureExtractor
    rows: np.ndarray
    columns: dict[str, list[slice]]
    penultimate: str
    store: FeatureStore | None

    @classmethod
    def of(
        cls, extractor: PretrainedFeatureExtractor, X: Any, items: Items, store: FeatureStore | None
    ) -> tuple[Images, np.ndarray]:
        """Read all layers in one pass; also the positions of the images that have features, which alone are in it."""
        architecture = extractor._architecture(extractor._spec(), items)
        names = readable_layers(extractor, architecture)
        penultimate = architecture.penultimate.label
        lent, _ = lend(extractor.set_params(layers=names), store)
        rows = lent.transform(X)
        good = np.flatnonzero(np.isfinite(rows).all(axis=1))
        if len(good) < len(rows):
            X, rows = _safe_indexing(X, good), rows[good]
        columns = _columns(extractor, architecture, names)
        for name in _repeated(rows, columns, penultimate):
            del columns[name]
        return cls(X, extractor, rows, columns, penultimate, store), good

    def width(self, layer: str) -> int:
        """Features of a layer."""
        return sum(where.stop - where.start for where in self.columns[layer])

    def features(self, layers: Sequence[str], normalize: str | None) -> np.ndarray:
        """Rows that an extractor gives which is set to these."""
        parts = [normalised(self.rows[:, where], normalize) for name in layers for where in self.columns[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def pipeline(self, layers: Sequence[str], normalize: str | None, learner: Pipeline) -> Pipeline:
        """An extractor and what has learnt from its features."""
        extractor = clone(self.extractor).set_params(
            layers=layers[0] if len(layers) == 1 else [*layers], normalize=normalize, on_error="raise", verbose=0
        )
        *others, last = (step for _, step in learner.steps)
        return make_pipeline(extractor, *others, in_double(last))


def lend(estimator: Any, store: FeatureStore | None) -> tuple[Any, list[str]]:
    """A clone in which whatever has no store uses this one, and the parameters to set back to None."""
    lent = clone(estimator)
    if store is None:
        return lent, []
    parts = {"": lent} | {f"{name}__": value for name, value in lent.get_params(deep=True).items()}
    names = [
        f"{place}cache" for place, part in parts.items() if isinstance(part, NetworkEstimator) and part.cache is None
    ]
    return lent.set_params(**dict.fromkeys(names, store)), names


def take_back(fitted: Any, names: Sequence[str], store: FeatureStore | None) -> Any:
    """A fitted estimator without the store that was lent to it, in whatever it has fitted, too."""
    if names and store is not None:
        fitted.set_params(**dict.fromkeys(names))
        _forget(fitted, store, set())
    return fitted


def _forget(value: Any, store: FeatureStore, seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, NetworkEstimator):
        if isinstance(value.cache, FeatureStore) and value.cache.path == store.path:
            value.cache = None
        return
    inside: Iterable[Any] = ()
    if isinstance(value, BaseEstimator):
        inside = vars(value).values()
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    for part in inside:
        _forget(part, store, seen)


def readable_layers(extractor: PretrainedFeatureExtractor, architecture: Architecture) -> list[str]:
    """Stages, and the penultimate layer whether or not it can be read: without it there is nothing to begin with."""
    last = architecture.penultimate.label
    stages = [architecture.layer(name).label for name in architecture.stages]
    pooling = [extractor.pooling]
    return [*(name for name in stages if name != last and not why_unreadable(extractor, name, pooling)), last]


def _columns(
    extractor: PretrainedFeatureExtractor, architecture: Architecture, names: Sequence[str]
) -> dict[str, list[slice]]:
    columns, start = dict[str, list[slice]](), 0
    for name in names:
        plan = FeaturePlan.of(
            architecture.resolve(name), extractor.pooling, extractor.grid, None, architecture.usual_poolings
        )
        columns[name] = []
        for slot in plan.slots:
            columns[name].append(slice(start, start + slot.shape[-1]))
            start += slot.shape[-1]
    return columns


def _repeated(rows: np.ndarray, columns: dict[str, list[slice]], penultimate: str) -> list[str]:
    """Stages with the features of the penultimate layer, as where that is the average of the last one."""
    own = np.concatenate([rows[:, where] for where in columns[penultimate]], axis=1)
    found = []
    for name, places in columns.items():
        if name != penultimate:
            others = np.concatenate([rows[:, where] for where in places], axis=1)
            if others.shape == own.shape and np.allclose(others, own, rtol=1e-4, atol=1e-5):
                found.append(name)
    return found


class Pace:
    """Seconds for each unit of work, as measured last."""

    def __init__(self) -> None:
        self._of_unit = 0.0

    def seconds(self, n_units: float) -> float:
        """Of so many; 0 before anything was measured."""
        return self._of_unit * n_units

    @contextmanager
    def measured(self, n_units: float) -> Iterator[None]:
        """What happens within is so much work."""
        begun = time.perf_counter()
        yield
        self._of_unit = (time.perf_counter() - begun) / n_units


class Probe:
    """Logistic regressions on features of the penultimate layer.

    Parameters
    ----------
    name : str
    images : Images
    pace : Pace
        Of a fit, in features that are looked at: shared by what fits the same kind.
    """

    trains = False

    def __init__(self, name: str, images: Images, pace: Pace) -> None:
        self.name, self._images, self._pace = name, images, pace

    @property
    def choices(self) -> list[str]:
        """Values of C."""
        return [f"C={C:g}" for C in C_VALUES]

    def why_not(self, task: Task) -> str:
        """It can always be tried."""
        return ""

    def seconds(self, task: Task, n_learnt: int, n_judged: int, until: Until) -> float:
        """Of one fit; grows with rows and features."""
        return self._pace.seconds(n_learnt * self._width)

    def judge(self, task: Task, fold: Fold, until: Until) -> list[Answer]:
        """Of every C."""
        rows = self._rows(task)
        learners = [self._learner(task, choice) for choice in range(len(C_VALUES))]
        with self._pace.measured(len(fold[0]) * rows.shape[1] * len(learners)):
            (found,) = held_out_probabilities(rows, task.y, [fold], learners, task.weights)
        return [Answer.of_proba(proba, known, task.classes, task.multilabel) for known, proba in found]

    def refit(self, task: Task, choice: int) -> Pipeline:
        """Extractor, scaler and classifier."""
        learner = learn_weighted(self._learner(task, choice), self._rows(task), task.y, task.weights)
        return self._images.pipeline(self._layers(task), self._normalize, learner)

    _normalize: str | None = None

    @property
    def _width(self) -> int:
        """Features that one fit looks at."""
        return self._images.width(self._images.penultimate)

    def _layers(self, task: Task) -> list[str]:
        return [self._images.penultimate]

    def _rows(self, task: Task) -> np.ndarray:
        return self._images.features(self._layers(task), self._normalize)

    def _learner(self, task: Task, choice: int) -> Pipeline:
        return classifier(C_VALUES[choice], task.multilabel)


class LayersProbe(Probe):
    """The same on the few layers that do best alone, side by side, each of length 1."""

    _normalize = "l2"
    _known: tuple[list[str], np.ndarray] | None = None

    def why_not(self, task: Task) -> str:
        """A network may have one layer alone that can be read."""
        return "" if len(self._images.columns) > 1 else "only one layer can be read"

    def seconds(self, task: Task, n_learnt: int, n_judged: int, until: Until) -> float:
        """Of one fit, and of a share of the ranking of layers as long as they are not ranked."""
        of_fit = super().seconds(task, n_learnt, n_judged, until)
        if self._known is not None:
            return of_fit
        n_fits = len(task.folds) / len(C_VALUES)
        return of_fit + n_fits * self._pace.seconds(n_learnt * self._images.rows.shape[1])

    @property
    def _width(self) -> int:
        if self._known is not None:
            return self._known[1].shape[1]
        return sum(sorted(map(self._images.width, self._images.columns))[-_MOST_SIDE_BY_SIDE:])

    def _layers(self, task: Task) -> list[str]:
        """In the order of the network."""
        return self._chosen(task)[0]

    def _rows(self, task: Task) -> np.ndarray:
        return self._chosen(task)[1]

    def _chosen(self, task: Task) -> tuple[list[str], np.ndarray]:
        if self._known is None:
            names = [*self._images.columns]
            learner = classifier(_RANKING_C, task.multilabel)
            scores = [_mean_score(self._images.features([name], "l2"), task, learner) for name in names]
            best = sorted(range(len(names)), key=lambda i: -scores[i])[:_MOST_SIDE_BY_SIDE]
            layers = [names[i] for i in sorted(best)]
            self._known = layers, self._images.features(layers, self._normalize)
        return self._known


def _mean_score(rows: np.ndarray, task: Task, learner: Pipeline) -> float:
    """Of a learner on some features, over all folds."""
    found = held_out_probabilities(rows, task.y, task.folds, [learner], task.weights)
    parts = [Answer.of_proba(proba, known, task.classes, task.multilabel) for ((known, proba),) in found]
    answers = dict(enumerate(parts))
    return float(np.mean([task.score(answers, fold) for fold in answers]))


class Discriminant(Probe):
    """Linear discriminant analysis on the penultimate layer, with a shrunk covariance."""

    @property
    def choices(self) -> list[str]:
        """Nothing to set: the shrinkage is Ledoit and Wolf's."""
        return [""]

    def why_not(self, task: Task) -> str:
        """It knows no weights, one label for an image, and no spread of a single image."""
        if task.weights is not None:
            return UNWEIGHED
        if task.multilabel:
            return "learns one label of an image"
        if min(np.unique(task.y[learnt], return_counts=True)[1].min() for learnt, _ in task.folds) < 2:
            return "needs two images of each class in every fold"
        return f"{self._width} features are too many" if self._width > _MOST_FOR_COVARIANCE else ""

    def judge(self, task: Task, fold: Fold, until: Until) -> list[Answer]:
        """One answer."""
        learnt, held_out = fold
        rows = self._rows(task)
        with self._pace.measured(len(learnt) * rows.shape[1]), one_thread():
            fitted = self._learner(task, 0).fit(rows[learnt], task.y[learnt])
        return [Answer.of(fitted, rows[held_out], task.classes, task.multilabel)]

    def refit(self, task: Task, choice: int) -> Pipeline:
        """Extractor and classifier."""
        with one_thread():
            learner = self._learner(task, 0).fit(self._rows(task), task.y)
        del learner[-1].covariance_  # as large as all features squared, and predictions do not ask for it
        return self._images.pipeline(self._layers(task), self._normalize, learner)

    def _learner(self, task: Task, choice: int) -> Pipeline:
        return make_pipeline(LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))


class Mean(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Fitted classifiers whose probabilities are averaged.

    Parameters
    ----------
    estimators : list of fitted classifiers
    classes : ndarray of shape (n_classes,)
    multilabel : bool
    """

    def __init__(self, estimators: list[Any], classes: np.ndarray, multilabel: bool) -> None:
        self.estimators, self.classes, self.multilabel = estimators, classes, multilabel
        self.classes_ = classes

    def predict_proba(self, X: Any) -> np.ndarray:
        """Of shape (n, n_classes)."""
        return np.mean([proba_of(estimator, X) for estimator in self.estimators], axis=0)

    def predict(self, X: Any) -> np.ndarray:
        """Labels of images."""
        proba = self.predict_proba(X)
        return (proba > 0.5).astype(int) if self.multilabel else self.classes_[proba.argmax(axis=1)]
