"""Words as one types them into this system's shell."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable


def typed(words: Iterable[str], system: str = os.name) -> str:
    """A line that a shell takes for these words.

    Parameters
    ----------
    words : iterable of str
    system : str
        As ``os.name``: those of ``"nt"`` know double quotes alone, and no escapes by backslashes, which paths hold.
    """
    return subprocess.list2cmdline([*words]) if system == "nt" else shlex.join(words)
