"""A picture is the same in each of thirteen forms, and has the same features, but for what the form itself loses."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from conftest import relative_difference
from pictures import encode, photo, png_16_bit, rgb_of, tiff
from PIL import Image

from featx import PretrainedFeatureExtractor
from featx.images.sources import as_items

MICRO = PretrainedFeatureExtractor("featx_micro")
# Of at most 256 colours, and grey, for the forms that hold no more.
RGB = np.asarray(Image.fromarray(photo(96, 128)).quantize(256).convert("RGB"))
GREY = np.repeat(RGB[..., :1], 3, axis=2)


def of_16_bits(write: Callable[[np.ndarray], bytes], pixels: np.ndarray) -> bytes:
    return write(pixels.astype(np.uint16) * 257)


def of_floats(pixels: np.ndarray) -> bytes:
    return tiff(pixels[..., :1].astype(np.float32) / 255)


def as_gif(pixels: np.ndarray) -> bytes:
    colours, places = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    image = Image.fromarray(places.reshape(pixels.shape[:2]).astype(np.uint8)).convert("P")
    image.putpalette(colours.astype(np.uint8).tobytes())
    return encode(image, "GIF")


def as_heic(pixels: np.ndarray) -> bytes:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(pixels)).save(file, quality=90)
    return file.getvalue()


LOSSLESS: dict[str, tuple[Callable[[np.ndarray], bytes], np.ndarray]] = {
    "PNG 8": (partial(encode, file_format="PNG"), RGB),
    "PNG 16": (partial(of_16_bits, png_16_bit), RGB),
    "WebP": (partial(encode, file_format="WEBP", lossless=True), RGB),
    "GIF": (as_gif, RGB),
    "BMP": (partial(encode, file_format="BMP"), RGB),
    "TIFF 8": (partial(encode, file_format="TIFF"), RGB),
    "TIFF 16": (partial(of_16_bits, tiff), RGB),
    "TIFF float32": (of_floats, GREY),
    "JPEG 2000": (partial(encode, file_format="JPEG2000", irreversible=False), RGB),
    "PPM": (partial(encode, file_format="PPM"), RGB),
}
LOSSY: dict[str, Callable[[np.ndarray], bytes]] = {
    "JPEG": partial(encode, file_format="JPEG", quality=95),
    "AVIF": partial(encode, file_format="AVIF", quality=90),
    "HEIC": as_heic,
}


def pixels_of(data: bytes) -> np.ndarray:
    return as_items([data]).load(0).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_form_is_the_same_picture_with_the_same_features(form):
    write, pixels = LOSSLESS[form]
    data = write(pixels)
    np.testing.assert_array_equal(pixels_of(data), pixels)
    difference = np.abs(MICRO.transform([data]) - MICRO.transform([pixels])).max()
    print(f"{form}: largest difference of features {difference}")
    assert difference == 0


@pytest.mark.parametrize("form", ["PNG 16", "TIFF 16", "TIFF float32"])
def test_full_depth_of_a_lossless_form_has_the_same_features(form):
    write, pixels = LOSSLESS[form]
    white = 1 if "float" in form else 65535
    deep = PretrainedFeatureExtractor("featx_micro", pixel_range=(0, white))
    array = pixels * np.float32(white / 255)
    difference = relative_difference(deep.transform([write(pixels)]), deep.transform([array]))
    print(f"{form}: largest difference of features {difference:.2g} of their norm")
    assert difference < 1e-6


@pytest.mark.parametrize("form", LOSSY)
def test_lossy_form_loses_what_the_form_loses_and_no_more(form):
    data = LOSSY[form](RGB)
    np.testing.assert_array_equal(pixels_of(data), rgb_of(data))
    assert relative_difference(MICRO.transform([data]), MICRO.transform([rgb_of(data)])) == 0
    assert np.abs(pixels_of(data).astype(int) - RGB).mean() < 8
