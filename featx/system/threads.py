"""How many threads work: what ``n_jobs`` means, and one where a fork took torch's threads away."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

from featx.system.forks import at_fork
from featx.system.locks import ForkSafeLock

T = TypeVar("T")
P = ParamSpec("P")


def n_threads(n_jobs: int | None, default: int) -> int:
    """The default for None, otherwise joblib's reading of ``n_jobs``, whatever backend joblib is set to."""
    from joblib import cpu_count

    if n_jobs is None:
        return default
    return n_jobs if n_jobs > 0 else max(1, cpu_count() + 1 + n_jobs)


@contextmanager
def one_thread_after_fork() -> Iterator[None]:
    """Torch with one thread, in a child that was forked from a process with torch in it; nothing anywhere else.

    A fork copies the one thread that forks. OpenMP, which torch shares its work with, then waits for ever for the
    others, which only a count of one keeps it from asking for. Whatever uses torch is run within this, as a ``with``
    block or with this as a decorator; the count is afterwards what it was. May be nested, and entered by several
    threads at once.
    """
    with nullcontext() if _child is None else _child.alone():
        yield


def step_by_step(function: Callable[P, Generator[T]]) -> Callable[P, Generator[T]]:
    """Decorates a function that returns a generator: each of its steps within `one_thread_after_fork`.

    Whoever takes what it yields finds the thread count as it was.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **given: P.kwargs) -> Generator[T]:
        with closing(function(*args, **given)) as steps:
            while True:
                with one_thread_after_fork():
                    try:
                        step = next(steps)
                    except StopIteration:
                        return
                yield step

    return wrapper


class ForkSafeMethods:
    """Makes the public methods of all subclasses run within `one_thread_after_fork`."""

    def __init_subclass__(cls, **given: object) -> None:
        super().__init_subclass__(**given)
        for name, method in list(vars(cls).items()):
            if not name.startswith("_") and inspect.isfunction(method):
                setattr(cls, name, one_thread_after_fork()(method))


class _ForkedChild:
    """A process whose torch has lost its threads."""

    def __init__(self) -> None:
        self._lock, self._inside = ForkSafeLock(), 0
        self._of_thread = threading.local()
        self._before = 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One thread for the thread that enters, however deeply."""
        if getattr(self._of_thread, "is_inside", False):
            yield
            return
        self._of_thread.is_inside = True
        self._enter()
        try:
            yield
        finally:
            self._leave()
            self._of_thread.is_inside = False

    def _enter(self) -> None:
        import torch

        with self._lock.held():
            count = torch.get_num_threads()  # every thread has its own; a new one takes what was last set
            if not self._inside:
                self._before = count
            # A one that is found while another thread is inside was set there, and is no count of the user's.
            self._of_thread.before = self._before if count == 1 else count
            self._inside += 1
            torch.set_num_threads(1)

    def _leave(self) -> None:
        import torch

        with self._lock.held():
            self._inside -= 1
            torch.set_num_threads(self._of_thread.before)  # which starts none


_child: _ForkedChild | None = None


def _after_fork_in_child() -> None:
    global _child
    _child = _ForkedChild() if "torch" in sys.modules else None


at_fork(after_in_child=_after_fork_in_child)
