"""What an encoded image is, as far as its header tells: without decoding it, and without torch."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from featx.images import heif
from featx.images.reading import DEEP, FOUR_BANDS, HEIF, REREAD, UNOPENED

_SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "GIF": re.compile(rb"GIF8[79]a"),
    "WebP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
}
# JPEG and GIF, of which nothing needs to be looked at.
_OF_8_BITS = (b"\xff\xd8\xff", b"GIF8")
_PNG_DEPTH_AT, _PNG_COLOUR_AT, _PNG_GREY_ALPHA, _PNG_RGBA = 24, 25, 4, 6
# How Pillow names 16-bit samples of several bands, which it keeps the high bytes of: bands, and order of the bytes.
_OF_16_BIT = re.compile(r"(RGB|RGBA|RGBX|RGBa|LA);16([BLN])")
# Of the first component; before it stand two sizes of four numbers each and the number of components.
_SIZES_OF_JPEG_2000 = re.compile(rb"\xff\x4f\xff\x51.{38}(.)", re.DOTALL)
_SGI_BYTES_AT = 3
_BITS, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # tags of TIFF


def kind_of(data: bytes) -> str | None:
    """Name of the format, where it is one of those that are most in use."""
    return next((kind for kind, signature in _SIGNATURES.items() if signature.match(data)), None) or heif.kind_of(data)


def open_image(data: bytes, kind: str | None) -> Any:
    """A Pillow image whose pixels are not decoded yet.

    Parameters
    ----------
    data : bytes
    kind : str or None
        As of :func:`kind_of`.
    """
    from PIL import Image

    Image.init()
    if kind is None:
        return Image.open(io.BytesIO(data))
    # The format's own opener: unlike Image.open it neither warns of large pictures nor refuses them, so that max_pixels
    # alone decides.
    opener, _ = Image.OPEN[kind.upper()]
    return opener(io.BytesIO(data), "")


def traits_of(data: bytes) -> int:
    """What makes the reading of an encoded image depend on more than its bytes, as in `Content.traits`."""
    if data.startswith(_OF_8_BITS):
        return 0
    kind = kind_of(data)
    if kind == "PNG":
        return _traits_of_png(data)
    if kind == "HEIF":
        return HEIF | FOUR_BANDS
    try:
        image = open_image(data, kind)
        return traits_of_image(image) | DEEP * has_lost_bits(image, data)
    except Exception:  # who decodes it says what is wrong, which may be a limit or a missing decoder of this process
        return DEEP | FOUR_BANDS | UNOPENED


def traits_of_image(image: Any) -> int:
    """The same of a Pillow image, of which nothing needs to be decoded."""
    layout = layout_of_16_bit(image)
    four = FOUR_BANDS * (image.mode in ("RGBA", "RGBa"))
    if layout is None:
        deep = is_of_integers_or_floats(image)
        return DEEP * deep | REREAD * (deep and is_negative(image)) | four
    return DEEP | REREAD * (layout[0] not in ("RGB", "RGBA")) | four


def is_of_integers_or_floats(image: Any) -> bool:
    """Whether a Pillow image holds more than 8 bits a sample in memory, too."""
    return bool(image.mode.startswith("I") or image.mode == "F")


def layout_of_16_bit(image: Any) -> tuple[str, str] | None:
    """Bands of colours in a file and the order of their samples' bytes; None where samples have no 16 bits each.

    The order is "B" (big-endian), "L" (little-endian) or "N" (this machine's). Bands are "apart" in TIFFs that have one
    after the other, and "PPM" in that format.
    """
    tiles = getattr(image, "tile", None)
    if not tiles or image.mode not in ("RGB", "RGBA"):
        return None
    if image.format == "PPM":
        return ("PPM", "B") if maxval_of_ppm(tiles[0]) > 255 else None
    rawmode, tags = str(rawmode_of(tiles[0])), getattr(image, "tag_v2", None)
    # Of bands that lie apart Pillow forgets it.
    if tags is not None and rawmode in ("R", "G", "B", "A") and 16 in tags.get(_BITS, ()):
        return "apart", "L" if tags.prefix == b"II" else "B"
    found = _OF_16_BIT.fullmatch(rawmode)
    return None if found is None else (found[1], found[2])


def has_lost_bits(image: Any, data: bytes) -> bool:
    """Whether a file of colours has more than 8 bits a sample, of which Pillow gives 8 and no others."""
    if image.format == "JPEG2000" and image.mode not in ("I;16", "I"):
        return bits_of_jpeg_2000(data) > 8
    if image.format == "SGI":
        return data[_SGI_BYTES_AT : _SGI_BYTES_AT + 1] == b"\2"
    return any(str(rawmode_of(tile)).startswith("CMYK;16") for tile in getattr(image, "tile", ()))


def bits_of_jpeg_2000(data: bytes) -> int:
    """Bits a sample of the first component."""
    found = _SIZES_OF_JPEG_2000.search(data)
    return 8 if found is None else (found[1][0] & 0x7F) + 1


def maxval_of_ppm(tile: Any) -> int:
    """What stands for white in a PPM."""
    return int(tile.args[-1]) if isinstance(tile.args, tuple) else 255


def is_negative(image: Any) -> bool:
    """Whether low values of a TIFF are white, which Pillow forgets of more than 8 bits."""
    return getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0


def lies_apart(image: Any) -> bool:
    """Whether the bands of a TIFF stand one after the other."""
    return getattr(image, "tag_v2", {}).get(_PLANAR) == 2


def rawmode_of(tile: Any) -> Any:
    """How the samples of a part of a file lie in it, as Pillow calls it."""
    return tile.args[0] if isinstance(tile.args, tuple) else tile.args


def set_rawmodes(image: Any, rawmode: Callable[[str], str]) -> None:
    """Have the samples of a file that is not decoded yet taken as lying in another way, given the present one."""
    for place, tile in enumerate(getattr(image, "tile", ())):
        image.tile[place] = tile._replace(args=_with_rawmode(tile.args, rawmode(str(rawmode_of(tile)))))


def _with_rawmode(args: Any, rawmode: str) -> Any:
    return (rawmode, *args[1:]) if isinstance(args, tuple) else rawmode


def _traits_of_png(data: bytes) -> int:
    depth, colour = data[_PNG_DEPTH_AT : _PNG_COLOUR_AT + 1].ljust(2)
    deep = depth == 16
    return DEEP * deep | REREAD * (deep and colour == _PNG_GREY_ALPHA) | FOUR_BANDS * (colour == _PNG_RGBA)
