"""Views at prediction: features of images and of their mirror images, averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from featx import FeatureStore, FineTuneClassifier, FineTuneRegressor, PretrainedFeatureExtractor
from featx.activations.engine import TALLY

DIGITS = load_digits()
X, Y, MORE = DIGITS.images[:30], DIGITS.target[:30] % 3, DIGITS.images[100:107]
COMMON = {"image_size": 16, "pixel_range": (0, 16), "random_state": 0}


def extractor(**parameters: Any) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor("featx_micro", **COMMON | parameters)


def flipped(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images[:, :, ::-1])


@pytest.mark.parametrize("engine", ["torch", "onnx"])
@pytest.mark.parametrize(
    "parameters",
    [{}, {"normalize": "l2", "layers": "all"}, {"pooling": "flatten", "layers": 1}, {"batch_size": 3}],
    ids=str,
)
def test_features_are_the_mean_of_an_image_and_its_mirror_image(parameters: dict[str, Any], engine: str) -> None:
    plain = extractor(engine=engine, **parameters)
    expected = (plain.transform(MORE) + plain.transform(flipped(MORE))) / 2
    both = plain.set_params(views="flip")
    np.testing.assert_allclose(both.transform(MORE), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both.transform(flipped(MORE)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([*both.iter_transform(MORE)]), expected, rtol=1e-5, atol=1e-6)


def test_each_view_is_a_row_of_its_own_in_the_store(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    both, plain = extractor(views="flip", cache=store), extractor(cache=store)
    before = TALLY.n_images
    expected = extractor(views="flip").transform(MORE)
    assert TALLY.n_images == before + 14
    before = TALLY.n_images
    plain.transform(MORE)
    assert TALLY.n_images == before + 7
    np.testing.assert_array_equal(both.transform(MORE), expected)
    assert TALLY.n_images == before + 14
    for _ in range(2):
        np.testing.assert_array_equal(both.transform(MORE), expected)
    plain.transform(MORE)
    assert TALLY.n_images == before + 14


def test_warm_computes_both_views_and_nothing_is_left_to_do(tmp_path: Path) -> None:
    both = extractor(views="flip", cache=tmp_path).warm(MORE, layers="all")
    before = TALLY.n_images
    both.set_params(layers="all").transform(MORE)
    assert TALLY.n_images == before


@pytest.mark.parametrize("hidden", [(), (5,)])
@pytest.mark.parametrize("freeze", ["all", -1, 0])
def test_tuned_network_reads_the_mean_of_both_views(freeze: int | str, hidden: tuple[int, ...]) -> None:
    fitted = FineTuneClassifier("featx_micro", freeze=freeze, hidden_layer_sizes=hidden, epochs=1, **COMMON).fit(X, Y)
    features = [fitted.transform(images) for images in (MORE, flipped(MORE))]
    scores = [fitted.decision_function(images) for images in (MORE, flipped(MORE))]
    fitted.set_params(views="flip")
    np.testing.assert_allclose(fitted.transform(MORE), np.mean(features, axis=0), rtol=1e-4, atol=1e-5)
    found = fitted.decision_function(MORE)
    np.testing.assert_allclose(found, fitted.decision_function(flipped(MORE)), rtol=1e-4, atol=1e-5)
    if not hidden:  # a linear head of the mean is the mean of the scores
        np.testing.assert_allclose(found, np.mean(scores, axis=0), rtol=1e-3, atol=1e-4)
    assert fitted.to_extractor().views == "flip"
    np.testing.assert_allclose(fitted.to_extractor().transform(MORE), fitted.transform(MORE), rtol=1e-4, atol=1e-4)


def test_views_change_nothing_that_is_fitted() -> None:
    fits = [
        FineTuneRegressor("featx_micro", freeze=-1, epochs=2, views=views, **COMMON).fit(X, Y)
        for views in (None, "flip")
    ]
    assert fits[0].history_ == fits[1].history_
    np.testing.assert_array_equal(fits[0].predict(MORE), fits[1].set_params(views=None).predict(MORE))


@pytest.mark.filterwarnings("error")
def test_unreadable_image_is_counted_once(tmp_path: Path) -> None:
    photos: list[Any] = [*(MORE * 15).astype(np.uint8)]
    photos[2] = None
    for cache in (None, tmp_path):
        both = extractor(views="flip", on_error="nan", pixel_range="auto", cache=cache)
        with pytest.warns(match="1 of 7 images") as told:
            rows = both.transform(photos)
        assert len(told) == 1
        assert np.flatnonzero(np.isnan(rows).any(1)).tolist() == [2]


def test_maps_have_places_and_are_refused() -> None:
    with pytest.raises(ValueError, match='pooling="map"'):
        extractor(views="flip", pooling="map").transform(MORE)
    with pytest.raises(ValueError, match="'flip'"):
        extractor(views="rotate").transform(MORE)
