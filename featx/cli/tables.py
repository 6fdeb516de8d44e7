"""Tables of photos and what is known of them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import click

from featx.cli.options import Columns
from featx.cli.outcomes import Broken, Console, shown
from featx.cli.table_forms import Form, opened
from featx.images.remote import is_url

_MOST = 5  # rows or files that a message shows


@dataclass(frozen=True)
class Row:
    """A photo and what stands beside it.

    Attributes
    ----------
    path : str
    label : str or float
    group : str or None
    """

    path: str
    label: str | float
    group: str | None


def listed_photos(path: str, columns: Columns, console: Console) -> list[str]:
    """The photos of a table, each once; the console is told of rows without one, and of those that name one again.

    Raises
    ------
    UsageError, ClickException
    """
    file = opened(path)
    file.check(columns, ["image"])
    found = [row[0] for row in _rows(file, columns, ("image",), console)]
    _check_any_there(found, path, columns)
    once = {os.path.abspath(photo): photo for photo in reversed(found)}
    _tell_repeated(len(found) - len(once), path, console)
    return [*once.values()][::-1]


def joined(path: str, columns: Columns, numbers: bool, console: Console) -> list[Row]:
    """Photos with their labels, each once.

    Parameters
    ----------
    path : str
    columns : Columns
        Are there.
    numbers : bool
        Whether labels are numbers.
    console : Console
        Is told of what is left out: rows without a photo or a label, and those that say once more what another does.

    Raises
    ------
    ClickException
        No photo is there, one has two labels, or a number is none.
    """
    options = ("image", "label", *(["groups"] * (columns.groups is not None)))
    known, several = dict[str, Row](), dict[str, tuple[str, Any, Any]]()
    unlabelled, wrong, repeated = list[str](), list[str](), 0
    for photo, text, *rest in _rows(opened(path), columns, options, console):
        if text is None:
            unlabelled.append(photo)
            continue
        label = _number(text) if numbers else text
        if label is None:
            wrong.append(f"{text!r} of {shown(photo)}")
            continue
        row = Row(photo, label, *(rest or [None]))
        first = known.setdefault(os.path.abspath(photo), row)
        if first is not row:
            repeated += 1
            if first.label != row.label:
                several.setdefault("label", (photo, first.label, row.label))
            if first.group != row.group:
                several.setdefault("group", (photo, first.group, row.group))
    unlabelled = [photo for photo in dict.fromkeys(unlabelled) if os.path.abspath(photo) not in known]
    if wrong:
        raise click.ClickException(
            f"Numbers are expected in the column {columns.label!r} of {shown(path)}, got "
            f"{', '.join(wrong[:_MOST])}{_more(wrong)}. Write decimals with a point; names are learnt as classes."
        )
    _check_any_there([*(row.path for row in known.values()), *unlabelled], path, columns)
    if without := [row.path for row in known.values() if columns.groups is not None and row.group is None]:
        raise click.ClickException(
            f"A group for each photo is expected in the column {columns.groups!r} of {shown(path)}, got none for "
            f"{', '.join(map(shown, without[:_MOST]))}{_more(without)}. Write the photo's own name where it is alone."
        )
    for what, (photo, one, other) in several.items():
        raise click.ClickException(
            f"One {what} for each photo is expected, got {shown(photo)} with {one!r} and {other!r} in {shown(path)}. "
            "Leave one of its rows."
        )
    if not known:
        raise click.ClickException(f"Photos with labels are expected, got {shown(path)} without any.")
    console.leave_out(Broken.unlabelled(photo, columns.label or "") for photo in unlabelled)
    _tell_repeated(repeated, path, console)
    return [*known.values()]


def _rows(file: Form, columns: Columns, options: Sequence[str], console: Console) -> list[list[Any]]:
    """Path and other values of all rows that name a photo."""
    found, n_empty, n_rows = list[list[Any]](), 0, 0
    base, urls = columns.base(file.path), list[str]()
    names = [getattr(columns, option) for option in options]
    for cells in file.rows(names):
        n_rows += 1
        name, *values = (_text(cell, column, file.path) for cell, column in zip(cells, names, strict=True))
        if name is None:
            n_empty += 1
        elif is_url(name):
            urls.append(name)
        else:
            found.append([_path(name, base), *values])
    if urls:
        raise click.ClickException(
            f"Files are expected in the column {columns.image!r} of {shown(file.path)}, got the URL {urls[0]}"
            f"{f' and {len(urls) - 1} more' if len(urls) > 1 else ''}. Fetch them first; in Python "
            "storage_options={} lets featx read URLs."
        )
    if not n_rows:
        raise click.ClickException(f"Rows of photos are expected, got {shown(file.path)} without any.")
    if not found:
        raise click.ClickException(
            f"Photos are expected in the column {columns.image!r} of {shown(file.path)}, which is empty in all rows."
        )
    if file.remark:
        console.note(file.remark)
    console.lose_rows(n_empty, f"{_counted(n_empty)} of {shown(file.path)} without a photo in {columns.image!r}")
    return found


def _text(value: Any, column: str, path: str) -> str | None:
    """A cell as text; None for nothing, which floats write as NaN.

    Whole numbers are written alike, since a column of them that lacks some holds floats.

    Raises
    ------
    ClickException
        The cell holds several things, or bytes.
    """
    if isinstance(value, dict | list | bytes):
        what = "bytes" if isinstance(value, bytes) else f"a {type(value).__name__}"
        raise click.ClickException(
            f"Texts or numbers are expected in the column {column!r} of {shown(path)}, got {what}. Photos inside of a "
            "table have to be written into files first."
        )
    if value is None or value != value:
        return None
    whole = isinstance(value, float) and value.is_integer()
    return unicodedata.normalize("NFC", str(int(value) if whole else value).strip()) or None


def _path(name: str, base: str) -> str:
    """Of a photo that a table names; those that Windows wrote have other separators."""
    path = os.path.join(base, os.path.expanduser(name))
    if os.path.exists(path):
        return path
    others = [os.path.join(base, name.replace("\\", "/")), os.path.join(base, unicodedata.normalize("NFD", name))]
    return next((other for other in others if os.path.exists(other)), path)


def _check_any_there(paths: Sequence[str], table: str, columns: Columns) -> None:
    """Raise where not one photo is there; single ones are told with those that cannot be read."""
    if any(map(os.path.exists, paths)):
        return
    raise click.ClickException(
        f"Photos are expected at the paths in the column {columns.image!r} of {shown(table)}, got none of "
        f"{len(paths)}, such as {shown(os.path.abspath(paths[0]))}. Paths are relative to the table's folder, or to "
        "the one that --root says."
    )


def _tell_repeated(n: int, path: str, console: Console) -> None:
    """Rows that are no loss."""
    if n:
        console.note(f"{_counted(n)} of {shown(path)} name a photo once more, and count once.")


def _number(text: str) -> float | None:
    try:
        number = float(text) if "_" not in text else None
    except ValueError:
        return None
    return number if number is not None and isfinite(number) else None


def _counted(n: int) -> str:
    return f"{n} row{'s' * (n != 1)}"


def _more(found: Sequence[str]) -> str:
    """What follows the first of them in a message."""
    return f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
