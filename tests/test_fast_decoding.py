"""decode="fast": a large JPEG at a smaller scale, never below what is needed, and never mistaken for the whole."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from pictures import colours, encode, oriented
from PIL import Image
from sklearn.base import clone

from featx import FineTuneClassifier, PretrainedFeatureExtractor
from featx.images.decoding import UnreadableImage, decode

MANY = 10**8
LARGE = colours(400, 304)  # flat blocks of 8 x 8, so that a scale of 1/8 keeps every colour


def pixels_of(data: bytes, short_side: int | None = None) -> np.ndarray:
    return decode(data, max_pixels=MANY, short_side=short_side).permute(1, 2, 0).numpy()


def shrunk(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Means over cells of scale x scale."""
    height, width = (length // scale for length in pixels.shape[:2])
    cells = pixels[: height * scale, : width * scale].reshape(height, scale, width, scale, 3)
    return cells.mean(axis=(1, 3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("short_side", "scale"), [(152, 2), (76, 4), (40, 4), (38, 8), (1, 8)])
def test_the_picture_is_the_same_only_smaller(orientation: int, short_side: int, scale: int) -> None:
    data = oriented(LARGE, orientation, "JPEG", quality=95, subsampling=0)
    found = pixels_of(data, short_side)
    assert found.shape == (400 // scale, 304 // scale, 3)
    assert np.abs(found - shrunk(pixels_of(data), scale)).mean() < 2


@pytest.mark.parametrize("size", [(100, 100), (101, 333), (127, 64), (512, 40), (33, 1000)])
def test_the_short_side_is_never_below_what_is_needed(size: tuple[int, int]) -> None:
    data = encode(Image.new("RGB", size, "red"), "JPEG")
    for short_side in range(1, min(size) + 20):
        found = min(pixels_of(data, short_side).shape[:2])
        assert found >= min(short_side, min(size))
        if min(size) < 2 * short_side:
            np.testing.assert_array_equal(pixels_of(data, short_side), pixels_of(data))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_come_out_in_colour(mode: str) -> None:
    data = encode(Image.fromarray(LARGE).convert(mode), "JPEG", quality=95)
    assert np.abs(pixels_of(data, 76) - shrunk(pixels_of(data), 4)).mean() < 2


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_other_formats_are_read_in_full(file_format: str) -> None:
    data = encode(Image.fromarray(LARGE), file_format)
    np.testing.assert_array_equal(pixels_of(data, 10), pixels_of(data))


def test_limits_and_reasons_are_those_of_the_whole_picture() -> None:
    data = encode(LARGE, "JPEG")
    with pytest.raises(UnreadableImage, match="304 x 400 pixels, more than max_pixels=1000"):
        decode(data, max_pixels=1000, short_side=10)
    with pytest.raises(UnreadableImage, match="truncated JPEG"):
        decode(data[: len(data) // 2], max_pixels=MANY, short_side=10)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.jpg" for i in range(8)]
    for path in paths:
        noise = Image.fromarray(rng.integers(0, 256, (25, 19, 3), dtype=np.uint8))
        noise.resize((304, 400)).save(path)
    return [str(path) for path in paths]


FAST = PretrainedFeatureExtractor("featx_micro", decode="fast", layers=[0, 1])


def test_a_store_keeps_both_apart(photos: list[str], tmp_path: Path) -> None:
    exact, fast = clone(FAST).set_params(decode="exact").transform(photos), clone(FAST).transform(photos)
    assert not np.array_equal(exact, fast)
    assert np.linalg.norm(exact - fast) < 0.1 * np.linalg.norm(exact)
    cached = clone(FAST).set_params(cache=tmp_path / "store")
    for how, wanted in (("fast", fast), ("exact", exact), ("fast", fast)):
        np.testing.assert_array_equal(cached.set_params(decode=how).transform(photos), wanted)


def test_bytes_are_read_as_files_are(photos: list[str]) -> None:
    contents = [Path(path).read_bytes() for path in photos]
    np.testing.assert_array_equal(FAST.transform(contents), FAST.transform(photos))
    whole = [Image.open(io.BytesIO(content)) for content in contents]  # a PIL image is the user's, and stays as it is
    np.testing.assert_array_equal(FAST.transform(whole), clone(FAST).set_params(decode="exact").transform(photos))


def test_views_of_augmentation_are_made_of_whole_pictures_and_kept_as_such(photos: list[str], tmp_path: Path) -> None:
    common = {"layers": 1, "freeze": "all", "augment": "flip", "augment_views": 1, "epochs": 1, "random_state": 0}
    tuned = FineTuneClassifier("featx_micro", decode="exact", **common).fit(photos, [0, 1] * 4)
    fast = FineTuneClassifier("featx_micro", decode="fast", cache=tmp_path, **common).fit(photos, [0, 1] * 4)
    assert fast.history_ == tuned.history_
    expected = clone(FAST).set_params(layers=1).transform(photos)
    np.testing.assert_array_equal(clone(FAST).set_params(layers=1, cache=tmp_path).transform(photos), expected)
