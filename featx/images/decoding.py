"""From the bytes of an image file, or a Pillow image, to RGB pixels.

Which library decodes what was settled by experiment (Pillow 13, torchvision 0.29, 12,000 damaged files):

- JPEG and WebP: torchvision and Pillow agree bit for bit, torchvision is faster by a tenth to a fifth.
- PNG: torchvision ends the process with a segmentation fault on a bad checksum, so Pillow reads it; Pillow ignores
  the checksums of the pixel data, so they are verified here.
- GIF: Pillow is twice as fast, knows transparency, and reads the first frame only.
- Everything else: torchvision cannot, or does not convert colours.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401 -- registers torch.ops.image
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from featx.exceptions import UnreadableImage
from featx.images import heif

__all__ = ["UnreadableImage", "content_of_pil", "decode", "on_white", "rgb_from_pil"]

#: Version of the rules below (orientation, colour, transparency, depth): part of the key of whatever is kept.
POLICY = 1

_SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "GIF": re.compile(rb"GIF8[79]a"),
    "WebP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
}
# All formats at once: Pillow would otherwise look for them on its first miss, in several threads at a time.
Image.init()
heif.register()

# The operators rather than torchvision.io's functions: those warn at every call since 0.29 that they will be removed.
# Where they are gone, Pillow takes over and gives the same pixels.
_TORCHVISION_OPERATORS = {"JPEG": "decode_jpeg", "MPO": "decode_jpeg", "WEBP": "decode_webp"}
_TORCHVISION_RGB = 3

# Pillow hands these to other programs (Ghostscript) or to the operating system.
_DRAWINGS = frozenset({"EPS", "WMF", "EMF"})

_ORIENTATION_TAG = 0x0112
_UPRIGHT: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    2: lambda pixels: pixels.flip(2),
    3: lambda pixels: pixels.flip(1, 2),
    4: lambda pixels: pixels.flip(1),
    5: lambda pixels: pixels.transpose(1, 2),
    6: lambda pixels: pixels.transpose(1, 2).flip(2),
    7: lambda pixels: pixels.transpose(1, 2).flip(1, 2),
    8: lambda pixels: pixels.transpose(1, 2).flip(1),
}


def decode(data: bytes, *, max_pixels: int, short_side: int | None = None) -> torch.Tensor:
    """RGB pixels of an encoded image.

    The picture is turned upright (EXIF orientation), transparency is laid over white, 16-bit values are scaled, and of
    an animation the first frame is taken.

    Parameters
    ----------
    data : bytes
        Content of an image file.
    max_pixels : int
        Width times height above which the image is refused before its pixels are decoded.
    short_side : int or None, default=None
        Pixels that are enough for the shorter side: a JPEG is read at the smallest of the scales 1, 1/2, 1/4 and 1/8
        that leaves as many, for which libjpeg evaluates only the low frequencies [1]_. None reads it in full.

    Returns
    -------
    Tensor of shape (3, height, width)
        uint8, 0..255.

    Raises
    ------
    UnreadableImage
        With the reason in plain words.

    References
    ----------
    .. [1] libjpeg.txt of the Independent JPEG Group, "Decompression parameter selection" (scale_num, scale_denom).
    """
    if not data:
        raise UnreadableImage("empty file")
    kind = _kind_of(data)
    if kind == "PNG":
        _check_png(data)
    if (reason := heif.missing_decoder(kind)) is not None:
        raise UnreadableImage(reason)
    with _plain_reasons(kind):
        image = _open(data, kind)
    if image.format in _DRAWINGS:
        raise UnreadableImage(f"a drawing ({image.format}), not a picture made of pixels")
    _check_size(image.size, max_pixels)
    with _plain_reasons(kind or image.format):
        pixels = None if _is_drafted(image, short_side) else _decode_with_torchvision(data, image)
        if pixels is None:
            pixels = _decode_with_pillow(data, image)
        return _upright(pixels, _orientation(image))


def rgb_from_pil(image: Image.Image, *, max_pixels: int) -> torch.Tensor:
    """RGB pixels of a Pillow image, by the same rules as :func:`decode`.

    Loads the pixels of a lazily opened image and changes nothing else about it. Not safe to call for the same
    image from several threads at once.

    Parameters
    ----------
    image : PIL.Image.Image
        In any mode.
    max_pixels : int
        Width times height above which the image is refused.

    Returns
    -------
    Tensor of shape (3, height, width)
        uint8, 0..255.

    Raises
    ------
    UnreadableImage
        With the reason in plain words.
    """
    _check_size(image.size, max_pixels)
    with _plain_reasons(image.format):
        image.load()
        return _upright(_tensor(_rgb(image)), _orientation(image))


def content_of_pil(image: Image.Image, *, max_pixels: int) -> tuple[str, bytes]:
    """Everything that decides how a Pillow image looks.

    Parameters
    ----------
    image : PIL.Image.Image
        In any mode. Loaded if it was not; the note on threads at :func:`rgb_from_pil` holds here too.
    max_pixels : int
        Width times height above which the image is refused.

    Returns
    -------
    looks : str
        Mode, size, palette, transparency and orientation.
    pixels : bytes
        The pixels in that mode.

    Raises
    ------
    UnreadableImage
        With the reason in plain words.
    """
    _check_size(image.size, max_pixels)
    with _plain_reasons(image.format):
        image.load()
        palette = image.palette.getdata() if image.palette else None
        looks = (image.mode, image.size, palette, image.info.get("transparency"), _orientation(image))
        return repr(looks), image.tobytes()


def on_white(rgba: NDArray[Any]) -> NDArray[Any]:
    """Pixels with transparency laid over white.

    Parameters
    ----------
    rgba : ndarray of shape (height, width, 4)
        uint8 in 0..255, or float32 nominally in 0..1.

    Returns
    -------
    ndarray of shape (height, width, 3)
        Of the same dtype.
    """
    if rgba.dtype != np.uint8:
        colour, alpha = rgba[..., :3], rgba[..., 3:]
        return colour * alpha + (1 - alpha)
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _kind_of(data: bytes) -> str | None:
    return next((kind for kind, signature in _SIGNATURES.items() if signature.match(data)), None) or heif.kind_of(data)


def _open(data: bytes, kind: str | None) -> Any:
    if kind is None:
        return Image.open(io.BytesIO(data))
    # The format's own opener: unlike Image.open it neither warns of large pictures nor refuses them, so that max_pixels
    # alone decides.
    opener, _ = Image.OPEN[kind.upper()]
    return opener(io.BytesIO(data), "")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than max_pixels={max_pixels}")
    if width * height == 0:
        raise UnreadableImage(f"{width} x {height} pixels")


def _check_png(data: bytes) -> None:
    view = memoryview(data)
    start, name = 8, b""
    while name != b"IEND":
        if start + 12 > len(data):
            raise UnreadableImage("truncated PNG")
        (length,) = struct.unpack_from(">I", data, start)
        name, end = data[start + 4 : start + 8], start + 12 + length
        if end > len(data):
            raise UnreadableImage("truncated PNG")
        if zlib.crc32(view[start + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise UnreadableImage("PNG checksum error")
        start = end


@contextmanager
def _plain_reasons(kind: str | None) -> Iterator[None]:
    try:
        yield
    except (UnreadableImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage("more pixels than PIL.Image.MAX_IMAGE_PIXELS allows") from error
    except Exception as error:  # Pillow's format plugins raise whatever a damaged file makes them stumble over
        raise UnreadableImage(_reason(error, kind)) from error


def _reason(error: Exception, kind: str | None) -> str:
    if "truncated" in str(error).lower():
        return f"truncated {kind or 'image'}"
    if kind is not None:
        return f"truncated or damaged {kind}"
    return "not an image file" if isinstance(error, UnidentifiedImageError) else str(error)


def _is_drafted(image: Image.Image, short_side: int | None) -> bool:
    """Whether Pillow will read an image at a smaller scale, which it is now set to."""
    if short_side is None or image.format not in ("JPEG", "MPO") or min(image.size) < 2 * short_side:
        return False
    return image.draft(None, (short_side, short_side)) is not None


def _orientation(image: Image.Image) -> int | None:
    try:
        orientation: int | None = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a picture with damaged EXIF data is still a picture, and every viewer shows it unturned
        return None
    return orientation


def _upright(pixels: torch.Tensor, orientation: int | None) -> torch.Tensor:
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else turn(pixels)


def _decode_with_torchvision(data: bytes, image: Image.Image) -> torch.Tensor | None:
    operator = getattr(torch.ops.image, _TORCHVISION_OPERATORS.get(image.format or "", ""), None)
    if operator is None or image.mode not in ("RGB", "L"):
        return None
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        pixels: torch.Tensor = operator(encoded, _TORCHVISION_RGB)
    except RuntimeError:  # Pillow knows the reason, and reads animations and some files that libjpeg gives up on here
        return None
    return pixels


def _decode_with_pillow(data: bytes, image: Image.Image) -> torch.Tensor:
    low_rawmode = _low_byte_rawmode(image)
    image.load()
    if low_rawmode is None:
        return _tensor(_rgb(image))
    high, low = np.asarray(image), _low_bytes(data, low_rawmode)
    return _tensor(_rgb(Image.fromarray(_from_16_bit(high.astype(np.uint32) * 256 + low))))


def _low_byte_rawmode(image: Image.Image) -> str | None:
    # Pillow keeps the high byte of 16-bit colours. Unpacked in the other byte order, it keeps the low byte instead.
    tiles = getattr(image, "tile", None)
    if not tiles or image.mode not in ("RGB", "RGBA"):
        return None
    rawmode = _rawmode(tiles[0])
    order = {"little": "B", "big": "L"}[sys.byteorder]
    swaps = {f"{image.mode};16B": "L", f"{image.mode};16L": "B", f"{image.mode};16N": order}
    return f"{image.mode};16{swaps[rawmode]}" if rawmode in swaps else None


def _rawmode(tile: Any) -> Any:
    return tile.args[0] if isinstance(tile.args, tuple) else tile.args


def _low_bytes(data: bytes, rawmode: str) -> NDArray[np.uint8]:
    image = _open(data, _kind_of(data))
    image.tile = [tile._replace(args=_with_rawmode(tile.args, rawmode)) for tile in image.tile]
    image.load()
    return np.asarray(image)


def _with_rawmode(args: Any, rawmode: str) -> Any:
    return (rawmode, *args[1:]) if isinstance(args, tuple) else rawmode


def _tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, height, width)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):
        return _rgb_from_grey(_grey_from_integers(np.asarray(image)), image)
    if image.mode == "F":
        return _rgb_from_grey(_grey_from_floats(np.asarray(image)), image)
    if image.has_transparency_data:
        return on_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _rgb_from_grey(grey: NDArray[np.uint8], image: Image.Image) -> NDArray[np.uint8]:
    see_through = image.info.get("transparency")
    if isinstance(see_through, int):
        grey = np.where(np.asarray(image) == see_through, np.uint8(255), grey)
    return np.repeat(grey[..., np.newaxis], 3, axis=2)


def _grey_from_integers(values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage(f"integer pixels from {values.min()} to {values.max()}, outside 0..65535")
    return _from_16_bit(values.astype(np.uint32))


def _grey_from_floats(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    if not (values.min() >= 0 and values.max() <= 1):  # also true of NaN
        raise UnreadableImage(f"float pixels from {values.min():g} to {values.max():g}, outside 0..1")
    return np.rint(values * 255).astype(np.uint8)


def _from_16_bit(values: NDArray[np.uint32]) -> NDArray[np.uint8]:
    return ((values + 128) // 257).astype(np.uint8)
