"""What a user means by items, as a list of paths and URLs."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from featx.images.formats import Choice, choose
from featx.images.remote import is_url
from featx.images.sources import as_items
from featx.images.walk import HIDDEN, Listing, folders_below, is_hidden, is_of_the_system, left_out_of, told, walk
from featx.system.paths import with_slashes

# In a pattern, a part "**".
_DEEP = re.compile(r"(?:^|(?<=/))[*][*](?:/+|$)")


def list_items(items: Any, storage_options: Mapping[str, Any] | None) -> Listing:
    """Paths and URLs, as they are given, or as a pattern or folder holds them, sorted, and what is left out.

    Parameters
    ----------
    items : str, path, or list, array, Series or one-column frame of them
        A text alone is a folder, of which every picture at any depth is taken, a file, or a pattern with ``*`` or
        ``**``. What systems put among a user's files (``@eaDir``, ...) is left out unless the pattern names it.
    storage_options : mapping or None
        None for no URLs.

    Raises
    ------
    TypeError, ValueError
        Something is no path, or there is nothing.
    """
    alone = isinstance(items, str | os.PathLike)
    found = _matching(os.fspath(items), storage_options) if alone else _given(items)
    if storage_options is None and (url := next(filter(is_url, found.pictures), None)) is not None:
        raise ValueError(f"Local files are expected with storage_options=None, got {url!r}. Set storage_options={{}}.")
    return found


def _given(items: Any) -> Listing:
    paths = list(as_items(items).iter_paths())
    if None in paths:
        row = paths.index(None)
        raise TypeError(f"Paths or URLs are expected, got something else at items[{row}]. Write it to a file first.")
    return Listing([path for path in paths if path is not None])


def _matching(pattern: str, storage_options: Mapping[str, Any] | None) -> Listing:
    if is_url(pattern):
        if storage_options is None:
            raise ValueError(
                f"A local folder or pattern is expected with storage_options=None, got {pattern!r}. Set "
                "storage_options={}."
            )
        found = _matching_far(pattern, storage_options)
    elif os.path.isdir(pattern):
        found = walk(pattern, choose())
    elif os.path.lexists(pattern):  # also where its name reads like a pattern
        found = Listing([pattern])
    else:
        matches = (path for path in _expanded(with_slashes(pattern)) if not os.path.isdir(path))
        found = _sorted_out(matches, _asked_for(pattern))
    if found.closed:
        raise found.closed[0]
    if not found.pictures:
        left_out = left_out_of([found])
        but = f", but: {told(left_out)}" if left_out else ""
        raise ValueError(f"At least one file is expected, got items={pattern!r}, which matches none{but}.")
    return found


def _expanded(pattern: str) -> set[str]:
    """What matches a pattern, where ``**`` stands for a folder and those below it, each real one once."""
    *parts, last = _DEEP.split(pattern)
    tops = [""]
    for part in parts:
        found = (
            match for top in tops for match in (glob.iglob(os.path.join(glob.escape(top), part)) if part else [top])
        )
        tops = folders_below(name for name in found if os.path.isdir(name or os.curdir))
    if not last and pattern.endswith("/"):  # folders alone
        return set()
    return {match for top in tops for match in glob.iglob(os.path.join(glob.escape(top), last or "*"))}


def _matching_far(pattern: str, storage_options: Mapping[str, Any]) -> Listing:
    from fsspec.core import url_to_fs

    files, path = url_to_fs(pattern, **storage_options)
    files.invalidate_cache()  # what it listed before may have changed
    if files.isfile(path):
        found = Listing([path])
    elif glob.has_magic(path):
        matches = (name for name, about in files.glob(path, detail=True).items() if about["type"] == "file")
        found = _sorted_out(matches, _asked_for(path))
    else:
        found = _sorted_out(files.find(path), _below(path, choose()))
    urls = sorted(_as_asked(pattern, path, name) for name in found.pictures)
    if urls and url_to_fs(urls[0], **storage_options)[1] not in found.pictures:
        raise ValueError(f"A pattern whose files have URLs of their own is expected, got {pattern!r}. List the URLs.")
    return Listing(urls, found.left_out)


def _sorted_out(paths: Iterable[str], why_not: Choice) -> Listing:
    """Paths without those that are left out, which are counted by the names of their files."""
    found = Listing()
    for path in sorted(paths):
        if (reason := why_not(path)) is None:
            found.pictures.append(path)
        else:
            found.leave_out(with_slashes(path).rpartition("/")[2], reason)
    return found


def _asked_for(pattern: str) -> Choice:
    """Whatever matches a pattern, but what is of the system and not named in it."""
    named = set(with_slashes(pattern).split("/"))

    def why_not(path: str) -> str | None:
        parts = with_slashes(path).split("/")
        return HIDDEN if any(is_of_the_system(part) and part not in named for part in parts) else None

    return why_not


def _below(folder: str, choice: Choice) -> Choice:
    """Pictures at any depth below a folder, by their whole names."""

    def why_not(path: str) -> str | None:
        *folders, name = path[len(folder) :].strip("/").split("/")
        return HIDDEN if any(map(is_hidden, [*folders, name])) else choice(name)

    return why_not


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
