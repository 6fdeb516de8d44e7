"""Ways to learn from photos: one that is given, or the best of several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from sklearn.base import clone
from sklearn.pipeline import make_pipeline

from featx.activations.engine import TALLY
from featx.activations.trying import why_unreadable
from featx.backbones.addresses import plain_address
from featx.choosing.budget import Budget, OutOfTime
from featx.choosing.following import Follower, told
from featx.choosing.predicted import Answer
from featx.choosing.search import Entry, Search
from featx.cli.judged import Judged, joined
from featx.cli.kinds import Kind
from featx.cli.models import readable
from featx.cli.options import Machine, Reading, extractor_for, typed_poolings, typed_weights, weights_of
from featx.cli.outcomes import Console
from featx.cli.scoring import compute_once
from featx.cli.sources import Labelled
from featx.estimators.recipes import readable_layers
from featx.estimators.transfer import TransferClassifier
from featx.estimators.tuned_recipes import Watch
from featx.store import FeatureStore
from featx.system.interrupts import Interrupts

FOLDS, FOLDS_TUNED = 5, 3
_INTERRUPTED = "the search was interrupted"


@dataclass(frozen=True)
class Learnt:
    """A fitted model, and how it came about.

    Attributes
    ----------
    model : estimator
    photos : Labelled
        Those that it has learnt from.
    result : dict
        For JSON.
    how : str
        In a line.
    judged : Judged
        What models like it say of photos that they did not learn from.
    """

    model: Any
    photos: Labelled
    result: dict[str, Any]
    how: str
    judged: Judged


class Way(Protocol):
    """A way to learn."""

    def learn(self, photos: Labelled, store: FeatureStore, console: Console, interrupts: Interrupts) -> Learnt:
        """From all photos that can be read, of which the console is told.

        Raises
        ------
        ClickException, ValueError
            There are too few.
        """


@dataclass(frozen=True)
class Settings:
    """What all ways have in common.

    Attributes
    ----------
    kind : Kind
    backbone : str
    pooling : str or list of str
    reading : Reading
    machine : Machine
    n_folds : int or None
    """

    kind: Kind
    backbone: str
    pooling: str | list[str]
    reading: Reading
    machine: Machine
    n_folds: int | None

    def params(self, console: Console, store: FeatureStore) -> dict[str, Any]:
        """For an estimator."""
        own = {"weights": weights_of(self.reading.weights), "pooling": self.pooling, **self.reading.params()}
        return own | self.machine.params(console) | {"cache": store}

    def extractor(self, console: Console, store: FeatureStore) -> Any:
        """One that gives rows of NaN for unreadable photos."""
        return extractor_for(self.backbone, self.reading, self.machine, console, cache=store, pooling=self.pooling)


@dataclass(frozen=True)
class OnFeatures:
    """A linear model on the features of one layer.

    Attributes
    ----------
    settings : Settings
    layers : list or None
        To choose from; None for the usual ones.
    """

    settings: Settings
    layers: list[str | int] | None

    def learn(self, photos: Labelled, store: FeatureStore, console: Console, interrupts: Interrupts) -> Learnt:
        """Layer and regularisation are those that do best."""
        kind, pooling = self.settings.kind, self.settings.pooling
        extractor = self.settings.extractor(console, store)
        names, good = compute_once(extractor, self.layers or _usual_layers(extractor), [pooling], photos.paths, console)
        used = photos.take(good)
        folds = kind.folds(used, self.settings.n_folds or FOLDS)

        def rows_of(layer: str) -> np.ndarray:
            return np.asarray(extractor.set_params(layers=layer, verbose=0).transform(used.paths))

        scores = {name: kind.scores(rows_of(name), used.y, folds) for name in names}
        layer = max(names, key=lambda name: scores[name].mean(axis=1).max())
        best = int(np.argmax(scores[layer].mean(axis=1)))
        setting, found, rows = kind.settings[best], scores[layer][best], rows_of(layer)
        learner = kind.learn(rows, used.y, setting)
        result = {
            "backbone": self.settings.backbone,
            "layer": layer,
            "pooling": typed_poolings(pooling),
            "weights": typed_weights(plain_address(extractor.weights)),
            kind.setting: setting,
            "layers_tried": len(names),
        }
        return Learnt(
            make_pipeline(extractor.set_params(on_error="raise"), *(step for _, step in learner.steps)),
            used,
            result | _scored(kind, found) | {kind.by_fold: found.tolist()},
            f"layer {layer}, {typed_poolings(pooling)} pooling, {kind.setting}={setting:g}",
            kind.judged(rows, used, folds, setting),
        )


@dataclass(frozen=True)
class Tuned:
    """A network that is trained.

    Attributes
    ----------
    settings : Settings
    params : dict
        Of the estimator, beside what all ways have in common.
    """

    settings: Settings
    params: dict[str, Any]

    def learn(self, photos: Labelled, store: FeatureStore, console: Console, interrupts: Interrupts) -> Learnt:
        """Judged by the fits of all folds."""
        kind = self.settings.kind
        model = self.estimator(store, console)
        used = photos.take(readable(model, photos.paths, console))
        folds = kind.folds(used, self.settings.n_folds or FOLDS_TUNED)
        X = np.array(used.paths, dtype=object)
        parts = []
        for number, (learnt, held_out) in enumerate(folds.split(X, used.y), 1):
            _announce(f"Fold {number} of {folds.get_n_splits()}", console)
            learner = clone(model).fit(X[learnt], used.y[learnt])
            parts.append(_judged_of(learner, used.take(held_out), np.unique(used.y)))
        _announce("The model, from all photos", console)
        model.fit(X, used.y)
        return self.learnt(model, used, np.array([kind.score_of(part) for part in parts]), parts)

    def learnt(self, model: Any, used: Labelled, found: np.ndarray, parts: Sequence[Judged], **more: Any) -> Learnt:
        """What there is to say of a fitted network, and of scores of others like it."""
        result = {
            "backbone": model.backbone,
            "layer": str(model.layers),
            "pooling": typed_poolings(model.pooling),
            "freeze": model.freeze,
            "epochs": model.n_iter_,
            "layers_tried": 1,
        }
        how = f"layer {model.layers}, {typed_poolings(model.pooling)} pooling, freeze={model.freeze}, "
        how += f"{model.n_iter_} epochs"
        return Learnt(model, used, result | _scored(self.settings.kind, found) | more, how, joined(parts))

    def estimator(self, store: FeatureStore, console: Console) -> Any:
        """One that is not fitted."""
        given = {**self.settings.params(console, store), **self.params}
        return self.settings.kind.tuned(self.settings.backbone, random_state=0, **given)


@dataclass(frozen=True)
class Searched:
    """The best recipe that there is time for.

    Attributes
    ----------
    settings : Settings
    scoring : str or None
        None for accuracy.
    time_budget : float
        Seconds beyond the first pass.
    """

    settings: Settings
    scoring: str | None
    time_budget: float

    def learn(self, photos: Labelled, store: FeatureStore, console: Console, interrupts: Interrupts) -> Learnt:
        """Ctrl-C ends the search, not the command, once there is something to take."""
        kind, before = self.settings.kind, TALLY.n_images
        extractor = self.settings.extractor(console, store)
        model = self._model(console, store)
        kind.folds(photos, FOLDS)  # says what is wrong in this command's words, and before the first photo is read
        model._asked(np.array(photos.paths, dtype=object), photos.y, None, photos.groups)
        layers = readable_layers(extractor, extractor._architecture(extractor._spec()))
        _, good = compute_once(extractor, layers, [self.settings.pooling], photos.paths, console)
        used = photos.take(good)
        kind.folds(used, FOLDS)
        follower = model._follower = _Following(console, interrupts)
        try:
            model.fit(np.array(used.paths, dtype=object), used.y, groups=used.groups)
        finally:
            del model._follower
        search, best = follower.found
        board = model.leaderboard_
        rows = [dict(zip(board, values, strict=True)) for values in zip(*board.values(), strict=True)]
        mine = next(row for row in rows if row["recipe"] == best.name)
        result = {
            "backbone": self.settings.backbone,
            "pooling": typed_poolings(self.settings.pooling),
            "weights": typed_weights(plain_address(extractor.weights)),
            "recipe": best.name,
            "choice": mine["choice"],
            "reason": search.reason(),
            "interrupted": search.is_interrupted,
            "n_computed": TALLY.n_images - before,
            "leaderboard": [{name: None if value != value else value for name, value in row.items()} for row in rows],
        }
        score = self.scoring or kind.score
        return Learnt(
            model,
            used,
            result | _scored(kind, best.scores(search.task), score, len(search.task.folds)),
            f"{' '.join(filter(None, [best.name, mine['choice']]))}: {search.reason()}",
            _judged_by_folds(search, best, used),
        )

    def _model(self, console: Console, store: FeatureStore) -> TransferClassifier:
        return TransferClassifier(
            self.settings.backbone,
            cv=self.settings.n_folds or FOLDS,
            scoring=self.scoring,
            time_budget=self.time_budget,
            random_state=0,
            **self.settings.params(console, store),
        )


@dataclass(frozen=True)
class TunedOrNot:
    """A linear model on features, or a trained network where that is better beyond doubt.

    Attributes
    ----------
    on_features : OnFeatures
    tuned : Tuned
    time_budget : float
        Seconds beyond the first pass and the linear model.
    """

    on_features: OnFeatures
    tuned: Tuned
    time_budget: float

    def learn(self, photos: Labelled, store: FeatureStore, console: Console, interrupts: Interrupts) -> Learnt:
        """The network is judged by as many of the same folds as there is time for; Ctrl-C ends that."""
        kind, began = self.on_features.settings.kind, time.monotonic()
        first = self.on_features.learn(photos, store, console, interrupts)
        used, model = first.photos, self.tuned.estimator(store, console)
        folds = [*kind.folds(used, self.on_features.settings.n_folds or FOLDS).split(used.paths, used.y, used.groups)]
        rows = [_row("on features", np.array(first.result[kind.by_fold]), time.monotonic() - began, "")]
        console.note(told(rows[0]))
        budget = Budget.from_now(self.time_budget)
        parts, why = self._judged(model, used, folds, budget, interrupts)
        interrupts.waits = True
        scores = np.array([kind.score_of(part) for part in parts])
        rows.append(_row("fine-tuned", scores, budget.spent, why))
        console.note(told(rows[1]))
        reason, is_better = f"the network was not judged: {why}", False
        if parts:
            held_out = np.concatenate([places for _, places in folds[: len(parts)]])
            gain, error = _gain(first.judged.take(held_out), joined(parts))
            is_better = gain > error
            reason = f"a trained network's mean loss is lower by {gain:.4g}, with a standard error of {error:.4g}"
        more = {"leaderboard": rows, "reason": reason, "interrupted": why == _INTERRUPTED}
        if more["interrupted"]:
            _tell_end("the network" if is_better else "the linear model", "", console)
        if not is_better:
            return replace(first, result=first.result | {"recipe": "on features"} | more, how=f"{first.how}: {reason}")
        model.fit(np.array(used.paths, dtype=object), used.y)
        learnt = self.tuned.learnt(model, used, scores, parts, recipe="fine-tuned", of_folds=len(folds), **more)
        return replace(learnt, how=f"{learnt.how}: {reason}")

    def _judged(
        self,
        model: Any,
        used: Labelled,
        folds: list[tuple[np.ndarray, np.ndarray]],
        budget: Budget,
        interrupts: Interrupts,
    ) -> tuple[list[Judged], str]:
        """What networks say of their folds, and why there are not more of them."""
        X, parts, took = np.array(used.paths, dtype=object), list[Judged](), 0.0
        try:
            for learnt, held_out in folds:
                if interrupts.count:  # while Python could raise nothing
                    return parts, _INTERRUPTED
                began, of_all = budget.spent, len(X) / len(learnt)
                if parts and not budget.fits(needed := took * (1 + of_all)):
                    return parts, budget.why_not(needed)

                def until(left: float, began: float = began, of_all: float = of_all) -> bool:
                    return left + of_all * (budget.spent - began + left) < budget.left

                learner = clone(model)
                learner._each_epoch = Watch(until)
                parts.append(_judged_of(learner.fit(X[learnt], used.y[learnt]), used.take(held_out), np.array([])))
                took = budget.spent - began
        except OutOfTime as error:
            return parts, str(error)
        except KeyboardInterrupt:
            return parts, _INTERRUPTED
        return parts, ""


class _Following(Follower):
    """Notes a line for each recipe, and what Ctrl-C does.

    Parameters
    ----------
    console : Console
    interrupts : Interrupts
    """

    ends_on_interrupt = True
    found: tuple[Search, Entry]

    def __init__(self, console: Console, interrupts: Interrupts) -> None:
        self._console, self._interrupts = console, interrupts

    def tried(self, row: dict[str, Any]) -> None:
        """A line."""
        self._console.note(told(row))

    def wants_end(self) -> bool:
        """Ctrl-C while Python could raise nothing."""
        return self._interrupts.count > 0

    def chosen(self, search: Search, entry: Entry) -> None:
        """From now on a first Ctrl-C changes nothing."""
        self.found, self._interrupts.waits = (search, entry), True
        if search.is_interrupted:
            seconds = search.refit_seconds(entry)
            _tell_end(entry.name, f", in about {seconds:.0f} s" if seconds >= 1 else "", self._console)


def _tell_end(what: str, about: str, console: Console) -> None:
    """What a first Ctrl-C did."""
    console.tell(
        f"Interrupted: the search ends. What is best so far, {what}, learns from all photos{about}. Ctrl-C once more "
        "writes no model."
    )


def _usual_layers(extractor: Any) -> list[str | int]:
    several = len(extractor._architecture(extractor._spec()).stages) > 1
    readable = several and not why_unreadable(extractor, -2, [extractor.pooling])
    return ["penultimate", -2] if readable else ["penultimate"]


def _scored(kind: Kind, found: np.ndarray, score: str | None = None, of_folds: int | None = None) -> dict[str, Any]:
    """Score and spread for JSON, under the score's own name, over the folds that were judged, which may not be all."""
    name = score or kind.score
    folds = {"folds": len(found), "of_folds": of_folds or len(found)}
    return {"scoring": name, name: float(found.mean()), "spread": float(found.std())} | folds


def _announce(what: str, console: Console) -> None:
    if console.verbose:  # whose bar comes next
        console.note(what)


def _row(name: str, scores: np.ndarray, seconds: float, why: str) -> dict[str, Any]:
    """A line of a leaderboard."""
    mean, spread = (float(scores.mean()), float(scores.std())) if len(scores) else (None, None)
    return {
        "recipe": name,
        "choice": "",
        "n_folds": len(scores),
        "mean": mean,
        "spread": spread,
        "seconds": seconds,
        "not_tried": why,
    }


def _gain(first: Judged, second: Judged) -> tuple[float, float]:
    """By how much the second loses less of the same photos: mean, and standard error over photos or their groups."""
    gains, groups = first.losses - second.losses, first.photos.groups
    units = np.arange(len(gains)) if groups is None else np.unique(groups, return_inverse=True)[1]
    together = np.bincount(units, weights=(gains - gains.mean()) / len(gains))
    return float(gains.mean()), float(np.sqrt(together @ together))


def _judged_of(learner: Any, photos: Labelled, classes: np.ndarray) -> Judged:
    """What a trained network says of photos that it did not learn from; it may know some of the classes alone."""
    X = np.array(photos.paths, dtype=object)
    if not hasattr(learner, "classes_"):
        return Judged(photos, np.array([]), learner.predict(X), None)
    answer = Answer.of_proba(learner.predict_proba(X), learner.classes_, classes, multilabel=False)
    return Judged(photos, classes, answer.labels, answer.proba)


def _judged_by_folds(search: Search, best: Entry, photos: Labelled) -> Judged:
    """The same of what has won, by the folds that it was judged by."""
    parts = []
    for fold, answer in sorted(best.answers.items()):
        held_out = photos.take(search.task.folds[fold][1])
        parts.append(Judged(held_out, search.task.classes, answer.labels, answer.proba))
    return joined(parts)
