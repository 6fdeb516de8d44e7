"""The rows of one recipe on disk: what they look like in bytes, and how they are found and replaced."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import xxhash

from featx.exceptions import StoreError
from featx.store.environment import Database

_TABLES = ("rows", "used", "meta")
_CHECK_BYTES = 8
# How often the time of a row's last use is brought up to date, in seconds.
_USED_EVERY_S = 86400


class Column(NamedTuple):
    """Name of what one pass reads at one place of a network, and its number of float32 values."""

    name: str
    width: int


Group = tuple[Column, ...]  # columns that are kept together, in one record per image


class _Place(NamedTuple):
    """Where in a record a column lies."""

    prefix: bytes
    position: int
    start: int
    stop: int
    record_bytes: int


@dataclass(frozen=True)
class Shelf:
    """Records of one recipe.

    A record is found under its group's prefix (8 bytes) and the image's digest (16 bytes). It holds one checksum per
    column (xxh3-64, seeded with recipe, group, digest and position), then the columns' values (little-endian float32).
    What each prefix stands for is written down beside the records.

    Parameters
    ----------
    database : Database
    recipe : bytes
        Digest of the recipe, of length 16.
    """

    database: Database
    recipe: bytes

    @classmethod
    def at(cls, folder: Path) -> Shelf:
        """The shelf in a folder that is named after the recipe's digest."""
        return cls(Database(folder, _TABLES, durable=True), bytes.fromhex(folder.name))

    def fill(
        self, digests: Sequence[bytes], columns: Sequence[Column], out: Sequence[np.ndarray], rows: np.ndarray
    ) -> np.ndarray:
        """Copy values into some rows of ``out``, one array per column; a mask (n_rows, n_columns) of what was found."""
        found = np.zeros((len(digests), len(columns)), dtype=bool)
        stale: list[bytes] = []

        def look(txn: lmdb.Transaction, tables: dict[str, Any]) -> None:
            get, table = txn.get, tables["rows"]
            places = _places(txn, tables["meta"])
            for i, column in enumerate(columns):
                for place in places.get(column, ()):
                    wanted = np.flatnonzero(~found[:, i]).tolist()
                    records = [get(place.prefix + digests[j], db=table) for j in wanted]
                    new = {
                        j: values
                        for j, record in zip(wanted, records, strict=True)
                        if (values := self._values(record, place, digests[j])) is not None
                    }
                    found[list(new), i] = True
                    # Joined, to be copied at once and not row by row.
                    out[i][rows[list(new)]] = np.frombuffer(b"".join(new.values()), "<f4").reshape(-1, column.width)
            used = [digests[j] for j in np.flatnonzero(found.any(axis=1)).tolist()]
            stale.extend(_stale(txn, tables["used"], used))

        self.database.read(look, len(digests) * len(columns), 4 * max(column.width for column in columns))
        with suppress(OSError):
            os.utime(self.database.folder)  # for `prune`: the recipe was used
        if stale:  # seldom: reading must not write every time
            with suppress(StoreError):  # of a store that can only be read
                self.database.write(lambda txn, tables: _stamp(txn, tables["used"], stale))
        return found

    def has(self, digests: Sequence[bytes], columns: Sequence[Column]) -> list[bool]:
        """Whether all columns are there for an image; their checksums are not looked at."""

        def look(txn: lmdb.Transaction, tables: dict[str, Any]) -> list[bool]:
            get, table = txn.get, tables["rows"]
            places = _places(txn, tables["meta"])
            prefixes = [[place.prefix for place in places.get(column, ())] for column in columns]
            return [
                all(any(get(prefix + digest, db=table) is not None for prefix in of_column) for of_column in prefixes)
                for digest in digests
            ]

        return self.database.read(look, len(digests))

    def put(self, digests: Sequence[bytes], parts: dict[Column, np.ndarray], groups: Sequence[Group]) -> None:
        """Keep rows, one array (n, width) per column of the groups."""
        # Before the transaction, during which no other process can write.
        records = [
            (_prefix(group) + digest, record)
            for group in groups
            for digest, record in zip(digests, self._encode(digests, group, parts), strict=True)
        ]

        def write(txn: lmdb.Transaction, tables: dict[str, Any]) -> None:
            for group in groups:  # in the same commit: records without their group mean nothing
                txn.put(b"group " + _prefix(group), json.dumps(group).encode(), db=tables["meta"])
            for key, record in records:
                txn.put(key, record, db=tables["rows"])
            _stamp(txn, tables["used"], digests)

        self.database.write(write)

    def drop(self, digests: Sequence[bytes]) -> None:
        """Delete all records of some images."""

        def delete(txn: lmdb.Transaction, tables: dict[str, Any]) -> None:
            prefixes = [prefix for prefix, _ in _groups(txn, tables["meta"])]
            for digest in digests:
                txn.delete(digest, db=tables["used"])
                for prefix in prefixes:
                    txn.delete(prefix + digest, db=tables["rows"])

        self.database.write(delete)

    def describe(self, description: str) -> None:
        """Write down, for people, what the recipe is."""
        if self.description() != description:
            self.database.write(lambda txn, tables: txn.put(b"description", description.encode(), db=tables["meta"]))

    def description(self) -> str:
        """What `describe` wrote."""
        return self.database.read(
            lambda txn, tables: bytes(txn.get(b"description", b"", db=tables["meta"])).decode(errors="replace")
        )

    def groups(self) -> dict[bytes, Group]:
        """What records there can be, by their prefix."""
        return self.database.read(lambda txn, tables: dict(_groups(txn, tables["meta"])))

    def digests(self) -> list[bytes]:
        """The images that there are records of, least recently used first."""

        def look(txn: lmdb.Transaction, tables: dict[str, Any]) -> list[bytes]:
            used = [(bytes(stamp), bytes(digest)) for digest, stamp in txn.cursor(tables["used"])]
            return [digest for _, digest in sorted(used)]

        return self.database.read(look)

    def n_images(self) -> int:
        """Number of images that there are records of."""
        return self.database.read(lambda txn, tables: int(txn.stat(tables["used"])["entries"]))

    def check(self) -> tuple[int, list[bytes]]:
        """Number of records, and the images with a record that is not as it was written."""

        def look(txn: lmdb.Transaction, tables: dict[str, Any]) -> tuple[int, list[bytes]]:
            groups = dict(_groups(txn, tables["meta"]))
            total, wrong = 0, []
            for key, record in txn.cursor(tables["rows"]):
                prefix, digest = bytes(key[:8]), bytes(key[8:])
                total += 1
                places = _places_in(prefix, groups[prefix]) if prefix in groups else [None]
                if any(place is None or self._values(record, place, digest) is None for place in places):
                    wrong.append(digest)
            return total, wrong

        return self.database.read(look)

    def _values(self, record: Any, place: _Place, digest: bytes) -> bytes | None:
        """One column's values in a record; None without one, or where it is not as it was written."""
        if record is None or len(record) != place.record_bytes:
            return None
        values = bytes(record[place.start : place.stop])  # what is checked is what is handed out
        at = _CHECK_BYTES * place.position
        right = _checksum(values, self._seed(place.prefix, digest), place.position)
        return values if record[at : at + _CHECK_BYTES] == right else None

    def _seed(self, prefix: bytes, digest: bytes) -> int:
        """Of a record's checksums: a record means nothing in another place."""
        return xxhash.xxh3_64_intdigest(self.recipe + prefix + digest)

    def _encode(self, digests: Sequence[bytes], group: Group, parts: dict[Column, np.ndarray]) -> Iterator[bytes]:
        columns = [np.ascontiguousarray(parts[column], dtype="<f4") for column in group]
        prefix = _prefix(group)
        for row, digest in enumerate(digests):
            values, seed = [column[row].tobytes() for column in columns], self._seed(prefix, digest)
            yield b"".join([*(_checksum(value, seed, i) for i, value in enumerate(values)), *values])


def _prefix(group: Group) -> bytes:
    return xxhash.xxh3_64_digest(json.dumps(group).encode())


def _groups(txn: lmdb.Transaction, meta: Any) -> Iterator[tuple[bytes, Group]]:
    cursor = txn.cursor(meta)
    if cursor.set_range(b"group "):
        for key, value in cursor:
            if bytes(key[:6]) != b"group ":
                return
            if xxhash.xxh3_64_digest(value) != key[6:]:
                continue  # damaged: its records count as missing
            yield bytes(key[6:]), tuple(Column(name, width) for name, width in json.loads(bytes(value)))


def _places(txn: lmdb.Transaction, meta: Any) -> dict[Column, list[_Place]]:
    places: dict[Column, list[_Place]] = {}
    for prefix, group in _groups(txn, meta):
        for column, place in zip(group, _places_in(prefix, group), strict=True):
            places.setdefault(column, []).append(place)
    return places


@lru_cache(maxsize=256)
def _places_in(prefix: bytes, group: Group) -> list[_Place]:
    start = _CHECK_BYTES * len(group)
    ends = np.cumsum([column.width * 4 for column in group]).tolist()
    return [
        _Place(prefix, position, start + end - 4 * column.width, start + end, start + ends[-1])
        for position, (column, end) in enumerate(zip(group, ends, strict=True))
    ]


def _checksum(values: bytes, seed: int, position: int) -> bytes:
    return xxhash.xxh3_64_digest(values, seed=seed ^ position)


def _stamp(txn: lmdb.Transaction, used: Any, digests: Sequence[bytes]) -> None:
    now = int(time.time() * 1000).to_bytes(8, "big")  # whose bytes sort as the numbers do
    for digest in digests:
        txn.put(digest, now, db=used)


def _stale(txn: lmdb.Transaction, used: Any, digests: Sequence[bytes]) -> list[bytes]:
    """Images whose last use was written down long ago."""
    limit = int((time.time() - _USED_EVERY_S) * 1000).to_bytes(8, "big")
    return [digest for digest in digests if bytes(txn.get(digest, limit, db=used)) < limit]
