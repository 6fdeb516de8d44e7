"""Laws of items and sources: the same picture in every form of X, and each fault where it belongs."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import colours, encode, photo
from PIL import Image

from featx.exceptions import REMOVE_IT, FeatxError, ImageError
from featx.images.arrays import ArrayItem
from featx.images.items import PathItem, _lock_of
from featx.images.sources import as_items
from featx.images.view import WatchedItems

RGB = photo()
PNG = encode(RGB, "PNG")
CHANNELS_FIRST = torch.from_numpy(RGB).permute(2, 0, 1)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "cat 3.png"
    file.write_bytes(PNG)
    return str(file)


def object_array(*elements):
    array = np.empty(len(elements), dtype=object)
    for row, element in enumerate(elements):  # all at once, NumPy would look into them
        array[row] = element
    return array


FORMS = {
    "list": lambda path: [path],
    "tuple": lambda path: (path,),
    "path-object": lambda path: [Path(path)],
    "str-array": lambda path: np.array([path]),
    "object-array": lambda path: object_array(path),
    "string-dtype-array": lambda path: np.array([path], dtype=np.dtypes.StringDType()),
    "column": lambda path: np.array([[path]], dtype=object),
    "list-column": lambda path: [[path]],
    "list-column-of-pil": lambda path: [[Image.fromarray(RGB)]],
    "bytes": lambda path: [PNG],
    "bytearray": lambda path: [bytearray(PNG)],
    "numpy-bytes": lambda path: object_array(np.bytes_(PNG)),
    "pil": lambda path: [Image.fromarray(RGB)],
    "pil-lazy": lambda path: [Image.open(io.BytesIO(PNG))],
    "array-list": lambda path: [RGB],
    "array": lambda path: RGB[None],
    "tensor-list": lambda path: [CHANNELS_FIRST],
    "tensor": lambda path: CHANNELS_FIRST[None],
    "series": lambda path: pd.Series([path], index=[7]),
    "series-object": lambda path: pd.Series([path], dtype=object),
    "series-category": lambda path: pd.Series([path], dtype="category"),
    "series-bytes": lambda path: pd.Series([PNG]),
    "series-arrays": lambda path: pd.Series([RGB]),
    "frame": lambda path: pd.DataFrame({"photo": [path]}, index=["a"]),
    "polars-series": lambda path: pl.Series("photo", [path]),
    "polars-bytes": lambda path: pl.Series("photo", [PNG]),
    "polars-category": lambda path: pl.Series("photo", [path], dtype=pl.Categorical),
    "polars-frame": lambda path: pl.DataFrame({"photo": [path]}),
    "buffer": lambda path: [io.BytesIO(PNG)],
    "buffer-at-its-end": lambda path: [_written(PNG)],
    "dict-of-bytes": lambda path: [{"bytes": PNG, "path": None}],
    "dict-of-path": lambda path: [{"bytes": None, "path": path}],
    "dict-of-both": lambda path: [{"bytes": PNG, "path": "not here.png"}],
    "dict-without-path": lambda path: [{"bytes": PNG}],
    "array-of-dicts": lambda path: object_array({"bytes": PNG, "path": None}),
    "series-of-dicts": lambda path: pd.Series([{"bytes": PNG, "path": None}]),
    "frame-of-dicts": lambda path: pd.DataFrame({"image": [{"bytes": None, "path": path}]}),
    "polars-struct": lambda path: pl.Series("image", [{"bytes": PNG, "path": None}]),
    "polars-frame-of-structs": lambda path: pl.DataFrame({"image": [{"bytes": PNG, "path": "x.png"}]}),
}


def _written(content, file=None):
    """A buffer or file as it is left by who has just written to it."""
    file = io.BytesIO() if file is None else file
    file.write(content)
    return file


@pytest.mark.parametrize("form", FORMS)
def test_items_are_the_same_picture_in_every_form(form, path):
    items = as_items(FORMS[form](path))
    assert len(items) == 1
    assert items[0].stretch is False
    np.testing.assert_array_equal(items.load(0), CHANNELS_FIRST)


def test_items_mix_every_kind(path):
    items = as_items([path, PNG, Image.fromarray(RGB), RGB, CHANNELS_FIRST, Path(path)])
    for row in range(len(items)):
        np.testing.assert_array_equal(items.load(row), CHANNELS_FIRST)


def test_items_read_pyarrow_strings(path):
    pytest.importorskip("pyarrow")
    items = as_items(pd.Series([path, None], dtype="string[pyarrow]"))
    np.testing.assert_array_equal(items.load(0), CHANNELS_FIRST)
    with pytest.raises(ImageError, match=r"X\[1\] is not a readable image: a missing value"):
        items.load(1)


def test_import_of_the_sources_loads_no_heavy_library():
    heavy = "{'torch', 'torchvision', 'PIL', 'polars'}"  # scikit-learn itself imports pandas where it can
    code = f"import sys, featx.images.sources, featx.images.items; print({heavy} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "set()"


# Rows: what is wrong with one of them is raised when it is loaded, and names it.


def test_row_error_names_row_and_file_and_remedy(path):
    Path(path).write_bytes(encode(RGB, "JPEG")[:-40])
    items = as_items([PNG, path])
    items.load(0)
    with pytest.raises(ImageError) as caught:
        items.load(1)
    expected = f"X[1] ({path!r}) is not a readable image: truncated JPEG. {REMOVE_IT}"
    assert str(caught.value) == expected
    assert (caught.value.row, caught.value.source) == (1, path)


def test_row_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError("what", row=3, source="a.jpg")))
    assert (str(error), error.row, error.source) == ("what", 3, "a.jpg")
    assert isinstance(error, FeatxError | ValueError)


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (None, "a missing value"),
        (float("nan"), "a missing value"),
        (pd.NA, "a missing value"),
        (pd.NaT, "a missing value"),
        (3, "of type int"),
        ({"a": 1}, "of type dict"),
        ([1, 2], "of type list"),
        ("", "no such file"),
        ("nowhere.jpg", "no such file"),
        ("~/nowhere.jpg", "no such file"),
        ("x" * 5000, "the name is too long"),
        ("a\0b", "not the name of a file"),
        ("https://example.org/cat.jpg", "URLs are not opened"),
        ("file:///cat.jpg", "URLs are not opened"),
        ("s3://bucket/cat.jpg", "URLs are not opened"),
        (b"", "empty file"),
        (b"text", "not an image file"),
        (np.zeros((4, 6, 2), np.uint8), r"pixels of shape \(4, 6, 2\)"),
        (np.zeros(4, np.uint8), r"pixels of shape \(4,\)"),
        (np.zeros((1, 4, 6, 3), np.uint8), r"pixels of shape \(1, 4, 6, 3\)"),
        (np.zeros((3, 4, 6), np.uint8), r"pixels of shape \(3, 4, 6\)"),
        (torch.zeros(8, 6, 3), r"pixels of shape \(8, 6, 3\), where \(channels, height, width\)"),
        (torch.zeros(4, 6), r"pixels of shape \(4, 6\)"),
        (np.zeros((0, 6, 3), np.uint8), r"no pixels, shape \(0, 6, 3\)"),
        (np.full((4, 6), np.nan), "NaN or infinite pixels"),
        (np.full((4, 6), np.inf), "NaN or infinite pixels"),
        (np.full((4, 6), 1.5), "float pixels from 1.5 to 1.5, outside 0..1. Set pixel_range"),
        (np.full((4, 6), -0.5), "float pixels from -0.5"),
        (np.zeros((4, 6), np.int64), "pixels of dtype int64, whose range is not known. Set pixel_range"),
        (np.zeros((4, 6), complex), "pixels of dtype complex128"),
        (np.array([["a"]]), "pixels of dtype <U1"),
    ],
)
def test_row_of_no_use_is_the_rows_own_failure(element, reason):
    items = as_items(object_array("also.jpg", element))
    with pytest.raises(ImageError, match=rf"^X\[1\].* is not a readable image: {reason}") as caught:
        items.load(1)
    assert caught.value.row == 1


@pytest.mark.parametrize("element", [None, "nowhere.jpg", np.array([["a"]], dtype=object)])
def test_row_of_no_use_has_no_digest(element):
    with pytest.raises(ImageError, match=r"^X\[0\]"):
        as_items(object_array(element)).digest(0)


def test_row_that_is_no_regular_file_fails_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty.jpg").touch()
    names = [tmp_path, tmp_path / "fifo", "/dev/zero", tmp_path / "empty.jpg", tmp_path / "empty.jpg" / "x"]
    reasons = ["it is a directory", "not a regular file", "not a regular file", "empty file", "no such file"]
    items = as_items(names)
    for row, reason in enumerate(reasons):
        with pytest.raises(ImageError, match=reason):
            items.load(row)


def test_row_without_permission_says_so(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refuse)  # a mode of 0 would not stop root
    with pytest.raises(ImageError, match="permission denied"):
        as_items([path]).load(0)


def test_row_in_a_slice_keeps_its_number(path):
    items = as_items([path, None, path, None])[1:][::2]
    assert len(items) == 2
    with pytest.raises(ImageError, match=r"^X\[3\]"):
        items.load(1)
    with pytest.raises(ImageError, match=r"^X\[3\]"):
        items.load(-1)
    with pytest.raises(IndexError):
        items[2]


def test_missing_values_in_columns_fail_alone(path):
    columns = [
        pd.Series([path, None]),
        pd.Series([path, pd.NA], dtype="string"),
        pd.Series([path, None], dtype="category"),
        pl.Series([path, None]),
        pl.DataFrame({"a": [path, None]}),
    ]
    for column in columns:
        items = as_items(column)
        items.load(0)
        with pytest.raises(ImageError, match=r"^X\[1\] is not a readable image: a missing value"):
            items.load(1)


# X as a whole.


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ("a.jpg", TypeError, r"got one str. Wrap it in a list"),
        (b"abc", TypeError, r"got one bytes. Wrap it"),
        (Path("a.jpg"), TypeError, r"Wrap it in a list"),
        (Image.new("L", (4, 4)), TypeError, r"got one Image. Wrap it"),
        (None, TypeError, r"X of type NoneType"),
        (3, TypeError, r"X of type int"),
        ({"a": 1}, TypeError, r"X of type dict"),
        ((x for x in "ab"), TypeError, r"X of type generator"),
        (scipy.sparse.csr_matrix((2, 2)), TypeError, r"X of type csr_matrix"),
        (np.array(3), TypeError, "a single value"),
        ([], ValueError, r"0 sample\(s\)"),
        (np.empty((0, 4, 6, 3)), ValueError, r"0 sample\(s\)"),
        (np.empty((0, 5)), ValueError, r"0 sample\(s\)"),
        (pd.Series([], dtype=object), ValueError, r"0 sample\(s\)"),
        (torch.zeros(0, 3, 4, 6), ValueError, r"0 sample\(s\)"),
        (np.zeros((2, 0, 6)), ValueError, "at least one pixel"),
        (np.zeros((9, 12)), ValueError, "image_shape"),
        (np.zeros((9, 1)), ValueError, "image_shape"),
        (np.zeros((9, 12), dtype=object), ValueError, "image_shape"),
        ([[1, 2], [3, 4]], ValueError, "image_shape"),
        ([[1], [3]], ValueError, "image_shape"),
        (torch.zeros(9, 12), ValueError, "image_shape"),
        (pd.DataFrame({"a": [1.0], "b": [2]}), ValueError, "image_shape"),
        (pd.DataFrame({"a": [1.0]}), ValueError, "image_shape"),
        (pl.DataFrame({"a": [1.0], "b": [True]}), ValueError, "image_shape"),
        (np.zeros(5), ValueError, "a row of numbers"),
        (pd.Series([1, 2], name="age"), ValueError, "'age' of numbers"),
        ([[1, 2], [3, 4], [5]], ValueError, r"ragged list: X\[2\] has shape \(1,\), X\[0\] has shape \(2,\)"),
        ([[[1, 2], [3]], [[1, 2], [3]]], ValueError, r"ragged list: X\[0\] has rows of several lengths"),
        (np.array([["a", "b"]]), ValueError, "Pick the column"),
        (np.array([["a", 1]], dtype=object), ValueError, "Pick the column"),
        (pd.DataFrame({"photo": ["a"], "age": [1]}), ValueError, r"columns \['photo', 'age'\]. Pick the column"),
        (pl.DataFrame({"photo": ["a"], "age": [1]}), ValueError, r"columns \['photo', 'age'\]. Pick the column"),
        (np.array([b"a.jpg"]), ValueError, "could be either"),
        (np.zeros((2, 4, 6, 3), complex), ValueError, "dtype complex128"),
        (np.zeros((2, 4, 6, 3), object), ValueError, "dtype object"),
        (np.zeros((2, 8, 6, 5)), ValueError, "1, 3 or 4 channels"),
        (np.zeros((2, 3, 8, 6)), ValueError, "looks channels-first"),
        (np.zeros((8, 6, 3)), ValueError, "looks like one image"),
        (np.zeros((2, 2, 4, 6, 3)), ValueError, "Take one axis away"),
        (np.zeros((2, 4, 6, 3), np.int32), ValueError, r"dtype int32. Pass pixel_range"),
        (torch.zeros(2, 4, 6, dtype=torch.int16), ValueError, r"\(n, channels, height, width\)"),
        (torch.zeros(2, 3, 4, 6, dtype=torch.int16), ValueError, r"dtype int16. Pass pixel_range"),
        (torch.zeros(2, 5, 4, 6), ValueError, "In a tensor channels come first"),
    ],
)
def test_x_of_no_use_is_an_error_that_says_why(X, error, message):
    with pytest.raises(error, match=message):
        as_items(X)


@pytest.mark.parametrize("pixel_range", ["full", (1, 0), (0, float("inf"))])
def test_pixel_range_of_no_use_is_an_error(pixel_range):
    with pytest.raises(ValueError, match="pixel_range"):
        as_items([PNG], pixel_range=pixel_range)


# image_shape.


@pytest.mark.parametrize(
    ("image_shape", "shape"),
    [((3, 4), (3, 4)), ((-1, 4), (3, 4)), ((1, -1), (1, 12)), ((2, 2, 3), (2, 2)), ((-1, 2, 3), (2, 2))],
)
def test_image_shape_lays_each_row_out(image_shape, shape):
    X = np.linspace(0, 1, 24).reshape(2, 12)
    items = as_items(X, image_shape=image_shape)
    assert items[1].stretch is True
    loaded = items.load(1)
    assert loaded.shape == (3, *shape)
    row = X[1].reshape((*shape, -1)) * np.ones(3)
    np.testing.assert_array_equal(loaded.permute(1, 2, 0), row.astype(np.float32))


@pytest.mark.parametrize(
    "image_shape", [(3, 5), (2, 2), (-1, 5), (-1, -1), (12,), (0, -1), (-1, 2, 2), (-1, 24), (1, 3, 2, 2)]
)
def test_image_shape_that_does_not_fit_is_an_error(image_shape):
    with pytest.raises(ValueError, match="image_shape="):
        as_items(np.zeros((2, 12)), image_shape=image_shape)


# Pixels.


@pytest.mark.parametrize("pixels", [RGB[..., 0], RGB[..., :1], RGB, np.dstack([RGB, RGB[..., :1]])])
def test_pixels_of_an_array_equal_those_of_the_same_file(pixels):
    squeezed = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    from_file = as_items([encode(np.ascontiguousarray(squeezed), "PNG")]).load(0)
    np.testing.assert_array_equal(as_items([pixels]).load(0), from_file)
    hwc = pixels if pixels.ndim == 3 else pixels[..., None]
    tensor = torch.from_numpy(np.moveaxis(hwc, -1, 0).copy())
    np.testing.assert_array_equal(as_items([tensor]).load(0), from_file)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f8"])
def test_float_pixels_become_float32_without_rounding(dtype):
    pixels = (RGB / 255).astype(dtype)
    loaded = as_items([pixels]).load(0)
    assert loaded.dtype == torch.float32
    np.testing.assert_array_equal(loaded.permute(1, 2, 0), pixels.astype(np.float32))


def test_float_pixels_with_alpha_are_laid_over_white():
    pixels = np.dstack([RGB, RGB[..., :1]]).astype(np.float32) / 255
    loaded = as_items([pixels]).load(0).permute(1, 2, 0).numpy()
    as_bytes = as_items([np.dstack([RGB, RGB[..., :1]])]).load(0).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(loaded * 255, as_bytes, atol=0.51)


def test_bool_pixels_are_black_and_white():
    pixels = np.eye(5, dtype=bool)
    np.testing.assert_array_equal(as_items([pixels]).load(0)[0], np.eye(5) * 255)
    np.testing.assert_array_equal(as_items(pixels[None]).load(0)[0], np.eye(5) * 255)


@given(
    low=st.floats(-100, 99), width=st.floats(0.5, 1000), dtype=st.sampled_from(["u1", "i2", "u4", "f4", "f8", ">i4"])
)
def test_pixel_range_is_an_affine_map_without_limits(low, width, dtype):
    pixels = np.arange(0, 120).reshape(10, 12).astype(dtype)
    loaded = as_items([pixels], pixel_range=(low, low + width)).load(0)
    assert loaded.dtype == torch.float32
    np.testing.assert_allclose(loaded[1], (pixels.astype(float) - low) / width, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensor_that_requires_grad_is_read_and_left_alone(dtype):
    tensor = (CHANNELS_FIRST[None] / 255).to(dtype).requires_grad_()
    loaded = as_items(tensor).load(0)
    assert not loaded.requires_grad
    assert tensor.requires_grad
    np.testing.assert_array_equal(loaded, tensor.detach()[0].float())


def test_pixels_of_x_are_never_shared_or_changed(tmp_path):
    np.save(tmp_path / "x.npy", np.stack([RGB, RGB]))
    read_only = np.stack([RGB, RGB])
    read_only.setflags(write=False)
    tensor = torch.stack([CHANNELS_FIRST, CHANNELS_FIRST])
    for X in (read_only, np.load(tmp_path / "x.npy", mmap_mode="r"), np.stack([RGB, RGB]), tensor):
        loaded = as_items(X).load(1)
        np.testing.assert_array_equal(loaded, CHANNELS_FIRST)
        loaded.zero_()
        assert (np.asarray(X[1]) != 0).any()


def test_pixels_with_any_strides_are_read():
    for view in (RGB[::-1, ::2], np.asfortranarray(RGB), RGB[:, ::-1]):
        np.testing.assert_array_equal(as_items([view]).load(0).permute(1, 2, 0), view)


# preprocess=None: X holds what the network takes.


def test_raw_pixels_pass_as_they_are():
    pixels = np.arange(2 * 8 * 6 * 5).reshape(2, 8, 6, 5)
    np.testing.assert_array_equal(as_items(pixels, raw=True).load(1), np.moveaxis(pixels[1], -1, 0))
    tensor = torch.randn(2, 7, 4, 6)
    np.testing.assert_array_equal(as_items(tensor, raw=True).load(1), tensor[1])
    assert as_items(list(tensor), raw=True).load(0).dtype == torch.float32
    rows = as_items(np.arange(24.0).reshape(2, 12), image_shape=(2, 3, 2), raw=True)
    assert rows.load(0).shape == (2, 2, 3)


def test_raw_pixels_may_not_be_nan():
    with pytest.raises(ImageError, match="NaN"):
        as_items(torch.full((1, 3, 2, 2), float("nan")), raw=True).load(0)


@pytest.mark.parametrize("element", ["a.jpg", PNG, Image.new("L", (4, 4)), Path("a"), io.BytesIO(), {"bytes": PNG}])
def test_raw_files_are_an_error_of_the_whole_x(element):
    with pytest.raises(ValueError, match="preprocess=None"):
        as_items([RGB, element], raw=True)


# Open files, and what Hugging Face's datasets hold.


def test_open_file_is_read_and_left_at_its_place(path):
    with open(path, "rb") as file, tempfile.SpooledTemporaryFile() as spooled, _written(PNG) as buffer:
        file.seek(7)
        items = as_items([file, _written(PNG, spooled), buffer])
        for row in range(3):
            torch.testing.assert_close(items.load(row), CHANNELS_FIRST)
            items.digest(row)
        assert (file.tell(), spooled.tell(), buffer.tell()) == (7, len(PNG), len(PNG))


def test_open_file_in_many_rows_is_read_by_many_threads(path):
    with open(path, "rb") as file:
        items = as_items([file] * 40)
        with ThreadPoolExecutor(8) as pool:
            loaded = [*pool.map(items.load, range(40))]
        assert all(torch.equal(pixels, CHANNELS_FIRST) for pixels in loaded)
        assert len({items.digest(row) for row in range(40)} | {as_items([PNG]).digest(0)}) == 1


class Pipe(io.RawIOBase):
    """What can be read once."""

    def readable(self):
        return True

    def seekable(self):
        return False


@pytest.mark.parametrize(
    ("make", "reason", "advice"),
    [
        (lambda path: Path(path).open(encoding="latin-1"), "a file that is open as text", 'Open it with mode "rb"'),  # noqa: SIM115
        (lambda path: io.StringIO("text"), "a file that is open as text", 'Open it with mode "rb"'),
        (lambda path: _closed(Path(path).open("rb")), "a file that cannot be read from its beginning", "Pass its path"),  # noqa: SIM115
        (lambda path: _closed(io.BytesIO(PNG)), "a file that cannot be read from its beginning", "Pass its path"),
        (lambda path: Pipe(), "a file that cannot be read from its beginning", "Pass its path"),
        (lambda path: {"image": PNG}, r"of type dict with the keys \['image'\]", "Pass one of these"),
        (lambda path: {"bytes": None, "path": None}, "of type dict with the keys", "Pass one of these"),
        (lambda path: {"bytes": path}, "of type dict with the keys", "Pass one of these"),
        (lambda path: 3, "of type int", "Pass one of these"),
    ],
    ids=["text", "text-buffer", "closed", "closed-buffer", "pipe", "other-keys", "empty", "path-as-bytes", "int"],
)
def test_element_of_a_wrong_form_says_what_to_pass_instead(make, reason, advice, path):
    element = make(path)
    try:
        with pytest.raises(ImageError, match=rf"^X\[0\].*{reason}.*{advice}") as caught:
            as_items([element]).load(0)
    finally:
        if hasattr(element, "close"):
            element.close()
    assert "on_error" not in str(caught.value)


def _closed(file):
    file.close()
    return file


def test_error_of_a_dict_names_its_path():
    with pytest.raises(ImageError, match=r"X\[0\] \('cat.png'\)") as caught:
        as_items([{"bytes": PNG[:-30], "path": "cat.png"}]).load(0)
    assert caught.value.source == "cat.png"


@pytest.mark.parametrize("one", [io.BytesIO(PNG), {"bytes": PNG, "path": None}])
def test_one_image_of_a_new_form_is_to_be_wrapped(one):
    with pytest.raises(TypeError, match=r"Wrap it in a list: \[X\]"):
        as_items(one)
    torch.testing.assert_close(as_items([one]).load(0), CHANNELS_FIRST)


def _datasets(name, bases=(), **members):
    """A class as the library datasets has it, which is not installed here."""
    return type(name, bases, {"__module__": "datasets.arrow_dataset", **members})


class _Feature:
    pass


_FEATURES = {"label": _Feature(), "photo": type("Image", (_Feature,), {})()}
_DATASET = _datasets(
    "Dataset",
    column_names=["label", "photo"],
    features=_FEATURES,
    __len__=lambda self: 1,
    __getitem__=lambda self, name: [Image.fromarray(RGB)] if name == "photo" else [1],
)
_STREAM = _datasets("IterableDataset", column_names=["label", "photo"], features=_FEATURES)
_SPLITS = _datasets("DatasetDict", (dict,), column_names={"train": ["label", "photo"]})
_UNSAID = _datasets("Dataset", column_names=["a", "b"], features=None, __len__=lambda self: 1)


@pytest.mark.parametrize(
    ("X", "advice"),
    [
        (_DATASET(), r'Pass X\["photo"\]'),
        (_SPLITS(train=_DATASET()), r'Pass X\["train"\]\["photo"\]'),
        (_STREAM(), r'Pass \[row\["photo"\] for row in X\]'),
        (_UNSAID(), r"columns \['a', 'b'\]. Pass X\[\"NAME\"\]"),
    ],
    ids=["dataset", "splits", "stream", "no-image"],
)
def test_whole_dataset_is_one_error_that_names_the_column(X, advice):
    with pytest.raises(TypeError, match=advice):
        as_items(X)


def test_column_of_a_dataset_is_read():
    column = _datasets(
        "Column", (Sequence,), __len__=lambda self: 1, __getitem__=lambda self, index: [Image.fromarray(RGB)][index]
    )
    for images in (_DATASET()["photo"], column()):
        torch.testing.assert_close(as_items(images).load(0), CHANNELS_FIRST)


# Digests.


def test_digest_of_path_and_bytes_is_that_of_the_content(path):
    items = as_items([path, PNG, Path(path), bytearray(PNG)])
    assert len({items.digest(row) for row in range(4)}) == 1
    assert len(items.digest(0)) == 16
    assert items.digest(0, seed=1) != items.digest(0)
    Path(path).write_bytes(encode(colours(), "PNG"))
    assert items.digest(0) != items.digest(1)


def test_digest_tells_apart_what_looks_different():
    zeros = np.zeros((4, 6), np.uint8)
    palette = Image.fromarray(RGB).quantize(8)
    repainted = palette.copy()
    repainted.putpalette(palette.getpalette()[::-1])
    turned = Image.fromarray(RGB)
    turned.getexif()[0x0112] = 6
    see_through = Image.fromarray(RGB)
    see_through.info["transparency"] = (0, 0, 0)
    elements = [
        zeros,
        zeros.reshape(6, 4),
        zeros.astype(bool),
        zeros[..., None],
        torch.zeros(1, 4, 6, dtype=torch.uint8),
        zeros.tobytes(),
        Image.fromarray(zeros),
        Image.fromarray(zeros.reshape(6, 4)),
        palette,
        repainted,
        Image.fromarray(RGB),
        turned,
        see_through,
        RGB,
    ]
    digests = [as_items([element]).digest(0) for element in elements]
    digests.append(as_items([zeros], pixel_range=(0, 1)).digest(0))
    digests.append(as_items(zeros.reshape(1, 24), image_shape=(4, 6)).digest(0))
    assert len(set(digests)) == len(elements) + 2


def test_digest_is_that_of_equal_pixels_whatever_their_memory():
    forms = [RGB, np.asfortranarray(RGB), RGB[::-1].copy()[::-1], np.stack([RGB, RGB])[1]]
    assert len({as_items([form]).digest(0) for form in forms}) == 1
    assert as_items(np.stack([RGB, RGB])).digest(1) == as_items([RGB]).digest(0)
    assert len({ArrayItem(tensor).digest() for tensor in (CHANNELS_FIRST, CHANNELS_FIRST.contiguous())}) == 1


def test_pil_image_that_is_lazy_is_read_by_many_threads(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_bytes(encode(RGB, "JPEG", quality=95))
    expected = as_items([tmp_path / "a"]).load(0)
    images = [Image.open(tmp_path / name) for name in "abcd"] * 25
    items = as_items(images)
    assert items[0].source == str(tmp_path / "a")
    with ThreadPoolExecutor(8) as pool:
        for loaded in pool.map(items.load, range(100)):
            np.testing.assert_array_equal(loaded, expected)
        assert len(set(pool.map(items.digest, range(100)))) == 1


def is_held(lock) -> bool:
    """Whether another thread would have to wait for it."""

    def try_to_enter() -> bool:
        return lock.acquire(blocking=False) and not lock.release()

    with ThreadPoolExecutor(1) as pool:
        return not pool.submit(try_to_enter).result()


def test_pil_image_is_loaded_by_one_thread_at_a_time(monkeypatch):
    image = Image.open(io.BytesIO(PNG))
    item, load, locked = as_items([image])[0], image.load, []

    def watched_load():
        locked.append(is_held(_lock_of(image)))
        return load()

    monkeypatch.setattr(image, "load", watched_load)
    item.load()
    item.digest()
    assert locked
    assert all(locked)


def test_pil_image_that_is_closed_fails_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    image = Image.open(tmp_path / "a.png")
    image.close()
    with pytest.raises(ImageError, match=r"^X\[0\] \('.*a.png'\) is not a readable image"):
        as_items([image]).load(0)


# Watched items.


def test_watched_items_tell_the_content_of_every_file_that_is_read(path):
    told = []
    items = WatchedItems(as_items([path, PNG, path]), 5, lambda row, content: told.append((row, content.digest)))
    digest = as_items([path]).digest(0, seed=5)
    torch.testing.assert_close(items.load(0), CHANNELS_FIRST)
    assert items.digest(2, seed=1) == as_items([path]).digest(0, seed=1)
    items[1:].load(1)
    items[::-1].load(0)
    assert told == [(0, digest), (2, digest), (2, digest), (2, digest)]


def test_watched_items_tell_of_the_bytes_that_the_pixels_are_made_of(path, monkeypatch):
    told = []
    inner = WatchedItems(as_items([path]), 0, lambda row, content: told.append(content.digest))
    outer = WatchedItems(inner, 1, lambda row, content: told.append(content.digest))
    reads = []
    read = PathItem._read
    monkeypatch.setattr(PathItem, "_read", lambda self: reads.append(1) or read(self))
    outer.load(0)
    assert len(reads) == 1
    assert told == [as_items([PNG]).digest(0, seed=0), as_items([PNG]).digest(0, seed=1)]
