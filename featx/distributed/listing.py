"""What a user means by items, as a list of paths and URLs."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from typing import Any

from featx.images.folder import is_hidden, is_picture, pictures_in
from featx.images.remote import is_url
from featx.images.sources import as_items


def list_items(items: Any, storage_options: Mapping[str, Any] | None) -> list[str]:
    """Paths and URLs, as they are given, or as a pattern or folder holds them, sorted.

    Parameters
    ----------
    items : str, path, or list, array, Series or one-column frame of them
        A text alone is a folder, of which every picture at any depth is taken, a file, or a pattern with ``*`` or
        ``**``.
    storage_options : mapping or None
        None for no URLs.

    Raises
    ------
    TypeError, ValueError
        Something is no path, or there is nothing.
    """
    alone = isinstance(items, str | os.PathLike)
    found = _matching(os.fspath(items), storage_options) if alone else _given(items)
    if storage_options is None and (url := next(filter(is_url, found), None)) is not None:
        raise ValueError(f"Local files are expected with storage_options=None, got {url!r}. Set storage_options={{}}.")
    return found


def _given(items: Any) -> list[str]:
    paths = list(as_items(items).iter_paths())
    if None in paths:
        row = paths.index(None)
        raise TypeError(f"Paths or URLs are expected, got something else at items[{row}]. Write it to a file first.")
    return [path for path in paths if path is not None]


def _matching(pattern: str, storage_options: Mapping[str, Any] | None) -> list[str]:
    if is_url(pattern):
        if storage_options is None:
            raise ValueError(
                f"A local folder or pattern is expected with storage_options=None, got {pattern!r}. Set "
                "storage_options={}."
            )
        found = _matching_far(pattern, storage_options)
    elif os.path.isdir(pattern):
        found = pictures_in(pattern)
    elif os.path.lexists(pattern):  # also where its name reads like a pattern
        found = [pattern]
    else:
        found = sorted(path for path in glob.iglob(pattern, recursive=True) if not os.path.isdir(path))
    if not found:
        raise ValueError(f"At least one file is expected, got items={pattern!r}, which matches none.")
    return found


def _matching_far(pattern: str, storage_options: Mapping[str, Any]) -> list[str]:
    from fsspec.core import url_to_fs

    files, path = url_to_fs(pattern, **storage_options)
    files.invalidate_cache()  # what it listed before may have changed
    if files.isfile(path):
        found = [path]
    elif glob.has_magic(path):
        found = [name for name, about in files.glob(path, detail=True).items() if about["type"] == "file"]
    else:
        found = [name for name in files.find(path) if _is_shown_picture(name[len(path) :])]
    urls = sorted(_as_asked(pattern, path, name) for name in found)
    if urls and url_to_fs(urls[0], **storage_options)[1] not in found:
        raise ValueError(f"A pattern whose files have URLs of their own is expected, got {pattern!r}. List the URLs.")
    return urls


def _as_asked(pattern: str, path: str, name: str) -> str:
    """URL of a file that a pattern matched, through the same chain of protocols and on the same host as the pattern.

    ``path`` is what the file system makes of the pattern, and of the same form as ``name``: "bucket/*.jpg" of
    "s3://bucket/*.jpg", "/a/*.jpg" of "ftp://host/a/*.jpg", "*.jpg" of "zip://*.jpg::file:///photos.zip".
    """
    chain = pattern.split("::")
    place = next(i for i, link in enumerate(chain) if "://" in link)  # before it stand caches
    link = chain[place].rstrip("/")
    chain[place] = link.removesuffix(path.rstrip("/")) + name
    return "::".join(chain)


def _is_shown_picture(name: str) -> bool:
    *folders, last = name.strip("/").split("/")
    return is_picture(last) and not any(map(is_hidden, folders))
