"""The one walk of folders: which files are pictures, and what is left out, counted."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from featx.images.formats import NOT_ASKED_FOR, Choice, ending_of

HIDDEN = "hidden or of the system"
CIRCLE = "a link to a folder that it lies in"
AGAIN = "a link to a folder that is listed already"
BESIDE = "pictures beside the class folders"
#: In the place of an ending.
FOLDER = "/"

# What systems and programs put among a user's files, in lower case: waste bins, thumbnails, snapshots, indexes. Names
# that begin with a dot are left out anyhow.
_OF_THE_SYSTEM = frozenset(
    {
        *("@eadir", "@tmp", "#recycle", "#snapshot"),  # Synology
        *("@recycle", "@recently-snapshot", "@__thumb"),  # QNAP
        *("$recycle.bin", "system volume information", "found.000"),  # Windows; "recycled" is a class of waste, too
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),
        *("__macosx", "network trash folder", "temporary items", "icon\r"),  # macOS
        *("lost+found", "~snapshot"),  # Linux, NetApp
    }
)


class LeftOut(NamedTuple):
    """Files or folders that are not listed.

    Attributes
    ----------
    ending : str
        What the names end with, in lower case, such as ``".txt"``; empty without an ending, ``"/"`` for folders.
    reason : str
    number : int
    """

    ending: str
    reason: str
    number: int

    @property
    def is_lost(self) -> bool:
        """Whether these are files that a user may have meant."""
        return self.ending != FOLDER and self.reason not in (HIDDEN, NOT_ASKED_FOR)


@dataclass
class Listing:
    """What a walk found, by name; no file is opened.

    Attributes
    ----------
    pictures : list of str
        Sorted. A folder that is named like a picture and holds none is one of them, so that whoever reads it says
        what it is.
    left_out : Counter of (str, str)
        Number of other files, and of links to folders that are not followed, by ending and reason.
    closed : list of OSError
        Folders that cannot be listed.
    """

    pictures: list[str] = field(default_factory=list)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    closed: list[OSError] = field(default_factory=list)

    def leave_out(self, name: str, reason: str) -> None:
        """Count a file."""
        self.left_out[ending_of(name), reason] += 1

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        """What a folder holds, sorted by name, without what is hidden or of the system, which is counted."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self.closed.append(error)
            return []
        hidden = [entry for entry in entries if is_hidden(entry.name)]
        for entry in hidden:
            self._count_hidden(entry)
        return [entry for entry in entries if not is_hidden(entry.name)] if hidden else entries

    def _count_hidden(self, hidden: os.DirEntry[str]) -> None:
        if not is_folder(hidden):
            self.leave_out(hidden.name, HIDDEN)
        elif is_link(hidden):
            self.left_out[FOLDER, HIDDEN] += 1
        else:
            for name in self._names_below(hidden.path):
                self.leave_out(name, HIDDEN)

    def _names_below(self, folder: str) -> Iterator[str]:
        def note(_: OSError) -> None:
            self.left_out[FOLDER, HIDDEN] += 1

        for _, _, names in os.walk(folder, onerror=note):
            yield from names


@dataclass(frozen=True)
class _Folder:
    """A folder to list.

    Attributes
    ----------
    path : str
        By which its pictures are named.
    real : str
        Where it is.
    link : str or None
        Where the link lies by which it was reached.
    """

    path: str
    real: str
    link: str | None = None

    def below(self, entry: os.DirEntry[str]) -> _Folder:
        """A folder in it."""
        if is_link(entry):
            return _Folder(entry.path, os.path.realpath(entry.path), self.real)
        return _Folder(entry.path, os.path.join(self.real, entry.name))


def walk(top: str, why_not: Choice, above: tuple[str, ...] = ()) -> Listing:
    """Pictures in a folder at any depth.

    Links to folders are followed after everything else, each folder is listed once, and a link to a folder in which
    the link itself lies is left out. A link to a file is a file of its own.

    Parameters
    ----------
    top : str
        Whatever its name.
    why_not : callable
        As of :func:`~featx.images.formats.choose`.
    above : tuple of str
        Real paths of folders that links must not lead back to.
    """
    first = _Folder(top, os.path.realpath(top))
    walker = _Walker(why_not, (first.real, *above))
    walker.folders.append(first)
    while walker.folders or walker.links:
        walker.enter(walker.folders.pop() if walker.folders else walker.links.popleft())
    found = walker.found
    found.pictures.sort()
    found.pictures = sorted([*found.pictures, *walker.named_so_in_vain()])
    return found


@dataclass
class _Walker:
    """Folders that are still to be listed, and what the others held."""

    why_not: Choice
    above: tuple[str, ...]
    found: Listing = field(default_factory=Listing)
    folders: list[_Folder] = field(default_factory=list)
    links: deque[_Folder] = field(default_factory=deque)
    _seen: set[str] = field(default_factory=set)
    _named_so: list[str] = field(default_factory=list)

    def enter(self, folder: _Folder) -> None:
        """List a folder, unless it was listed already or holds the link that leads to it."""
        if folder.link is not None and any(_lies_in(place, folder.real) for place in (folder.link, *self.above)):
            self.found.left_out[FOLDER, CIRCLE] += 1
        elif folder.real in self._seen:
            self.found.left_out[FOLDER, AGAIN] += 1
        else:
            if self._seen and self._is_named_so(folder.path):  # the first may have any name
                self._named_so.append(folder.path)
            self._seen.add(folder.real)
            for entry in self.found.entries(folder.path):
                self._take(entry, folder)

    def _is_named_so(self, path: str) -> bool:
        name = os.path.basename(path)
        return bool(ending_of(name)) and self.why_not(name) is None

    def _take(self, entry: os.DirEntry[str], folder: _Folder) -> None:
        if is_folder(entry):
            (self.links if is_link(entry) else self.folders).append(folder.below(entry))
        elif (reason := self.why_not(entry.name)) is None:
            self.found.pictures.append(entry.path)
        else:
            self.found.leave_out(entry.name, reason)

    def named_so_in_vain(self) -> list[str]:
        """Folders that are named like a picture and hold none."""
        closed = {os.fspath(error.filename) for error in self.found.closed}
        return [path for path in self._named_so if path not in closed and not _holds_any(path, self.found.pictures)]


def folders_below(tops: Iterable[str]) -> list[str]:
    """Folders and those at any depth in them but hidden ones, each real one once; links are followed at the end.

    Parameters
    ----------
    tops : iterable of str
        Names that joins can begin with, such as "" for the folder in which the process is.
    """
    folders, links, found = list[_Folder](), deque[_Folder](), dict[str, str]()
    for top in tops:
        folder = _Folder(top, os.path.realpath(top or os.curdir))
        (links if os.path.islink(top.rstrip(os.sep)) else folders).append(folder)
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        leads_back = folder.link is not None and _lies_in(folder.link, folder.real)
        if folder.real not in found and not leads_back:
            found[folder.real] = folder.path
            for entry in _entries_of(folder.path):
                if is_folder(entry) and not entry.name.startswith("."):
                    below = replace(folder.below(entry), path=os.path.join(folder.path, entry.name))
                    (links if is_link(entry) else folders).append(below)
    return [*found.values()]


def _entries_of(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder or os.curdir) as entries:
            return [*entries]
    except OSError:  # what a pattern does not find
        return []


def walk_classes(root: str, why_not: Choice) -> tuple[dict[str, Listing], Listing]:
    """Pictures of each class folder, by its name in their order, and what lies beside these folders."""
    beside, classes = Listing(), dict[str, Listing]()
    place = os.path.realpath(root)
    for entry in beside.entries(root):
        if not is_folder(entry):
            beside.leave_out(entry.name, why_not(entry.name) or BESIDE)
        elif is_link(entry) and _lies_in(place, os.path.realpath(entry.path)):
            beside.left_out[FOLDER, CIRCLE] += 1
        else:
            classes[entry.name] = walk(entry.path, why_not, (place,))
    return classes, beside


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out with all it holds: hidden by a dot, or put there by a system."""
    return name.startswith(".") or is_of_the_system(name)


def is_of_the_system(name: str) -> bool:
    """Whether systems or programs give this name to what they put among a user's files."""
    return name.lower() in _OF_THE_SYSTEM


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def is_link(entry: os.DirEntry[str]) -> bool:
    """Whether an entry leads elsewhere."""
    is_junction = getattr(entry, "is_junction", None)  # of Windows, from Python 3.12 on
    return entry.is_symlink() or (is_junction is not None and is_junction())


def left_out_of(listings: Iterable[Listing]) -> list[LeftOut]:
    """What several listings left out, the most frequent first."""
    counts = sum((listing.left_out for listing in listings), Counter[tuple[str, str]]())
    found = [LeftOut(ending, reason, count) for (ending, reason), count in counts.items()]
    return sorted(found, key=lambda each: (-each.number, each))


def told(left_out: Sequence[LeftOut], most: int = 6) -> str:
    """What was left out, in words: ``8 .heic (needs ...), 2 .csv and 1 .txt (no picture ...), 3 hidden or ...``."""
    reasons = dict.fromkeys(each.reason for each in left_out if each.reason != HIDDEN)
    words = [f"{_counted(left_out, reason, most)} ({reason})" for reason in reasons]
    hidden = sum(each.number for each in left_out if each.reason == HIDDEN)
    return ", ".join([*words, *[f"{hidden} {HIDDEN}"] * (hidden > 0)])


def _counted(left_out: Sequence[LeftOut], reason: str, most: int) -> str:
    kinds = [each for each in left_out if each.reason == reason]
    words = [f"{each.number} {_named(each)}" for each in kinds[:most]]
    if rest := sum(each.number for each in kinds[most:]):
        words.append(f"{rest} with other endings")
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _named(each: LeftOut) -> str:
    folders = "folder" if each.number == 1 else "folders"
    ending = "".join(char if char.isprintable() else repr(char)[1:-1] for char in each.ending)
    return {"": "without an ending", FOLDER: folders}.get(ending, ending)


def _lies_in(place: str, folder: str) -> bool:
    return os.path.join(place, "").startswith(os.path.join(folder, ""))


def _holds_any(folder: str, paths: list[str]) -> bool:
    inside = os.path.join(folder, "")
    first = bisect_left(paths, inside)
    return first < len(paths) and paths[first].startswith(inside)
