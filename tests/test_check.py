"""``featx check``: each kind of trouble is found, in every layout of folders, and nothing is changed."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from commands import runner
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode

from featx.cli.commands import featx
from featx.cli.findings import Findings, Photo
from featx.cli.outcomes import Broken
from featx.images.items import PathItem
from featx.images.walk import LeftOut

RNG = np.random.default_rng(0)


def run(*arguments: object, code: int = 0) -> Result:
    result = runner().invoke(featx, ["check", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(RNG.integers(0, 256, (12, 12, 3), dtype=np.uint8), "JPEG"))


def fill(folder: Path, classes: str = "ab", n: int = 3) -> Path:
    put(*(folder / name / f"{i}.jpg" for name in classes for i in range(n)))
    return folder


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


# Each kind, alone: what makes it in a data set with nothing wrong, and what is said of it.
_KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "unreadable": (lambda root: cut_short(root / "train/a/0.jpg"), "Unreadable: 1"),
    "missing": (lambda root: (root / "train/a/gone.jpg").symlink_to("nowhere"), "Unreadable: 1"),
    "copy": (lambda root: shutil.copy(root / "val/b/1.jpg", root / "val/b/x.png"), "Exact copies: 2 files of"),
    "linked": (lambda root: (root / "val/b/x.jpg").symlink_to("1.jpg"), "Exact copies: 2 files of"),
    "classes": (
        lambda root: shutil.copy(root / "val/b/1.jpg", root / "val/a/x.jpg"),
        "Under several classes: 2 files of",
    ),
    "splits": (lambda root: shutil.copy(root / "val/b/1.jpg", root / "train/b/x.jpg"), "In several splits: 2 files of"),
    "left out": (lambda root: (root / "val/b/x.svg").touch(), "Left out: 1 .svg (no picture format"),
    "beside": (lambda root: put(root / "val/x.jpg"), "Left out: 1 .jpg (pictures beside the class folders)"),
    "few": (lambda root: (root / "val/b/1.jpg").unlink(), "Fewer than 3 photos:"),
    "none": (lambda root: shutil.rmtree(root / "val/b"), "Fewer than 3 photos:"),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_each_kind_of_trouble_is_told_and_with_strict_is_no_success(tmp_path: Path, kind: str) -> None:
    splits = [fill(tmp_path / split) for split in ("train", "val")]
    assert run(*splits, "--fewest", 3, "--strict").stdout == "12 photos, 2 classes\nNothing is wrong.\n"
    make, words = _KINDS[kind]
    make(tmp_path)
    told = run(*splits, "--fewest", 3).stdout
    assert words in told
    assert "Nothing is wrong" not in told
    assert run(*splits, "--fewest", 3, "--strict", code=1).stdout == told


def test_what_is_hidden_is_told_and_is_nothing_wrong(tmp_path: Path) -> None:
    fill(tmp_path)
    put(tmp_path / "a" / ".hidden.jpg", tmp_path / "a" / "@eaDir" / "0.jpg" / "SYNOPHOTO_THUMB_M.jpg")
    told = run(tmp_path, "--fewest", 0, "--strict").stdout
    assert "Left out: 2 hidden or of the system" in told
    assert "Nothing is wrong." in told


def test_photos_are_decoded_in_full_where_their_bytes_are_there(tmp_path: Path) -> None:
    for i in range(2):
        put(fill(tmp_path) / "a" / f"cut {i}.jpg")
    cut_short(tmp_path / "a" / "cut 0.jpg")
    shutil.copy(tmp_path / "a" / "cut 0.jpg", tmp_path / "a" / "cut 1.jpg")
    result = run(tmp_path, "--fewest", 0)
    assert "Unreadable: 2" in result.stdout
    assert "copies" not in result.stdout  # of nothing to be seen
    assert "cut 0.jpg: truncated JPEG" in result.stderr


def test_photos_are_read_as_other_commands_read_them(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.tif").write_bytes(encode(RNG.random((12, 12), dtype=np.float32) * 7, "TIFF"))
    assert "Unreadable: 2" in run(tmp_path).stdout
    assert "Nothing is wrong." in run(tmp_path, "--pixel-range", "0,7", "--strict").stdout


def put_deep(path: Path, top: int) -> None:
    path.write_bytes(encode(np.linspace(0, top, 144, dtype=np.uint16).reshape(12, 12), "PNG"))


@pytest.mark.filterwarnings("always:.*more than 8 bits")
def test_photos_far_too_dark_are_told_and_wrong_whatever_lies_beside_them(tmp_path: Path) -> None:
    put_deep(tmp_path / "0.png", 4095)
    alone = run(tmp_path, "--strict", code=1)
    assert f"Little of the range used: 1 photo, such as {tmp_path / '0.png'}\n" in alone.stdout
    assert "Warning: 1 of 1 images with more than 8 bits uses" in alone.stderr
    assert "--pixel-range 0,4095" in alone.stderr
    assert not run(tmp_path, "--pixel-range", "0,4095", "--strict").stderr
    put_deep(tmp_path / "1.png", 65535)
    put(tmp_path / "2.jpg")
    beside = json.loads(run(tmp_path, "--json", "--strict", code=1).stdout)
    assert (beside["little_range"], beside["n_problems"]) == ([str(tmp_path / "0.png")], 1)


@pytest.mark.filterwarnings("always:.*beyond pixel_range")
def test_photos_beyond_the_range_are_told_and_wrong(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, top in (("0.png", 4095), ("1.png", 16383)):
        put_deep(photos / name, top)
    found = run(photos, "--pixel-range", "0,4095", "--strict", "-o", tmp_path / "found.csv", code=1)
    assert f"Values beyond the range: 1 photo, such as {photos / '1.png'}\n" in found.stdout
    assert "1 image has values from 0 to 16383, beyond --pixel-range 0,4095," in found.stderr
    assert "such as --pixel-range 0,16383" in found.stderr
    with open(tmp_path / "found.csv", newline="") as file:
        assert [*csv.reader(file)][1:] == [[str(photos / "1.png"), "values beyond the range", ""]]
    run(photos, "--pixel-range", "0,16383", "--strict")


def test_copies_are_counted_as_files_and_as_the_photos_that_they_are_of(tmp_path: Path) -> None:
    fill(tmp_path)
    for name in ("a/0 again.jpg", "a/0 twice.jpg"):
        shutil.copy(tmp_path / "a/0.jpg", tmp_path / name)
    shutil.copy(tmp_path / "b/0.jpg", tmp_path / "b/0 again.jpg")
    told = run(tmp_path, "--fewest", 0).stdout
    assert "Exact copies: 5 files of 2 photos, such as" in told
    assert "classes:" not in told


def test_nothing_is_changed_and_nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))
    fill(tmp_path / "photos")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run(tmp_path / "photos")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_compared_is_what_was_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, n=2)
    read, seen = PathItem._read, Counter[str]()

    def counting(item: PathItem) -> bytes:
        seen[item.source] += 1
        return read(item)

    monkeypatch.setattr(PathItem, "_read", counting)
    run(tmp_path)
    assert [*seen.values()] == [1] * 4


def test_one_json_object_holds_it_all(tmp_path: Path) -> None:
    root = fill(tmp_path)
    shutil.copy(root / "a/0.jpg", root / "b/x.jpg")
    cut_short(root / "a/1.jpg")
    (root / "a/notes.txt").touch()
    found = json.loads(run(root, "--fewest", 3, "--json", "--strict", code=1).stdout)
    pair = [str(root / "a/0.jpg"), str(root / "b/x.jpg")]
    assert (found["copies"], found["under_classes"], found["in_splits"]) == ([pair], [pair], [])
    assert found["broken"] == [{"path": str(root / "a/1.jpg"), "reason": "truncated JPEG"}]
    assert [(each["ending"], each["number"]) for each in found["left_out"]] == [(".txt", 1)]
    assert found["few"] == [{"folder": str(root), "class": "a", "n_photos": 2}]
    assert [each["n_photos"] for each in found["classes"]] == [2, 4]
    assert (found["n_photos"], found["fewest"]) == (7, 3)


def test_table_names_every_photo_with_its_problems(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos")
    shutil.copy(root / "a/0.jpg", root / "b/x.jpg")
    cut_short(root / "a/1.jpg")
    run(root, "--fewest", 3, "-o", tmp_path / "found.csv")
    with open(tmp_path / "found.csv", newline="") as file:
        rows = [(os.path.relpath(row["path"], root), row["problem"], row["detail"]) for row in csv.DictReader(file)]
    assert rows == [
        ("a/1.jpg", "unreadable", "truncated JPEG"),
        ("b/x.jpg", "exact copy", str(root / "a/0.jpg")),
        ("a/0.jpg", "under several classes", "a, b"),
        ("b/x.jpg", "under several classes", "a, b"),
        ("a", "fewer than 3 photos", "2"),
    ]


# Layouts


@pytest.mark.parametrize(
    ("files", "arguments", "expected"),
    [
        (["1.jpg", "2.jpg"], ["."], []),
        (["a/1.jpg", "b/c/2.jpg"], ["."], [(".", "a"), (".", "b")]),
        (["train2017/a/1.jpg", "Val images/a/2.jpg"], ["."], [("Val images", "a"), ("train2017", "a")]),
        (["train/a/1.jpg", "test/2.jpg"], ["."], [("train", "a")]),
        (["train/1.jpg", "val/2.jpg"], ["."], []),
        (["test/1.jpg", "control/2.jpg"], ["."], [(".", "control"), (".", "test")]),
        (["train/a/1.jpg", "control/2.jpg"], ["."], [("train", "a"), (".", "control")]),
        (["x/a/1.jpg", "y/a/2.jpg"], ["x", "y"], [("x", "a"), ("y", "a")]),
        (["x/a/1.jpg", "y/train/a/2.jpg"], ["x", "y"], [("x", "a"), ("y/train", "a")]),
        (["a/1.jpg", "a/train/2.jpg"], [".", "./a", "a"], [(".", "a")]),
        (["caf\u00e9/1.jpg", "train/cafe\u0301/2.jpg"], ["train", "."], [("train", "caf\u00e9"), (".", "caf\u00e9")]),
    ],
    ids=str,
)
def test_layout_is_seen_in_the_names_of_folders(
    tmp_path: Path, files: list[str], arguments: list[str], expected: list[tuple[str, str]]
) -> None:
    put(*(tmp_path / name for name in files))
    folders = [tmp_path / argument for argument in arguments]
    found = json.loads(run(*folders, "--json").stdout)
    assert found["n_photos"] == len(files)
    holding = [(each["folder"], each["class"]) for each in found["classes"] if each["n_photos"]]
    assert sorted(holding) == sorted((str(tmp_path / part), name) for part, name in expected)


def test_each_kind_takes_one_line_whatever_files_are_called(tmp_path: Path) -> None:
    names = [b"new\nline", b"no \xff text", b'a, "b"']
    put(*(tmp_path / "a" / os.fsdecode(name + b".jpg") for name in names))
    shutil.copytree(tmp_path / "a", tmp_path / "new\nclass")
    kinds = [line.partition(":")[0] for line in run(tmp_path, "-o", tmp_path / "found.csv").stdout.splitlines()]
    expected = ["6 photos, 2 classes", "Exact copies", "Under several classes", "Fewer than 10 photos", "Written"]
    assert kinds == expected
    with open(tmp_path / "found.csv", newline="", encoding="utf-8") as file:
        assert len([*csv.reader(file)]) == 1 + 3 + 6 + 2


def test_folder_without_photos_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    result = run(tmp_path, code=1)
    assert "holds no pictures, but: 1 .txt" in result.stderr
    assert run(tmp_path / "gone", code=2).stdout == ""


def test_interrupt_leaves_no_thread_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, n=20)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("featx.cli.check.tqdm.update", interrupt)
    run(tmp_path, code=130)


# What fit and search make of the folder


def fit_says(*words: object, code: int = 0) -> str:
    options = ["--backbone", "featx_micro", "--layers", "-1", "--no-cache"]
    result = runner().invoke(featx, ["fit", *map(str, words), *options])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stderr


@pytest.mark.parametrize("splits", [("train", "val"), ("val2017",), ("test", "control")])
def test_folder_that_fit_refuses_is_told_in_the_words_of_fit(tmp_path: Path, splits: tuple[str, ...]) -> None:
    root = tmp_path / "two words"
    for split in splits:
        fill(root / split)
    (line,) = fit_says(root, "-o", tmp_path / "m.joblib", code=1).splitlines()
    said = line.removeprefix("Error: ")
    told = run(root, "--fewest", 0).stdout.splitlines()
    assert f"Refused by fit and search: {said}" in told
    assert told[-1] == "Nothing else is wrong."
    run(root, "--fewest", 0, "--strict")
    found = json.loads(run(root, "--fewest", 0, "--json", "-o", tmp_path / "found.csv").stdout)
    assert (found["refused"], found["n_problems"]) == ([{"folder": str(root), "reason": said}], 0)
    with open(tmp_path / "found.csv", newline="") as file:
        assert [*csv.reader(file)][1:] == [[str(root), "refused by fit and search", said]]
    words = shlex.split(said.partition("name them: ")[2])
    fit_says(*words, "-o", tmp_path / "m.joblib", code=int(len(splits) == 1))  # of one class nothing is learnt
    run(*(root / split for split in splits if split != "control"), "--fewest", 0, "--strict")


def test_photos_without_class_folders_are_told_what_fit_needs_and_are_nothing_wrong(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    put(root / "1.jpg", root / "2.jpg")
    (root / "empty").mkdir()
    told = run(root, "--strict").stdout.splitlines()
    assert f"No class folders: {root} (fit and search need one subfolder of photos per class)" in told
    assert told[-1] == "Nothing is wrong."
    assert json.loads(run(root, "--json").stdout)["without_class_folders"] == [str(root)]
    assert "No class folders" not in run(fill(tmp_path / "classes")).stdout


# Whatever there is


_PLACES = st.tuples(
    st.sampled_from(["train", "val", "test"]), st.sampled_from(["", "a", "b"]), st.none() | st.integers(0, 4)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_PLACES, max_size=25), st.integers(0, 4))
def test_findings_are_those_of_a_look_at_every_pair(places: list[tuple[str, str, int | None]], fewest: int) -> None:
    photos = [
        Photo(str(i), part, name, None if content is None else bytes([content]))
        for i, (part, name, content) in enumerate(places)
    ]
    broken = [Broken(photo.path, "cut") for photo in photos if photo.digest is None]
    folders = sorted({(photo.part, photo.name) for photo in photos})
    found = Findings(photos, folders, broken, [LeftOut(".txt", "unknown", 2)], fewest)

    def pairs(groups: list[list[Photo]], differ: Callable[[Photo, Photo], object]) -> set[tuple[str, str]]:
        return {(a.path, b.path) for group in groups for a, b in combinations(group, 2) if differ(a, b)}

    same = [(a, b) for a, b in combinations(photos, 2) if a.digest is not None and a.digest == b.digest]
    differences: dict[str, Callable[[Photo, Photo], Any]] = {
        "copies": lambda a, b: True,
        "under_classes": lambda a, b: a.name and b.name and a.name != b.name,
        "in_splits": lambda a, b: a.part != b.part,
    }
    for kind, differ in differences.items():
        assert pairs(getattr(found, kind), differ) == {(a.path, b.path) for a, b in same if differ(a, b)}
    counts = Counter((part, name) for part, name, content in places if name and content is not None)
    named = {part for part, name in folders if name}
    for each in found.classes:
        assert each.count == counts[each.part, each.name]
    assert {(each.part, each.name) for each in found.classes} == {
        (part, name) for part in named for _, name in folders if name
    }
    assert {(each.part, each.name) for each in found.few} == {
        (each.part, each.name) for each in found.classes if each.count < fewest
    }
    told = "\n".join(found.lines())
    assert ("Exact copies" in told) == bool(same)
    assert ("Unreadable" in told) == bool(broken)
    json.dumps(found.as_dict())


def test_class_folders_that_are_not_there_are_missed_in_splits_alone(tmp_path: Path) -> None:
    for split in ("train", "val"):
        fill(tmp_path / split)
    fill(tmp_path, "u")  # beside the splits
    assert "Fewer than" not in run(tmp_path, "--fewest", 3).stdout
    shutil.rmtree(tmp_path / "val" / "b")
    assert "Fewer than 3 photos: val/b (0)" in run(tmp_path, "--fewest", 3).stdout.replace(f"{tmp_path}/", "")


def test_folders_whose_names_look_alike_are_two(tmp_path: Path) -> None:
    fill(tmp_path / "caf\u00e9", "x")
    fill(tmp_path / "cafe\u0301", "x")
    assert run(tmp_path).stdout.startswith("6 photos, 2 classes\n")


def test_endings_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    fill(tmp_path)
    for name in (b"notes.\xff", b"notes.\x1b[2J"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/" + name)).touch()
    told = run(tmp_path).stdout
    assert r"1 .\udcff" in told
    assert r"1 .\x1b[2j" in told
    told.encode()
