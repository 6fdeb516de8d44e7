"""Whatever X is, as a sequence of pictures that are read one by one when they are needed."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from featx.exceptions import ImageError, UnreadableImage
from featx.images.items import ArrayItem, Item, PathItem, is_a, is_encoded, item_from, path_in
from featx.images.reading import Content, PixelRange, Reading

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 178956970  # what Pillow takes for the limit between a photo and an attack

_PATHS = (str, os.PathLike)

_ACCEPTED = (
    "a list, array, Series or one-column frame of paths, bytes, open files, PIL images or arrays, an (n, height, "
    "width[, channels]) array or an (n, channels, height, width) torch tensor"
)
_ADVICE = 'Remove it, or set on_error="nan".'


class Items(Sequence[Item]):
    """The rows of X as items, made when they are asked for.

    Parameters
    ----------
    elements : sequence
        Anything with a length and positional indexing.
    rows : sequence of int or None, default=None
        Which elements, None for all.
    **options
        `image_shape` (complete), `max_pixels`, `raw`, `short_side`, `storage_options` as in :func:`as_items`, and
        `reading`.
    """

    def __init__(self, elements: Any, rows: Sequence[int] | None = None, **options: Any) -> None:
        self._elements = elements
        self._rows = range(len(elements)) if rows is None else rows
        self._options = options

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Items: ...
    def __getitem__(self, index: int | slice) -> Item | Items:
        if isinstance(index, slice):
            return Items(self._elements, self._rows[index], **self._options)
        return _item(self._elements[self._rows[index]], **self._options)

    @property
    def is_keyed(self) -> bool:
        """Whether digests tell all that pixels depend on."""
        return True

    @property
    def reading(self) -> Reading:
        """How pictures are read that can be read in more than one way."""
        found: Reading = self._options["reading"]
        return found

    @property
    def short_side(self) -> int | None:
        """Pixels that are enough for encoded images; None where they are read in full."""
        found: int | None = self._options["short_side"]
        return found

    def take(self, rows: Iterable[int]) -> Items:
        """Some of the items, in the order asked for."""
        return Items(self._elements, [self._rows[row] for row in rows], **self._options)

    def read_at(self, short_side: int | None) -> Items:
        """The same, encoded images at another scale."""
        return Items(self._elements, self._rows, **(self._options | {"short_side": short_side}))

    def load(self, row: int) -> torch.Tensor:
        """Pixels of one item.

        Parameters
        ----------
        row : int
            Position in this sequence.

        Returns
        -------
        Tensor of shape (3, height, width)
            uint8 in 0..255 or float32.

        Raises
        ------
        ImageError
            Naming the row of the X that this sequence was first made of, and the file.
        """
        item = self[row]
        try:
            return item.load()
        except UnreadableImage as error:
            self._fail(row, item, error)

    def load_with_contents(self, row: int, *seeds: int) -> tuple[torch.Tensor, tuple[Content, ...]]:
        """Pixels as from :meth:`load`, and of a file the content of the same bytes under each seed.

        Nothing but files changes while it is looked at; for the rest there are no contents.
        """
        item = self[row]
        if not isinstance(item, PathItem):
            return self.load(row), ()
        try:
            return item.load_with_contents(*seeds)
        except UnreadableImage as error:
            self._fail(row, item, error)

    def iter_paths(self) -> Iterator[str | None]:
        """Path of every item that is a file, None for the others; faster than making the items."""
        for row in self._rows:
            element = self._elements[row]
            yield os.fsdecode(element) if isinstance(element, _PATHS) else path_in(element)

    def original_row(self, row: int) -> int:
        """Position of an item in the X that this sequence was first made of."""
        return self._rows[row]

    def digest(self, row: int, seed: int = 0) -> bytes:
        """Digest of one item.

        Parameters
        ----------
        row : int
            Position in this sequence.
        seed : int, default=0
            Another seed gives unrelated digests.

        Returns
        -------
        bytes
            16 of them.

        Raises
        ------
        ImageError
            As from :meth:`load`.
        """
        return self.reading.digest_of(*self.contents(row, seed))

    def contents(self, row: int, *seeds: int) -> tuple[Content, ...]:
        """What is known of one item without decoding it, under each seed; errors as of :meth:`digest`."""
        item = self[row]
        try:
            if isinstance(item, PathItem):
                return item.contents(*seeds)
            return tuple(Content(item.digest(seed)) for seed in seeds)
        except UnreadableImage as error:
            self._fail(row, item, error)

    def _fail(self, row: int, item: Item, error: UnreadableImage) -> NoReturn:
        original = self._rows[row]
        where = f"X[{original}]" if item.source is None else f"X[{original}] ({item.source!r})"
        message = f"{where} is not a readable image: {error}. {error.advice or _ADVICE}"
        told = {"reason": str(error), "advice": error.advice}
        raise ImageError(message, row=original, source=item.source, **told) from error


def as_items(
    X: Any,
    *,
    image_shape: tuple[int, ...] | None = None,
    pixel_range: PixelRange = "auto",
    fourth_band: str = "alpha",
    full_depth: bool = False,
    max_pixels: int = MAX_PIXELS,
    raw: bool = False,
    short_side: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Items:
    """X as a sequence of items.

    Looks at what X is, not at the files it names. What is wrong with one row is raised when that row is loaded.

    Parameters
    ----------
    X : list, ndarray, Series, frame or Tensor
        A sequence or column of paths, bytes, open files, PIL images, arrays or tensors; an ndarray of shape
        (n, height, width[, channels]); a Tensor of shape (n, channels, height, width). With `image_shape` an ndarray
        of shape (n, n_features), already validated.
    image_shape : tuple of int or None, default=None
        Layout of a row of a 2-D X: (height, width) or (height, width, channels), -1 at most once.
    pixel_range : "auto" or (float, float), default="auto"
        The values that stand for black and white, in arrays and in files of more than 8 bits a sample.
    fourth_band : {"alpha", "ignore"}, default="alpha"
        What a fourth band beside three colours is: transparency, laid over white, or nothing of interest.
    full_depth : bool, default=False
        Whether files of more than 8 bits a sample become floats under "auto" as well.
    max_pixels : int, default=178956970
        Width times height above which an encoded image is refused before it is decoded.
    raw : bool, default=False
        Whether X holds what the network takes: only arrays and tensors, given on as they are.
    short_side : int or None, default=None
        Pixels that are enough: a JPEG is then read at its smallest built-in scale that has as many.
    storage_options : mapping or None, default=None
        Lets URLs be opened, through fsspec with these options.

    Returns
    -------
    Items
        As many as X has rows.

    Raises
    ------
    TypeError
        X is nothing that could hold images.
    ValueError
        X as a whole cannot be read as images.
    """
    _check_pixel_range(pixel_range)
    if image_shape is None:
        elements = _elements(X, raw)
    else:
        elements, image_shape = X, _resolve_image_shape(image_shape, X.shape[1], raw)
    if len(elements) == 0:
        raise ValueError("At least one image is expected, got X with 0 sample(s). Check what was selected.")
    _check_as_a_whole(elements, pixel_range, raw)
    return Items(
        elements,
        image_shape=image_shape,
        reading=Reading(pixel_range, fourth_band, full_depth),
        max_pixels=max_pixels,
        raw=raw,
        short_side=short_side,
        storage_options=storage_options,
    )


def _item(element: Any, *, image_shape: tuple[int, ...] | None, reading: Reading, raw: bool, **encoded: Any) -> Item:
    if image_shape is not None:
        return ArrayItem(element.reshape(image_shape), reading, stretch=True, raw=raw)
    return item_from(element, reading=reading, raw=raw, **encoded)


def _check_pixel_range(pixel_range: PixelRange) -> None:
    if pixel_range == "auto":
        return
    pair = () if isinstance(pixel_range, str) else tuple(pixel_range)
    numbers_only = len(pair) == 2 and all(isinstance(end, numbers.Real) and math.isfinite(end) for end in pair)
    if not (numbers_only and pair[0] < pair[1]):
        raise ValueError(
            f'"auto" or (low, high) with low below high is expected, got pixel_range={pixel_range!r}. Pass the values '
            "that stand for black and white."
        )


def _resolve_image_shape(image_shape: tuple[int, ...], n_features: int, raw: bool) -> tuple[int, ...]:
    sides = [side for side in image_shape if side != -1]
    valid = (
        all(isinstance(side, numbers.Integral) for side in sides)
        and len(image_shape) in (2, 3)
        and len(image_shape) - len(sides) <= 1
        and all(side > 0 for side in sides)
    )
    if not valid:
        raise ValueError(
            "(height, width) or (height, width, channels) with -1 at most once is expected, got "
            f"image_shape={image_shape!r}."
        )
    known = math.prod(sides)
    missing, rest = divmod(n_features, known)
    if rest or (len(sides) == len(image_shape) and missing != 1) or missing == 0:
        raise ValueError(
            f"An image shape that holds n_features={n_features} values is expected, got image_shape={image_shape!r}. "
            "Pass the height and width of the images that the rows of X were made of."
        )
    shape = tuple(missing if side == -1 else side for side in image_shape)
    if len(shape) == 3 and shape[2] not in (1, 3, 4) and not raw:
        raise ValueError(f"1, 3 or 4 channels are expected, got image_shape={image_shape!r}. Channels come last.")
    return shape


def _elements(X: Any, raw: bool) -> Any:
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


def _check_as_a_whole(elements: Any, pixel_range: PixelRange, raw: bool) -> None:
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
