"""Laws of the walk of folders: every file is listed or counted as left out, by whoever lists, and nothing twice."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featx import load_image_folder
from featx.cli.outcomes import Broken, Console
from featx.cli.photos import list_photos
from featx.cli.sources import Folders
from featx.distributed.listing import list_items
from featx.images.formats import choose
from featx.images.walk import HIDDEN, Listing, left_out_of, told, walk

PICTURES = [".jpg", ".JPG", ".jpeg", ".jfif", ".mpo", ".png", ".avif", ".heic", ".HIF", ".jp2", ".tga", ".ppm"]
OTHERS = ["", ".txt", ".h5", ".fit", ".pdf", ".eps", ".mpg", ".ico", ".npy", ".gz", ".1234", ".Word", ".jpg~"]
OF_SYSTEMS = [".git", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX", "System Volume Information"]

stems = st.sampled_from(["1", "a b", "é", "名", "-x", "...y", "%41"])
files = st.one_of(
    st.tuples(stems, st.sampled_from([*PICTURES, *OTHERS])).map("".join),
    st.sampled_from([".DS_Store", "._1.jpg", "Thumbs.db", "desktop.ini", ".jpg"]),
)
folders = st.one_of(st.sampled_from(["ants", "Bees 2", "ünï", "2020.01", "x.jpg"]), st.sampled_from(OF_SYSTEMS))


def trees() -> st.SearchStrategy[dict]:
    """Folders as dicts; a file is None, a link the number of what it leads to."""
    leaves = st.dictionaries(files, st.one_of(st.none(), st.none(), st.integers(0, 99)), max_size=5)
    return st.recursive(
        leaves,
        lambda inner: st.builds(
            lambda here, below, links: {**here, **{f"to {n}": n for n in links}, **below},
            leaves,
            st.dictionaries(folders, inner, max_size=4),
            st.lists(st.integers(0, 99), max_size=2),
        ),
        max_leaves=10,
    )


def build(root: Path, tree: dict) -> None:
    links, places = [], [root.parent]

    def write(folder: Path, tree: dict) -> None:
        folder.mkdir(exist_ok=True)
        places.append(folder)
        for name, what in tree.items():
            if isinstance(what, dict):
                write(folder / name, what)
            elif what is None:
                (folder / name).touch()
                places.append(folder / name)
            else:
                links.append((folder / name, what))

    write(root, tree)
    write(
        root.parent / "elsewhere", {"far.jpg": None, "far.txt": None, "deep": {"deep.png": None}, ".far": {"x": None}}
    )
    for link, number in links:
        link.symlink_to([*places, Path("nowhere")][number % (len(places) + 1)])


class Model:
    """What is to be listed and counted below a folder, by nothing but the words of the documentation."""

    def __init__(self) -> None:
        self.listed: Counter[Path] = Counter()
        self.counted: Counter[str] = Counter()

    def walk(self, top: Path, base: Path) -> None:
        waiting, seen = [top.resolve()], set()
        while waiting:
            folder = waiting.pop()
            if folder in seen:
                continue
            seen.add(folder)
            for path in folder.iterdir():
                if not is_folder(path):
                    self.count(path)
                elif hidden(path.name):
                    self.hide(path)
                elif not path.is_symlink() or not any(
                    place.is_relative_to(path.resolve()) for place in (folder, top.resolve(), base.resolve())
                ):
                    waiting.append(path.resolve())

    def beside(self, root: Path) -> None:
        for path in root.iterdir():
            if not is_folder(path):
                self.counted[ending(path.name)] += 1
            elif hidden(path.name):
                self.hide(path)

    def count(self, path: Path) -> None:
        if is_picture(path.name):
            self.listed[path] += 1
        else:
            self.counted[ending(path.name)] += 1

    def hide(self, path: Path) -> None:
        if not path.is_symlink():
            for inner in path.iterdir():
                if is_folder(inner):
                    self.hide(inner)
                else:
                    self.counted[ending(inner.name)] += 1


def hidden(name: str) -> bool:
    return name[0] == "." or name in OF_SYSTEMS or name in ("Thumbs.db", "desktop.ini")


def is_picture(name: str) -> bool:
    return not hidden(name) and any(name.endswith(end) for end in PICTURES)


def ending(name: str) -> str:
    """For the names above alone."""
    known = [end for end in [*PICTURES, *OTHERS, ".db", ".ini"] if end not in ("", ".1234") and name.endswith(end)]
    return known[0].lower() if known and not (name[0] == "." and name.count(".") == 1) else ""


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def check(paths: list[str], left_out: list, model: Model) -> None:
    """Raise unless what was listed and counted is what a model says; folders that are named so are told apart."""
    assert len(set(paths)) == len(paths)
    named_so = [path for path in paths if os.path.isdir(path)]
    assert all(is_picture(Path(path).name) for path in named_so)
    files = [path for path in paths if path not in named_so]
    assert not any(file.startswith(f"{path}/") for file in files for path in named_so)
    found = Counter(Path(path).parent.resolve() / Path(path).name for path in files)
    assert found == model.listed
    counted = Counter[str]()
    for each in left_out:
        if each.ending != "/":
            counted[each.ending] += each.number
    assert counted == model.counted


@given(trees())
@settings(max_examples=150, deadline=None)
def test_every_file_is_listed_or_counted_by_all_who_list(tree: dict) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without pictures
        root = Path(folder).resolve() / "photos"
        build(root, tree | {"sure": {"sure.jpg": None}})
        model = Model()
        model.walk(root, root)
        console = Console(quiet=True)
        paths = list_photos([str(root)], console)
        check(paths, console.left_out, model)
        listing = list_items(root, None)
        assert (listing.pictures, left_out_of([listing])) == (paths, console.left_out)

        model = Model()
        model.beside(root)
        for path in root.iterdir():
            leads_back = path.is_symlink() and root.is_relative_to(path.resolve())
            if is_folder(path) and not hidden(path.name) and not leads_back:
                model.walk(path, root)
        bunch = load_image_folder(root, shuffle=False)
        check(bunch.data.tolist(), bunch.left_out, model)
        console = Console(quiet=True)
        photos = Folders(str(root), None).labelled(console)
        assert (photos.paths, console.left_out) == (bunch.data.tolist(), bunch.left_out)
        assert photos.y.tolist() == [bunch.target_names[i] for i in bunch.target]


# Patterns and files far away


KEPT = ["ants/1.jpg", "ants/deep/2.HEIC", "bees/3.avif"]
LEFT = {
    "ants/@eaDir/1.jpg/thumb.jpg": (".jpg", "hidden or of the system"),
    "ants/.x.jpg": (".jpg", "hidden or of the system"),
    "bees/Thumbs.db": (".db", "hidden or of the system"),
    "bees/a.txt": (".txt", "no picture format that can be read here"),
    "bees/a.PDF": (".pdf", "a document"),
}


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_folder_far_away_is_sorted_out_as_one_at_hand(tmp_path: Path) -> None:
    near = fill(tmp_path / "photos", *KEPT, *LEFT)
    memory = fsspec.filesystem("memory")
    memory.put(f"{near}/", "/walk", recursive=True)
    try:
        far = list_items("memory://walk", {})
        at_hand = list_items(near, None)
        assert [path.removeprefix(f"{near}/") for path in at_hand.pictures] == KEPT
        assert [path.removeprefix("memory://walk/") for path in far.pictures] == KEPT
        assert far.left_out == at_hand.left_out == Counter(LEFT.values())
    finally:
        memory.rm("/walk", recursive=True)


def test_pattern_finds_what_systems_keep_only_where_it_names_it(tmp_path: Path) -> None:
    root = fill(tmp_path, *KEPT, *LEFT)
    found = list_items(f"{root}/**/*.jpg", None)
    assert found.pictures == [f"{root}/ants/1.jpg"]
    assert found.left_out == {(".jpg", "hidden or of the system"): 1}
    assert list_items(f"{root}/*/@eaDir/**/*.jpg", None).pictures == [f"{root}/ants/@eaDir/1.jpg/thumb.jpg"]


def test_nothing_but_other_files_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"matches none, but: 1 \.nef \(no picture format that can be read here\)\.$"):
        list_items(fill(tmp_path, "a/1.nef"), None)


def test_many_kinds_are_told_in_one_short_line() -> None:
    counts = {(f".e{i}", "no"): i + 1 for i in range(9)} | {("/", "far"): 1, ("", HIDDEN): 3}
    listing = Listing(left_out=Counter(counts))
    assert told(left_out_of([listing])) == (
        "9 .e8, 8 .e7, 7 .e6, 6 .e5, 5 .e4, 4 .e3 and 6 with other endings (no), 1 folder (far), "
        "3 hidden or of the system"
    )


def test_folder_that_is_named_like_a_picture_is_listed_where_it_holds_none(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg/inside.png", "a/2.jpg/notes.txt")
    assert walk(str(tmp_path), choose()).pictures == [f"{tmp_path}/a/1.jpg/inside.png", f"{tmp_path}/a/2.jpg"]


def test_folder_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = f"{fill(tmp_path, 'a/1.jpg', 'a/closed/2.jpg')}/a/closed"
    scandir = os.scandir

    def refuse(folder: str) -> Any:
        if folder == closed:
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    for ask in (load_image_folder, lambda folder: list_items(folder, None)):
        with pytest.raises(PermissionError, match="a/closed"):
            ask(tmp_path)
    for ask in (lambda console: list_photos([str(tmp_path)], console), Folders(str(tmp_path), None).labelled):
        console = Console(quiet=True)
        ask(console)
        assert console.broken == [Broken(closed, "permission denied")]


def test_pattern_of_any_depth_finds_each_folder_once_whatever_the_links(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos", "ants/1.jpg", "ants/deep/2.jpg", "bees/3.jpg", "bees/.hidden/x.jpg")
    fill(tmp_path / "elsewhere", "4.jpg")
    for number in range(30):  # through which ways lead in numbers that no computer counts to
        (root / "ants" / f"loop{number}").symlink_to("..")
    (root / "bees" / "ants").symlink_to("../ants")
    (root / "bees" / "far").symlink_to(tmp_path / "elsewhere")
    found = list_items(f"{root}/**/*.jpg", None)
    names = ["ants/1.jpg", "ants/deep/2.jpg", "bees/3.jpg", "bees/far/4.jpg"]
    assert [path.removeprefix(f"{root}/") for path in found.pictures] == names
    assert found.pictures == walk(str(root), choose()).pictures
    assert list_items(f"{root}/**/ants/**/*.jpg", None).pictures == found.pictures[:2]
    assert list_items(f"{root}/bees/ants/*.jpg", None).pictures == [f"{root}/bees/ants/1.jpg"]


PATTERNS = [
    "**/*.jpg",
    "**",
    "**/",
    "a/**",
    "*/**/*.png",
    "**/b/**/*",
    "**/b/*.jpg",
    "*/*.jpg",
    "**/.h*/*",
    "[ab]/**/?.*",
]


@pytest.mark.parametrize("pattern", [*PATTERNS, "a**/*.jpg", "**b/*", "./**/*.jpg", "a//**//*.jpg", "no/**/*"])
@pytest.mark.parametrize("absolute", [False, True])
def test_pattern_finds_what_glob_finds_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, absolute: bool
) -> None:
    names = [
        "1.jpg",
        "a/2.jpg",
        "a/b/3.jpg",
        "b/4.png",
        "b/c/b/5.jpg",
        ".h/6.jpg",
        "a/.h/7.jpg",
        "a/[b]/8.jpg",
        "a/.9.jpg",
    ]
    fill(tmp_path / "in [x]", *names)
    monkeypatch.chdir(tmp_path / "in [x]")
    asked = f"{glob.escape(str(tmp_path))}/in [[]x]/{pattern}" if absolute else pattern
    expected = sorted({path for path in glob.glob(asked, recursive=True) if not os.path.isdir(path)})
    if expected:
        assert sorted({*map(os.path.normpath, list_items(asked, None).pictures)}) == sorted(
            {*map(os.path.normpath, expected)}
        )
    else:
        with pytest.raises(ValueError, match="At least one file"):
            list_items(asked, None)
