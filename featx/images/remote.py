"""Files that lie elsewhere, through fsspec: a URL is read in full, with timeouts and with patience."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from featx.exceptions import UnreadableImage

T = TypeVar("T")

# A single letter is a drive, also in "C://photos".
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")
# Servers that are busy answer after a while: up to so many tries, with random waits that double, within these seconds.
_TRIES, _FIRST_WAIT, _LONGEST_WAIT = 8, 0.5, 30.0  # about half a minute, a minute at most
_TIMEOUT = 60.0  # seconds, of one try
_BUSY = {408, 425, 429}  # HTTP's own words for "later"
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError, TypeError)

#: Stores of objects, each of which is there when all of it is, also where it travels in parts.
BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"})


class Unreachable(UnreadableImage):
    """A file that could not be read, for a reason that may be gone later and says nothing of the file."""


def is_url(path: str) -> bool:
    """Whether a path names a protocol, such as ``s3://bucket/photo.jpg``."""
    return _URL.match(path) is not None


def fetch(url: str, storage_options: Mapping[str, Any]) -> bytes:
    """All bytes of a file.

    Parameters
    ----------
    url : str
    storage_options : mapping
        As fsspec takes them for the URL's protocol.

    Raises
    ------
    UnreadableImage
        There is no such file. An Unreachable, where nothing else is known than that the server did not give it,
        however often it was asked.
    ImportError
        The protocol needs a package that is not installed.
    """
    in_bucket = url.rpartition("::")[2].partition("://")[0] in BUCKETS
    try:
        return patiently(_read, url, storage_options)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UnreadableImage("no such file") from error
    except ImportError:
        raise
    except Exception as error:  # each protocol has its own
        told = " ".join(str(error).split()) or type(error).__name__
        if _may_pass(error):
            raise Unreachable(f"could not be fetched in {_TRIES} tries: {told}") from error
        if in_bucket:  # which answer in many ways to credentials that have expired
            raise Unreachable(f"refused by the bucket; are the credentials still good? It says: {told}") from error
        denied = isinstance(error, PermissionError)
        raise UnreadableImage("permission denied" if denied else f"could not be fetched: {told}") from error


def patiently(function: Callable[..., T], *arguments: Any) -> T:
    """Result of a function, called again after a while where it fails for a reason that may pass."""
    try:
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential
    except ImportError as error:
        raise ImportError('URLs need tenacity. You can install it with `pip install "featx[remote]"`') from error
    patient = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(_TRIES),
        wait=wait_random_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT),
        reraise=True,
    )
    return patient(function, *arguments)


def _read(url: str, storage_options: Mapping[str, Any]) -> bytes:
    from fsspec.asyn import AsyncFileSystem, sync
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url, **storage_options)
    if isinstance(files, AsyncFileSystem):
        return bytes(sync(files.loop, files._cat_file, path, timeout=_TIMEOUT))
    return bytes(files.cat_file(path))


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if not isinstance(error, Exception) or isinstance(error, _FINAL) or "Validation" in type(error).__name__:
        return False
    status = getattr(error, "status", getattr(error, "code", None))
    return status in _BUSY if isinstance(status, int) and 400 <= status < 500 else True
