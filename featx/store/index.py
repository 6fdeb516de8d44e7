"""What a store knows beside its rows: digests of known files, and who is computing what."""

from __future__ import annotations

import os
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import xxhash

from featx.exceptions import ImageError, StoreError
from featx.images.arrays import ArrayItem
from featx.images.items import PathItem
from featx.images.reading import UNOPENED, Content
from featx.images.sources import Items
from featx.store.environment import Database
from featx.store.memory import MEMORY
from featx.store.owners import LEASE_S, Owner

#: A file that changed less than this many seconds ago may change again without its times telling.
TRUST_AFTER_S = 2.0

_CHECK_BYTES = 8  # behind an answer

_COMPUTED = b"computed"  # among the owners, whose names are longer
# Images per task handed to a thread: handing over costs more than hashing a small one.
_TASK_SIZE = 32

_STATE = struct.Struct("<QQQqq")  # device, inode, size, mtime_ns, ctime_ns
_MOST_64 = 2**64 - 1


@dataclass(frozen=True)
class Index:
    """Shortcuts (from files to digests, from questions to answers), and leases.

    Parameters
    ----------
    database : Database
    seed : int
        Of the digests.
    """

    database: Database
    seed: int

    @classmethod
    def at(cls, folder: Path, seed: int) -> Index:
        """The index in a folder. All in it can be made anew, so no commit waits for the disk."""
        return cls(Database(folder, ("shortcuts", "leases", "owners"), durable=False), seed)

    def digests(self, items: Items, n_threads: int) -> list[bytes | ImageError]:
        """Digest of every item; files that are known and unchanged are not read."""
        if (originals := items.originals) is not None:
            theirs = self.digests(originals, n_threads)
            return [items.altered(digest) if isinstance(digest, bytes) else digest for digest in theirs]

        def look_at(rows: Sequence[int]) -> list[Content | bytes | ImageError]:
            return [(_content_or_error if row in files else digest_or_error)(items, row, self.seed) for row in rows]

        # Each file is looked at before it is read: what changes in between has an older state beside a newer content,
        # and `_is_settled` keeps it from being remembered.
        files, known = self._known(items.iter_paths())
        out: list[Content | bytes | ImageError | None] = [*known]
        unknown = [row for row, content in enumerate(out) if content is None]
        # Arrays are hashed as fast as memory gives them; threads would only be in each other's way.
        if len(unknown) > 1 and n_threads > 1 and not isinstance(items[unknown[0]], ArrayItem):
            with ThreadPoolExecutor(n_threads, thread_name_prefix="featx-digest") as pool:
                tasks = [unknown[start : start + _TASK_SIZE] for start in range(0, len(unknown), _TASK_SIZE)]
                found = [content for part in pool.map(look_at, tasks) for content in part]
        else:
            found = look_at(unknown)
        for row, content in zip(unknown, found, strict=True):
            out[row] = content
        self._remember([(files[row], out[row]) for row in unknown if row in files])
        digest_of = items.reading.digest_of
        return [digest_of(found) if isinstance(found, Content) else found for found in out]  # type: ignore

    def digest_of_file(self, path: str) -> bytes:
        """Digest of any file's bytes, through the same shortcuts."""
        files, (known,) = self._known([path])
        if known is None:
            known = Content(PathItem(path, max_pixels=0).digest_of_bytes(self.seed))
            self._remember([(file, known) for file in files.values()])
        return known.digest

    def answer(self, question: str) -> bytes | None:
        """What was left for a question; None where nothing was, or it is damaged."""
        key = _key_of(question)
        found = self.database.read(lambda txn, tables: bytes(txn.get(key, b"", db=tables["shortcuts"])))
        content, check = found[:-_CHECK_BYTES], found[-_CHECK_BYTES:]
        return content if found and check == xxhash.xxh3_64_digest(key + content) else None

    def leave_answer(self, question: str, answer: bytes) -> None:
        """Leave an answer for a question."""
        key = _key_of(question)
        record = answer + xxhash.xxh3_64_digest(key + answer)
        self.database.write(lambda txn, tables: txn.put(key, record, db=tables["shortcuts"]))

    def sweep(self) -> None:
        """Delete the leases of owners that are gone."""

        def delete(txn: lmdb.Transaction, tables: dict[str, Any]) -> None:
            records = {bytes(token): record for token, record in txn.cursor(tables["owners"])}
            owners = {token: _is_gone(record) for token, record in records.items() if token != _COMPUTED}
            # Listed first, since deleting changes what a cursor goes through.
            for key, token in [(bytes(key), bytes(token)) for key, token in txn.cursor(tables["leases"])]:
                if owners.get(token, True):
                    txn.delete(key, db=tables["leases"])
            for token in (token for token, gone in owners.items() if gone):
                txn.delete(token, db=tables["owners"])

        self.database.write(delete)

    def count(self, n: int) -> None:
        """Add images that went through a network, for this store and by whatever process."""

        def add(txn: lmdb.Transaction, tables: dict[str, Any]) -> None:
            txn.put(_COMPUTED, str(_counted(txn, tables) + n).encode(), db=tables["owners"])

        self.database.write(add)

    def computed(self) -> int:
        """What `count` added up."""
        return self.database.read(_counted)

    def _known(self, paths: Iterable[str | None]) -> tuple[dict[int, _File], list[Content | None]]:
        """Files that are not known to this process, by position, and the content of each path, None where unknown."""
        # The time before all of them: a file that changes while others are looked at is too young to be trusted.
        seen, seen_ns = MEMORY.files(self.seed), time.time_ns()
        files: dict[int, _File] = {}
        contents: list[Content | None] = []
        for path in paths:
            content = None
            status = None if path is None else _status(path)
            if path is not None and status is not None:
                # Not abspath, which takes every path apart: a file of two names is at worst read twice.
                full = path if path.startswith("/") else os.path.join(os.getcwd(), path)
                state = _state(status)
                entry = seen.get(full)
                if entry is not None and entry[0] == state:
                    content = entry[1]
                else:
                    changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
                    key = xxhash.xxh3_128_digest(os.fsencode(full))
                    files[len(contents)] = _File(path, full, key, state, changed_ns, seen_ns)
            contents.append(content)

        def look(txn: lmdb.Transaction, tables: dict[str, Any]) -> dict[int, Content]:
            get, table = txn.get, tables["shortcuts"]
            found = {position: _content_in(get(file.key, db=table), file) for position, file in files.items()}
            return {position: content for position, content in found.items() if content is not None}

        if files:
            found = self.database.read(look, len(files))
            for position, content in found.items():
                contents[position] = content
            MEMORY.add_files(self.seed, {files[i].full: (files[i].state, content) for i, content in found.items()})
        return files, contents

    def _remember(self, found: Iterable[tuple[_File, Content | bytes | ImageError | None]]) -> None:
        contents = ((file, content) for file, content in found if isinstance(content, Content))
        settled = [(file, its) for file, its in contents if not its.traits & UNOPENED and _is_settled(file)]

        def write(txn: lmdb.Transaction, tables: dict[str, Any]) -> None:
            for file, content in settled:
                txn.put(file.key, _entry_for(file, content), db=tables["shortcuts"])

        if settled:
            self.database.write(write)
            MEMORY.add_files(self.seed, {file.full: (file.state, content) for file, content in settled})


def _key_of(question: str) -> bytes:
    return b"answer" + xxhash.xxh3_128_digest(question.encode())  # longer than the keys of files


def digest_or_error(items: Items, row: int, seed: int) -> bytes | ImageError:
    """Digest of one item, or the error that says why it cannot be read."""
    try:
        return items.digest(row, seed)
    except ImageError as error:
        return error


def _content_or_error(items: Items, row: int, seed: int) -> Content | ImageError:
    try:
        return items.contents(row, seed)[0]
    except ImageError as error:
        return error


class _File(NamedTuple):
    """A file as it was when it was looked at, before it was read; in a tuple, since there are many of them."""

    path: str  # as given: what is read and looked at again
    full: str
    key: bytes
    state: bytes
    changed_ns: int
    seen_ns: int


def state_of(path: str) -> bytes | None:
    """What shows that a local file has changed; None for what is no file."""
    status = _status(path)
    return None if status is None else _state(status)


def _status(path: str) -> os.stat_result | None:
    """None for what is no file: its own error says it better."""
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _entry_for(file: _File, content: Content) -> bytes:
    """What is written down of a file: its state, its content, and a check of both."""
    known = file.state + content.digest + bytes([content.traits])
    return known + xxhash.xxh32_digest(file.key + known)


def _content_in(entry: Any, file: _File) -> Content | None:
    """The content in a shortcut, None where it belongs to another state of the file, or to an older form of entry."""
    if entry is None or len(entry) != 61:
        return None
    known = bytes(entry)
    if known[:40] != file.state or known[57:] != xxhash.xxh32_digest(file.key + known[:57]):
        return None
    return Content(known[40:56], known[56])


def _is_settled(file: _File) -> bool:
    """Whether its last change was long ago when it was looked at, and it has not changed while it was read."""
    if file.seen_ns - file.changed_ns < TRUST_AFTER_S * 1e9:
        return False
    return state_of(file.path) == file.state


def _state(status: os.stat_result) -> bytes:
    inode = (status.st_ino ^ status.st_ino >> 64) & _MOST_64  # of 128 bits in some file systems of Windows
    return _STATE.pack(status.st_dev & _MOST_64, inode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _counted(txn: lmdb.Transaction, tables: dict[str, Any]) -> int:
    with suppress(ValueError):
        return int(bytes(txn.get(_COMPUTED, b"0", db=tables["owners"])))
    return 0


def _is_gone(record: Any) -> bool:
    """Whether an owner's record is that of nobody, or of one who can no longer finish."""
    try:
        return record is None or Owner.parse(bytes(record)).is_gone()
    except (ValueError, TypeError):  # damaged
        return True


class Claims:
    """What one call has taken on: images that it computes while others wait for them.

    To be closed, also after an error: then whatever is still claimed is free for others.

    Parameters
    ----------
    index : Index
    recipe : bytes
        Digest of the recipe, of length 16.
    """

    def __init__(self, index: Index, recipe: bytes) -> None:
        self._database, self._recipe = index.database, recipe
        self._token = uuid.uuid4().bytes  # of a call and not of a process, whose threads share work too
        self._held: set[bytes] = set()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def close(self) -> None:
        """Give everything up."""
        self._ended.set()
        if self._heart is not None:
            self._heart.join()  # a last beat would bring the owner back
            self._write_if_possible(self._leave)

    def take(self, digests: Sequence[bytes], is_there: Callable[[list[bytes]], Sequence[bool]]) -> list[bytes]:
        """Claim those images that nobody works on and that, asked under the lock, are not there yet."""

        def claim(txn: lmdb.Transaction, tables: dict[str, Any]) -> list[bytes]:
            free = self._free(txn, tables, digests)
            # Asked while nobody else can claim or release: whoever released since the look-up has put the rows there
            # before. The index is always entered before a shelf, so that no two processes wait for each other.
            missing = [digest for digest, there in zip(free, is_there(free), strict=True) if not there]
            for digest in missing:
                txn.put(self._recipe + digest, self._token, db=tables["leases"])
            if missing:
                txn.put(self._token, Owner.here().record(), db=tables["owners"])
            return missing

        # Waiting for others, one asks often; only who can have something keeps the others from writing.
        if not self._database.read(lambda txn, tables: self._free(txn, tables, digests)):
            return []
        taken = self._database.write(claim)
        self._held.update(taken)
        if taken and self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="featx-lease", daemon=True)
            self._heart.start()
        return taken

    def release(self, digests: Sequence[bytes]) -> None:
        """Give up the claim, after the rows were written or because they cannot be."""
        self._database.write(lambda txn, tables: self._drop(txn, tables, digests))
        self._held.difference_update(digests)

    def _free(self, txn: lmdb.Transaction, tables: dict[str, Any], digests: Sequence[bytes]) -> list[bytes]:
        gone: dict[bytes, bool] = {}
        free: list[bytes] = []
        for digest in digests:
            holder = txn.get(self._recipe + digest, db=tables["leases"])
            token = b"" if holder is None else bytes(holder)
            if token and token not in gone:
                gone[token] = _is_gone(txn.get(token, db=tables["owners"]))
            if not token or gone[token]:
                free.append(digest)
        return free

    def _beat(self) -> None:
        while not self._ended.wait(LEASE_S / 4):
            self._write_if_possible(
                lambda txn, tables: txn.put(self._token, Owner.here().record(), db=tables["owners"])
            )

    def _drop(self, txn: lmdb.Transaction, tables: dict[str, Any], digests: Iterable[bytes]) -> None:
        for digest in digests:
            if txn.get(self._recipe + digest, db=tables["leases"]) == self._token:
                txn.delete(self._recipe + digest, db=tables["leases"])

    def _leave(self, txn: lmdb.Transaction, tables: dict[str, Any]) -> None:
        self._drop(txn, tables, self._held)
        txn.delete(self._token, db=tables["owners"])

    def _write_if_possible(self, operation: Callable[[lmdb.Transaction, dict[str, Any]], Any]) -> None:
        try:
            self._database.write(operation)
        except StoreError:
            self._ended.set()  # a lease that cannot be renewed runs out by itself
