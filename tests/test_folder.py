"""Laws of `load_image_folder`: what a folder holds, in one order, without opening a file."""

from __future__ import annotations

import os

import numpy as np
import pytest

from featx import images
from featx.images import load_image_folder


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
    with pytest.raises(ValueError, match=r"in whose subfolders is none; there are 1 \.jpeg \(beside"):
        load_image_folder(photos / "ants")
    with pytest.raises(ValueError, match=r"got path='.*empty', which holds no files\. Put each class's"):
        load_image_folder(photos / "empty")


def test_folder_is_public():
    assert images.load_image_folder is load_image_folder
