"""Laws of files that are whole and of a kind that is not read: they are told from damaged ones; the advice works."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode, photo, tiff
from PIL import Image

from featx import PretrainedFeatureExtractor
from featx.exceptions import ImageError
from featx.images.sources import as_items

RGB = photo(24, 32)
FLOATS = np.random.default_rng(0).random((24, 32, 3)).astype(np.float32)
FOUR = np.dstack([RGB, RGB[..., :1]])


def changed(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


JPEG, BMP = encode(RGB, "JPEG"), encode(RGB, "BMP")
NOT_READ = {
    "float64": (tiff(FLOATS[..., :1].astype(np.float64)), "TIFF with 1 band of 64-bit floats"),
    "float16": (tiff(FLOATS[..., :1].astype(np.float16)), "TIFF with 1 band of 16-bit floats"),
    "float16-big-endian": (tiff(FLOATS[..., :1].astype(np.float16), order=">"), "TIFF with 1 band of 16-bit floats"),
    "three-floats": (tiff(FLOATS), "TIFF with 3 bands of 32-bit floats"),
    "three-floats-apart": (tiff(FLOATS, planar=True), "TIFF with 3 bands of 32-bit floats that lie apart"),
    "four-greys": (tiff(FOUR, photometric=1), "TIFF with 4 grey bands of 8-bit integers"),
    "four-greys-said": (tiff(FOUR, photometric=1, extra=(0, 0, 0)), "TIFF with 4 grey bands of 8-bit integers"),
    "two-greys": (tiff(FOUR[..., :2].astype("u2"), photometric=1), "TIFF with 2 grey bands of 16-bit integers"),
    "64-bit": (tiff(RGB[..., :1].astype(np.uint64)), "TIFF with 1 band of 64-bit integers"),
    "signed": (tiff(RGB.astype(np.int8)), "TIFF with 3 bands of 8-bit signed integers"),
    "lerc": (tiff(RGB, compression=34887), "TIFF with 3 bands of 8-bit integers, compressed by LERC"),
    "jpeg-2000-inside": (tiff(RGB, compression=33003), "TIFF with 3 bands of 8-bit integers, compressed by JPEG 2000"),
    "packed-somehow": (
        tiff(RGB, compression=7777),
        "TIFF with 3 bands of 8-bit integers, compressed in a way",
    ),
    "apart-with-nothing": (tiff(FOUR, extra=(0,), planar=True), "TIFF with 4 bands of 8-bit integers that lie apart"),
    "multiplied-apart": (tiff(FOUR, extra=(1,), planar=True), "TIFF with 4 bands of 8-bit integers that lie apart"),
    "jpeg-of-12-bits": (changed(JPEG, JPEG.index(b"\xff\xc0") + 4, 12), "JPEG of a kind that Pillow does not read"),
    "bmp-of-2-bits": (changed(BMP, 28, 2), "BMP of a kind that Pillow does not read"),
    "bmp-packed-somehow": (changed(BMP, 30, 9), "BMP of a kind that Pillow does not read"),
    "jpeg-xl": (b"\xff\x0a" + bytes(50), "JPEG XL, which Pillow does not read"),
    "openexr": (b"v/1\x01" + bytes(50), "OpenEXR, which Pillow does not read"),
    "dicom": (bytes(128) + b"DICM" + bytes(50), "DICOM, which Pillow does not read"),
    "pam": (b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 3\nMAXVAL 255\nENDHDR\n" + bytes(12), "PAM, which Pillow does not read"),
    "svg": (
        b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "SVG, a drawing, which",
    ),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_whole_file_that_is_not_read_says_what_it_is_and_what_to_do(name):
    data, reason = NOT_READ[name]
    with pytest.raises(ImageError) as caught:
        as_items([data]).load(0)
    assert caught.value.reason is not None
    assert caught.value.reason.startswith(reason)
    assert "damaged" not in str(caught.value)
    assert "Convert it to bands of 8 or 16 bits, or pass its pixels as an array" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html>\n<html></html>", "a web page, not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS, not an image"),
        (b"%PDF-1.7\n" + bytes(40), "a PDF, not an image"),
        (b"PK\x03\x04" + bytes(40), "an archive, not an image"),
    ],
)
def test_what_lies_in_the_place_of_an_image_is_named(data, reason):
    with pytest.raises(ImageError, match=f"{reason}. Remove it"):
        as_items([data]).load(0)


WHOLE = [tiff(FLOATS), tiff(FLOATS[..., :1].astype(np.float64)), tiff(RGB), tiff(RGB, compression=8)]


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data")
@pytest.mark.parametrize("data", WHOLE)
@pytest.mark.parametrize("stop", [9, 30, 100, -200])
def test_file_that_ends_early_is_damaged_whatever_kind_it_is_of(data, stop):
    with pytest.raises(ImageError) as caught:
        as_items([data[:stop]]).load(0)
    assert "truncated" in str(caught.value) or "which Pillow does not read" in str(caught.value)


@pytest.mark.parametrize("pixels", [FLOATS, FLOATS[..., 0].astype(np.float64), FLOATS[..., 0].astype(np.float16)])
def test_advice_to_pass_an_array_works(pixels):
    features = PretrainedFeatureExtractor("featx_micro", pixel_range=(0, 1))
    assert np.isfinite(features.transform([pixels])).all()


def test_advice_to_convert_works():
    features = PretrainedFeatureExtractor("featx_micro", pixel_range=(0, 65535))
    data = tiff(np.rint(FLOATS * 65535).astype(np.uint16))
    np.testing.assert_allclose(features.transform([data]), features.transform([FLOATS * 65535]), rtol=1e-3, atol=1e-4)


def test_damage_is_no_other_kind():
    assert str(as_error(JPEG[:-200])).startswith("X[0] is not a readable image: truncated JPEG")
    assert "which Pillow does not read" not in str(as_error(encode(RGB, "TIFF")[:200]))
    image = Image.open(io.BytesIO(encode(RGB, "GIF")))
    assert image.format == "GIF"


@given(
    start=st.sampled_from(
        [b"", b"II*\0", b"MM\0*", b"II+\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"P6", b"8BPS"]
    ),
    content=st.binary(max_size=40),
)
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_are_pixels_or_one_error_of_the_row(start, content):
    items = as_items([start + content])
    assert len(items.digest(0)) == 16
    with contextlib.suppress(ImageError):
        assert items.load(0).shape[0] == 3


def as_error(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        as_items([data]).load(0)
    return caught.value
