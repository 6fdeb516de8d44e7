"""Files that a user means by a folder, broken ones and all."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from featx.cli.outcomes import Broken, Console
from featx.images.folder import class_folders, is_hidden, is_picture


@dataclass
class Listing:
    """Photos by name; no file is opened.

    Attributes
    ----------
    paths : list of str
        Sorted within each folder that was asked for. A folder that is named like a picture and holds none is one of
        them, so that whoever reads it says what it is.
    closed : list of Broken
        Folders that could not be listed.
    """

    paths: list[str] = field(default_factory=list)
    closed: list[Broken] = field(default_factory=list)

    def add(self, path: str) -> None:
        """A file as it is, or every picture in a folder at any depth; hidden ones are left out."""
        self.paths += self._in_folder(path) if os.path.isdir(path) else [path]

    def _in_folder(self, folder: str) -> list[str]:
        def note(error: OSError) -> None:
            self.closed.append(Broken(str(error.filename), (error.strerror or str(error)).lower()))

        found: list[str] = []
        named_so: list[str] = [folder] if is_picture(os.path.basename(folder)) else []
        for parent, folders, names in os.walk(folder, onerror=note):
            folders[:] = [name for name in folders if not is_hidden(name)]
            named_so += [os.path.join(parent, name) for name in folders if is_picture(name)]
            found += [os.path.join(parent, name) for name in names if is_picture(name)]
        closed = {broken.path for broken in self.closed}
        empty = [path for path in named_so if path not in closed and not _holds_any(path, found)]
        return sorted([*found, *empty])


def list_photos(paths: tuple[str, ...] | list[str], console: Console) -> list[str]:
    """Photos in files and folders, each once.

    Raises
    ------
    ClickException
        There are none.
    """
    listing = Listing()
    for path in paths:
        listing.add(path)
    console.leave_out(listing.closed)
    if not listing.paths:
        raise click.ClickException(f"{' '.join(paths)} holds no pictures (.jpg, .png, .webp, .gif, .bmp, .tif).")
    return list(dict.fromkeys(listing.paths))


def list_labelled(folder: str, console: Console) -> tuple[list[str], np.ndarray]:
    """Photos of a folder with one subfolder per class, and their classes.

    Returns
    -------
    paths : list of str
    labels : ndarray of shape (n_photos,), str

    Raises
    ------
    ClickException
        No subfolder holds a picture.
    """
    listing, labels = Listing(), list[str]()
    for subfolder in class_folders(Path(folder)):
        listing.add(os.fspath(subfolder))
        labels += [subfolder.name] * (len(listing.paths) - len(labels))
    console.leave_out(listing.closed)
    if not listing.paths:
        raise click.ClickException(
            f"{folder} has no subfolder with pictures. Put each class's photos into a folder of its own, such as "
            f"{os.path.join(folder, 'cats')} and {os.path.join(folder, 'dogs')}."
        )
    loose = sum(is_picture(entry.name) and not entry.is_dir() for entry in os.scandir(folder))
    if loose:
        console.note(f"{loose} pictures beside the class folders have no class and are left out.")
    return listing.paths, np.asarray(labels)


def _holds_any(folder: str, files: list[str]) -> bool:
    inside = os.path.join(folder, "")
    return any(file.startswith(inside) for file in files)
