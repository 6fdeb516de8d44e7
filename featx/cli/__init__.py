"""The command line ``featx``; click loads when it runs.

In come the words of a shell; out come files, lines on stdout (or one JSON object) and an exit code. A command turns
words into estimators and stores, and lets them work.

Open ``commands.py`` first (which commands there are), then any one of them, such as ``fit.py`` or ``predict.py``:
one file each. They share ``options.py`` (words into settings), ``outcomes.py`` (how a command ends: what it prints,
and its exit code), ``photos.py`` (which files are meant), ``sources.py`` (labelled photos, from folders or by
``tables.py``), ``models.py`` (files of fitted models) and ``files.py`` (what is written). ``fit.py`` stands on
``ways.py`` (how to learn) and ``kinds.py`` (what: classes, numbers), ``search.py`` on ``scoring.py`` and ``found.py``,
``score.py`` on ``judged.py`` and ``measures.py``, ``check.py`` on ``findings.py``; ``report/`` makes the HTML pages.

No law begins here; commands keep those of the rooms below. What is left out or cannot be read is listed once at the
end, and a file is written whole or not at all (featx/system/writing.py).
"""

from __future__ import annotations

import io
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

    if isinstance(sys.stdout, io.TextIOWrapper):  # names of photos that its encoding lacks must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    featx()
