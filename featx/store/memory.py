"""What this process looked up last, so that a grid search does not go to the disk for it again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from featx.images.reading import Content
from featx.system.locks import ForkSafeLock

#: Most bytes of rows held in memory by one process; joblib takes a worker that grows by 300 MB for one that leaks.
MOST_BYTES = 192 * 2**20
#: Most files whose digests are held; each takes about 400 bytes.
MOST_FILES = 2**17


class _Table:
    """Rows of one width under their digests, in one growing matrix."""

    def __init__(self, width: int) -> None:
        self.places: dict[bytes, int] = {}
        self.matrix = np.empty((64, width), dtype=np.float32)

    def find(self, digests: Sequence[bytes]) -> np.ndarray:
        """Place of each row, -1 where it is not there."""
        find = self.places.get
        return np.fromiter((find(digest, -1) for digest in digests), dtype=np.intp, count=len(digests))

    def add(self, digests: Sequence[bytes], rows: np.ndarray) -> None:
        # Of twins one, and of rows that are there none: what was handed out once is handed out again, to the last bit.
        first = {digest: position for position, digest in reversed(list(enumerate(digests)))}
        new = [position for digest, position in first.items() if digest not in self.places]
        start, stop = len(self.places), len(self.places) + len(new)
        if stop > len(self.matrix):
            bigger = np.empty((max(stop, 2 * len(self.matrix)), self.matrix.shape[1]), dtype=np.float32)
            bigger[:start] = self.matrix[:start]
            self.matrix = bigger
        self.matrix[start:stop] = rows[new]
        self.places.update((digests[position], start + i) for i, position in enumerate(new))


class Memory:
    """Rows by place in a store and digest, least recently used places dropped first; and digests of files.

    Parameters
    ----------
    most_bytes : int
        Bound on the rows; their digests come on top of it.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._tables: OrderedDict[Hashable, _Table] = OrderedDict()
        self._files: dict[int, dict[str, tuple[bytes, Content]]] = {}
        self._lock = ForkSafeLock()

    def fill(self, key: Hashable, digests: Sequence[bytes], out: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Copy what is known into some rows of ``out`` and return a mask (n_rows,) of them."""
        with self._lock.held():
            table = self._tables.get(key)
            if table is None:
                return np.zeros(len(digests), dtype=bool)
            self._tables.move_to_end(key)
            places = table.find(digests)  # of this matrix: under the lock, since adding may take a larger one
            known = places >= 0
            out[rows[known]] = table.matrix[places[known]]
            return known

    def add(self, key: Hashable, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Keep rows (n, width), as far as there is room."""
        if not len(digests) or rows.nbytes > self._most_bytes // 2:
            return
        with self._lock.held():
            if key not in self._tables:
                self._tables[key] = _Table(rows.shape[1])
            table = self._tables[key]
            self._tables.move_to_end(key)
            # The matrix may double.
            while self._bytes() + 2 * rows.nbytes + table.matrix.nbytes > self._most_bytes and len(self._tables) > 1:
                self._tables.popitem(last=False)
            if self._bytes() + 2 * rows.nbytes + table.matrix.nbytes <= self._most_bytes:
                table.add(digests, rows)

    def files(self, seed: int) -> Mapping[str, tuple[bytes, Content]]:
        """By full path, the state that a file was seen in and its content under a seed. Compare the state."""
        return self._files.get(seed, {})

    def add_files(self, seed: int, files: Mapping[str, tuple[bytes, Content]]) -> None:
        """Keep states and contents by full path."""
        with self._lock.held():
            if sum(map(len, self._files.values())) + len(files) > MOST_FILES:
                self._files.clear()
            if len(files) <= MOST_FILES:
                self._files.setdefault(seed, {}).update(files)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock.held():
            self._tables.clear()
            self._files.clear()

    def _bytes(self) -> int:
        return sum(table.matrix.nbytes for table in self._tables.values())


MEMORY = Memory()
