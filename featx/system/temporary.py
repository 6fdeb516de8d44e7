"""Folders for what does not last, also where few can be written to."""

from __future__ import annotations

import os
import tempfile

# Of Linux: where it is the only folder that can be written to, as in containers with a read-only root.
_IN_MEMORY = "/dev/shm"
#: Where to try, in this order. None stands for where the system says ($TMPDIR), which may be a network disk or
#: read-only, as in many containers. Some systems have none of the others.
FOLDERS = (None, "/tmp", "/var/tmp", _IN_MEMORY)


def has_temporary_folder() -> bool:
    """Whether there is one for libraries, of which some do not load without; the one in memory at the last."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(_IN_MEMORY, os.W_OK):
            return False
        os.environ["TMPDIR"] = tempfile.tempdir = _IN_MEMORY
    return True
