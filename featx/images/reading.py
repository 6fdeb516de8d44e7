"""What files say differently to different readers, and what a digest has to tell of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import xxhash

from featx.images import heif
from featx.system.callers import frames_to_caller
from featx.system.locks import ForkSafeLock

PixelRange: TypeAlias = str | tuple[float, float]  # the str is "auto"
Span: TypeAlias = tuple[float, float]

#: What a file may be that makes its reading depend on more than its bytes; to be added up.
DEEP, FOUR_BANDS, HEIF, REREAD, UNOPENED = 1, 2, 4, 8, 16

#: Part of the range of values that pictures use in the least, or much of them is lost.
_LEAST_USED = 1 / 8
_LOCK = ForkSafeLock()


class Content(NamedTuple):
    """What is known of an encoded image without decoding it.

    Attributes
    ----------
    digest : bytes
        Of its bytes, 16 of them.
    traits : int
        Sum of `DEEP` (more than 8 bits a sample), `FOUR_BANDS` (a fourth beside three colours), `HEIF` and `REREAD` (of
        16 bits in a layout that was read by the high bytes alone, or wrongly, before the others were), as far as they
        hold; one too many costs nothing but a row of its own for every reading. `UNOPENED` is all that is known of a
        file that could not be opened, which may be another time, and then holds of anything.
    """

    digest: bytes
    traits: int = 0


class Seen:
    """Values of the pictures with more than 8 bits a sample that one call has decoded, in whatever thread.

    Attributes
    ----------
    spans : dict of float to (float, float)
        Lowest and highest value, by the value that stood for white.
    """

    def __init__(self) -> None:
        self.spans: dict[float, Span] = {}
        self._is_told = False

    def note(self, low: float, high: float, white: float) -> None:
        """Take the values of one picture into account, of which ``white`` was white."""
        self.add({white: (low, high)})

    def add(self, spans: Mapping[float, Span]) -> None:
        """Take the values of more pictures into account, wherever they were decoded."""
        with _LOCK.held():
            for white, (low, high) in spans.items():
                lowest, highest = self.spans.get(white, (low, high))
                self.spans[white] = min(low, lowest), max(high, highest)

    def tell(self) -> None:
        """Warn, once, where the pictures use little of their range."""
        for white, (low, high) in self.spans.items():
            if high - low < _LEAST_USED * white and not self._is_told:
                self._is_told = True
                warnings.warn(_told(low, high, white), UserWarning, stacklevel=frames_to_caller())


def _told(low: float, high: float, white: float) -> str:
    # A camera of b bits starts at 0; a window elsewhere is what is seen of it, and one value shows none.
    full = 2 ** int(high).bit_length() - 1
    pair = (0, full) if white > 1 and low < full / 2 else (low, high)
    such = ", such as pixel_range=({3}, {4})" if pair[0] < pair[1] else ""
    number = "{:.0f}" if white > 1 else "{:g}"
    shown = [number.format(value) for value in (low, high, white, *pair)]
    return (
        f"The images with more than 8 bits have values from {shown[0]} to {shown[1]}, less than an eighth of 0 to "
        f'{shown[2]}, which pixel_range="auto" maps onto black and white: little of them is left. Pass the values that '
        f"stand for black and white{such.format(*shown)}."
    )


@dataclass(frozen=True)
class Reading:
    """How pictures are read that can be read in more than one way.

    Parameters
    ----------
    pixel_range : "auto" or (float, float), default="auto"
        The values that stand for black and white, where samples have more than 8 bits.
    fourth_band : {"alpha", "ignore"}, default="alpha"
        Whether a fourth band beside three colours is transparency, or nothing of interest.
    full_depth : bool, default=False
        Whether pictures with more than 8 bits a sample stay floats under "auto", as they do with a pair.
    seen : Seen
        Told of the values of such pictures, under "auto".
    """

    pixel_range: PixelRange = "auto"
    fourth_band: str = "alpha"
    full_depth: bool = False
    seen: Seen = field(default_factory=Seen, compare=False, repr=False)

    def digest_of(self, content: Content) -> bytes:
        """What stands for the picture: the digest of the bytes, and where they leave it open, of how they are read."""
        words = self.words(content.traits) if content.traits else ""
        return xxhash.xxh3_128_digest(content.digest + words.encode()) if words else content.digest

    def words(self, traits: int) -> str:
        """What of the reading matters to pictures with some traits; empty where nothing but the usual does."""
        found = [way(self) for trait, way in _DEPENDING.items() if trait & traits]
        return "; ".join(filter(None, found))


def digest_under(seed: int, kind: str, content: bytes | memoryview) -> bytes:
    """16 bytes that stand for some content of a kind; another seed gives unrelated ones."""
    hasher = xxhash.xxh3_128(f"{kind}\n".encode(), seed=seed)
    hasher.update(content)
    return hasher.digest()


def _of_deep(reading: Reading) -> str:
    if not isinstance(reading.pixel_range, str):
        low, high = reading.pixel_range
        return f"from {float(low)!r} to {float(high)!r}"
    return "full depth" if reading.full_depth else ""


def _of_four_bands(reading: Reading) -> str:
    return "" if reading.fourth_band == "alpha" else f"fourth band: {reading.fourth_band}"


#: What changes the reading of pictures of each kind, and of no others.
_DEPENDING: dict[int, Callable[[Reading], str]] = {
    DEEP: _of_deep,
    FOUR_BANDS: _of_four_bands,
    REREAD: lambda _: "all bytes",
    HEIF: lambda _: heif.heif_version() or "",
}
