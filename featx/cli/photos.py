"""Files that a user means by a folder, broken ones and all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence

import click
import numpy as np

from featx.cli.options import listed
from featx.cli.outcomes import Broken, Console, one_line
from featx.images.classes import list_classes
from featx.images.formats import choose
from featx.images.walk import left_out_of, told, walk
from featx.system.shell import typed


def list_photos(paths: Sequence[str], console: Console) -> list[str]:
    """Photos in files and folders, each once.

    Raises
    ------
    ClickException
        There are none.
    """
    choice = choose()
    listings = {path: walk(path, choice) for path in paths if os.path.isdir(path)}
    found = [photo for path in paths for photo in (listings[path].pictures if path in listings else [path])]
    left_out = left_out_of(listings.values())
    console.leave_out(closed_folders(error for listing in listings.values() for error in listing.closed))
    if not found:
        raise click.ClickException(
            f"{' '.join(paths)} holds no pictures{f', but: {told(left_out)}' if left_out else ''}."
        )
    console.tell_left_out(left_out)
    return list(dict.fromkeys(found))


def list_labelled(folder: str, classes: Sequence[str] | None, console: Console) -> tuple[list[str], np.ndarray]:
    """Photos of a folder with one subfolder per class, and their classes.

    Parameters
    ----------
    folder : str
    classes : sequence of str or None
        As of :func:`featx.load_image_folder`.

    Returns
    -------
    paths : list of str
    labels : ndarray of shape (n_photos,), str

    Raises
    ------
    ValueError
        No subfolder holds a picture, or one is no class.
    """
    found = list_classes(folder, classes, line=_line)
    console.leave_out(closed_folders(found.closed))
    found.check_any()
    if found.lost:
        warnings.warn(found.lost, stacklevel=2)
    console.tell_left_out(found.left_out)
    labels = [name for name, photos in found.pictures.items() for _ in photos]
    return [photo for photos in found.pictures.values() for photo in photos], np.asarray(labels)


def refusal(folder: str) -> str | None:
    """Why a folder is none of class folders as it stands, in the words of the commands that learn; None if it is."""
    try:
        list_classes(folder, line=_line)
    except ValueError as error:
        return one_line(error)
    return None


def closed_folders(errors: Iterable[OSError]) -> list[Broken]:
    """Folders that cannot be listed."""
    return [Broken(str(error.filename), (error.strerror or str(error)).lower()) for error in errors]


def _line(path: str, classes: Sequence[str]) -> str:
    return typed([path, "--classes", listed(classes)])
