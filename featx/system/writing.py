"""Files that are written in full or not at all."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, sweep: bool = True, link: bool = False) -> Iterator[Path]:
    """A temporary name beside a file, which takes the file's place when all went well and vanishes when not.

    Parameters
    ----------
    path : Path
    sweep : bool, default=True
        Whether what killed processes of this machine left under such names is deleted first.
    link : bool, default=False
        Whether a file that is there already stays, as far as the disk knows links.

    Yields
    ------
    Path
        ``.NAME.MACHINE.PID.THREAD.part`` in the same folder, so that no two writers share one.
    """
    if sweep:
        sweep_away(path.parent, _escaped(path.name))
    part = path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        yield part
        if not (link and is_linked(part, path)):
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sweep_away(folder: Path, names: str) -> None:
    """Delete what killed processes of this machine left of files whose names match a pattern."""
    for left in folder.glob(f".{names}.{_escaped(_machine())}.*.part"):
        owner = left.name.rsplit(".", 3)[1]
        if owner.isdigit() and not _is_running(int(owner)):
            left.unlink(missing_ok=True)


def is_linked(part: Path, path: Path) -> bool:
    """Whether the file is there now, as a second name of the temporary one or as somebody else's."""
    try:
        os.link(part, path)
    except FileExistsError:
        return True
    except (OSError, NotImplementedError, AttributeError):  # exFAT, some network disks, some systems
        return path.exists()
    return True


def _machine() -> str:
    return platform.node().replace(".", "-")


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is no question but Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
