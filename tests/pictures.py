"""Pictures made in memory, in every form that a file can have."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# How a picture has to be stored so that the EXIF orientation brings it back upright.
_STORED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, -1),
}


def colours(height: int = 48, width: int = 32) -> NDArray[np.uint8]:
    """A picture without symmetry, in flat 8 x 8 blocks, which JPEG keeps nearly exactly."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def photo(height: int = 60, width: int = 90) -> NDArray[np.uint8]:
    """Gradients and noise, which no format packs well."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 2, y * 3, x + y], axis=-1)
    return (smooth + np.random.default_rng(1).integers(0, 40, smooth.shape)).clip(0, 255).astype(np.uint8)


def encode(picture: NDArray[Any] | Image.Image, file_format: str, **options: Any) -> bytes:
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def oriented(picture: NDArray[np.uint8], orientation: int, file_format: str, **options: Any) -> bytes:
    """The picture stored turned, with the EXIF tag that turns it back."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(np.ascontiguousarray(_STORED[orientation](picture)), file_format, exif=exif, **options)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_16_bit(pixels: NDArray[np.uint16]) -> bytes:
    """A 16-bit PNG of shape (height, width, channels); Pillow itself writes only grey ones."""
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def tiff_16_bit(pixels: NDArray[np.uint16], *, order: str = "<", compressed: bool = False) -> bytes:
    """A 16-bit RGB TIFF of shape (height, width, 3), in either byte order."""
    height, width, channels = pixels.shape
    content = pixels.astype(f"{order}u2").tobytes()
    content = zlib.compress(content) if compressed else content
    bits_at = 8 + 2 + 10 * 12 + 4
    tags = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, channels, bits_at),
        (259, 3, 1, 8 if compressed else 1),
        (262, 3, 1, 2),
        (273, 4, 1, bits_at + 2 * channels),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, len(content)),
        (284, 3, 1, 1),
    ]
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(_tag(order, *tag) for tag in tags) + bytes(4)
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return start + directory + struct.pack(f"{order}{channels}H", *[16] * channels) + content


def _tag(order: str, number: int, kind: int, count: int, value: int) -> bytes:
    short = kind == 3 and count == 1
    content = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
    return struct.pack(f"{order}HHI", number, kind, count) + content


def damaged_png(picture: NDArray[np.uint8], chunk: bytes, where: str) -> bytes:
    """A PNG with one flipped byte in a chunk's content or in its checksum."""
    data = bytearray(encode(picture, "PNG"))
    start = data.index(chunk)
    (length,) = struct.unpack_from(">I", data, start - 4)
    data[start + 4 + (length if where == "checksum" else length // 2)] ^= 0xFF
    return bytes(data)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"") + _chunk(b"IEND", b"")


def rgb_of(data: bytes) -> NDArray[np.uint8]:
    """What Pillow alone makes of a file, (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
