"""Laws of TransferClassifier: each photo once, the same folds for all, and what has won is what it says."""

from __future__ import annotations

import pickle
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from pictures import encode
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    StratifiedKFold,
    cross_val_predict,
    cross_val_score,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from featx import (
    FeatureStore,
    FineTuneClassifier,
    FineTuneRegressor,
    PretrainedFeatureExtractor,
    TransferClassifier,
    list_layers,
)
from featx.activations.engine import TALLY
from featx.choosing.probes import C_VALUES
from featx.choosing.search import Search
from featx.estimators.recipes import Images
from featx.exceptions import ImageError

DIGITS = load_digits()
X, Y = DIGITS.images[:120], DIGITS.target[:120] % 4
READING: dict[str, Any] = {"pixel_range": (0, 16), "image_size": 32}
FAST = ["probe", "layers", "lda", "mean"]


def model(recipes: Any = FAST, **more: Any) -> TransferClassifier:
    return TransferClassifier("featx_micro", recipes=recipes, random_state=0, **{"cv": 3, **READING, **more})


def tuned(**more: Any) -> FineTuneClassifier:
    return FineTuneClassifier("featx_micro", epochs=1, random_state=0, **READING, **more)


def row_of(fitted: TransferClassifier, name: str) -> pd.Series:
    return pd.DataFrame(fitted.leaderboard_).set_index("recipe").loc[name]


def test_each_image_passes_once_for_all_recipes_on_features() -> None:
    before = TALLY.n_images
    fitted = model().fit(X, Y)
    assert TALLY.n_images - before == len(X)
    assert fitted.leaderboard_["recipe"] == FAST
    assert fitted.leaderboard_["n_images"] == [0] * 4


def test_front_is_computed_once_for_all_folds() -> None:
    fitted = model([("last", tuned(freeze=-1)), "probe"]).fit(X, Y)
    assert row_of(fitted, "last")[["n_folds", "n_images"]].tolist() == [3, len(X)]


def test_probe_is_scikit_learns_search_over_a_pipeline() -> None:
    folds = StratifiedKFold(3, shuffle=True, random_state=1)
    fitted = model(["probe"], cv=folds).fit(X, Y)
    extractor = PretrainedFeatureExtractor("featx_micro", **READING)
    pipeline = make_pipeline(extractor, StandardScaler(), LogisticRegression(max_iter=5000))
    wanted = GridSearchCV(pipeline, {"logisticregression__C": C_VALUES}, cv=folds).fit(X, Y)
    assert fitted.best_score_ == pytest.approx(wanted.best_score_)
    assert row_of(fitted, "probe")["choice"] == f"C={wanted.best_params_['logisticregression__C']:g}"
    np.testing.assert_allclose(fitted.predict_proba(X), wanted.predict_proba(X), rtol=1e-3, atol=1e-5)


def test_layers_are_the_three_that_do_best_alone_each_of_length_one() -> None:
    folds = StratifiedKFold(3)
    noisy = np.clip(X + np.random.default_rng(0).normal(size=X.shape) * 4, 0, 16)  # so that layers differ
    fitted = model(["layers"], cv=folds).fit(noisy, Y)

    def alone(layer: str) -> float:
        extractor = PretrainedFeatureExtractor("featx_micro", layers=layer, normalize="l2", **READING)
        pipeline = make_pipeline(extractor, StandardScaler(), LogisticRegression(C=0.01, max_iter=5000))
        return cross_val_score(pipeline, noisy, Y, cv=folds).mean()

    scores = {name: alone(name) for name in [*list_layers("featx_micro"), "penultimate"]}
    taken = fitted.estimator_[0].layers
    assert len(taken) == 3
    assert min(scores[name] for name in taken) >= max(scores[name] for name in scores.keys() - {*taken})
    assert fitted.estimator_[0].normalize == "l2"


def test_layers_of_the_same_features_count_once() -> None:
    extractor = PretrainedFeatureExtractor("resnet18", weights=None, **READING)
    images, good = Images.of(extractor, X[:4], extractor._items(X[:4], reset=False), None)
    # The penultimate layer is the average of the last stage.
    assert [*images.columns] == ["relu", "layer1", "layer2", "layer3", "penultimate"]
    assert good.tolist() == [0, 1, 2, 3]
    for name in images.columns:
        wanted = clone(extractor).set_params(layers=name, normalize="l2").transform(X[:4])
        np.testing.assert_allclose(images.features([name], "l2"), wanted, rtol=1e-6)


def test_a_network_is_judged_by_the_fits_of_its_folds() -> None:
    folds = StratifiedKFold(3, shuffle=True, random_state=1)
    fitted = model([("last", tuned(freeze=-1))], cv=folds).fit(X, Y)
    wanted = cross_val_score(tuned(freeze=-1), X, Y, cv=folds)
    assert fitted.best_score_ == pytest.approx(wanted.mean())
    assert row_of(fitted, "last")["spread"] == pytest.approx(wanted.std())
    by_hand = tuned(freeze=-1).fit(X, Y)
    np.testing.assert_array_equal(fitted.predict_proba(X), by_hand.predict_proba(X))


@pytest.mark.parametrize("several", [False, True])
def test_mean_averages_the_probabilities_of_two_fitted_recipes(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "winner", lambda self: self.entries[-1])
    y = np.stack([Y > 1, Y % 2], axis=1).astype(int) if several else Y
    fitted = model(["probe", "layers", "mean"]).fit(X, y)
    assert (fitted.best_recipe_, row_of(fitted, "mean")["choice"]) == ("mean", "probe and layers")
    parts = [part.predict_proba(X) for part in fitted.estimator_.estimators]
    assert len(parts) == 2
    np.testing.assert_allclose(fitted.predict_proba(X), np.mean(parts, axis=0))
    labels = fitted.predict_proba(X) > 0.5 if several else fitted.classes_[fitted.predict_proba(X).argmax(axis=1)]
    np.testing.assert_array_equal(fitted.predict(X), labels)


def test_the_same_seed_gives_the_same_model() -> None:
    models = [model(["probe", "layers", ("last", tuned(freeze=-1))]).fit(X, Y) for _ in range(2)]
    first, second = (pd.DataFrame(each.leaderboard_).drop(columns=["seconds", "n_images"]) for each in models)
    pd.testing.assert_frame_equal(first, second)
    np.testing.assert_array_equal(*(each.predict_proba(X) for each in models))


def test_sample_weights_count_in_learning_and_judging() -> None:
    weights = np.tile([2.0, 0.0, 1.0], 40)
    kept = weights > 0
    folds = StratifiedKFold(3)
    splits = [(np.flatnonzero(np.isin(np.arange(120), a)), b) for a, b in folds.split(X, Y)]
    fitted = model(["probe", "lda"], cv=splits).fit(X, Y, sample_weight=weights)
    assert row_of(fitted, "lda")[["n_folds", "not_tried"]].tolist() == [0, "cannot weigh samples"]
    extractor = PretrainedFeatureExtractor("featx_micro", **READING)
    rows = extractor.transform(X)
    scores = []
    for learnt, held_out in splits:
        learnt, held_out = learnt[kept[learnt]], held_out[kept[held_out]]
        scaler = StandardScaler().fit(rows[learnt], sample_weight=weights[learnt])
        best = LogisticRegression(C=float(row_of(fitted, "probe")["choice"][2:]), max_iter=5000)
        best.fit(scaler.transform(rows[learnt]), Y[learnt], sample_weight=weights[learnt])
        scores.append(best.score(scaler.transform(rows[held_out]), Y[held_out], sample_weight=weights[held_out]))
    assert fitted.best_score_ == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("scoring", ["balanced_accuracy", "neg_log_loss"])
def test_scoring_is_scikit_learns(scoring: str) -> None:
    folds = StratifiedKFold(3)
    fitted = model(["probe"], cv=folds, scoring=scoring).fit(X, Y)
    C = float(row_of(fitted, "probe")["choice"][2:])
    extractor = PretrainedFeatureExtractor("featx_micro", **READING)
    pipeline = make_pipeline(extractor, StandardScaler(), LogisticRegression(C=C, max_iter=5000))
    wanted = cross_val_score(pipeline, X, Y, cv=folds, scoring=scoring)
    assert fitted.best_score_ == pytest.approx(wanted.mean(), rel=1e-4)
    if scoring == "neg_log_loss":
        assert fitted.score(X, Y) == pytest.approx(-log_loss(Y, fitted.predict_proba(X)))


def test_groups_stay_together() -> None:
    groups = np.arange(120) // 10
    copies = np.repeat(X[::10], 10, axis=0)  # all of a group look alike: only learning the group by heart would help
    labels = np.random.default_rng(0).integers(0, 2, size=12).repeat(10)
    by_group = model(["probe"]).fit(copies, labels, groups=groups).best_score_
    apart = model(["probe"]).fit(copies, labels).best_score_
    assert apart == 1
    assert by_group < 0.9


def test_several_labels() -> None:
    labels = np.stack([Y > 1, Y % 2, DIGITS.target[:120] > 5], axis=1).astype(int)
    fitted = model(["probe", "lda", ("last", tuned(freeze="all")), "mean"]).fit(X, labels)
    assert row_of(fitted, "lda")["not_tried"]
    assert fitted.predict(X).shape == fitted.predict_proba(X).shape == fitted.decision_function(X).shape == labels.shape
    np.testing.assert_array_equal(fitted.predict(X), fitted.decision_function(X) > 0)
    assert fitted.score(X, labels) > 0.8


def test_a_users_own_classifiers_are_recipes() -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", **READING)
    own = [
        ("neighbors", make_pipeline(extractor, KNeighborsClassifier())),
        ("ridge", make_pipeline(extractor, RidgeClassifier())),
        ("whole", make_pipeline(FunctionTransformer(), tuned(freeze="all"))),
    ]
    before = TALLY.n_images
    fitted = model(["probe", *own, "mean"]).fit(X, Y)
    assert TALLY.n_images - before == len(X)  # also for those without a store of their own
    assert row_of(fitted, "ridge")["n_folds"] == 3
    assert row_of(fitted, "mean")["not_tried"] == ""
    assert "ridge" not in row_of(fitted, "mean")["choice"]
    folds = StratifiedKFold(3)
    wanted = cross_val_score(own[0][1], X, Y, cv=folds).mean()
    again = model(own[:1], cv=folds).fit(X, Y)
    assert again.best_score_ == pytest.approx(wanted)
    assert again.estimator_[0].cache is None
    weighed = model(["probe", own[0]]).fit(X, Y, sample_weight=np.ones(120))
    assert row_of(weighed, "neighbors")["not_tried"] == "cannot weigh samples"


@pytest.mark.parametrize("cached", [False, True])
def test_a_users_search_is_a_recipe_that_passes_once_and_keeps_no_store(cached: bool, tmp_path: Any) -> None:
    pipeline = make_pipeline(PretrainedFeatureExtractor("featx_micro", **READING), KNeighborsClassifier())
    grid = GridSearchCV(pipeline, {"kneighborsclassifier__n_neighbors": [1, 3]}, cv=2)
    before = TALLY.n_images
    fitted = model([("search", grid)], cache=tmp_path if cached else None).fit(X, Y)
    assert TALLY.n_images - before == len(X)
    assert fitted.estimator_.best_estimator_[0].cache is None
    assert fitted.estimator_.estimator[0].cache is None


def test_a_classifier_is_judged_by_what_it_predicts() -> None:
    y = (Y > 1).astype(int)
    extractor = PretrainedFeatureExtractor("featx_micro", **READING)
    strict = FixedThresholdClassifier(
        make_pipeline(extractor, StandardScaler(), LogisticRegression()),
        threshold=0.97,
        response_method="predict_proba",
    )
    folds = StratifiedKFold(3)
    fitted = model([("strict", strict)], cv=folds).fit(X, y)
    assert fitted.best_score_ == pytest.approx(cross_val_score(strict, X, y, cv=folds).mean())


def test_a_winner_without_probabilities_has_scores() -> None:
    y = (Y > 1).astype(int)
    ridge = make_pipeline(PretrainedFeatureExtractor("featx_micro", **READING), RidgeClassifier())
    fitted = model([("ridge", ridge)], scoring="roc_auc").fit(X, y)
    assert not hasattr(fitted, "predict_proba")
    assert fitted.score(X, y) == pytest.approx(roc_auc_score(y, fitted.estimator_.decision_function(X)))
    assert fitted.best_score_ > 0.8


def test_class_weights_count_in_learning_and_judging() -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", **READING)
    own = ("neighbors", make_pipeline(extractor, KNeighborsClassifier()))
    folds = StratifiedKFold(3)
    y = (Y == 0).astype(int)
    balanced = model(["probe", own], class_weight="balanced", cv=folds).fit(X, y)
    assert row_of(balanced, "neighbors")["not_tried"] == "cannot weigh samples"
    same = model(["probe"], cv=folds).fit(X, y, sample_weight=compute_sample_weight("balanced", y))
    assert balanced.best_score_ == same.best_score_
    assert balanced.best_score_ != model(["probe"], cv=folds).fit(X, y).best_score_
    np.testing.assert_array_equal(balanced.predict_proba(X), same.predict_proba(X))
    labels = np.stack([Y > 1, Y % 2], axis=1).astype(int)
    several = model(["probe"], class_weight=[{0: 1, 1: 2}] * 2).fit(X, labels)
    weights = compute_sample_weight([{0: 1, 1: 2}] * 2, labels)
    same = model(["probe"]).fit(X, labels, sample_weight=weights)
    np.testing.assert_allclose(several.predict_proba(X), same.predict_proba(X))


@pytest.mark.parametrize(
    ("parameters", "given", "message"),
    [
        ({"scoring": "acuracy"}, {}, "acuracy"),
        ({}, {"groups": np.arange(7)}, "inconsistent numbers"),
        ({}, {"y": np.r_[np.zeros(119, int), 1]}, "two images of each class"),
        ({"cv": [(np.arange(5), np.arange(5, 120))]}, {"y": np.repeat([0, 1], 60)}, "in fold 0"),
        ({"recipes": [("s", 5)]}, {}, "another name and a classifier"),
        ({"recipes": ["probe", 3]}, {}, "another name and a classifier"),
        ({"recipes": [("mean", KNeighborsClassifier())]}, {}, "another name and a classifier"),
        ({"recipes": [("numbers", FineTuneRegressor("featx_micro"))]}, {}, "another name and a classifier"),
        ({"scoring": lambda estimator, X, y: 1.0}, {"sample_weight": np.ones(120)}, "takes sample_weight"),
    ],
    ids=[
        *("scoring", "groups", "lone image", "fold of one class", "number", "no pair", "taken name", "regressor"),
        "score without weights",
    ],
)
def test_what_is_wrong_is_told_before_the_first_image(parameters: Any, given: Any, message: str) -> None:
    before = TALLY.n_images
    with pytest.raises(ValueError, match=message):
        model(**{"recipes": ["probe"], **parameters}).fit(X, **{"y": Y, **given})
    assert TALLY.n_images == before


def test_folds_may_be_an_iterator() -> None:
    found = [model(["probe"], cv=cv).fit(X, Y) for cv in (StratifiedKFold(3), StratifiedKFold(3).split(X, Y))]
    assert found[0].best_score_ == found[1].best_score_


def test_callbacks_are_told_of_the_fit() -> None:
    if not hasattr(TransferClassifier, "set_callbacks"):
        pytest.skip("this scikit-learn has no callbacks")
    told = list[str]()

    class Noting:
        def setup(self, *_: Any, **__: Any) -> None:
            told.append("setup")

        def teardown(self, *_: Any, **__: Any) -> None:
            told.append("teardown")

        def on_fit_task_begin(self, *_: Any, **__: Any) -> None:
            told.append("begin")

        def on_fit_task_end(self, *_: Any, **__: Any) -> None:
            told.append("end")

    model(["probe"]).set_callbacks(Noting()).fit(X, Y)
    assert told == ["setup", "begin", "end", "teardown"]


def test_a_budget_leaves_out_what_does_not_fit_and_says_so() -> None:
    slow = tuned(freeze=0).set_params(epochs=500)
    fitted = model(["probe", ("slow", slow)], time_budget=5).fit(X, Y)
    row = row_of(fitted, "slow")
    assert row["n_folds"] == 0
    assert "would take about" in row["not_tried"]
    assert fitted.best_recipe_ == "probe"


def test_nothing_is_left_of_the_search(tmp_path: Any) -> None:
    for recipe in ("probe", "layers", "lda"):  # what is kept is of the size of the features
        assert len(pickle.dumps(model([recipe]).fit(X, Y))) < 60_000
    fitted = model(["probe"]).fit(X, Y)
    joblib.dump(fitted, tmp_path / "model.joblib")
    again = joblib.load(tmp_path / "model.joblib")
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))
    assert clone(fitted).get_params() == fitted.get_params()


def test_a_tuned_winner_is_saved_as_one(tmp_path: Any) -> None:
    fitted = model([("last", tuned(freeze=-1))]).fit(X, Y)
    fitted.save(tmp_path / "model.safetensors")
    for kind in (TransferClassifier, FineTuneClassifier):
        loaded = kind.load(tmp_path / "model.safetensors")
        assert type(loaded) is kind
        np.testing.assert_allclose(loaded.predict_proba(X), fitted.predict_proba(X), rtol=1e-6)
        assert loaded.classes_.tolist() == fitted.classes_.tolist()
    with pytest.raises(TypeError, match="joblib"):
        model(["probe"]).fit(X, Y).save(tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_grid_over_networks_passes_each_photo_once_through_each(tmp_path: Any) -> None:
    search = GridSearchCV(
        model(FAST, cache=FeatureStore(tmp_path)),
        {"backbone": ["featx_micro", "squeezenet1_1"], "weights": [None]},
        cv=2,
    )
    before = TALLY.n_images
    search.fit(X[:60], Y[:60])
    assert TALLY.n_images - before == 2 * 60


def test_it_stands_behind_a_column_transformer() -> None:
    frame = pd.DataFrame({f"pixel {i}": column for i, column in enumerate(DIGITS.data[:120].T)}).assign(name="x")
    pixels = [name for name in frame if name != "name"]
    columns = ColumnTransformer([("pixels", "passthrough", pixels)], verbose_feature_names_out=False)
    columns.set_output(transform="pandas")
    pipeline = make_pipeline(columns, model(["probe"], image_shape=(8, 8))).fit(frame, Y)
    assert pipeline[-1].feature_names_in_.tolist() == pixels
    np.testing.assert_array_equal(pipeline.predict(frame), model(["probe"]).fit(X, Y).predict(X))
    assert cross_val_predict(pipeline, frame, Y, cv=2).shape == (120,)


def test_unreadable_images_are_left_out_or_told(tmp_path: Any) -> None:
    paths = []
    for i, image in enumerate(X[:40]):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(encode((image * 15.9).astype(np.uint8), "PNG"))
    paths[7].write_bytes(b"no picture")
    files, labels = [*map(str, paths)], Y[:40] % 2
    with pytest.raises(ImageError, match=r"7\.png"):
        model(["probe"], pixel_range="auto").fit(files, labels)
    lenient = model(["probe"], pixel_range="auto", on_error="nan")
    with pytest.warns(UserWarning, match="1 of 40"):
        fitted = lenient.fit(files, labels)
    others = np.delete(np.arange(40), 7)
    wanted = model(["probe"], pixel_range="auto").fit([files[i] for i in others], labels[others])
    assert fitted.best_score_ == wanted.best_score_


@pytest.mark.parametrize("recipes", [["prob"], ["mean"], ["probe", "probe"], []])
def test_recipes_that_are_none_are_told(recipes: list[str]) -> None:
    with pytest.raises(ValueError, match="'probe', 'layers', 'lda'"):
        model(recipes).fit(X, Y)


def test_verbose_tells_each_recipe_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    model(["probe", "lda"], verbose=1).fit(X, Y, sample_weight=np.ones(120))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("probe C=")
    assert "(3 folds)" in lines[0]
    assert lines[1] == "lda: cannot weigh samples"
