"""scikit-learn's fits: each on one thread of BLAS, and as many of them at once as BLAS had threads.

The products in a linear model's fit are thin (rows x columns x classes). Several threads of BLAS spend more time on
waiting for each other than on such a product, and where another process has a core, nearly all of it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from featx.system.compat import set_blas_threads
from featx.system.locks import ForkSafeLock

T = TypeVar("T")

# Rows x columns x outputs of all fits together; below, Python's part of a fit, which is never shared, is most of it.
_LEAST_WORK = 2**26
# What fits that run at once may copy of their rows.
_MOST_BYTES = 2**31


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS of numpy and scipy on one thread, for all threads of this process; torch's own threads stay as they are.

    The count is afterwards what it was, also after an error. May be nested, and entered by several threads at once: the
    last to leave puts the count back.
    """
    _blas.enter()
    try:
        yield
    finally:
        _blas.leave()


def run_fits(calls: Sequence[Callable[[], T]], work: int, n_bytes: int) -> list[T]:
    """Call each, on one thread of BLAS, several at once where that pays, and return what they give.

    How many is decided by sizes alone: at most one for each thread that BLAS has, which is one in a worker of joblib's,
    under ``OMP_NUM_THREADS=1`` and within `one_thread`. They run in threads: scikit-learn's linear models let others
    run while they compute, nothing is copied or pickled, and no process is left behind.

    Parameters
    ----------
    calls : sequence of callables
    work : int
        Rows x columns x outputs of one fit.
    n_bytes : int
        What one fit copies.

    Raises
    ------
    BaseException
        Of the first call that failed, or of Ctrl-C; those that still run are then ended, and none is begun.
    """
    n = _n_at_once(len(calls), work, n_bytes)
    with one_thread():
        return [call() for call in calls] if n == 1 else _Threads().run(calls, n)


def _n_at_once(n_calls: int, work: int, n_bytes: int) -> int:
    if n_calls * work < _LEAST_WORK:
        return 1
    from joblib import cpu_count

    return max(1, min(n_calls, _blas.n_threads(), cpu_count(), _MOST_BYTES // max(1, n_bytes)))


class _Blas:
    """The BLAS libraries of this process."""

    def __init__(self) -> None:
        self._lock, self._inside = ForkSafeLock(), 0
        self._before: dict[str, tuple[Any, int]] = {}  # by file: the library, and how many threads it had

    def n_threads(self) -> int:
        """The most that one of them takes; 1 where there is none that can be asked."""
        return max((library.num_threads for library in _libraries()), default=1)

    def enter(self) -> None:
        with self._lock.held():
            for library in _libraries():
                self._before.setdefault(library.filepath, (library, library.num_threads))
                set_blas_threads(library, 1)
            self._inside += 1

    def follow(self) -> None:
        """The same for a thread that works for one inside: a BLAS that is built on OpenMP counts for each thread."""
        for library in _libraries():
            set_blas_threads(library, 1)

    def leave(self) -> None:
        with self._lock.held():
            self._inside -= 1
            if not self._inside:
                for library, n_threads in self._before.values():
                    set_blas_threads(library, n_threads)
                self._before.clear()


def _libraries() -> list[Any]:
    """Those that are loaded by now."""
    from threadpoolctl import ThreadpoolController

    try:
        return ThreadpoolController().select(user_api="blas").lib_controllers
    except OSError:  # of a Linux without /proc, where nothing tells which libraries there are
        return []


_blas = _Blas()


class _Stopped(BaseException):
    """Raised in a thread whose result nobody waits for any more."""


class _Threads:
    """Threads that can be stopped in the middle of a fit."""

    def __init__(self) -> None:
        self._lock, self._running = threading.Lock(), set[int]()

    def run(self, calls: Sequence[Callable[[], T]], n: int) -> list[T]:
        with ThreadPoolExecutor(n, thread_name_prefix="featx-fit", initializer=_blas.follow) as pool:
            try:
                futures = [pool.submit(self._told, call) for call in calls]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise

    def _told(self, call: Callable[[], T]) -> T:
        """Call, and have it known meanwhile that this thread may be stopped."""
        with self._lock:
            self._running.add(threading.get_ident())
        try:
            return call()
        finally:
            with self._lock:
                self._running.discard(threading.get_ident())

    def _stop(self) -> None:
        """End what runs at its next step in Python, which an iteration of a fit ends with."""
        with self._lock:
            for thread in self._running:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))
