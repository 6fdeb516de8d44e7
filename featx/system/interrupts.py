"""Ctrl-C, of which the first may end a part of the work alone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupts:
    """While it is entered, Ctrl-C raises KeyboardInterrupt as usual, but for a first one that has to wait.

    Parameters
    ----------
    said : callable ()
        Called in place of raising, at a first Ctrl-C while ``waits`` is true.

    Attributes
    ----------
    count : int
        How often Ctrl-C was pressed.
    waits : bool
        Whether the first does not raise.
    """

    def __init__(self, said: Callable[[], None]) -> None:
        self._said = said
        self.count = 0
        self.waits = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        # Other threads get no signals; a process that was told to ignore them goes on doing so.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not (
            signal.SIG_IGN
        ):
            self._before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """From now on Ctrl-C is what it was before."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1 and self.waits:
            # In another thread: this one may be in the middle of writing to the same place.
            threading.Thread(target=self._said, daemon=True).start()
        else:
            raise KeyboardInterrupt
