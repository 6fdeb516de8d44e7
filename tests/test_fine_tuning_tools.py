"""The classifier inside everything that scikit-learn users build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from conftest import counting_images
from releases import needs_callbacks
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits
from sklearn.ensemble import AdaBoostClassifier, BaggingClassifier, StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedKFold,
    TunedThresholdClassifierCV,
    cross_val_predict,
    cross_val_score,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor
from featx.training.classification import CrossEntropy

DIGITS = load_digits()
X, Y = DIGITS.images[:48], np.array(["low", "middle", "high"])[DIGITS.target[:48] % 3]
ROWS = DIGITS.data[:48]


def classifier(**parameters: Any) -> FineTuneClassifier:
    settings = {"image_size": 16, "pixel_range": (0, 16), "epochs": 2, "batch_size": 16, "random_state": 0}
    return FineTuneClassifier("featx_micro", **{**settings, "freeze": "all", **parameters})


class Recorder:
    """Notes the epochs of each fit, and ends those of one fit early."""

    max_propagation_depth = None

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.epochs: list[tuple[object, int]] = []

    def setup(self, estimator: Any, context: Any) -> None:
        pass

    def teardown(self, estimator: Any, context: Any) -> None:
        pass

    def on_fit_task_begin(self, estimator: Any, context: Any) -> None:
        pass

    def on_fit_task_end(self, estimator: Any, context: Any) -> bool:
        if context.task_name != "epoch":
            return False
        self.epochs.append((id(context.parent), context.task_id))
        return self.stop_after is not None and context.task_id + 1 >= self.stop_after


def test_grid_search_in_processes_gives_what_one_process_gives() -> None:
    grid = [
        {"freeze": ["all", -1], "learning_rate": [1e-3]},
        {"augment": ["crop"], "learning_rate": [1e-4], "augment_views": [2]},
    ]
    found = {}
    for n_jobs in (1, 2):
        search = GridSearchCV(classifier(epochs=1), grid, cv=2, n_jobs=n_jobs, scoring="neg_log_loss").fit(X, Y)
        found[n_jobs] = search.cv_results_["mean_test_score"], search.predict(X), search.predict_proba(X)
    np.testing.assert_allclose(found[1][0], found[2][0], atol=1e-3)
    np.testing.assert_array_equal(found[1][1], found[2][1])
    np.testing.assert_allclose(found[1][2], found[2][2], atol=1e-3)
    assert len(set(np.round(found[1][0], 6))) == 3


def test_pipeline_and_column_transformer() -> None:
    pipeline = make_pipeline(FunctionTransformer(lambda images: 16 - images), classifier()).fit(X, Y)
    np.testing.assert_array_equal(pipeline.predict(X), classifier().fit(16 - X, Y).predict(16 - X))
    assert pipeline.score(X, Y) > 0.8
    tuned = Pipeline([("features", classifier(freeze=-1)), ("last", LogisticRegression(max_iter=2000))])
    assert tuned.fit(X, Y).score(X, Y) > 0.8
    pixels = ColumnTransformer([("pixels", classifier(image_shape=(8, 8)), slice(0, 64))])
    rows = pixels.fit_transform(np.hstack([ROWS, ROWS[:, :1]]), Y)
    assert rows.shape == (48, 224)
    assert pixels.get_feature_names_out()[0].startswith("pixels__")


def test_calibration() -> None:
    calibrated = CalibratedClassifierCV(classifier(), cv=2).fit(X, Y)
    probabilities = calibrated.predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert calibrated.score(X, Y) > 0.8


@pytest.mark.skipif(
    not any("temperature" in str(option) for option in CalibratedClassifierCV._parameter_constraints["method"]),
    reason="scikit-learn < 1.8 has no temperature scaling",
)
def test_temperature_scaling() -> None:
    temperature = CalibratedClassifierCV(classifier(), cv=2, method="temperature").fit(X, Y)
    assert temperature.score(X, Y) > 0.8


def test_boosting_and_bagging_pass_weights_on() -> None:
    flat = classifier(image_shape=(8, 8), epochs=1)
    boosted = AdaBoostClassifier(flat, n_estimators=2, random_state=0).fit(ROWS, Y)
    assert boosted.score(ROWS, Y) > 0.8
    bagged = BaggingClassifier(flat, n_estimators=3, random_state=0).fit(ROWS, Y)
    assert bagged.score(ROWS, Y) > 0.8
    weights = np.where(Y == "low", 0.0, 1.0)
    assert "low" not in BaggingClassifier(flat, n_estimators=2, random_state=0).fit(
        ROWS, Y, sample_weight=weights
    ).predict(ROWS)


def test_stacking_with_an_extractor_pipeline() -> None:
    features = PretrainedFeatureExtractor("featx_micro", image_size=16, pixel_range=(0, 16), layers=2)
    stack = StackingClassifier(
        [("tuned", classifier(freeze=-1)), ("plain", make_pipeline(features, LogisticRegression(max_iter=1000)))],
        cv=2,
        final_estimator=LogisticRegression(),
    )
    assert stack.fit(X, Y).score(X, Y) > 0.8


def test_tuned_threshold() -> None:
    tuned = TunedThresholdClassifierCV(classifier(), scoring="balanced_accuracy", cv=2).fit(X, Y == "low")
    assert 0 < tuned.best_threshold_ < 1
    assert tuned.score(X, Y == "low") > 0.8


def test_one_against_the_rest() -> None:
    assert OneVsRestClassifier(classifier(image_shape=(8, 8))).fit(ROWS, Y).score(ROWS, Y) > 0.8


@pytest.mark.parametrize("freeze", ["all", -1])
def test_cross_validated_probabilities_are_those_of_fits_by_hand(freeze: int | str) -> None:
    folds = StratifiedKFold(3)
    found = cross_val_predict(classifier(freeze=freeze), X, Y, cv=folds, method="predict_proba")
    for training, test in folds.split(X, Y):
        fitted = classifier(freeze=freeze).fit(X[training], Y[training])
        np.testing.assert_array_equal(found[test], fitted.predict_proba(X[test]))


def test_metadata_routing_passes_weights_to_fit_and_score() -> None:
    weights = np.where(Y == "low", 0.0, 1.0)
    with sklearn.config_context(enable_metadata_routing=True):
        routed = classifier().set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        search = GridSearchCV(routed, {"learning_rate": [1e-3]}, cv=2).fit(X, Y, sample_weight=weights)
        assert "low" not in search.predict(X)
        scores = []
        for training, test in StratifiedKFold(2).split(X, Y):
            fitted = classifier(learning_rate=1e-3).fit(X[training], Y[training], sample_weight=weights[training])
            scores.append(accuracy_score(Y[test], fitted.predict(X[test]), sample_weight=weights[test]))
        assert search.best_score_ == pytest.approx(np.mean(scores))
        piped = make_pipeline(FunctionTransformer(), routed).fit(X, Y, sample_weight=weights)
        assert "low" not in piped.predict(X)
        plain = classifier().set_fit_request(sample_weight=False).set_score_request(sample_weight=False)
        search = GridSearchCV(plain, {"learning_rate": [1e-3]}, cv=2)
        with pytest.raises(TypeError, match="sample_weight"):
            search.fit(X, Y, sample_weight=weights)


@needs_callbacks
def test_callback_on_a_grid_search_sees_every_epoch_of_every_fit() -> None:
    recorder = Recorder()
    search = GridSearchCV(classifier(epochs=3), {"freeze": ["all", -1]}, cv=2)
    search.set_callbacks(recorder).fit(X, Y)
    # two candidates, two folds, and the refit
    assert [task for _, task in recorder.epochs] == [0, 1, 2] * 5
    assert search.best_estimator_.n_iter_ == 3


@needs_callbacks
def test_callback_on_a_grid_search_ends_training_early() -> None:
    stopping = Recorder(stop_after=1)
    search = GridSearchCV(classifier(epochs=3), {"freeze": ["all"]}, cv=2)
    search.set_callbacks(stopping).fit(X, Y)
    assert [task for _, task in stopping.epochs] == [0] * 3
    assert search.best_estimator_.n_iter_ == 1
    assert search.score(X, Y) > 0.8


@needs_callbacks
def test_progress_bar_shows_a_grid_search(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="scikit-learn's progress bars are drawn by rich")
    from sklearn.callback import ProgressBar

    search = GridSearchCV(classifier(), {"freeze": ["all"]}, cv=2)
    search.set_callbacks(ProgressBar()).fit(X, Y)
    assert "epoch" in capsys.readouterr().out or search.best_estimator_.n_iter_ == 2


@pytest.mark.parametrize("augment", [None, "crop"])
def test_grid_search_over_heads_sends_each_image_through_the_network_once(augment: str | None, tmp_path: Path) -> None:
    grid = [
        {"learning_rate": [1e-4, 1e-3], "dropout": [0.0, 0.5]},
        {"linear_probe": [False], "hidden_layer_sizes": [8]},
    ]
    model = classifier(epochs=2, cache=str(tmp_path / "store"), augment=augment, augment_views=2)
    with counting_images("Stem") as batches:
        search = GridSearchCV(model, grid, cv=2).fit(X, Y)
        search.predict(X)
        clone(model).set_params(linear_probe=False).fit(X, Y)
    views = 1 if augment is None else 3  # the image as it is, and two views
    assert FeatureStore(tmp_path / "store").info()["computed"] == views * len(X)
    assert sum(batches) == views * len(X)


def test_searching_the_freeze_point_costs_one_pass_for_each(tmp_path: Path) -> None:
    model = classifier(cache=str(tmp_path / "store"), epochs=1)
    grid = {"freeze": [-1, 2], "learning_rate": [1e-4, 1e-3]}
    GridSearchCV(model, grid, cv=2).fit(X, Y)
    assert FeatureStore(tmp_path / "store").info()["computed"] <= 2 * len(X)


def test_score_is_accuracy_and_cross_validation_agrees() -> None:
    fitted = classifier().fit(X, Y)
    assert fitted.score(X, Y) == accuracy_score(Y, fitted.predict(X))
    scores = cross_val_score(classifier(), X, Y, cv=2, n_jobs=2)
    np.testing.assert_array_equal(scores, cross_val_score(classifier(), X, Y, cv=2))


def test_threads_of_joblib_give_what_one_thread_gives() -> None:
    import joblib

    expected = cross_val_predict(classifier(freeze=-1, dropout=0.3), X, Y, cv=3, method="predict_proba")
    with joblib.parallel_config("threading", n_jobs=3):
        found = cross_val_predict(classifier(freeze=-1, dropout=0.3), X, Y, cv=3, method="predict_proba")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_of_mixed_classes_is_their_cross_entropy_whatever_is_summed_up(smoothing: float) -> None:
    rng = np.random.default_rng(0)
    scores, shares = rng.normal(size=(6, 3)), rng.dirichlet(np.ones(3), 6)
    labels = (shares > 0.3).astype(float)
    softened = shares * (1 - smoothing) + smoothing / 3
    expected = -(softened * (scores - np.log(np.exp(scores).sum(1, keepdims=True)))).sum(1)
    probability, target = 1 / (1 + np.exp(-scores)), labels * (1 - smoothing) + smoothing / 2
    of_labels = -(target * np.log(probability) + (1 - target) * np.log(1 - probability)).mean(1)
    for codes, multilabel, wanted in ((shares, False, expected), (labels, True, of_labels)):
        loss = CrossEntropy(3, multilabel, smoothing)
        given = torch.from_numpy(scores), torch.from_numpy(codes)
        np.testing.assert_allclose(loss(*given).numpy(), wanted)
        assert float(loss(*given, mean=True)) == pytest.approx(wanted.mean())
