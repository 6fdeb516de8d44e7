"""The displays' laws: what is drawn equals what was computed by hand, on the Axes given and nowhere else."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import counting_images
from matplotlib.colors import to_rgba
from pictures import colours, encode, oriented, rgb_of
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.manifold import TSNE
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor, list_layers
from featx.exceptions import LayerError
from featx.plots import (
    ActivationMapDisplay,
    ClassMapDisplay,
    EmbeddingDisplay,
    LayerScoreDisplay,
    MistakesDisplay,
    NeighborsDisplay,
    TrainingCurveDisplay,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, size=(12, 40, 50, 3), dtype=np.uint8)
Y = np.array(["ant", "bee", "cat"] * 4)
MICRO = PretrainedFeatureExtractor("featx_micro")
STAGES = ["features.0", "features.2", "features.4", "features"]
STRANGE = ["<script>alert(1)</script>", r"$\frac{1}$", "_private_"]


@pytest.fixture(autouse=True)
def _figures_are_closed() -> Iterator[None]:
    plt.close("all")  # those of doctests
    yield
    plt.close("all")


class Told(ClassifierMixin, BaseEstimator):
    """A classifier whose probabilities are given beforehand."""

    def __init__(self, proba: Any, classes: Any) -> None:
        self.proba = proba
        self.classes = classes

    @property
    def classes_(self) -> np.ndarray:
        return np.asarray(self.classes)

    def fit(self, X: Any, y: Any) -> Told:
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        return np.asarray(self.proba)


def results_of(candidates: list[tuple[dict[str, Any], list[float]]], score: str = "score") -> dict[str, Any]:
    """cv_results_ as scikit-learn makes them."""
    names = list(dict.fromkeys(name for params, _ in candidates for name in params))
    results: dict[str, Any] = {}
    for name in names:
        column = np.ma.MaskedArray(np.empty(len(candidates), dtype=object), mask=True)
        for row, (params, _) in enumerate(candidates):
            if name in params:
                column[row] = params[name]
        results[f"param_{name}"] = column
    for fold in range(len(candidates[0][1])):
        results[f"split{fold}_test_{score}"] = np.array([scores[fold] for _, scores in candidates])
    return results


def layer_score(ax: Any = None) -> LayerScoreDisplay:
    candidates = [({"layers": i, "pooling": p}, [0.1 * i, 0.2]) for i in range(3) for p in ("avg", "max")]
    return LayerScoreDisplay.from_cv_results(results_of(candidates), ax=ax)


def training_curve(ax: Any = None) -> TrainingCurveDisplay:
    model = FineTuneClassifier("featx_micro", freeze="all", epochs=2, early_stopping=True, validation_fraction=0.5)
    return TrainingCurveDisplay.from_estimator(model.set_params(random_state=0).fit(IMAGES, Y), ax=ax)


def neighbors(ax: Any = None) -> NeighborsDisplay:
    return NeighborsDisplay.from_estimator(MICRO, IMAGES[0], IMAGES[1:], 3, y=Y[1:], ax=ax)


def embedding(ax: Any = None) -> EmbeddingDisplay:
    return EmbeddingDisplay.from_estimator(MICRO, IMAGES, Y, ax=ax)


def activation_map(ax: Any = None) -> ActivationMapDisplay:
    return ActivationMapDisplay.from_estimator(MICRO, IMAGES[0], 1, ax=ax)


def mistakes(ax: Any = None) -> MistakesDisplay:
    return MistakesDisplay.from_predictions(Y, Y[::-1], np.linspace(0.4, 1, 12), IMAGES, ax=ax)


def class_map(ax: Any = None) -> ClassMapDisplay:
    model = FineTuneClassifier("featx_micro", freeze="all", epochs=1, random_state=0)
    return ClassMapDisplay.from_estimator(model.fit(IMAGES, Y), IMAGES[0], ax=ax)


DISPLAYS = [layer_score, training_curve, neighbors, embedding, activation_map, class_map, mistakes]


# What holds for each of them


@pytest.mark.parametrize("draw", DISPLAYS)
def test_display_draws_on_the_axes_given_and_nowhere_else(draw: Callable[..., Any]) -> None:
    figure, (ax, other) = plt.subplots(1, 2)
    before = len(ax.get_children()), len(other.get_children())
    display = draw(ax)
    assert display.ax_ is ax
    assert display.figure_ is figure
    assert figure.axes == [ax, other]
    assert len(ax.get_children()) > before[0]
    assert len(other.get_children()) == before[1]
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()


@pytest.mark.parametrize("draw", DISPLAYS)
def test_plot_returns_the_display_and_draws_anew(draw: Callable[..., Any]) -> None:
    display = draw()
    (first,) = plt.get_fignums()
    assert display.plot() is display
    assert plt.get_fignums() == [first, display.figure_.number]
    assert display.ax_.figure is display.figure_


@pytest.mark.parametrize("draw", DISPLAYS)
def test_wrong_axes_are_told_before_anything_is_computed(draw: Callable[..., Any], monkeypatch: Any) -> None:
    def transform(*_: object) -> None:
        raise AssertionError("nothing is to be computed")

    monkeypatch.setattr(PretrainedFeatureExtractor, "transform", transform)
    with pytest.raises(
        TypeError, match=r"A matplotlib Axes or None is expected by \w+Display\.from_\w+, got ax='left'"
    ):
        draw("left")
    assert not plt.get_fignums()


@pytest.mark.parametrize("draw", DISPLAYS)
def test_missing_matplotlib_is_told_with_what_to_install(draw: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r'Display\.from_\w+ requires matplotlib.*pip install "featx\[plots\]"'):
        draw()


@pytest.mark.parametrize("draw", DISPLAYS)
def test_display_leaves_global_state_alone(draw: Callable[..., Any]) -> None:
    def state() -> list[str]:
        return [*map(repr, (np.random.get_state(), random.getstate(), dict(matplotlib.rcParams)))]  # noqa: NPY002

    before, drawn = state(), torch.get_rng_state()
    draw()
    assert state() == before
    assert torch.equal(torch.get_rng_state(), drawn)


def test_featx_imports_no_matplotlib_before_something_is_drawn() -> None:
    code = "import sys, featx, featx.plots; sys.exit(bool({'matplotlib', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_strange_labels_are_shown_as_text() -> None:
    y = np.array(STRANGE * 4)
    shown = {
        "mistakes": MistakesDisplay.from_predictions(y, np.roll(y, 1), np.ones(12), IMAGES),
        "neighbors": NeighborsDisplay.from_estimator(MICRO, IMAGES[0], IMAGES, 12, y=y),
        "embedding": EmbeddingDisplay.from_estimator(MICRO, IMAGES, y),
        "layers": LayerScoreDisplay(STRANGE, STRANGE, np.ones((3, 3, 2)), score_name=STRANGE[1]),
        "classes": ClassMapDisplay(np.ones((3, 2, 2)), IMAGES[0], labels=STRANGE, scores=np.ones(3)),
        "title": ActivationMapDisplay(np.ones((2, 2)), IMAGES[0], title=STRANGE[1]),
    }
    shown["layers"].plot()
    shown["title"].plot()
    shown["classes"].plot()
    for display in shown.values():
        display.figure_.canvas.draw()  # fails where matplotlib reads mathematics into a dollar
    words = {name: [text.get_text() for text in text_of(display)] for name, display in shown.items()}
    for name in ("mistakes", "neighbors", "embedding", "layers", "classes"):
        for label in STRANGE:
            assert any(label in text for text in words[name]), (name, label)
    assert shown["title"].ax_.get_title() == STRANGE[1]
    assert STRANGE[1] in words["layers"]


def text_of(display: Any) -> list[Any]:
    """Everything that can be read in a display."""
    ax = display.ax_
    legend = ax.get_legend()
    found = [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()]
    return [text for text in [*found, *(legend.get_texts() if legend else [])] if text.get_text()]


# Which layer transfers


def test_layer_scores_are_means_and_spreads_over_the_folds() -> None:
    candidates = [
        ({"model__layers": 2, "model__pooling": "max"}, [0.9, 0.7]),
        ({"model__layers": 0, "model__pooling": "avg"}, [0.2, 0.4]),
        ({"model__layers": 0, "model__pooling": "max"}, [0.5, 0.5]),
        ({"model__layers": 2, "model__pooling": "avg"}, [1.0, 0.0]),
    ]
    display = LayerScoreDisplay.from_cv_results(results_of(candidates))
    assert display.layers == ["stage 0", "stage 2"]
    assert display.poolings == ["max", "avg"]
    of_max, of_avg = (line.get_ydata() for line in display.lines_)
    np.testing.assert_allclose(of_max, [0.5, 0.8])
    np.testing.assert_allclose(of_avg, [0.3, 0.5])
    np.testing.assert_allclose(edges_of(display.bands_[0]), [(0.5, 0.5), (0.7, 0.9)])
    np.testing.assert_allclose(edges_of(display.bands_[1]), [(0.2, 0.4), (0.0, 1.0)], atol=1e-12)
    assert [text.get_text() for text in display.ax_.get_legend().get_texts()] == ["max", "avg"]
    assert [tick.get_text() for tick in display.ax_.get_xticklabels()] == ["stage 0", "stage 2"]


def edges_of(band: Any) -> list[tuple[float, float]]:
    """Lowest and highest y of a band at each x."""
    corners = band.get_paths()[0].vertices
    return [
        (corners[corners[:, 0] == x, 1].min(), corners[corners[:, 0] == x, 1].max()) for x in np.unique(corners[:, 0])
    ]


def test_layer_score_shows_the_best_of_other_hyper_parameters() -> None:
    scores = {0.1: [0.5, 0.7], 1: [0.9, 0.5], 10: [0.8, 0.2]}
    candidates = [({"layers": i, "C": c}, [i * s for s in row]) for c, row in scores.items() for i in (1, 2)]
    display = LayerScoreDisplay.from_cv_results(results_of(candidates))
    np.testing.assert_array_equal(display.scores, [[[0.9, 0.5], [1.8, 1.0]]])
    assert display.poolings == [None]
    assert display.ax_.get_legend() is None


def test_layer_score_of_a_halving_search_is_that_of_its_last_round() -> None:
    candidates = [({"layers": 0}, [0.9]), ({"layers": 1}, [0.7]), ({"layers": 0}, [0.6])]
    display = LayerScoreDisplay.from_cv_results(results_of(candidates) | {"iter": [0, 0, 1]})
    assert display.lines_[0].get_ydata().tolist() == [0.6, 0.7]


def test_failed_and_missing_candidates_leave_gaps() -> None:
    candidates = [
        ({"layers": 0, "pooling": "avg"}, [0.5, 0.7]),
        ({"layers": 0, "pooling": "avg"}, [np.nan, np.nan]),
        ({"layers": 1, "pooling": "avg"}, [np.nan, 0.7]),
        ({"layers": 1}, [0.2, 0.2]),
        ({"C": 1}, [1.0, 1.0]),
    ]
    display = LayerScoreDisplay.from_cv_results(results_of(candidates))
    assert display.poolings == ["avg", "not searched"]
    np.testing.assert_allclose(display.lines_[0].get_ydata(), [0.6, np.nan])
    np.testing.assert_allclose(display.lines_[1].get_ydata(), [np.nan, 0.2])


def test_layers_stand_in_the_order_of_the_network() -> None:
    tried = ["penultimate", "features.6", 0, ["features.2", "features.4"], "features.1"]
    results = results_of([({"layers": layer}, [float(i)]) for i, layer in enumerate(tried)])
    display = LayerScoreDisplay.from_cv_results(results, estimator=make_pipeline(MICRO, LogisticRegression()))
    assert display.layers == ["features.0", "features.1", "features.2 + features.4", "features.6", "penultimate"]
    np.testing.assert_array_equal(display.lines_[0].get_ydata(), [2, 4, 3, 1, 0])


def test_layers_of_an_unknown_network_stand_as_they_were_tried_and_indices_sorted() -> None:
    def layers_of(tried: list[Any]) -> list[str]:
        results = results_of([({"layers": layer}, [1.0]) for layer in tried])
        return list(LayerScoreDisplay.from_cv_results(results).layers)

    assert layers_of([-1, -3, -2]) == ["stage -3", "stage -2", "stage -1"]
    assert layers_of(["late", 2, "early"]) == ["late", "stage 2", "early"]
    assert layers_of([-1, 0]) == ["stage -1", "stage 0"]


def test_layer_score_says_what_it_does_not_find() -> None:
    results = results_of([({"a__layers": 0, "b__layers": 1}, [1.0])], "accuracy")
    with pytest.raises(ValueError, match=r"one parameter of layers are expected.*\['a__layers', 'b__layers'\]"):
        LayerScoreDisplay.from_cv_results(results)
    with pytest.raises(ValueError, match=r"One of the scores \['accuracy'\] .* got scoring='score'"):
        LayerScoreDisplay.from_cv_results(results, layers_param="a__layers")
    with pytest.raises(ValueError, match="pooling_param='pooling'"):
        LayerScoreDisplay.from_cv_results(results, layers_param="a__layers", pooling_param="pooling")
    with pytest.raises(TypeError, match=r"A PretrainedFeatureExtractor.*got LogisticRegression"):
        LayerScoreDisplay.from_estimator(LogisticRegression(), IMAGES, Y)
    with pytest.raises(ValueError, match="leave classifier=None"):
        LayerScoreDisplay.from_estimator(
            make_pipeline(MICRO, LogisticRegression()), IMAGES, Y, classifier=LogisticRegression()
        )
    assert LayerScoreDisplay.from_cv_results(results, layers_param="a__layers", scoring="accuracy").scores.item() == 1


@pytest.mark.parametrize("bare", [True, False])
def test_layer_score_from_estimator_cross_validates_each_layer_in_one_pass(bare: bool) -> None:
    classifier = LogisticRegression(C=0.01, max_iter=1000)
    model = make_pipeline(clone(MICRO), StandardScaler(), classifier)
    with counting_images("FeatxMicro") as batches:
        display = LayerScoreDisplay.from_estimator(MICRO if bare else model, IMAGES, Y, poolings=["avg", "max"], cv=2)
    assert sum(batches) == len(IMAGES)
    assert display.layers == [*STAGES, "penultimate"]
    for pooling, scores in zip(display.poolings, display.scores, strict=True):
        for layer, folds in zip(display.layers, scores, strict=True):
            model[0].set_params(layers=layer, pooling=pooling, cache=None)
            np.testing.assert_allclose(folds, cross_val_score(model, IMAGES, Y, cv=2))
    assert MICRO.get_params() == PretrainedFeatureExtractor("featx_micro").get_params()


class Flat(torch.nn.Module):
    """One score, without a dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3, 2))
        self.pool, self.flatten, self.last = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.flatten(self.pool(self.trunk(x)))).squeeze(1)


def test_penultimate_layer_that_cannot_be_pooled_is_not_tried() -> None:
    module = Flat()
    display = LayerScoreDisplay.from_estimator(PretrainedFeatureExtractor(module, image_size=32), IMAGES, Y, cv=2)
    assert display.layers == list_layers(module)


def test_layer_score_from_estimator_reaches_into_a_column_transformer_and_keeps_to_its_cache(tmp_path: Path) -> None:
    columns = ColumnTransformer([("photo", clone(MICRO).set_params(cache=str(tmp_path)), [0])])
    X = np.array([encode(image, "PNG") for image in IMAGES], dtype=object)[:, None]
    model = make_pipeline(columns, LogisticRegression())
    display = LayerScoreDisplay.from_estimator(model, X, Y, layers=[-1, 0], cv=2, scoring="balanced_accuracy")
    assert display.layers == [STAGES[0], STAGES[-1]]
    assert display.ax_.get_ylabel() == display.score_name == "balanced_accuracy"
    assert FeatureStore(tmp_path).info()["computed"] == len(IMAGES)


# How training went


def test_training_curve_shows_the_history_and_the_epoch_that_was_kept() -> None:
    model = FineTuneClassifier("featx_micro", freeze="all", epochs=3, random_state=0).fit(IMAGES, Y)
    model.history_ = {"loss": [3.0, 2.0, 1.0], "learning_rate": [1, 1, 1], "validation_loss": [5.0, 4.0, 6.0]}
    model.best_epoch_ = 1
    display = TrainingCurveDisplay.from_estimator(make_pipeline("passthrough", model))
    training, validation = display.lines_
    np.testing.assert_array_equal(training.get_xydata(), [[0, 3], [1, 2], [2, 1]])
    np.testing.assert_array_equal(validation.get_xydata(), [[0, 5], [1, 4], [2, 6]])
    assert display.best_ is not None
    assert display.best_.get_xdata() == [1, 1]
    assert [text.get_text() for text in display.ax_.get_legend().get_texts()] == [
        "training",
        "validation",
        "kept: epoch 1",
    ]


def test_training_curve_without_validation_is_one_line_and_needs_a_fitted_classifier() -> None:
    model = FineTuneClassifier("featx_micro", freeze="all", epochs=2, random_state=0)
    with pytest.raises(NotFittedError):
        TrainingCurveDisplay.from_estimator(model)
    display = TrainingCurveDisplay.from_estimator(model.fit(IMAGES, Y))
    assert [line.get_ydata().tolist() for line in display.lines_] == [model.history_["loss"]]
    with pytest.raises(TypeError, match=r"A FineTuneClassifier.* got LogisticRegression"):
        TrainingCurveDisplay.from_estimator(LogisticRegression())


# Neighbours


def test_neighbors_are_the_nearest_by_cosine_with_their_pictures_and_labels() -> None:
    features = MICRO.transform(IMAGES).astype(float)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = 1 - unit[1:] @ unit[0]
    order = np.argsort(expected)[:3]
    display = neighbors()
    assert display.indices.tolist() == order.tolist()
    np.testing.assert_allclose(display.distances, expected[order], atol=1e-6)
    for image, picture in zip(display.images_, [IMAGES[0], *IMAGES[1:][order]], strict=True):
        np.testing.assert_array_equal(image.get_array(), picture)
    told = [text.get_text() for text in display.texts_]
    assert told == ["query", *(f"{Y[1:][row]}\ndistance {expected[row]:.3f}" for row in order)]


def test_gallery_shows_pictures_upright_in_proportion_and_apart() -> None:
    display = NeighborsDisplay(
        IMAGES[0], [IMAGES[0, :20], *IMAGES[1:9]], np.arange(9.0), indices=np.arange(9), labels=None
    ).plot()
    display.figure_.canvas.draw()
    boxes = [image.get_window_extent() for image in display.images_]
    for box, picture in zip(boxes, [display.query, *display.pictures], strict=True):
        assert box.width / box.height == pytest.approx(picture.shape[1] / picture.shape[0])
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i])
    assert boxes[5].y1 < boxes[0].y0  # ten pictures are two rows of five
    assert boxes[5].x0 == pytest.approx(boxes[0].x0, abs=boxes[0].width / 2)
    for box, text in zip(boxes, display.texts_, strict=True):
        assert text.get_window_extent().y1 <= box.y0
    assert boxes[1].x0 > boxes[0].x1
    first = display.images_[0]
    left, _, bottom, top = first.get_extent()
    up = first.axes.transData.transform([(left, top), (left, bottom)])[:, 1]
    assert (up[0] > up[1]) == (first.origin == "upper")  # the first row of pixels is drawn at the top


def test_unreadable_images_are_no_neighbors_and_no_points() -> None:
    X = [*IMAGES[:6], b"broken"]
    patient = clone(MICRO).set_params(on_error="nan")
    with pytest.warns(UserWarning, match="1 of 7 images"):
        display = NeighborsDisplay.from_estimator(patient, IMAGES[0], X, 6)
    assert sorted(display.indices) == [0, 1, 2, 3, 4, 5]
    with pytest.warns(UserWarning, match="1 of 7 images"):
        points = EmbeddingDisplay.from_estimator(patient, [X[6], *X[:6]], [*"abcdefg"])
    assert points.indices.tolist() == [1, 2, 3, 4, 5, 6]
    assert list(points.y) == [*"bcdefg"]
    assert len(points.points_) == 6


def test_neighbors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="n_neighbors of at most 12"):
        NeighborsDisplay.from_estimator(MICRO, IMAGES[0], IMAGES, 13)
    with pytest.raises(ValueError, match=r"'n_neighbors' parameter of NeighborsDisplay\.from_estimator must be an int"):
        NeighborsDisplay.from_estimator(MICRO, IMAGES[0], IMAGES, 0)
    with pytest.raises(ValueError, match="'extractor' parameter"):
        NeighborsDisplay.from_estimator("resnet18", IMAGES[0], IMAGES)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        NeighborsDisplay.from_estimator(MICRO, IMAGES[0], IMAGES, y=Y[1:])
    with pytest.raises(ValueError, match='other than "map"'):
        NeighborsDisplay.from_estimator(clone(MICRO).set_params(layers=0, pooling="map"), IMAGES[0], IMAGES)


# The pictures themselves


def test_every_form_of_an_image_gives_the_same_picture(tmp_path: Path) -> None:
    picture = colours()
    upright = rgb_of(encode(picture, "PNG"))
    path = tmp_path / "turned.png"
    path.write_bytes(oriented(picture, 6, "PNG"))
    forms = [str(path), path, path.read_bytes(), picture, picture / 255, torch.from_numpy(picture).permute(2, 0, 1)]
    for form in forms:
        display = NeighborsDisplay.from_estimator(MICRO, form, [form], 1)
        for image in display.images_:
            np.testing.assert_array_equal(image.get_array(), upright)


def test_large_pictures_become_small_and_keep_their_proportions() -> None:
    large = np.kron(colours(48, 32), np.ones((20, 20, 1), dtype=np.uint8))
    display = NeighborsDisplay.from_estimator(MICRO, large, [large], 1)
    assert display.query.shape == (160, 107, 3)


def test_rows_and_ready_tensors_are_shown_as_images() -> None:
    rows = RNG.integers(0, 17, size=(3, 64)).astype(float)
    rows[:, 0], rows[:, 1] = 0, 16
    of_rows = clone(MICRO).set_params(image_shape=(8, 8), pixel_range=(0, 16))
    for extractor in (of_rows, make_pipeline(of_rows, StandardScaler().fit(np.ones((2, 224))))):
        display = NeighborsDisplay.from_estimator(extractor, rows[1], rows, 1)
        expected = np.rint(rows[1].reshape(8, 8, 1) / 16 * 255).repeat(3, axis=2)
        np.testing.assert_array_equal(display.images_[0].get_array(), expected)
    ready = torch.from_numpy(RNG.normal(size=(3, 3, 32, 32)).astype(np.float32))
    display = NeighborsDisplay.from_estimator(clone(MICRO).set_params(preprocess=None), ready[0], ready, 1)
    np.testing.assert_array_equal(display.indices, [0])
    shown = display.images_[0].get_array()
    assert (shown.min(), shown.max()) == (0, 255)
    assert np.corrcoef(shown.ravel(), ready[0].permute(1, 2, 0).ravel())[0, 1] > 0.9999


# The map


def test_embedding_is_the_principal_plane_coloured_by_class() -> None:
    features = MICRO.transform(IMAGES).astype(float)
    centred = features - features.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * values[:2]
    display = embedding()
    np.testing.assert_allclose(np.abs(display.embedding), np.abs(expected), rtol=1e-3, atol=1e-4)
    assert len(display.points_) == 3
    legend = display.ax_.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["ant", "bee", "cat"]
    for points, label in zip(display.points_, ["ant", "bee", "cat"], strict=True):
        np.testing.assert_allclose(points.get_offsets(), display.embedding[label == Y])
    assert len({tuple(points.get_facecolor()[0]) for points in display.points_}) == 3


def test_embedding_shows_pictures_of_points_that_are_apart() -> None:
    display = embedding()
    assert display.pictures is not None
    assert len(display.thumbnails_) == len(display.pictures) > 2
    for box, (place, picture) in zip(display.thumbnails_, display.pictures.items(), strict=True):
        np.testing.assert_array_equal(picture, IMAGES[place])
        np.testing.assert_array_equal(box.offsetbox.get_data(), IMAGES[place])
        assert box.xy == tuple(display.embedding[place])
        assert box.patch.get_edgecolor() == to_rgba(display.points_[["ant", "bee", "cat"].index(Y[place])].get_fc()[0])
    places = display.embedding[list(display.pictures)] / np.ptp(display.embedding, axis=0)
    apart = np.abs(places[:, None] - places[None]).max(axis=2)
    assert apart[np.triu_indices(len(places), 1)].min() >= 0.09
    assert not EmbeddingDisplay.from_estimator(MICRO, IMAGES, Y, thumbnails=False).thumbnails_


class Spying(PCA):
    """PCA that tells what it was given."""

    seen: list[Any] = []  # noqa: RUF012

    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        self.seen.append(y)
        return super().fit_transform(X)


def test_reducers_see_classes_only_where_they_need_them_and_are_left_as_they_were() -> None:
    reducer = Spying(2)
    EmbeddingDisplay.from_estimator(MICRO, IMAGES, Y, reducer=reducer)
    assert Spying.seen == [None]
    assert not hasattr(reducer, "components_")
    display = EmbeddingDisplay.from_estimator(MICRO, IMAGES, Y, reducer=LinearDiscriminantAnalysis(n_components=2))
    expected = LinearDiscriminantAnalysis(n_components=2).fit(MICRO.transform(IMAGES), Y)
    np.testing.assert_allclose(display.embedding, expected.transform(MICRO.transform(IMAGES)), rtol=1e-3)
    display = EmbeddingDisplay.from_estimator(MICRO, IMAGES, reducer=TSNE(perplexity=3, random_state=0))
    assert len(display.points_) == 1
    assert display.ax_.get_legend() is None
    with pytest.raises(ValueError, match=r"two columns .* reducer=PCA\(n_components=3\).*\(12, 3\)"):
        EmbeddingDisplay.from_estimator(MICRO, IMAGES, reducer=PCA(3))


def test_many_classes_have_colours_and_no_legend() -> None:
    display = EmbeddingDisplay(RNG.normal(size=(30, 2)), indices=np.arange(30), y=np.arange(30)).plot()
    assert len({tuple(points.get_facecolor()[0]) for points in display.points_}) == 30
    assert display.ax_.get_legend() is None


# What a layer responds to


def bright(height: int, width: int, y: int, x: int, side: int = 12) -> np.ndarray:
    picture = np.full((height, width, 3), 20, dtype=np.uint8)
    picture[y - side : y + side, x - side : x + side] = 250
    return picture


def brightness() -> PretrainedFeatureExtractor:
    """A network whose one layer puts out how bright each of 7 x 7 cells is, and minus that."""
    conv = nn.Conv2d(3, 2, 32, stride=32)
    with torch.no_grad():
        conv.weight.fill_(1 / (3 * 32 * 32))
        conv.weight[1] *= -1
        conv.bias.zero_()
    return PretrainedFeatureExtractor(nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()), layers="0")


def peak_of(image: Any) -> np.ndarray:
    """Where the largest value of a drawn image is, (x, y) in data coordinates."""
    values = np.asarray(image.get_array())
    values = values.sum(axis=2) if values.ndim == 3 else values
    y, x = (np.mean(where) + 0.5 for where in np.nonzero(values == values.max()))
    left, right, bottom, top = image.get_extent()
    return np.array([left + (right - left) * x / values.shape[1], top + (bottom - top) * y / values.shape[0]])


@pytest.mark.parametrize(("y", "x"), [(40, 80), (40, 310), (260, 80), (260, 310), (75, 250)])
def test_activation_lies_over_what_the_layer_responds_to(y: int, x: int) -> None:
    display = ActivationMapDisplay.from_estimator(brightness(), bright(300, 400, y, x), "0", 0)
    assert display.picture.shape == (224, 224, 3)
    assert display.activation.shape == (7, 7)
    # short side to 256, centre 224: worked out without the library
    scale = 256 / 300
    expected = np.array([x * scale - (400 * scale - 224) / 2, y * scale - (256 - 224) / 2])
    assert np.abs(peak_of(display.image_) - expected).max() < 2
    assert np.abs(peak_of(display.overlay_) - expected).max() <= 16 + 2  # half a cell
    assert display.image_.get_extent() == display.overlay_.get_extent()


def test_only_what_the_network_saw_is_shown() -> None:
    display = ActivationMapDisplay.from_estimator(brightness(), bright(300, 600, 150, 20), "0", 0)
    assert display.picture.max() <= 21
    assert np.ptp(display.activation) < 1e-3
    stretched = bright(300, 300, 20, 20).reshape(-1).astype(float)
    rows = brightness().set_params(image_shape=(300, 300, 3), pixel_range=(0, 255))
    display = ActivationMapDisplay.from_estimator(rows, stretched, "0", 0)
    assert np.abs(peak_of(display.image_) - 20 * 224 / 300).max() < 2
    assert np.abs(peak_of(display.overlay_) - 20 * 224 / 300).max() <= 16 + 2


def test_activation_map_is_upright_whatever_the_camera_stored() -> None:
    upright = bright(304, 400, 40, 80)
    display = ActivationMapDisplay.from_estimator(brightness(), oriented(upright, 6, "PNG"), "0", 0)
    straight = ActivationMapDisplay.from_estimator(brightness(), upright, "0", 0)
    np.testing.assert_array_equal(display.picture, straight.picture)
    np.testing.assert_allclose(display.activation, straight.activation)


def test_channels_are_picked_averaged_or_measured() -> None:
    extractor, picture = brightness(), bright(300, 300, 75, 75)
    first, second = (ActivationMapDisplay.from_estimator(extractor, picture, "0", i).activation for i in (0, 1))
    np.testing.assert_allclose(first, -second, rtol=1e-5)
    mean = ActivationMapDisplay.from_estimator(extractor, picture, "0").activation
    np.testing.assert_allclose(mean, np.zeros((7, 7)), atol=1e-6)
    norm = ActivationMapDisplay.from_estimator(extractor, picture, "0", "norm").activation
    np.testing.assert_allclose(norm, np.hypot(first, second), rtol=1e-5)
    with pytest.raises(ValueError, match="A channel from 0 to 1 is expected, got channel=2"):
        ActivationMapDisplay.from_estimator(extractor, picture, "0", 2)
    with pytest.raises(ValueError, match=r"'channel' parameter of ActivationMapDisplay\.from_estimator must be"):
        ActivationMapDisplay.from_estimator(extractor, picture, "0", "best")


def test_activation_map_takes_whatever_holds_a_network_and_leaves_it_as_it_was() -> None:
    tuned = FineTuneClassifier("featx_micro", freeze=-1, epochs=1, random_state=0, learning_rate=0.1).fit(IMAGES, Y)
    expected = tuned.to_extractor().set_params(layers="features.6", pooling="map").transform(IMAGES[:1])[0]
    shown = ActivationMapDisplay.from_estimator(make_pipeline("passthrough", tuned), IMAGES[0], "features.6")
    np.testing.assert_allclose(shown.activation, expected.mean(axis=2), rtol=1e-4, atol=1e-5)
    plain = ActivationMapDisplay.from_estimator(make_pipeline(MICRO, LogisticRegression()), IMAGES[0], "features.6")
    assert np.abs(plain.activation - shown.activation).max() > 1e-3
    assert MICRO.get_params() == PretrainedFeatureExtractor("featx_micro").get_params()
    assert plain.ax_.get_title() == "features.6, mean"
    with pytest.raises(TypeError, match=r"A PretrainedFeatureExtractor or a FineTuneClassifier.*got LogisticReg"):
        ActivationMapDisplay.from_estimator(LogisticRegression(), IMAGES[0])
    with pytest.raises(LayerError, match=r'A spatial layer is expected for pooling="map"'):
        ActivationMapDisplay.from_estimator(MICRO, IMAGES[0], "penultimate")
    with pytest.raises(LayerError, match="One layer is expected by ActivationMapDisplay"):
        ActivationMapDisplay.from_estimator(MICRO, IMAGES[0], "all")


def test_activation_maps_of_ready_tensors_lie_over_what_they_hold() -> None:
    ready = torch.zeros(1, 3, 96, 128)
    ready[0, :, 66:94, 2:30] = 5.0
    network = brightness().backbone
    extractor = PretrainedFeatureExtractor(network, layers="0", preprocess=None).set_output(transform="pandas")
    display = ActivationMapDisplay.from_estimator(extractor, ready[0], "0", 0)
    np.testing.assert_array_equal(display.picture[..., 0], ready[0, 0] / 5 * 255)
    assert display.activation.shape == (3, 4)
    assert np.unravel_index(display.activation.argmax(), (3, 4)) == (2, 0)
    assert np.abs(peak_of(display.overlay_) - peak_of(display.image_)).max() < 1


# Mistakes


def test_mistakes_are_those_with_the_highest_confidence_first() -> None:
    y_true = ["a", "b", "a", "b", "a", "a"]
    y_pred = ["b", "b", "b", "a", "b", "b"]
    confidence = [0.5, 0.99, 0.7, 0.9, 0.7, np.nan]
    display = MistakesDisplay.from_predictions(y_true, y_pred, confidence, IMAGES[:6], n_mistakes=3)
    assert display.indices.tolist() == [3, 2, 4]
    assert display.confidence.tolist() == [0.9, 0.7, 0.7]
    for image, row in zip(display.images_, [3, 2, 4], strict=True):
        np.testing.assert_array_equal(image.get_array(), IMAGES[row])
    told = [text.get_text() for text in display.texts_]
    assert told == ["a: 90.0%\ntrue: b", "b: 70.0%\ntrue: a", "b: 70.0%\ntrue: a"]
    assert display.ax_.get_title() == "4 of 5 images wrong, the 3 most confident"


def test_mistakes_of_a_classifier_are_those_of_its_probabilities() -> None:
    classes = ["ant", "bee", "cat"]
    proba = RNG.dirichlet(np.ones(3), size=12)
    expected = sorted(
        (row for row in range(12) if classes[proba[row].argmax()] != Y[row]), key=lambda row: -proba[row].max()
    )
    assert len(expected) > 3
    display = MistakesDisplay.from_estimator(Told(proba, classes), IMAGES, Y, n_mistakes=100)
    assert display.indices.tolist() == expected
    np.testing.assert_allclose(display.confidence, [proba[row].max() for row in expected])
    assert display.y_true == [Y[row] for row in expected]
    assert display.y_pred == [classes[proba[row].argmax()] for row in expected]


def test_mistakes_take_one_pass_through_a_search_and_read_images_as_it_does() -> None:
    rows = IMAGES[:, ::5, ::5].reshape(12, -1).astype(float) / 16
    extractor = clone(MICRO).set_params(image_shape=(8, 10, 3), pixel_range=(0, 16))
    pipeline = make_pipeline(extractor, LogisticRegression(C=1e-6))
    search = GridSearchCV(pipeline, {"logisticregression__C": [1e-6]}, cv=2).fit(rows, Y)
    with counting_images("FeatxMicro") as batches:
        display = MistakesDisplay.from_estimator(search, rows, Y[::-1])
    assert sum(batches) == 12
    assert len(display.pictures) == sum(search.predict(rows) != Y[::-1]) > 0
    expected = np.rint(rows[display.indices[0]].reshape(8, 10, 3) / 16 * 255)
    np.testing.assert_array_equal(display.images_[0].get_array(), expected)


def test_mistakes_show_images_beside_a_table() -> None:
    proba = np.tile([0.1, 0.9], (12, 1))
    display = MistakesDisplay.from_estimator(
        Told(proba, ["no", "yes"]), np.zeros((12, 5)), ["yes"] * 11 + ["no"], images=IMAGES
    )
    (image,) = display.images_
    np.testing.assert_array_equal(image.get_array(), IMAGES[11])


def test_a_classifier_without_mistakes_is_told() -> None:
    display = MistakesDisplay.from_predictions(Y, Y, np.ones(12), IMAGES)
    assert display.images_ == []
    assert display.ax_.get_title() == "0 of 12 images wrong"
    display.figure_.canvas.draw()


def test_mistakes_say_what_is_wrong() -> None:
    with pytest.raises(TypeError, match=r"with predict_proba is expected.*RidgeClassifier.*CalibratedClassifierCV"):
        MistakesDisplay.from_estimator(RidgeClassifier(), IMAGES, Y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        MistakesDisplay.from_predictions(Y, Y[1:], np.ones(12), IMAGES)
    with pytest.raises(ValueError, match=r"'n_mistakes' parameter of MistakesDisplay\.from_predictions must be an int"):
        MistakesDisplay.from_predictions(Y, Y, np.ones(12), IMAGES, n_mistakes=0)
    with pytest.raises(ValueError, match="one probability per image"):
        MistakesDisplay.from_predictions(Y, Y, np.ones((12, 3)), IMAGES)
    with pytest.raises(ValueError, match="One label per image is expected"):
        MistakesDisplay.from_estimator(Told(np.ones((12, 2)), [0, 1]), IMAGES, np.ones((12, 2)))


# Real photos


@pytest.mark.realdata
def test_photos_find_themselves_and_their_pictures(ants_bees: Any) -> None:
    paths = list(ants_bees.data[:6])
    display = NeighborsDisplay.from_estimator(MICRO, paths[2], paths, 2)
    assert display.indices[0] == 2
    assert display.distances[0] < 1e-5
    np.testing.assert_array_equal(display.images_[0].get_array(), display.images_[1].get_array())
