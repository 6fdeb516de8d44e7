"""Recipes tried one after another, cheap ones first, and the one to take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from sklearn.exceptions import FitFailedWarning

from featx.choosing.budget import Budget, OutOfTime
from featx.choosing.folds import Fold
from featx.choosing.following import Follower
from featx.choosing.predicted import Answer
from featx.choosing.task import Task
from featx.exceptions import ImageError

MEAN = "mean"
_INTERRUPTED = "the search was interrupted"
Until = Callable[[float], bool]  # whether so many more seconds can be spent


class Recipe(Protocol):
    """A way to learn from images."""

    @property
    def name(self) -> str:
        """In the leaderboard."""

    @property
    def trains(self) -> bool:
        """Whether it trains a network, which takes so long that one fold may have to do."""

    @property
    def choices(self) -> Sequence[str]:
        """What it can be set to, all of which are judged; one empty text where there is nothing to set."""

    def why_not(self, task: Task) -> str:
        """Why it cannot be tried at all; empty where it can."""

    def seconds(self, task: Task, n_learnt: int, n_judged: int, until: Until) -> float:
        """Of fitting it, with one choice, and judging some images, as far as is known; may measure it first.

        Raises
        ------
        OutOfTime
            Measuring takes too long.
        """

    def judge(self, task: Task, fold: Fold, until: Until) -> list[Answer]:
        """Learn from some images and tell of others, once for each choice.

        Raises
        ------
        OutOfTime
            It takes longer than there is time for.
        """

    def refit(self, task: Task, choice: int) -> Any:
        """An estimator that has learnt from all images."""


@dataclass(eq=False)
class Entry:
    """A line of the leaderboard.

    Attributes
    ----------
    name : str
    choices : list of dict of int to Answer
        For each of the recipe's choices its answers by fold.
    labels : sequence of str
        What the choices are called.
    seconds : float
    n_images : int
        That passed through the network, or through its front, because of it.
    why_not : str
        Why it was not tried, or not on all folds.
    """

    name: str
    labels: Sequence[str]
    choices: list[dict[int, Answer]]
    recipe: Recipe | None = None
    parts: tuple[Entry, ...] = ()
    seconds: float = 0.0
    n_images: int = 0
    why_not: str = ""
    best: int = 0
    is_told: bool = False

    @property
    def answers(self) -> dict[int, Answer]:
        """Of the best choice, by fold."""
        return self.choices[self.best] if self.choices else {}

    def scores(self, task: Task) -> np.ndarray:
        """Of the best choice, by fold."""
        return np.array([task.score(self.answers, fold) for fold in sorted(self.answers)])

    def row(self, task: Task) -> dict[str, Any]:
        """As the leaderboard shows it."""
        scores = self.scores(task)
        return {
            "recipe": self.name,
            "choice": self.labels[self.best] if self.answers else "",
            "n_folds": len(scores),
            "mean": float(scores.mean()) if len(scores) else float("nan"),
            "spread": float(scores.std()) if len(scores) else float("nan"),
            "seconds": self.seconds,
            "n_images": self.n_images,
            "not_tried": self.why_not,
        }

    def choose(self, task: Task) -> None:
        """The choice that did best so far; the first of equals."""
        means = [np.mean([task.score(answers, fold) for fold in answers]) for answers in self.choices]
        self.best = int(np.argmax(means))


class Search:
    """Recipes on one task.

    Parameters
    ----------
    task : Task
    budget : Budget
    follower : Follower
        Is told of each that was tried, and of the end.
    n_images : callable () -> int
        Images that have passed through a network so far.

    Attributes
    ----------
    is_interrupted : bool
        Whether it was ended before all was tried that there was time for.
    """

    def __init__(self, task: Task, budget: Budget, *, follower: Follower, n_images: Callable[[], int]) -> None:
        self.task, self._budget, self._follower, self._n_images = task, budget, follower, n_images
        self.entries: list[Entry] = []
        self.is_interrupted = False
        self._failure: Exception | None = None

    def run(self, recipes: Sequence[Recipe], with_mean: bool) -> Entry:
        """Judge recipes, of which the first is judged whatever it takes, and return the winner.

        Raises
        ------
        ValueError
            None of them could be tried.
        """
        self.entries = [Entry(recipe.name, recipe.choices, [{} for _ in recipe.choices], recipe) for recipe in recipes]
        for entry in self.entries:
            assert entry.recipe is not None
            entry.why_not = entry.recipe.why_not(self.task)
        try:
            best = self._best(with_mean)
        except KeyboardInterrupt:
            if not self._follower.ends_on_interrupt or not self._judged():
                raise
            self._be_interrupted()
            best = self._best(with_mean)
        self._follower.chosen(self, best)
        return best

    def _best(self, with_mean: bool) -> Entry:
        """The winner, once all is judged that there is time for; once interrupted, of what is judged by then."""
        if not self.is_interrupted:
            self._judge_all()
        if not self._judged():
            if self._failure is not None:
                raise self._failure
            reasons = "; ".join(f"{entry.name} {entry.why_not}" for entry in self.entries)
            raise ValueError(f"At least one recipe that can be tried is expected, got none: {reasons}.")
        if with_mean and self.entries[-1].name != MEAN:
            self.entries.append(Entry(MEAN, [""], [{}]))
        if with_mean:
            self._judge_mean(self.entries[-1])
            self._end(self.entries[-1])
        return self.winner()

    def winner(self) -> Entry:
        """The first of those judged, or what is better than the best before it by more than the standard error."""
        return self._compared()[0]

    def reason(self) -> str:
        """Why the winner is taken, in words."""
        best, before, rivals = self._compared()
        unjudged = [entry.name for entry in self.entries if not entry.answers]
        names = ", ".join(rival.name for rival in rivals)
        found = [f"not better beyond doubt: {names}"] if rivals else ["nothing else was judged"]
        if before is not None:
            gain, error = self.task.gain(best.answers, before.answers)
            found = [f"better than {before.name} by {gain:.3f}, more than the standard error of {error:.3f}"]
        for rival in rivals:
            gain, error = self.task.gain(rival.answers, best.answers)
            if gain > 0:
                found.append(f"{rival.name} is better by {gain:.3f} only, within the standard error of {error:.3f}")
        if unjudged:
            found.append(f"not judged: {', '.join(unjudged)}")
        return "; ".join(found)

    def _compared(self) -> tuple[Entry, Entry | None, list[Entry]]:
        """The winner, what it had to be better than, and what came later and was not better beyond doubt."""
        best, *others = self._judged()
        before: Entry | None = None
        rivals = list[Entry]()
        for entry in others:
            gain, error = self.task.gain(entry.answers, best.answers)
            if gain > error:
                best, before, rivals = entry, best, []
            else:
                rivals.append(entry)
        return best, before, rivals

    def leaderboard(self) -> dict[str, list[Any]]:
        """Columns of what was tried, a row for each recipe."""
        rows = [entry.row(self.task) for entry in self.entries]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def refit(self, entry: Entry) -> list[Any]:
        """The estimators of a line, fitted to all images."""
        parts = entry.parts or (entry,)
        return [part.recipe.refit(self.task, part.best) for part in parts if part.recipe is not None]

    def refit_seconds(self, entry: Entry) -> float:
        """What `refit` will take, as far as is known."""
        parts = entry.parts or (entry,)
        return sum(
            part.recipe.seconds(self.task, len(self.task.y), 0, _always) for part in parts if part.recipe is not None
        )

    def _judge_all(self) -> None:
        n_folds = len(self.task.folds)
        for entry in self.entries:
            if entry.recipe is not None and not entry.recipe.trains:
                for fold in range(n_folds):
                    self._judge(entry, fold)
                # These are judged by all, or not at all, unless there is nothing else.
                if 0 < len(entry.answers) < n_folds and len(self._judged()) > 1:
                    entry.choices = [{} for _ in entry.choices]
                self._end(entry)
        trained = [entry for entry in self.entries if entry.recipe is not None and entry.recipe.trains]
        for fold in range(n_folds):
            for entry in trained:
                self._judge(entry, fold)
                if fold == n_folds - 1 or entry.why_not:
                    self._end(entry)

    def _judge(self, entry: Entry, fold: int) -> None:
        """One fold, unless time will not do."""
        if entry.why_not or fold in entry.answers:
            return
        if self._follower.wants_end():
            raise KeyboardInterrupt
        assert entry.recipe is not None
        learnt, held_out = self.task.folds[fold]
        began, passed = self._budget.spent, self._n_images()
        try:
            after = self._after()

            def until(seconds: float) -> bool:
                return after is None or seconds + after < self._budget.left

            if after is not None:
                self._check(entry, len(learnt), len(held_out), after, until)
            found = entry.recipe.judge(self.task, (learnt, held_out), until)
            for answers, answer in zip(entry.choices, found, strict=True):
                answers[fold] = answer
            entry.choose(self.task)
        except OutOfTime as error:
            entry.why_not = str(error)
        except ImageError:
            raise
        except Exception as error:  # of a recipe, or of a score that it gives nothing for
            self._note_failure(entry, fold, error)
        finally:
            entry.seconds += self._budget.spent - began
            entry.n_images += self._n_images() - passed

    def _be_interrupted(self) -> None:
        """What is not judged by all folds stays as it is; what is on features alone and half judged does not count."""
        self.is_interrupted = True
        for entry in self.entries:
            if entry.recipe is not None and len(entry.answers) < len(self.task.folds):
                if not entry.recipe.trains and len(self._judged()) > 1:
                    entry.choices = [{} for _ in entry.choices]
                entry.why_not = entry.why_not or _INTERRUPTED
                self._end(entry)

    def _note_failure(self, entry: Entry, fold: int, error: Exception) -> None:
        """A recipe that fails is told and left, unless there is no other."""
        if len(self.entries) == 1:
            raise error
        for answers in entry.choices:
            answers.clear()
        entry.why_not = f"failed in fold {fold}: {type(error).__name__}: {error}"
        self._failure = self._failure or error
        warnings.warn(f"Recipe {entry.name!r} {entry.why_not}", FitFailedWarning, stacklevel=2)

    def _after(self) -> float | None:
        """Seconds that the best so far needs to learn from all images; None where there is nothing yet, or no limit."""
        if self._budget.seconds is None or not self._judged():  # something has to be there in the end
            return None
        return self.refit_seconds(self.winner())

    def _check(self, entry: Entry, n_learnt: int, n_judged: int, after: float, until: Until) -> None:
        """Raise where a fold, and then the model, will not be ready in time."""
        assert entry.recipe is not None
        if not until(0.0):
            raise OutOfTime("no time was left")
        needed = len(entry.labels) * entry.recipe.seconds(self.task, n_learnt, n_judged, until)
        needed += max(self.refit_seconds(entry), after)
        if not self._budget.fits(needed):
            raise OutOfTime(self._budget.why_not(needed))

    def _judge_mean(self, entry: Entry) -> None:
        """The two best, where both give probabilities, by the folds that all have."""
        if self.is_interrupted:
            entry.why_not = "" if entry.answers else _INTERRUPTED
            return
        judged = [other for other in self._judged() if all(a.proba is not None for a in other.answers.values())]
        if len(judged) < 2:
            entry.why_not = "two recipes with probabilities are needed"
            return
        shared = set.intersection(*(set(other.answers) for other in judged))
        ranked = sorted(judged, key=lambda other: -np.mean([self.task.score(other.answers, fold) for fold in shared]))
        entry.parts = tuple(sorted(ranked[:2], key=judged.index))
        if self._budget.seconds is not None and not self._budget.fits(needed := self.refit_seconds(entry)):
            entry.why_not, entry.parts = self._budget.why_not(needed), ()
            return
        first, second = entry.parts
        both = sorted(first.answers.keys() & second.answers.keys())
        pairs = {fold: (first.answers[fold], second.answers[fold]) for fold in both}
        entry.choices = [
            {fold: Answer.mean(pair, self.task.classes, self.task.multilabel) for fold, pair in pairs.items()}
        ]
        entry.labels = [f"{first.name} and {second.name}"]

    def _end(self, entry: Entry) -> None:
        if not entry.is_told:
            entry.is_told = True
            self._follower.tried(entry.row(self.task))

    def _judged(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.answers]


def _always(seconds: float) -> bool:
    return True
