"""HEIC and its kin: pictures in ISO media containers, for which Pillow may need a plugin."""

from __future__ import annotations

import struct
from functools import cache

#: What makes HEIC readable.
INSTALL = 'pip install "featx[heic]"'
ENDINGS = (".heic", ".heics", ".heif", ".heifs", ".hif")

# Brands in the box "ftyp" that such a file begins with [ISO/IEC 23008-12, annex B; AV1 Image File Format, section 6].
_BRANDS = dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF")
_BRANDS |= dict.fromkeys((b"avif", b"avis"), "AVIF")
_OF_ANY_CODEC = (b"mif1", b"msf1")
_MAJOR, _COMPATIBLE = slice(8, 12), 16


@cache
def register() -> bool:
    """Let Pillow open HEIC in this process, if pillow-heif is installed; whether it is."""
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:  # also of a library that it cannot load
        return False
    return True


@cache
def heif_version() -> str | None:
    """What decides the pixels that a HEIC file gives in this process; None where it gives none."""
    if not register():
        return None
    import pillow_heif

    return f"pillow-heif {pillow_heif.__version__}, libheif {pillow_heif.libheif_version()}"


def kind_of(data: bytes) -> str | None:
    """``"HEIF"`` or ``"AVIF"`` by the first bytes of a file; None for anything else, such as films."""
    major = data[_MAJOR]
    if data[4:8] != b"ftyp" or (major not in _BRANDS and major not in _OF_ANY_CODEC):
        return None
    (size,) = struct.unpack_from(">I", data)
    compatible = (data[start : start + 4] for start in range(_COMPATIBLE, min(size, len(data)), 4))
    return next((_BRANDS[brand] for brand in (major, *compatible) if brand in _BRANDS), "HEIF")


def missing_decoder(kind: str | None) -> str | None:
    """Why pictures of a kind cannot be read in this process, and what helps; None where they can."""
    if kind == "HEIF" and not register():
        return f"HEIC/HEIF image, for which {INSTALL} is needed"
    if kind == "AVIF" and not _pillow_reads_avif():
        return "AVIF image, which this Pillow cannot decode; pip install --upgrade pillow"
    return None


def _pillow_reads_avif() -> bool:
    from PIL import Image

    return ".avif" in Image.registered_extensions()
