"""LMDB environments: opened once per process, reopened after a fork or a replacement, grown when full."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from featx.exceptions import StoreError
from featx.system.forks import at_fork

T = TypeVar("T")
Operation = Callable[[lmdb.Transaction, dict[str, Any]], T]

# Reserved addresses, not memory or disk. Where they are rationed, a smaller map is taken and grown when it is full.
_MAP_SIZES = (1 << 40, 1 << 34, 1 << 28)
_MOST_OPEN = 16  # each holds files open and a map of addresses
#: About how many bytes of files a process has mapped into its memory. What was read of a map counts as a process's
#: memory, and joblib stops a worker whose memory grows by 300 MB.
MOST_MAPPED = 64 * 2**20
# Bytes that a system may map around one record: a leaf and what it points to, each in a window of its own.
_WINDOWS = 2 * 2**16
_READER_SLOTS = 1024
_ATTEMPTS = 8
_FORK_PATIENCE_S = 5.0
_PAUSE_S = 0.02

_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
    lmdb.BadDbiError,
)


class Damaged(StoreError):
    """The files in a folder hold no database."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"{folder} is damaged ({reason})")
        self.folder = folder


class Deleted(StoreError):
    """The folder that the database's folder lies in is gone."""


class _Replaced(Exception):
    """Another process put a new database in this one's place."""


@dataclass(frozen=True)
class Database:
    """One LMDB database in a folder of its own.

    Parameters
    ----------
    folder : Path
        Made when it is missing; its parent is not.
    tables : tuple of str
        Names of the tables that operations are handed.
    durable : bool
        Whether a commit waits for the disk. Without, a crash of the machine (not of the process) can cost the whole.
    """

    folder: Path
    tables: tuple[str, ...]
    durable: bool

    def read(self, operation: Operation[T], n_records: int = 0, record_bytes: int = 0) -> T:
        """Result of ``operation(transaction, tables)``, which must copy what it keeps out of the buffers.

        ``n_records`` is how many are looked up, where they may be many, and ``record_bytes`` what is read of each.

        Raises
        ------
        StoreError
        """
        result = self._attempt(lambda environment: environment.run(operation, write=False))
        if n_records:
            _let_go(self.folder, n_records * (_WINDOWS + record_bytes))
        return result

    def write(self, operation: Operation[T]) -> T:
        """As `read`, with changes committed. The operation runs again where the map had to grow."""
        return self._attempt(lambda environment: environment.run(operation, write=True))

    def live_bytes(self) -> int:
        """Bytes of the pages in use, without those that were freed."""

        def count(txn: lmdb.Transaction, tables: dict[str, Any]) -> int:
            stats = [txn.stat(table) for table in tables.values()]
            return sum(
                stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) for stat in stats
            )

        return self.read(count)

    def file_bytes(self) -> int:
        """Bytes on disk."""
        return disk_bytes(self.folder)

    def compact(self, target: Path) -> None:
        """Write a copy without free pages into the folder ``target``."""
        self._attempt(lambda environment: environment.copy(target))

    def close(self) -> None:
        """Close it in this process. It opens again when it is needed."""
        with _REGISTRY_LOCK:
            mine = [key for key, environment in _REGISTRY.items() if environment.database.folder == self.folder]
            closing = [_forget(key) for key in mine]
        # Outside the lock: a transaction that has to end first may itself be waiting for it.
        for environment in closing:
            environment.close()

    def _attempt(self, use: Callable[[_Environment], T]) -> T:
        for attempt in range(_ATTEMPTS):
            with contextlib.suppress(_Replaced), _trouble_of(self.folder):
                return use(_registered(self))
            time.sleep(attempt * _PAUSE_S)
        raise StoreError(f"{self.folder} is being replaced over and over by other processes")


class _Environment:
    """What LMDB allows once per process and file."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._turn = threading.Condition()
        self._running = 0
        self.mapped = 0  # bytes at most, since it was opened
        self._resizing = self._closed = False
        self.lmdb, self.readonly = _open(database)
        try:
            # Holding the file open keeps its inode number from being given to another.
            self._file = os.open(database.folder / "data.mdb", os.O_RDONLY)
            status = os.fstat(self._file)
            self.key = status.st_dev, status.st_ino
            self.tables = {name: self.lmdb.open_db(name.encode(), create=not self.readonly) for name in database.tables}
        except BaseException:
            self.lmdb.close()
            raise

    def is_current(self) -> bool:
        """Whether the file that is open is the one that lies in the folder."""
        try:
            status = os.stat(self.database.folder / "data.mdb")
        except OSError:
            return False
        return not self._closed and (status.st_dev, status.st_ino) == self.key

    def run(self, operation: Operation[T], *, write: bool) -> T:
        if write and self.readonly:
            raise StoreError(f"{self.database.folder} is read-only")
        for _ in range(_ATTEMPTS):
            try:
                with self.entered(), self.lmdb.begin(write=write, buffers=True) as txn:
                    result = operation(txn, self.tables)
                    if write and not self.is_current():
                        raise _Replaced  # a commit into a deleted file would succeed and be lost
                return result
            # The transaction is over by now, and nothing of it is left: it may run again.
            except lmdb.MapFullError:
                self._resize(lambda: 2 * self.lmdb.info()["map_size"])
            except lmdb.MapResizedError:
                self._resize(lambda: 0)  # to what another process made of it
            except lmdb.ReadersFullError:
                with self.entered():
                    self.lmdb.reader_check()
            except lmdb.BadRslotError:
                continue  # older releases of lmdb free the parent's place when a forked child closes its copy
            except lmdb.Error as error:
                # Another container's process of this number has the place among the readers, and may end.
                if "temporarily unavailable" not in str(error):
                    raise
                time.sleep(_PAUSE_S)
        raise StoreError(
            f"{self.database.folder} stayed full or busy; containers that share it need different process numbers "
            f"(this one is {os.getpid()})"
        )

    def copy(self, target: Path) -> None:
        with self.entered():
            self.lmdb.copy(str(target), compact=True)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Held around every transaction: the map must not be resized under one."""
        with self._turn:
            self._turn.wait_for(lambda: not self._resizing)
            if self._closed:
                raise _Replaced  # between finding it and entering it
            self._running += 1
        try:
            yield
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    @contextmanager
    def alone(self, patience_s: float | None = None) -> Iterator[None]:
        """Held while no transaction of this process is open."""
        with self._turn:
            self._turn.wait_for(lambda: not self._resizing)
            self._resizing = True  # first, or there might always be a new one
            # A thread that forks inside of its own transaction would wait for itself: hence the patience.
            self._turn.wait_for(lambda: self._running == 0, patience_s)
        try:
            yield
        finally:
            with self._turn:
                self._resizing = False
                self._turn.notify_all()

    def add_mapped(self, n_bytes: int) -> None:
        """Count what reading may have mapped, at most the file."""
        with self._turn:
            if not (self._closed or self._resizing):  # or about to be
                self.mapped = min(self.mapped + n_bytes, os.fstat(self._file).st_size)

    def close_if_idle(self) -> bool:
        """Close it unless somebody in this process is using it; never waits."""
        with self._turn:
            if self._running or self._resizing:
                return False
            self._closed = True
            self.lmdb.close()
            os.close(self._file)
            return True

    def close(self) -> None:
        with self.alone():
            if not self._closed:
                self._closed = True
                self.lmdb.close()
                os.close(self._file)

    def close_in_child(self) -> None:
        """Close what a fork copied; nobody is left in the child who could hold the condition."""
        with contextlib.suppress(lmdb.Error, OSError):
            self.lmdb.close()
        with contextlib.suppress(OSError):
            os.close(self._file)

    def _resize(self, size: Callable[[], int]) -> None:
        with self.alone():
            if self._closed:
                raise _Replaced  # meanwhile, by another thread
            self.lmdb.set_mapsize(size())


def _open(database: Database) -> tuple[lmdb.Environment, bool]:
    folder = database.folder
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError as error:
        raise Deleted(f"{folder.parent} was deleted") from error
    options: dict[str, Any] = {
        "max_dbs": len(database.tables),
        "max_readers": _READER_SLOTS,
        "mode": 0o600,
        "metasync": False,  # a crash of the machine may take the last commit back, whose rows are then computed again
        "sync": database.durable,
    }
    try:
        _reserve_lock_file(folder)
        opened, readonly = _map(folder, options), False
    except (OSError, lmdb.Error) as error:
        if not _refuses_writing(error):
            raise
        opened, readonly = _map(folder, options | {"readonly": True, "create": False}), True
    opened.reader_check()  # for a reader that was killed, freed pages would be kept for ever
    _check_complete(opened, folder)
    return opened, readonly


def _reserve_lock_file(folder: Path) -> None:
    """LMDB writes to its lock file through memory: on a full disk that would end the process, and so fails here."""
    size = 64 * _READER_SLOTS + 8192
    if hasattr(os, "posix_fallocate"):
        file = os.open(folder / "lock.mdb", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(file).st_blocks * 512 < size:
                os.posix_fallocate(file, 0, size)
        finally:
            os.close(file)


def _map(folder: Path, options: dict[str, Any]) -> lmdb.Environment:
    for size in _MAP_SIZES[:-1]:
        with contextlib.suppress(lmdb.MemoryError):
            return lmdb.open(str(folder), map_size=size, **options)
    return lmdb.open(str(folder), map_size=_MAP_SIZES[-1], **options)


def _refuses_writing(error: Exception) -> bool:
    return isinstance(error, lmdb.ReadonlyError | PermissionError) or any(
        words in str(error) for words in ("Permission denied", "Read-only file system")
    )


def _check_complete(opened: lmdb.Environment, folder: Path) -> None:
    """Reading a page that was cut off would end the process."""
    expected = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
    there = (folder / "data.mdb").stat().st_size
    if there < expected:
        opened.close()
        raise Damaged(folder, f"data.mdb was cut short to {there} bytes of {expected}")


@contextmanager
def _trouble_of(folder: Path) -> Iterator[None]:
    """LMDB's and the system's errors in the store's words."""
    try:
        yield
    except StoreError:
        raise
    except _DAMAGE as error:
        raise Damaged(folder, str(error)) from error
    except (lmdb.Error, OSError, MemoryError) as error:
        if "already open" in str(error):
            raise _Replaced from error  # by another thread, which is closing it
        raise StoreError(f"{folder}: {error}") from error


_REGISTRY: OrderedDict[tuple[int, int], _Environment] = OrderedDict()  # by device and inode of the data file
_BY_FOLDER: dict[Path, _Environment] = {}
_REGISTRY_LOCK = threading.RLock()


def _registered(database: Database) -> _Environment:
    """The open environment of a folder, whatever path leads to it."""
    environment = _BY_FOLDER.get(database.folder)
    # Without the lock, which whoever is inside a transaction must not wait for.
    if environment is not None and environment.is_current():
        return environment
    with _REGISTRY_LOCK:
        closing = _stale(database.folder)
    for other in closing:  # outside the lock: a transaction that has to end first may itself be waiting for it
        other.close()
    with _REGISTRY_LOCK:
        # By its file, since several paths may lead to it: a second map of one file would break the first one's locks.
        environment = _opened(database) or _Environment(database)
        _REGISTRY[environment.key] = _BY_FOLDER[database.folder] = environment
        _REGISTRY.move_to_end(environment.key)
        for key, other in list(_REGISTRY.items())[: max(0, len(_REGISTRY) - _MOST_OPEN)]:
            if other.close_if_idle():
                _forget(key)
    return environment


def _let_go(folder: Path, n_bytes: int) -> None:
    """After reading about so much: close what nobody is using, where much is mapped. It opens again when needed."""
    environment = _BY_FOLDER.get(folder)
    if environment is None:
        return
    environment.add_mapped(n_bytes)
    if not _REGISTRY_LOCK.acquire(blocking=False):  # for which whoever is inside a transaction must not wait
        return
    try:
        if sum(other.mapped for other in _REGISTRY.values()) > MOST_MAPPED:
            for key, other in list(_REGISTRY.items()):
                if other.mapped and other.close_if_idle():
                    _forget(key)
    finally:
        _REGISTRY_LOCK.release()


def _stale(folder: Path) -> list[_Environment]:
    """Taken out of the registry: what is open of a folder and no longer lies there."""
    keys = [key for key, other in _REGISTRY.items() if other.database.folder == folder and not other.is_current()]
    return [_forget(key) for key in keys]


def _forget(key: tuple[int, int]) -> _Environment:
    environment = _REGISTRY.pop(key)
    for folder in [folder for folder, other in _BY_FOLDER.items() if other is environment]:
        del _BY_FOLDER[folder]
    return environment


def _opened(database: Database) -> _Environment | None:
    try:
        status = os.stat(database.folder / "data.mdb")
    except OSError:
        return None
    return _REGISTRY.get((status.st_dev, status.st_ino))


def disk_bytes(folder: Path) -> int:
    """Bytes that the files under a folder take on disk; files that vanish meanwhile do not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(root, name))
                # What is allocated: files have holes, where the system knows any.
                total += getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
    return total


# A fork between the beginning and the end of a transaction would leave the child with half of it, and closing that
# half would free the parent's place among the readers.
_FORKING = contextlib.ExitStack()


def _before_fork() -> None:
    _REGISTRY_LOCK.acquire()
    for environment in _REGISTRY.values():
        _FORKING.enter_context(environment.alone(_FORK_PATIENCE_S))


def _after_fork_in_parent() -> None:
    _FORKING.close()
    _REGISTRY_LOCK.release()


def _after_fork_in_child() -> None:
    global _REGISTRY_LOCK, _FORKING
    for environment in _REGISTRY.values():
        environment.close_in_child()
    _REGISTRY.clear()
    _BY_FOLDER.clear()
    _FORKING, _REGISTRY_LOCK = contextlib.ExitStack(), threading.RLock()


at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
