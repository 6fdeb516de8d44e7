"""Laws of decoding: the same picture whatever the file, and a plain reason where there is none."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pictures import (
    colours,
    damaged_png,
    encode,
    oriented,
    photo,
    png_16_bit,
    png_header,
    rgb_of,
    tiff_16_bit,
)
from PIL import Image, ImageFile

from featx.images import decoding
from featx.images.decoding import UnreadableImage, decode, rgb_from_pil

MANY = 10**8
PICTURE = Image.fromarray(photo())
ALPHA = np.dstack([photo(), photo()[..., :1]])

PLAIN = {
    "jpeg": encode(PICTURE, "JPEG"),
    "jpeg-progressive": encode(PICTURE, "JPEG", progressive=True),
    "jpeg-444": encode(PICTURE, "JPEG", subsampling=0),
    "jpeg-grey": encode(PICTURE.convert("L"), "JPEG"),
    "jpeg-cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
    "png": encode(PICTURE, "PNG"),
    "png-grey": encode(PICTURE.convert("L"), "PNG"),
    "png-1-bit": encode(PICTURE.convert("1"), "PNG"),
    "png-palette": encode(PICTURE.convert("P"), "PNG"),
    "webp": encode(PICTURE, "WEBP"),
    "webp-lossless": encode(PICTURE, "WEBP", lossless=True),
    "gif": encode(PICTURE.convert("P"), "GIF"),
    "bmp": encode(PICTURE, "BMP"),
    "tiff": encode(PICTURE, "TIFF"),
    "tiff-lzw": encode(PICTURE, "TIFF", compression="tiff_lzw"),
    "tiff-cmyk": encode(PICTURE.convert("CMYK"), "TIFF"),
}


def pixels_of(data: bytes) -> np.ndarray:
    return decode(data, max_pixels=MANY).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", PLAIN)
def test_decode_agrees_with_pillow(name):
    np.testing.assert_array_equal(pixels_of(PLAIN[name]), rgb_of(PLAIN[name]))


@pytest.mark.parametrize("name", PLAIN)
def test_decode_gives_uint8_rgb(name):
    decoded = decode(PLAIN[name], max_pixels=MANY)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (3, 60, 90)


@pytest.mark.parametrize("name", ["jpeg", "jpeg-progressive", "jpeg-grey", "webp", "webp-lossless"])
def test_decode_is_the_same_with_and_without_torchvision(name, monkeypatch):
    def read_by_torchvision(data):
        return decoding._decode_with_torchvision(data, Image.open(io.BytesIO(data)))

    assert read_by_torchvision(PLAIN[name]) is not None
    with_torchvision = pixels_of(PLAIN[name])
    monkeypatch.setattr(decoding, "_TORCHVISION_OPERATORS", {"JPEG": "no_such_operator"})
    assert read_by_torchvision(PLAIN[name]) is None
    np.testing.assert_array_equal(pixels_of(PLAIN[name]), with_torchvision)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_decode_turns_every_orientation_upright(file_format, orientation):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(file_format, {})
    turned = pixels_of(oriented(colours(), orientation, file_format, **options))
    tolerance = 3 if file_format == "JPEG" else 0
    np.testing.assert_allclose(turned.astype(int), colours(), atol=tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_pil_image_turns_every_orientation_upright(file_format, orientation):
    image = Image.open(io.BytesIO(oriented(colours(), orientation, file_format)))
    np.testing.assert_array_equal(rgb_from_pil(image, max_pixels=MANY).permute(1, 2, 0), colours())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0not EXIF at all"])
@pytest.mark.parametrize(("file_format", "name"), [("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp")])
def test_decode_ignores_damaged_exif(file_format, name, exif):
    data = encode(PICTURE, file_format, exif=exif)
    np.testing.assert_array_equal(pixels_of(data), rgb_of(PLAIN[name]))


@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_decode_lays_transparency_over_white(file_format, options):
    alpha = ALPHA[..., 3:].astype(float) / 255
    expected = np.rint(ALPHA[..., :3] * alpha + 255 * (1 - alpha))
    np.testing.assert_array_equal(pixels_of(encode(ALPHA, file_format, **options)), expected)


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_decode_shows_white_for_a_transparent_palette_entry(file_format):
    indices = np.zeros((4, 6), dtype=np.uint8)
    indices[1:3] = 1
    image = Image.new("P", (6, 4))
    image.putdata(indices.ravel().tolist())
    image.putpalette([10, 20, 30, 200, 100, 50])
    decoded = pixels_of(encode(image, file_format, transparency=1))
    assert (decoded[1:3] == 255).all()
    assert (decoded[0] == [10, 20, 30]).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_decode_shows_white_for_a_transparent_colour(mode):
    picture = np.zeros((4, 6) if mode == "L" else (4, 6, 3), dtype=np.uint8)
    picture[1:3] = 90
    transparent = 90 if mode == "L" else (90, 90, 90)
    decoded = pixels_of(encode(picture, "PNG", transparency=transparent))
    assert (decoded[1:3] == 255).all()
    assert (decoded[0] == 0).all()


def test_decode_lays_grey_with_alpha_over_white():
    decoded = pixels_of(encode(Image.fromarray(ALPHA).convert("LA"), "PNG"))
    grey, alpha = np.moveaxis(np.asarray(Image.fromarray(ALPHA).convert("LA"), dtype=float), -1, 0)
    expected = np.rint(grey * alpha / 255 + 255 - alpha)
    np.testing.assert_array_equal(decoded, np.repeat(expected[..., None], 3, axis=2))


ALL_16_BIT = np.arange(65536, dtype=np.uint16).reshape(256, 256)
SCALED = np.rint(np.arange(65536) / 257).astype(np.uint8).reshape(256, 256)


@pytest.mark.parametrize(
    "data",
    [
        encode(ALL_16_BIT, "PNG"),
        encode(ALL_16_BIT, "TIFF"),
        encode(Image.fromarray(ALL_16_BIT.astype(">u2")), "TIFF"),
        encode(ALL_16_BIT.astype(np.int32), "TIFF"),
    ],
    ids=["png", "tiff", "tiff-big-endian", "tiff-32-bit"],
)
def test_decode_scales_16_bit_grey(data):
    np.testing.assert_array_equal(pixels_of(data), np.repeat(SCALED[..., None], 3, axis=2))


@pytest.mark.parametrize(
    "write",
    [
        png_16_bit,
        tiff_16_bit,
        lambda pixels: tiff_16_bit(pixels, order=">"),
        lambda pixels: tiff_16_bit(pixels, compressed=True),
        lambda pixels: tiff_16_bit(pixels, order=">", compressed=True),
    ],
    ids=["png", "tiff", "tiff-big-endian", "tiff-deflate", "tiff-big-endian-deflate"],
)
def test_decode_scales_16_bit_colours(write):
    pixels = np.stack([ALL_16_BIT, ALL_16_BIT[::-1], ALL_16_BIT.T], axis=-1)
    np.testing.assert_array_equal(pixels_of(write(pixels)), np.stack([SCALED, SCALED[::-1], SCALED.T], axis=-1))


def test_decode_lays_16_bit_transparency_over_white():
    pixels = np.zeros((4, 6, 4), dtype=np.uint16)
    pixels[:2] = [1000, 30000, 65535, 65535]
    decoded = pixels_of(png_16_bit(pixels))
    assert (decoded[2:] == 255).all()
    np.testing.assert_array_equal(decoded[0, 0], np.rint(np.array([1000, 30000, 65535]) / 257))


def test_decode_scales_floats_within_0_and_1():
    values = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(pixels_of(encode(values, "TIFF"))[..., 0], np.rint(values * 255))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_decode_takes_the_first_frame(file_format):
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    options = {"lossless": True} if file_format == "WEBP" else {}
    decoded = pixels_of(encode(first, file_format, save_all=True, append_images=[second], **options))
    np.testing.assert_array_equal(decoded, np.asarray(first))


def test_decode_takes_the_first_picture_of_a_multi_picture_jpeg():
    data = encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    np.testing.assert_array_equal(pixels_of(data), rgb_of(data))


def test_decode_allows_bytes_after_the_end():
    for name in ("jpeg", "png"):
        np.testing.assert_array_equal(pixels_of(PLAIN[name] + b"more"), rgb_of(PLAIN[name]))


UNREADABLE = {
    "empty": (b"", "empty file"),
    "text": (b"this is not a picture at all\n" * 9, "not an image file"),
    "jpeg-header-only": (PLAIN["jpeg"][:20], "truncated or damaged JPEG"),
    "jpeg-half": (PLAIN["jpeg"][: len(PLAIN["jpeg"]) // 2], "truncated JPEG"),
    "jpeg-last-bytes": (PLAIN["jpeg"][:-2], "truncated JPEG"),
    "jpeg-progressive-half": (PLAIN["jpeg-progressive"][:-400], "truncated JPEG"),
    "png-half": (PLAIN["png"][: len(PLAIN["png"]) // 2], "truncated PNG"),
    "png-last-bytes": (PLAIN["png"][:-6], "truncated PNG"),
    "png-checksum": (damaged_png(photo(), b"IDAT", "checksum"), "PNG checksum error in IDAT"),
    "png-content": (damaged_png(photo(), b"IDAT", "content"), "PNG checksum error in IDAT"),
    "png-header-checksum": (damaged_png(photo(), b"IHDR", "checksum"), "PNG checksum error in IHDR"),
    "png-no-pixels": (png_header(8, 8), "truncated PNG"),
    "webp-half": (PLAIN["webp"][: len(PLAIN["webp"]) // 2], "truncated or damaged WebP"),
    "gif-half": (PLAIN["gif"][: len(PLAIN["gif"]) // 2], "truncated GIF"),
    "bmp-half": (PLAIN["bmp"][: len(PLAIN["bmp"]) // 2], "truncated BMP"),
    "tiff-half": (PLAIN["tiff"][:2000], "truncated TIFF"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "a drawing"),
    "floats-above-1": (encode(np.full((4, 6), 2, dtype=np.float32), "TIFF"), "float pixels from 2 to 2"),
    "floats-nan": (encode(np.full((4, 6), np.nan, dtype=np.float32), "TIFF"), "NaN or infinite pixels"),
    "integers-above-16-bit": (
        encode(np.full((4, 6), 70000, dtype=np.int32), "TIFF"),
        "integer pixels from 70000 to 70000",
    ),
    "large": (png_header(10000, 20000), "10000 x 20000 pixels, more than max_pixels=100000000"),
    "very-large": (png_header(40000, 40000), "40000 x 40000 pixels, more than max_pixels=100000000"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_decode_says_why_an_image_is_unreadable(name):
    data, reason = UNREADABLE[name]
    with pytest.raises(UnreadableImage) as caught:
        decode(data, max_pixels=MANY)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "gif", "tiff", "bmp"])
def test_decode_checks_the_size_before_it_decodes(name, monkeypatch):
    def fail(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    monkeypatch.setattr(decoding, "_decode_with_torchvision", fail)
    with pytest.raises(UnreadableImage, match="90 x 60 pixels, more than max_pixels=5399"):
        decode(PLAIN[name], max_pixels=5399)


def test_decode_allows_exactly_max_pixels():
    assert decode(PLAIN["jpeg"], max_pixels=5400).shape == (3, 60, 90)


def test_decode_obeys_max_pixels_above_pillows_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(PLAIN["png"], max_pixels=5400).shape == (3, 60, 90)


def test_pil_image_obeys_max_pixels():
    with pytest.raises(UnreadableImage, match="more than max_pixels=10"):
        rgb_from_pil(PICTURE, max_pixels=10)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "HSV"])
def test_pil_image_is_left_unmodified(mode):
    image = PICTURE.convert("L").convert(mode) if mode in ("I", "I;16") else PICTURE.convert(mode)
    before = (image.mode, image.size, image.tobytes(), dict(image.info))
    assert rgb_from_pil(image, max_pixels=MANY).shape == (3, 60, 90)
    assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before


def test_decode_is_the_same_from_many_threads():
    expected = {name: pixels_of(data) for name, data in PLAIN.items()}
    names = list(PLAIN) * 10
    with ThreadPoolExecutor(8) as pool:
        for name, decoded in zip(names, pool.map(lambda name: pixels_of(PLAIN[name]), names), strict=True):
            np.testing.assert_array_equal(decoded, expected[name])


def test_decode_leaves_pillows_settings_alone():
    limit, lenient = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    pixels_of(PLAIN["png"])
    assert limit == Image.MAX_IMAGE_PIXELS
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES
