"""Views at prediction: features of images and of their mirror images, averaged."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from releases import exports_graphs
from sklearn.datasets import load_digits

from featx import FeatureStore, FineTuneClassifier, FineTuneRegressor, PretrainedFeatureExtractor, distributed
from featx.activations.engine import TALLY
from featx.images.items import PathItem

DIGITS = load_digits()
X, Y, MORE = DIGITS.images[:30], DIGITS.target[:30] % 3, DIGITS.images[100:107]
COMMON = {"image_size": 16, "pixel_range": (0, 16), "random_state": 0}


def extractor(**parameters: Any) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor("featx_micro", **COMMON | parameters)


def flipped(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images[:, :, ::-1])


@pytest.mark.parametrize("engine", ["torch", pytest.param("onnx", marks=exports_graphs)])
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


def test_known_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for row, image in enumerate((MORE * 15).astype(np.uint8)):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
        paths.append(str(tmp_path / f"{row}.png"))
    monkeypatch.setattr("featx.store.index.TRUST_AFTER_S", 0)  # files that have just changed are read again otherwise
    both = extractor(views="flip", cache=tmp_path / "store", pixel_range="auto")
    expected = both.transform(paths)
    reads: list[str] = []
    read = PathItem._read
    monkeypatch.setattr(PathItem, "_read", lambda item: (reads.append(item.source), read(item))[1])
    np.testing.assert_array_equal(both.transform(paths), expected)
    assert not reads


def test_new_process_does_not_take_plain_features_for_both_views(tmp_path: Path) -> None:
    """The store remembers for later processes what a call found out; with views that is something else."""
    np.save(tmp_path / "images.npy", MORE)
    code = f"""
        import numpy
        from featx import PretrainedFeatureExtractor
        extractor = PretrainedFeatureExtractor("featx_micro", image_size=16, pixel_range=(0, 16))
        images = numpy.load({str(tmp_path / "images.npy")!r})
        rows = extractor.set_params(cache={str(tmp_path / "store")!r}, views=VIEWS).transform(images)
        numpy.save({str(tmp_path / "rows.npy")!r}, rows)
    """
    for views in (None, None, "flip", "flip", None):
        given = textwrap.dedent(code).replace("VIEWS", repr(views))
        subprocess.run([sys.executable, "-c", given], check=True)
        expected = extractor(views=views, random_state=None).transform(MORE)
        np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), expected, rtol=1e-5, atol=1e-6)


def test_shards_of_one_view_are_not_gone_on_with_in_two(tmp_path: Path) -> None:
    paths = []
    for row, image in enumerate((MORE * 15).astype(np.uint8)):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
        paths.append(str(tmp_path / f"{row}.png"))
    plain = PretrainedFeatureExtractor("featx_micro", image_size=16)
    distributed.extract(plain, paths, tmp_path / "plain", shard_size=4)
    with pytest.raises(ValueError, match="views: flip"):
        distributed.extract(plain.set_params(views="flip"), paths, tmp_path / "plain", shard_size=4)
    distributed.extract(plain, paths, tmp_path / "both", shard_size=4)
    rows = [
        row for shard in sorted((tmp_path / "both").glob("*.parquet")) for row in pd.read_parquet(shard)["features"]
    ]
    np.testing.assert_allclose(np.stack(rows), plain.transform(paths), rtol=1e-5, atol=1e-6)


def test_file_that_changes_between_its_views_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ((images * 15).astype(np.uint8) for images in (MORE, MORE[::-1]))
    paths = [str(tmp_path / f"{row}.png") for row in range(len(MORE))]
    for path, image in zip(paths, first, strict=True):
        Image.fromarray(image).save(path)
    read, seen = PathItem._read, set()

    def changing(item: PathItem) -> bytes:
        data = read(item)
        if item.source == paths[0] and item.source not in seen:
            seen.add(item.source)
            Image.fromarray(second[0]).save(item.source)
        return data

    monkeypatch.setattr(PathItem, "_read", changing)
    both = PretrainedFeatureExtractor("featx_micro", image_size=16, views="flip")
    distributed.extract(both, paths, tmp_path / "out", shard_size=10)
    (shard,) = (tmp_path / "out").glob("*.parquet")
    rows = np.stack(pd.read_parquet(shard)["features"])
    np.testing.assert_allclose(rows, both.transform(paths), rtol=1e-5, atol=1e-6)


def test_dask_array_is_seen_in_both_views() -> None:
    dask_array = pytest.importorskip("dask.array")
    both = extractor(views="flip")
    found = both.transform(dask_array.from_array(MORE, chunks=(3, 8, 8))).compute()
    np.testing.assert_allclose(found, both.transform(MORE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden", [(), (5,)])
@pytest.mark.parametrize("freeze", ["all", -1, 0])
def test_tuned_network_reads_the_mean_of_both_views(
    freeze: int | str, hidden: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = FineTuneClassifier("featx_micro", freeze=freeze, hidden_layer_sizes=hidden, epochs=1, **COMMON).fit(X, Y)
    features = [fitted.transform(images) for images in (MORE, flipped(MORE))]
    scores = [fitted.decision_function(images) for images in (MORE, flipped(MORE))]
    fitted.set_params(views="flip")
    np.testing.assert_allclose(fitted.transform(MORE), np.mean(features, axis=0), rtol=1e-4, atol=1e-5)
    found = fitted.decision_function(MORE)
    monkeypatch.setattr("featx.estimators.fitted._AT_ONCE", 3)
    np.testing.assert_allclose(fitted.decision_function(MORE), found, rtol=1e-5, atol=1e-6)
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


@pytest.mark.parametrize("on_disk", [False, True])
def test_mirrored_views_of_training_are_the_image_or_its_mirror_image(on_disk: bool, tmp_path: Path) -> None:
    images: Any = X
    how: dict[str, Any] = {**COMMON, "freeze": -1, "augment": "flip", "augment_views": 4, "epochs": 4}
    if on_disk:
        images, how["pixel_range"] = [], "auto"
        for i, image in enumerate((X * 15).astype(np.uint8)):
            images.append(str(tmp_path / f"{i}.png"))
            Image.fromarray(image).save(images[-1])
    alone = FineTuneClassifier("featx_micro", **how).fit(images, Y)
    kept = FineTuneClassifier("featx_micro", **how, cache=tmp_path / "store")
    before = TALLY.n_images
    kept.fit(images, Y)
    # Each is seen four times, most of them both ways, and once as it is, for the probe.
    assert len(X) < TALLY.n_images - before <= 2 * len(X)
    np.testing.assert_allclose(kept.predict_proba(images), alone.predict_proba(images), rtol=1e-3, atol=1e-5)
    before = TALLY.n_images
    for seed in (1, 2, 3):  # draws among what is known, but for the few that were seen one way only
        kept.set_params(random_state=seed).fit(images, Y)
    assert TALLY.n_images - before <= len(X) // 3


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
