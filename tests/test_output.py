"""Frames in and out: which settings ask for them, and what a stateless transformer makes of column names."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.pipeline import make_pipeline

from featx import FineTuneClassifier, PretrainedFeatureExtractor

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 16, 16, 3))
MAPS = PretrainedFeatureExtractor("featx_micro", layers=0, pooling="map", image_size=16)
ROWS = PretrainedFeatureExtractor("featx_micro", layers=0, image_shape=(4, 4), image_size=16)
FRAME = pd.DataFrame(RNG.random((4, 16)), columns=[f"pixel {i}" for i in range(16)])


# Maps and frames


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_maps_refused_in_frames_name_the_setting_that_asks_for_them(kind: str) -> None:
    with config_context(transform_output=kind):
        for method in (clone(MAPS).transform, clone(MAPS).fit_transform, make_pipeline(clone(MAPS)).fit_transform):
            with pytest.raises(ValueError, match=rf"set_config\(transform_output='{kind}'\).*pooling=\"map\""):
                method(IMAGES)
    own = clone(MAPS).set_output(transform=kind)
    with pytest.raises(ValueError, match=rf"set_output\(transform='{kind}'\).*pooling=\"map\""):
        own.transform(IMAGES)


def test_maps_refused_in_frames_come_as_advised() -> None:
    expected = MAPS.transform(IMAGES)
    with config_context(transform_output="pandas"):
        with pytest.raises(ValueError, match=r'Call set_output\(transform="default"\) for arrays, or use any other'):
            clone(MAPS).transform(IMAGES)
        np.testing.assert_array_equal(clone(MAPS).set_output(transform="default").transform(IMAGES), expected)
        assert isinstance(clone(MAPS).set_params(pooling="max").transform(IMAGES), pd.DataFrame)


def test_maps_are_refused_in_frames_before_an_image_is_decoded() -> None:
    with pytest.raises(ValueError, match="set_output"):
        clone(MAPS).set_output(transform="pandas").transform(["no such file.jpg"])


def test_dask_collections_name_the_setting_too() -> None:
    X = da.from_array(IMAGES, chunks=(2, 16, 16, 3))
    with pytest.raises(ValueError, match=r"set_output\(transform='pandas'\).*pooling=\"map\""):
        clone(MAPS).set_output(transform="pandas").transform(X)
    averages = clone(MAPS).set_params(pooling="avg")
    with config_context(transform_output="polars"):
        with pytest.raises(ValueError, match=r"set_config\(transform_output='polars'\)\. Call set_output\(transform="):
            averages.transform(X)
        frame = clone(averages).set_output(transform="pandas").transform(X)
    assert frame.compute().shape == averages.transform(IMAGES).shape


# Columns by name


@pytest.mark.parametrize("frame", [FRAME, pl.DataFrame(FRAME)], ids=["pandas", "polars"])
def test_frame_without_fit_is_transformed_in_silence(frame: pd.DataFrame | pl.DataFrame) -> None:
    expected = ROWS.transform(FRAME.to_numpy())
    np.testing.assert_array_equal(clone(ROWS).transform(frame), expected)
    np.testing.assert_array_equal(np.concatenate(list(clone(ROWS).iter_transform(frame))), expected)
    with config_context(transform_output="pandas"):
        np.testing.assert_array_equal(clone(ROWS).transform(frame), expected)


def test_columns_are_still_compared_with_those_of_fit() -> None:
    fitted = clone(ROWS).fit(FRAME)
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.transform(FRAME[FRAME.columns[::-1]])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        fitted.transform(FRAME.to_numpy())
    with pytest.raises(ValueError, match="15 features"):
        clone(ROWS).fit(FRAME.to_numpy()).transform(FRAME.to_numpy()[:, 1:])


def test_unfitted_rows_are_checked_as_fitted_ones() -> None:
    for wrong, words in (
        (FRAME.replace(FRAME.iloc[0, 0], np.nan), "Input X contains NaN"),
        (FRAME.iloc[:0], "0 sample"),
    ):
        with pytest.raises(ValueError, match=words):
            clone(ROWS).transform(wrong)


def test_loaded_classifier_knows_the_columns_it_was_fitted_on(tmp_path: Path) -> None:
    settings = {"image_shape": (4, 4), "image_size": 16, "freeze": "all", "epochs": 1}
    fitted = FineTuneClassifier("featx_micro", **settings).fit(FRAME, [0, 1, 0, 1])
    fitted.save(tmp_path / "model.safetensors")
    loaded = FineTuneClassifier.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded.feature_names_in_, fitted.feature_names_in_)
    np.testing.assert_array_equal(loaded.predict_proba(FRAME), fitted.predict_proba(FRAME))
    with pytest.raises(ValueError, match="feature names should match"):
        loaded.predict(FRAME[FRAME.columns[::-1]])
