"""Files that a user means by a folder, broken ones and all."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence

import click

from featx.cli.options import Columns, listed, refuse_given
from featx.cli.outcomes import Broken, Console, one_line
from featx.cli.table_forms import FORMS, is_table
from featx.cli.tables import listed_photos
from featx.images.classes import list_classes
from featx.images.formats import choose
from featx.images.walk import left_out_of, told, walk
from featx.system.shell import typed


def list_photos(paths: Sequence[str], console: Console, columns: Columns | None = None) -> list[str]:
    """Photos in files and folders, and those that tables name where columns may say in which one; each once.

    Raises
    ------
    ClickException
        There are none.
    """
    if columns is not None and not any(map(is_table, paths)):
        refuse_given(["image", "root"], f"goes with a table of photos ({', '.join(FORMS)})")
    choice = choose()
    listings = {path: walk(path, choice) for path in paths if os.path.isdir(path)}

    def photos_of(path: str) -> list[str]:
        if path in listings:
            return listings[path].pictures
        return listed_photos(path, columns, console) if columns is not None and is_table(path) else [path]

    found = [photo for path in paths for photo in photos_of(path)]
    left_out = left_out_of(listings.values())
    console.leave_out(closed_folders(error for listing in listings.values() for error in listing.closed))
    if not found:
        raise click.ClickException(
            f"{' '.join(paths)} holds no pictures{f', but: {told(left_out)}' if left_out else ''}."
        )
    console.tell_left_out(left_out)
    return list(dict.fromkeys(found))


def refusal(folder: str) -> str | None:
    """Why a folder is none of class folders as it stands, in the words of the commands that learn; None if it is."""
    try:
        list_classes(folder, line=typed_classes)
    except ValueError as error:
        return one_line(error)
    return None


def closed_folders(errors: Iterable[OSError]) -> list[Broken]:
    """Folders that cannot be listed."""
    return [Broken(str(error.filename), (error.strerror or str(error)).lower()) for error in errors]


def typed_classes(path: str, classes: Sequence[str]) -> str:
    """A folder and its classes, as one types them."""
    return typed([path, "--classes", listed(classes)])


def spelt(name: str) -> str:
    """A name in one spelling: macOS takes accents apart."""
    return unicodedata.normalize("NFC", name)
