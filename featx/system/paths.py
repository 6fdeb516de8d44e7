"""Names of files, on systems with drives and with two kinds of slashes too."""

from __future__ import annotations

import os
from types import ModuleType


def nearby(path: str, system: ModuleType = os.path) -> str:
    """A path from the folder in which the process is; in full where it lies on another drive.

    Parameters
    ----------
    path : str
    system : module
        As ``os.path``.
    """
    try:
        return str(system.relpath(path))
    except ValueError:
        return path


def with_slashes(path: str, system: ModuleType = os.path) -> str:
    """A path with ``/`` between its parts, where the system takes it for the same."""
    return path.replace(system.sep, system.altsep) if system.altsep else path


def path_of_url(url: str, system: ModuleType = os.path) -> str:
    """Full path of the file that a URL such as ``file:///photos`` or ``file:///C:/photos`` names."""
    path = url.partition("://")[2]
    has_drive = bool(system.splitdrive(path.lstrip("/"))[0])
    return str(system.abspath(path.lstrip("/") if has_drive else path))
