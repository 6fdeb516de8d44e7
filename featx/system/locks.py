"""Locks that a forked child finds free."""

from __future__ import annotations

import threading
import weakref
from contextlib import AbstractContextManager

from featx.system.forks import at_fork

_ALL: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


class ForkSafeLock:
    """A reentrant lock, entered by ``with lock.held():``.

    In a forked child it starts anew: nobody is left there to release what another thread of the parent held.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _ALL.add(self)

    def held(self) -> AbstractContextManager[bool]:
        """The lock itself: what was entered is what is left, also where a fork comes between."""
        return self._lock


def _renew() -> None:
    for lock in list(_ALL):
        lock._lock = threading.RLock()


at_fork(after_in_child=_renew)
