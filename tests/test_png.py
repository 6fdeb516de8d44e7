"""Laws of PNG: a picture whose pixels are whole is read, whatever else is in the file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode, oriented, photo, png_with
from PIL import Image, ImageFile, PngImagePlugin

from featx.images.decoding import UnreadableImage, decode

RGB = photo()
PNG = encode(RGB, "PNG")
LONG = b"all work and no play makes jack a dull boy " * 60_000  # 2.5 MB


def pixels_of(data: bytes) -> np.ndarray:
    return decode(data, max_pixels=10**6).permute(1, 2, 0).numpy()


def profile(content: bytes) -> bytes:
    return b"name\0\0" + zlib.compress(content)


BESIDE_PIXELS = {
    "long-text": (b"zTXt", b"Comment\0\0" + zlib.compress(LONG)),
    "long-international-text": (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LONG)),
    "long-xmp": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
    "long-raw-exif": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LONG)),
    "long-plain-text": (b"tEXt", b"Comment\0" + LONG),
    "long-profile": (b"iCCP", profile(LONG)),
    "bomb-in-a-profile": (b"iCCP", profile(bytes(20_000_000))),
    "text-of-an-unknown-packing": (b"zTXt", b"Comment\0\7abc"),
    "profile-of-an-unknown-packing": (b"iCCP", b"name\0\7abc"),
    "cut-gamma": (b"gAMA", b"\0"),
    "cut-density": (b"pHYs", b"\0\0"),
    "cut-animation": (b"acTL", b"\0"),
    "animation-of-nothing": (b"acTL", bytes(8)),
    "text-called-transparency": (b"tEXt", b"transparency\0abc"),
    "private": (b"prVt", b"\1\2\3"),
}


@pytest.mark.parametrize("name", BESIDE_PIXELS)
def test_chunk_beside_the_pixels_does_not_matter(name):
    np.testing.assert_array_equal(pixels_of(png_with(PNG, *BESIDE_PIXELS[name])), RGB)


@pytest.mark.parametrize("name", [b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"tIME", b"prVt"])
@pytest.mark.parametrize("length", [0, 9, 70_000])
def test_wrong_checksum_beside_the_pixels_does_not_matter(name, length):
    np.testing.assert_array_equal(pixels_of(png_with(PNG, name, bytes(length), damaged=True)), RGB)


@given(
    name=st.sampled_from([b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"acTL", b"cHRM"]),
    content=st.binary(max_size=60),
)
def test_whatever_is_in_a_chunk_beside_the_pixels_does_not_matter(name, content):
    np.testing.assert_array_equal(pixels_of(png_with(PNG, name, content)), RGB)


PALETTE = encode(Image.fromarray(RGB).quantize(16), "PNG")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (png_with(PNG, b"tRNS", bytes(6), damaged=True), "tRNS"),
        (png_with(PALETTE, b"PLTE", bytes(48), damaged=True), "PLTE"),
        (png_with(PNG, b"IDAT", b"", damaged=True), "IDAT"),
        (png_with(PNG, b"CgBI", b"", damaged=True), "CgBI"),
    ],
)
def test_wrong_checksum_of_what_decides_pixels_is_named(data, name):
    with pytest.raises(UnreadableImage, match=f"^PNG checksum error in {name}$"):
        pixels_of(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_text_beside_the_exif_leaves_the_picture_upright(orientation):
    data = oriented(RGB, orientation, "PNG")
    np.testing.assert_array_equal(pixels_of(png_with(data, *BESIDE_PIXELS["long-text"])), RGB)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
TURNED = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\3\0\0\0\0\0\0"
RAW_PROFILE = b"\nexif\n      32\n" + (b"Exif\0\0" + TURNED).hex().encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
        (
            b"zTXt",
            b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE),
        ),
        (b"tEXt", b"Raw profile type exif\0" + RAW_PROFILE),
    ],
    ids=["xmp", "packed-xmp", "packed-raw-exif", "raw-exif"],
)
def test_texts_that_turn_a_picture_turn_it(name, content):
    np.testing.assert_array_equal(pixels_of(png_with(PNG, name, content)), RGB[::-1, ::-1])


def test_transparency_survives_what_is_left_out():
    data = encode(Image.fromarray(RGB), "PNG", transparency=tuple(RGB[5, 5].tolist()))
    found = pixels_of(png_with(data, *BESIDE_PIXELS["long-profile"]))
    assert (found[5, 5] == 255).all()
    np.testing.assert_array_equal(found[~(RGB[5, 5] == RGB).all(-1)], RGB[~(RGB[5, 5] == RGB).all(-1)])


@pytest.mark.parametrize("default_image", [False, True])
def test_animated_png_is_its_first_frame(default_image):
    first, second = Image.new("RGBA", (8, 8), (200, 0, 0, 255)), Image.new("RGBA", (8, 8), (0, 0, 200, 255))
    data = encode(first, "PNG", save_all=True, append_images=[second], default_image=default_image)
    np.testing.assert_array_equal(pixels_of(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("stop", [8, 20, 33, 40, -1, -4, -12, -13])
def test_png_that_ends_early_is_truncated(stop):
    data = png_with(PNG, *BESIDE_PIXELS["long-text"])
    with pytest.raises(UnreadableImage, match=r"^truncated PNG$"):
        pixels_of(data[:stop])


def test_reading_a_png_leaves_pillows_limits_alone():
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES
    pixels_of(png_with(PNG, *BESIDE_PIXELS["long-profile"]))
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_png_without_anything_to_leave_out_is_not_copied():
    from featx.images.png import pixels_alone

    assert pixels_alone(PNG) is PNG
    assert struct.unpack(">I", PNG[8:12]) == (13,)


def test_zeros_in_the_place_of_chunks_are_told_in_printable_words():
    data = encode(photo(), "PNG")
    for at in (33, data.index(b"IEND") - 4):
        with pytest.raises(UnreadableImage) as caught:
            decode(data[:at] + bytes(500), max_pixels=10**6)
        assert str(caught.value).isprintable()
