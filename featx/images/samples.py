"""From sample values, whatever their number of bits, to black and white: the one rule for files and for arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.exceptions import UnreadableImage
from featx.images.opening import (
    bits_of_jpeg_2000,
    has_lost_bits,
    is_negative,
    is_of_integers_or_floats,
    kind_of,
    layout_of_16_bit,
    lies_apart,
    maxval_of_ppm,
    open_image,
    set_rawmodes,
)
from featx.images.reading import Reading

#: What helps where a file is of a kind that Pillow does not decode.
CONVERT = (
    "Convert it to bands of 8 or 16 bits, or pass its pixels as an array of shape (height, width) or "
    "(height, width, 3), with pixel_range=(low, high)."
)
#: What helps where the values of pixels say nothing of themselves.
ADVICE = "Set pixel_range=(low, high), the values that stand for black and white."

_OTHER_ORDER = {"B": "L", "L": "B", "N": {"little": "B", "big": "L"}[sys.byteorder]}
_WHITE = 65535.0


@dataclass(frozen=True)
class _Samples:
    """Pixels as a file has them.

    Attributes
    ----------
    values : ndarray of shape (height, width, bands)
        Of 1, 3 or 4 bands, of which the fourth is transparency.
    white : float
        What stands for white, where nothing else is said.
    is_white : ndarray of shape (height, width) or None
        Pixels of a grey value that stands for transparency.
    premultiplied : bool
        Whether the colours have been multiplied by the transparency.
    in_full : bool
        Whether all bits of the file are there.
    negative : bool
        Whether low values are white.
    factor : float
        What Pillow has multiplied the values of the file by.
    """

    values: NDArray[Any]
    white: float
    is_white: NDArray[np.bool_] | None = None
    premultiplied: bool = False
    in_full: bool = True
    negative: bool = False
    factor: float = 1.0


def rgb_of_deep(image: Any, data: bytes | None, reading: Reading) -> NDArray[Any] | None:
    """RGB pixels of a picture with more than 8 bits a sample.

    Parameters
    ----------
    image : PIL.Image.Image
        Its pixels are decoded here.
    data : bytes or None
        The file, None for an image in memory.
    reading : Reading

    Returns
    -------
    ndarray of shape (height, width, 3) or None
        uint8 under "auto"; float32 with black at 0 and white at 1, never clipped, for a pair of values or where the
        full depth is asked for. None for a picture of 8 bits, of which nothing has been decoded.
    """
    as_usual = isinstance(reading.pixel_range, str)
    samples = _samples(image, data)
    if not as_usual and (has_lost_bits(image, data or b"") if samples is None else not samples.in_full):
        raise UnreadableImage(f"{image.format} of more than 8 bits, of which Pillow reads 8", CONVERT)
    if samples is None:
        return None
    bands = samples.values if reading.fourth_band == "alpha" else samples.values[..., :3]
    limits = _limits(bands[..., :3], samples, reading)
    if as_usual and not (reading.full_depth and samples.in_full):
        pixels = _in_8_bits(bands)
    else:
        alpha = mapped(bands[..., 3:], (0, samples.white))
        colours = bands[..., :3] if as_usual else _in_file(bands[..., :3], samples.factor)
        pixels = np.concatenate([mapped(colours, limits), alpha], axis=2)
    white = 255 if pixels.dtype == np.uint8 else 1
    if samples.negative:
        pixels = white - pixels
    if pixels.shape[2] == 4:
        pixels = on_white(pixels, samples.premultiplied)
    if samples.is_white is not None:
        pixels[samples.is_white] = white
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _limits(values: NDArray[Any], samples: _Samples, reading: Reading) -> tuple[float, float]:
    limits = (0.0, samples.white) if isinstance(reading.pixel_range, str) else reading.pixel_range
    if limits is not reading.pixel_range:
        _check_range(values, samples.white)
    low, high = _in_file(np.array([finite(values).min(), values.max()]), samples.factor)
    reading.note(float(low), float(high), _white_in_file(samples))
    return limits


def _white_in_file(samples: _Samples) -> float:
    # A shift by bits leaves zeros below: 65520 of 65535 is white there.
    return samples.white if samples.factor == 1 else float(int(samples.white / samples.factor + 1e-6))


def _in_file(values: NDArray[Any], factor: float) -> NDArray[Any]:
    return values if factor == 1 else np.rint(values / factor)


def mapped(values: NDArray[Any], limits: tuple[float, float]) -> NDArray[np.float32]:
    """Values as float32 with the limits at 0 and 1, without clipping.

    Raises
    ------
    UnreadableImage
        Some are NaN or infinite.
    """
    low, high = limits
    return (finite(values.astype(np.float32)) - np.float32(low)) / np.float32(high - low)


def finite(values: NDArray[Any]) -> NDArray[Any]:
    """The same values, all of which are numbers.

    Raises
    ------
    UnreadableImage
    """
    if not np.isfinite(values).all():
        raise UnreadableImage("NaN or infinite pixels")
    return values


def on_white(rgba: NDArray[Any], premultiplied: bool = False) -> NDArray[Any]:
    """Pixels with transparency laid over white.

    Parameters
    ----------
    rgba : ndarray of shape (height, width, 4)
        uint8 in 0..255, or float32 nominally in 0..1.
    premultiplied : bool, default=False
        Whether the colours have been multiplied by the transparency.

    Returns
    -------
    ndarray of shape (height, width, 3)
        Of the same dtype.
    """
    if rgba.dtype != np.uint8:
        colour, alpha = rgba[..., :3], rgba[..., 3:]
        return (colour if premultiplied else colour * alpha) + (1 - alpha)
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    # What is no transparency may be less than the colours, whose sum then needs more than 16 bits.
    colour = 255 * colour.astype(np.uint32) if premultiplied else colour * alpha
    return np.minimum((colour + 255 * (255 - alpha) + 127) // 255, 255).astype(np.uint8)


def _samples(image: Any, data: bytes | None) -> _Samples | None:
    layout = None if data is None else layout_of_16_bit(image)
    if is_of_integers_or_floats(image):
        factor = 1.0 if data is None else _factor(image, data)
        image.load()
        values = np.asarray(image)
        see_through = image.info.get("transparency")
        is_white = values == see_through if isinstance(see_through, int) else None
        white = 1.0 if image.mode == "F" else _WHITE
        return _Samples(values[..., np.newaxis], white, is_white, negative=is_negative(image), factor=factor)
    if data is None or layout is None:
        return None
    bands, order = layout
    if bands == "PPM":
        return _Samples(_samples_of_ppm(image, data), _WHITE, factor=_factor(image, data))
    if bands == "LA":  # both bytes of both bands, as if they were four bands
        four = _unpacked(image, lambda _: "RGBA")
        return _Samples(_joined(four[..., 0::2], four[..., 1::2])[..., [0, 0, 0, 1]], _WHITE)
    # Pillow keeps the high bytes. Unpacked in the other order, it keeps the low ones instead, where it heeds the order.
    in_full = bands == "apart" or not lies_apart(image)
    high = _unpacked(image, lambda rawmode: _in_order(rawmode, order))
    if not in_full:
        return _Samples(_joined(high, high), _WHITE, in_full=False)
    low = _unpacked(open_image(data, kind_of(data)), lambda rawmode: _in_order(rawmode, _OTHER_ORDER[order]))
    return _Samples(_joined(high, low), _WHITE, premultiplied=bands == "RGBa")


def _factor(image: Any, data: bytes) -> float:
    """What Pillow multiplies the values of a file by that is not decoded yet, so that white is that of 16 bits."""
    if image.format == "PPM" and isinstance(image.tile[0].args, tuple) and image.mode != "F":
        return _WHITE / maxval_of_ppm(image.tile[0])
    if image.format == "JPEG2000":
        return 2.0 ** max(0, 16 - bits_of_jpeg_2000(data))
    return 1.0


def _samples_of_ppm(image: Any, data: bytes) -> NDArray[Any]:
    """Of a file of colours, read as one of greys that is three times as wide, of which Pillow keeps all bits."""
    (tile,), (width, height) = image.tile, image.size
    magic = {b"P6": "P5", b"P3": "P2"}[data[:2]]
    header = f"{magic} {3 * width} {height} {maxval_of_ppm(tile)}\n"
    grey = open_image(header.encode() + data[tile.offset :], "PPM")
    grey.load()
    return np.asarray(grey).reshape(height, width, 3)


def _unpacked(image: Any, rawmode: Callable[[str], str]) -> NDArray[np.uint8]:
    set_rawmodes(image, rawmode)
    image.load()
    return np.asarray(image)


def _in_order(rawmode: str, order: str) -> str:
    bands = rawmode.partition(";")[0]
    # As it lies there: Pillow would divide the colours by the transparency, byte by byte.
    return f"{'RGBA' if bands == 'RGBa' else bands};16{order}"


def _joined(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint32]:
    return high.astype(np.uint32) * 256 + low


def _check_range(values: NDArray[Any], white: float) -> None:
    """Raise where values cannot be told from black and white."""
    lowest, highest = finite(values).min(), values.max()
    if lowest >= 0 and highest <= white:
        return
    kind = "float" if white == 1 else "integer"
    raise UnreadableImage(f"{kind} pixels from {lowest:g} to {highest:g}, outside 0..{white:g}", ADVICE)


def _in_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.dtype.kind == "f":
        return np.rint(values * 255).astype(np.uint8)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
