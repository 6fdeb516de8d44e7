"""Whole files in a store, beside the rows: written in full or not at all, and the first to go where room is short."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

from featx.exceptions import StoreError
from featx.store.environment import disk_bytes
from featx.system.writing import replacing, sweep_away

#: What is in use may fill this share of max_size, since a commit needs free pages beside the ones that it replaces.
FULL = 0.75
#: Of max_size, at most for one file: rows are what a store is for.
LARGEST_SHARE = 0.1
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Files:
    """Files in a folder, each with a digest of its content in front.

    Parameters
    ----------
    folder : Path
        In the store's own; made when something is written.
    """

    folder: Path

    def read(self, name: str) -> bytes | None:
        """What was written under a name; None where there is nothing, or not what was written."""
        path = self.folder / name
        try:
            whole = path.read_bytes()
        except FileNotFoundError:
            return None
        if not _is_whole(whole):
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # for `shrink`: it was used
        return whole[_DIGEST_BYTES:]

    def write(self, name: str, content: bytes) -> None:
        """Put something in place of what was there."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with replacing(self.folder / name) as part:
            part.write_bytes(xxhash.xxh3_128_digest(content) + content)

    def check(self) -> tuple[int, int]:
        """Delete files that are not as they were written; how many were read, and how many deleted."""
        n_read, n_wrong = 0, 0
        for path in self._paths():
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                is_whole = _is_whole(path.read_bytes())
                n_read, n_wrong = n_read + 1, n_wrong + (not is_whole)
                if not is_whole:
                    path.unlink()
        return n_read, n_wrong

    def make_room(self, size: int, incoming: int) -> None:
        """Make sure that a file of ``incoming`` bytes leaves the store within a size, without touching rows.

        Raises
        ------
        StoreError
            It cannot.
        """
        room = int(size * FULL) - incoming
        if disk_bytes(self.folder.parent) - disk_bytes(self.folder) > room:
            raise StoreError(f"max_size={size} bytes leave no room for {incoming} more")
        self.shrink_store(room)

    def shrink_store(self, size: int) -> None:
        """Delete files, which are made again within seconds, least recently used first, until the store fits."""
        too_many = disk_bytes(self.folder.parent) - size
        if too_many > 0 and self.folder.is_dir():
            sweep_away(self.folder, "*")
        for path in self._paths() if too_many > 0 else ():
            with contextlib.suppress(OSError):
                too_many -= path.stat().st_size
                path.unlink()
            if too_many <= 0:
                return

    def __len__(self) -> int:
        return len(self._paths())

    def _paths(self) -> list[Path]:
        """Least recently used first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if not path.name.startswith(".")), key=last_use)


def _is_whole(content: bytes) -> bool:
    return content[:_DIGEST_BYTES] == xxhash.xxh3_128_digest(content[_DIGEST_BYTES:])


def last_use(path: Path) -> float:
    """When a file or folder was last used, in seconds; 0 where it is gone."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
