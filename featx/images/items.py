"""One row of X each: a picture that is read when it is needed, and its digest."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from featx.exceptions import UnreadableImage
from featx.images.arrays import ArrayItem
from featx.images.opening import traits_of, traits_of_image
from featx.images.reading import Content, Reading, digest_under
from featx.images.remote import Unreachable, fetch, is_url
from featx.system.locks import ForkSafeLock

if TYPE_CHECKING:
    import torch
    from PIL import Image

_USUAL = Reading()
_CONVERT = "Pass one of these instead."
_REASONS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "permission denied",
    errno.ENAMETOOLONG: "the name is too long for a file",
    errno.EPERM: "permission denied",
    errno.ELOOP: "its links go round in a circle",
    **{number: os.strerror(number) for number in (errno.EINVAL, errno.EILSEQ, errno.ENXIO)},  # what a name cannot be
}
# Pillow loads a lazily opened image on first use, and an open file has one place: two threads must not do that at once.
# A few locks for all instead of one each: an image cannot carry one, and a table of them would outlive the images.
_LOCKS = tuple(ForkSafeLock() for _ in range(64))


class Item(Protocol):
    """One picture of X, not read before it is asked for.

    Both methods raise :class:`featx.exceptions.UnreadableImage` with the reason in plain words.
    """

    @property
    def source(self) -> str | None:
        """The file it comes from, for messages."""

    @property
    def stretch(self) -> bool:
        """Whether it is a row of a 2-D X, to be stretched to the network's input and never cropped."""

    def load(self) -> torch.Tensor:
        """Pixels of shape (3, height, width): uint8 in 0..255, or float32 nominally in 0..1, never clipped."""

    def digest(self, seed: int = 0) -> bytes:
        """16 bytes that stand for the picture: equal content, equal digest."""


@dataclass(frozen=True, slots=True)
class PathItem:
    """A picture in a file; see :func:`featx.images.decoding.decode` for the options.

    Where ``storage_options`` is a mapping, the file may be a URL.
    """

    path: str | os.PathLike[str]
    max_pixels: int
    short_side: int | None = None
    storage_options: Mapping[str, Any] | None = None
    reading: Reading = _USUAL

    stretch = False

    @property
    def source(self) -> str:
        """The path as it was given."""
        return os.fsdecode(self.path)

    def load(self) -> torch.Tensor:
        """Decode the file."""
        return self._decoded(self._read())[0]

    def digest(self, seed: int = 0) -> bytes:
        """Digest of the file's bytes, and where they leave it open, of how they are read."""
        return self.reading.digest_of(*self.contents(seed))

    def contents(self, *seeds: int) -> tuple[Content, ...]:
        """What the file holds, read once and under each seed."""
        return _contents(self._read(), *seeds)

    def digest_of_bytes(self, seed: int = 0) -> bytes:
        """Digest of the bytes of a file that need not be a picture."""
        return digest_under(seed, "file", self._read())

    def load_with_contents(self, *seeds: int) -> tuple[torch.Tensor, tuple[Content, ...]]:
        """Pixels and content of the same bytes, whoever writes to the file meanwhile."""
        pixels, data = self._decoded(self._read())
        return pixels, _contents(data, *seeds)

    def _decoded(self, data: bytes) -> tuple[torch.Tensor, bytes]:
        """Pixels, and the bytes that they are made of: of a URL those of a second try where the first are broken."""
        try:
            return self._decode(data), data
        except UnreadableImage:
            if not is_url(self.source) or (again := self._read()) == data:
                raise
            return self._decode(again), again

    def _decode(self, data: bytes) -> torch.Tensor:
        return _decode(data, self.max_pixels, self.short_side, self.reading)

    def _read(self) -> bytes:
        if is_url(self.source):
            if self.storage_options is None:
                raise UnreadableImage("URLs are not opened", "Pass a local file, or set storage_options={}.")
            return fetch(self.source, self.storage_options)
        try:
            mode = os.stat(self.source).st_mode
            if stat.S_ISDIR(mode):
                raise UnreadableImage("it is a directory")
            if not stat.S_ISREG(mode):  # opening a FIFO waits for its writer, perhaps for ever
                raise UnreadableImage("not a regular file but a FIFO, socket or device")
            with open(self.source, "rb") as file:
                return file.read()
        except OSError as error:
            if error.errno in _REASONS:
                raise UnreadableImage(_REASONS[error.errno]) from error
            raise Unreachable(error.strerror or str(error)) from error  # the disk, the network or the process
        except ValueError as error:
            if isinstance(error, UnreadableImage):
                raise
            raise UnreadableImage(f"not the name of a file ({error})") from error


@dataclass(frozen=True, slots=True)
class BytesItem:
    """A picture as the bytes of an image file; options as of a :class:`PathItem`."""

    data: bytes
    max_pixels: int
    short_side: int | None = None
    reading: Reading = _USUAL
    source: str | None = None

    stretch = False

    def load(self) -> torch.Tensor:
        """Decode the bytes."""
        return _decode(self.data, self.max_pixels, self.short_side, self.reading)

    def digest(self, seed: int = 0) -> bytes:
        """Digest of the bytes, the same as that of a file with this content."""
        return self.reading.digest_of(*_contents(self.data, seed))


@dataclass(frozen=True, slots=True)
class OpenFileItem:
    """A picture in a file that is open, or in a buffer; read from its beginning, and left at the place where it is.

    Options as of a :class:`PathItem`.
    """

    file: Any
    max_pixels: int
    short_side: int | None = None
    reading: Reading = _USUAL

    stretch = False

    @property
    def source(self) -> str | None:
        """The file's name, None for a buffer."""
        name = getattr(self.file, "name", None)
        return name if isinstance(name, str) else None

    def load(self) -> torch.Tensor:
        """Decode the file."""
        return self._bytes().load()

    def digest(self, seed: int = 0) -> bytes:
        """Digest of the bytes, as of a :class:`BytesItem`."""
        return self._bytes().digest(seed)

    def _bytes(self) -> BytesItem:
        return BytesItem(self._read(), self.max_pixels, self.short_side, self.reading)

    def _read(self) -> bytes:
        with _lock_of(self.file):
            try:
                place = self.file.tell()
                self.file.seek(0)
                try:
                    data = self.file.read()
                finally:
                    self.file.seek(place)
            except (OSError, ValueError, AttributeError) as error:  # closed, a stream, for writing only
                raise UnreadableImage(
                    f"a file that cannot be read from its beginning ({error})",
                    "Pass its path, or the bytes that it gives.",
                ) from error
        if not isinstance(data, bytes | bytearray):
            raise UnreadableImage("a file that is open as text", 'Open it with mode "rb", or pass its path.')
        return bytes(data)


@dataclass(frozen=True, slots=True)
class PILItem:
    """A picture as a Pillow image, which stays as it is apart from being loaded."""

    image: Image.Image
    max_pixels: int
    reading: Reading = _USUAL

    stretch = False

    @property
    def source(self) -> str | None:
        """The file that Pillow opened, None for an image made in memory."""
        name = getattr(self.image, "filename", None)
        return os.fsdecode(name) if name else None

    def load(self) -> torch.Tensor:
        """Convert the pixels to RGB."""
        from featx.images.decoding import rgb_from_pil

        with _lock_of(self.image):
            return rgb_from_pil(self.image, max_pixels=self.max_pixels, reading=self.reading)

    def digest(self, seed: int = 0) -> bytes:
        """Digest of the pixels, of what decides their looks, and where it is left open, of how they are read."""
        from featx.images.decoding import content_of_pil

        with _lock_of(self.image):
            looks, pixels = content_of_pil(self.image, max_pixels=self.max_pixels)
            traits = traits_of_image(self.image)
        return self.reading.digest_of(Content(digest_under(seed, f"pil {looks}", pixels), traits))


@dataclass(frozen=True, slots=True)
class BrokenItem:
    """A row of X that is no picture at all."""

    reason: str
    advice: str | None = None

    source = None
    stretch = False

    def load(self) -> torch.Tensor:
        """Raise the reason."""
        raise UnreadableImage(self.reason, self.advice)

    def digest(self, seed: int = 0) -> bytes:
        """Raise the reason."""
        raise UnreadableImage(self.reason, self.advice)


def item_from(
    element: Any,
    *,
    reading: Reading,
    max_pixels: int,
    raw: bool,
    short_side: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Item:
    """The item for one element of X, whatever the element is.

    Parameters
    ----------
    element : object
        A path, bytes, an open file, a mapping with one of them under "bytes" or "path", a Pillow image, array or
        tensor; anything else becomes a :class:`BrokenItem`.
    reading : Reading
        How it is read where there is a choice.
    max_pixels : int
        Size limit of encoded and Pillow images.
    raw : bool
        Whether arrays and tensors are taken as they are.
    short_side : int or None, default=None
        Pixels that are enough for encoded images.
    storage_options : mapping or None, default=None
        Lets URLs be opened.

    Returns
    -------
    Item
        Nothing has been read yet.
    """
    if isinstance(element, str | os.PathLike):
        return PathItem(element, max_pixels, short_side, storage_options, reading)
    if isinstance(element, bytes | bytearray | memoryview):
        return BytesItem(bytes(element), max_pixels, short_side, reading)
    if is_a(element, "PIL.Image", "Image"):
        return PILItem(element, max_pixels, reading)
    if isinstance(element, np.ndarray) or is_a(element, "torch", "Tensor"):
        return ArrayItem(element, reading, raw=raw)
    if is_open_file(element):
        return OpenFileItem(element, max_pixels, short_side, reading)
    if isinstance(element, Mapping):
        data, path = _in_mapping(element)
        if data is not None:
            return BytesItem(bytes(data), max_pixels, short_side, reading, path)
        if path is not None:
            return PathItem(path, max_pixels, short_side, storage_options, reading)
    if is_missing(element):
        return BrokenItem("a missing value")
    return BrokenItem(f"{_named(element)}, which is no path, bytes, open file, PIL image, array or tensor", _CONVERT)


def path_in(element: Mapping[Any, Any]) -> str | None:
    """The path in an element of X that is a mapping, where it is no more than that."""
    data, path = _in_mapping(element)
    return path if data is None else None


def is_encoded(element: Any) -> bool:
    """Whether an element of X is a file in some form, which has to be decoded."""
    if isinstance(element, Mapping):
        return _in_mapping(element) != (None, None)
    return isinstance(element, str | os.PathLike | bytes | bytearray | memoryview) or is_open_file(element)


def is_open_file(value: object) -> bool:
    """Whether something can be read like a file, such as a ``BytesIO``."""
    return callable(getattr(value, "read", None)) and callable(getattr(value, "seek", None))


def _in_mapping(element: Mapping[Any, Any]) -> tuple[Any, str | None]:
    """Bytes and path in a mapping of the form of Hugging Face's Image feature; where there are no bytes, None."""
    data, path = element.get("bytes"), element.get("path")
    if data is not None and not isinstance(data, bytes | bytearray | memoryview):
        return None, None
    return data, os.fsdecode(path) if isinstance(path, str | os.PathLike) else None


def _named(element: object) -> str:
    keys = f" with the keys {[*element]}" if isinstance(element, Mapping) else ""
    return f"of type {type(element).__name__}{keys}"


def is_a(value: object, module: str, name: str) -> bool:
    """Whether a value is of a class, without importing the class's module.

    Parameters
    ----------
    value : object
        Anything.
    module, name : str
        Where the class lies. A value of that class cannot exist before its module is imported.

    Returns
    -------
    bool
        As from `isinstance`.
    """
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def is_missing(element: object) -> bool:
    """Whether a value stands for none: None, NaN, NaT or pandas' NA."""
    if element is None or is_a(element, "pandas._libs.missing", "NAType"):
        return True
    with contextlib.suppress(TypeError, ValueError):
        return bool(element != element)  # as NaN and NaT do
    return False


def _decode(data: bytes, max_pixels: int, short_side: int | None, reading: Reading) -> torch.Tensor:
    from featx.images.decoding import decode

    return decode(data, max_pixels=max_pixels, short_side=short_side, reading=reading)


def _contents(data: bytes, *seeds: int) -> tuple[Content, ...]:
    traits = traits_of(data)
    return tuple([Content(digest_under(seed, "file", data), traits) for seed in seeds])


def _lock_of(value: object) -> contextlib.AbstractContextManager[bool]:
    return _LOCKS[(id(value) >> 4) % len(_LOCKS)].held()
