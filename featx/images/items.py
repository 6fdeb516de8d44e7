"""One row of X each: a picture that is read when it is needed, and its digest."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from featx.exceptions import UnreadableImage
from featx.images.remote import Unreachable, fetch, is_url
from featx.locks import ForkSafeLock

if TYPE_CHECKING:
    import torch
    from PIL import Image

PixelRange: TypeAlias = str | tuple[float, float]  # the str is "auto"

_CHANNELS = (1, 3, 4)
_REASONS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "permission denied",
    errno.ENAMETOOLONG: "the name is too long for a file",
    errno.EPERM: "permission denied",
    errno.ELOOP: "its links go round in a circle",
    **{number: os.strerror(number) for number in (errno.EINVAL, errno.EILSEQ, errno.ENXIO)},  # what a name cannot be
}
# Pillow loads a lazily opened image on first use, which two threads must not do at once. A few locks for all images
# instead of one each: an image cannot carry one, and a table of them would outlive the images.
_PIL_LOCKS = tuple(ForkSafeLock() for _ in range(64))


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

    stretch = False

    @property
    def source(self) -> str:
        """The path as it was given."""
        return os.fsdecode(self.path)

    def load(self) -> torch.Tensor:
        """Decode the file."""
        return self._decoded(self._read())[0]

    def digest(self, seed: int = 0) -> bytes:
        """Digest of the file's bytes."""
        return self.digests(seed)[0]

    def digests(self, *seeds: int) -> tuple[bytes, ...]:
        """Digests of the file's bytes under several seeds, read once."""
        data = self._read()
        return tuple(_digest(seed, "file", data) for seed in seeds)

    def load_with_digests(self, *seeds: int) -> tuple[torch.Tensor, tuple[bytes, ...]]:
        """Pixels and digests of the same bytes, whoever writes to the file meanwhile."""
        pixels, data = self._decoded(self._read())
        return pixels, tuple(_digest(seed, "file", data) for seed in seeds)

    def _decoded(self, data: bytes) -> tuple[torch.Tensor, bytes]:
        """Pixels, and the bytes that they are made of: of a URL those of a second try where the first are broken."""
        try:
            return _decode(data, self.max_pixels, self.short_side), data
        except UnreadableImage:
            if not is_url(self.source) or (again := self._read()) == data:
                raise
            return _decode(again, self.max_pixels, self.short_side), again

    def _read(self) -> bytes:
        if is_url(self.source):
            if self.storage_options is None:
                raise UnreadableImage("URLs are not opened; pass a local file, or set storage_options={}")
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

    source = None
    stretch = False

    def load(self) -> torch.Tensor:
        """Decode the bytes."""
        return _decode(self.data, self.max_pixels, self.short_side)

    def digest(self, seed: int = 0) -> bytes:
        """Digest of the bytes, the same as that of a file with this content."""
        return _digest(seed, "file", self.data)


@dataclass(frozen=True, slots=True)
class PILItem:
    """A picture as a Pillow image, which stays as it is apart from being loaded."""

    image: Image.Image
    max_pixels: int

    stretch = False

    @property
    def source(self) -> str | None:
        """The file that Pillow opened, None for an image made in memory."""
        name = getattr(self.image, "filename", None)
        return os.fsdecode(name) if name else None

    def load(self) -> torch.Tensor:
        """Convert the pixels to RGB."""
        from featx.images.decoding import rgb_from_pil

        with self._locked():
            return rgb_from_pil(self.image, max_pixels=self.max_pixels)

    def digest(self, seed: int = 0) -> bytes:
        """Digest of the pixels and of what decides their looks."""
        from featx.images.decoding import content_of_pil

        with self._locked():
            looks, pixels = content_of_pil(self.image, max_pixels=self.max_pixels)
        return _digest(seed, f"pil {looks}", pixels)

    def _locked(self) -> contextlib.AbstractContextManager[bool]:
        return _PIL_LOCKS[(id(self.image) >> 4) % len(_PIL_LOCKS)].held()


@dataclass(frozen=True, slots=True)
class ArrayItem:
    """A picture as pixels in memory, which are never written to.

    Parameters
    ----------
    pixels : ndarray of shape (height, width[, channels]) or Tensor of shape (channels, height, width)
        With 1, 3 or 4 channels; the fourth is transparency and laid over white.
    pixel_range : "auto" or (float, float)
        The values that stand for black and white. Under "auto" uint8 is 0..255 and floats must lie within 0..1.
    stretch : bool, default=False
        Whether it is a row of a 2-D X.
    raw : bool, default=False
        Whether the pixels are what the network takes, so that no rule but that against NaN applies.
    """

    pixels: NDArray[Any] | torch.Tensor
    pixel_range: PixelRange = "auto"
    stretch: bool = False
    raw: bool = False

    source = None

    def load(self) -> torch.Tensor:
        """Bring the pixels into range and into RGB."""
        import torch

        values = _channels_last(self.pixels)
        if values.dtype.kind not in "buif":
            raise UnreadableImage(f"pixels of dtype {values.dtype}, not numbers")
        if values.size == 0:
            raise UnreadableImage(f"no pixels, shape {_shape(self.pixels)}")
        if values.ndim != 3:
            raise UnreadableImage(f"pixels of shape {_shape(self.pixels)}, where {_expected(self.pixels)} is expected")
        values = _finite(values.astype(np.float32)) if self.raw else self._rgb(values)
        # A copy: whatever follows may work in place, and torch takes no read-only arrays or negative strides.
        return torch.from_numpy(np.array(values, order="C")).permute(2, 0, 1)  # (channels, height, width)

    def digest(self, seed: int = 0) -> bytes:
        """Digest of dtype, shape and pixels, and of how they are read."""
        array = self.pixels if isinstance(self.pixels, np.ndarray) else _array_of(self.pixels)
        if array.dtype.kind not in "buif":
            raise UnreadableImage(f"pixels of dtype {array.dtype}, not numbers")
        kind = "array" if isinstance(self.pixels, np.ndarray) else "tensor"
        reading = f"{kind} {array.dtype.str} {array.shape} {self.pixel_range} {self.stretch} {self.raw}"
        if isinstance(array, np.ma.MaskedArray):
            reading += f" masked {np.ma.getmaskarray(array).tobytes().hex()}"
        return _digest(seed, reading, np.ascontiguousarray(array).data)

    def _rgb(self, values: NDArray[Any]) -> NDArray[Any]:
        from featx.images.decoding import on_white

        if values.ndim != 3 or values.shape[2] not in _CHANNELS:
            raise UnreadableImage(f"pixels of shape {_shape(self.pixels)}, where {_expected(self.pixels)} is expected")
        values = _scaled(values, self.pixel_range)
        if values.shape[2] == 4:
            return on_white(values)
        return np.broadcast_to(values, (*values.shape[:2], 3))


@dataclass(frozen=True, slots=True)
class BrokenItem:
    """A row of X that is no picture at all."""

    reason: str

    source = None
    stretch = False

    def load(self) -> torch.Tensor:
        """Raise the reason."""
        raise UnreadableImage(self.reason)

    def digest(self, seed: int = 0) -> bytes:
        """Raise the reason."""
        raise UnreadableImage(self.reason)


def item_from(
    element: Any,
    *,
    pixel_range: PixelRange,
    max_pixels: int,
    raw: bool,
    short_side: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Item:
    """The item for one element of X, whatever the element is.

    Parameters
    ----------
    element : object
        A path, bytes, Pillow image, array or tensor; anything else becomes a :class:`BrokenItem`.
    pixel_range : "auto" or (float, float)
        How arrays and tensors are read.
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
        return PathItem(element, max_pixels, short_side, storage_options)
    if isinstance(element, bytes | bytearray | memoryview):
        return BytesItem(bytes(element), max_pixels, short_side)
    if is_a(element, "PIL.Image", "Image"):
        return PILItem(element, max_pixels)
    if isinstance(element, np.ndarray) or is_a(element, "torch", "Tensor"):
        return ArrayItem(element, pixel_range, raw=raw)
    if is_missing(element):
        return BrokenItem("a missing value")
    return BrokenItem(f"of type {type(element).__name__}, which is no path, bytes, PIL image, array or tensor")


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


def _decode(data: bytes, max_pixels: int, short_side: int | None) -> torch.Tensor:
    from featx.images.decoding import decode

    return decode(data, max_pixels=max_pixels, short_side=short_side)


def _digest(seed: int, kind: str, content: bytes | memoryview) -> bytes:
    hasher = xxhash.xxh3_128(f"{kind}\n".encode(), seed=seed)
    hasher.update(content)
    return hasher.digest()


def _array_of(tensor: torch.Tensor) -> NDArray[Any]:
    import torch

    values = tensor.detach().cpu()
    return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)


def _channels_last(pixels: NDArray[Any] | torch.Tensor) -> NDArray[Any]:
    if not isinstance(pixels, np.ndarray):
        values = _array_of(pixels)
        return np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


def _shape(pixels: NDArray[Any] | torch.Tensor) -> tuple[int, ...]:
    return tuple(pixels.shape)


def _expected(pixels: NDArray[Any] | torch.Tensor) -> str:
    if isinstance(pixels, np.ndarray):
        return "(height, width) or (height, width, channels) with 1, 3 or 4 channels"
    return "(channels, height, width) with 1, 3 or 4 channels"


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise UnreadableImage("NaN or infinite pixels")
    return values


def _scaled(values: NDArray[Any], pixel_range: PixelRange) -> NDArray[Any]:
    if not isinstance(pixel_range, str):
        low, high = pixel_range
        return (_finite(values.astype(np.float32)) - np.float32(low)) / np.float32(high - low)
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind != "f":
        raise UnreadableImage(f"pixels of dtype {values.dtype}, whose range is not known; pass pixel_range=(low, high)")
    floats = _finite(values.astype(np.float32))
    if floats.min() < 0 or floats.max() > 1:
        span = f"from {floats.min():g} to {floats.max():g}"
        raise UnreadableImage(f"float pixels {span}, outside 0..1; pass pixel_range=(low, high)")
    return floats
