"""What is wrong with a data set of photos, once each was read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

from featx.cli.outcomes import Broken, shown
from featx.images.walk import LeftOut, told

_MOST_TOLD = 8
#: Groups of exact copies, by attribute of `Findings`, as they are told.
_COPIES = {
    "copies": "Exact copies",
    "under_classes": "Under several classes",
    "in_splits": "In several splits",
}
#: Photos whose values lie badly in the range that is read, by attribute of `Findings`, as they are told.
_RANGES = {"little_range": "Little of the range used", "beyond_range": "Values beyond the range"}

_REFUSED = "Refused by fit and search"
_NEEDED = "fit and search need one subfolder of photos per class"


@dataclass(frozen=True)
class Photo:
    """A photo in its place.

    Attributes
    ----------
    path : str
    part : str
        The folder of its split, or of the whole data set.
    name : str
        Its class; empty without one.
    digest : bytes or None
        Stands for the content; None where it cannot be read.
    """

    path: str
    part: str
    name: str
    digest: bytes | None


@dataclass(frozen=True)
class Class:
    """A class in one part of a data set, and how many of its photos can be read."""

    part: str
    name: str
    count: int


@dataclass(frozen=True)
class Findings:
    """All that is wrong.

    Attributes
    ----------
    photos : sequence of Photo
    folders : sequence of (str, str)
        Part and name of each class folder.
    broken : sequence of Broken
        What could not be read.
    left_out : sequence of LeftOut
    fewest : int
        Photos that a class needs.
    little_range, beyond_range : sequence of str
        Paths of those that use little of the range of values that is read, and of those with values beyond it.
    refused : sequence of (str, str)
        Folders that cannot be learnt from as they stand, and why; no trouble of the photos.
    without_classes : sequence of str
        Folders of photos alone, with which nothing is wrong.
    """

    photos: Sequence[Photo]
    folders: Sequence[tuple[str, str]]
    broken: Sequence[Broken]
    left_out: Sequence[LeftOut]
    fewest: int
    little_range: Sequence[str] = ()
    beyond_range: Sequence[str] = ()
    refused: Sequence[tuple[str, str]] = ()
    without_classes: Sequence[str] = ()

    @cached_property
    def copies(self) -> list[list[Photo]]:
        """Photos of the same content, where there are several."""
        groups: dict[bytes, list[Photo]] = {}
        for photo in self.photos:
            if photo.digest is not None:
                groups.setdefault(photo.digest, []).append(photo)
        return [group for group in groups.values() if len(group) > 1]

    @property
    def under_classes(self) -> list[list[Photo]]:
        """Those of the copies that lie under several classes."""
        return [group for group in self.copies if len({photo.name for photo in group} - {""}) > 1]

    @property
    def in_splits(self) -> list[list[Photo]]:
        """Those of the copies that lie in several splits."""
        return [group for group in self.copies if len({photo.part for photo in group}) > 1]

    @cached_property
    def classes(self) -> list[Class]:
        """Every class of any split in every split, and those that there are beside splits."""
        counts = Counter((photo.part, photo.name) for photo in self.photos if photo.digest is not None)
        folders = {(part, name) for part, name in self.folders if name}
        above = {os.path.dirname(os.path.abspath(part)) for part, _ in self.folders}
        parts = dict.fromkeys(part for part, name in self.folders if name)
        splits = [part for part in parts if os.path.abspath(part) not in above]
        folders |= {(part, name) for part in splits for other, name in folders if other in splits}
        return [Class(part, name, counts[part, name]) for part in parts for of, name in sorted(folders) if of == part]

    @property
    def few(self) -> list[Class]:
        """The classes with too few photos, the smallest first."""
        return sorted((each for each in self.classes if each.count < self.fewest), key=lambda each: each.count)

    @property
    def n_problems(self) -> int:
        """How many there are."""
        lost = sum(each.number for each in self.left_out if each.is_lost)
        found = [getattr(self, name) for name in (*_COPIES, *_RANGES)]
        return lost + len(self.broken) + len(self.few) + sum(map(len, found))

    def lines(self) -> Iterator[str]:
        """In words, one line for each kind, and for each folder that is refused."""
        names = {each.name for each in self.classes}
        yield f"{_number(len(self.photos), 'photo')}, {_number(len(names), 'class')}"
        if self.broken:
            yield f"Unreadable: {len(self.broken)}"
        yield from (f"{told}, such as {example}" for told, example in self._copies_told())
        for name, kind in _RANGES.items():
            if paths := getattr(self, name):
                yield f"{kind}: {_number(len(paths), 'photo')}, such as {_in_line(paths[0])}"
        if self.left_out:
            yield f"Left out: {told(self.left_out)}"
        if self.few:
            several = len({each.part for each in self.classes}) > 1
            yield f"Fewer than {self.fewest} photos: {_listed(self.few, several)}"
        yield from (f"{_REFUSED}: {_in_line(why)}" for _, why in self.refused)
        if self.without_classes:
            yield f"No class folders: {_few_of(self.without_classes)} ({_NEEDED})"
        if not self.n_problems:
            yield "Nothing else is wrong." if self.refused else "Nothing is wrong."

    def copies_line(self) -> str:
        """How many copies there are of each kind, in one line; empty without any."""
        return "; ".join(told for told, _ in self._copies_told()).capitalize()

    def _copies_told(self) -> Iterator[tuple[str, str]]:
        """Each kind of copies, counted, and an example."""
        for name, kind in _COPIES.items():
            if groups := getattr(self, name):
                files, photos = _number(sum(map(len, groups)), "file"), _number(len(groups), "photo")
                yield f"{kind}: {files} of {photos}", " and ".join(_in_line(p.path) for p in _different(groups[0])[:2])

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Path, problem and detail of each photo, each refused folder, and each class folder with few photos."""
        for each in self.broken:
            yield shown(each.path), "unreadable", each.reason
        for group in self.copies:
            for photo in group[1:]:
                yield shown(photo.path), "exact copy", shown(group[0].path)
        for kind, groups in (("name", self.under_classes), ("part", self.in_splits)):
            problem = {"name": "under several classes", "part": "in several splits"}[kind]
            for group in groups:
                places = ", ".join(sorted({getattr(photo, kind) for photo in group} - {""}))
                yield from ((shown(photo.path), problem, shown(places)) for photo in group)
        for name, kind in _RANGES.items():
            yield from ((shown(path), kind.lower(), "") for path in getattr(self, name))
        yield from ((shown(folder), _REFUSED.lower(), shown(why)) for folder, why in self.refused)
        for each_class in self.few:
            folder = os.path.join(each_class.part, each_class.name)
            yield shown(folder), f"fewer than {self.fewest} photos", str(each_class.count)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is broken and left out comes with every command."""
        groups = {name: getattr(self, name) for name in _COPIES}
        paths = {kind: [[shown(photo.path) for photo in group] for group in found] for kind, found in groups.items()}
        return {
            **paths,
            **{name: [*map(shown, getattr(self, name))] for name in _RANGES},
            "classes": [_as_dict(each) for each in self.classes],
            "fewest": self.fewest,
            "few": [_as_dict(each) for each in self.few],
            "refused": [{"folder": shown(folder), "reason": shown(why)} for folder, why in self.refused],
            "without_class_folders": [*map(shown, self.without_classes)],
            "n_problems": self.n_problems,
        }


def _as_dict(each: Class) -> dict[str, Any]:
    return {"folder": shown(each.part), "class": shown(each.name), "n_photos": each.count}


def _different(group: Sequence[Photo]) -> list[Photo]:
    """The photos of a group, first one of each part and class."""
    first = {(photo.part, photo.name): photo for photo in reversed(group)}
    return sorted(group, key=lambda photo: first[photo.part, photo.name] is not photo)


def _listed(classes: Sequence[Class], several: bool) -> str:
    paths = [os.path.join(each.part, each.name) if several else each.name for each in classes]
    return _few_of(paths, [f" ({each.count})" for each in classes])


def _few_of(paths: Sequence[str], counts: Sequence[str] = ()) -> str:
    """The first of them, each with its count, if there are some, and how many more there are."""
    words = [f"{_in_line(path)}{count}" for path, count in zip_longest(paths, counts, fillvalue="")]
    more = [f"{len(words) - _MOST_TOLD} more"] * (len(words) > _MOST_TOLD)
    return ", ".join([*words[:_MOST_TOLD], *more])


def _in_line(path: str) -> str:
    return shown(path).replace("\n", "\\n")


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 'es' if what.endswith('s') else 's'}"
