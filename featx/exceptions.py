"""The errors that featx raises on its own account.

Each is also the builtin it comes closest to, so that code which knows nothing of featx catches it too.
"""

from __future__ import annotations

#: What to do about an image that cannot be read, whatever is to become of its row.
REMOVE_IT = "Remove it: featx.find_unreadable lists all such rows."


class FeatxError(Exception):
    """Base of all errors of this package."""


class UnreadableImage(FeatxError, ValueError):
    """One picture that cannot be read, seen from where its place in X is not known.

    Its message is the reason alone ("truncated JPEG"); whoever knows the row turns it into an :class:`ImageError`.

    Parameters
    ----------
    reason : str
    advice : str or None, default=None
        What to do about it, as a sentence, where that is something else than to go without the picture.
    """

    def __init__(self, reason: str, advice: str | None = None) -> None:
        super().__init__(reason)
        self.advice = advice


class ImageError(FeatxError, ValueError):
    """One item of X that cannot be read.

    Parameters
    ----------
    problem : str
        What is wrong, as a sentence.
    row : int or None, default=None
        Position in X, counted from 0.
    source : str or None, default=None
        The file it was read from, None for pixels in memory.
    reason : str or None, default=None
        What is wrong, alone ("truncated JPEG").
    remedy : str or None, default=None
        What to do about it, as a sentence: the end of the message.
    advice : str or None, default=None
        What makes this very image readable, where something does; it takes the remedy's place.

    Attributes
    ----------
    problem, row, source, reason, advice
        As given; the problem without its full stop.
    """

    def __init__(
        self,
        problem: str,
        *,
        row: int | None = None,
        source: str | None = None,
        reason: str | None = None,
        remedy: str | None = None,
        advice: str | None = None,
    ) -> None:
        told = advice or remedy
        super().__init__(problem if told is None else f"{problem} {told}")
        self.problem = problem.removesuffix(".")
        self.row = row
        self.source = source
        self.reason = reason
        self.advice = advice

    @property
    def explanation(self) -> str:
        """The reason, and what makes this very image readable, where something does."""
        reason = self.reason or self.problem
        return reason if self.advice is None else f"{reason}. {self.advice}"

    @classmethod
    def at(cls, row: int, source: str | None, reason: str, remedy: str, advice: str | None = None) -> ImageError:
        """Of one row of X, by its place, its file, what is wrong with it, and what to do about it."""
        where = f"X[{row}]" if source is None else f"X[{row}] ({source!r})"
        problem = f"{where} is not a readable image: {reason}."
        return cls(problem, row=row, source=source, reason=reason, remedy=remedy, advice=advice)


class NotFinite(ImageError):
    """One item of X that was read, and whose features in a layer that was asked for are not finite numbers."""

    #: What its ``reason`` begins with.
    PHRASE = "features that are not finite"

    _why: tuple[str, str]

    @classmethod
    def of(cls, row: int, source: str | None, reason: str, remedy: str) -> NotFinite:
        """Of one row of X, by its place, its file, the layer with what is wrong there, and what to do about it."""
        where = f"X[{row}]" if source is None else f"X[{row}] ({source!r})"
        problem = f"Finite features are expected, got NaN or infinity of {where} {reason}."
        error = cls(problem, row=row, source=source, reason=f"{cls.PHRASE} {reason}. {remedy}", remedy=remedy)
        error._why = reason, remedy
        return error

    def elsewhere(self, row: int, source: str | None) -> NotFinite:
        """The same for another place in X where the same picture stands."""
        return self.of(row, source, *self._why)


class LayerError(FeatxError, ValueError):
    """A layer that the network does not have, or that cannot be read as asked."""


class BackboneError(FeatxError, ValueError):
    """A backbone that is not known or cannot be built."""


class WeightsError(FeatxError, ValueError):
    """Weights that cannot be found, fetched or fitted to the network."""


class EngineError(FeatxError, ValueError):
    """An engine that cannot compute what it was asked for; the message says why."""


class OutOfMemory(FeatxError, MemoryError):
    """A device has not enough memory for a batch; the message says what to change."""


class StoreError(FeatxError, OSError):
    """The feature store cannot do what it was asked: its disk is full, read-only, damaged, or of a wrong kind."""


class StoreWarning(UserWarning):
    """Features are right, but not kept, or not found where they were kept before; the message says why."""
