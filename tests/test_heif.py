"""Laws of HEIC: read wherever photos are read, turned once, and told where no decoder is installed."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pillow_heif
import pytest
from pictures import _STORED as STORED
from pictures import colours, encode
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from featx import PretrainedFeatureExtractor, load_image_folder
from featx.exceptions import UnreadableImage
from featx.images import heif
from featx.images.decoding import decode

EXACT = {"quality": -1, "chroma": 444}  # up to the rounding of the change to YCbCr and back


@pytest.fixture
def without_heif(monkeypatch):
    """As where pillow-heif is not installed."""
    monkeypatch.setattr(heif, "register", lambda: False)
    monkeypatch.setattr(Image, "OPEN", {kind: how for kind, how in Image.OPEN.items() if kind != "HEIF"})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heic")
    for name, shade in (("dark", 0), ("light", 200)):
        (folder / name).mkdir()
        for i in range(6):
            content = encode(np.full((32, 32, 3), shade + i, np.uint8), "HEIF")
            (folder / name / f"{i}{('.heic', '.HIF', '.heif', '.jpg')[i % 4]}").write_bytes(content)
    return folder


def read(data):
    return decode(data, max_pixels=10_000).permute(1, 2, 0).numpy()


def ftyp(major, *compatible):
    brands = b"".join(compatible)
    return struct.pack(">I", 16 + len(brands)) + b"ftyp" + major + bytes(4) + brands + bytes(64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_turned_once(orientation):
    # The file says it twice, as telephones do: in EXIF, and in its own words, which the decoder obeys.
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(STORED[orientation](colours())), "HEIF", exif=exif.tobytes(), **EXACT)
    assert pillow_heif.open_heif(io.BytesIO(data)).info["exif"].endswith(bytes([0, orientation]) + bytes(6))
    np.testing.assert_allclose(read(data), colours(), atol=2)


def test_heic_is_read_in_grey_and_over_white():
    grey = colours()[..., 0]
    np.testing.assert_allclose(read(encode(grey, "HEIF", **EXACT)), np.repeat(grey[..., None], 3, 2), atol=2)
    see_through = Image.fromarray(colours()).convert("RGBA")
    see_through.putalpha(Image.new("L", see_through.size, 0))
    assert read(encode(see_through, "HEIF", **EXACT)).min() == 255


def test_damaged_and_large_heic_is_told_as_such():
    data = encode(colours(), "HEIF")
    for length in (30, 100, len(data) // 2, len(data) - 20):
        with pytest.raises(UnreadableImage, match="truncated or damaged HEIF"):
            read(data[:length])
    with pytest.raises(UnreadableImage, match="32 x 48 pixels, more than max_pixels=99"):
        decode(data, max_pixels=99)


@pytest.mark.parametrize("major", [b"heic", b"heix", b"hevc", b"mif1", b"msf1"])
def test_heic_without_a_decoder_is_told_what_to_install(major, without_heif):
    for data in (ftyp(major), ftyp(major, b"mif1", b"heic")):
        with pytest.raises(UnreadableImage, match=r'^HEIC/HEIF image, for which pip install "featx\[heic\]" is'):
            read(data)
    assert read(encode(colours(), "PNG")).shape == (48, 32, 3)


def test_heic_in_a_jpg_without_a_decoder_says_the_row(tmp_path, without_heif):
    (tmp_path / "1.jpg").write_bytes(ftyp(b"heic"))
    with pytest.raises(ValueError, match=r"X\[0\] \('.*1\.jpg'\) is not a readable image: HEIC/HEIF image, for which"):
        PretrainedFeatureExtractor("featx_micro").transform([str(tmp_path / "1.jpg")])


def test_avif_without_a_decoder_is_told_what_to_do(monkeypatch):
    others = {end: kind for end, kind in Image.EXTENSION.items() if kind != "AVIF"}
    monkeypatch.setattr(Image, "EXTENSION", others)
    for data in (ftyp(b"avif"), ftyp(b"mif1", b"miaf", b"avif")):
        with pytest.raises(UnreadableImage, match=r"^AVIF image, which this Pillow cannot decode; pip install"):
            read(data)


def test_films_are_no_heic():
    for data in (ftyp(b"qt  "), ftyp(b"isom", b"mp42"), ftyp(b"mp42", b"heic"), b"\0\0\0\x20ftyp"):
        assert heif.kind_of(data) is None
        with pytest.raises(UnreadableImage, match="not an image file"):
            read(data)


def test_heic_is_read_by_threads_and_by_processes_of_joblib(photos):
    data = load_image_folder(photos)
    assert len(data.data) == 12
    rows = PretrainedFeatureExtractor("featx_micro", n_jobs=2, batch_size=4).transform(data.data)
    assert np.isfinite(rows).all()
    model = make_pipeline(PretrainedFeatureExtractor("featx_micro"), LogisticRegression())
    assert cross_val_score(model, data.data, data.target, cv=2, n_jobs=2, error_score="raise").tolist() == [1, 1]


def test_version_is_of_the_decoder_and_none_without(monkeypatch):
    assert pillow_heif.__version__ in heif.heif_version()
    assert pillow_heif.libheif_version() in heif.heif_version()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert not heif.register.__wrapped__()
    monkeypatch.setattr(heif, "register", heif.register.__wrapped__)
    assert heif.heif_version.__wrapped__() is None
