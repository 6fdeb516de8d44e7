"""Laws of the walk of folders: every file is listed or counted as left out, by whoever lists, and nothing twice."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from featx import load_image_folder
from featx.cli.outcomes import Console
from featx.cli.photos import list_labelled, list_photos
from featx.distributed.listing import list_items
from featx.images.walk import left_out_of

PICTURES = [".jpg", ".JPG", ".jpeg", ".jfif", ".mpo", ".png", ".avif", ".heic", ".HIF", ".jp2", ".tga", ".ppm"]
OTHERS = ["", ".txt", ".h5", ".fit", ".pdf", ".eps", ".mpg", ".ico", ".npy", ".gz", ".1234", ".Word", ".jpg~"]
HIDDEN = [".git", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX", "System Volume Information"]

stems = st.sampled_from(["1", "a b", "é", "名", "-x", "...y", "%41", "test"])
files = st.one_of(
    st.tuples(stems, st.sampled_from([*PICTURES, *OTHERS])).map("".join),
    st.sampled_from([".DS_Store", "._1.jpg", "Thumbs.db", "desktop.ini", ".jpg"]),
)
folders = st.one_of(st.sampled_from(["ants", "Bees 2", "ünï", "2020.01", "x.jpg"]), st.sampled_from(HIDDEN))


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
    return name[0] == "." or name in HIDDEN or name in ("Thumbs.db", "desktop.ini")


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
        photos, labels = list_labelled(str(root), None, console)
        assert (photos, console.left_out) == (bunch.data.tolist(), bunch.left_out)
        assert labels.tolist() == [bunch.target_names[i] for i in bunch.target]
