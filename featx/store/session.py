"""One call's dealings with a store: whatever happens to the disk, the call goes on."""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import xxhash

from featx.exceptions import ImageError, StoreError, StoreWarning
from featx.images.items import PathItem
from featx.images.sources import Items
from featx.store.environment import Damaged, Deleted
from featx.store.files import LARGEST_SHARE
from featx.store.index import Claims, digest_or_error
from featx.store.memory import MEMORY
from featx.store.places import NoPlace, OnNetwork, parse_size
from featx.store.shelf import Column, Group, Shelf
from featx.store.store import FeatureStore, _Opened
from featx.system.callers import frames_to_caller

T = TypeVar("T")

#: Seconds between two looks at what others are computing.
POLL_S = 0.05
# Rows looked up at once: enough to make a look-up cheap per row, within this much memory.
MOST_ROWS, _MOST_BYTES = 4096, 2**28
#: Images whose features this process has put into each store, counted once per recipe.
KEPT: Counter[str] = Counter()
_SHARE_AT_ONCE = 0.1  # of max_size, so that room can be made for it


def rows_in_memory(columns: Sequence[Column]) -> int:
    """How many rows of some columns to have in memory at once."""
    return max(1, _MOST_BYTES // (4 * sum(column.width for column in columns)))


class Session:
    """A store as one call sees it, with the process's memory in front.

    A context manager: on leaving, images that were claimed and not computed are free for others. After the first
    trouble with the disk it warns once and keeps the call going with the memory alone.

    Parameters
    ----------
    store : FeatureStore
    memory : bool, default=True
        Whether rows that this process has in memory count as known.

    Raises
    ------
    OnNetwork
        The store lies on a network file system.
    """

    def __init__(self, store: FeatureStore, memory: bool = True) -> None:
        self._store, self._memory, self._off = store, memory, False
        self._opened: _Opened | None = None
        self._opened = self._try(store._open, lambda: None)
        self._shelf: Shelf | None = None
        self._recipe, self._description = b"", ""
        self._claims: Claims | None = None

    @property
    def keep(self) -> str:
        """As in FeatureStore."""
        return self._store.keep

    @property
    def description(self) -> str:
        """Of the recipe that was chosen; empty before."""
        return self._description

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._claims is not None:
            self._claims.close()
            self._claims = None

    def open_recipe(self, description: str) -> None:
        """Choose the recipe whose rows are asked for, by all that can change them, in words."""
        self._recipe, self._description = xxhash.xxh3_128_digest(description.encode()), description
        if self._opened is not None:
            self._shelf = self._opened.shelf(self._recipe)

    def leave_answer(self, question: str, answer: bytes) -> None:
        """Write down for later processes what took long to find out, where the disk lets it."""
        with contextlib.suppress(StoreError):  # they find it out again
            self._at.index.leave_answer(question, answer)

    def answer(self, question: str, find: Callable[[], str]) -> str:
        """What an earlier call found out, or else what ``find`` does, which is left for later ones."""
        left = self._try(lambda: self._at.index.answer(question), lambda: None)
        if left is not None:
            return left.decode()
        found = find()
        self.leave_answer(question, found.encode())
        return found

    def digest_of_file(self, path: str) -> bytes:
        """Digest of any file's bytes."""
        return self._try(
            lambda: self._at.index.digest_of_file(path), lambda: PathItem(path, max_pixels=0).digest_of_bytes(self.seed)
        )

    def digests(self, items: Items, n_threads: int) -> list[bytes | ImageError]:
        """Digest of every item, or the error that says why it cannot be read."""

        def without_shortcuts() -> list[bytes | ImageError]:
            return [digest_or_error(items, row, self.seed) for row in range(len(items))]

        return self._try(lambda: self._at.index.digests(items, n_threads), without_shortcuts)

    def fill(
        self, digests: Sequence[bytes], columns: Sequence[Column], out: Sequence[np.ndarray], rows: np.ndarray
    ) -> np.ndarray:
        """Copy values into some rows of ``out``, one array per column; a mask (n_rows,) of those known in full."""
        known = np.zeros((len(digests), len(columns)), dtype=bool)
        for i, (column, part) in enumerate(zip(columns, out, strict=True) if self._memory else ()):
            known[:, i] = MEMORY.fill((self.seed, self._recipe, column), digests, part, rows)
        rest = np.flatnonzero(~known.all(axis=1))
        if len(rest):
            known[rest] |= self._fill_from_disk([digests[j] for j in rest.tolist()], columns, out, rows[rest])
        return np.logical_and.reduce(known, axis=1)

    def _fill_from_disk(
        self,
        digests: list[bytes],
        columns: Sequence[Column],
        out: Sequence[np.ndarray],
        rows: np.ndarray,
    ) -> np.ndarray:
        nothing = np.zeros((len(digests), len(columns)), dtype=bool)
        found = self._try(lambda: self._on.fill(digests, columns, out, rows), lambda: nothing)
        for part, column, new in zip(out, columns, found.T, strict=True):
            MEMORY.add(
                (self.seed, self._recipe, column), [digests[j] for j in np.flatnonzero(new).tolist()], part[rows[new]]
            )
        return found

    def has(self, digests: Sequence[bytes], columns: Sequence[Column]) -> bool:
        """Whether all columns of all images are on the disk."""
        return self._try(lambda: all(self._on.has(digests, columns)), lambda: False)

    def take(self, digests: Sequence[bytes], is_there: Callable[[list[bytes]], Sequence[bool]]) -> list[bytes]:
        """Claim those images that nobody else computes and that are not there yet."""

        def claim() -> list[bytes]:
            if self._claims is None:
                self._claims = Claims(self._at.index, self._recipe)
            return self._claims.take(digests, is_there)

        return self._try(claim, lambda: list(digests))

    def put(self, digests: Sequence[bytes], parts: dict[Column, np.ndarray], groups: Sequence[Group]) -> None:
        """Keep computed rows, and let others have the images."""
        for column, rows in parts.items():  # first, since the disk may refuse
            MEMORY.add((self.seed, self._recipe, column), digests, rows)
        size = parse_size(self._store.max_size)
        row_bytes = 2 * sum(part[:1].nbytes for part in parts.values())  # with what the database needs around it
        at_once = max(1, int(size * _SHARE_AT_ONCE) // max(1, row_bytes))

        def write() -> None:
            self._on.describe(self._description)
            for start in range(0, len(digests), at_once):
                some = slice(start, start + at_once)
                self._at.make_room(self._on, size, row_bytes * len(digests[some]))
                self._on.put(digests[some], {column: part[some] for column, part in parts.items()}, groups)
                self._at.index.count(len(digests[some]))
                KEPT[self._store.path] += len(digests[some])
            _forgive(self._store)

        self._try(write, lambda: None)
        self.release(digests)  # at the last: whoever then claims them finds the rows

    def release(self, digests: Sequence[bytes]) -> None:
        """Let others have images that cannot be computed here."""
        claims = self._claims
        if claims is not None:
            with contextlib.suppress(StoreError):  # what is not released runs out
                claims.release(digests)

    def read_file(self, name: str) -> bytes | None:
        """What was kept as a whole under a name; None where there is nothing."""
        try:
            return self._at.files.read(name)
        except OSError:  # StoreError is one: it is made again
            return None

    def write_file(self, name: str, content: bytes) -> None:
        """Keep something as a whole, where there is room; a warning says why where it is not kept."""
        if self._off:
            return
        try:
            size = parse_size(self._store.max_size)
            if len(content) > size * LARGEST_SHARE:
                raise StoreError(
                    f"it takes {len(content)} bytes, more than a tenth of max_size={self._store.max_size!r}"
                )
            self._at.files.make_room(size, len(content))
            self._at.files.write(name, content)
        except OSError as error:
            warn_once(
                self._store,
                f"An exported network is not kept in the feature store at {self._store.path!r}, and every process "
                f"makes its own: {error.strerror or error}.",
            )

    def wait(self) -> None:
        """Give others a moment."""
        time.sleep(POLL_S)

    @property
    def _at(self) -> _Opened:
        if self._opened is None:
            raise StoreError("there is no store")
        return self._opened

    @property
    def _on(self) -> Shelf:
        if self._shelf is None:
            raise StoreError("there is no store")
        return self._shelf

    @property
    def seed(self) -> int:
        """Of the digests."""
        return 0 if self._opened is None else self._opened.seed

    def _try(self, attempt: Callable[[], T], otherwise: Callable[[], T]) -> T:
        for _ in range(2):  # once more after mending
            if self._off:
                return otherwise()
            try:
                try:
                    return attempt()
                except Damaged as error:
                    self._mend(error)
            except OnNetwork:
                raise
            except (OSError, UnicodeError) as error:  # StoreError is an OSError
                self._give_up(error)
        self._give_up(StoreError(f"{self._store.path} cannot be mended"))
        return otherwise()

    def _mend(self, error: Damaged) -> None:
        opened = self._at
        for database in (opened.index.database, *([self._shelf.database] if self._shelf else [])):
            if database.folder == error.folder:
                opened.discard(database)
        warn_once(self._store, f"{error}. It was removed, and its features are computed anew.")

    def _give_up(self, error: Exception) -> None:
        self._off = True
        advice = (
            "The next call makes it anew."
            if isinstance(error, Deleted)
            else "Set cache= (or FEATX_CACHE) to another folder, or free or mend the disk."
        )
        reason = error.reason if isinstance(error, NoPlace) else error
        warn_once(
            self._store,
            f"Features are computed but not kept in the feature store at {self._store.path!r}: {reason}. {advice}",
        )


_WARNED: set[tuple[str, str]] = set()


def warn_once(store: FeatureStore, message: str) -> None:
    """Warn whoever called featx, once per process for what differs in numbers alone, until something is kept again."""
    key = (store.path, re.sub(r"\d+", "#", message))
    if key not in _WARNED:
        _WARNED.add(key)
        warnings.warn(message, StoreWarning, stacklevel=frames_to_caller())


def _forgive(store: FeatureStore) -> None:
    """After a success, the next failure is news."""
    for key in [key for key in _WARNED if key[0] == store.path]:
        _WARNED.discard(key)
