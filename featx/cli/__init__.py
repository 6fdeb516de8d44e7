"""The command line ``featx``; click loads when it runs."""

from __future__ import annotations

import sys

from featx.system.temporary import has_temporary_folder


def main() -> None:
    """Run the command line, or say what is missing for it."""
    try:
        import click  # noqa: F401
    except ImportError:
        print('Error: The command line needs click. Run: pip install "featx[cli]"', file=sys.stderr)
        sys.exit(1)
    if not has_temporary_folder():
        print("Error: A folder that can be written to is expected. Set TMPDIR to one.", file=sys.stderr)
        sys.exit(1)
    from featx.cli.commands import featx

    featx()
