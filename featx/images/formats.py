"""Which endings of names stand for photos: those that can be decoded here, without what is no photo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cache

from featx.images import heif

#: Why a file is left out, by its name alone; None for a picture.
Choice = Callable[[str], str | None]

UNKNOWN = "no picture format that can be read here"
NOT_ASKED_FOR = "not among extensions"
NEEDS_HEIC = f"needs {heif.INSTALL}"

# What Pillow's registry lists and nobody means by a folder of photos.
_NO_PHOTOS = {
    "data of which Pillow reads no pixels": (".bufr", ".grib", ".h5", ".hdf", ".iim"),
    "a drawing": (".emf", ".eps", ".ps", ".wmf"),
    "a document": (".pdf",),
    "a film": (".flc", ".fli", ".mpeg", ".mpg"),
    "an icon or a cursor": (".cur", ".icns", ".ico", ".xbm", ".xpm"),
    # Recordings of sports watches and tables, Gerber plots, Windows Installer patches, clouds of points, metrics of
    # fonts, Visio templates.
    "an ending that other kinds of file share": (".fit", ".fits", ".gbr", ".msp", ".pcd", ".pfm", ".vst"),
}
# What the registry lacks where a decoder is not installed.
_NOT_INSTALLED = {
    NEEDS_HEIC: heif.ENDINGS,
    "this Pillow cannot decode it": (".avif", ".avifs", ".webp", ".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
}
_REASONS = {
    ending: why for table in (_NO_PHOTOS, _NOT_INSTALLED) for why, endings in table.items() for ending in endings
}
_EXCLUDED = frozenset(ending for endings in _NO_PHOTOS.values() for ending in endings)
# Formats that another one's opener reads, and those that are listed whether their decoder is there or not.
_READ_AS = {"MPO": "JPEG"}
_CODECS = {"JPEG2000": "jpg_2000"}

# Every Pillow decodes these, so that folders of them alone need not ask it.
_EVERYDAY = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff"})
_LONGEST_ENDING = 10


def photo_endings() -> frozenset[str]:
    """Endings of pictures that can be decoded in this process, in lower case, such as ``".jpg"``."""
    from PIL import Image

    Image.init()
    heif.register()
    registered = Image.registered_extensions()
    return frozenset(ending for ending, kind in registered.items() if _is_decoded(kind)) - _EXCLUDED


def _is_decoded(kind: str) -> bool:
    from PIL import Image, features

    codec = _CODECS.get(kind)
    return _READ_AS.get(kind, kind) in Image.OPEN and (codec is None or bool(features.check_codec(codec)))


def choose(extensions: str | Iterable[str] | None = None) -> Choice:
    """What tells pictures from other files by their names.

    Parameters
    ----------
    extensions : str, iterable of str or None
        Ends of names, in lower or upper case; None for whatever can be decoded in this process.
    """
    if extensions is not None:
        asked = tuple(end.lower() for end in ([extensions] if isinstance(extensions, str) else extensions))
        return lambda name: None if name.lower().endswith(asked) else NOT_ASKED_FOR
    registered = cache(photo_endings)

    def why_not(name: str) -> str | None:
        ending = ending_of(name)
        return None if ending in _EVERYDAY or ending in registered() else _REASONS.get(ending, UNKNOWN)

    return why_not


def ending_of(name: str) -> str:
    """A name from its last dot, in lower case; empty where there is none, or a number or a sentence behind it."""
    ending = os.path.splitext(name)[1].lower()
    return "" if len(ending) > _LONGEST_ENDING or ending[1:].isdigit() else ending
