"""Packages that may be there."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


@lru_cache
def is_installed(name: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return find_spec(name) is not None


@lru_cache
def installed(name: str, otherwise: str = "unknown") -> str:
    """The release of a distribution, without importing it; something else where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return otherwise
