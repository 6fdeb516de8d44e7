"""The errors that featx raises on its own account.

Each is also the builtin it comes closest to, so that code which knows nothing of featx catches it too.
"""

from __future__ import annotations


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
    message : str
        What is wrong and what to do about it.
    row : int or None, default=None
        Position in X, counted from 0.
    source : str or None, default=None
        The file it was read from, None for pixels in memory.
    reason : str or None, default=None
        What is wrong, alone ("truncated JPEG").
    advice : str or None, default=None
        What makes this very image readable, where something does.
    """

    def __init__(
        self,
        message: str,
        *,
        row: int | None = None,
        source: str | None = None,
        reason: str | None = None,
        advice: str | None = None,
    ) -> None:
        super().__init__(message)
        self.row = row
        self.source = source
        self.reason = reason
        self.advice = advice


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
