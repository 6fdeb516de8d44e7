"""Whatever X is, as a sequence of pictures that are read one by one when they are needed."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, overload

from featx.exceptions import REMOVE_IT, ImageError, UnreadableImage
from featx.images.arrays import ArrayItem
from featx.images.elements import check_as_a_whole, elements_of
from featx.images.items import Item, PathItem, item_from, path_in
from featx.images.reading import Content, PixelRange, Reading

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 178956970  # what Pillow takes for the limit between a photo and an attack

_PATHS = (str, os.PathLike)


class Items(Sequence[Item]):
    """The rows of X as items, made when they are asked for.

    Parameters
    ----------
    elements : sequence
        Anything with a length and positional indexing.
    rows : sequence of int or None, default=None
        Which elements, None for all.
    **options
        `image_shape` (complete), `max_pixels`, `raw`, `short_side`, `storage_options`, `remedy` as in :func:`as_items`,
        and `reading`.
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
        """Pixels of one item, by its position in this sequence.

        Returns
        -------
        Tensor of shape (3, height, width)
            uint8 in 0..255 or float32.

        Raises
        ------
        ImageError
            Naming the row of the X that this sequence was first made of, and the file.
        """
        item = self._to_load(row)
        try:
            return item.load()
        except UnreadableImage as error:
            self._fail(row, item, error)

    def load_with_contents(self, row: int, *seeds: int) -> tuple[torch.Tensor, tuple[Content, ...]]:
        """Pixels as from :meth:`load`, and of a file the content of the same bytes under each seed.

        Nothing but files changes while it is looked at; for the rest there are no contents.
        """
        item = self._to_load(row)
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
            is_path = isinstance(element, _PATHS)
            yield os.fsdecode(element) if is_path else path_in(element) if isinstance(element, dict) else None

    @property
    def originals(self) -> Items | None:
        """Items whose digests decide those of these, row by row, by :meth:`altered`; None where they are their own."""
        return None

    def altered(self, digest: bytes) -> bytes:
        """Digest of one of these, given its original's."""
        return digest

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
        item = self[row]
        try:
            return item.digest(seed)
        except UnreadableImage as error:
            self._fail(row, item, error)

    def contents(self, row: int, *seeds: int) -> tuple[Content, ...]:
        """What is known of one item without decoding it, under each seed; errors as of :meth:`digest`."""
        item = self[row]
        try:
            if isinstance(item, PathItem):
                return item.contents(*seeds)
            return tuple([Content(item.digest(seed)) for seed in seeds])
        except UnreadableImage as error:
            self._fail(row, item, error)

    def _to_load(self, row: int) -> Item:
        """An item whose values are noted as of its row."""
        options = self._options | {"reading": self.reading.at(self._rows[row])}
        return _item(self._elements[self._rows[row]], **options)

    def _fail(self, row: int, item: Item, error: UnreadableImage) -> NoReturn:
        remedy = self._options["remedy"]
        raise ImageError.at(self._rows[row], item.source, str(error), remedy, error.advice) from error


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
    remedy: str = REMOVE_IT,
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
    remedy : str, default=REMOVE_IT
        What to do about an image that cannot be read, for its message.

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
        elements = elements_of(X, raw)
    else:
        elements, image_shape = X, _resolve_image_shape(image_shape, X.shape[1], raw)
    if len(elements) == 0:
        raise ValueError("At least one image is expected, got X with 0 sample(s). Check what was selected.")
    check_as_a_whole(elements, pixel_range, raw)
    return Items(
        elements,
        image_shape=image_shape,
        reading=Reading(pixel_range, fourth_band, full_depth),
        max_pixels=max_pixels,
        raw=raw,
        short_side=short_side,
        storage_options=storage_options,
        remedy=remedy,
    )


def _item(
    element: Any, *, image_shape: tuple[int, ...] | None, reading: Reading, raw: bool, remedy: str, **encoded: Any
) -> Item:
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
