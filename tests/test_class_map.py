"""Maps for classes: what a linear model adds up at each place, and Grad-CAM of a tuned network."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from featx import FineTuneClassifier, PretrainedFeatureExtractor
from featx.exceptions import LayerError
from featx.plots import ClassMapDisplay

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (24, 40, 50, 3), dtype=np.uint8)
Y = np.array(["ant", "bee", "cat"] * 8)
TWO = np.array(["ant", "bee"] * 12)
NEAR = 1e-5


@pytest.fixture(autouse=True)
def _figures_are_closed() -> Any:
    yield
    plt.close("all")


def extractor(**params: Any) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor("featx_micro", **{"layers": -1, **params})


LINEAR: dict[str, list[Any]] = {
    "scaled": [StandardScaler(), LogisticRegression(C=0.1)],
    "bare": [LogisticRegression()],
    "ridge": [RidgeClassifier()],
    "components": [StandardScaler(), PCA(5), LinearSVC()],
}


@pytest.mark.parametrize("y", [Y, TWO], ids=["three classes", "two"])
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("layer", [-1, 1, "features.2"])
def test_mean_of_a_map_and_the_intercept_are_the_decision(name: str, y: np.ndarray, layer: Any) -> None:
    model = make_pipeline(extractor(layers=layer), *LINEAR[name]).fit(X, y)
    labels = np.unique(y).tolist()
    display = ClassMapDisplay.from_estimator(model, X[0], label=labels)
    decided = np.ravel(model.decision_function(X[:1]))
    wanted = np.array([-decided[0], decided[0]]) if len(labels) == 2 else decided
    assert display.intercepts is not None
    np.testing.assert_allclose(display.maps.mean((1, 2)) + display.intercepts, wanted, rtol=NEAR, atol=NEAR)
    np.testing.assert_allclose(display.scores, wanted, rtol=NEAR, atol=NEAR)
    assert display.labels == labels


def test_a_place_counts_by_the_weights_of_its_channels() -> None:
    model = make_pipeline(extractor(), StandardScaler(), LogisticRegression()).fit(X, Y)
    values = extractor(pooling="map").transform(X[:1])[0].astype(float)  # (height, width, channels)
    weights = model[-1].coef_[2] / model[1].scale_
    (found,) = ClassMapDisplay.from_estimator(model, X[0], label="cat").maps
    np.testing.assert_allclose(found, values @ weights, rtol=1e-4, atol=NEAR)


@pytest.mark.parametrize("backbone", ["resnet18", "timm/resnet18", "timm/mobilenetv2_035"])
def test_networks_whose_features_are_averages_behind_the_last_stage_have_exact_maps(backbone: str) -> None:
    features = PretrainedFeatureExtractor(backbone, weights=None, image_size=64)  # a vector behind a pool
    model = make_pipeline(features, StandardScaler(), LogisticRegression()).fit(X, Y)
    display = ClassMapDisplay.from_estimator(model, X[1], label="bee")
    assert display.maps.shape == (1, 2, 2)
    wanted = model.decision_function(X[1:2])[0, 1]
    np.testing.assert_allclose(display.maps[0].mean() + display.intercepts, [wanted], rtol=1e-4, atol=1e-4)


def test_without_a_label_the_predicted_class_is_shown() -> None:
    model = make_pipeline(extractor(), LogisticRegression()).fit(X, Y)
    for row in range(4):
        assert ClassMapDisplay.from_estimator(model, X[row]).labels == model.predict(X[row : row + 1]).tolist()
    search = GridSearchCV(model, {"logisticregression__C": [0.1, 1]}, cv=2).fit(X, Y)
    assert ClassMapDisplay.from_estimator(search, X[0]).labels == search.predict(X[:1]).tolist()
    named = make_pipeline(extractor(), StandardScaler(), LogisticRegression()).set_output(transform="pandas").fit(X, Y)
    assert ClassMapDisplay.from_estimator(named, X[0]).labels == named.predict(X[:1]).tolist()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"pooling": "max"}, "averages of one layer"),
        ({"pooling": ["avg", "max"]}, "averages of one layer"),
        ({"grid": 2}, "averages of one layer"),
        ({"normalize": "l2"}, "averages of one layer"),
        ({"layers": [1, 2]}, "averages of one layer"),
    ],
)
def test_features_that_are_no_averages_are_refused_with_what_to_set(params: dict[str, Any], words: str) -> None:
    model = make_pipeline(extractor(**params), LogisticRegression(max_iter=1000)).fit(X, Y)
    with pytest.raises(LayerError, match=words):
        ClassMapDisplay.from_estimator(model, X[0])
    plain: dict[str, Any] = {"layers": -1, "pooling": "avg", "grid": 1, "normalize": None}  # as it says
    model[0].set_params(**plain)
    ClassMapDisplay.from_estimator(model.fit(X, Y), X[0])


def test_models_that_are_not_linear_are_refused() -> None:
    for last in (RandomForestClassifier(5), SVC(kernel="rbf")):
        with pytest.raises(TypeError, match=r"expected by ClassMapDisplay.from_estimator"):
            ClassMapDisplay.from_estimator(make_pipeline(extractor(), last).fit(X, Y), X[0])
    with pytest.raises(TypeError, match="PretrainedFeatureExtractor"):
        ClassMapDisplay.from_estimator(LogisticRegression(), X[0])
    columns = ColumnTransformer([("photo", extractor(image_shape=(40, 50, 3), pixel_range=(0, 255)), slice(0, 6000))])
    flat = X.reshape(len(X), -1).astype(float)
    with pytest.raises(TypeError, match="A pipeline of a PretrainedFeatureExtractor"):
        ClassMapDisplay.from_estimator(make_pipeline(columns, LogisticRegression()).fit(flat, Y), flat[0])
    model = make_pipeline(extractor(), LogisticRegression()).fit(X, Y)
    for label in ("dog", [], ["ant", "dog"], 0):
        with pytest.raises(ValueError, match=r"labels \['ant', 'bee', 'cat'\] are expected"):
            ClassMapDisplay.from_estimator(model, X[0], label=label)


def tuned(backbone: Any = "featx_micro", **params: Any) -> FineTuneClassifier:
    given: dict[str, Any] = {"epochs": 2, "random_state": 0, "learning_rate": 1e-2, **params}
    return FineTuneClassifier(backbone, **given).fit(X, Y)


@pytest.mark.parametrize("freeze", ["all", -1, 0])
def test_of_a_linear_head_grad_cam_is_what_the_map_holds_for_the_class(freeze: Any) -> None:
    model = tuned(freeze=freeze, layers=-1)
    display = ClassMapDisplay.from_estimator(model, X[0], label=["bee", "ant"])
    values = model.to_extractor().set_params(layers=-1, pooling="map").transform(X[:1])[0]
    weights = model.tensors_["head.1.weight"].numpy()[[1, 0]]  # the head averages: the slope is the weight over places
    wanted = np.maximum(values @ weights.T / values[:, :, 0].size, 0)
    assert wanted.max() > 0
    np.testing.assert_allclose(display.maps, np.moveaxis(wanted, 2, 0), rtol=1e-3, atol=1e-4 * wanted.max())
    np.testing.assert_allclose(display.scores, model.decision_function(X[:1])[0, [1, 0]], rtol=1e-5)
    assert display.intercepts is None


def test_slopes_are_those_of_a_network_run_by_hand() -> None:
    model = tuned(freeze=-1, hidden_layer_sizes=(8,))
    module = model.to_extractor().backbone.eval()
    tile = torch.from_numpy(np.asarray(ready(model, X[0])))
    kept: list[torch.Tensor] = []
    handle = module.features.register_forward_hook(lambda _, __, output: kept.append(output))
    reader: list[torch.Tensor] = []
    head = module.head.register_forward_pre_hook(lambda _, given: reader.append(given[0]))
    with torch.enable_grad():
        module.requires_grad_(True)(tile)
        names = [name for name in model.tensors_ if name.startswith("head.") and "weight" in name]
        (first, second) = (model.tensors_[name] for name in names)
        biases = [model.tensors_[name.replace("weight", "bias")] for name in names]
        rows = reader[0].flatten(1)
        score = (torch.relu(rows @ first.T + biases[0]) @ second.T + biases[1])[0, 2]
        (slopes,) = torch.autograd.grad(score, kept[0])
    handle.remove(), head.remove()
    wanted = (slopes.mean((2, 3))[:, :, None, None] * kept[0]).sum(1).relu()[0].detach().numpy()
    (found,) = ClassMapDisplay.from_estimator(model, X[0], label="cat").maps
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(slopes.numpy()).max())


def ready(model: FineTuneClassifier, image: np.ndarray) -> Any:
    """The normalised tensor that the network sees."""
    from featx.plots.pictures import input_of

    return input_of(model, [image])[1]


def test_class_token_that_looks_at_no_last_place_is_asked_further_in_front() -> None:
    model = tuned("timm/vit_tiny_patch16_224", weights=None, image_size=32, freeze="all", linear_probe=False)
    display = ClassMapDisplay.from_estimator(model, X[0], label="ant")
    assert display.maps.shape == (1, 2, 2)


def test_model_and_torch_stay_as_they_were() -> None:
    model, linear = tuned(freeze=-1), make_pipeline(extractor(), LogisticRegression()).fit(X, Y)
    before = model.predict_proba(X), linear.decision_function(X)
    for given in (model, linear, make_pipeline("passthrough", model)):
        ClassMapDisplay.from_estimator(given, X[0])
    np.testing.assert_array_equal(model.predict_proba(X), before[0])
    np.testing.assert_array_equal(linear.decision_function(X), before[1])
    assert torch.is_grad_enabled()


def test_classes_stand_side_by_side_with_the_same_colours() -> None:
    model = make_pipeline(extractor(), LogisticRegression()).fit(X, Y)
    display = ClassMapDisplay.from_estimator(model, X[0], label=["cat", "ant", "bee"])
    assert [text.get_text().split(":")[0] for text in display.texts_] == ["cat", "ant", "bee"]
    assert [image.get_extent() for image in display.images_] == [over.get_extent() for over in display.overlays_]
    assert len({over.get_clim() for over in display.overlays_}) == 1
    left, right = display.ax_.get_xlim()
    assert all(left <= image.get_extent()[0] < image.get_extent()[1] <= right for image in display.images_)
    for over, values, intercept in zip(display.overlays_, display.maps, display.intercepts, strict=True):
        np.testing.assert_allclose(over.get_array(), values + intercept)
    again = display.plot(plt.subplots()[1])
    again.figure_.canvas.draw()
