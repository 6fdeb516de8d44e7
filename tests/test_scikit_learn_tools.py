"""The extractor inside everything that scikit-learn users build, on pictures that a classifier can tell apart."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from PIL import Image
from releases import keeps_index
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import StackingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  makes the next import possible
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    cross_val_predict,
    cross_val_score,
    learning_curve,
)
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import SelfTrainingClassifier
from sklearn.svm import SVC

from featx import PretrainedFeatureExtractor, load_image_folder

CLASSES = ("disc", "stripe")


def picture(rng: np.random.Generator, kind: str) -> np.ndarray:
    """A bright disc or a bright stripe, somewhere, in noise."""
    rows, columns = np.mgrid[:32, :32]
    y, x = rng.uniform(10, 22, size=2)
    inside = (rows - y) ** 2 + (columns - x) ** 2 < 36 if kind == "disc" else np.abs(columns - x) < 2.5
    return np.clip(rng.normal(90, 25, size=(32, 32, 3)) + 110 * inside[..., None], 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for kind in CLASSES:
        (folder / kind).mkdir()
        for i in range(20):
            Image.fromarray(picture(rng, kind)).save(folder / kind / f"{i}.png")
    return load_image_folder(folder)


def extractor(**parameters: object) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor("featx_micro", **{"layers": -1, **parameters})


def model(**parameters: object) -> Pipeline:
    return make_pipeline(extractor(**parameters), StandardScaler(), LogisticRegression(max_iter=1000))


def test_pipeline_learns_from_paths(photos) -> None:
    assert model().fit(photos.data[::2], photos.target[::2]).score(photos.data[1::2], photos.target[1::2]) > 0.9


def test_grid_search_scores_each_layer_and_each_backbone_on_its_own(photos) -> None:
    grid = {
        "pretrainedfeatureextractor__backbone": ["featx_micro", "squeezenet1_1"],
        "pretrainedfeatureextractor__layers": [0, -1],
    }
    pipeline = model(weights=None, image_size=32, pooling="avg")
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2, scoring="neg_log_loss").fit(photos.data, photos.target)
    assert len(set(np.round(search.cv_results_["mean_test_score"], 6))) == 4
    assert search.predict(photos.data[:3]).shape == (3,)


def test_halving_grid_search(photos) -> None:
    grid = {"logisticregression__C": [1e-6, 1.0]}  # of 16 photos both may sort all, but not with the same confidence
    search = HalvingGridSearchCV(model(), grid, cv=2, min_resources=16, scoring="neg_log_loss", random_state=0)
    assert search.fit(photos.data, photos.target).best_params_ == {"logisticregression__C": 1.0}


def test_column_transformer_puts_photos_beside_numbers(photos) -> None:
    frame = pd.DataFrame({"photo": photos.data, "age": np.arange(40.0)})
    columns = ColumnTransformer([("photo", extractor(), "photo"), ("rest", StandardScaler(), ["age"])])
    rows = columns.set_output(transform="pandas").fit_transform(frame)
    assert rows.columns[0] == "photo__features_avg_0"
    assert rows.columns[-1] == "rest__age"
    as_frame = ColumnTransformer([("photo", extractor(), ["photo"])]).fit_transform(frame)
    np.testing.assert_array_equal(as_frame, rows.to_numpy()[:, :-1].astype(np.float32))
    assert (
        make_pipeline(columns, LogisticRegression(max_iter=1000)).fit(frame, photos.target).score(frame, photos.target)
        > 0.9
    )


def test_feature_union_equals_a_list_of_layers(photos) -> None:
    union = FeatureUnion([("shallow", extractor(layers=1)), ("deep", extractor(layers=-1))])
    np.testing.assert_allclose(
        union.fit_transform(photos.data), extractor(layers=[1, -1]).transform(photos.data), rtol=1e-4, atol=1e-5
    )


def test_stacking(photos) -> None:
    stack = StackingClassifier([("shallow", model(layers=1)), ("deep", model(layers=-1))], cv=2)
    assert stack.fit(photos.data, photos.target).score(photos.data, photos.target) > 0.9


def test_calibration(photos) -> None:
    calibrated = CalibratedClassifierCV(make_pipeline(extractor(), SVC()), cv=2).fit(photos.data, photos.target)
    probabilities = calibrated.predict_proba(photos.data)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    assert (probabilities.argmax(axis=1) == photos.target).mean() > 0.9


def test_self_training_from_few_labels(photos) -> None:
    partly = photos.target.copy()
    partly[12:] = -1
    classifier = SelfTrainingClassifier(LogisticRegression(max_iter=1000))
    pipeline = make_pipeline(extractor(), StandardScaler(), classifier).fit(photos.data, partly)
    assert pipeline.score(photos.data[12:], photos.target[12:]) > 0.8


def test_learning_curve_and_cross_validated_predictions(photos) -> None:
    sizes, _, scores = learning_curve(model(), photos.data, photos.target, cv=2, train_sizes=[8, 20])
    assert sizes.tolist() == [8, 20]
    assert scores[-1].mean() > 0.8
    assert (cross_val_predict(model(), photos.data, photos.target, cv=2) == photos.target).mean() > 0.8
    assert cross_val_score(model(), list(photos.data), photos.target, cv=2).mean() > 0.8


def test_retrieval_finds_the_photo_itself_first(photos) -> None:
    rows = extractor(normalize="l2").transform(photos.data)
    _, nearest = NearestNeighbors(n_neighbors=2).fit(rows).kneighbors(rows)
    np.testing.assert_array_equal(nearest[:, 0], np.arange(40))
    assert (photos.target[nearest[:, 1]] == photos.target).mean() > 0.8


def test_clustering_finds_the_classes(photos) -> None:
    clusters = make_pipeline(extractor(normalize="l2"), KMeans(2, n_init=10, random_state=0)).fit_predict(photos.data)
    assert adjusted_rand_score(photos.target, clusters) > 0.5


@pytest.mark.parametrize(("library", "frame"), [("pandas", pd.DataFrame), ("polars", pl.DataFrame)])
def test_set_output_gives_named_columns(photos, library: str, frame: type) -> None:
    rows = extractor().set_output(transform=library).fit_transform(photos.data[:3])
    assert isinstance(rows, frame)
    assert list(rows.columns)[:2] == ["features_avg_0", "features_avg_1"]


@keeps_index
def test_set_output_keeps_the_index_of_a_series(photos) -> None:
    series = pd.Series(photos.data[:3], index=["a", "b", "c"])
    assert extractor().set_output(transform="pandas").transform(series).index.tolist() == ["a", "b", "c"]


def test_pipeline_survives_a_round_trip_into_a_new_process(photos, tmp_path: Path) -> None:
    pipeline = model().fit(photos.data, photos.target)
    joblib.dump((pipeline, list(photos.data)), tmp_path / "model.joblib")
    code = f"""
        import joblib, numpy
        pipeline, paths = joblib.load({str(tmp_path / "model.joblib")!r})
        numpy.save({str(tmp_path / "scores.npy")!r}, pipeline.decision_function(paths))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "scores.npy"), pipeline.decision_function(photos.data), rtol=1e-3, atol=1e-4
    )


def test_pickled_pipeline_is_small_and_fit_decodes_nothing(tmp_path: Path) -> None:
    resnet = PretrainedFeatureExtractor("resnet50")
    for candidate in (resnet, PretrainedFeatureExtractor("resnet50").fit(["not there.jpg"])):
        joblib.dump(make_pipeline(candidate, LogisticRegression()), tmp_path / "model.joblib")
        assert (tmp_path / "model.joblib").stat().st_size < 50_000
    joblib.load(tmp_path / "model.joblib")[0].fit(["not there either.jpg"])
