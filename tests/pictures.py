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
    return tiff(pixels, order=order, compression=8 if compressed else 1)


def tiff(
    pixels: NDArray[Any],
    *,
    order: str = "<",
    compression: int = 1,
    photometric: int | None = None,
    extra: tuple[int, ...] = (),
    planar: bool = False,
) -> bytes:
    """A TIFF of pixels (height, width, bands) of any kind of number, with the tags that are asked for.

    Parameters
    ----------
    pixels : ndarray of shape (height, width, bands)
    order : {"<", ">"}
        Of the bytes.
    compression : int
        The tag; deflated for 8, as they are for any other.
    photometric : int or None
        The tag: 1 for grey, 2 for RGB; None for what the number of bands suggests.
    extra : tuple of int
        What the bands beside grey or RGB are: 0 for nothing known, 1 for alpha that colours are multiplied by, 2 alpha.
    planar : bool
        Whether bands lie apart.
    """
    height, width, bands = pixels.shape
    stored = pixels.astype(pixels.dtype.newbyteorder(order))
    strips = [stored[..., i].tobytes() for i in range(bands)] if planar else [stored.tobytes()]
    strips = [zlib.compress(strip) if compression == 8 else strip for strip in strips]
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * pixels.dtype.itemsize] * bands),
        259: ("H", [compression]),
        262: ("H", [(2 if bands >= 3 else 1) if photometric is None else photometric]),
        273: ("I", [0] * len(strips)),
        277: ("H", [bands]),
        278: ("I", [height]),
        279: ("I", [*map(len, strips)]),
        284: ("H", [2 if planar else 1]),
        **({338: ("H", [*extra])} if extra else {}),
        339: ("H", [{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * bands),
    }
    long = {tag for tag, (kind, values) in tags.items() if len(values) * struct.calcsize(kind) > 4}
    at = 8 + 2 + 12 * len(tags) + 4
    first_strip = at + sum(len(tags[tag][1]) * struct.calcsize(tags[tag][0]) for tag in long)
    tags[273] = ("I", [first_strip + sum(map(len, strips[:i])) for i in range(len(strips))])
    directory, values_of_long = struct.pack(f"{order}H", len(tags)), b""
    for tag, (kind, values) in tags.items():
        content = struct.pack(f"{order}{len(values)}{kind}", *values)
        if tag in long:
            values_of_long += content
            content = struct.pack(f"{order}I", at + len(values_of_long) - len(content))
        directory += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(values)) + content.ljust(4, b"\0")
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return start + directory + bytes(4) + values_of_long + b"".join(strips)


def png_with(data: bytes, name: bytes, content: bytes, *, damaged: bool = False, after: bytes = b"IHDR") -> bytes:
    """A PNG with one more chunk, of a wrong checksum where it is to be damaged."""
    start = data.index(after) - 4
    (length,) = struct.unpack_from(">I", data, start)
    end = start + 12 + length
    chunk = _chunk(name, content)
    return data[:end] + (chunk[:-1] + bytes([chunk[-1] ^ 0xFF]) if damaged else chunk) + data[end:]


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
