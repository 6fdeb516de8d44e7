"""What recipes are judged by: the same labels, folds and score for all."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featx.choosing.folds import Fold
from featx.choosing.predicted import Answer, Predicted

_N_DRAWS = 50  # whose spread is known to a tenth
Answers = dict[int, Answer]  # by fold


@dataclass(frozen=True)
class Task:
    """Labels of images, and how answers to them are judged.

    Attributes
    ----------
    y : ndarray of shape (n,) or (n, n_labels)
    classes : ndarray of shape (n_classes,)
    weights : ndarray of shape (n,) or None
        Of images, when learning and when judging.
    groups : ndarray of shape (n,) or None
        Images that belong together tell no more than one.
    folds : list of (learnt, held_out)
        Row numbers, ascending.
    scorer : callable (classifier, X, y, sample_weight) -> float, or None
        As of scikit-learn, with row numbers as X; None for accuracy.
    seed : int
        Of the draws that tell how far a score can be trusted.
    """

    y: np.ndarray
    classes: np.ndarray
    weights: np.ndarray | None
    groups: np.ndarray | None
    folds: list[Fold]
    scorer: Callable[..., float] | None
    seed: int

    @property
    def multilabel(self) -> bool:
        """Whether an image can have several labels, or none."""
        return self.y.ndim == 2

    def check(self, scoring: object) -> None:
        """Raise where a score cannot judge such labels in some fold, whatever the answers.

        Parameters
        ----------
        scoring : object
            What the user calls it.

        Raises
        ------
        ValueError
        """
        for fold, (_, held_out) in enumerate(self.folds):
            truth = self.y[held_out]
            proba = truth if self.multilabel else self.classes == truth[:, None]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.score({fold: Answer(truth, proba.astype(float))}, fold)
            except Exception as error:
                raise ValueError(
                    f"A score that can judge the labels of every fold is expected, got scoring={scoring!r}, which "
                    f"fails in fold {fold} with the right answers: {error}"
                ) from error

    def score(self, answers: Answers, fold: int) -> float:
        """Of the answers to one fold.

        Raises
        ------
        ValueError
            It is no finite number.
        """
        found = self._score(answers[fold], fold, None)
        if not np.isfinite(found):
            raise ValueError(f"A finite score is expected, got {found} in fold {fold}, as where a class is not in it.")
        return found

    def gain(self, answers: Answers, others: Answers) -> tuple[float, float]:
        """How much better some answers are than others, in the folds that both have: mean, and its standard error.

        The error is over the images that are held out, each with both answers; those of a group count as one. Of a
        score that cannot weigh images it is over the folds.
        """
        shared = sorted(answers.keys() & others.keys())
        gaps = [self.score(answers, fold) - self.score(others, fold) for fold in shared]
        if self.scorer is None:
            return float(np.mean(gaps)), self._error_of_accuracy(answers, others, shared)
        if takes_weights(self.scorer):
            return float(np.mean(gaps)), self._error_by_draws(answers, others, shared)
        error = np.std(gaps, ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else np.inf
        return float(np.mean(gaps)), float(error)

    def _error_of_accuracy(self, answers: Answers, others: Answers, shared: Sequence[int]) -> float:
        """As if one more image of mean weight had told the two apart.

        Without it the single image that two recipes differ in would be as good as its own error.
        """
        rows = np.concatenate([self.folds[fold][1] for fold in shared])
        gaps = np.concatenate([self._right(answers[fold], fold) - self._right(others[fold], fold) for fold in shared])
        weights = np.ones(len(rows)) if self.weights is None else self.weights[rows]
        share = weights / weights.sum()  # of an image that is held out several times in all of these
        around = share * (gaps - share @ gaps)
        together = np.bincount(self._units(rows), weights=around)
        return float(np.sqrt(together @ together + (1 / len(np.unique(rows))) ** 2))

    def _error_by_draws(self, answers: Answers, others: Answers, shared: Sequence[int]) -> float:
        """The spread where images weigh more or less by chance (the Bayesian bootstrap), so that no class is lost."""
        generator, units = np.random.default_rng(self.seed), self._units(np.arange(len(self.y)))
        found = []
        for _ in range(_N_DRAWS):
            drawn = generator.exponential(size=units.max() + 1)[units]
            gaps = [self._score(answers[k], k, drawn) - self._score(others[k], k, drawn) for k in shared]
            found.append(np.mean(gaps))
        return float(np.std(found, ddof=1))

    def _units(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of what is drawn as one: groups, or images."""
        return np.unique(rows if self.groups is None else self.groups[rows], return_inverse=True)[1]

    def _score(self, answer: Answer, fold: int, drawn: np.ndarray | None) -> float:
        """Of one fold; ``drawn`` multiplies the weights of all rows."""
        rows = self.folds[fold][1]
        weights = self.weights if drawn is None else drawn * (1.0 if self.weights is None else self.weights)
        given = None if weights is None else weights[rows]
        if self.scorer is None:
            return float(np.average(self._right(answer, fold), weights=given))
        more = {} if given is None else {"sample_weight": given}
        return float(self.scorer(Predicted(self.classes, rows, answer), rows, self.y[rows], **more))

    def _right(self, answer: Answer, fold: int) -> np.ndarray:
        """Of shape (n_held_out,): 1 where all labels of an image are right."""
        same = answer.labels == self.y[self.folds[fold][1]]
        return (same.all(axis=1) if self.multilabel else same).astype(float)


def takes_weights(scorer: Callable[..., float]) -> bool:
    """Whether a scorer of scikit-learn's, or a callable, can weigh samples."""
    function = getattr(scorer, "_score_func", scorer)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of something built in
        return False
    return any(each.name == "sample_weight" or each.kind is each.VAR_KEYWORD for each in parameters)


def check_takes_weights(scorer: Any) -> None:
    """Raise where images weigh more or less and a scorer does not care.

    Raises
    ------
    ValueError
    """
    if scorer is not None and not takes_weights(scorer):
        raise ValueError(
            f"A score that takes sample_weight is expected with sample_weight or class_weight, got scoring={scorer!r}. "
            "Leave the weights out, or let the score take them."
        )
