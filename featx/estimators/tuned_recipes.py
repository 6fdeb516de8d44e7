"""Classifiers of images as a search judges them, and what those take that train a network."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import has_fit_parameter

from featx.choosing.budget import OutOfTime
from featx.choosing.folds import Fold
from featx.choosing.predicted import Answer
from featx.choosing.search import Until
from featx.choosing.task import Task
from featx.estimators.recipes import UNWEIGHED, Images, Pace, lend, take_back
from featx.estimators.tuning import TunedEstimator

# Of a step that trains: a pass forward takes a third.
_FORWARD = 1 / 3
_TRIAL_EPOCHS = 4  # as many as there are views


class Given:
    """A classifier of images.

    Parameters
    ----------
    name : str
    estimator : classifier
        Is cloned for every fit.
    images : Images
    """

    choices = ("",)
    trains = False

    def __init__(self, name: str, estimator: Any, images: Images) -> None:
        self.name, self._images = name, images
        self._estimator, self._lent = lend(estimator, images.store)
        self._pace = Pace()

    def why_not(self, task: Task) -> str:
        """It may know no weights."""
        weighs = task.weights is None or has_fit_parameter(self._estimator, "sample_weight")
        return "" if weighs else UNWEIGHED

    def seconds(self, task: Task, n_learnt: int, n_judged: int, until: Until) -> float:
        """By the rows of the fold before."""
        return self._pace.seconds(n_learnt)

    def judge(self, task: Task, fold: Fold, until: Until) -> list[Answer]:
        """One answer; networks inside are watched."""
        learnt, held_out = fold
        watched = clone(self._estimator)
        for part in (watched, *watched.get_params(deep=True).values()):
            if isinstance(part, TunedEstimator):
                part._each_epoch = Watch(until)
        with self._pace.measured(len(learnt)):
            fitted = _fit(watched, self._images.X, task, learnt)
            judged = _safe_indexing(self._images.X, held_out)
            return [self._answer(fitted, judged, task)]

    def _answer(self, fitted: Any, X: Any, task: Task) -> Answer:
        return Answer.of(fitted, X, task.classes, task.multilabel)

    def refit(self, task: Task, choice: int) -> Any:
        """The estimator, fitted."""
        fitted = _fit(clone(self._estimator), self._images.X, task, np.arange(len(task.y)))
        return take_back(fitted, self._lent, self._images.store)


class GivenTuned(Given):
    """One in which a network is tuned, at any depth."""

    trains = True


class Tuned(GivenTuned):
    """A network that is tuned, whose steps are measured first."""

    _steps: _Steps | None = None
    _is_front_known = False

    def seconds(self, task: Task, n_learnt: int, n_judged: int, until: Until) -> float:
        """By the measured cost of a step."""
        if self._steps is None:
            self._steps = _Steps.measured(self._estimator, self._images.X, task, until)
        n_new = 0 if self._is_front_known else n_learnt + n_judged
        return self._steps.seconds(self._estimator, n_learnt, n_judged, n_new)

    def judge(self, task: Task, fold: Fold, until: Until) -> list[Answer]:
        """One answer."""
        answers = super().judge(task, fold, until)
        self._is_front_known = True
        return answers

    def _answer(self, fitted: Any, X: Any, task: Task) -> Answer:
        """Its labels follow from its probabilities, which are computed once."""
        return Answer.of_proba(fitted.predict_proba(X), fitted.classes_, task.classes, task.multilabel)


def recipe_of(name: str, estimator: Any, images: Images) -> Given:
    """The recipe of a classifier, by what it trains."""
    if isinstance(estimator, TunedEstimator):
        return Tuned(name, estimator, images)
    inside = estimator.get_params(deep=True).values()
    return (GivenTuned if any(isinstance(part, TunedEstimator) for part in inside) else Given)(name, estimator, images)


def _fit(estimator: Any, X: Any, task: Task, rows: np.ndarray) -> Any:
    given = {} if task.weights is None else {"sample_weight": task.weights[rows]}
    return estimator.fit(_safe_indexing(X, rows), task.y[rows], **given)


class Watch:
    """Ends a fit after an epoch, where those to come take longer than there is time.

    Parameters
    ----------
    until : callable (seconds) -> bool
    """

    def __init__(self, until: Until) -> None:
        self._until, self._before = until, time.perf_counter()

    def __call__(self, n_done: int, n_epochs: int) -> None:
        """Called after each epoch.

        Raises
        ------
        OutOfTime
        """
        now = time.perf_counter()
        left, self._before = (n_epochs - n_done) * (now - self._before), now
        if n_done > 1 and not self._until(left):  # before the first one lies what all of them share
            raise OutOfTime(f"takes longer than was foreseen: about {left:.0f} s more after epoch {n_done}")


@dataclass(frozen=True)
class _Steps:
    """What tuning a network takes.

    Attributes
    ----------
    fixed, step, front : float
        Seconds of a fit in any case, of a step, and of the frozen front for one image in one view.
    """

    fixed: float
    step: float
    front: float

    @classmethod
    def measured(cls, estimator: Any, X: Any, task: Task, until: Until) -> _Steps:
        """By a few steps on two batches, whose values at the freeze point are known then.

        Raises
        ------
        OutOfTime
            Not even these can be made in time.
        """
        rows = np.random.default_rng(task.seed).permutation(len(task.y))
        first, second = (rows[k * estimator.batch_size :][: estimator.batch_size] for k in (0, 1))
        second = second if len(second) else first
        spent = 0.0

        def seconds(rows: np.ndarray, n_epochs: int) -> float:
            nonlocal spent
            if not until(spent):  # a trial is foreseen to take as long as those before it
                raise OutOfTime(f"its steps cannot be measured in the time left: about {spent:.0f} s more")
            begun = time.perf_counter()
            _fit(clone(estimator).set_params(epochs=n_epochs, verbose=0, early_stopping=False), X, task, rows)
            spent = time.perf_counter() - begun
            return spent

        seconds(first, 1)  # what a network's first pass takes beside passing
        new, known = seconds(second, 1), seconds(second, 1)
        if estimator.augment is not None:
            seconds(second, _TRIAL_EPOCHS)  # all views are known then
        step = max(0.0, seconds(second, _TRIAL_EPOCHS) - known) / (_TRIAL_EPOCHS - 1)
        return cls(max(0.0, known - step), step, max(0.0, new - known) / len(second))

    def seconds(self, estimator: Any, n_learnt: int, n_judged: int, n_new: int) -> float:
        """Of a fit to some images and predictions of others, some of which are new to the network."""
        n_epochs = estimator._n_epochs(n_learnt)
        if estimator.early_stopping:  # it may end as soon as this; an epoch at a time tells how long it lasts
            n_epochs = min(n_epochs, estimator.n_iter_no_change + 1)
        n_views = 1 if estimator.augment is None else 2 if estimator.augment == "flip" else estimator.augment_views
        n_batches = -(-n_judged // estimator.batch_size)
        n_steps = n_epochs * -(-n_learnt // estimator.batch_size) + _FORWARD * n_batches
        return self.fixed + self.front * n_new * max(1, n_views) + self.step * n_steps
