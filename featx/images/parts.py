"""A data set in folders: its splits, if it has some, and their classes."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from featx.images.classes import is_split
from featx.images.formats import Choice
from featx.images.walk import BESIDE, Listing, is_folder, walk, walk_classes


@dataclass(frozen=True)
class Part:
    """A data set, or one of its splits.

    Attributes
    ----------
    path : str
        The folder.
    classes : dict of str to Listing
        By class folder, in their order. Where photos lie in the folder itself and in no subfolder, one class without
        a name.
    beside : Listing
        What lies beside the class folders.
    """

    path: str
    classes: dict[str, Listing]
    beside: Listing

    @property
    def listings(self) -> list[Listing]:
        """All there are."""
        return [self.beside, *self.classes.values()]


def list_parts(path: str, why_not: Choice) -> list[Part]:
    """The splits of a folder, those of its subfolders that are called so; without any, the folder as one part.

    A subfolder that is called like a split and holds no subfolders is a class among classes, and a split among splits.
    What lies beside splits is a part of its own.

    Parameters
    ----------
    path : str
    why_not : callable
        As of :func:`~featx.images.formats.choose`.
    """
    classes, beside = walk_classes(path, why_not)
    splits = _splits_among(path, [*classes])
    if not splits:
        return [_whole(path, classes, beside, why_not)]
    paths = [os.path.join(path, name) for name in splits]
    rest = {name: listing for name, listing in classes.items() if name not in splits}
    return [
        *(_whole(split, *walk_classes(split, why_not), why_not) for split in paths),
        Part(path, _by_name(rest), beside),
    ]


def _splits_among(path: str, names: list[str]) -> list[str]:
    called_so = [name for name in names if is_split(name)]
    if len(called_so) == len(names):
        return called_so
    return [name for name in called_so if any(map(is_folder, Listing().entries(os.path.join(path, name))))]


def _whole(path: str, classes: dict[str, Listing], beside: Listing, why_not: Choice) -> Part:
    loose = any(reason == BESIDE for _, reason in beside.left_out)
    if loose and not any(listing.pictures for listing in classes.values()):
        return Part(path, {"": walk(path, why_not)}, Listing())
    return Part(path, _by_name(classes), beside)


def _by_name(classes: dict[str, Listing]) -> dict[str, Listing]:
    """The same, names spelt alike on all systems, where no two are: macOS takes accents apart."""
    spelt = {name: unicodedata.normalize("NFC", name) for name in classes}
    alike = Counter(spelt.values())
    return {name if alike[spelt[name]] > 1 else spelt[name]: listing for name, listing in classes.items()}


def photos_of(parts: list[Part]) -> Iterator[tuple[str, Part, str]]:
    """Each photo once, with its part and its class."""
    seen = set[str]()
    for part in parts:
        for name, listing in part.classes.items():
            for path in listing.pictures:
                if (place := os.path.abspath(path)) not in seen:
                    seen.add(place)
                    yield path, part, name
