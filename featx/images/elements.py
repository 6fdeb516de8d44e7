"""What X is: a sequence or column with one image in each place, or an error that says what to pass."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from featx.images.items import is_a, is_encoded
from featx.images.reading import PixelRange

if TYPE_CHECKING:
    import torch

_ACCEPTED = (
    "a list, array, Series or one-column frame of paths, bytes, open files, PIL images or arrays, an (n, height, "
    "width[, channels]) array or an (n, channels, height, width) torch tensor"
)


def elements_of(X: Any, raw: bool) -> Any:
    """What X holds one image each of, with a length and positional indexing.

    Parameters
    ----------
    X : object
        As of :func:`featx.images.sources.as_items`, without `image_shape`.
    raw : bool

    Raises
    ------
    TypeError, ValueError
        X is nothing that could hold images, or another form of it.
    """
    if isinstance(X, np.ndarray):
        return _elements_of_array(X, raw)
    if is_a(X, "torch", "Tensor"):
        return _checked_tensor(X, raw)
    if is_a(X, "pandas", "DataFrame") or is_a(X, "polars", "DataFrame"):
        return _elements_of_column(_only_column(X))
    if is_a(X, "pandas", "Series") or is_a(X, "polars", "Series"):
        return _elements_of_column(X)
    if is_a(X, "pandas", "Index") or is_a(X, "pandas.api.extensions", "ExtensionArray"):
        return _elements_of_array(np.asarray(X, dtype=object), raw)
    _refuse_dataset(X)
    if is_encoded(X) or is_a(X, "PIL.Image", "Image"):
        raise TypeError(f"A sequence of images is expected, got one {type(X).__name__}. Wrap it in a list: [X].")
    if isinstance(X, Sequence):
        return _elements_of_sequence(X, raw)
    raise TypeError(f"Images are expected as {_ACCEPTED}; got X of type {type(X).__name__}.")


def _refuse_dataset(X: Any) -> None:
    """Raise where X is a whole data set of Hugging Face's datasets, of which one column holds the images."""
    names = getattr(X, "column_names", None)
    if type(X).__module__.partition(".")[0] != "datasets" or isinstance(X, Sequence) or not names:
        return
    split, where = (X, "X") if not isinstance(names, Mapping) else (X[next(iter(names))], f'X["{next(iter(names))}"]')
    features = getattr(split, "features", None) or {}
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    column = images[0] if images else "NAME"
    advice = f'{where}["{column}"]' if isinstance(split, Sized) else f'[row["{column}"] for row in {where}]'
    raise TypeError(
        f"A column of images is expected, got X of type {type(X).__name__} of datasets with the columns {names}. "
        f"Pass {advice}."
    )


def _elements_of_sequence(X: Sequence[Any], raw: bool) -> Any:
    if not any(isinstance(element, list | tuple) for element in islice(X, 1)):
        return X
    if all(isinstance(row, list | tuple) and len(row) == 1 and not _is_number(row[0]) for row in X):
        return [row[0] for row in X]
    shapes = [_nested_shape(row) for row in X]
    odd = next((row for row, shape in enumerate(shapes) if shape is None or shape != shapes[0]), None)
    if odd is not None:
        raise ValueError(
            f"Rows of one shape are expected, got a ragged list: X[{odd}] has {_told(shapes[odd])}, X[0] has "
            f"{_told(shapes[0])}. Make images of different sizes arrays, in a list."
        )
    return _elements_of_array(np.asarray(X), raw)


def _nested_shape(row: Any) -> tuple[int, ...] | None:
    try:
        return np.shape(row)
    except ValueError:
        return None


def _told(shape: tuple[int, ...] | None) -> str:
    return "rows of several lengths" if shape is None else f"shape {shape}"


def _elements_of_array(X: NDArray[Any], raw: bool) -> Any:
    if X.ndim == 0:
        raise TypeError(f"Images are expected as {_ACCEPTED}; got X={X!r}, a single value.")
    if X.dtype.kind == "S":
        raise ValueError(
            f"Paths or encoded images are expected, got X of dtype {X.dtype}, which could be either. Use "
            "X.astype(str) for paths and an array of dtype object for the contents of files."
        )
    if X.dtype.kind in "OUT":
        return _column_of_array(X)
    if X.dtype.kind not in "buif":
        raise ValueError(f"Pixels are expected as numbers, got X of dtype {X.dtype}. Convert them first.")
    return _checked_pixels(X, raw)


def _column_of_array(X: NDArray[Any]) -> NDArray[Any]:
    if X.ndim == 1 or len(X) == 0:
        return X
    if all(_is_number(value) for value in X.flat):
        if X.ndim == 2:
            _refuse_table(X.shape)
        raise ValueError(f"Pixels are expected as numbers, got X of dtype {X.dtype}. Use X.astype(numpy.uint8).")
    if X.ndim == 2 and X.shape[1] == 1:
        return X[:, 0]
    _refuse_columns(f"X of shape {X.shape}")


def _checked_pixels(X: NDArray[Any], raw: bool) -> NDArray[Any]:
    if X.ndim == 1 and len(X):
        raise ValueError(f"Images are expected as {_ACCEPTED}; got X of shape {X.shape}, a row of numbers.")
    if X.ndim == 2 and len(X):
        _refuse_table(X.shape)
    if X.ndim > 4:
        raise ValueError(f"(n, height, width[, channels]) is expected, got X of shape {X.shape}. Take one axis away.")
    if X.ndim == 3 and X.shape[2] in (3, 4):
        raise ValueError(
            f"A sequence of images is expected, got X of shape {X.shape}, which looks like one image. Wrap it in a "
            "list: [X]. If it holds grey images, add an axis: X[..., None]."
        )
    if X.ndim == 4:
        _check_channels_last(X.shape, raw)
    return X


def _check_channels_last(shape: tuple[int, ...], raw: bool) -> None:
    if shape[3] in (1, 3, 4):
        return
    if shape[1] in (1, 3, 4):
        raise ValueError(
            f"(n, height, width, channels) is expected, got X of shape {shape}, which looks channels-first. Pass "
            "numpy.moveaxis(X, 1, -1) or torch.from_numpy(X)."
        )
    if not raw:
        raise ValueError(f"1, 3 or 4 channels are expected, got X of shape {shape}. Channels come last.")


def _checked_tensor(X: torch.Tensor, raw: bool) -> torch.Tensor:
    shape = tuple(X.shape)
    if len(shape) == 2 and len(X):
        _refuse_table(shape)
    if len(shape) != 4:
        raise ValueError(
            f"A tensor of shape (n, channels, height, width) is expected, got X of shape {shape}. Use X[None] for one "
            "image, X[:, None] for grey images."
        )
    if shape[1] not in (1, 3, 4) and not raw:
        raise ValueError(f"1, 3 or 4 channels are expected, got X of shape {shape}. In a tensor channels come first.")
    return X


def _only_column(X: Any) -> Any:
    is_pandas = is_a(X, "pandas", "DataFrame")
    columns = [X.iloc[:, column] if is_pandas else X.to_series(column) for column in range(X.shape[1])]
    if columns and all(_is_numeric(column) for column in columns):
        _refuse_table(X.shape)
    if len(columns) != 1:
        _refuse_columns(f"a frame with the columns {list(X.columns)}")
    return columns[0]


def _elements_of_column(column: Any) -> Any:
    if _is_numeric(column) and len(column):
        raise ValueError(
            f"Paths, bytes or images are expected, got a column X={column.name!r} of numbers ({column.dtype}). Pick "
            "another column."
        )
    # pandas looks labels up when a Series is indexed; its array goes by position, as polars does.
    return column.array if is_a(column, "pandas", "Series") else column


def _is_numeric(column: Any) -> bool:
    if is_a(column, "pandas", "Series"):
        return getattr(column.dtype, "kind", "O") in "buifc"
    return bool(column.dtype.is_numeric()) or str(column.dtype) == "Boolean"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number | np.bool_)


def _refuse_table(shape: tuple[int, ...]) -> NoReturn:
    raise ValueError(
        f"Images are expected, got X of shape {tuple(shape)}, a table of numbers. If each row is a flattened image, "
        "set image_shape=(height, width) or (height, width, channels)."
    )


def _refuse_columns(got: str) -> NoReturn:
    raise ValueError(
        f"One column of images is expected, got {got}. Pick the column, for example with scikit-learn's "
        "ColumnTransformer."
    )


def check_as_a_whole(elements: Any, pixel_range: PixelRange, raw: bool) -> None:
    """Raise what is wrong with all images alike.

    Raises
    ------
    ValueError
    """
    dtype = str(getattr(elements, "dtype", "")).removeprefix("torch.")
    shape = tuple(getattr(elements, "shape", ()))
    if len(shape) > 1 and 0 in shape[1:]:
        raise ValueError(f"Images of at least one pixel are expected, got X of shape {shape}.")
    if len(shape) > 1 and pixel_range == "auto" and not raw and "int" in dtype and dtype != "uint8":
        raise ValueError(
            f'Pixels of dtype uint8, bool or float are expected under pixel_range="auto", got X of dtype {dtype}. Pass '
            "pixel_range=(low, high), the values that stand for black and white."
        )
    if raw and len(shape) <= 1 and any(not _is_pixels(element) for element in elements):
        raise ValueError(
            "Arrays or tensors are expected with preprocess=None, got X with paths, encoded or PIL images. Set "
            'preprocess="weights", or pass a callable.'
        )


def _is_pixels(element: Any) -> bool:
    # Missing and odd elements are left to their rows.
    return not is_encoded(element) and not is_a(element, "PIL.Image", "Image")
