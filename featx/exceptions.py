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
    """


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

    Attributes
    ----------
    problem, row, source, reason
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
    ) -> None:
        super().__init__(problem if remedy is None else f"{problem} {remedy}")
        self.problem = problem.removesuffix(".")
        self.row = row
        self.source = source
        self.reason = reason

    @classmethod
    def at(cls, row: int, source: str | None, reason: str, remedy: str) -> ImageError:
        """Of one row of X, by its place, its file, what is wrong with it, and what to do about it."""
        where = f"X[{row}]" if source is None else f"X[{row}] ({source!r})"
        problem = f"{where} is not a readable image: {reason}."
        return cls(problem, row=row, source=source, reason=reason, remedy=remedy)


class LayerError(FeatxError, ValueError):
    """A layer that the network does not have, or that cannot be read as asked."""


class BackboneError(FeatxError, ValueError):
    """A backbone that is not known or cannot be built."""


class WeightsError(FeatxError, ValueError):
    """Weights that cannot be found, fetched or fitted to the network."""


class OutOfMemory(FeatxError, MemoryError):
    """A device has not enough memory for a batch; the message says what to change."""


class StoreError(FeatxError, OSError):
    """The feature store cannot do what it was asked: its disk is full, read-only, damaged, or of a wrong kind."""


class StoreWarning(UserWarning):
    """Features are right, but not kept, or not found where they were kept before; the message says why."""
