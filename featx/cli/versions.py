"""What ``featx --version`` tells: featx's own release, and those of what it stands on, for reports of faults."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, requires

from featx._version import __version__
from featx.system.packages import installed

# A requirement's name, and the extra that it belongs to, if to any.
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)[^;]*(?:;.*extra == [\"'](?P<extra>[\w-]+)[\"'])?")
_OF_DEVELOPERS = {"all", "test", "bench", "dev"}  # all of which name others


def versions() -> str:
    """Lines of names and releases, as installed; no library is loaded."""
    lines = [f"featx {__version__}", f"Python {platform.python_version()} on {platform.platform()}"]
    return "\n".join([*lines, *_requirements()])


def _requirements() -> list[str]:
    try:
        return [f"{name} {installed(name, 'is not installed')}" for name in _names()]
    except PackageNotFoundError:  # in a clone
        return ["What featx requires is unknown, since featx is not installed: pip install -e ."]


def _names() -> list[str]:
    """What featx requires, and then what its users' extras do.

    Raises
    ------
    PackageNotFoundError
        featx itself is not installed.
    """
    found = [match for line in requires("featx") or [] if (match := _REQUIREMENT.match(line))]
    own = sorted(match["name"] for match in found if match["extra"] is None)
    extra = {match["name"] for match in found if match["extra"] not in _OF_DEVELOPERS} - {*own, "featx"}
    return [*own, *sorted(extra)]
