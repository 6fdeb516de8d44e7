"""Where labelled photos come from: a folder of class folders, or a table."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Protocol

import click
import numpy as np

from featx.cli.options import Columns, listed, refuse_given
from featx.cli.outcomes import Console, shown
from featx.cli.photos import closed_folders, typed_classes
from featx.cli.table_forms import FORMS, is_table, opened
from featx.cli.tables import joined
from featx.images.classes import list_classes

TASKS = ("classification", "regression")


@dataclass(frozen=True)
class Labelled:
    """Photos and what is to be learnt of them.

    Attributes
    ----------
    paths : list of str
    y : ndarray of shape (n,), str or float
        Classes, or numbers.
    groups : ndarray of shape (n,), str, or None
        Which photos belong together.
    """

    paths: list[str]
    y: np.ndarray
    groups: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Labelled:
        """Some of them."""
        groups = None if self.groups is None else self.groups[rows]
        return Labelled([self.paths[row] for row in rows.tolist()], self.y[rows], groups)


class Source(Protocol):
    """What a user names as the photos to learn from."""

    @property
    def path(self) -> str:
        """As it was typed."""

    @property
    def words(self) -> list[str]:
        """What to type for it."""

    @property
    def folder(self) -> str:
        """From which on photos are named."""

    @property
    def code(self) -> tuple[list[str], list[str]]:
        """Python that makes ``paths`` and ``labels`` in the same order: imports, and lines."""

    def labelled(self, console: Console) -> Labelled:
        """The photos; the console is told of what is left out.

        Raises
        ------
        ValueError, ClickException
            There are none, or something is wrong with all of them.
        """


@dataclass(frozen=True)
class Folders:
    """A folder with one subfolder for each class."""

    path: str
    classes: list[str] | None

    @property
    def words(self) -> list[str]:
        """Folder, and the classes where they were given."""
        return [self.path, *(["--classes", listed(self.classes)] if self.classes else [])]

    @property
    def folder(self) -> str:
        """The folder."""
        return self.path

    @property
    def code(self) -> tuple[list[str], list[str]]:
        """By featx's own function."""
        classes = "" if self.classes is None else f", classes={self.classes!r}"
        lines = [
            f"photos = load_image_folder({self.path!r}{classes}, shuffle=False)",
            "paths, labels = photos.data, photos.target",
        ]
        return ["from featx import load_image_folder"], lines

    def labelled(self, console: Console) -> Labelled:
        """Each photo has the name of its subfolder."""
        found = list_classes(self.path, self.classes, line=typed_classes)
        console.leave_out(closed_folders(found.closed))
        found.check_any()
        if found.lost:
            warnings.warn(found.lost, stacklevel=2)
        console.tell_left_out(found.left_out)
        labels = [name for name, photos in found.pictures.items() for _ in photos]
        return Labelled([photo for photos in found.pictures.values() for photo in photos], np.asarray(labels))


@dataclass(frozen=True)
class Table:
    """A table with a column of photos and one of labels."""

    path: str
    columns: Columns
    task: str

    @property
    def words(self) -> list[str]:
        """The table, and its columns."""
        return [self.path, *self.columns.words()]

    @property
    def folder(self) -> str:
        """What its paths are relative to."""
        return self.columns.base(self.path)

    @property
    def code(self) -> tuple[list[str], list[str]]:
        """By pandas."""
        image, label = self.columns.image, self.columns.label
        lines = [
            f"table = {opened(self.path).code()}.dropna(subset=[{image!r}, {label!r}]).drop_duplicates({image!r})",
            f"paths = [os.path.join({self.folder!r}, file) for file in table[{image!r}]]",
            f"labels = table[{label!r}].to_numpy()",
        ]
        return ["import os", "import pandas as pd"], lines

    def labelled(self, console: Console) -> Labelled:
        """Each photo has what stands beside it."""
        rows = joined(self.path, self.columns, self.task == "regression", console)
        groups = None if self.columns.groups is None else np.array([row.group for row in rows], dtype=str)
        return Labelled([row.path for row in rows], np.asarray([row.label for row in rows]), groups)


def source_of(path: str, classes: list[str] | None, columns: Columns, task: str = TASKS[0]) -> Source:
    """What a path and its options mean.

    Raises
    ------
    UsageError
        An option does not go with it, or one is missing.
    """
    if not is_table(path):
        if not os.path.isdir(path):
            raise click.UsageError(f"A folder or a table ({', '.join(FORMS)}) is expected, got {shown(path)}.")
        refuse_given(["image", "label", "groups", "root", "task"], "goes with a table of photos, not with a folder")
        return Folders(path, classes)
    refuse_given(["classes"], "goes with a folder of class folders, not with a table")
    opened(path).check(columns, ("image", "label"))
    return Table(path, columns, task)
