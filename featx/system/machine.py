"""What this machine computes with."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_TELLING = ("model name", "flags", "Features", "CPU implementer", "CPU part")


@lru_cache
def processor() -> str:
    """The model of the processor and what it can do, in words that differ where its arithmetic may."""
    lines: dict[str, str] = {}
    with suppress(OSError):
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            lines.setdefault(name.strip(), value.strip())
    told = [lines[name] for name in _TELLING if name in lines]
    return "; ".join([platform.machine(), *(told or [platform.processor()])])
