"""Laws of the choice between recipes: what is compared, when a dearer one wins, and what there is time for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import make_classification, make_multilabel_classification
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import accuracy_score, average_precision_score, get_scorer, roc_auc_score
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from featx.choosing.budget import Budget, OutOfTime
from featx.choosing.folds import folds_of
from featx.choosing.following import Follower
from featx.choosing.predicted import Answer, Predicted, proba_of
from featx.choosing.probes import classifier, held_out_probabilities
from featx.choosing.search import Entry, Search
from featx.choosing.task import Task, check_takes_weights

N = 100
Y = np.repeat([0, 1], N // 2)


def task_of(y: np.ndarray = Y, *, n_folds: int = 5, scoring: str | None = None, **more: Any) -> Task:
    classes = np.unique(y) if y.ndim == 1 else np.arange(y.shape[1])
    folds = folds_of(y, np.arange(len(y)), n_folds, None, 0)
    scorer = None if scoring is None else get_scorer(scoring)
    return Task(y, classes, more.get("weights"), more.get("groups"), folds, scorer, 0)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A recipe that has some rows wrong, takes its time, and says beforehand how much."""

    choices = ("",)

    def __init__(
        self, name: str, wrong: Any = (), *, trains: bool = False, clock: Clock | None = None, takes: float = 0.0
    ) -> None:
        self.name, self.trains, self._wrong, self._clock, self._takes = (
            name,
            trains,
            np.asarray(wrong, int),
            clock,
            takes,
        )
        self.judged: list[int] = []
        self.reason = ""
        self.raises: BaseException | None = None

    def why_not(self, task: Task) -> str:
        return self.reason

    def seconds(self, task: Task, n_learnt: int, n_judged: int, until: Any) -> float:
        return self._takes

    def judge(self, task: Task, fold: Any, until: Callable[[float], bool]) -> list[Answer]:
        if self.raises is not None:
            raise self.raises
        if self._clock is not None:
            self._clock.now += self._takes
        rows = fold[1]
        self.judged.append(len(rows))
        right = task.y[rows].astype(float)
        proba = np.where(np.isin(rows, self._wrong), 1 - right, right) * 0.8 + 0.1
        return [Answer.of_proba(np.stack([1 - proba, proba], axis=1), task.classes, task.classes, False)]

    def refit(self, task: Task, choice: int) -> str:
        return self.name


class Listener(Follower):
    """Keeps what it is told."""

    def __init__(self, ends_on_interrupt: bool = False) -> None:
        self.rows = list[dict]()
        self.ends_on_interrupt = ends_on_interrupt
        self.won = ""

    def tried(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def chosen(self, search: Search, entry: Entry) -> None:
        self.won = entry.name


def search(recipes: list[Fake], task: Task, seconds: float | None = None, clock: Clock | None = None):
    follower = Listener()
    found = Search(task, Budget.from_now(seconds, clock or Clock()), follower=follower, n_images=lambda: 0)
    return found, found.run(recipes, with_mean=False), follower.rows


def test_a_dearer_recipe_wins_only_beyond_the_standard_error() -> None:
    # 2 images better and 1 worse: 1 of 100, with an error of sqrt(3 + 1). 5 better: 5, with sqrt(5 + 1).
    assert search([Fake("cheap", [1, 2]), Fake("dear", [0])], task_of())[1].name == "cheap"
    assert search([Fake("cheap", [1, 2, 3, 4, 5]), Fake("dear", [])], task_of())[1].name == "dear"


def test_one_image_is_no_reason_to_choose() -> None:
    assert search([Fake("cheap", [7]), Fake("dear", [])], task_of())[1].name == "cheap"


def test_recipes_are_compared_on_the_folds_they_share() -> None:
    task, clock = task_of(), Clock()
    first = task.folds[0][1]
    # Wrong everywhere but in the first fold, which alone the trained one is judged by.
    cheap = Fake("cheap", np.setdiff1d(np.arange(N), first))
    dear = Fake("dear", first[:8], trains=True, clock=clock, takes=4.0)
    found, best, _ = search([cheap, dear], task, seconds=9.0, clock=clock)
    assert [len(entry.answers) for entry in found.entries] == [5, 1]
    assert best.name == "cheap"
    assert "s left" in found.entries[1].why_not


@pytest.mark.parametrize("scoring", [None, "neg_log_loss"])
def test_error_of_a_gain_is_that_of_other_images(scoring: str | None) -> None:
    generator, n = np.random.default_rng(0), 200 if scoring is None else 15

    def gain() -> tuple[float, float]:
        y = generator.integers(0, 2, size=400)
        task = task_of(y, scoring=scoring)
        folds = range(len(task.folds))
        parts = [{}, {}]
        for fold in folds:
            truth = task.y[task.folds[fold][1]]
            shared = generator.normal(size=len(truth))
            for answers, strength in zip(parts, (1.0, 1.5), strict=True):
                score = strength * (truth - 0.5) + 0.7 * shared + 0.7 * generator.normal(size=len(truth))
                proba = 1 / (1 + np.exp(-score))
                stacked = np.stack([1 - proba, proba], axis=1)
                answers[fold] = Answer.of_proba(stacked, task.classes, task.classes, False)
        return task.gain(parts[1], parts[0])

    gains, errors = np.array([gain() for _ in range(n)]).T
    assert np.mean(errors) == pytest.approx(np.std(gains), rel=2.5 / np.sqrt(2 * n))


def errors_of(task: Task, wrong: Any, other: Any) -> tuple[float, float]:
    """Gain and error of one fake recipe over another."""
    parts = []
    for rows in (wrong, other):
        recipe = Fake("one", rows)
        parts.append({k: recipe.judge(task, fold, lambda _: True)[0] for k, fold in enumerate(task.folds)})
    return task.gain(*parts)


def test_error_of_a_gain_does_not_depend_on_the_folds() -> None:
    better = np.arange(9)
    found = [errors_of(task_of(n_folds=n), [], better) for n in (2, 5, 10, 50)]
    np.testing.assert_allclose(found, [found[0]] * 4, rtol=0.02)
    assert found[0] == pytest.approx((0.09, np.sqrt(0.09 * 0.91 / N + 1 / N**2)))
    repeated = [*RepeatedStratifiedKFold(n_splits=5, n_repeats=8, random_state=0).split(Y, Y)]
    again = errors_of(Task(Y, np.array([0, 1]), None, None, repeated, None, 0), [], better)
    np.testing.assert_allclose(again, found[0], rtol=0.02)


def test_images_of_a_group_tell_no_more_than_one() -> None:
    groups = np.arange(N) // 10
    alone, together = (errors_of(task_of(groups=each), [], np.arange(10))[1] for each in (None, groups))
    assert together == pytest.approx(np.sqrt(0.9 / 10 * 0.1 + 0.01**2), rel=0.1)  # one group of ten
    assert together > 2.5 * alone


@pytest.mark.parametrize("scoring", ["neg_log_loss", "balanced_accuracy", "roc_auc_ovr"])
def test_a_class_with_one_image_in_a_fold_is_no_obstacle(scoring: str) -> None:
    y = np.repeat([0, 1, 2], [40, 36, 4])
    task = task_of(y, n_folds=4, scoring=scoring)
    generator, parts = np.random.default_rng(0), []
    for _ in range(2):
        proba = generator.dirichlet(np.ones(3), size=len(y))
        parts.append(
            {
                k: Answer.of_proba(proba[rows], task.classes, task.classes, False)
                for k, (_, rows) in enumerate(task.folds)
            }
        )
    assert np.isfinite(task.gain(*parts)).all()


def test_a_score_that_cannot_weigh_is_compared_by_folds() -> None:
    def score(estimator: Any, X: Any, y: Any) -> float:
        return accuracy_score(y, estimator.predict(X))

    task = replace(task_of(), scorer=score)
    gain, error = errors_of(task, [0, 60], [1, 2, 3, 61])
    gaps = [np.isin(rows, [1, 2, 3, 61]).mean() - np.isin(rows, [0, 60]).mean() for _, rows in task.folds]
    assert (gain, error) == pytest.approx((np.mean(gaps), np.std(gaps, ddof=1) / 5**0.5))
    with pytest.raises(ValueError, match="takes sample_weight"):
        check_takes_weights(score)
    check_takes_weights(get_scorer("roc_auc"))


def test_a_recipe_that_fails_is_told_and_left() -> None:
    broken = Fake("broken")
    broken.raises = RuntimeError("no neighbours")
    with pytest.warns(FitFailedWarning, match="'broken' failed in fold 0: RuntimeError: no neighbours"):
        found, best, _ = search([Fake("cheap"), broken], task_of())
    assert best.name == "cheap"
    assert "no neighbours" in found.entries[1].why_not
    with pytest.raises(RuntimeError, match="no neighbours"):
        search([broken], task_of())


@pytest.mark.parametrize("in_fold", [0, 2])
def test_an_interrupt_ends_the_search_and_what_was_judged_by_all_folds_is_taken(in_fold: int) -> None:
    class Pressed(Fake):
        def judge(self, *given: Any) -> list[Answer]:
            if len(self.judged) == in_fold:
                raise KeyboardInterrupt
            return super().judge(*given)

    def run(*recipes: Fake, ends: bool = True) -> tuple[Search, Listener]:
        follower = Listener(ends)
        found = Search(task_of(), Budget.from_now(None, Clock()), follower=follower, n_images=lambda: 0)
        found.run(recipes, with_mean=True)
        return found, follower

    found, follower = run(Fake("cheap", range(20)), Pressed("half"), Fake("later"), Fake("tuned", trains=True))
    assert found.is_interrupted
    assert follower.won == "cheap"
    assert [row["recipe"] for row in follower.rows] == ["cheap", "half", "later", "tuned", "mean"]
    assert [row["n_folds"] for row in follower.rows] == [5, 0, 0, 0, 0]
    assert all("interrupted" in row["not_tried"] for row in follower.rows[1:])
    # A network that is half judged counts by the folds that it has.
    found, follower = run(Fake("cheap", range(20)), Pressed("tuned", trains=True))
    assert follower.rows[1]["n_folds"] == in_fold
    assert follower.won == ("tuned" if in_fold else "cheap")
    with pytest.raises(KeyboardInterrupt):
        run(Fake("cheap"), Pressed("half"), ends=False)
    if not in_fold:
        with pytest.raises(KeyboardInterrupt):  # there is nothing to take
            run(Pressed("first"), Fake("later"))


def test_an_interrupt_that_nobody_noticed_ends_the_search_before_the_next_fold() -> None:
    class Late(Listener):
        def wants_end(self) -> bool:
            return bool(self.rows)

    follower = Late(ends_on_interrupt=True)
    later = Fake("later")
    Search(task_of(), Budget.from_now(None, Clock()), follower=follower, n_images=lambda: 0).run(
        [Fake("cheap"), later], with_mean=False
    )
    assert (follower.won, later.judged) == ("cheap", [])


def test_the_reason_names_what_was_beaten_and_what_came_near() -> None:
    beaten, _, _ = search([Fake("cheap", [1, 2, 3, 4, 5, 6]), Fake("dear", [0]), Fake("dearest", [])], task_of())
    # Of 100 images 7 tell them apart, and one more: sqrt(7 - 0.05**2 * 100 + 1) / 100; then 1, and one more.
    assert beaten.reason() == (
        "better than cheap by 0.050, more than the standard error of 0.028; "
        "dearest is better by 0.010 only, within the standard error of 0.014"
    )
    alone, _, _ = search([Fake("cheap")], task_of())
    assert alone.reason() == "nothing else was judged"
    equal, _, _ = search([Fake("cheap", [1]), Fake("dear", [2])], task_of())
    assert equal.reason() == "not better beyond doubt: dear"
    slow = Fake("slow", trains=True, takes=9.0)
    late, _, _ = search([Fake("cheap"), slow], task_of(), seconds=5.0)
    assert late.reason() == "nothing else was judged; not judged: slow"


def test_a_scorer_that_such_labels_cannot_have_is_told_before_anything_is_judged() -> None:
    labels = np.repeat(["a", "b"], 50)
    with pytest.raises(ValueError, match=r"labels of every fold is expected, got scoring='f1', which fails in fold 0"):
        task_of(labels, scoring="f1").check("f1")
    for scoring in (None, "neg_log_loss", "roc_auc", "f1_macro", "balanced_accuracy"):
        task_of(labels, scoring=scoring).check(scoring)
    task_of(np.eye(4, dtype=int)[np.arange(400) % 4], scoring="roc_auc").check("roc_auc")
    apart = replace(task_of(scoring="roc_auc"), folds=[(np.arange(50, 100), np.arange(50))])
    with pytest.raises(ValueError, match="fails in fold 0"):
        apart.check("roc_auc")


def test_a_score_that_is_no_number_counts_as_a_failure() -> None:
    task = replace(task_of(), scorer=lambda *_, **__: float("nan"))
    with pytest.raises(ValueError, match="A finite score is expected, got nan in fold 0"):
        search([Fake("cheap")], task)


def test_a_recipe_that_cannot_be_scored_is_told_and_left() -> None:
    class Labels(Fake):
        def judge(self, *given: Any) -> list[Answer]:
            return [Answer(answer.labels) for answer in super().judge(*given)]

    with pytest.warns(FitFailedWarning, match="'labels' failed"):
        _, best, _ = search([Fake("cheap", range(20)), Labels("labels")], task_of(scoring="neg_log_loss"))
    assert best.name == "cheap"


def test_scorers_of_decisions_and_of_two_labels_are_answered() -> None:
    task = task_of(scoring="roc_auc")
    proba = np.random.default_rng(0).dirichlet(np.ones(2), size=N)
    answer = Answer.of_proba(proba, task.classes, task.classes, False)
    known = Predicted(task.classes, np.arange(N), answer)
    assert get_scorer("roc_auc")(known, np.arange(N), Y) == pytest.approx(roc_auc_score(Y, proba[:, 1]))
    labels = np.stack([Y, 1 - Y], axis=1)
    both = Predicted(np.arange(2), np.arange(N), Answer.of_proba(proba, np.arange(2), np.arange(2), True))
    wanted = average_precision_score(labels, proba)
    assert get_scorer("average_precision")(both, np.arange(N), labels) == pytest.approx(wanted)


def test_a_label_that_no_image_had_is_never_likely() -> None:
    X, y = np.random.default_rng(0).normal(size=(40, 3)), np.zeros((40, 3), int)
    y[:20, 0], y[:, 1] = 1, 1
    proba = proba_of(KNeighborsClassifier().fit(X, y), X)
    assert proba.shape == (40, 3)
    assert proba[:, 1].tolist() == [1.0] * 40
    assert proba[:, 2].tolist() == [0.0] * 40


def test_scores_are_scikit_learns_own() -> None:
    task = task_of(weights=np.linspace(1, 2, N))
    recipe = Fake("one", [1, 2, 60])
    answers = {k: recipe.judge(task, fold, lambda _: True)[0] for k, fold in enumerate(task.folds)}
    for k, (_, held_out) in enumerate(task.folds):
        wanted = accuracy_score(task.y[held_out], answers[k].labels, sample_weight=task.weights[held_out])
        assert task.score(answers, k) == pytest.approx(wanted)


def test_the_first_recipe_is_judged_whatever_it_takes() -> None:
    clock = Clock()
    found, best, _ = search([Fake("one", clock=clock, takes=100.0)], task_of(), seconds=1.0, clock=clock)
    assert best.name == "one"
    assert len(found.entries[0].answers) == 1  # the folds after the first are beyond the time


def test_what_does_not_fit_is_not_begun_and_told() -> None:
    clock = Clock()
    cheap, dear = Fake("cheap", [1], clock=clock, takes=0.1), Fake("dear", trains=True, clock=clock, takes=30.0)
    found, best, told = search([cheap, dear], task_of(), seconds=50.0, clock=clock)  # a fold and then the model: 60
    assert dear.judged == []
    assert [row["recipe"] for row in told] == ["cheap", "dear"]
    assert "about 60 s" in found.entries[1].why_not
    assert (best.name, clock.now < 50) == ("cheap", True)


def test_trained_recipes_take_turns_fold_by_fold() -> None:
    clock = Clock()
    recipes = [Fake("cheap")] + [Fake(name, trains=True, clock=clock, takes=10.0) for name in "ab"]
    found, _, _ = search(recipes, task_of(), seconds=66.0, clock=clock)  # 10 of which the model may take
    assert [len(entry.answers) for entry in found.entries] == [5, 3, 2]
    assert clock.now <= 56


def test_what_takes_longer_than_measured_is_given_up_and_told() -> None:
    dear = Fake("dear", trains=True)
    dear.raises = OutOfTime("takes longer")
    _, best, told = search([Fake("cheap"), dear], task_of(), seconds=10.0)
    assert best.name == "cheap"
    assert told[-1]["not_tried"] == "takes longer"


def test_nothing_that_can_be_tried_is_an_error_with_reasons() -> None:
    one = Fake("one")
    one.reason = "cannot weigh samples"
    with pytest.raises(ValueError, match="one cannot weigh samples"):
        search([one], task_of())


def test_mean_is_that_of_the_probabilities_of_the_two_best() -> None:
    task = task_of()
    found = Search(task, Budget.from_now(None), follower=Follower(), n_images=lambda: 0)
    found.run([Fake("a", range(30)), Fake("b", [1, 2]), Fake("c", [3])], with_mean=True)
    mean = found.entries[-1]
    assert [part.name for part in mean.parts] == ["b", "c"]
    for fold in range(5):
        parts = [part.answers[fold].proba for part in mean.parts]
        np.testing.assert_allclose(mean.answers[fold].proba, np.mean(parts, axis=0))
    assert found.refit(mean) == ["b", "c"]
    assert found.refit(found.entries[0]) == ["a"]


@pytest.mark.parametrize("weighted", [False, True])
def test_held_out_probabilities_are_scikit_learns(weighted: bool) -> None:
    X, y = make_classification(120, 20, n_informative=8, n_classes=3, random_state=0)
    weights = np.random.default_rng(0).uniform(0.5, 2, size=len(y)) if weighted else None
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    params = {"standardscaler__sample_weight": weights, "logisticregression__sample_weight": weights}
    wanted = cross_val_predict(
        classifier(0.1), X, y, cv=folds, method="predict_proba", params=params if weighted else None
    )
    for learnt, held_out in folds.split(X, y):
        (((known, found),),) = held_out_probabilities(X, y, [(learnt, held_out)], [classifier(0.1)], weights)
        assert known.tolist() == [0, 1, 2]
        np.testing.assert_allclose(found, wanted[held_out], rtol=1e-6)


def test_several_labels_are_learnt_one_by_one_with_weights() -> None:
    X, y = make_multilabel_classification(80, 10, n_classes=3, random_state=0)
    y[:, 2] = 1  # nothing to learn
    weights = np.repeat([1.0, 0.0], 40)
    fold = np.arange(60), np.arange(60, 80)
    (((_, weighed),),) = held_out_probabilities(X, y, [fold], [classifier(0.1, multilabel=True)], weights)
    (((_, without),),) = held_out_probabilities(
        X, y, [(np.arange(40), np.arange(60, 80))], [classifier(0.1, multilabel=True)], None
    )
    assert weighed.shape == (20, 3)
    np.testing.assert_allclose(weighed, without, atol=1e-3)
    assert (weighed[:, 2] == 1).all()


def test_folds_of_an_int_are_as_many_as_the_rarest_class_allows() -> None:
    y = np.array(["a"] * 20 + ["b"] * 3)
    folds = folds_of(y, np.arange(23), 5, None, 0)
    assert len(folds) == 3
    for learnt, held_out in folds:
        assert set(y[learnt]) == set(y[held_out]) == {"a", "b"}
    assert sorted(np.concatenate([held_out for _, held_out in folds])) == [*range(23)]


@pytest.mark.parametrize(("y", "message"), [(["a"] * 5, "two classes"), (["a"] * 5 + ["b"], "two images of each")])
def test_too_few_images_are_told(y: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folds_of(np.array(y), np.arange(len(y)), 5, None, 0)


@pytest.mark.parametrize("y", [Y, np.stack([Y, 1 - Y, Y], axis=1)], ids=["classes", "labels"])
def test_groups_are_never_in_both_parts(y: np.ndarray) -> None:
    groups = np.arange(N) // 4
    folds = folds_of(y, np.arange(N), 5, groups, 0)
    assert len(folds) == 5
    for learnt, held_out in folds:
        assert not set(groups[learnt]) & set(groups[held_out])


def test_folds_of_groups_depend_on_the_seed_alone() -> None:
    groups = np.arange(N) // 4
    first, same, other = (folds_of(Y, np.arange(N), 5, groups, seed)[0][1].tolist() for seed in (0, 0, 1))
    assert first == same != other


def test_folds_are_no_more_than_the_groups_of_the_rarest_class() -> None:
    groups = np.arange(N) // 10
    y = np.isin(groups, [3, 7]).astype(int)
    folds = folds_of(y, np.arange(N), 5, groups, 0)
    assert [set(y[held_out]) for _, held_out in folds] == [{0, 1}] * 2


def test_folds_with_one_class_to_learn_are_told() -> None:
    with pytest.raises(ValueError, match="in fold 1"):
        folds_of(
            Y, np.arange(N), [(np.arange(0, N, 2), np.arange(1, N, 2)), (np.arange(20), np.arange(20, N))], None, 0
        )


def test_folds_may_count_from_the_end_or_be_masks() -> None:
    mask = np.arange(N) % 4 == 0
    ((learnt, held_out),) = folds_of(Y, np.arange(N), [(~mask, [-1, 0])], None, 0)
    assert learnt.tolist() == np.flatnonzero(~mask).tolist()
    assert held_out.tolist() == [0, N - 1]


def test_folds_of_a_splitter_are_of_all_rows() -> None:
    used = np.arange(0, N, 2)
    splitter = StratifiedKFold(4)
    for (learnt, held_out), (all_learnt, all_held_out) in zip(
        folds_of(Y, used, splitter, None, 0), splitter.split(Y, Y), strict=True
    ):
        assert used[learnt].tolist() == [row for row in all_learnt if row % 2 == 0]
        assert used[held_out].tolist() == [row for row in all_held_out if row % 2 == 0]
