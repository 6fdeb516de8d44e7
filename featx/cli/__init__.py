"""The command line ``featx``; click loads when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what is missing for it."""
    try:
        import click  # noqa: F401
    except ImportError:
        print('Error: The command line needs click. Run: pip install "featx[cli]"', file=sys.stderr)
        sys.exit(1)
    from featx.cli.commands import featx

    featx()
