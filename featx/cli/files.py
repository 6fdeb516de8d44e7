"""Files that are written in full or not at all."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click


class OutputFile(click.Path):
    """A file to write, in a folder that is there, with one of some endings.

    Parameters
    ----------
    *endings : str
        None for any.
    """

    def __init__(self, *endings: str) -> None:
        super().__init__(dir_okay=False, writable=True)
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check before anything is computed."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.absolute().parent.is_dir():
            self.fail(f"The folder of {str(path)!r} does not exist.", param, ctx)
        if self.endings and path.suffix.lower() not in self.endings:
            self.fail(f"A name that ends with {' or '.join(self.endings)} is expected, got {str(path)!r}.", param, ctx)
        return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside a file, which takes the file's place when all went well and vanishes when not.

    What a killed process left under such a name is swept away.
    """
    for left in path.parent.glob(f".{_escaped(path.name)}.*.part"):
        owner = left.name.rsplit(".", 2)[1]
        if owner.isdigit() and not _is_running(int(owner)):
            left.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path: Path | None, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows as CSV, into a file or to stdout."""
    if path is None:
        _write_rows(sys.stdout, head, rows)
        return
    with replacing(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        _write_rows(file, head, rows)


def _write_rows(file: TextIO, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([head, *rows])


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
