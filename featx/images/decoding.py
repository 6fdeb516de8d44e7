"""From the bytes of an image file, or a Pillow image, to RGB pixels.

Which library decodes what was settled by experiment (Pillow 13, torchvision 0.29, 12,000 damaged files):

- JPEG and WebP: torchvision and Pillow agree bit for bit, torchvision is faster by a tenth to a fifth.
- PNG: torchvision ends the process with a segmentation fault on a bad checksum, so Pillow reads it; Pillow ignores
  the checksums of the pixel data, so they are verified here.
- GIF: Pillow is twice as fast, knows transparency, and reads the first frame only.
- Everything else: torchvision cannot, or does not convert colours.
"""

from __future__ import annotations

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
from featx.images.opening import kind_of, open_image, set_rawmodes
from featx.images.png import pixels_alone
from featx.images.reading import Reading
from featx.images.samples import on_white, rgb_of_deep
from featx.images.unsupported import unsupported

__all__ = ["UnreadableImage", "content_of_pil", "decode", "rgb_from_pil"]

#: Version of the rules below (orientation, colour, transparency, depth): part of the key of whatever is kept.
POLICY = 1

# All formats at once: Pillow would otherwise look for them on its first miss, in several threads at a time.
Image.init()
heif.register()

# The operators rather than torchvision.io's functions: those warn at every call since 0.29 that they will be removed.
# Where they are gone, Pillow takes over and gives the same pixels.
_TORCHVISION_OPERATORS = {"JPEG": "decode_jpeg", "MPO": "decode_jpeg", "WEBP": "decode_webp"}
_TORCHVISION_RGB = 3

# Pillow hands these to other programs (Ghostscript) or to the operating system.
_DRAWINGS = frozenset({"EPS", "WMF", "EMF"})

_USUAL = Reading()

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


def decode(data: bytes, *, max_pixels: int, short_side: int | None = None, reading: Reading = _USUAL) -> torch.Tensor:
    """RGB pixels of an encoded image.

    The picture is turned upright (EXIF orientation), transparency is laid over white, values of more than 8 bits are
    scaled, and of an animation the first frame is taken.

    Parameters
    ----------
    data : bytes
        Content of an image file.
    max_pixels : int
        Width times height above which the image is refused before its pixels are decoded.
    short_side : int or None, default=None
        Pixels that are enough for the shorter side: a JPEG is read at the smallest of the scales 1, 1/2, 1/4 and 1/8
        that leaves as many, for which libjpeg evaluates only the low frequencies [1]_. None reads it in full.
    reading : Reading, default=Reading()
        How samples of more than 8 bits and a fourth band are taken.

    Returns
    -------
    Tensor of shape (3, height, width)
        uint8 in 0..255, or where more than 8 bits a sample are to be kept float32, not clipped.

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
    kind = kind_of(data)
    if kind == "PNG":
        data = pixels_alone(data)
    if (reason := heif.missing_decoder(kind)) is not None:
        raise UnreadableImage(reason)
    with _plain_reasons(kind, data):
        image = open_image(data, kind)
    if image.format in _DRAWINGS:
        raise UnreadableImage(f"a drawing ({image.format}), not a picture made of pixels")
    _check_size(image.size, max_pixels)
    with _plain_reasons(kind or image.format, data):
        pixels = None if _is_drafted(image, short_side) else _decode_with_torchvision(data, image)
        if pixels is None:
            pixels = _tensor(_rgb(image, data, reading))
        return _upright(pixels, _orientation(image))


def rgb_from_pil(image: Image.Image, *, max_pixels: int, reading: Reading = _USUAL) -> torch.Tensor:
    """RGB pixels of a Pillow image, by the same rules as :func:`decode`.

    Loads the pixels of a lazily opened image and changes nothing else about it. Not safe to call for the same
    image from several threads at once.

    Parameters
    ----------
    image : PIL.Image.Image
        In any mode.
    max_pixels : int
        Width times height above which the image is refused.
    reading : Reading, default=Reading()
        As in :func:`decode`. An image in a mode of colours has 8 bits, whatever the file has that it was opened from.

    Returns
    -------
    Tensor of shape (3, height, width)
        As from :func:`decode`.

    Raises
    ------
    UnreadableImage
        With the reason in plain words.
    """
    _check_size(image.size, max_pixels)
    with _plain_reasons(image.format):
        image.load()
        return _upright(_tensor(_rgb(image, None, reading)), _orientation(image))


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


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than max_pixels={max_pixels}")
    if width * height == 0:
        raise UnreadableImage(f"{width} x {height} pixels")


@contextmanager
def _plain_reasons(kind: str | None, data: bytes = b"") -> Iterator[None]:
    try:
        yield
    except (UnreadableImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage("more pixels than PIL.Image.MAX_IMAGE_PIXELS allows") from error
    except Exception as error:  # Pillow's format plugins raise whatever a damaged file makes them stumble over
        raise unsupported(error, kind, data) or UnreadableImage(_reason(error, kind)) from error


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


def _tensor(pixels: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, height, width)


def _rgb(image: Image.Image, data: bytes | None, reading: Reading) -> NDArray[Any]:
    deep = rgb_of_deep(image, data, reading)
    if deep is not None:
        return deep
    if reading.fourth_band == "ignore" and image.mode in ("RGBA", "RGBa"):
        # As it lies there: the colours were not multiplied by what is no transparency.
        set_rawmodes(image, lambda rawmode: rawmode.replace("RGBa", "RGBA"))
        image.load()
        return np.array(np.asarray(image)[..., :3])
    image.load()
    if image.has_transparency_data:
        return on_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))
