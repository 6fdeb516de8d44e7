"""The chunks of a PNG: those that decide its pixels are checked, the others are kept from the decoder.

Pillow refuses a picture whose texts or profiles are long, damaged or of a wrong checksum, though its pixels are there.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from featx.exceptions import UnreadableImage

_SIGNATURE_BYTES, _FRAME_BYTES = 8, 12  # around a chunk's content: length, name, checksum
_TRANSPARENCY, _TEXTS = b"tRNS", frozenset({b"tEXt", b"zTXt", b"iTXt"})
# Texts that may tell how the picture is turned.
_TURNING = frozenset({b"XML:com.adobe.xmp", b"xmp", b"exif", b"Raw profile type exif"})
_LONGEST_TEXT = 2**20  # bytes, once decompressed: Pillow takes no more


def pixels_alone(data: bytes) -> bytes:
    """A PNG without what does not decide its pixels.

    Parameters
    ----------
    data : bytes
        Content of the file.

    Returns
    -------
    bytes
        The same object where there is nothing to leave out.

    Raises
    ------
    UnreadableImage
        The file is cut short, or a chunk that decides pixels has a wrong checksum.
    """
    view = memoryview(data)
    kept, start = [view[:_SIGNATURE_BYTES]], _SIGNATURE_BYTES
    for name, stop in _chunks(data):
        if _matters(view[start:stop], name):
            kept.append(view[start:stop])
        start = stop
    return data if sum(map(len, kept)) == start else b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Name and end of every chunk."""
    start, name = _SIGNATURE_BYTES, b""
    while name != b"IEND":
        if start + _FRAME_BYTES > len(data):
            raise UnreadableImage("truncated PNG")
        (length,) = struct.unpack_from(">I", data, start)
        name, start = data[start + 4 : start + 8], start + _FRAME_BYTES + length
        if start > len(data):
            raise UnreadableImage("truncated PNG")
        yield name, start


def _matters(chunk: memoryview, name: bytes) -> bool:
    is_critical = not name[0] & 0x20 or name == _TRANSPARENCY
    if not is_critical and name != b"eXIf" and not (name in _TEXTS and _may_turn(bytes(chunk[8:-4]), name)):
        return False
    if zlib.crc32(chunk[4:-4]) == struct.unpack_from(">I", chunk, len(chunk) - 4)[0]:
        return True
    if is_critical:
        # Names are letters; whatever stands in the place of one is none.
        raise UnreadableImage(
            f"PNG checksum error in {name.decode()}" if name.isalpha() else "truncated or damaged PNG"
        )
    return False


def _may_turn(text: bytes, name: bytes) -> bool:
    """Whether a text may say how the picture is turned, and is short enough to be looked at."""
    keyword, _, rest = text.partition(b"\0")
    if keyword not in _TURNING or len(rest) > _LONGEST_TEXT:
        return False
    if name == b"tEXt" or (name == b"iTXt" and rest[:1] == b"\0"):
        return True
    packed = rest[1:] if name == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    try:
        return len(zlib.decompressobj().decompress(packed, _LONGEST_TEXT)) < _LONGEST_TEXT
    except zlib.error:
        return False
