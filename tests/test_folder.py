"""Laws of `load_image_folder`: what a folder holds, in one order, without opening a file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from featx import images
from featx.images import formats, heif, load_image_folder


@pytest.fixture
def photos(tmp_path):
    for name in (
        "bees/2.jpg",
        "bees/10.PNG",
        "bees/deep/er/3.webp",
        "ants/1.jpeg",
        "ants/notes.txt",
        "ants/.hidden.jpg",
        "ants/.thumbnails/1.jpg",
        ".git/x.jpg",
        "loose.jpg",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"not an image")
    (tmp_path / "empty").mkdir()
    return tmp_path


def relative(bunch, root):
    return [os.path.relpath(path, root) for path in bunch.data]


def test_folder_lists_pictures_sorted_by_class_and_path(photos):
    bunch = load_image_folder(photos, shuffle=False)
    assert relative(bunch, photos) == ["ants/1.jpeg", "bees/10.PNG", "bees/2.jpg", "bees/deep/er/3.webp"]
    assert bunch.target_names == ["ants", "bees"]
    assert bunch.target.tolist() == [0, 1, 1, 1]


def test_folder_gives_paths_as_str_and_classes_as_int(photos):
    bunch = load_image_folder(str(photos))
    assert bunch.data.dtype == object
    assert all(type(path) is str for path in bunch.data)
    assert bunch.target.dtype.kind == "i"


def test_folder_takes_other_extensions_alone(photos):
    for extensions in ((".TXT",), ".txt"):
        with pytest.warns(UserWarning, match="none in 'bees', which holds 1 .jpg, 1 .png and 1 .webp .not among ext"):
            bunch = load_image_folder(photos, shuffle=False, extensions=extensions)
        assert relative(bunch, photos) == ["ants/notes.txt"]


def test_folder_shuffle_keeps_pairs_and_obeys_random_state(photos):
    plain, mixed = load_image_folder(photos, shuffle=False), load_image_folder(photos, random_state=1)
    assert dict(zip(plain.data, plain.target, strict=True)) == dict(zip(mixed.data, mixed.target, strict=True))
    assert mixed.data.tolist() != plain.data.tolist()
    again = load_image_folder(photos, random_state=np.random.RandomState(1))
    assert mixed.data.tolist() == again.data.tolist()
    assert load_image_folder(photos).data.tolist() == load_image_folder(photos).data.tolist()


def test_folder_opens_no_file(photos, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("opened")

    monkeypatch.setattr("builtins.open", fail)
    assert len(load_image_folder(photos).data) == 4


def test_folder_follows_a_linked_class_folder(photos, tmp_path):
    (tmp_path / "wasps").symlink_to(photos / "bees", target_is_directory=True)
    assert load_image_folder(photos).target_names == ["ants", "bees", "wasps"]


def test_folder_errors_say_what_was_looked_for(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got path='.*nowhere'"):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match=r"got path='.*loose.jpg', a file"):
        load_image_folder(photos / "loose.jpg")
    with pytest.raises(ValueError, match=r"in whose subfolders is none; there are 1 \.jpeg \(pictures beside"):
        load_image_folder(photos / "ants")
    with pytest.raises(ValueError, match=r"got path='.*empty', which holds no files\. Put each class's"):
        load_image_folder(photos / "empty")


def test_folder_is_public():
    assert images.load_image_folder is load_image_folder


# What counts as a photo


@pytest.mark.parametrize("ending", [".jfif", ".mpo", ".avif", ".heic", ".HIF", ".jp2", ".Tga", ".ppm", ".apng", ".qoi"])
def test_whatever_can_be_decoded_is_listed(tmp_path, ending):
    fill(tmp_path, "ants/1.jpg", f"bees/1{ending}")
    assert load_image_folder(tmp_path).target_names == ["ants", "bees"]


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (".h5", "no pixels"),
        (".emf", "drawing"),
        (".ps", "drawing"),
        (".pdf", "document"),
        (".mpeg", "film"),
        (".ico", "icon"),
        (".fits", "other kinds of file"),
        (".pcd", "other kinds of file"),
        (".nef", "no picture format"),
        (".txt", "no picture format"),
        ("", "no picture format"),
    ],
)
def test_what_is_no_photo_is_counted_with_its_reason(tmp_path, ending, reason):
    fill(tmp_path, "ants/1.jpg", f"ants/1{ending}", f"ants/deep/2{ending.upper()}")
    (left_out,) = load_image_folder(tmp_path).left_out
    assert (left_out.ending, left_out.number) == (ending, 2)
    assert reason in left_out.reason
    assert len(load_image_folder(tmp_path, extensions=(".jpg", ending)).data) == 3


def test_every_exclusion_is_of_pillows_registry():
    Image.init()
    assert {*Image.EXTENSION, ".iim"} >= {end for ends in formats._NO_PHOTOS.values() for end in ends}


def test_numbers_and_sentences_are_no_endings(tmp_path):
    fill(tmp_path, "a/1.jpg", *(f"a/1.2.840.{i}" for i in range(9)), "a/Minutes of the meeting. With all the others")
    assert [each[::2] for each in load_image_folder(tmp_path).left_out] == [("", 10)]


def test_listing_loads_no_torch_and_for_everyday_formats_no_pillow(tmp_path):
    fill(tmp_path, "ants/1.jpg", "ants/.DS_Store")
    code = f"""
import sys
from featx import load_image_folder
assert len(load_image_folder({str(tmp_path)!r}).data) == 1
assert "PIL" not in sys.modules
open({str(tmp_path / "ants" / "2.heic")!r}, "x").close()
assert len(load_image_folder({str(tmp_path)!r}).data) == 2
assert not {{"torch", "torchvision"}} & {{*sys.modules}}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Formats that need a plugin


@pytest.fixture
def without_heif(monkeypatch):
    """As where pillow-heif is not installed."""
    others = {end: kind for end, kind in Image.EXTENSION.items() if kind != "HEIF"}
    monkeypatch.setattr(Image, "EXTENSION", others)
    monkeypatch.setattr(heif, "register", lambda: False)


def test_class_that_cannot_be_read_here_is_warned_of(tmp_path, without_heif):
    fill(tmp_path, "ants/1.jpg", "ants/2.heic", "bees/1.heic", "bees/2.HEIC", "wasps/1.png")
    with pytest.warns(UserWarning, match=r"'bees', which holds 2 \.heic \(needs pip install \"featx\[heic\]\"\)"):
        bunch = load_image_folder(tmp_path)
    assert bunch.target_names == ["ants", "wasps"]
    assert (".heic", 'needs pip install "featx[heic]"', 3) in bunch.left_out


def test_classes_of_heic_alone_are_told_what_to_install(tmp_path, without_heif):
    fill(tmp_path, "ants/1.heic", "bees/1.heif", "bees/2.hif")
    message = r'there are 1 \.heic, 1 \.heif and 1 \.hif \(needs pip install "featx\[heic\]"\)\. Install what they need'
    with pytest.raises(ValueError, match=message):
        load_image_folder(tmp_path)


def test_classes_of_other_files_alone_can_be_taken_as_they_are(tmp_path):
    fill(tmp_path, "ants/1.nef", "bees/1.nef")
    with pytest.raises(
        ValueError, match=r"there are 2 \.nef .*\. Convert them, or pass extensions to take them as they"
    ):
        load_image_folder(tmp_path)
    assert load_image_folder(tmp_path, extensions=".nef").target_names == ["ants", "bees"]


def test_class_of_other_files_is_warned_of_and_an_empty_one_named(tmp_path):
    fill(tmp_path, "ants/1.jpg", "bees/1.nef", "bees/deep/2.nef", "mac/.DS_Store")
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning, match=r"got none in 'bees', which holds 2 \.nef \(no picture format") as warned:
        bunch = load_image_folder(tmp_path)
    assert len(warned) == 1
    assert ("/", "no picture of 'bees', 'empty', 'mac'", 3) in bunch.left_out


# Hidden and of the system


@pytest.mark.parametrize(
    "folder",
    [
        *("@eaDir/1.jpg", "#recycle", "$RECYCLE.BIN", "$Recycle.Bin/S-1-5-21", "lost+found", "__MACOSX", "@Recycle"),
        *("@__thumb", ".thumbnails", ".ipynb_checkpoints", ".AppleDouble"),
    ],
)
@pytest.mark.parametrize("place", ["", "ants/", "ants/deep/"])
def test_thumbnails_and_waste_of_systems_are_left_out(tmp_path, folder, place):
    fill(tmp_path, "ants/1.jpg", "bees/1.jpg", f"{place}{folder}/thumb.jpg", "ants/Thumbs.db")
    bunch = load_image_folder(tmp_path, shuffle=False)
    assert relative(bunch, tmp_path) == ["ants/1.jpg", "bees/1.jpg"]
    assert sorted(each[::2] for each in bunch.left_out) == [(".db", 1), (".jpg", 1)]
    assert {each.reason for each in bunch.left_out} == {"hidden or of the system"}


# Splits, and classes by name


SPLIT = [f"{split}/{name}/1.jpg" for split in ("train", "val") for name in ("ants", "bees")]


def lines_in(message):
    return re.findall(r"load_image_folder\(.*?\)(?=\.|$)", message)


@pytest.mark.parametrize("others", [[], ["test/1.jpg"], ["notes/1.jpg"], ["val/wasps/1.jpg"]])
def test_splits_are_no_classes_and_both_lines_of_the_message_work(tmp_path, others):
    fill(tmp_path, *SPLIT, *others)
    with pytest.raises(ValueError, match=r"called like splits") as error:
        load_image_folder(tmp_path)
    as_split, as_classes = [eval(line) for line in lines_in(str(error.value))]
    assert as_split.target_names[:2] == ["ants", "bees"]
    assert sorted(relative(as_split, tmp_path / "train")) == ["ants/1.jpg", "bees/1.jpg"]
    assert as_classes.target_names == sorted({*(name.split("/")[0] for name in [*SPLIT, *others])})


@pytest.mark.parametrize(
    "name", ["Train", "TEST", "validation", "dev", "testing", "hold-out", "val2017", "Test_Images 2"]
)
def test_class_called_like_a_split_has_to_be_named(tmp_path, name):
    fill(tmp_path, f"{name}/1.jpg", "control/1.jpg")
    with pytest.raises(ValueError, match=f"got path=.* with the subfolders '{name}', .*move them out") as error:
        load_image_folder(tmp_path)
    (line,) = lines_in(str(error.value))
    assert eval(line).target_names == sorted([name, "control"])


@pytest.mark.parametrize("name", ["trains", "latest", "tests", "valley", "devil", "contest", "train station", "2017"])
def test_class_of_another_name_needs_not_be_named(tmp_path, name):
    fill(tmp_path, f"{name}/1.jpg", "control/1.jpg")
    assert load_image_folder(tmp_path).target_names == sorted([name, "control"])


def test_classes_share_their_numbers_between_splits(tmp_path):
    fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/a/1.jpg", "val/c/1.jpg")
    for make_empty in (False, True):
        if make_empty:
            (tmp_path / "val" / "b").mkdir()
        train = load_image_folder(tmp_path / "train", shuffle=False)
        val = load_image_folder(tmp_path / "val", shuffle=False, classes=train.target_names)
        assert val.target_names == train.target_names == ["a", "b", "c"]
        assert val.target.tolist() == [0, 2]
        assert [tuple(each) for each in val.left_out] == [("/", "no picture of 'b'", 1)]
    turned = load_image_folder(tmp_path / "train", shuffle=False, classes=("c", "a", "b"))
    assert turned.target_names == ["c", "a", "b"]
    assert [turned.target_names[i] for i in turned.target] == [path.split("/")[-2] for path in turned.data]


def test_folder_that_is_none_of_the_classes_is_an_error_whose_line_works(tmp_path):
    fill(tmp_path, "a/1.jpg", "b/1.jpg", "old/1.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"classes=\['b', 'a'\] are expected, got path='.*' with 'old' too") as error:
        load_image_folder(tmp_path, classes=["b", "a"])
    (line,) = lines_in(str(error.value))
    assert eval(line).target_names == ["b", "a", "old"]


def test_classes_of_splits_asked_of_the_folder_above_lead_into_a_split(tmp_path):
    fill(tmp_path, *SPLIT)
    with pytest.raises(ValueError, match="If these are splits, read one at a time") as error:
        load_image_folder(tmp_path, classes=["ants", "bees"])
    assert eval(lines_in(str(error.value))[0]).target_names == ["ants", "bees"]


@pytest.mark.parametrize(
    ("classes", "meant"),
    [
        (["ant", "bees", "wasps"], "'ants' in place of 'ant'"),
        (["wasp", "ants", "Beess"], "'wasps' in place of 'wasp', 'bees' in place of 'Beess'"),
    ],
)
def test_classes_that_are_spelt_otherwise_are_told_what_may_be_meant(tmp_path, classes, meant):
    fill(tmp_path, "ants/1.jpg", "bees/1.jpg", "wasps/1.jpg")
    with pytest.raises(ValueError, match=f"Did you mean {meant}") as error:
        load_image_folder(tmp_path, classes=classes)
    assert sorted(eval(lines_in(str(error.value))[0]).target_names) == ["ants", "bees", "wasps"]


@pytest.mark.parametrize(
    ("classes", "absent", "named"),
    [
        (["ants", "wasps"], "'wasps'", ["ants", "bees"]),
        (["bee", "wasps", "x"], "'wasps', 'x'", ["bees", "ants"]),
        (["wasps"], "'wasps'", ["ants", "bees"]),
    ],
)
def test_classes_without_a_folder_are_told_before_the_folders_that_there_are(tmp_path, classes, absent, named):
    fill(tmp_path, "ants/1.jpg", "bees/1.jpg")
    with pytest.raises(ValueError, match=f"got path='.*' with no folder {absent}; there are 'ants', 'bees'. ") as error:
        load_image_folder(tmp_path, classes=classes)
    assert ("Did you mean 'bees' in place of 'bee'" in str(error.value)) == ("bee" in classes)
    (line,) = lines_in(str(error.value))
    followed = eval(line)
    assert followed.target_names == named
    assert not followed.left_out


def test_subset_of_the_classes_is_told_how_it_is_taken(tmp_path):
    fill(tmp_path, "ants/1.jpg", "bees/1.jpg", "wasps/1.jpg")
    with pytest.raises(ValueError, match="To leave out a folder, move it elsewhere") as error:
        load_image_folder(tmp_path, classes=["ants", "bees"])
    assert "Did you mean" not in str(error.value)
    (tmp_path / "wasps" / "1.jpg").unlink()
    assert load_image_folder(tmp_path, classes=["ants", "bees"]).target_names == ["ants", "bees"]


def test_advice_for_splits_names_classes_and_splits_with_pictures_alone(tmp_path):
    fill(tmp_path, "dev/ants/notes.txt", "train/ants/1.jpg", "train/bees/1.jpg", "train/labels/1.txt", "val/ants/1.jpg")
    (tmp_path / "train" / "empty").mkdir()
    for given in ({}, {"classes": ["ants", "bees"]}):
        with pytest.raises(ValueError, match=r"move '[^']*labels' elsewhere and read one at a time") as error:
            load_image_folder(tmp_path, **given)
        line = lines_in(str(error.value))[0]
        with pytest.raises(ValueError, match="with 'labels' too"):
            eval(line)
        (tmp_path / "train" / "labels").rename(tmp_path / "labels")
        assert eval(line).target_names == ["ants", "bees"]
        assert len(eval(line).data) == 2
        (tmp_path / "labels").rename(tmp_path / "train" / "labels")


@pytest.mark.parametrize("classes", ["ants", [], ["ants", "ants"], ["ants", 1], {"ants", "bees"}, 3])
def test_classes_are_a_list_of_different_names(photos, classes):
    with pytest.raises(ValueError, match=r"A list of different names .* got classes="):
        load_image_folder(photos, classes=classes)


def test_class_has_its_name_however_its_letters_are_composed(tmp_path):
    fill(tmp_path, unicodedata.normalize("NFD", "Käfer/1.jpg"), "Ameisen/1.jpg")
    composed = unicodedata.normalize("NFC", "Käfer")
    bunch = load_image_folder(tmp_path, classes=["Ameisen", composed], shuffle=False)
    assert (bunch.target_names, bunch.target.tolist()) == (["Ameisen", composed], [0, 1])


# Links


def test_links_to_folders_are_followed_and_lead_nowhere_twice(tmp_path):
    fill(tmp_path, "elsewhere/far/1.jpg", "photos/ants/own/2.jpg", "photos/bees/3.jpg")
    root = tmp_path / "photos"
    for link, to in {
        "wasps": tmp_path / "elsewhere",
        "ants/far": tmp_path / "elsewhere" / "far",
        "ants/far too": tmp_path / "elsewhere" / "far",
        "ants/own/back": root / "ants",
        "bees/up": root,
        "root": root,
        "above": tmp_path,
        "bees/gone": tmp_path / "gone",
    }.items():
        (root / link).symlink_to(to)
    bunch = load_image_folder(root, shuffle=False)
    assert relative(bunch, root) == ["ants/far/1.jpg", "ants/own/2.jpg", "bees/3.jpg", "wasps/far/1.jpg"]
    assert sorted(map(tuple, bunch.left_out)) == [
        ("", "no picture format that can be read here", 1),
        ("/", "a link to a folder that is listed already", 1),
        ("/", "a link to a folder that it lies in", 4),
    ]


def fill(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize("name", ["recycled", "Recycler", "recycle", "trash", "thumbs", "temp"])
def test_words_that_people_call_classes_by_are_classes(tmp_path, name):
    fill(tmp_path, f"{name}/1.jpg", "organic/1.jpg")
    assert sorted(load_image_folder(tmp_path).target_names) == sorted([name, "organic"])


def test_class_of_other_extensions_is_warned_of_and_asks_for_them(tmp_path):
    fill(tmp_path, "ants/1.jpg", "bees/1.jpeg", "bees/2.jpeg", "wasps/.hidden.jpeg", "wasps/@eaDir/1.jpg")
    with pytest.warns(UserWarning, match=r"in 'bees', which holds 2 \.jpeg \(not among ext") as warned:
        load_image_folder(tmp_path, extensions=".jpg")
    assert len(warned) == 1
    assert "Name their endings in extensions" in str(warned[0].message)
    with pytest.raises(ValueError, match=r"with 'bees' too"):
        load_image_folder(tmp_path, extensions=".jpg", classes=["ants"])
    assert load_image_folder(tmp_path, extensions=[".jpg", ".jpeg"]).target_names == ["ants", "bees"]


def test_many_lost_classes_are_told_in_few_words(tmp_path):
    fill(tmp_path, "ants/1.jpg", *(f"class_{i}/{i}.nef" for i in range(50)))
    with pytest.warns(UserWarning, match=r"and in 42 more\. Install") as warned:
        load_image_folder(tmp_path)
    assert len(str(warned[0].message)) < 1500


def test_patterns_in_the_place_of_extensions_are_told_what_these_are(tmp_path):
    fill(tmp_path, "ants/1.jpg", "bees/1.jpg")
    with pytest.raises(
        ValueError, match=r"not among extensions\)\. Name their endings in extensions, such as '\.jpg'\.$"
    ):
        load_image_folder(tmp_path, extensions="*.jpg")
