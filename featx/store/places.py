"""Where a store lies: the user's cache folder, sizes as people write them, and disks that cannot hold one."""

from __future__ import annotations

import os
import re
import sys
from functools import lru_cache
from pathlib import Path

from featx.exceptions import StoreError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_NETWORK = (
    *("9p", "acfs", "afs", "afpfs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs"),
    *("nfs4", "ocfs2", "orangefs", "pvfs2", "smb2", "smb3", "smbfs"),
    *(f"fuse.{kind}" for kind in ("ceph", "glusterfs", "gcsfuse", "rclone", "s3fs", "sshfs")),
)
_MOUNTS = Path("/proc/self/mountinfo")


class NoPlace(StoreError):
    """No store can lie in a folder.

    Parameters
    ----------
    message : str
        As of every error.
    reason : str, default=""
        Why, alone, for whoever knows what else to do about it.
    """

    def __init__(self, message: str, reason: str = "") -> None:  # a pickle makes it from the message alone
        super().__init__(message)
        self.reason = reason


class OnNetwork(NoPlace):
    """The folder lies on a network file system."""


def default_folder() -> Path:
    """``$FEATX_CACHE``, or else ``featx`` in the folder where the system wants caches.

    It begins with ``~``, as users write it, where this user has no home.
    """
    if folder := os.environ.get("FEATX_CACHE"):
        return Path(folder)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local") / "featx" / "cache"
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "featx"
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "featx"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        return Path("~")


def full_path(folder: str) -> Path:
    """One name for a folder, whatever path leads to it.

    Raises
    ------
    NoPlace
        It begins with the home of a user who has none.
    """
    try:
        return Path(os.path.realpath(Path(folder).expanduser()))
    except RuntimeError as error:  # no HOME, and no entry of the user in the system's list
        raise NoPlace(
            f"A folder by its full path is expected where this user has no home, got {folder!r}. Set FEATX_CACHE (or "
            "cache=) to one.",
            f"{folder} cannot be found, since this user has no home",
        ) from error


def parse_size(size: str | int, name: str = "max_size") -> int:
    """Bytes of a size such as ``"20GB"`` (10^9), ``"512MiB"`` (2^20) or a number of bytes.

    Raises
    ------
    ValueError
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", size.upper()) if isinstance(size, str) else None
    if found is None or found[2] not in _UNITS:
        raise ValueError(f'A size such as "20GB" or a number of bytes is expected, got {name}={size!r}.')
    return int(float(found[1]) * _UNITS[found[2]])


@lru_cache(maxsize=64)
def check_local(folder: Path, mounts: Path = _MOUNTS) -> None:
    """Raise where a folder lies on a network file system, whose locks and memory maps LMDB cannot rely on.

    Raises
    ------
    OnNetwork
    """
    kind = _file_system(folder, mounts)
    if kind in _NETWORK:
        raise OnNetwork(
            f"A folder on a local disk is expected for the feature store, got {str(folder)!r} on a network file system "
            f"({kind}), where concurrent processes would damage it. Set cache= (or FEATX_CACHE) to a local folder.",
            f"{folder} lies on a network file system ({kind}), where concurrent processes would damage it",
        )


def _file_system(folder: Path, mounts: Path) -> str:
    """Kind of the file system that a folder lies on or would be made on; empty where the system does not tell."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    target = Path(os.path.realpath(folder))
    best, kind = -1, ""
    for line in lines:
        before, _, after = line.partition(" - ")
        # Spaces and the like are written as octal escapes.
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), before.split()[4]))
        if len(point.parts) >= best and target.is_relative_to(point):
            best, kind = len(point.parts), after.split()[0]
    return kind
