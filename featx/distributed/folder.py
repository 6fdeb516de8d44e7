"""Where shards lie: a local folder or a bucket, in which a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featx.images.remote import BUCKETS, is_url, patiently
from featx.system.paths import path_of_url
from featx.system.writing import replacing, sweep_away


class Folder:
    """A folder, local or behind a URL.

    Parameters
    ----------
    url : str
    storage_options : mapping or None
        As fsspec takes them; None for a local folder only.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None) -> None:
        if is_url(url) and storage_options is None:
            raise ValueError(
                f"A local folder is expected with storage_options=None, got output={url!r}. Set storage_options={{}}."
            )
        if url.startswith(("http://", "https://")):
            raise ValueError(f"A folder or a bucket is expected, got output={url!r}, which cannot be written to.")
        if url.startswith(("file://", "local://")):
            url = path_of_url(url)
        self.url = url if url.endswith("://") else url.rstrip("/") or url
        self._options = dict(storage_options or {})

    def sizes(self) -> dict[str, int]:
        """Files that are there and complete, and their bytes."""
        if not is_url(self.url):
            folder = Path(self.url)
            entries = [*os.scandir(folder)] if folder.is_dir() else []
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        files, root = self._files()
        files.invalidate_cache(root)
        with contextlib.suppress(FileNotFoundError):
            return {entry["name"].rpartition("/")[2]: entry["size"] or 0 for entry in files.ls(root, detail=True)}
        return {}

    def read(self, name: str) -> bytes:
        """Content of a file."""
        if not is_url(self.url):
            return Path(self.url, name).read_bytes()
        files, root = self._files()
        return bytes(files.cat_file(f"{root}/{name}"))

    def endings(self, sizes: Mapping[str, int], n_bytes: int) -> list[bytes]:
        """Last bytes of files of some sizes, which are no smaller."""
        if not is_url(self.url):
            return [_ending(Path(self.url, name), n_bytes) for name in sizes]
        files, root = self._files()
        names, stops = [f"{root}/{name}" for name in sizes], [*sizes.values()]

        def read() -> list[bytes]:
            found = files.cat_ranges(names, [stop - n_bytes for stop in stops], stops, on_error="raise")
            for part in found:
                if isinstance(part, BaseException):  # from releases of fsspec that do not heed on_error
                    raise part
            return [*map(bytes, found)]

        return patiently(read)

    def write(self, name: str, content: bytes) -> None:
        """Put a file in its place: by a rename, or in a bucket, where it is there when all of it is."""
        if not is_url(self.url):
            Path(self.url).mkdir(parents=True, exist_ok=True)
            with replacing(Path(self.url, name), sweep=False) as part:
                _write_through(part, content)
            return
        files, root = self._files()
        if _is_bucket(files):
            files.pipe_file(f"{root}/{name}", content)
            return
        files.makedirs(root, exist_ok=True)
        part_name = f"{root}/.{name}.{uuid.uuid4().hex}.part"
        files.pipe_file(part_name, content)
        files.mv(part_name, f"{root}/{name}")

    def create(self, name: str, content: bytes) -> None:
        """Put a file in its place unless there is one: of several writers at once the first one's stays.

        Where neither links nor conditional requests are known, the last one's does.
        """
        if not is_url(self.url):
            Path(self.url).mkdir(parents=True, exist_ok=True)
            with replacing(Path(self.url, name), sweep=False, link=True) as part:
                _write_through(part, content)
            return
        files, root = self._files()
        if _is_bucket(files):
            try:
                files.pipe_file(f"{root}/{name}", content, mode="create")
                return
            except Exception:  # each has its own for a file that is there, and for a request that it does not know
                files.invalidate_cache(root)
        if not files.exists(f"{root}/{name}"):
            self.write(name, content)

    def sweep(self) -> None:
        """Delete what killed processes of this machine left of shards."""
        if not is_url(self.url):
            sweep_away(Path(self.url), "part-*")

    def _files(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(self.url, **self._options)
        return files, root


def _is_bucket(files: Any) -> bool:
    protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
    return not protocols.isdisjoint(BUCKETS)


def _write_through(path: Path, content: bytes) -> None:
    """Onto the disk: a name must not outlive what it names when the power fails."""
    path.write_bytes(content)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _ending(path: Path, n_bytes: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(-n_bytes, os.SEEK_END)
        return file.read()
