"""Laws of pictures with more than 8 bits or a fourth band: which values are black and white, and who is told."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from click.testing import Result
from commands import runner
from conftest import relative_difference
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode, photo, png_16_bit, tiff
from PIL import Image
from sklearn.base import clone

from featx import FineTuneClassifier, PretrainedFeatureExtractor
from featx.activations.engine import TALLY
from featx.cli.commands import featx
from featx.cli.options import Limits, Reading
from featx.exceptions import ImageError
from featx.images.sources import as_items

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 24, 32
MICRO = PretrainedFeatureExtractor("featx_micro")


def pixels_of(data: object, **options: object) -> np.ndarray:
    """(height, width, 3), of whatever dtype comes out."""
    return as_items([data], **options).load(0).permute(1, 2, 0).numpy()  # type: ignore[arg-type]


def rgb(top: int = 65535, bands: int = 3, least: int = 0) -> np.ndarray:
    values = RNG.integers(least, top, (HEIGHT, WIDTH, bands), endpoint=True).astype(np.uint16)
    values[0, 0], values[-1, -1] = least, top
    return values


def grey_png(values: np.ndarray) -> bytes:
    return encode(values[..., 0], "PNG")


# How three bands of 16 bits can be written, and one.
COLOURS = {
    "png": png_16_bit,
    "tiff": tiff,
    "tiff-big-endian": lambda values: tiff(values, order=">"),
    "tiff-deflate": lambda values: tiff(values, compression=8),
    "tiff-apart": lambda values: tiff(values, planar=True),
    "tiff-apart-big-endian": lambda values: tiff(values, order=">", planar=True),
    "tiff-and-nothing": lambda values: tiff(np.dstack([values, values[..., :1]]), extra=(0,)),
    "ppm": lambda values: f"P6 # a comment\n{WIDTH} {HEIGHT}\n65535\n".encode() + values.astype(">u2").tobytes(),
    "ppm-plain": lambda values: f"P3 {WIDTH} {HEIGHT} 65535 {' '.join(map(str, values.ravel()))}\n".encode(),
    "png-opaque": lambda values: png_16_bit(np.dstack([values, np.full_like(values[..., :1], 65535)])),
}
GREYS = {
    "png": grey_png,
    "tiff": lambda values: tiff(values[..., :1]),
    "tiff-big-endian": lambda values: tiff(values[..., :1], order=">"),
    "tiff-32-bit": lambda values: tiff(values[..., :1].astype(np.int32)),
    "pgm": lambda values: f"P5 {WIDTH} {HEIGHT} 65535\n".encode() + values[..., 0].astype(">u2").tobytes(),
    "png-with-alpha": lambda values: png_16_bit(np.dstack([values[..., :1], np.full_like(values[..., :1], 65535)])),
    "pil-16": lambda values: Image.fromarray(values[..., 0]),
    "pil-32": lambda values: Image.fromarray(values[..., 0].astype(np.int32)),
    "pil-float": lambda values: Image.fromarray(values[..., 0].astype(np.float32)),
}


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("limits", [(0, 4095), (51200, 52200), (-5.5, 70000)])
def test_pixel_range_holds_for_colours_of_16_bits_as_for_arrays(name, limits):
    values = rgb()
    found = pixels_of(COLOURS[name](values), pixel_range=limits)
    np.testing.assert_allclose(found, pixels_of(values, pixel_range=limits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", GREYS)
@pytest.mark.parametrize("limits", [(0, 4095), (51200, 52200)])
def test_pixel_range_holds_for_greys_of_more_than_8_bits_as_for_arrays(name, limits):
    values = rgb()[..., :1]
    found = pixels_of(GREYS[name](values), pixel_range=limits)
    np.testing.assert_allclose(found, pixels_of(values, pixel_range=limits), rtol=1e-6, atol=1e-6)


@given(low=st.floats(-1e4, 1e4), width=st.floats(1e-3, 1e5))
def test_pixel_range_is_an_affine_map_of_floats_in_files(low, width):
    values = np.random.default_rng(0).normal(low, width, (5, 4, 1)).astype(np.float32)
    found = pixels_of(tiff(values), pixel_range=(low, low + width))
    expected = (values.astype(np.float64) - low) / width
    np.testing.assert_allclose(found[..., :1], expected, atol=1e-5 * np.abs(expected).max() + 2e-2 / width)


@pytest.mark.parametrize("name", ["png", "tiff-apart", "tiff-and-nothing"])
def test_file_of_16_bits_is_scaled_by_65535_under_auto(name):
    values = rgb()
    np.testing.assert_array_equal(pixels_of(COLOURS[name](values)), np.rint(values / 257))


@pytest.mark.parametrize("data", [encode(photo(), "PNG"), encode(photo(), "JPEG"), Image.fromarray(photo())])
def test_pixel_range_leaves_files_of_8_bits_alone(data):
    np.testing.assert_array_equal(pixels_of(data, pixel_range=(0, 4095)), pixels_of(data))


def test_pixel_range_keeps_transparency_what_it_is():
    values = rgb(4095)
    alpha = np.full_like(values[..., :1], 65535 // 5)
    found = pixels_of(png_16_bit(np.dstack([values, alpha])), pixel_range=(0, 4095))
    np.testing.assert_allclose(found, values / 4095 * 0.2 + 0.8, atol=1e-6)


def test_colours_that_alpha_is_multiplied_into_are_laid_over_white_once():
    values, alpha = rgb(), np.full((HEIGHT, WIDTH, 1), 65535 // 5, dtype=np.uint16)
    multiplied = np.rint(values * 0.2).astype(np.uint16)
    found = pixels_of(tiff(np.dstack([multiplied, alpha]), extra=(1,)))
    np.testing.assert_allclose(found, (values * 0.2 + 65535 * 0.8) / 257, atol=1.01)


def test_fourth_band_darker_than_the_colours_makes_them_white():
    colours = np.broadcast_to(np.uint16([51400, 25700, 60000]), (HEIGHT, WIDTH, 3))
    near_infrared = np.full((HEIGHT, WIDTH, 1), 25700, dtype=np.uint16)
    data = tiff(np.dstack([colours, near_infrared]), extra=(1,))  # as if colours were multiplied by it
    assert (pixels_of(data) == 255).all()
    assert (pixels_of(data, full_depth=True) >= 1).all()


# Pillow does not read those of big-endian integers.
@pytest.mark.parametrize(("kind", "order"), [(np.uint16, "<"), (np.float32, "<"), (np.float32, ">")])
def test_tiff_whose_low_values_are_white_is_no_negative(kind, order):
    values = (rgb()[..., :1] / (1 if kind == np.uint16 else 65535)).astype(kind)
    white = 65535 if kind == np.uint16 else 1
    data = tiff(values, photometric=0, order=order)
    np.testing.assert_allclose(pixels_of(data), 255 - np.rint(np.repeat(values, 3, axis=2) / white * 255), atol=1)
    found = pixels_of(data, pixel_range=(0, white / 2))
    np.testing.assert_allclose(found[..., :1], 1 - values / (white / 2), atol=1e-6)


def test_ppm_of_12_bits_has_its_own_white():
    values = rgb(4095)
    data = f"P6 {WIDTH} {HEIGHT} 4095\n".encode() + values.astype(">u2").tobytes()
    np.testing.assert_allclose(pixels_of(data), values / 4095 * 255, atol=0.51)
    np.testing.assert_allclose(pixels_of(data, full_depth=True), values / 4095, atol=1e-5)


def jpeg_2000_of_12_bits(values: np.ndarray) -> bytes:
    """Coded is by how much values differ from the middle, in any number of bits."""
    data = encode(values[..., 0] - np.uint16(2**11) + np.uint16(2**15), "JPEG2000", irreversible=False)
    at = data.index(b"\xff\x4f\xff\x51") + 42
    return data[:at] + bytes([11]) + data[at + 1 :]


OF_12_BITS = {
    "pgm": lambda values: f"P5 {WIDTH} {HEIGHT} 4095\n".encode() + values[..., 0].astype(">u2").tobytes(),
    "pgm-plain": lambda values: f"P2 {WIDTH} {HEIGHT} 4095 {' '.join(map(str, values[..., 0].ravel()))}\n".encode(),
    "ppm": lambda values: f"P6 {WIDTH} {HEIGHT} 4095\n".encode() + values.astype(">u2").tobytes(),
    "ppm-plain": lambda values: f"P3 {WIDTH} {HEIGHT} 4095 {' '.join(map(str, values.ravel()))}\n".encode(),
    "jpeg-2000": jpeg_2000_of_12_bits,
}


@pytest.mark.parametrize("name", OF_12_BITS)
@pytest.mark.parametrize("limits", [(0, 4095), (100, 400)])
def test_pixel_range_is_one_of_the_values_in_a_file_that_has_its_own_white(name, limits):
    values = rgb(4095) if "ppm" in name else np.repeat(rgb(4095, bands=1), 3, axis=2)
    found = pixels_of(OF_12_BITS[name](values), pixel_range=limits)
    np.testing.assert_allclose(found, pixels_of(values, pixel_range=limits), atol=1e-6)


@pytest.mark.parametrize("name", OF_12_BITS)
def test_advice_for_a_file_that_has_its_own_white_is_of_its_values(name):
    values = rgb(400) if "ppm" in name else np.repeat(rgb(400, bands=1), 3, axis=2)
    (message,) = told(lambda: MICRO.transform([OF_12_BITS[name](values)]))
    assert "less than an eighth of 0 to 4095 (values from 0 to 400)" in message
    assert "such as pixel_range=(0, 511)." in message


def test_transparent_grey_of_16_bits_is_white_in_every_range():
    values = rgb()[..., 0]
    data = encode(values, "PNG", transparency=int(values[3, 3]))
    assert (pixels_of(data)[3, 3] == 255).all()
    assert (pixels_of(data, pixel_range=(0, 4095))[3, 3] == 1).all()


@pytest.mark.parametrize("options", [{"pixel_range": (0, 1)}, {}, {"full_depth": True}])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_of_files_may_not_be_nan(options, value):
    values = np.full((3, 3, 1), 0.5, dtype=np.float32)
    values[1, 1] = value
    for data in (tiff(values), values[..., 0]):
        with pytest.raises(ImageError, match="NaN or infinite pixels") as caught:
            pixels_of(data, **options)
        assert "Set pixel_range" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "way_out"),
    [
        (tiff(np.full((4, 4, 1), 3, dtype=np.float32)), {"pixel_range": (0, 3)}),
        (tiff(np.full((4, 4, 1), 70000, dtype=np.int32)), {"pixel_range": (0, 70000)}),
        (tiff(np.full((4, 4, 1), -3, dtype=np.int16)), {"pixel_range": (-6, -3)}),
        (np.full((4, 4), 3.0), {"pixel_range": (0, 3)}),
        (np.full((4, 4), 3, dtype=np.int64), {"pixel_range": (0, 3)}),
    ],
    ids=["float-file", "32-bit-file", "signed-file", "floats", "integers"],
)
def test_values_outside_their_range_are_read_once_the_advice_is_followed(data, way_out):
    with pytest.raises(ImageError, match=r"Set pixel_range=\(low, high\)") as caught:
        pixels_of(data)
    assert "on_error" not in str(caught.value)
    assert (pixels_of(data, **way_out) == 1).all()


# Bands that Pillow keeps 8 bits of, whatever it is asked for.


def sgi(values: np.ndarray) -> bytes:
    height, width, bands = values.shape
    header = struct.pack(">HBBHHHH", 474, 0, 2, 3, width, height, bands).ljust(512, b"\0")
    return header + values[::-1].transpose(2, 0, 1).astype(">u2").tobytes()


def jpeg_2000(bits: int) -> bytes:
    """Its header alone is that of a picture of so many bits."""
    data = encode(photo(), "JPEG2000", irreversible=False)
    at = data.index(b"\xff\x4f\xff\x51") + 42
    return data[:at] + bytes([bits - 1]) + data[at + 1 :]


IN_8_BITS = {
    "tiff-apart-deflate": tiff(rgb(), compression=8, planar=True),
    "tiff-cmyk": tiff(rgb(bands=4), photometric=5),
    "sgi": sgi(rgb()),
}


@pytest.mark.parametrize("name", IN_8_BITS)
def test_file_whose_low_bytes_cannot_be_had_is_read_without_them_where_that_is_no_mistake(name):
    assert pixels_of(IN_8_BITS[name]).dtype == np.uint8
    np.testing.assert_array_equal(pixels_of(IN_8_BITS[name], full_depth=True), pixels_of(IN_8_BITS[name]))


@pytest.mark.parametrize("data", [*IN_8_BITS.values(), jpeg_2000(12)], ids=[*IN_8_BITS, "jpeg-2000"])
def test_file_whose_low_bytes_cannot_be_had_is_no_picture_in_another_range(data):
    with pytest.raises(ImageError, match=r"of more than 8 bits, of which Pillow reads 8\. Convert it"):
        pixels_of(data, pixel_range=(0, 4095))
    assert digests([data], pixel_range=(0, 4095)) != digests([data])


def test_jpeg_2000_of_8_bits_has_all_of_them():
    np.testing.assert_array_equal(pixels_of(jpeg_2000(8), pixel_range=(0, 4095)), photo())


# The warning.


def told(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "more than 8 bits" in str(warning.message)]


def dark_files(folder: Path, n: int = 4, top: int = 4095) -> list[str]:
    paths = [folder / f"{i}.png" for i in range(n)]
    for path in paths:
        path.write_bytes(png_16_bit(rgb(top)))
    return [*map(str, paths)]


@pytest.mark.parametrize(
    ("make", "values", "advice"),
    [
        (lambda: png_16_bit(rgb(4095)), "0 to 4095", "(0, 4095)"),
        (lambda: tiff(rgb(1023)[..., :1]), "0 to 1023", "(0, 1023)"),
        (lambda: grey_png(rgb(52200, 1, 51200)), "51200 to 52200", "(51200, 52200)"),
        (lambda: tiff((rgb(1000)[..., :1] / 10000).astype(np.float32)), "0 to 0.1", "(0, 0.1)"),
    ],
    ids=["12-bit", "10-bit", "window", "floats"],
)
def test_files_that_use_little_of_their_range_are_told_once_a_call(make, values, advice):
    X = [make(), make(), encode(photo(), "JPEG")]
    (message,) = told(lambda: MICRO.transform(X))
    assert values in message
    assert f"pixel_range={advice}" in message
    assert (
        told(lambda: clone(MICRO).set_params(pixel_range=tuple(map(float, advice[1:-1].split(",")))).transform(X)) == []
    )


@pytest.mark.parametrize("value", [0, 1, 700, 1023])
@pytest.mark.parametrize(
    "write", [grey_png, lambda values: tiff(values), lambda values: tiff((values / 65535).astype(np.float32))]
)
def test_range_that_is_advised_of_pictures_of_one_value_is_one(value, write):
    data = write(np.full((HEIGHT, WIDTH, 1), value, dtype=np.uint16))
    (message,) = told(lambda: MICRO.transform([data]))
    for low, high in re.findall(r"pixel_range=[(](.*), (.*)[)][.]", message):
        assert np.isfinite(clone(MICRO).set_params(pixel_range=(float(low), float(high))).transform([data])).all()


@pytest.mark.parametrize("top", [8192, 65535])
def test_files_that_use_an_eighth_of_their_range_are_not_told(top):
    assert told(lambda: MICRO.transform([png_16_bit(rgb(top))])) == []


def test_dark_files_are_told_whatever_lies_beside_them():
    X = [png_16_bit(rgb(4095)), png_16_bit(rgb()), encode(photo(), "JPEG")]
    (message,) = told(lambda: MICRO.transform(X))
    assert message.startswith("1 of 2 images with more than 8 bits uses less")
    assert "such as pixel_range=(0, 4095)." in message


@pytest.mark.parametrize("error", ["raise", "nan"])
def test_dark_files_count_once_however_often_they_are_decoded(error, tmp_path):
    model = FineTuneClassifier("featx_micro", freeze=0, epochs=2, on_error=error, random_state=0)
    (message,) = told(lambda: model.fit(dark_files(tmp_path, 3), [0, 1, 0]))
    assert message.startswith("3 of 3 images")


# Values beyond a range that is given.


def beyond(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "beyond pixel_range" in str(warning.message)]


@pytest.mark.parametrize(
    "make",
    [png_16_bit, tiff, lambda values: values, lambda values: values.astype(np.float64), Image.fromarray],
    ids=["png", "tiff", "array", "floats", "pil"],
)
def test_values_beyond_a_range_that_is_given_are_told_once_a_call_with_their_number(make):
    X = [make(rgb(top)[..., 0] if make is Image.fromarray else rgb(top)) for top in (1023, 4095, 4095)]
    narrow = clone(MICRO).set_params(pixel_range=(0, 1023), batch_size=1)
    (message,) = beyond(lambda: narrow.transform(X))
    assert message.startswith("2 images have values from 0 to 4095, beyond pixel_range=(0, 1023)")
    assert "such as pixel_range=(0, 4095), or clip them." in message
    assert beyond(lambda: clone(narrow).set_params(pixel_range=(0, 4095)).transform(X)) == []
    assert beyond(lambda: narrow.transform([encode(photo(), "PNG")])) == []


def test_values_that_rounding_puts_beyond_a_range_are_not_told():
    values = np.linspace(-0.005, 1.005, 3 * HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 3)
    assert beyond(lambda: clone(MICRO).set_params(pixel_range=(0, 1)).transform([values])) == []


def test_rows_of_numbers_may_lie_beyond_a_range():
    """scikit-learn's own checks draw them."""
    rows = clone(MICRO).set_params(pixel_range=(0, 1), image_shape=(8, 8))
    assert beyond(lambda: rows.transform(np.full((2, 64), 7.0))) == []


def test_shards_tell_of_values_beyond_a_range_once_with_their_number(tmp_path):
    (tmp_path / "photos").mkdir()
    dark_files(tmp_path / "photos", 6)
    narrow = clone(MICRO).set_params(pixel_range=(0, 1023))
    from featx.distributed import extract

    (message,) = beyond(lambda: extract(narrow, tmp_path / "photos", tmp_path / "out", shard_size=2))
    assert message.startswith("6 images have")


@pytest.mark.parametrize("cached", [False, True])
def test_every_call_that_decodes_tells_of_dark_files_once(cached, tmp_path):
    paths = dark_files(tmp_path)
    features = clone(MICRO).set_params(cache=str(tmp_path / "store") if cached else None, batch_size=2)
    assert len(told(lambda: features.transform(paths))) == 1
    assert len(told(lambda: features.transform(paths))) == (0 if cached else 1)
    assert len(told(lambda: list(clone(MICRO).iter_transform(paths)))) == 1


@pytest.mark.parametrize("freeze", [0, "all"])
def test_fine_tuning_tells_of_dark_files_once_a_call(freeze, tmp_path):
    paths = dark_files(tmp_path)
    model = FineTuneClassifier("featx_micro", freeze=freeze, epochs=2, early_stopping=True, validation_fraction=0.5)
    assert len(told(lambda: model.fit(paths, [0, 1, 0, 1]))) == 1
    assert len(told(lambda: model.predict(paths))) == 1


def test_shards_tell_of_dark_files_once(tmp_path):
    from featx.distributed import extract

    paths = dark_files(tmp_path)
    assert len(told(lambda: extract(MICRO, paths, tmp_path / "out", shard_size=2))) == 1


def test_shards_of_another_range_are_not_gone_on_with(tmp_path):
    from featx.distributed import extract

    paths = dark_files(tmp_path)
    extract(clone(MICRO).set_params(pixel_range=(0, 4095)), paths, tmp_path / "out", shard_size=2)
    with pytest.raises(ValueError, match="Shards of one recipe"):
        extract(clone(MICRO).set_params(pixel_range=(0, 1023)), paths, tmp_path / "out", shard_size=2)


def test_shards_of_another_decoder_of_heic_are_not_gone_on_with(tmp_path, monkeypatch):
    from featx.distributed import extract
    from featx.images import heif, reading

    name = heif.heif_version().split(",")[0]  # before it is another
    paths = dark_files(tmp_path, 2, 65535)
    for before in (None, "pillow-heif 0.1, libheif 1.0"):
        out = tmp_path / f"out {before}"
        with monkeypatch.context() as patch:
            patch.setattr(reading.heif, "heif_version", lambda before=before: before)
            extract(MICRO, paths, out)
        with pytest.raises(ValueError, match=rf"(?s)Shards of one recipe .*asked: .*{name}"):
            extract(MICRO, paths, out)


# Callables.


def test_callable_gets_the_full_depth_of_files():
    seen = []

    def preprocess(image):
        seen.append(image)
        return torch.zeros(3, 32, 32)

    values = rgb()
    X = [encode(photo(), "PNG"), png_16_bit(values), tiff(values[..., :1])]
    clone(MICRO).set_params(preprocess=preprocess, n_jobs=1).transform(X)
    for found, bands in zip(seen[-2:], [values, values[..., :1]], strict=True):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(
            found.permute(1, 2, 0), np.broadcast_to(bands / 65535, (HEIGHT, WIDTH, 3)), atol=1e-7
        )
    assert isinstance(seen[0], Image.Image)


# A fourth band.

FOUR = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
FOUR_BANDS = {
    "tiff": tiff(FOUR, extra=(2,)),
    "tiff-multiplied": tiff(FOUR, extra=(1,)),
    "tiff-unsaid": tiff(FOUR),
    "tiff-deflate": tiff(FOUR, extra=(2,), compression=8),
    "tiff-apart": tiff(FOUR, extra=(2,), planar=True),
    "png": encode(FOUR, "PNG"),
    "webp": encode(FOUR, "WEBP", lossless=True, exact=True),
    "pil": Image.fromarray(FOUR),
    "array": FOUR,
    "tensor": torch.from_numpy(FOUR).permute(2, 0, 1),
}


@pytest.mark.parametrize("name", FOUR_BANDS)
def test_fourth_band_that_is_ignored_leaves_the_colours_as_they_are(name):
    np.testing.assert_array_equal(pixels_of(FOUR_BANDS[name], fourth_band="ignore"), FOUR[..., :3])


@pytest.mark.parametrize("name", [name for name in FOUR_BANDS if name != "tiff-multiplied"])
def test_fourth_band_is_transparency_otherwise(name):
    alpha = FOUR[..., 3:] / 255
    np.testing.assert_allclose(pixels_of(FOUR_BANDS[name]), FOUR[..., :3] * alpha + 255 * (1 - alpha), atol=1)


@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
def test_fourth_band_of_16_bits_is_ignored_in_every_range(extra, order):
    values = rgb(bands=4)
    data = tiff(values, extra=(extra,), order=order)
    np.testing.assert_array_equal(pixels_of(data, fourth_band="ignore"), np.rint(values[..., :3] / 257))
    found = pixels_of(data, fourth_band="ignore", pixel_range=(0, 1000))
    np.testing.assert_allclose(found, values[..., :3] / 1000, rtol=1e-6)


def test_fourth_band_reaches_both_estimators():
    X = [FOUR_BANDS["tiff"], FOUR_BANDS["png"]]
    plain = [FOUR[..., :3]] * 2
    ignoring = clone(MICRO).set_params(fourth_band="ignore")
    np.testing.assert_allclose(ignoring.transform(X), MICRO.transform(plain), rtol=1e-5)
    model = FineTuneClassifier("featx_micro", fourth_band="ignore", freeze="all", epochs=1, random_state=0).fit(
        X, [0, 1]
    )
    np.testing.assert_allclose(model.transform(X), model.transform(plain), rtol=1e-5)
    with pytest.raises(ValueError, match="fourth_band"):
        clone(MICRO).set_params(fourth_band="near infrared").transform(X)


# Digests: what changes the reading of some files enters theirs, and nobody else's.

PLAIN = [encode(photo(), "JPEG"), encode(photo(), "PNG"), encode(photo(), "GIF"), encode(photo(), "TIFF")]
DEEP = {name: write(rgb()) for name, write in COLOURS.items()} | {name: write(rgb()) for name, write in GREYS.items()}


def digests(elements, **options) -> list[bytes]:
    items = as_items(elements, **options)
    return [items.digest(row) for row in range(len(items))]


@pytest.mark.parametrize("options", [{"pixel_range": (0, 4095)}, {"full_depth": True}, {"fourth_band": "ignore"}])
def test_digest_of_ordinary_files_does_not_depend_on_the_reading(options):
    assert digests(PLAIN, **options) == digests(PLAIN)


def test_usual_reading_leaves_digests_those_of_the_bytes():
    files = [*PLAIN, png_16_bit(rgb()), tiff(rgb()), FOUR_BANDS["png"], FOUR_BANDS["tiff"]]
    assert digests(files) == [xxhash.xxh3_128_digest(b"file\n" + data) for data in files]  # as rows are kept under


@pytest.mark.parametrize("name", DEEP)
def test_digest_of_deep_files_depends_on_the_range(name):
    element = [DEEP[name]]
    readings = [{}, {"pixel_range": (0, 4095)}, {"pixel_range": (0, 1023)}, {"full_depth": True}]
    assert len({digest for options in readings for digest in digests(element, **options)}) == 4
    assert digests(element, pixel_range=(0, 4095)) == digests(element, pixel_range=[0.0, 4095.0])
    assert digests(element, pixel_range=(0, 4095)) == digests(element, pixel_range=(0, 4095), full_depth=True)


@pytest.mark.parametrize("name", FOUR_BANDS)
def test_digest_of_four_bands_depends_on_what_the_fourth_is(name):
    assert digests([FOUR_BANDS[name]]) != digests([FOUR_BANDS[name]], fourth_band="ignore")


def test_digest_of_heif_tells_the_decoder_and_no_other_digest_does(monkeypatch):
    from featx.images import reading

    heif = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    before = digests([heif, *PLAIN, *DEEP.values()])
    monkeypatch.setattr(reading.heif, "heif_version", lambda: "another")
    after = digests([heif, *PLAIN, *DEEP.values()])
    assert [a == b for a, b in zip(after, before, strict=True)] == [False] + [True] * (len(before) - 1)


def computed(features: PretrainedFeatureExtractor, paths: list[str]) -> tuple[np.ndarray, int]:
    """Rows, and how many images went through the network for them."""
    before = TALLY.n_images
    rows = features.transform(paths)
    return rows, TALLY.n_images - before


@pytest.mark.parametrize(
    "data", [DEEP["pgm"], DEEP["ppm"], FOUR_BANDS["webp"], DEEP["tiff"]], ids=["pgm", "ppm", "webp", "tiff"]
)
@pytest.mark.filterwarnings("ignore:.*beyond pixel_range")
def test_file_that_could_not_be_opened_once_is_read_as_asked_later(data, tmp_path, monkeypatch):
    monkeypatch.setattr("featx.store.index.TRUST_AFTER_S", 0.0)  # of files that were just written
    (tmp_path / "file").write_bytes(data)
    X = [str(tmp_path / "file")]
    kept = clone(MICRO).set_params(cache=str(tmp_path / "store"), on_error="nan")

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("featx.images.opening.open_image", fail)
        patch.setattr("featx.images.decoding.open_image", lambda *_: 1 / 0)
        assert np.isnan(kept.transform(X)).all()
    for options in ({}, {"pixel_range": (0, 4095)}, {"fourth_band": "ignore"}):
        rows = clone(kept).set_params(**options).transform(X)
        assert relative_difference(rows, clone(MICRO).set_params(**options).transform(X)) < 1e-5
    assert computed(kept, X)[1] == 0


def test_two_ranges_share_the_rows_of_ordinary_files_in_a_store(tmp_path):
    paths = dark_files(tmp_path, 2)
    for i, data in enumerate(PLAIN):
        (tmp_path / f"plain{i}").write_bytes(data)
        paths.append(str(tmp_path / f"plain{i}"))
    first, second = (
        clone(MICRO).set_params(cache=str(tmp_path / "store"), pixel_range=limits) for limits in [(0, 4095), (0, 8191)]
    )
    assert computed(first, paths)[1] == len(paths)
    rows, n = computed(second, paths)
    assert n == 2
    plain = clone(second).set_params(cache=None).transform(paths)
    assert relative_difference(rows, plain) < 1e-5
    assert computed(first, paths)[1] == computed(second, paths)[1] == 0


KNOWN = """
import sys
from featx import PretrainedFeatureExtractor
paths = sys.argv[2:]
for limits in [(0, 4095), (0, 8191)]:
    rows = PretrainedFeatureExtractor("featx_micro", cache=sys.argv[1], pixel_range=limits).transform(paths)
    print(float(rows.sum()))
print({"torch", "torchvision", "PIL"} & set(sys.modules))
"""


def test_known_deep_files_need_neither_torch_nor_pillow_in_any_range(tmp_path, monkeypatch):
    paths = dark_files(tmp_path, 3)
    (tmp_path / "x.tif").write_bytes(tiff(rgb(4095)))
    paths.append(str(tmp_path / "x.tif"))
    monkeypatch.setattr("featx.store.index.TRUST_AFTER_S", 0.0)  # of files that were just written
    sums = []
    for limits in [(0, 4095), (0, 8191)]:
        cached = clone(MICRO).set_params(cache=str(tmp_path / "store"), pixel_range=limits)
        for _ in range(2):
            rows = cached.transform(paths)
        sums.append(float(rows.sum()))
    done = subprocess.run(
        [sys.executable, "-c", KNOWN, str(tmp_path / "store"), *paths], capture_output=True, text=True, check=True
    )
    *found, loaded = done.stdout.split("\n")[:3]
    assert [*map(float, found)] == sums
    assert sums[0] != sums[1]
    assert loaded == "set()"


def test_lazily_opened_pil_image_keeps_one_digest(tmp_path):
    data = png_16_bit(rgb())
    image = Image.open(io.BytesIO(data))
    before = digests([image], pixel_range=(0, 4095))
    image.load()
    assert digests([image], pixel_range=(0, 4095)) == before


# The command line.


def run(*words: object) -> Result:
    result = runner().invoke(featx, [*map(str, words)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.mark.filterwarnings("always:.*images with more than 8 bits")
def test_command_line_follows_the_advice_that_it_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    paths = dark_files(tmp_path / "photos")
    command = ["extract", tmp_path / "photos", "--backbone", "featx_micro", "-o", tmp_path / "rows.npy"]
    warned = run(*command).stderr
    (advice,) = re.findall(r"such as (--pixel-range \S+)\.", warned)
    assert "more than 8 bits" not in run(*command, *advice.split()).stderr
    expected = clone(MICRO).set_params(pixel_range=(0, 4095)).transform(paths)
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), expected, rtol=1e-5)


def test_command_line_says_what_makes_a_file_readable(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.tif").write_bytes(tiff(np.full((4, 4, 1), 3, dtype=np.float32)))
    (tmp_path / "photos" / "b.tif").write_bytes(tiff(FOUR, extra=(2,)))
    command = ["extract", tmp_path / "photos", "--backbone", "featx_micro", "-o", tmp_path / "rows.npy"]
    assert "Set --pixel-range low,high" in run(*command).stderr
    assert np.isnan(np.load(tmp_path / "rows.npy")[0]).all()
    run(*command, "--pixel-range", "0,3", "--fourth-band", "ignore", "--strict")
    expected = MICRO.transform([np.full((4, 4, 3), 255, dtype=np.uint8), FOUR[..., :3]])
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), expected, rtol=1e-4)


@pytest.mark.parametrize("limits", ["4095", "9,3", "a,b", "0,inf", "1,2,3", "nan,1"])
def test_limits_that_are_none_are_told(limits, tmp_path):
    result = runner().invoke(featx, ["extract", str(tmp_path), "-o", str(tmp_path / "x.npy"), "--pixel-range", limits])
    assert result.exit_code == 2
    assert "such as 0,4095" in result.output


def test_reading_can_be_typed_again():
    assert Reading(None, None, "float32", "exact", (0.0, 4095.0), "ignore").words() == [
        *("--pixel-range", "0,4095"),
        *("--fourth-band", "ignore"),
    ]


@given(low=st.floats(-1e12, 1e6), width=st.floats(1e-3, 1e12))
def test_range_is_typed_in_all_digits(low, width):
    _, word = Reading(None, None, "float32", "exact", (low, low + width)).words()
    assert Limits().convert(word, None, None) == (low, low + width)


def test_range_is_typed_in_few_digits_where_these_are_all():
    assert Reading(None, None, "float32", "exact", (0.0, 1048575.0)).words()[1] == "0,1048575"
