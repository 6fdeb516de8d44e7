"""What files say differently to different readers, and what a digest has to tell of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import xxhash

from featx.images import heif
from featx.system.callers import frames_to_caller
from featx.system.locks import ForkSafeLock

PixelRange: TypeAlias = str | tuple[float, float]  # the str is "auto"
Span: TypeAlias = tuple[float, float]

#: What a file may be that makes its reading depend on more than its bytes; to be added up.
DEEP, FOUR_BANDS, HEIF, REREAD, UNOPENED = 1, 2, 4, 8, 16

#: How the values of a picture lie in the range that is read: as they should, in little of it, or beyond it.
WITHIN, LITTLE, BEYOND = 1, 2, 3
#: Part of the range of values that a picture uses in the least, or much of it is lost.
_LEAST_USED = 1 / 8
#: Part of the range by which values may lie beyond it: what rounding and resampling do.
_OVERSHOOT = 1 / 100
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


class Lot(NamedTuple):
    """Pictures of one kind: how many, and their lowest and highest value."""

    number: int
    low: float
    high: float


class Seen:
    """How the values of the pictures that one call has decoded, in whatever thread, lie in the range that is read.

    Of pictures in which that is left open: with more than 8 bits a sample, or arrays where the range is given. Each is
    judged by itself, so that its company changes nothing, and counts once, however often it is decoded.

    Attributes
    ----------
    lots : dict of (int, (float, float)) to Lot
        By kind (`WITHIN`, `LITTLE`, `BEYOND`) and by the values that stood for black and white.
    """

    def __init__(self) -> None:
        self.lots: dict[tuple[int, Span], Lot] = {}
        self._kinds = bytearray()  # by row
        self._is_told = False

    def note(self, row: int, kind: int, low: float, high: float, limits: Span) -> None:
        """Take the values of the picture in one row of X into account."""
        with _LOCK.held():
            self._kinds.extend(bytes(max(0, row + 1 - len(self._kinds))))
            self._put((kind, limits), Lot(int(not self._kinds[row]), low, high))
            self._kinds[row] = kind

    def add(self, other: Seen) -> None:
        """Take other rows into account, wherever they were decoded."""
        with _LOCK.held():
            for key, lot in other.lots.items():
                self._put(key, lot)

    def rows(self, kind: int) -> list[int]:
        """Rows of the pictures of a kind that were noted here."""
        return [row for row, its in enumerate(self._kinds) if its == kind]

    def tell(self) -> None:
        """Warn, once, of the pictures that use little of their range, or lie beyond it."""
        n_pictures = sum(lot.number for lot in self.lots.values())
        odd = [(lot, *key) for key, lot in self.lots.items() if key[0] in _TOLD]
        if odd and not self._is_told:
            self._is_told = True
            lot, kind, limits = max(odd)  # the most, where there are several kinds
            warnings.warn(_TOLD[kind](lot, limits, n_pictures), UserWarning, stacklevel=frames_to_caller())

    def _put(self, key: tuple[int, Span], lot: Lot) -> None:
        known = self.lots.get(key, Lot(0, lot.low, lot.high))
        self.lots[key] = Lot(known.number + lot.number, min(known.low, lot.low), max(known.high, lot.high))


def _told_little(lot: Lot, limits: Span, n_pictures: int) -> str:
    use = "uses" if lot.number == 1 else "use"
    return (
        f"{lot.number} of {n_pictures} images with more than 8 bits {use} less than an eighth of 0 to "
        f"{_typed(limits[1], limits)} (values from {_typed(lot.low, limits)} to {_typed(lot.high, limits)}), which "
        f'pixel_range="auto" maps onto black and white: little of them is left. {_advice(lot, limits)}.'
    )


def _told_beyond(lot: Lot, limits: Span, n_pictures: int) -> str:
    have = "image has" if lot.number == 1 else "images have"
    return (
        f"{lot.number} {have} values from {_typed(lot.low, limits)} to {_typed(lot.high, limits)}, beyond "
        f"pixel_range=({limits[0]:g}, {limits[1]:g}), which maps them to darker than black or lighter than white. "
        f"{_advice(lot, limits)}, or clip them."
    )


_TOLD = {LITTLE: _told_little, BEYOND: _told_beyond}


def _advice(lot: Lot, limits: Span) -> str:
    # A camera of b bits starts at 0; a window elsewhere is what is seen of it, and one value shows none.
    full = 2 ** int(max(lot.high, 0)).bit_length() - 1
    pair = (0, full) if limits[1] > 1 and 0 <= lot.low < full / 2 else (lot.low, lot.high)
    low, high = (_typed(value, limits) for value in pair)
    such = f", such as pixel_range=({low}, {high})" if pair[0] < pair[1] and pair != limits else ""
    return f"Pass the values that stand for black and white{such}"


def _typed(value: float, limits: Span) -> str:
    return f"{value:.0f}" if limits[1] > 1 else f"{value:g}"


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
        Told of the values of such pictures, and of arrays where a pair is given.
    row : int, default=0
        Of X, as `seen` is told.
    """

    pixel_range: PixelRange = "auto"
    fourth_band: str = "alpha"
    full_depth: bool = False
    seen: Seen = field(default_factory=Seen, compare=False, repr=False)
    row: int = field(default=0, compare=False, repr=False)

    def at(self, row: int) -> Reading:
        """The same, for the picture in a row of X."""
        return replace(self, row=row)

    def note(self, low: float, high: float, white: float) -> None:
        """Remember how the values of the picture lie in the range; ``white`` is what stands for it under "auto"."""
        if isinstance(self.pixel_range, str):
            limits, is_odd, odd = (0.0, white), high - low < _LEAST_USED * white, LITTLE
        else:
            limits, odd = self.pixel_range, BEYOND
            margin = _OVERSHOOT * (limits[1] - limits[0])
            is_odd = low < limits[0] - margin or high > limits[1] + margin
        self.seen.note(self.row, odd if is_odd else WITHIN, low, high, (float(limits[0]), float(limits[1])))

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
