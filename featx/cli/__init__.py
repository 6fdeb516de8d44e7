"""The command line ``featx``; click loads when it runs."""

from __future__ import annotations

import os
import sys
import tempfile

# In memory: where it is the only folder that can be written to, as in containers with a read-only root.
_IN_MEMORY = "/dev/shm"


def main() -> None:
    """Run the command line, or say what is missing for it."""
    try:
        import click  # noqa: F401
    except ImportError:
        print('Error: The command line needs click. Run: pip install "featx[cli]"', file=sys.stderr)
        sys.exit(1)
    if not _has_temporary_folder():
        print("Error: A folder that can be written to is expected. Set TMPDIR to one.", file=sys.stderr)
        sys.exit(1)
    from featx.cli.commands import featx

    featx()


def _has_temporary_folder() -> bool:
    """Whether there is one for the libraries below, which do not load without; the one in memory at the last."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(_IN_MEMORY, os.W_OK):
            return False
        os.environ["TMPDIR"] = tempfile.tempdir = _IN_MEMORY
    return True
