"""Files that are whole and of a kind that Pillow does not decode, in words."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2

from featx.exceptions import UnreadableImage
from featx.images.samples import CONVERT

# What Pillow's openers and decoders say of files that are not at fault.
_NOT_KNOWN = re.compile(
    r"cannot handle|not (yet )?supported|unsupported|unimplemented|not available"
    r"|unknown (pixel mode|data organi[sz]ation|raw mode|compression)",
    re.IGNORECASE,
)
# Files that are taken for photos and that Pillow does not know, and what is found in their place.
_NO_PICTURES = {
    "a web page": re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE),
    "a pointer of Git LFS": re.compile(rb"version https://git-lfs"),
    "a PDF": re.compile(rb"%PDF-"),
    "an archive": re.compile(rb"PK\x03\x04|\x1f\x8b\x08|7z\xbc\xaf|Rar!"),
}
_OTHERS = {
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "OpenEXR": re.compile(rb"v/1\x01"),
    "Radiance HDR": re.compile(rb"#\?R"),
    "DICOM": re.compile(rb".{128}DICM", re.DOTALL),
    "SVG, a drawing": re.compile(rb"\s*(<\?xml[^>]*>\s*)?<svg"),
    "PAM": re.compile(rb"P7\s"),
    "a NumPy array": re.compile(rb"\x93NUMPY"),
}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION = 256, 257, 258, 259  # tags of TIFF
_PHOTOMETRIC, _BANDS, _PLANAR, _FORMAT = 262, 277, 284, 339
_GREY = (0, 1)
_NUMBERS = {1: "integers", 2: "signed integers", 3: "floats", 5: "complex integers", 6: "complex floats"}
# Those that Pillow's libraries may lack or do not know at all.
_COMPRESSIONS = {
    33003: "JPEG 2000",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG of DNG",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}


def unsupported(error: Exception, kind: str | None, data: bytes) -> UnreadableImage | None:
    """What a file is that Pillow does not know how to decode; None where the file is at fault, as far as one can tell.

    Parameters
    ----------
    error : Exception
        Of Pillow.
    kind : str or None
        The format, where it is known.
    data : bytes
        Content of the file; empty for an image in memory.
    """
    if "truncated" in str(error).lower():
        return None
    if kind == "TIFF":
        return _unsupported_tiff(error, _tags(data))
    for name, signature in _NO_PICTURES.items():
        if signature.match(data):
            return UnreadableImage(f"{name}, not an image")
    for name, signature in _OTHERS.items():
        if signature.match(data):
            return UnreadableImage(f"{name}, which Pillow does not read", CONVERT)
    kind = kind or _accepted_as(data)
    if kind is not None and _NOT_KNOWN.search(str(error)):
        return UnreadableImage(f"{kind} of a kind that Pillow does not read ({error})", CONVERT)
    if kind is not None and isinstance(error, UnidentifiedImageError):
        return UnreadableImage(f"not an image file, or {kind} that is damaged or of a kind that Pillow does not read")
    return None


def _accepted_as(data: bytes) -> str | None:
    """The format that a file begins like."""
    Image.init()
    return next((name for name in Image.ID if _accepts(Image.OPEN[name][1], data[:16])), None)


def _accepts(accept: Callable[[bytes], bool | str] | None, prefix: bytes) -> bool:
    try:
        return accept is not None and accept(prefix) is True
    except (IndexError, struct.error):  # of files that end before
        return False


def _unsupported_tiff(error: Exception, tags: dict[int, Any]) -> UnreadableImage | None:
    not_read = _NOT_KNOWN.search(str(error)) or isinstance(error.__cause__, KeyError | IndexError)
    if not {_WIDTH, _HEIGHT, _BITS} <= tags.keys() or not (not_read or tags.get(_COMPRESSION) in _COMPRESSIONS):
        return None
    return UnreadableImage(f"TIFF with {_described(tags)}, which Pillow does not read", CONVERT)


def _tags(data: bytes) -> dict[int, Any]:
    """Tags of a TIFF's first picture; empty where they cannot be read."""
    try:
        directory = ImageFileDirectory_v2(data[:16] if data[2:3] == b"+" or data[3:4] == b"+" else data[:8])
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        return dict(directory)
    except Exception:  # whatever a damaged file makes it stumble over
        return {}


def _described(tags: dict[int, Any]) -> str:
    """What the pixels are, such as "3 bands of 32-bit floats"."""
    n, bits, number = tags.get(_BANDS, 1), tags.get(_BITS, (1,)), tags.get(_FORMAT, (1,))
    grey = "grey " if n > 1 and tags.get(_PHOTOMETRIC) in _GREY else ""
    sizes = "/".join(str(size) for size in dict.fromkeys(bits))
    numbers = "/".join(_NUMBERS.get(kind, "samples") for kind in dict.fromkeys(number))
    apart = " that lie apart" if n > 1 and tags.get(_PLANAR) == 2 else ""
    packed = tags.get(_COMPRESSION, 1)
    compressed = f", compressed by {_COMPRESSIONS[packed]}" if packed in _COMPRESSIONS else ""
    compressed = compressed or ("" if packed in COMPRESSION_INFO else f", compressed in a way numbered {packed}")
    return f"{n} {grey}band{'s' if n > 1 else ''} of {sizes}-bit {numbers}{apart}{compressed}"
