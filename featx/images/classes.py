"""Subfolders that stand for classes: which there are, in which order, and what each holds."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from featx.images.formats import NEEDS_HEIC, NOT_ASKED_FOR, Choice, choose
from featx.images.walk import (
    BESIDE,
    FOLDER,
    HIDDEN,
    LeftOut,
    Listing,
    left_out_of,
    told,
    walk_classes,
)

# How people call the parts of a data set, in lower case: "train", "val2017", "Test images". Each may also be a class.
_PARTS = (
    *("train", "training", "val", "valid", "validation", "dev", "development"),
    *("test", "testing", "eval", "evaluation", "holdout", "hold out"),
)
_OF_WHAT = ("set", "data", "images", "imgs", "photos", "pictures", "split")
_SPLIT = re.compile(rf"({'|'.join(_PARTS)})( ?({'|'.join(_OF_WHAT)}))? ?[0-9]*".replace(" ", "[ _-]"), re.IGNORECASE)

#: How one types a path and the names of its classes.
Line = Callable[[str, Sequence[str]], str]


@dataclass(frozen=True)
class ClassFolders:
    """What a folder of class folders holds.

    Attributes
    ----------
    path : str
    pictures : dict of str to list of str
        By class, in the order of the classes.
    left_out : list of LeftOut
    closed : list of OSError
        Folders that cannot be listed.
    lost : str or None
        What to warn of: class folders with files of which none is listed.
    """

    path: str
    pictures: dict[str, list[str]]
    left_out: list[LeftOut]
    closed: list[OSError]
    lost: str | None

    def check_any(self, way_out: str = "") -> None:
        """Raise where there is no picture at all.

        Parameters
        ----------
        way_out : str
            What else helps, for the end of the message.

        Raises
        ------
        ValueError
        """
        if any(self.pictures.values()):
            return
        files = [each for each in self.left_out if each.ending != FOLDER]
        what = f"in whose subfolders is none; there are {told(files)}" if files else "which holds no files"
        reasons = {each.reason for each in files} - {HIDDEN}
        if BESIDE in reasons or not reasons:
            do = "Put each class's pictures into a folder of its own"
        else:
            do = "Install what they need" if NEEDS_HEIC in reasons else f"Convert them{way_out}"
        if asked := [each.ending or "a name" for each in files if each.reason == NOT_ASKED_FOR]:
            do = f"Name their endings in extensions, such as {asked[0]!r}"
        raise ValueError(
            f"A folder with one subfolder of pictures per class is expected, got path={self.path!r}, {what}. {do}."
        )


def list_classes(
    path: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    *,
    extensions: str | Iterable[str] | None = None,
    line: Line = lambda path, classes: f"load_image_folder({path!r}, classes={[*classes]!r})",
) -> ClassFolders:
    """Pictures by class.

    Parameters
    ----------
    path, classes, extensions
        As of :func:`load_image_folder`.
    line : callable
        How one types a path and the names of its classes, for messages.

    Raises
    ------
    OSError, ValueError
        As of :func:`load_image_folder`, but for folders that cannot be listed and those without any picture.
    """
    root = os.fspath(_check_folder(path))
    names = None if classes is None else _check_names(classes)
    choice = choose(extensions)
    walks, beside = walk_classes(root, choice)
    if names is None:
        _check_no_splits(root, walks, line, choice)
        found = walks
    else:
        there = _under(names, walks)
        _check_no_others(root, names, there, line, choice)
        found = {name: Listing() for name in names} | there
    empty = [name for name, listing in found.items() if not listing.pictures]
    unlisted = [LeftOut(FOLDER, f"no picture of {_listed(empty)}", len(empty))] * bool(empty)
    dropped = empty if names is None else [*found.keys() - set(names)]
    return ClassFolders(
        path=root,
        pictures={name: listing.pictures for name, listing in found.items() if name not in dropped},
        left_out=[*left_out_of([beside, *walks.values()]), *unlisted],
        closed=[error for each in (beside, *walks.values()) for error in each.closed],
        lost=_lost({name: found[name] for name in empty}),
    )


def is_split(name: str) -> bool:
    """Whether a folder is called like a part of a data set, as a class may be too."""
    return _SPLIT.fullmatch(name) is not None


def _check_folder(path: str | os.PathLike[str]) -> Path:
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"An existing folder is expected, got path={str(root)!r}. Check the spelling.")
    if not root.is_dir():
        raise NotADirectoryError(f"A folder is expected, got path={str(root)!r}, a file. Pass the folder it lies in.")
    return root


def _check_names(classes: Sequence[str]) -> list[str]:
    names = [*classes] if isinstance(classes, Iterable) and not isinstance(classes, str | Set) else []
    if not names or len({*names}) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f'A list of different names of class folders is expected, got classes={classes!r}. Pass ["ants", "bees"] '
            "for folders of these names."
        )
    return [*map(str, names)]


def _under(names: Sequence[str], walks: Mapping[str, Listing]) -> dict[str, Listing]:
    """The same by names of classes, which folders may spell with other code points: macOS takes accents apart."""
    spelt = {unicodedata.normalize("NFC", name): name for name in names}
    found = dict[str, Listing]()
    for folder, listing in walks.items():
        name = spelt.get(unicodedata.normalize("NFC", folder), folder)
        found[folder if name in walks else name] = listing
    return found


def _check_no_splits(root: str, walks: Mapping[str, Listing], line: Line, choice: Choice) -> None:
    """Raise where class folders are called like splits."""
    folders = [name for name, listing in walks.items() if _holds_files(listing)]
    splits = [name for name in folders if is_split(name)]
    if splits:
        raise ValueError(
            f"One subfolder per class is expected, got path={root!r} with the subfolders {_listed(splits)}, which "
            f"are called like splits of a data set. If these are splits, "
            f"{_way_into(root, splits, line, choice)}. If they are classes, name them: {line(root, folders)}"
        )


def _way_into(root: str, splits: Sequence[str], line: Line, choice: Choice) -> str:
    """How to read splits, by classes of which one of them holds a picture."""
    inside = {path: walk_classes(path, choice)[0] for path in (os.path.join(root, split) for split in splits)}
    filled = {path: [name for name, listing in walks.items() if listing.pictures] for path, walks in inside.items()}
    classes = sorted({name for names in filled.values() for name in names})
    if not classes:
        return "move them out of the folder of the classes"
    path = next(path for path, names in filled.items() if names)
    others = [name for name, listing in inside[path].items() if name not in classes and _holds_files(listing)]
    first = f"move {_listed([os.path.join(path, name) for name in others])} elsewhere and " if others else ""
    return f"{first}read one at a time, all with the same classes: {line(path, classes)}"


def _check_no_others(root: str, names: Sequence[str], there: Mapping[str, Listing], line: Line, choice: Choice) -> None:
    """Raise where a folder with files is none of the classes."""
    filled = [name for name, listing in there.items() if _holds_files(listing)]
    others = [name for name in filled if name not in names]
    if not others:
        return
    meant = _meant([name for name in names if name not in filled], others)
    absent = [name for name in names if name not in there and name not in meant]
    spelt = [meant.get(name, name) for name in names if name not in absent]
    all_named = line(root, [*spelt, *(name for name in others if name not in spelt)])
    if splits := [name for name in others if is_split(name)]:
        way = (
            f"If these are splits, {_way_into(root, splits, line, choice)}. If they are classes, name them: {all_named}"
        )
    elif meant:
        pairs = ", ".join(f"{folder!r} in place of {name!r}" for name, folder in meant.items())
        way = f"Did you mean {pairs}? Name them: {all_named}"
    else:
        way = f"Name all of them: {all_named}"
    got = f"no folder {_listed(absent)}; there are {_listed(filled)}" if absent else f"{_listed(others)} too"
    raise ValueError(
        f"Subfolders of the names classes={[*names]!r} are expected, got path={root!r} with {got}. {way}. "
        "To leave out a folder, move it elsewhere."
    )


def _meant(absent: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Folders that may be meant by names that are spelt otherwise."""
    left, meant = {name.lower(): name for name in others}, dict[str, str]()
    for name in absent:
        for near in get_close_matches(name.lower(), left, n=1):
            meant[name] = left.pop(near)
    return meant


def _holds_files(listing: Listing) -> bool:
    return bool(listing.pictures or _not_listed(listing))


def _not_listed(listing: Listing) -> list[LeftOut]:
    """Files that a user may have meant, or meant before there was a choice of extensions."""
    return [each for each in left_out_of([listing]) if each.is_lost or each.reason == NOT_ASKED_FOR]


def _lost(without: Mapping[str, Listing], most: int = 8) -> str | None:
    files = {name: _not_listed(listing) for name, listing in without.items()}
    lost = [f"none in {name!r}, which holds {told(left_out)}" for name, left_out in files.items() if left_out]
    if not lost:
        return None
    more = [f"and in {len(lost) - most} more"] * (len(lost) > most)
    asked = any(each.reason == NOT_ASKED_FOR for left_out in files.values() for each in left_out)
    do = "Name their endings in extensions" if asked else "Install what reads the files"
    return (
        f"Pictures are expected in every class folder, got {'; '.join([*lost[:most], *more])}. {do}, or convert them; "
        "a folder that is no class belongs elsewhere."
    )


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(map(repr, names[:most]))}{more}"
