"""Where shards lie: a local folder or a bucket, in which a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featx.images.remote import is_url
from featx.writing import replacing, sweep_away

# An object of theirs is there when all of it is, also where it travels in parts.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"}


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
        self.url = url if url.endswith("://") else url.rstrip("/") or url
        self._options = dict(storage_options or {})

    def names(self) -> set[str]:
        """Files that are there and complete."""
        if not is_url(self.url):
            folder = Path(self.url)
            return {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
        files, root = self._files()
        files.invalidate_cache(root)
        with contextlib.suppress(FileNotFoundError):
            return {name.rpartition("/")[2] for name in files.ls(root, detail=False)}
        return set()

    def read(self, name: str) -> bytes:
        """Content of a file."""
        if not is_url(self.url):
            return Path(self.url, name).read_bytes()
        files, root = self._files()
        return bytes(files.cat_file(f"{root}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        """Put a file in its place: by a rename, or in a bucket, where it is there when all of it is."""
        if not is_url(self.url):
            Path(self.url).mkdir(parents=True, exist_ok=True)
            with replacing(Path(self.url, name), sweep=False) as part:
                part.write_bytes(content)
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())  # a name must not outlive what it names when the power fails
            return
        files, root = self._files()
        protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
        if protocols & _BUCKETS:
            files.pipe_file(f"{root}/{name}", content)
            return
        files.makedirs(root, exist_ok=True)
        part_name = f"{root}/.{name}.{uuid.uuid4().hex}.part"
        files.pipe_file(part_name, content)
        files.mv(part_name, f"{root}/{name}")

    def sweep(self) -> None:
        """Delete what killed processes of this machine left of shards."""
        if not is_url(self.url):
            sweep_away(Path(self.url), "part-*")

    def _files(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(self.url, **self._options)
        return files, root
