"""Files that are written in full or not at all."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import click

from featx.system.writing import replacing


class OutputFile(click.Path):
    """A file to write, in a folder that is there, with one of some endings.

    Parameters
    ----------
    *endings : str
        None for any. An empty one also allows a folder, which need not be there.
    """

    def __init__(self, *endings: str) -> None:
        super().__init__(dir_okay="" in endings, writable=True)
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check before anything is computed."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.absolute().parent.is_dir():
            self.fail(f"The folder of {str(path)!r} does not exist.", param, ctx)
        if "" in self.endings and path.exists() and path.is_dir() == bool(path.suffix):
            self.fail(f"A file is expected with an ending and a folder without, got {str(path)!r}.", param, ctx)
        if self.endings and path.suffix.lower() not in self.endings:
            known = " or ".join(filter(None, self.endings)) + (", or a folder," if "" in self.endings else "")
            self.fail(f"A name that ends with {known} is expected, got {str(path)!r}.", param, ctx)
        return path


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
