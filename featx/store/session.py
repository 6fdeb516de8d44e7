"""One call's dealings with a store: whatever happens to the disk, the call goes on."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from featx.exceptions import ImageError, StoreError, StoreWarning
from featx.images.sources import Items
from featx.store.environment import Damaged, Deleted
from featx.store.index import Claims
from featx.store.memory import MEMORY
from featx.store.places import check_local, parse_size
from featx.store.shelf import Column, Group, Shelf
from featx.store.store import FeatureStore, _Opened

T = TypeVar("T")

_POLL_S = 0.05
_WARNED: set[str] = set()


class Session:
    """A store as one call sees it, with the process's memory in front.

    A context manager: on leaving, images that were claimed and not computed are free for others. After the first
    trouble with the disk it warns once and keeps the call going with the memory alone.

    Parameters
    ----------
    store : FeatureStore

    Raises
    ------
    StoreError
        The store lies on a network file system.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        check_local(Path(store.path).absolute())
        self._opened: _Opened | None = self._try(store._open, lambda: None)
        self._off = self._opened is None
        self._shelf: Shelf | None = None
        self._recipe, self._description = b"", ""
        self._claims: Claims | None = None

    @property
    def keep(self) -> str:
        """As in FeatureStore."""
        return self._store.keep

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._claims is not None:
            self._claims.__exit__()
            self._claims = None

    def open_recipe(self, recipe: bytes, description: str) -> None:
        """Choose the recipe whose rows are asked for."""
        self._recipe, self._description = recipe, description
        if self._opened is not None:
            self._shelf = self._opened.shelf(recipe)

    def digest_of_file(self, path: str) -> bytes:
        """Digest of any file's bytes."""
        from featx.images.items import PathItem

        return self._try(
            lambda: self._at.index.digest_of_file(path), lambda: PathItem(path, max_pixels=0).digest(self._seed)
        )

    def digests(self, items: Items, n_threads: int) -> list[bytes | ImageError]:
        """Digest of every item, or the error that says why it cannot be read."""

        def without_shortcuts() -> list[bytes | ImageError]:
            return [_digest(items, row, self._seed) for row in range(len(items))]

        return self._try(lambda: self._at.index.digests(items, n_threads), without_shortcuts)

    def fill(self, digests: Sequence[bytes], columns: Sequence[Column], out: Sequence[np.ndarray]) -> np.ndarray:
        """Copy known rows into ``out``, one array (n, width) per column; a mask (n, n_columns) of what is known."""
        known = np.stack(
            [
                MEMORY.fill((self._seed, self._recipe, column), digests, rows)
                for column, rows in zip(columns, out, strict=True)
            ],
            axis=1,
        )
        rest = np.flatnonzero(~known.all(axis=1)).tolist()
        if rest:
            known[rest] |= self._fill_from_disk([digests[row] for row in rest], columns, out, rest, known[rest])
        return known

    def _fill_from_disk(
        self,
        digests: list[bytes],
        columns: Sequence[Column],
        out: Sequence[np.ndarray],
        places: list[int],
        known: np.ndarray,
    ) -> np.ndarray:
        scratch = [np.empty((len(digests), column.width), dtype=np.float32) for column in columns]
        found = self._try(
            lambda: self._on.fill(digests, columns, scratch), lambda: np.zeros((len(digests), len(columns)), dtype=bool)
        )
        for i, column in enumerate(columns):
            new = found[:, i] & ~known[:, i]
            out[i][np.asarray(places)[new]] = scratch[i][new]
            MEMORY.add(
                (self._seed, self._recipe, column),
                [digest for digest, is_new in zip(digests, new, strict=True) if is_new],
                scratch[i][new],
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
        for column, rows in parts.items():
            MEMORY.add((self._seed, self._recipe, column), digests, rows)
        incoming = sum(rows.nbytes for rows in parts.values())

        def write() -> None:
            self._at.make_room(self._on, parse_size(self._store.max_size), 2 * incoming)
            self._on.describe(self._description)
            self._on.put(digests, parts, groups, len(digests))

        self._try(write, lambda: None)
        self.release(digests)

    def release(self, digests: Sequence[bytes]) -> None:
        """Let others have images that cannot be computed here."""
        claims = self._claims
        if claims is not None:
            with contextlib.suppress(StoreError):  # what is not released runs out
                claims.release(digests)

    def wait(self) -> None:
        """Give others a moment."""
        time.sleep(_POLL_S)

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
    def _seed(self) -> int:
        return 0 if self._opened is None else self._opened.seed

    def _try(self, attempt: Callable[[], T], otherwise: Callable[[], T]) -> T:
        for _ in range(2):
            if getattr(self, "_off", False):
                return otherwise()
            try:
                return attempt()
            except Damaged as error:
                self._mend(error)
            except StoreError as error:
                self._give_up(error)
        self._give_up(StoreError(f"{self._store.path} cannot be mended"))
        return otherwise()

    def _mend(self, error: Damaged) -> None:
        _warn_once(f"{error}. It was removed, and its features are computed anew.")
        opened = self._at
        for database in (opened.index.database, *([self._shelf.database] if self._shelf else [])):
            if database.folder == error.folder:
                opened.discard(database)

    def _give_up(self, error: StoreError) -> None:
        self._off = True
        gone = " It is made anew by the next call." if isinstance(error, Deleted) else ""
        _warn_once(
            f"Features are computed but not kept in the feature store at {self._store.path!r}: {error}.{gone} "
            "Free or mend the disk, or set cache= to another folder."
        )


def _digest(items: Items, row: int, seed: int) -> bytes | ImageError:
    try:
        return items.digest(row, seed)
    except ImageError as error:
        return error


def _warn_once(message: str) -> None:
    with _WARN_LOCK:
        if message in _WARNED:
            return
        _WARNED.add(message)
    warnings.warn(message, StoreWarning, stacklevel=2)


_WARN_LOCK = threading.Lock()
