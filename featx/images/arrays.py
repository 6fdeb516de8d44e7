"""Pictures as numbers in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featx.exceptions import UnreadableImage
from featx.images.reading import FOUR_BANDS, Content, PixelRange, Reading, digest_under
from featx.images.samples import ADVICE, finite, mapped, on_white

if TYPE_CHECKING:
    import torch

_CHANNELS = (1, 3, 4)
_USUAL = Reading()


@dataclass(frozen=True, slots=True)
class ArrayItem:
    """A picture as pixels in memory, which are never written to.

    Parameters
    ----------
    pixels : ndarray of shape (height, width[, channels]) or Tensor of shape (channels, height, width)
        With 1, 3 or 4 channels.
    reading : Reading, default=Reading()
        Its `pixel_range` holds for all values: under "auto" uint8 is 0..255 and floats must lie within 0..1.
    stretch : bool, default=False
        Whether it is a row of a 2-D X.
    raw : bool, default=False
        Whether the pixels are what the network takes, so that no rule but that against NaN applies.
    """

    pixels: NDArray[Any] | torch.Tensor
    reading: Reading = _USUAL
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
        values = finite(values.astype(np.float32)) if self.raw else self._rgb(values)
        # A copy: whatever follows may work in place, and torch takes no read-only arrays or negative strides.
        return torch.from_numpy(np.array(values, order="C")).permute(2, 0, 1)  # (channels, height, width)

    def digest(self, seed: int = 0) -> bytes:
        """Digest of dtype, shape and pixels, and of how they are read."""
        array = self.pixels if isinstance(self.pixels, np.ndarray) else _array_of(self.pixels)
        if array.dtype.kind not in "buif":
            raise UnreadableImage(f"pixels of dtype {array.dtype}, not numbers")
        kind = "array" if isinstance(self.pixels, np.ndarray) else "tensor"
        reading = f"{kind} {array.dtype.str} {array.shape} {self.reading.pixel_range} {self.stretch} {self.raw}"
        if isinstance(array, np.ma.MaskedArray):
            reading += f" masked {np.ma.getmaskarray(array).tobytes().hex()}"
        digest = digest_under(seed, reading, np.ascontiguousarray(array).data)
        if self.raw or array.ndim != 3 or array.shape[2 if kind == "array" else 0] != 4:
            return digest
        return self.reading.digest_of(Content(digest, FOUR_BANDS))

    def _rgb(self, values: NDArray[Any]) -> NDArray[Any]:
        if values.ndim != 3 or values.shape[2] not in _CHANNELS:
            raise UnreadableImage(f"pixels of shape {_shape(self.pixels)}, where {_expected(self.pixels)} is expected")
        if self.reading.fourth_band == "ignore":
            values = values[..., :3]
        self._note(values)
        values = _scaled(values, self.reading.pixel_range)
        if values.shape[2] == 4:
            return on_white(values)
        return np.broadcast_to(values, (*values.shape[:2], 3))

    def _note(self, values: NDArray[Any]) -> None:
        # Rows of a 2-D X are what scikit-learn's tools shift and draw as they like, knowing nothing of a range.
        if not isinstance(self.reading.pixel_range, str) and not self.stretch:
            colours = values[..., :3]
            low, high = float(colours.min()), float(colours.max())
            finite(np.array([low, high]))  # both are NaN where any value is
            self.reading.note(low, high, 0)


def _array_of(tensor: torch.Tensor) -> NDArray[Any]:
    import torch

    from featx.system.devices import to_host

    values = to_host(tensor.detach())
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


def _scaled(values: NDArray[Any], pixel_range: PixelRange) -> NDArray[Any]:
    if not isinstance(pixel_range, str):
        return mapped(values, pixel_range)
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind != "f":
        raise UnreadableImage(f"pixels of dtype {values.dtype}, whose range is not known", ADVICE)
    floats = finite(values.astype(np.float32))
    if floats.min() < 0 or floats.max() > 1:
        raise UnreadableImage(f"float pixels from {floats.min():g} to {floats.max():g}, outside 0..1", ADVICE)
    return floats
